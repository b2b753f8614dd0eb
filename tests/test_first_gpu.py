"""The first look at a GPU: its runner, its judgement, and a rehearsal of all its steps without a GPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="the kernel for Hopper needs it")

from tests import first_gpu_steps
from xattn_video.ops import reference
from xattn_video_eval.bench.dense_kernels import Problem
from xattn_video_eval.first_gpu import checking, command, compiling, plan, testing, times
from xattn_video_eval.first_gpu.look import ROWS, Look
from xattn_video_eval.first_gpu.runner import ROOT, Step, run_steps
from xattn_video_eval.first_gpu.verdict import all_well, judge, summary


def rehearsal_look(out: Path, seconds: float = 60) -> Look:
    return Look("planted", out, seconds, rehearse=True)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / ROWS).read_text().splitlines()]


# --- the runner ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """What planted steps gave: their rows, when each was shown, in seconds, and the limit of the one that hangs."""

    rows: list[dict[str, Any]]
    seconds: list[float]
    out: Path
    limit: int

    def of(self, step: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["step"] == step]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """Four steps, of which one raises, one crashes and one hangs."""
    out = tmp_path_factory.mktemp("planted")
    (out / ROWS).write_text(json.dumps({"step": "of an earlier run"}) + "\n")
    shown: list[tuple[dict[str, Any], float]] = []
    began = time.monotonic()

    def run(*steps: Step) -> list[dict[str, Any]]:
        show = shown.append
        return run_steps(
            steps, out, seconds=1000, rehearse=True, show=lambda row: show((row, time.monotonic() - began))
        )

    rows = run(Step("broken", 1000, first_gpu_steps.broken), Step("crashing", 1000, first_gpu_steps.crashing))
    # A process needs seconds to start, and many more on a busy machine: the one that hangs is to write its row first.
    limit = math.ceil(max(10, *(4 * row["seconds"] for row in rows if "end" in row)))
    rows += run(Step("hanging", limit, first_gpu_steps.hanging), Step("good", 1000, first_gpu_steps.good))
    assert [row for row, _ in shown] == rows
    return Shown(rows, [seconds for _, seconds in shown], out, limit)


def test_what_fails_leaves_the_other_rows(planted: Shown) -> None:
    assert [row["step"] for row in planted.rows] == [
        "broken", "broken", "crashing", "crashing", "hanging", "hanging", "good", "good",
    ]  # fmt: skip
    assert [row["name"] for row in planted.rows if "end" not in row] == ["before", "before", "child", "measured"]
    assert planted.of("good")[0]["value"] == 1.5
    assert planted.of("good")[1]["end"] == "done"


def test_a_failure_is_a_row_with_its_reason_and_log(planted: Shown) -> None:
    broken, crashing, hanging = (planted.of(step)[-1] for step in ("broken", "crashing", "hanging"))
    assert {row["end"] for row in (broken, crashing, hanging)} == {"failed"}
    assert broken["reason"] == "exit code 1: ValueError: the kernel is not what it was"
    assert "raise ValueError" in (planted.out / broken["log"]).read_text()
    assert crashing["reason"].startswith("SIGABRT")
    assert hanging["reason"] == f"not finished within {planted.limit} s"
    # it sleeps for 600 s
    assert planted.limit <= hanging["seconds"] < 500


def test_rows_are_shown_while_their_step_runs(planted: Shown) -> None:
    """The hanging step's row came well before the step was ended."""
    first, last = (planted.seconds[planted.rows.index(row)] for row in planted.of("hanging"))
    assert last - first > 1


def test_what_a_hanging_step_started_is_ended_too(planted: Shown) -> None:
    process = Path("/proc", str(planted.of("hanging")[0]["process"]), "stat")
    # it may be gone, or be left as a zombie that nobody asks for
    assert not process.exists() or process.read_text().rpartition(")")[2].split()[0] == "Z"


def test_rows_say_where_they_come_from_and_are_json(planted: Shown) -> None:
    for row in planted.rows:
        assert row["rehearsal"] is True
        assert row["versions"]["torch"] == torch.__version__
        assert {"device", "commit", "time"} <= set(row)
    assert planted.of("crashing")[0]["value"] == "nan"


def test_rows_of_an_earlier_run_are_kept_and_not_judged(planted: Shown) -> None:
    assert rows_of(planted.out)[0] == {"step": "of an earlier run"}
    assert rows_of(planted.out)[1:] == planted.rows


def test_steps_without_time_are_not_begun(tmp_path: Path) -> None:
    (row,) = run_steps([Step("good", 60, first_gpu_steps.good)], tmp_path, seconds=3, rehearse=True)
    assert (row["end"], row["reason"], row["log"]) == ("failed", "only 3 s were left", None)
    assert not all_well([row])


# --- the steps -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
    """The rows and the printed lines of a whole rehearsal, which compiles into a cache of its own."""
    out, cache = tmp_path_factory.mktemp("rehearsal"), tmp_path_factory.mktemp("cache")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    finished = subprocess.run(
        [sys.executable, "-m", "xattn_video_eval.first_gpu", "--rehearse", "--out", str(out)],
        capture_output=True, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return rows_of(out), finished.stdout.splitlines()


def interpreted() -> bool:
    return command.interpreter_trouble(metadata.version("triton"), metadata.version("numpy")) is None


def test_a_rehearsal_runs_every_step_and_nothing_is_wrong(rehearsal) -> None:
    rows, _ = rehearsal
    ends = [(row["step"], row["end"]) for row in rows if "end" in row]
    assert ends == [(step.name, "done") for step in command.STEPS]
    assert all_well(rows)
    measured = {row["step"] for row in rows if "end" not in row and "skipped" not in row}
    everywhere = {"ident", "compile", "dense", "tests"}
    assert measured == everywhere | (
        {"small", "hopper", "attend-plain", "scores", "whole", "residual"} if interpreted() else set()
    )


def test_a_rehearsal_compiles_each_kernel_for_hopper(rehearsal) -> None:
    compiled = {row["kernel"]: row["shared"] for row in rehearsal[0] if row["step"] == "compile" and "shared" in row}
    assert set(compiled) == {"attention_hopper", "block_sparse", "antidiagonal_scores"}
    assert all(0 < shared <= 227 * 1024 for shared in compiled.values())


def test_a_rehearsal_checks_its_results_against_float64(rehearsal) -> None:
    checked = {row["step"]: row for row in rehearsal[0] if "off" in row}
    assert 0 < checked["dense"]["off"] < 0.01
    if not interpreted():
        return
    assert 0 < checked["hopper"]["off"] < 0.001
    assert checked["hopper"]["same"] is True
    assert 0 < checked["attend-plain"]["off"] < 0.01
    assert 0 < checked["whole"]["off"] < 0.01
    score, select = (row for row in rehearsal[0] if row["step"] == "scores" and "off" in row)
    assert 0 < score["off"] < 1e-5
    assert (select["name"], select["off"]) == ("select", 0)


def test_a_rehearsal_lists_what_only_a_gpu_runs(rehearsal) -> None:
    _, lines = rehearsal
    listed = lines[lines.index("not tried here:") + 1 : -1]
    steps = {line.split(":")[0].strip() for line in listed}
    assert {"ident", "hopper", "dense", "attend-hopper", "whole", "tests"} <= steps
    assert any("sdpa-cudnn" in line for line in listed)
    assert lines[-1].startswith("rehearsal, which measures nothing: Hopper kernel >= 550 TFLOP/s: not measured | ")
    assert lines[-1].endswith("steps that failed: none")


def test_the_plan_tries_the_shipped_configuration_first_and_none_twice() -> None:
    for kernel in (*plan.ATTENTION_KERNELS, "antidiagonal_scores"):
        found = plan.variants(kernel, rehearse=False)
        assert [variant.shipped for variant in found] == [True] + [False] * (len(found) - 1)
        assert len({variant.name for variant in found}) == len(found) > 1
        assert plan.variants(kernel, rehearse=True) == found[:1]


def test_every_kernel_that_is_checked_or_timed_is_compiled_before() -> None:
    jobs = [(variant, call) for variant, call, _ in compiling.jobs(rehearse=False)]
    assert all((variant, call) in jobs for call, variant in plan.checks(rehearse=False))
    kernels = (*plan.ATTENTION_KERNELS, "antidiagonal_scores")
    assert all((variant, plan.TIMED) in jobs for kernel in kernels for variant in plan.variants(kernel, False))


def test_tests_marked_gpu_are_found() -> None:
    assert "tests/test_triton_kernels.py" in testing.gpu_test_files()
    assert "tests/test_config.py" not in testing.gpu_test_files()


@dataclass(frozen=True)
class EmptyRun:
    """A run of pytest over a file without a test: what it raised, and how many seconds it took."""

    error: RuntimeError
    seconds: float


@pytest.fixture(scope="module")
def empty_run(tmp_path_factory: pytest.TempPathFactory) -> EmptyRun:
    folder = tmp_path_factory.mktemp("empty")
    (folder / "test_empty.py").write_text("")
    began = time.monotonic()
    with pytest.raises(RuntimeError) as raised:
        testing.run_pytest(rehearsal_look(folder, seconds=1000), str(folder / "test_empty.py"))
    return EmptyRun(raised.value, time.monotonic() - began)


def test_a_pytest_run_without_a_test_fails(empty_run: EmptyRun) -> None:
    assert "pytest reported no test" in str(empty_run.error)


def test_a_pytest_run_that_is_ended_keeps_what_it_showed(tmp_path: Path, empty_run: EmptyRun) -> None:
    file = tmp_path / "test_planted.py"
    file.write_text(
        "import time\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 + 1 == 3, 'bad sum'\n"
        "def test_slow(): time.sleep(600)\n"
    )
    # Two tests are over by then, also on a busy machine; the third would be ended by its own limit a little later.
    seconds = min(max(6, 4 * empty_run.seconds), testing.TEST_SECONDS - 5)
    look = rehearsal_look(tmp_path, seconds=seconds + testing.TO_REPORT)
    testing.run_pytest(look, str(file))
    failure, counted = rows_of(tmp_path)
    assert failure["name"].endswith("test_planted.py::test_wrong")
    assert "bad sum" in failure["wrong"]
    assert counted["outcomes"] == {"passed": 1, "failed": 1}
    assert counted["finished"] is False


def attention() -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp in float64 of three queries' blocks, the last of which keeps nothing."""
    query, key, value = torch.randn(3, 1, 2, 300, 64, dtype=torch.float64).unbind(0)
    mask = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    mask[:, :, 2] = False
    options: dict[str, Any] = {"block_size": 128, "causal": False, "scale": 0.125, "kv_start": None, "kv_lens": None}
    return reference.block_sparse_forward(query, key, value, mask, **options)


def test_runs_are_judged_on_both_sides() -> None:
    output, lse = truth = attention()
    rounded = (output.bfloat16(), lse.float())
    found = checking.judge_runs([rounded, rounded], truth)
    assert "wrong" not in found
    assert found["same"] is True
    assert 0 < found["off"] < 0.004
    for damaged, words in (
        ((rounded[0] * 1.02, rounded[1]), "output is off"),
        ((rounded[0].index_fill(2, torch.tensor([7]), torch.nan), rounded[1]), "output is off"),
        ((rounded[0], rounded[1] + 0.01), "log-sum-exp is off"),
        ((rounded[0], rounded[1].nan_to_num(neginf=0.0)), "log-sum-exp is off"),
        ((rounded[0], rounded[1].index_fill(2, torch.tensor([7]), -torch.inf)), "log-sum-exp is off"),
    ):
        assert words in checking.judge_runs([damaged, damaged], truth)["wrong"], words
        # the first run counts as well as the last
        assert words in checking.judge_runs([damaged, rounded], truth)["wrong"], words
    least = (rounded[0].clone(), rounded[1])
    least[0][0, 0, 0, 0] *= 1.01
    assert checking.judge_runs([rounded, least], truth)["wrong"] == "two runs differ"


def test_a_wrong_or_failing_call_is_a_row_and_not_timed_as_right(tmp_path: Path) -> None:
    look = rehearsal_look(tmp_path)
    problem = Problem(*torch.randn(3, 1, 2, 300, 64).unbind(0), causal=False)
    check = times.row_check(problem)
    right = torch.nn.functional.scaled_dot_product_attention(problem.query, problem.key, problem.value)
    assert times.time_call(look, lambda: right, check, 1e9, name="right") is not None
    for name, wrong in (("scaled", right * 1.1), ("unwritten", right * torch.nan)):
        assert times.time_call(look, lambda wrong=wrong: wrong, check, 1e9, name=name) is None

    def fails() -> None:
        raise RuntimeError("out of\nshared memory")

    assert times.time_call(look, fails, check, 1e9, name="fails") is None
    first, scaled, unwritten, failed = rows_of(tmp_path)
    assert first["ms"] > 0
    assert first["tflops"] == pytest.approx(1e9 / first["ms"] / 1e9)
    assert "wrong" not in first
    assert scaled["wrong"].startswith("off float64 by")
    assert unwritten["wrong"].startswith("off float64 by nan")
    assert failed["failed"] == "RuntimeError: out of shared memory"


# --- the judgement ---------------------------------------------------------------------------------------------


def measured_rows(**changes: Any) -> list[dict[str, Any]]:
    """Rows of a run in which every goal is reached, but for the changes."""
    value = {"hopper": 560.0, "plain": 440.0, "score_8": 19.0, "score_16": 10.0, "select": 0.8, "whole": 170.0}
    value |= {"extra_mib": 200.0} | changes
    dense = [{"step": "dense", "name": f"sdpa-{name}", "ms": ms} for name, ms in (("flash", 500.0), ("cudnn", 310.0))]
    attention = [
        {"step": "attend", "kernel": kernel, "name": "own", "shipped": True, "density": 0.35, "ms": 1.0, "tflops": rate}
        for kernel, rate in (("attention_hopper", value["hopper"]), ("block_sparse", value["plain"]))
    ]
    every = {"step": "attend", "kernel": "block_sparse", "name": "all blocks", "density": 1.0, "tflops": 900.0}
    scores = [
        {"step": "scores", "stride": stride, **row}
        for stride in (8, 16)
        for row in (
            {"name": "own", "shipped": True, "ms": value[f"score_{stride}"]},
            {"name": "select", "ms": value["select"]},
        )
    ]
    whole = [
        {"step": "whole", "backend": backend, "stride": stride, "density": 0.35, "ms": ms, "extra_mib": extra}
        for stride in (8, 16)
        for backend, ms, extra in (
            ("triton", 300.0, value["extra_mib"]),
            ("triton-hopper", value["whole"], 100.0),
        )
    ]
    return [*dense, *attention, every, *scores, *whole]


def ways(rows: list[dict[str, Any]]) -> list[str]:
    """How far each goal came: Hopper, plain, selection at stride 8 and 16, whole call, memory."""
    return [one.how for one in judge(rows)]


ALL_REACHED = ["reached"] * 6
# 310 ms of dense attention over 1 / (0.35 + 1 / 16): the milliseconds of an ideal call at stride 8.
IDEAL_MS = 310 * (0.35 + 1 / 16)


@pytest.mark.parametrize(
    ("goal", "change", "limits"),
    [
        (0, "hopper", {550.0: "reached", 549.9: "passed", 500.0: "passed", 499.9: "missed"}),
        (1, "plain", {430.0: "reached", 429.9: "missed"}),
        (2, "score_8", {0.0799 * 310 - 0.8: "reached", 0.0801 * 310 - 0.8: "missed"}),
        (3, "score_16", {0.0399 * 310 - 0.8: "reached", 0.0401 * 310 - 0.8: "missed"}),
        (
            4,
            "whole",
            {
                IDEAL_MS / 0.751: "reached",
                IDEAL_MS / 0.749: "passed",
                IDEAL_MS / 0.701: "passed",
                IDEAL_MS / 0.699: "missed",
            },
        ),
        (5, "extra_mib", {255.9: "reached", 256.0: "missed"}),
    ],
)
def test_each_goal_is_judged_on_both_sides(goal: int, change: str, limits: dict[float, str]) -> None:
    for value, how in limits.items():
        wanted = list(ALL_REACHED)
        wanted[goal] = how
        assert ways(measured_rows(**{change: value})) == wanted, value


def test_what_is_missing_wrong_or_failed_is_not_measured() -> None:
    assert ways([]) == ["not measured"] * 6
    for spoiled in ({"wrong": "off float64"}, {"failed": "OutOfMemoryError"}):
        rows = measured_rows()
        for row in rows:
            if row.get("kernel") == "attention_hopper":
                row |= spoiled
        assert ways(rows) == ["not measured", *ALL_REACHED[1:]]
        assert not all_well(rows)
    without_dense = [row for row in measured_rows() if row["step"] != "dense"]
    assert ways(without_dense) == ["reached", "reached", "not measured", "not measured", "not measured", "reached"]


def test_the_shipped_variant_is_judged_and_a_faster_one_named() -> None:
    rows = measured_rows(plain=420.0)
    rows.append({**rows[3], "name": "128x128 s3 TMA", "shipped": False, "tflops": 468.0})
    assert rows[-1]["kernel"] == "block_sparse"
    assert ways(rows)[1] == "missed"
    assert "plain kernel >= 430 TFLOP/s 420 (best 468, 128x128 s3 TMA): missed" in summary(rows)


def test_the_last_line_names_goals_and_failures() -> None:
    line = summary(measured_rows())
    assert "\n" not in line
    assert "Hopper kernel >= 550 TFLOP/s 560: reached" in line
    assert "scores + selection, stride 16, <= 4% of dense 3.5%: reached" in line
    assert "whole call >= 0.75 of the ideal speed-up 0.75 (1.82x of 2.42x, triton-hopper): reached" in line
    assert line.endswith("wrong results: 0, kernels that failed: 0, steps that failed: none")
    failed = [
        {"step": "scores", "end": "failed", "reason": "not finished within 45 s"},
        {"step": "small", "name": "test_x", "wrong": "E assert"},
        {"step": "attend", "name": "64x64", "failed": "OutOfResources"},
    ]
    line = summary(measured_rows() + failed)
    assert line.endswith(
        "wrong results: 1, kernels that failed: 1, steps that failed: scores (not finished within 45 s)"
    )
    assert not all_well(failed[:1])


# --- the program -----------------------------------------------------------------------------------------------


def run_command(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """Exit code and lines on stderr."""
    capfd.readouterr()
    try:
        code = command.main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, capfd.readouterr().err.splitlines()


def test_bad_input_is_one_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for words, arguments in (
        ("the following arguments are required: --out", ["--rehearse"]),
        ("--record does not go with --rehearse", ["--rehearse", "--record", "--out", str(tmp_path)]),
        (f"{file}: cannot write here", ["--rehearse", "--out", str(file)]),
        ("unrecognized arguments: --steps", ["--out", str(tmp_path), "--steps"]),
    ):
        code, lines = run_command(capfd, *arguments)
        assert (code, len(lines)) == (2, 1), lines
        assert lines[0].startswith("first_gpu: error: ")
        assert words in lines[0]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capfd, tmp_path, monkeypatch) -> None:
    assert run_command(capfd, "--out", str(tmp_path)) == (
        2,
        ["first_gpu: error: torch sees no GPU here; --rehearse tries the code without one"],
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code, lines = run_command(capfd, "--out", str(tmp_path))
    assert (code, lines) == (2, ["first_gpu: error: unset TRITON_INTERPRET: interpreted kernels cannot be timed"])


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [("3.6.0", "2.3.5", True), ("3.6.0", "2.4.0", False), ("3.6.0", "2.10.1", False), ("3.7.1", "2.5.0", True)],
)
def test_the_interpreter_needs_an_older_numpy_with_triton_3_6(triton: str, numpy: str, works: bool) -> None:
    trouble = command.interpreter_trouble(triton, numpy)
    assert works == (trouble is None)
    assert works or numpy in trouble


def test_a_row_on_the_screen_is_short() -> None:
    row = {"step": "scores", "stride": 8, "ms": 19.0256328, "versions": {"torch": "2.11"}, "time": "now"}
    assert command.format_row(row) == "scores        stride 8, ms 19.03"


def test_the_folder_of_make_is_not_committed() -> None:
    assert "/first-gpu-out/" in (ROOT / ".gitignore").read_text().splitlines()
    assert "FIRST_GPU_OUT ?= first-gpu-out" in (ROOT / "Makefile").read_text()
