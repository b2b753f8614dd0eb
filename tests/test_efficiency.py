"""The bench: a correctness gate before any timing, one JSON line at the end, a ledger only when asked for."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xattn_video import XAttnConfig
from xattn_video.ops.backends import resolve
from xattn_video.ops.block_lists import lists_to_mask, mask_to_lists
from xattn_video_eval.bench import cases as bench_cases
from xattn_video_eval.bench import command, demo_tensors, gates
from xattn_video_eval.bench import plots as bench_plots
from xattn_video_eval.bench.cases import Case
from xattn_video_eval.bench.demo_tensors import DemoTensors
from xattn_video_pipelines.cli import main

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = ["bench", "--device", "cpu", "--tokens", "1100", "--heads", "2", "--rounds", "1", "--json"]


def test_bench_prints_tables_or_json_and_never_both(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "LEDGER", tmp_path / "ledger.jsonl")
    assert main([*ARGUMENTS, "--dtype", "fp32", "bf16", "--quiet"]) == 0
    assert not command.LEDGER.exists()
    printed = capsys.readouterr()
    lines, report = printed.err.splitlines(), json.loads(printed.out)
    assert report["ok"] is True
    assert [row["dtype"] for row in report["rows"]] == ["fp32", "bf16"]
    for row in report["rows"]:
        assert row["tokens"] == 1100
        assert 0 < row["density"] <= 1
        assert row["ideal_speedup"] == pytest.approx(1 / (row["density"] + 1 / 16))
        assert row["speedup"] == pytest.approx(row["best_ms"]["sdpa"] / row["best_ms"]["total"])
        assert {"score", "select", "attend", "refresh", "add", "total", "sdpa"} == set(row["median_ms"])
        assert row["device"]
        assert row["versions"]["torch"] == torch.__version__
        assert row["config"]["threshold"] == 0.9
    # A line in the first table, and one for each kernel and stage in the second.
    assert sum(line.strip().startswith("video-1100") for line in lines) == 2 + 2 * 7

    assert main([*(word for word in ARGUMENTS if word != "--json"), "--causal", "--record"]) == 0
    words = capsys.readouterr().out
    assert sum(line.strip().startswith("causal-1100") for line in words.splitlines()) == 1 + 7
    assert "{" not in words
    assert main([*ARGUMENTS, "--record"]) == 0
    recorded = [json.loads(line) for line in command.LEDGER.read_text().splitlines()]
    assert [row["name"] for row in recorded] == ["causal-1100", "video-1100"]


def test_a_case_that_does_not_fit_is_left_out_and_the_others_are_recorded_as_they_come(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make, ledger = command.make_inputs, tmp_path / "ledger.jsonl"

    def cases(args: object, device: object) -> list[Case]:
        return [Case(name, 1, 32, 35, 0, 1, 16, "fp32") for name in ("first", "large", "second", "killed")]

    def inputs(case: Case, locality: float, device: torch.device) -> object:
        if case.name == "large":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if case.name == "killed":
            assert [json.loads(line)["name"] for line in ledger.read_text().splitlines()] == ["first", "second"]
            raise KeyboardInterrupt
        return make(case, locality, device)

    monkeypatch.setattr(command, "chosen_cases", cases)
    monkeypatch.setattr(command, "make_inputs", inputs)
    monkeypatch.setattr(command, "LEDGER", ledger)
    assert main([*ARGUMENTS, "--record"]) == 130
    assert "large: left out" in capsys.readouterr().err
    assert [json.loads(line)["name"] for line in ledger.read_text().splitlines()] == ["first", "second"]


def test_torch_and_triton_are_all_that_the_bench_needs(tmp_path: Path) -> None:
    """A machine with a GPU may have nothing of what videos and models need, and no installed copy of this project.

    The command line needs the library that reads it; a call from Python does not.
    """
    absent = ("diffusers", "transformers", "accelerate", "imageio", "lpips", "torchvision", "av", "PIL", "matplotlib")
    calls = {
        "command": f"""from xattn_video_pipelines.cli import main
sys.exit(main({[*ARGUMENTS, "--out", str(tmp_path / "command")]}))""",
        "python": f"""sys.modules.update(dict.fromkeys(("cyclopts", "attrs")))
from pathlib import Path
from xattn_video_eval.bench.command import bench
from xattn_video_eval.bench.settings import BenchSettings
report = bench(BenchSettings(device="cpu", tokens=(1100,), heads=2, rounds=1, out=Path({str(tmp_path / "python")!r})))
sys.exit(not report["ok"])""",
    }
    for name, call in calls.items():
        code = f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n{call}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=1000)
        assert done.returncode == 0, done.stderr
        (row,) = [json.loads(line) for line in (tmp_path / name / "efficiency.jsonl").read_text().splitlines()]
        assert (row["name"], row["failures"], row["goals"]) == ("video-1100", [], [])


def test_nothing_that_fits_is_no_success(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def inputs(*args: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(command, "make_inputs", inputs)
    assert main(ARGUMENTS) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["too_large"], report["rows"]) == (False, ["video-1100"], [])


def test_nothing_is_timed_or_recorded_when_the_result_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = gates.block_sparse_attention

    def wrong(*args: object, backend: str = "auto", **kwargs: object) -> object:
        output = right(*args, backend=backend, **kwargs)
        return output if backend == "reference" else output * 1.01

    monkeypatch.setattr(gates, "block_sparse_attention", wrong)
    monkeypatch.setattr(command, "LEDGER", tmp_path / "ledger.jsonl")
    assert main([*ARGUMENTS, "--record"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["rows"] == []
    assert "sparse output" in report["failures"][0]
    assert not command.LEDGER.exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tokens", "10"], "--tokens"),
        (["--heads", "0"], "--heads"),
        (["--rounds", "0"], "--rounds"),
        (["--locality", "1.5"], "--locality"),
        (["--stride", "3"], "stride"),
        (["--threshold", "0"], "threshold"),
        (["--device", "tpu"], "--device"),
        (["--inputs", "demo"], "--tokens does not go with --inputs demo"),
        (["--out", "rows", "--model", "demo"], "--out does not go with --model"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ARGUMENTS, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert named in error
    assert "\n" not in error


def test_the_numbers_of_a_row_follow_from_its_times() -> None:
    case = Case("video-1000", 10, 10, 10, 0, 3, 64, "fp32")
    config = XAttnConfig(stride=16)
    seconds = {
        "sdpa": [0.4, 0.5, 0.9],
        "flex": [0.3, 0.6, 0.9],
        "flex-sparse": [0.05, 0.05, 0.06],
        "score": [0.01, 0.02, 0.03],
        "select": [0.001, 0.002, 0.003],
        "attend": [0.08, 0.09, 0.1],
        "total": [0.1, 0.11, 0.2],
    }
    row = command.summarize(case, config, 0.25, seconds, ("sdpa", "flex"))
    # A sparse kernel is no dense one, however fast it is.
    assert row["dense_kernel"] == "flex"
    assert row["speedup"] == pytest.approx(row["best_ms"]["flex"] / row["best_ms"]["total"]) == pytest.approx(3.0)
    assert row["speedup_of_medians"] == pytest.approx(600 / 110)
    assert row["ideal_speedup"] == pytest.approx(1 / (0.25 + 1 / 32))
    assert row["reached"] == pytest.approx(row["speedup"] / row["ideal_speedup"])
    operations = 4 * 1000 * 1000 * 64 * 3
    expected = {
        "sdpa": operations / 0.4,
        "flex": operations / 0.3,
        "flex-sparse": 0.25 * operations / 0.05,
        "score": operations / 32 / 0.01,
        "attend": 0.25 * operations / 0.08,
        "total": (0.25 + 1 / 32) * operations / 0.1,
    }
    assert row["tflops"] == pytest.approx({name: value / 1e12 for name, value in expected.items()})
    causal = command.summarize(dataclasses.replace(case, causal=True), config, 0.25, seconds, ("sdpa", "flex"))
    assert causal["tflops"]["sdpa"] == pytest.approx(row["tflops"]["sdpa"] / 2)


def test_a_kernel_that_is_wrong_or_raises_is_listed_and_not_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"wrong": 0, "nan": 0}
    right = command.dense_candidates

    def with_bad_ones(problem: command.Problem) -> dict[str, Callable[[], Tensor]]:
        found = right(problem)

        def off(name: str, factor: float) -> Tensor:
            calls[name] += 1
            return found["sdpa"]() * factor

        def raising() -> Tensor:
            raise RuntimeError("no kernel image\nis available")

        def missing() -> Tensor:
            return importlib.import_module("a_package_that_is_not_here").attend()

        bad = {"wrong": partial(off, "wrong", 1.01), "nan": partial(off, "nan", float("nan"))}
        return found | bad | {"raising": raising, "missing": missing}

    monkeypatch.setattr(command, "dense_candidates", with_bad_ones)
    assert main(ARGUMENTS) == 0
    printed = capsys.readouterr()
    (row,) = json.loads(printed.out)["rows"]
    assert set(row["median_ms"]) == {"sdpa", "score", "select", "attend", "refresh", "add", "total"}
    assert set(row["not_timed"]) == {"wrong", "nan", "raising", "missing"}
    assert row["not_timed"]["wrong"].startswith("wrong result: off float64 by 1.00e-02")
    assert row["not_timed"]["raising"] == "RuntimeError: no kernel image is available"
    assert row["not_timed"]["missing"] == "not installed: a_package_that_is_not_here"
    # Once for the judgement, never for a time.
    assert calls == {"wrong": 1, "nan": 1}
    assert "not timed: raising: RuntimeError: no kernel image is available" in printed.err.splitlines()


def test_attention_that_is_wrong_on_the_timed_problem_ends_the_bench(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = resolve("cpu", torch.device("cpu"), torch.float32)

    def wrong(*parts: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        output, lse = own.block_sparse_forward(*parts, **settings)
        return output * 1.001, lse

    monkeypatch.setattr(command, "resolve", lambda *_: own._replace(block_sparse_forward=wrong))
    assert main(ARGUMENTS) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == []
    assert "video-1100: attend: wrong result" in report["failures"][0]


@pytest.mark.parametrize(
    ("stage", "words"),
    [("merge", "a refresh is off SDPA by"), ("add_residual", "the addition of a residual in head 1 is off by")],
)
def test_a_residual_that_is_wrong_is_a_failure_and_not_timed(
    stage: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong in one head alone; the stages of the call are timed all the same."""
    own = resolve("cpu", torch.device("cpu"), torch.float32)
    right = getattr(own, stage)

    def wrong(*parts: Any) -> Any:
        result = right(*parts)
        (result[0] if stage == "merge" else result)[:, 1] *= 1.001
        return result

    monkeypatch.setattr(command, "resolve", lambda *_: own._replace(**{stage: wrong}))
    assert main(ARGUMENTS) == 1
    report = json.loads(capsys.readouterr().out)
    assert any(words in failure for failure in report["failures"]), report["failures"]
    (row,) = report["rows"]
    assert "attend" in row["best_ms"]
    assert not {"refresh", "add"} & set(row["best_ms"])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("stage", "words"),
    [("antidiagonal_scores", "scores of head 1, block 8 are off"), ("select", "wrong blocks are kept or left out")],
)
def test_scores_and_choice_are_judged_on_the_timed_problem(
    stage: str, words: str, causal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are wrong in the last rows of long sequences alone, where no small problem shows it."""
    own = resolve("cpu", torch.device("cpu"), torch.float32)
    right = getattr(own, stage)

    def wrong(*parts: Tensor, **settings: Any) -> Any:
        lists = stage == "select"
        result = lists_to_mask(*right(*parts, **settings)) if lists else right(*parts, **settings)
        if result.shape[2] > 8:
            result[:, 1:, 8:] = result[:, 1:, 8:].flip(-1)
        return mask_to_lists(result) if lists else result

    monkeypatch.setattr(command, "resolve", lambda *_: own._replace(**{stage: wrong}))
    assert main([*ARGUMENTS, "--causal"] if causal else ARGUMENTS) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == []
    assert any(words in failure for failure in report["failures"]), report["failures"]


def test_stages_are_those_of_the_call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"select": 0, "attend": 0}
    own = resolve("cpu", torch.device("cpu"), torch.float32)

    def select(*parts: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        calls["select"] += 1
        return own.select(*parts, threshold=threshold)

    def attend(*parts: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        calls["attend"] += 1
        return own.block_sparse_forward(*parts, **settings)

    counted = own._replace(select=select, block_sparse_forward=attend)
    monkeypatch.setattr(command, "resolve", lambda *_: counted)
    assert main(ARGUMENTS) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    # Once to know what is kept and what is right, once unmeasured, and once a round.
    times = 2 + row["rounds"]
    # A refresh attends twice, and the residual is added to one more output.
    assert calls == {"select": times, "attend": times + 2 * times + 1}


def test_both_pictures_are_written_and_show_the_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    folder = tmp_path / "new" / "plots"
    arguments = ["bench", "--device", "cpu", "--tokens", "600", "1100", "--heads", "2", "--rounds", "1"]
    assert main([*arguments, "--plot", str(folder), "--json"]) == 0
    printed = capsys.readouterr()
    rows, lines = json.loads(printed.out)["rows"], printed.err.splitlines()
    for name in ("speedup.png", "stages.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"wrote {folder / name}" in lines
    (axes,) = bench_plots.speedup_figure(rows).axes
    measured, ideal = axes.get_lines()[:2]
    assert list(measured.get_xdata()) == list(ideal.get_xdata()) == [600, 1100]
    assert list(measured.get_ydata()) == [row["speedup"] for row in rows]
    assert list(ideal.get_ydata()) == [row["ideal_speedup"] for row in rows]
    (axes,) = bench_plots.breakdown_figure(rows).axes
    ends = [0.0] * len(rows)
    for bars, stage in zip(axes.containers, ("score", "select", "attend"), strict=True):
        widths = [bar.get_width() for bar in bars]
        assert widths == pytest.approx([row["best_ms"][stage] / row["best_ms"]["sdpa"] for row in rows])
        assert [bar.get_x() for bar in bars] == pytest.approx(ends)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]


def test_plots_and_rows_that_cannot_be_written_are_refused_before_anything_is_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(command, "_measure", lambda *_: pytest.fail("timed"))
    assert main([*ARGUMENTS, "--out", str(tmp_path / "file")]) == 2
    assert "cannot write here" in capsys.readouterr().err
    monkeypatch.setattr(bench_plots.importlib.util, "find_spec", lambda name: None)
    assert main([*ARGUMENTS, "--plot", str(tmp_path / "plots")]) == 2
    assert "--plot needs matplotlib; install it with: pip install 'xattn-video[plot]'" in capsys.readouterr().err
    monkeypatch.setattr(bench_plots.importlib.util, "find_spec", lambda name: name)
    assert main([*ARGUMENTS, "--plot", str(tmp_path / "file")]) == 2
    assert "cannot write here" in capsys.readouterr().err


def test_text_inputs_are_causal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--inputs", "text"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["name"], row["inputs"], row["causal"]) == ("causal-1100", "text", True)


def test_demo_inputs_are_the_saved_tensors(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)

    def entry(name: str) -> DemoTensors:
        parts = [torch.randn(1, 1, 720, 24, generator=generator).bfloat16() for _ in range(3)]
        return DemoTensors(name, 1, 0, 9, *parts, grid=(5, 12, 12))

    entries = [entry("layer1.head0.step09"), entry("layer3.head1.step02")]
    monkeypatch.setattr(demo_tensors, "load_demo_qkv", lambda: entries)
    assert main(["bench", "--device", "cpu", "--rounds", "1", "--inputs", "demo", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows] == ["demo-layer1.head0.step09", "demo-layer3.head1.step02"]
    for row in rows:
        assert (row["tokens"], row["heads"], row["head_dim"], row["dtype"]) == (720, 1, 24, "bf16")
        assert row["locality"] is None
    case = Case("demo-layer3.head1.step02", 5, 12, 12, 0, 1, 24, "bf16", inputs="demo")
    query, key, value = bench_cases.make_inputs(case, 0.5, torch.device("cpu"))
    for got, expected in ((query, entries[1].query), (key, entries[1].key), (value, entries[1].value)):
        assert torch.equal(got, expected)


def test_demo_inputs_that_are_not_there_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo_tensors, "DEMO_QKV", tmp_path / "none.safetensors")
    assert main(["bench", "--device", "cpu", "--inputs", "demo"]) == 2
    assert "none.safetensors: no such file" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_every_kernel_on_a_gpu_is_timed_or_has_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--device", "cuda", "--tokens", "4096", "--head-dim", "128", "--rounds", "1"]
    for inputs in ("video", "text"):
        assert main([*arguments, "--inputs", inputs, "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        named = set(row["median_ms"]) | set(row["not_timed"])
        assert named >= {"sdpa", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flex", "flex-sparse", "flashinfer"}
        assert named >= {"flash-attn-2", "flash-attn-3", "flash-attn-4"}
        assert {"flex", "flex-sparse"} <= set(row["median_ms"]), row["not_timed"]
        assert set(row["peak_extra_mb"]) == set(row["median_ms"])
