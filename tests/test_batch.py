"""A bad item does not end a run: what is written down, what is made beside it, what a second run does, exit codes."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli_tools import (
    SIZE,
    SPARSE,
    save_tiny_image_to_video,
    save_tiny_wan,
    tiny_tokenizer,
)
from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.batch import FAILURES, Batch, SomeFailed, is_out_of_memory, kind_of
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.video import GenerateSettings, generate, make_plan, produce
from xattn_video_pipelines.video import make as maker
from xattn_video_pipelines.video.io import read_video
from xattn_video_pipelines.video.manifest import NAME as MANIFEST
from xattn_video_pipelines.video.manifest import read_manifest

ROOT = Path(__file__).resolve().parent.parent
# What a prompt of the spoiled model may hold: a letter whose embedding is NaN, and a word that has no embedding.
NOT_FINITE, WITHOUT_EMBEDDING = "~", "<missing>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan pipeline that fails on some prompts: its tokenizer and its text encoder do not go together."""
    folder = save_tiny_wan(tmp_path_factory.mktemp("model"))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([WITHOUT_EMBEDDING])
    tokenizer.save_pretrained(folder / "tokenizer")
    (weights,) = (folder / "text_encoder").glob("*.safetensors")
    values = load_file(weights)
    embeddings = [value for value in values.values() if len(value) == 259]
    assert embeddings
    for value in embeddings:
        value[tokenizer.convert_tokens_to_ids(NOT_FINITE)] = float("nan")
    save_file(values, weights, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_image_to_video(tmp_path_factory.mktemp("image-model"))


def write_prompts(path: Path, **texts: str) -> Path:
    path.write_text("".join(json.dumps({"id": name, "prompt": text}) + "\n" for name, text in texts.items()))
    return path


def failures(out: Path) -> list[dict[str, Any]]:
    return [row for _, row in jsonl.read(out / FAILURES)]


def made(folder: Path) -> list[str]:
    return [identity for identity, _ in read_manifest(folder)]


def test_bad_items_are_noted_the_others_made_and_a_rerun_tries_them_last(model, tmp_path, xattn):
    out = tmp_path / "out"
    prompts = tmp_path / "p.jsonl"
    command = ("generate", "--model", model, "--prompts", prompts, "--out", out, "--attention", "dense", *SIZE)
    write_prompts(prompts, spoiled=f"a {NOT_FINITE}", raising=WITHOUT_EMBEDDING, good="a cat")
    done = xattn(*command)
    assert done.code == 3
    assert made(out / "dense") == ["good"]
    assert "videos: 1 made, 0 kept" in done.out
    assert "Traceback" not in done.err
    spoiled, raising = failures(out)
    assert (spoiled["attention"], spoiled["id"], spoiled["seed"], spoiled["kind"]) == (
        "dense",
        "spoiled",
        0,
        "not_finite",
    )
    assert "frame 0 of the video has NaN or inf" in spoiled["message"]
    assert (raising["id"], raising["kind"]) == ("raising", "error")
    assert raising["message"] == "IndexError: index out of range in self"
    assert "in _make\n" in raising["traceback"]
    assert "IndexError: index out of range in self" in raising["traceback"]
    assert raising["versions"]["torch"] == torch.__version__
    assert raising["time"].startswith("20")
    # The list at the end.
    listed = done.err.splitlines()[-4:]
    assert listed[0] == f"videos that failed: 2; {out / FAILURES} has the tracebacks"
    assert listed[1] == f"  dense/spoiled-s0: not_finite: {spoiled['message']}"
    assert listed[2] == "  dense/raising-s0: error: IndexError: index out of range in self"
    assert listed[3] == "run the same command again for what is left or failed"

    # Again: the good one is kept, the others fail again. As JSON the list is in the document.
    again = xattn(*command, "--json")
    assert again.code == 3
    document = json.loads(again.out)
    assert (document["made"], document["kept"], document["left"]) == (0, 1, 0)
    assert [(row["id"], row["kind"]) for row in document["failures"]] == [
        ("spoiled", "not_finite"),
        ("raising", "error"),
    ]
    assert [video["status"] for video in document["videos"]] == ["failed", "failed", "kept"]
    assert len(failures(out)) == 4

    # Put right: those that failed come after one that is new.
    write_prompts(prompts, spoiled="a dog", raising="a fox", good="a cat", new="a hen")
    right = xattn(*command)
    assert right.code == 0, right.err
    assert [Path(line.split()[0]).stem for line in right.out.splitlines()[:-1]] == [
        "new-s0",
        "spoiled-s0",
        "raising-s0",
    ]
    assert "failed" not in right.err
    assert sorted(path.name for path in (out / "dense").iterdir()) == sorted(
        [MANIFEST, *(f"{name}-s0.mp4" for name in ("spoiled", "raising", "good", "new"))]
    )


def test_a_picture_that_is_cut_in_half_costs_its_own_video_alone(image_model, tmp_path, xattn):
    from PIL import Image

    lines = []
    for name, colour in (("red", (255, 0, 0)), ("half", (0, 255, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (500, 400), colour).save(tmp_path / f"{name}.png")
        lines.append(json.dumps({"prompt": "a shape", "id": name, "image": f"{name}.png"}))
    whole = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out"
    prompts.write_text("\n".join(lines))
    command = ("generate", "--model", image_model, "--prompts", prompts, "--out", out, "--attention", "dense", *SIZE)
    done = xattn(*command)
    assert done.code == 3
    assert made(out / "dense") == ["red", "blue"]
    (row,) = failures(out)
    assert (row["id"], row["kind"]) == ("half", "input")
    assert row["message"].startswith(f"{tmp_path / 'half.png'}: damaged image")
    (tmp_path / "half.png").write_bytes(whole)
    assert xattn(*command).code == 0
    assert made(out / "dense") == ["red", "blue", "half"]


def test_pictures_are_read_before_the_model_is(image_model, tmp_path, xattn, monkeypatch):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "half.png")
    whole = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out"
    prompts.write_text(json.dumps({"prompt": "a shape", "id": "half", "image": "half.png"}))
    loads: list[Any] = []
    monkeypatch.setattr(maker, "load_pipeline", lambda *arguments, **named: loads.append(arguments))
    done = xattn("generate", "--model", image_model, "--prompts", prompts, "--out", out, *SIZE)
    assert (done.code, loads) == (3, [])
    assert [row["id"] for row in failures(out)] == ["half"]


def test_too_little_memory_of_the_cpu_is_a_failure_of_the_item(model, tmp_path, xattn):
    """A terabyte of noise: the CPU says so with a RuntimeError."""
    prompts, out = write_prompts(tmp_path / "p.jsonl", one="a cat", two="a dog"), tmp_path / "out"
    large = ("--height", 65536, "--width", 65536, "--num-frames", 1001, "--steps", 2)
    command = ("generate", "--model", model, "--prompts", prompts, "--out", out, "--attention", "dense")
    done = xattn(*command, *large)
    assert done.code == 3
    assert [(row["id"], row["kind"]) for row in failures(out)] == [("one", "out_of_memory"), ("two", "out_of_memory")]
    # There is nothing to move off a CPU.
    assert failures(out)[0]["message"] == "cpu is out of memory; try --dtype bfloat16, fewer frames or a smaller size"
    assert "DefaultCPUAllocator" in failures(out)[0]["traceback"]
    assert xattn(*command, *SIZE).code == 0


def test_a_run_that_is_killed_among_failures_goes_on(model, tmp_path, xattn):
    out = tmp_path / "out"
    texts = {f"bad{number}": NOT_FINITE for number in range(2)} | {f"good{number}": "a cat" for number in range(30)}
    prompts = write_prompts(tmp_path / "p.jsonl", **texts)
    command = [str(part) for part in ("generate", "--model", model, "--prompts", prompts, "--out", out, *SIZE)]
    command += ["--attention", "dense", "--limit"]
    process = subprocess.Popen(
        [sys.executable, "-m", "xattn_video_pipelines.cli", *command, "32"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and len(read_manifest(out / "dense")) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=1000) == -signal.SIGKILL
    kept = made(out / "dense")
    assert 2 <= len(kept) < 30
    assert [row["id"] for row in failures(out)] == ["bad0", "bad1"]
    done = xattn(*command, len(kept) + 3, "--json")
    assert done.code == 3
    document = json.loads(done.out)
    assert (document["made"], document["kept"]) == (1, len(kept))
    assert [row["id"] for row in failures(out)] == ["bad0", "bad1"] * 2
    for name in made(out / "dense"):
        assert read_video(out / "dense" / f"{name}-s0.mp4").shape == (9, 64, 64, 3)


def test_a_sweep_measures_what_every_configuration_has(model, tmp_path, xattn):
    out = tmp_path / "out"
    prompts = write_prompts(tmp_path / "p.jsonl", one="a cat", bad=NOT_FINITE, two="a dog")
    command = ("sweep", "--model", model, "--prompts", prompts, "--out", out, *SIZE, *SPARSE[:4], "--warmup-steps", 1)
    command += ("--thresholds", 0.9, "--no-floor", "--no-lpips", "--no-plot", "--json")
    done = xattn(*command)
    assert done.code == 3
    rows = json.loads(done.out)["rows"]
    assert [row["videos"] for row in rows] == [2] * len(rows)
    assert {row["id"] for row in failures(out)} == {"bad"}
    assert {row["attention"] for row in failures(out)} == {row["attention"] for row in rows}
    assert f"videos that failed: {len(rows)}" in done.err
    write_prompts(prompts, bad=NOT_FINITE)
    nothing = xattn(*command, "--out", tmp_path / "other")
    assert (nothing.code, json.loads(nothing.out)) == (3, {"rows": []})
    assert not (tmp_path / "other/sweep.csv").exists()


def of_python(model: Path, prompts: Path, out: Path, **more: Any) -> GenerateSettings:
    return GenerateSettings(
        model=str(model),
        prompts=prompts,
        out=out,
        attention="dense",
        height=64,
        width=64,
        num_frames=9,
        steps=2,
        **more,
    )


def test_python_is_told_of_failures_when_the_others_are_made(model, tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", bad=NOT_FINITE, good="a cat")
    with pytest.raises(SomeFailed, match=r"videos that failed: 1; .*dense/bad-s0: not_finite") as failed:
        generate(of_python(model, prompts, tmp_path / "out"))
    assert [row["id"] for row in failed.value.failures] == ["bad"]
    assert made(tmp_path / "out/dense") == ["good"]


def test_three_failures_of_the_device_in_a_row_end_the_run(model, tmp_path, capfd):
    """As after an illegal memory access, when every later call of CUDA fails."""
    prompts = write_prompts(tmp_path / "p.jsonl", **{f"p{number}": "a cat" for number in range(6)})
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        # each video of two steps with guidance calls the transformer four times
        if calls > 4:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    plan = make_plan(of_python(model, prompts, tmp_path / "out"))
    produced = produce(plan, on_pipeline=lambda pipe: pipe.transformer.register_forward_pre_hook(fail))
    assert [record["id"] for record in produced.records] == ["p0"]
    assert [(row["id"], row["kind"]) for row in produced.batch.failed] == [(f"p{n}", "device") for n in (1, 2, 3)]
    assert [job.prompt.id for job in produced.batch.left] == ["p4", "p5"]
    assert produced.batch.code == 3
    assert produced.batch.told()[-2] == (
        "stopped: 3 videos in a row failed because of the device, not of themselves; videos left: 2"
    )


def test_out_of_memory_is_tried_once_more_with_less_on_the_device(model, tmp_path, monkeypatch, capfd):
    """On a machine whose only device is a CPU: here it stands for the GPU that models are moved off."""
    pytest.importorskip("accelerate")

    def next_mode(self: Any) -> str | None:
        return {"none": "model", "model": None}[self._offload]

    monkeypatch.setattr(maker._Maker, "_next_offload", property(next_mode))
    prompts = write_prompts(tmp_path / "p.jsonl", one="a cat", two="a dog", three="a hen")
    plain = generate(of_python(model, prompts, tmp_path / "plain", lossless=True))
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        # in the first try of the second video, which calls the transformer four times, and in both of the third one
        if len(calls) in (6, 11):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    plan = make_plan(of_python(model, prompts, tmp_path / "out", lossless=True))
    capfd.readouterr()
    produced = produce(plan, on_pipeline=lambda pipe: pipe.transformer.register_forward_pre_hook(fail))
    said = [line for line in capfd.readouterr().err.splitlines() if "from here on" in line]
    assert [line.strip().split("\r")[-1].strip() for line in said] == [
        "cpu is out of memory: from here on with --offload model"
    ]
    assert [(record["id"], record["offload"]) for record in produced.records] == [("one", "none"), ("two", "model")]
    assert [(row["id"], row["kind"]) for row in produced.batch.failed] == [("three", "out_of_memory")]
    assert "torch.OutOfMemoryError: CUDA out of memory" in produced.batch.failed[0]["traceback"]
    assert produced.records[1]["seconds_per_step"] < produced.records[1]["seconds"]
    for record in plain[:2]:
        name = record["lossless_file"]
        assert (read_video(tmp_path / "plain/dense" / name) == read_video(tmp_path / "out/dense" / name)).all()


def test_a_disk_that_takes_no_videos_ends_the_run(model, tmp_path):
    """The system refuses files above 4 KiB, which ffmpeg meets and the log of failures does not."""
    prompts = write_prompts(tmp_path / "p.jsonl", **{f"p{number}": "a cat" for number in range(5)})
    out = tmp_path / "out"
    command = ("generate", "--model", model, "--prompts", prompts, "--out", out, "--attention", "dense", *SIZE)
    done = subprocess.run(
        [sys.executable, "-m", "xattn_video_pipelines.cli", *map(str, command), "--lossless"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384)),
        timeout=1000,
    )
    assert done.returncode == 3, done.stderr
    assert [row["kind"] for row in failures(out)] == ["output"] * 3
    assert "stopped: 3 videos in a row failed because of writing, not of themselves; videos left: 2" in done.stderr
    assert made(out / "dense") == []


def test_input_that_is_wrong_before_anything_starts_is_no_failure_of_an_item(model, tmp_path, xattn):
    prompts = write_prompts(tmp_path / "p.jsonl", one="a cat")
    done = xattn("generate", "--model", model, "--prompts", prompts, "--out", tmp_path / "out", *SIZE, "--steps", 0)
    assert done.code == 2
    assert not (tmp_path / "out").exists()


def test_a_run_out_of_time_stops_cleanly_and_goes_on(model, tmp_path, xattn):
    prompts, out = write_prompts(tmp_path / "p.jsonl", one="a cat", two="a dog"), tmp_path / "out"
    command = ("generate", "--model", model, "--prompts", prompts, "--out", out, *SIZE, *SPARSE)
    done = xattn(*command, "--max-hours", "1e-6", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) | {"seconds": 0, "videos": []} == {
        "made": 0, "kept": 0, "left": 2, "seconds": 0, "failures": [], "videos": [],
    }  # fmt: skip
    assert done.err.splitlines()[-2:] == [
        "stopped: the time of --max-hours 1e-06 does not suffice for another one; videos left: 2",
        "run the same command again for what is left",
    ]
    assert not (out / FAILURES).exists()
    done = xattn(*command, "--max-hours", 5)
    assert (done.code, "videos: 2 made" in done.out) == (0, True), done.err
    for hours in ("0", "-1", "nan", "inf"):
        refused = xattn(*command, "--max-hours", hours)
        assert refused.code == 2
        assert f"--max-hours must be a positive number, got {hours}" in refused.err


def test_no_item_is_begun_that_would_end_too_late(tmp_path):
    batch = Batch(tmp_path, "videos", {}, 1.0 / 3600)
    done = []
    for number in batch.items(range(9)):
        with batch.item((None, str(number), None), str(number)):
            time.sleep(0.4)
        done.append(number)
    # after two of them 0.8 s are over, and a third one would take 0.4
    assert done == [0, 1]
    assert batch.left == list(range(2, 9))
    assert batch.code == 0
    with pytest.raises(SomeFailed, match="videos left: 7"):
        batch.check()


def test_only_failures_in_a_row_of_a_kind_that_no_item_causes_end_a_run(tmp_path):
    device, own = torch.AcceleratorError("CUDA error: unspecified launch failure"), ValueError("of this item")
    batch = Batch(tmp_path, "videos", {}, None)
    errors = [device, device, own, own, own, own, device, None, device, device, None, device, device, device, None]
    tried = []
    for place in batch.items(range(len(errors))):
        tried.append(place)
        with batch.item((None, str(place), None), str(place)):
            if errors[place] is not None:
                raise errors[place]
    assert len(tried) == len(errors) - 1
    assert batch.left == [len(errors) - 1]


def test_what_is_no_failure_of_an_item_goes_through(tmp_path):
    for stop in (KeyboardInterrupt, SystemExit, ModuleNotFoundError):
        batch = Batch(tmp_path, "videos", {}, None)
        with pytest.raises(stop), batch.item((None, "one", None), "one"):
            raise stop
    assert not (tmp_path / FAILURES).exists()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (torch.AcceleratorError("CUDA error: out of memory"), "out_of_memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), "device"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), "device"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), "device"),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), "device"),
        (RuntimeError("HIP error: invalid device function"), "device"),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), "error"),
        (ValueError("out of memory of the reader"), "error"),
        (UserError("half.png: damaged image"), "input"),
    ],
)
def test_kinds(error, kind):
    assert kind_of(error) == kind
    assert is_out_of_memory(error) == (kind == "out_of_memory")


def test_the_cpu_says_with_a_plain_error_that_memory_is_short():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 46)
    assert kind_of(raised.value) == "out_of_memory"
