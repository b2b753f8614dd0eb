"""`xattn-video tune`, as far as no GPU is needed: what is tried, what wins, what is written, and that checks check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from xattn_video.ops.triton import launch_tables
from xattn_video_eval.tune import candidates as tune_candidates
from xattn_video_eval.tune import command as tune
from xattn_video_eval.tune.command import Trial
from xattn_video_pipelines.cli import main

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_one_line_and_exit_code_two(capsys):
    assert main(["tune"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "xattn-video: error: tune measures on a GPU, and torch sees none here\n"


@pytest.mark.parametrize("device_class", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("bits", ["16-bit", "32-bit"])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("kernel", ["antidiagonal_scores", "block_sparse"])
def test_candidates_are_the_own_one_and_a_dozen_others_that_fit_the_table(kernel, head_dim, bits, device_class):
    own = launch_tables.lookup(launch_tables.packaged_table(device_class), kernel, bits, head_dim)
    found = tune.candidates(kernel, bits, head_dim, own, device_class)
    assert found[0] == own
    assert 3 < len(found) < 14
    assert len({tuple(sorted(config.items())) for config in found}) == len(found)
    for config in found:
        launch_tables.format_table({kernel: {bits: {str(head_dim): config}}}, {})
    for config in found[1:]:
        assert tune_candidates.accumulators(kernel, config, head_dim) <= tune_candidates.MOST_ACCUMULATORS
        assert kernel == "block_sparse" or config["BLOCK_K"] <= max(32, 2 * head_dim - 1)


def test_candidates_of_the_kernel_for_hopper_are_its_stages():
    own = {"num_stages": 3}
    assert tune.candidates("attention_hopper", "16-bit", 64, own, "sm_90") == [{"num_stages": 3}, {"num_stages": 2}]


def test_a_candidate_keeps_what_only_the_own_configuration_has():
    own = {**CONFIG, "DESCRIPTORS": 1, "TMA": 1}
    others = tune.candidates("block_sparse", "16-bit", 128, own, "sm_90")[1:]
    assert all(config["DESCRIPTORS"] == 1 for config in others)
    # but for what each says for itself
    assert {config.get("TMA") for config in others} == {None, 1}


@pytest.mark.parametrize(("device_class", "tried"), [("sm_80", False), ("gfx942", False), ("sm_90", True)])
def test_tile_copies_are_tried_where_there_is_an_engine_for_them(device_class, tried):
    found = tune.candidates("block_sparse", "16-bit", 128, CONFIG, device_class)
    assert any("TMA" in config for config in found) == tried
    scores = launch_tables.lookup(launch_tables.packaged_table("default"), "antidiagonal_scores", "16-bit", 128)
    found = tune.candidates("antidiagonal_scores", "16-bit", 128, scores, device_class)
    assert not any("TMA" in config for config in found)


def test_an_unknown_kernel_is_a_value_error():
    with pytest.raises(ValueError, match=r"kernel must be one of antidiagonal_scores, block_sparse, .*, got 'x'"):
        tune.candidates("x", "16-bit", 128, CONFIG, "sm_80")


def with_stages(stages: int) -> dict[str, int]:
    return {**CONFIG, "num_stages": stages}


def test_what_is_wrong_or_raises_is_never_timed():
    timed = []

    def check(config: Any) -> str | None:
        if config["num_stages"] == 3:
            raise RuntimeError("out of resource: shared memory\nRequired: 294912")
        return "wrong result: off" if config["num_stages"] == 4 else None

    def measure(config: Any) -> float:
        timed.append(config["num_stages"])
        return 10.0 / config["num_stages"]

    trials = tune.run_trials([with_stages(stages) for stages in (2, 3, 4, 5)], check, measure)
    assert timed == [2, 5]
    assert [trial.milliseconds for trial in trials] == [5.0, None, None, 2.0]
    assert trials[1].reason == "RuntimeError: out of resource: shared memory Required: 294912"
    best = tune.choose(trials)
    assert best is trials[3]
    summary = tune.summarize(trials, best)
    assert summary["gain"] == pytest.approx(2.5)
    assert summary["left_out"] == {"RuntimeError": 1, "wrong result": 1}
    line = tune.format_row(summary)
    assert line.startswith("5.000 -> 2.000 ms, 2.50x, with BLOCK_M=128 BLOCK_N=64 num_warps=8 num_stages=5; 4 tried")


def test_noise_is_no_gain_and_a_package_configuration_that_fails_is_said():
    trials = [Trial(CONFIG, 1.0), Trial(with_stages(3), 0.99), Trial(with_stages(4), None, "wrong")]
    assert tune.choose(trials) is trials[0]
    assert tune.format_row(tune.summarize(trials, trials[0])).startswith("1.000 ms, the package's own stays; 3 tried")
    with pytest.raises(ValueError, match="the package's own configuration fails here: wrong"):
        tune.choose(trials[::-1])


def test_a_kernel_beside_the_plain_one_has_its_speed_in_percent_of_it_rounded_down():
    trials = [Trial({"num_stages": 2}, 3.0), Trial({"num_stages": 3}, None, "wrong"), Trial({"num_stages": 4}, 2.5)]
    found = tune.beside_plain(trials, 3.02)
    assert [trial.config for trial in found] == [
        {"num_stages": 2, "percent_of_plain": 100}, {"num_stages": 3}, {"num_stages": 4, "percent_of_plain": 120},
    ]  # fmt: skip
    assert [trial.milliseconds for trial in found] == [3.0, None, 2.5]
    line = tune.format_row(tune.summarize(found, tune.choose(found)))
    assert "num_stages=4 percent_of_plain=120; 120 % of the plain kernel's speed; 3 tried (1 wrong)" in line


def test_the_users_table_keeps_what_was_not_measured():
    before = {"block_sparse": {"16-bit": {"64": with_stages(3), "128": with_stages(4)}}}
    after = tune.updated(
        before, {("block_sparse", "16-bit", 128): None, ("block_sparse", "32-bit", 64): with_stages(1)}
    )
    assert after["block_sparse"]["16-bit"] == {"64": with_stages(3)}
    assert after["block_sparse"]["32-bit"] == {"64": with_stages(1)}
    assert "128" in before["block_sparse"]["16-bit"]


@pytest.fixture
def pretended_gpu(tmp_path, monkeypatch):
    """A GPU of the class sm_90 as far as `run` asks, and trials whose times are made up."""
    monkeypatch.setenv(launch_tables.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch_tables, "device_class", lambda device: "sm_90")
    monkeypatch.setattr(tune, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    times = {"antidiagonal_scores": (4.0, 4.0), "block_sparse": (4.0, 2.0)}

    def made_up(kernel: str, *_: Any) -> list[Trial]:
        if kernel == "attention_hopper":
            return [Trial({"num_stages": 2, "percent_of_plain": 125}, 1.6), Trial({"num_stages": 3}, None, "wrong")]
        return [Trial(CONFIG, times[kernel][0]), Trial(with_stages(4), times[kernel][1])]

    monkeypatch.setattr(tune, "_tune", made_up)
    launch_tables.forget_tables()
    yield tmp_path / "sm_90.json"
    launch_tables.forget_tables()


def test_what_gains_is_written_and_read_by_the_next_launch(pretended_gpu, capsys):
    assert main(["tune", "--dtype", "bf16", "fp16", "--json"]) == 0
    printed = capsys.readouterr()
    lines, report = printed.err.splitlines(), json.loads(printed.out)
    # bf16 and fp16 share an entry.
    assert [(row["kernel"], row["dtype"], row["gain"]) for row in report["rows"]] == [
        ("antidiagonal_scores", "bf16", 1.0),
        ("block_sparse", "bf16", 2.0),
        ("attention_hopper", "bf16", 1.0),
    ]
    assert report["left_out"] == {}
    assert f"wrote {pretended_gpu}" in lines
    written = json.loads(pretended_gpu.read_text())
    assert written["about"]["device"] == "a GPU"
    assert set(written) == {"about", "block_sparse", "attention_hopper"}
    # The package's own is the fastest, but how fast it is here is another figure than the package's.
    assert written["attention_hopper"] == {"16-bit": {"128": {"num_stages": 2, "percent_of_plain": 125}}}
    hopper = launch_tables.find_optional_config("attention_hopper", torch.float16, 128, torch.device("cuda", 0))
    assert hopper == {"num_stages": 2, "percent_of_plain": 125}
    found = launch_tables.find_config("block_sparse", torch.float16, 128, torch.device("cuda", 0))
    assert found == with_stages(4)
    assert main(["tune"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"nothing to change in {pretended_gpu}"


def test_what_was_measured_before_an_interruption_is_kept(pretended_gpu, monkeypatch):
    made_up = tune._tune

    def interrupted(kernel: str, dtype: torch.dtype, head_dim: int, *rest: Any) -> list[Trial]:
        if head_dim == 128:
            raise KeyboardInterrupt
        return made_up(kernel, dtype, head_dim, *rest)

    monkeypatch.setattr(tune, "_tune", interrupted)
    assert main(["tune", "--kernel", "block_sparse", "--head-dim", "64", "128"]) == 130
    assert json.loads(pretended_gpu.read_text())["block_sparse"] == {"16-bit": {"64": with_stages(4)}}


def test_the_plain_kernel_is_measured_before_the_one_beside_it(pretended_gpu, capsys):
    assert main(["tune", "--kernel", "attention_hopper", "block_sparse", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["kernel"] for row in report["rows"]] == ["block_sparse", "attention_hopper"]


@pytest.mark.parametrize(
    ("arguments", "capability", "reason"),
    [
        ([], (8, 0), "it needs an NVIDIA GPU of compute capability 9.0, not 8.0"),
        (["--head-dim", "96"], (9, 0), "the package has no configuration of it for torch.bfloat16 and head_dim 96"),
        (["--dtype", "fp32"], (9, 0), "the package has no configuration of it for torch.float32 and head_dim 128"),
    ],
)
def test_a_kernel_that_cannot_run_is_left_out_with_its_reason(
    arguments, capability, reason, pretended_gpu, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert main(["tune", "--kernel", "attention_hopper", *arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], list(report["left_out"].values())) == ([], [reason])
    assert not pretended_gpu.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--head-dim", "4"], "--head-dim must be 8 or more and 256 or less, got 4"),
        (["--head-dim", "512"], "--head-dim must be 8 or more and 256 or less, got 512"),
        (["--tokens", "100"], "--tokens must be 2048 or more, got 100"),
        (["--rounds", "0"], "--rounds must be 1 or more, got 0"),
    ],
)
def test_bad_input_is_refused(arguments, words, pretended_gpu, capsys):
    assert main(["tune", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_malformed_table_is_refused_before_anything_is_measured(pretended_gpu, monkeypatch, capsys):
    pretended_gpu.write_text("{}}")
    monkeypatch.setattr(tune, "_tune", lambda *_: pytest.fail("measured"))
    assert main(["tune"]) == 2
    assert "sm_90.json: not JSON" in capsys.readouterr().err


COMPILED = """
import sys
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget

if __name__ == "__main__":
    from xattn_video_eval.tune import compile_like_jit
    from xattn_video_eval.tune.compile import compile_ahead, workers
    from xattn_video_eval.tune.problems import Shape

    cache, target = Path(sys.argv[1]), GPUTarget("cuda", 90, 32)
    own = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
    plain = [Shape("block_sparse", torch.bfloat16, 2, tokens, 64, False).runner() for tokens in (805, 4096)]
    hopper = [Shape("attention_hopper", torch.bfloat16, 2, 805, 64, True).runner()]
    with workers() as pool:
        # no tile has 24 rows; the others are compiled all the same
        compile_ahead(pool, plain, [{**own, "BLOCK_M": 24}, own], target)
        compile_ahead(pool, hopper, [{"num_stages": 2}], target)
    there = set(cache.rglob("*"))
    assert len(there) > 2
    for runner, config in [(plain[0], own), (plain[1], own), (hopper[0], {"num_stages": 2})]:
        compile_like_jit(*runner.kernel_and_arguments(config), target)
        assert set(cache.rglob("*")) == there
    compile_like_jit(*plain[0].kernel_and_arguments({**own, "num_stages": 2}), target)
    assert set(cache.rglob("*")) > there
"""


def test_what_processes_compile_is_found_by_this_one(tmp_path):
    """For sm_90, without a GPU."""
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton 3.6 or newer")
    script, cache = tmp_path / "compiled.py", tmp_path / "cache"
    script.write_text(COMPILED)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=1000)
    assert done.returncode == 0, done.stderr


CHECKS = """
import torch
from xattn_video_eval.tune import command as tune
from xattn_video.ops.triton import launch_tables

for kernel in ("antidiagonal_scores", "block_sparse"):
    own = launch_tables.find_config(kernel, torch.bfloat16, 32)
    runner = tune.small_runner(kernel, torch.bfloat16, 32, kernel == "block_sparse", torch.device("cpu"))
    check = tune.checker([runner])
    launch, made = runner.launch, []
    runner.launch = lambda config, output, programs=None: made.append(output) or launch(config, output, programs)
    reason = check(own)
    assert reason is None, reason
    right = made[0]
    for wrong in (right.index_fill(2, torch.tensor([3]), torch.nan), right.flip(1), right * 1.05):
        runner.launch = lambda config, output, programs=None: output.copy_(wrong)
        assert check(own).startswith("wrong result: off float64 by"), check(own)
    # A launch that writes nothing leaves NaN.
    runner.launch = lambda config, output, programs=None: None
    assert check(own).startswith("wrong result: off float64 by nan"), check(own)
    # Scores of one program for all strips are judged too: it uses its scratch again.
    runner.launch = lambda config, output, programs=None: output.copy_(right * 1.05 if programs == 1 else right)
    assert (check(own) is None) == (kernel == "block_sparse"), check(own)

    waits = []
    torch.cuda.synchronize = waits.append
    runner = tune.large_runner(kernel, torch.float32, 16, 1024, 1, torch.device("cpu"))
    assert runner.query.shape == (1, 1, 1024, 16)
    assert 0 < runner.block_mask.float().mean() < 1
    # Milliseconds: the interpreter takes more than one.
    assert tune.timer(runner, 1)(launch_tables.find_config(kernel, torch.float32, 16)) > 1
    # Before and after a launch that tells how long one takes, and the one that is timed.
    assert len(waits) == 4
    # Those of a moment follow each other.
    launches, least = [], tune.LEAST_SECONDS
    tune.LEAST_SECONDS = 1e9
    runner.launch = lambda config, output, programs=None: launches.append(len(waits))
    tune.timer(runner, 1)({})
    # The next kernel takes seconds a launch here, so it must not be launched as often.
    tune.LEAST_SECONDS = least
    assert launches == [4, 5] + [7] * tune.MOST_LAUNCHES
"""


def test_checks_pass_right_launches_and_see_wrong_ones_and_launches_are_timed(tmp_path):
    """The kernels run in Triton's interpreter, in a process of its own."""
    pytest.importorskip("triton", reason="Triton is for Linux only")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", CHECKS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=1000)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_it_measures_on_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(launch_tables.FOLDER_VARIABLE, str(tmp_path))
    few = [{}, {"num_stages": 1}]
    monkeypatch.setattr(tune, "candidates", lambda *args: [{**args[3], **change} for change in few])
    assert main(["tune", "--tokens", "4096", "--heads", "2", "--rounds", "3"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["rows"]) + len(report["left_out"]) == len(tune.KERNELS)
    assert [row["kernel"] for row in report["rows"]][:2] == ["antidiagonal_scores", "block_sparse"]
    for row in report["rows"][2:]:
        assert row["best"]["config"]["percent_of_plain"] > 0
    assert all(row["own"]["ms"] > 0 for row in report["rows"])
