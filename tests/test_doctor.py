"""`xattn-video doctor` says what runs here and why something does not."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from tests.test_extras import in_a_fresh_python
from xattn_video.extras import install_command
from xattn_video_pipelines import doctor
from xattn_video_pipelines.common import environment

ROOT = Path(__file__).resolve().parent.parent


def test_a_working_machine_has_exit_code_zero_and_a_report_for_people(xattn):
    done = xattn("doctor", "--full")
    assert done.code == 0, done.out
    for expected in ("torch", "diffusers", "devices", "cpu", "checks", "ffmpeg", "videos can be generated here"):
        assert expected in done.out
    assert torch.__version__ in done.out
    assert "broken" not in done.out


def test_json_has_versions_devices_and_checks(xattn):
    done = xattn("doctor", "--full", "--json")
    report = json.loads(done.out.splitlines()[-1])
    assert report["ok"] is True
    assert report["versions"]["torch"] == torch.__version__
    assert {check["name"] for check in report["checks"]} >= {"torchvision", "diffusers", "ffmpeg", "lpips", "ftfy"}
    cpu = report["devices"][0]
    assert (cpu["device"], cpu["auto"]) == ("cpu", "cpu")
    assert cpu["backends"]["cpu"] is cpu["backends"]["reference"] is cpu["backends"]["flex"] is None
    assert "GPU" in cpu["backends"]["triton"]
    if not torch.cuda.is_available():
        assert "CUDA" in report["devices"][-1]["reason"]


@pytest.mark.parametrize(
    ("cuda", "hip", "reason"),
    [
        ("13.0", None, "has CUDA or ROCm, but sees no GPU or driver"),
        (None, "7.0", "has CUDA or ROCm, but sees no GPU or driver"),
        (None, None, "is built without CUDA or ROCm"),
    ],
)
def test_no_gpu_has_its_reason(cuda, hip, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert doctor.devices()[-1] == {
        "device": "cuda", "name": None, "reason": f"torch {torch.__version__} {reason}"
    }  # fmt: skip


def test_the_version_of_torch_says_which_build_it_is(monkeypatch):
    monkeypatch.setattr(environment.metadata, "version", lambda package: "2.13.0")
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    assert environment.versions(["torch", "triton"]) | {"python": None} == {
        "python": None, "torch": "2.13.0+cu130", "triton": "2.13.0"
    }  # fmt: skip


def test_a_device_without_a_fast_backend_says_dense_and_why(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = next(device for device in doctor.devices() if device["device"] == "mps")
    assert device["auto"].startswith("dense attention only (triton: it needs an NVIDIA or AMD GPU")
    assert device["backends"]["cpu"] == "it runs on a CPU, not on mps"
    assert device["backends"]["flex"] == "it runs on a CPU and on an NVIDIA or AMD GPU, not on mps"


def test_a_diffusers_that_is_too_old_is_broken_and_names_what_to_install(xattn, monkeypatch):
    monkeypatch.setattr(doctor, "OLDEST_DIFFUSERS", "7.5")
    done = xattn("doctor")
    assert done.code == 1
    assert "is older than 7.5; pip install 'diffusers>=7.5'" in done.out
    assert "videos cannot be generated here" in done.out


def test_the_oldest_diffusers_is_that_of_pyproject_and_has_no_upper_bound():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = project["optional-dependencies"]["diffusers"]
    assert f"diffusers>={doctor.OLDEST_DIFFUSERS}" in extra
    # which make test-lowest installs
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"LOWEST_DIFFUSERS := {doctor.OLDEST_DIFFUSERS}.0\n" in makefile


REPORT = "from xattn_video_pipelines.cli import main\nsys.exit(main(['doctor', '--full', '--json']))"


def test_without_torch_it_says_that_torch_is_missing():
    done = in_a_fresh_python(REPORT, without=("torch",))
    assert (done.returncode, done.stderr) == (1, "")
    report = json.loads(done.stdout)
    assert (report["ok"], report["versions"]["torch"], report["devices"]) == (False, None, [])
    broken = [check for check in report["checks"] if check["status"] == "broken"]
    assert [check["name"] for check in broken] == ["torch"]
    assert broken[0]["message"] == "not installed, and everything needs it: pip install torch"


def test_with_torch_alone_it_says_what_each_extra_would_add():
    names = ("diffusers", "transformers", "torchvision", "lpips", "ftfy", "imageio_ffmpeg", "numpy", "tqdm")
    done = in_a_fresh_python(REPORT, without=(*names, "skimage", "PIL", "matplotlib", "cyclopts"))
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["devices"][0]["auto"] == "cpu"
    messages = {check["name"]: (check["status"], check["message"]) for check in report["checks"]}
    for name, extra in [
        ("diffusers", "diffusers"),
        ("transformers", "transformers"),
        ("numpy", "cli"),
        ("cyclopts", "cli"),
    ]:
        assert messages[name] == ("broken", messages[name][1])
        assert f"{name} is not installed; {install_command(extra)}" in messages[name][1]
    assert messages["skimage"][0] == messages["matplotlib"][0] == messages["lpips"][0] == "note"
    assert install_command("plot") in messages["matplotlib"][1]


def test_an_import_that_fails_is_reported_and_not_raised(tmp_path, monkeypatch):
    (tmp_path / "ftfy.py").write_text("raise RuntimeError('operator x::y does not exist')\n")
    monkeypatch.delitem(sys.modules, "ftfy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    check = doctor.check_ftfy()
    assert check["status"] == "broken"
    assert "operator x::y does not exist" in check["message"]


def test_torchvision_is_healthy_or_repaired_here():
    assert doctor.check_torchvision()["status"] in ("ok", "repaired")


def test_the_quick_report_has_what_files_tell_and_says_so(xattn, tmp_path, monkeypatch):
    done = xattn("doctor", "--json")
    quick, full = json.loads(done.out), doctor.examine()
    assert (done.code, quick["ok"], quick["full"], full["full"]) == (0, True, False, True)
    assert quick["versions"] == full["versions"]
    assert {check["name"] for check in quick["checks"]} == {check["name"] for check in full["checks"]}
    assert quick["devices"][0]["name"].startswith(environment.cpu_name())
    done = xattn("doctor")
    assert "nothing is missing for videos; whether it all works is what xattn-video doctor --full tries" in done.out
    assert "can be generated" not in done.out


def test_the_quick_report_lists_gpus_where_torch_could_use_them(tmp_path, monkeypatch):
    for number, name in enumerate(("NVIDIA H100", "NVIDIA H200")):
        (tmp_path / f"0000:{number}").mkdir()
        (tmp_path / f"0000:{number}/information").write_text(f"Model: \t\t {name}\nIRQ: 7\n")
    monkeypatch.setattr(doctor, "_NVIDIA_GPUS", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = [(device["device"], device["name"]) for device in doctor.devices_seen()[1:]]
    assert found == [("cuda:0", "NVIDIA H100"), ("cuda:1", "NVIDIA H200")]
    monkeypatch.setattr(doctor, "_NVIDIA_GPUS", tmp_path / "nothing")
    assert doctor.devices_seen()[1] == {
        "device": "cuda", "name": None, "reason": "no GPU is listed; --full asks torch"
    }  # fmt: skip
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor.devices_seen()[1]["reason"] == f"torch {torch.__version__} is built without CUDA or ROCm"


def test_the_quick_report_imports_no_large_library():
    code = (
        "from xattn_video_pipelines.cli import main\nmain(['doctor', '--json'])\n"
        "large = {'torch', 'diffusers', 'transformers', 'torchvision', 'numpy'}\n"
        "print(sorted(large & set(sys.modules)), file=sys.stderr)"
    )
    assert in_a_fresh_python(code).stderr == "[]\n"
