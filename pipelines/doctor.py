"""`xattn-video doctor`: what is installed, what can run here, and why something cannot."""

from __future__ import annotations

import importlib
import platform
import re
from json import dumps
from pathlib import Path
from typing import Any

from xattn_video_pipelines.common.environment import cpu_name, versions
from xattn_video_pipelines.common.settings import Json

EXAMPLE = """\
example:
  xattn-video doctor
  xattn-video doctor --json
"""

# From the first release to, but not including, the second; as pyproject.toml says. Tested at both ends.
DIFFUSERS_RANGE = ("0.36", "0.43")

_PACKAGES = (
    "xattn-video", "torch", "triton", "diffusers", "transformers", "accelerate", "torchvision", "lpips", "ftfy",
    "imageio-ffmpeg",
)  # fmt: skip
_ALEXNET = "alexnet-owt-7be5be79.pth"

# status: "ok"; "mended" and "note" do not stop anything; "broken" stops generation.
Check = dict[str, str]


def command(*, json: Json = False) -> int:
    """Print the report; returns 0 if videos can be generated here, else 1."""
    report = examine()
    print(dumps(report) if json else format_report(report))
    return 0 if report["ok"] else 1


def examine() -> dict[str, Any]:
    """The report: versions, devices with their backends, and checks with what would repair them.

    Without torch there are no devices to tell of, and what needs torch is not checked.
    """
    has_torch = versions(["torch"])["torch"] is not None
    if has_torch:
        checks = [
            check_torchvision(),
            check_diffusers(),
            _check_import("transformers", "transformers.models.umt5.modeling_umt5"),
            check_ftfy(),
            check_ffmpeg(),
            check_lpips(),
        ]
    else:
        missing = _check("torch", "broken", "not installed, and everything needs it: pip install torch")
        checks = [missing, check_ftfy(), check_ffmpeg()]
    return {
        "ok": all(check["status"] != "broken" for check in checks),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(_PACKAGES),
        "devices": devices() if has_torch else [],
        "checks": checks,
    }


def devices() -> list[dict[str, Any]]:
    """Each kind of device: whether torch sees one, what `auto` uses there, and each backend's reason not to run."""
    import torch

    cuda = [
        (f"cuda:{index}", f"{own.name}, {_gib(own.total_memory)}")
        for index, own in enumerate(map(torch.cuda.get_device_properties, range(torch.cuda.device_count())))
    ]
    found = [("cpu", f"{cpu_name()}, {torch.get_num_threads()} threads"), *cuda]
    if torch.xpu.is_available():
        found.append(("xpu", torch.xpu.get_device_name()))
    if torch.backends.mps.is_available():
        found.append(("mps", f"Apple {platform.machine()}"))
    report = [_device(name, description) for name, description in found]
    if not cuda:
        why = "has CUDA or ROCm, but sees no GPU or driver" if _built_for_gpu() else "is built without CUDA or ROCm"
        report.append({"device": "cuda", "name": None, "reason": f"torch {torch.__version__} {why}"})
    return report


def check_torchvision() -> Check:
    """A torchvision built for another torch fails to import and takes diffusers down with it."""
    from xattn_video.integrations.torchvision_ops import repair_torchvision

    message = repair_torchvision()
    if message:
        return _check("torchvision", "mended", message)
    if versions(["torchvision"])["torchvision"] is None:
        return _check("torchvision", "ok", "not installed, and not needed but for LPIPS")
    return _check_import("torchvision", "torchvision")


def check_diffusers() -> Check:
    """diffusers is importable and in the range that is tested."""
    version = versions(["diffusers"])["diffusers"]
    if version is None:
        return _check("diffusers", "broken", "not installed; mend: pip install diffusers")
    low, high = DIFFUSERS_RANGE
    if not _numbers(low) <= _numbers(version) < _numbers(high):
        return _check("diffusers", "broken", f"{version} is outside of >={low},<{high}; mend: {_pip(low, high)}")
    check = _check_import("diffusers", "diffusers.pipelines.wan.pipeline_wan")
    return check if check["status"] == "broken" else _check("diffusers", "ok", f"{version}, in >={low},<{high}")


def check_ftfy() -> Check:
    """Without ftfy diffusers cleans Wan's prompts differently, silently."""
    if versions(["ftfy"])["ftfy"] is None:
        return _check("ftfy", "note", "not installed: Wan prompts are cleaned differently; mend: pip install ftfy")
    return _check_import("ftfy", "ftfy")


def check_ffmpeg() -> Check:
    """The ffmpeg that imageio-ffmpeg brings, which writes and reads every video."""
    try:
        path = importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        return _check("ffmpeg", "broken", f"{_line(error)}; mend: pip install imageio-ffmpeg")
    return _check("ffmpeg", "ok", Path(path).name)


def check_lpips() -> Check:
    """LPIPS is optional: compare says `unavailable` without it."""
    import torch

    if versions(["lpips"])["lpips"] is None:
        return _check("lpips", "note", "not installed: compare leaves LPIPS out; mend: pip install lpips")
    if (Path(torch.hub.get_dir()) / "checkpoints" / _ALEXNET).is_file():
        return _check("lpips", "ok", "AlexNet's weights are here")
    return _check(
        "lpips", "note", "AlexNet's weights (233 MB) are not here: compare downloads them, or leaves LPIPS out"
    )


def format_report(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    lines = [f"system    {report['system']}", "versions"]
    lines += [f"  {name:16}{version or 'not installed'}" for name, version in report["versions"].items()]
    lines.append("devices")
    for device in report["devices"]:
        if device["name"] is None:
            lines.append(f"  {device['device']:8}none: {device['reason']}")
            continue
        lines.append(f"  {device['device']:8}{device['name']}; auto runs {device['auto']}")
        lines += [f"    {name:14}{reason or 'runs'}" for name, reason in device["backends"].items()]
    lines.append("checks")
    lines += [f"  {check['status']:8}{check['name']}: {check['message']}" for check in report["checks"]]
    lines.append(
        "videos can be generated here" if report["ok"] else "videos cannot be generated here: see broken above"
    )
    return "\n".join(lines)


def _device(name: str, description: str) -> dict[str, Any]:
    import torch

    from xattn_video.config import BACKENDS
    from xattn_video.ops.backends import auto_name, unavailable_reason

    device = torch.device(name)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    reasons = {backend: unavailable_reason(backend, device, dtype) for backend in BACKENDS if backend != "auto"}
    chosen = auto_name(device, dtype)
    auto = chosen or f"dense attention only (triton: {reasons['triton']})"
    return {"device": name, "name": description, "auto": auto, "backends": reasons}


def _check_import(name: str, module: str) -> Check:
    try:
        importlib.import_module(module)
    # Whatever an import raises (a missing library, an operator mismatch), the report is to say it and go on.
    except Exception as error:
        return _check(name, "broken", f"cannot be imported: {_line(error)}")
    return _check(name, "ok", versions([name])[name] or "importable")


def _check(name: str, status: str, message: str) -> Check:
    return {"name": name, "status": status, "message": message}


def _built_for_gpu() -> bool:
    import torch

    return torch.version.cuda is not None or torch.version.hip is not None


def _pip(low: str, high: str) -> str:
    return f'pip install "diffusers>={low},<{high}"'


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _gib(size: int) -> str:
    return f"{size / 2**30:.0f} GiB"


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
