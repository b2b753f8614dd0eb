"""A folder from somebody hostile: nothing outside it is read or written, no code runs, and each command says one line.

Beside the folder is a victim: files that are valid where the folder names them, so that a command which follows the
name would end well.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli_tools import SIZE, Run
from xattn_video_pipelines.common.demo_data import DEMO_WATCHER
from xattn_video_pipelines.video import write_video
from xattn_video_pipelines.video.manifest import append_record

LABELS = ("dense", "xattn-s8-t0.90-w5")
DENSE, SPARSE = LABELS
ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e"


def clip(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (4, 64, 64, 3), np.uint8)


def add_video(folder: Path, seed: int, *, lossless: bool = True) -> dict[str, Any]:
    """A finished video in `folder`, as `generate` leaves it; its record."""
    folder.mkdir(parents=True, exist_ok=True)
    write_video(folder / f"cat-s{seed}.mp4", clip(seed), 16)
    if lossless:
        write_video(folder / f"cat-s{seed}.mkv", clip(seed), 16, lossless=True)
    record: dict[str, Any] = {
        "id": "cat", "seed": seed, "file": f"cat-s{seed}.mp4",
        "lossless_file": f"cat-s{seed}.mkv" if lossless else None, "prompt": "a red circle on white",
        "model": "m", "model_name": "m", "attention": folder.name.partition("-")[0], "config": None,
        "height": 64, "width": 64, "num_frames": 4, "fps": 16, "steps": 2, "seconds": 2.0, "seconds_per_step": 1.0,
        "mean_density": 1.0, "density_by_step": [1.0, 1.0], "density_by_layer": {"a": 1.0},
        "density_by_layer_and_step": {"a": [1.0, 1.0]}, "dense_reasons": {}, "device_name": "CPU", "versions": {},
        "finished": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    append_record(folder, record)
    return record


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    for label in LABELS:
        for seed in (0, 1):
            add_video(folder / "run" / label, seed)
    for seed in (0, 1):
        add_video(folder / "victim", seed)
    (folder / "victim/text.txt").write_text("precious")
    return folder


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "place")) / "run"


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def edit(folder: Path, line: int = 1, **changes: Any) -> None:
    """Change fields in a line of a manifest; the values go in as JSON writes them."""
    path = folder / "manifest.jsonl"
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    rows[line] |= changes
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


COMMANDS: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "compare": lambda run: ("compare", run / DENSE, run / SPARSE, "--no-lpips"),
    "report": lambda run: ("report", run, "--no-lpips"),
    "judge": lambda run: ("judge", run / SPARSE),
}


def refused(xattn: Run, run: Path, command: str) -> str:
    """The one line of a command that must refuse the run, and must leave what is beside it alone."""
    victim = run.parent / "victim"
    before, beside = everything(victim), sorted(os.listdir(run.parent))
    done = xattn(*COMMANDS[command](run))
    assert done.code == 2, (done.out, done.err)
    assert "Traceback" not in done.err
    assert (everything(victim), sorted(os.listdir(run.parent))) == (before, beside)
    (line,) = [line for line in done.err.splitlines() if line.startswith("xattn-video: ")]
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_the_folder_itself_is_fine(run, xattn, command):
    assert xattn(*COMMANDS[command](run)).code == 0


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("field", ["file", "lossless_file"])
@pytest.mark.parametrize("name", ["{victim}/cat-s1.mp4", "../../victim/cat-s1.mp4", "..", "", "a/../cat-s1.mp4", "C:x"])
def test_names_of_files_elsewhere_are_refused_with_their_line(run, xattn, command, field, name):
    edit(run / SPARSE, **{field: name.format(victim=run.parent / "victim")})
    line = refused(xattn, run, command)
    assert f"{SPARSE}/manifest.jsonl:2: not a manifest line" in line
    assert f"{field} must be the plain name of a file in the manifest's folder" in line


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["cat-s1.mp4", "cat-s1.mkv"])
def test_a_video_that_is_a_link_out_of_the_folder_is_refused(run, xattn, command, name):
    if name.endswith(".mp4"):
        # Otherwise the copy is what is read.
        for label in LABELS:
            edit(run / label, lossless_file=None)
    (run / SPARSE / name).unlink()
    (run / SPARSE / name).symlink_to(run.parent / "victim" / name)
    assert f"{SPARSE}/{name}: is a link that leads out of" in refused(xattn, run, command)


def test_a_link_within_the_folder_is_followed(run, xattn):
    for name in ("cat-s1.mp4", "cat-s1.mkv"):
        (run / SPARSE / name).rename(run / SPARSE / f"real-{name}")
        (run / SPARSE / name).symlink_to(f"real-{name}")
    assert xattn(*COMMANDS["compare"](run)).code == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_manifest_that_is_a_link_is_refused(run, xattn, command):
    (run / SPARSE / "manifest.jsonl").unlink()
    (run / SPARSE / "manifest.jsonl").symlink_to(run.parent / "victim/manifest.jsonl")
    assert f"{SPARSE}/manifest.jsonl: cannot read: it is a symbolic link" in refused(xattn, run, command)


def test_a_folder_of_a_run_that_is_a_link_out_of_it_is_refused(run, xattn):
    shutil.rmtree(run / SPARSE)
    (run / SPARSE).symlink_to(run.parent / "victim")
    assert f"{SPARSE}: is a link that leads out of" in refused(xattn, run, "report")
    (run / "dense-alt").symlink_to(run.parent / "victim")
    (run / SPARSE).unlink()
    shutil.copytree(run / DENSE, run / SPARSE)
    assert "dense-alt: is a link that leads out of" in refused(xattn, run, "compare")


WRONG: list[tuple[str, Any]] = [
    ("config", True), ("config", []), ("config", {"threshold": "x"}), ("config", {"no": 1}), ("seconds", "x"),
    ("seconds", 1e308), ("seconds", -1), ("seconds", 1e-300), ("mean_density", "1"), ("mean_density", 2),
    ("density_by_step", 3), ("density_by_step", ["a"]), ("density_by_layer", [1]), ("density_by_layer", {"a": "b"}),
    ("density_by_layer_and_step", {"a": 1}), ("density_by_layer_and_step", {"a": [{}]}), ("dense_reasons", []),
    ("dense_reasons", {"a": "b"}), ("prompt", 7), ("prompt", ["a"]), ("fps", "16"), ("width", 1e308), ("height", {}),
    ("num_frames", True), ("versions", "all"), ("versions", {"torch": 2}), ("device_name", 3), ("finished", 2026),
    ("residual_bytes", "many"), ("calls_without_residual", 1.5), ("peak_memory_bytes", 10**400), ("tokens", "n"),
    ("seed", True), ("seed", -1), ("seed", 2**70), ("id", None), ("id", 5), ("file", 5), ("lossless_file", True),
    ("attention", 1), ("model", {}), ("model_name", []), ("weights", 4), ("commit", 1), ("compile", "yes"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG, ids=lambda value: str(value)[:12])
def test_wrong_types_in_a_manifest_are_one_line_with_its_place(run, xattn, field, value):
    edit(run / SPARSE, **{field: value})
    for command in COMMANDS:
        if isinstance(value, dict) and field == "config" and command != "report":
            # What the settings of sparse attention may be, only the page tells in words.
            continue
        line = refused(xattn, run, command)
        assert f"{SPARSE}/manifest.jsonl" in line
        assert f"({field}" in line or f": {field}: " in line


@pytest.mark.parametrize(
    "line",
    [
        "[" * 200_000, '{"id":' * 100_000, "NaN", '{"id": "a", "seed": NaN}', '{"id": "a", "seed": ' + "9" * 5000 + "}",
        '{"id": "a", "seed": 0, "seed": 1}', b"\xff\xfe", "null", '"cat"', "\x00",
        '{"id": "a", "seed": 0, "config": ' + "[" * 60 + "]" * 60 + "}",
    ],
    ids=lambda line: str(line)[:14],
)  # fmt: skip
@pytest.mark.parametrize("command", COMMANDS)
def test_lines_that_are_no_json_are_one_line_with_its_place(run, xattn, command, line):
    with (run / SPARSE / "manifest.jsonl").open("ab") as manifest:
        manifest.write((line if isinstance(line, bytes) else line.encode()) + b"\n")
    assert f"{SPARSE}/manifest.jsonl:3: not a manifest line" in refused(xattn, run, command)


def at(document: Any, place: tuple[Any, ...], value: Any) -> None:
    for step in place[:-1]:
        document = document[step]
    document[place[-1]] = value


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("pairs",), 1e308), (("pairs",), "2"), (("psnr",), "x"), (("psnr",), None), (("psnr",), 1e300),
        (("lpips",), []), (("definitions",), []), (("definitions",), {"psnr": 4}), (("unmatched",), {}),
        (("unmatched",), {"dense_only": [1], "sparse_only": []}), (("source",), None), (("source",), {"mp4": "x"}),
        (("videos",), {}), (("videos",), [3]), (("videos", 0), {}), (("videos", 0, "psnr"), "x"),
        (("videos", 0, "id"), 4), (("videos", 0, "seed"), [1]), (("videos", 0, "worst_region"), 7),
        (("videos", 0, "worst_region_share"), "a"), (("videos", 0, "speedup"), {}), (("identical_frames",), "1"),
        (("lpips_unavailable",), 5), (("psnr_cap_db",), "a"), (("videos", 0, "flicker_worst_frame"), 1.5),
    ],
    ids=str,
)  # fmt: skip
def test_a_summary_with_wrong_types_is_said_and_measured_again(run, xattn, place, value):
    assert xattn(*COMMANDS["compare"](run)).code == 0
    path = run / SPARSE / "summary.json"
    good = json.loads(path.read_text())
    spoiled = json.loads(path.read_text())
    at(spoiled, place, value)
    path.write_text(json.dumps(spoiled))
    done = xattn(*COMMANDS["report"](run))
    assert done.code == 0, done.err
    assert "summary.json: not of this version, so the folder is compared again: " in done.err
    assert json.loads(path.read_text())["videos"] == good["videos"]


@pytest.mark.parametrize("text", ["[" * 200_000, "NaN", "{", "\x00", '{"pairs": 1, "pairs": 2}', "9" * 5000])
def test_a_summary_that_is_no_json_is_measured_again(run, xattn, text):
    (run / SPARSE / "summary.json").write_text(text)
    assert xattn(*COMMANDS["report"](run)).code == 0
    assert json.loads((run / SPARSE / "summary.json").read_text())["pairs"] == 2


@pytest.mark.parametrize("name", ["summary.json", "metrics.csv", "metrics_frames.csv", "judged.json", "report.html"])
@pytest.mark.parametrize("form", ["{}", ".{stem}.partial{suffix}"])
def test_planted_links_are_never_written_through(run, xattn, name, form):
    folder = run if name == "report.html" else run / SPARSE
    planted = form.replace("{}", name).format(stem=Path(name).stem, suffix=Path(name).suffix)
    (folder / planted).symlink_to(run.parent / "victim/text.txt")
    before = everything(run.parent / "victim")
    for command in COMMANDS:
        assert xattn(*COMMANDS[command](run)).code == 0
    assert everything(run.parent / "victim") == before
    assert not (folder / name).is_symlink()


# --- pickles and code ---------------------------------------------------------------------------------------------


class Evil:
    """A pickle that, when it is loaded, makes a folder."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


def evil_checkpoint(path: Path, proof: Path, *, zipped: bool) -> None:
    """A checkpoint as torch writes it, or a bare pickle."""
    import torch

    if zipped:
        torch.save({"weight": torch.zeros(2), "more": Evil(proof)}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(proof)))


def test_the_pickle_would_do_harm(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "proof")))
    assert (tmp_path / "proof").is_dir()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_never_run(prepared, run, model, tmp_path, xattn, zipped):
    proof = tmp_path / "proof"
    weights = tmp_path / "weights"
    weights.mkdir()
    evil_checkpoint(weights / "alexnet-owt-7be5be79.pth", proof, zipped=zipped)
    generator = Path(shutil.copytree(model, tmp_path / "generator"))
    for file in generator.rglob("*.safetensors"):
        evil_checkpoint(file.with_suffix(".bin"), proof, zipped=zipped)
        file.unlink()
    (generator / "text_encoder/model.bin").rename(generator / "text_encoder/pytorch_model.bin")
    watcher = Path(shutil.copytree(DEMO_WATCHER, tmp_path / "watcher", ignore=shutil.ignore_patterns("*.safetensors")))
    evil_checkpoint(watcher / "pytorch_model.bin", proof, zipped=zipped)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    for command in (
        ("compare", run / DENSE, run / SPARSE, "--lpips-weights", weights),
        ("report", run, "--lpips-weights", weights),
        ("generate", "--model", generator, "--prompts", prompts, "--out", tmp_path / "out", *SIZE),
        ("sweep", "--model", generator, "--prompts", prompts, "--out", tmp_path / "sweep", *SIZE, "--no-lpips"),
        ("qa", "--model", watcher, "--video", run / DENSE / "cat-s0.mp4", "--question", "what?"),
    ):
        done = xattn(*command)
        assert done.code == 2, (command, done.err)
        assert "Traceback" not in done.err
        assert len([line for line in done.err.splitlines() if line.startswith("xattn-video: error: ")]) == 1
        assert not proof.exists()


def test_code_of_a_model_is_never_run(model, tmp_path, xattn):
    proof, folder = tmp_path / "proof", Path(shutil.copytree(model, tmp_path / "custom"))
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(proof)!r})\n")
    (folder / "pipeline.py").write_text(f"import os\nos.mkdir({str(proof)!r})\n")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    index = json.loads((folder / "model_index.json").read_text())
    for change in ({"_class_name": ["code", "Pipeline"]}, {"transformer": ["code", "Transformer"]}):
        (folder / "model_index.json").write_text(json.dumps(index | change))
        done = xattn("generate", "--model", folder, "--prompts", prompts, "--out", tmp_path / "out", *SIZE)
        assert (done.code, "Traceback" in done.err) == (2, False), done.err
        assert not proof.exists()


@pytest.mark.parametrize("command", ["generate", "sweep"])
def test_an_output_folder_of_somebody_hostile(model, tmp_path, xattn, command):
    """Links under every name that the command writes; what is outside stays as it is."""
    victim, out = tmp_path / "victim", tmp_path / "out"
    (out / "dense").mkdir(parents=True)
    victim.mkdir()
    (victim / "text.txt").write_text("precious")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    options = ("--model", model, "--prompts", prompts, "--out", out, *SIZE)
    options += ("--attention", "dense") if command == "generate" else ("--no-lpips", "--no-plot", "--thresholds", 0.9)
    lines = []
    for name, target in (
        ("dense-alt", "."), ("xattn-s8-t0.90-w0", "."), ("dense/manifest.jsonl", "text.txt"),
        ("dense/manifest.jsonl", "new.txt"), ("dense/.0001-s0.lock", "text.txt"), ("dense/.0001-s0.lock", "new.txt"),
    ):  # fmt: skip
        if command == "generate" and not name.startswith("dense/"):
            continue
        (out / name).symlink_to(victim / target)
        done = xattn(command, *options)
        assert (done.code, "Traceback" in done.err) == (2, False), (name, done.err)
        lines.append(done.err.splitlines()[-1])
        (out / name).unlink()
        assert everything(victim) == {str(victim / "text.txt"): (b"precious", (victim / "text.txt").stat().st_mtime_ns)}
    assert all("link" in line for line in lines), lines
    for name in (
        "dense/0001-s0.mp4",
        "dense/0001-s0.mkv",
        "dense/.0001-s0.partial.mp4",
        "sweep.json",
        "sweep.csv",
        "run.toml",
    ):
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(victim / "text.txt")
    done = xattn(command, *options)
    assert done.code == 0, done.err
    assert (victim / "text.txt").read_text() == "precious"
    assert os.listdir(victim) == ["text.txt"]


@pytest.mark.parametrize(
    "row",
    [
        "[" * 200_000, "NaN", b"\xff", '{"id": "a", "id": "b"}', '{"id": "question"}', "3",
        json.dumps({"id": "question", "attention": "dense", "reply": 7}), json.dumps({"id": [], "attention": {}}),
    ],
    ids=lambda row: str(row)[:12],
)  # fmt: skip
def test_answers_of_somebody_else_are_one_line(run, tmp_path, xattn, row):
    out = tmp_path / "answers"
    out.mkdir()
    (out / "answers.jsonl").write_bytes((row if isinstance(row, bytes) else row.encode()) + b"\n")
    done = xattn("qa", "--model", "demo", "--video", run / DENSE / "cat-s0.mp4", "--question", "what?", "--out", out)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert "answers.jsonl:1: not an answer of this program; use another --out" in line
    (out / "answers.jsonl").unlink()
    (out / "answers.jsonl").symlink_to(run.parent / "victim/manifest.jsonl")
    before = everything(run.parent / "victim")
    done = xattn("qa", "--model", "demo", "--video", run / DENSE / "cat-s0.mp4", "--question", "what?", "--out", out)
    assert (done.code, everything(run.parent / "victim")) == (2, before)
    assert "answers.jsonl: cannot write: it is a symbolic link" in done.err
