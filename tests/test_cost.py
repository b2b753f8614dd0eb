"""What a run will cost is told before it starts, from the model's sizes, the bench's rows and finished videos."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cli_tools import tool
from xattn_video_pipelines.video import GenerateSettings, Plan, cost, make_plan
from xattn_video_pipelines.video.cost import bench_rows as real_rows
from xattn_video_pipelines.video.cost import estimate, first_line, lines_of, needed_files, weights_bytes
from xattn_video_pipelines.video.models import KNOWN_MODELS, find_model
from xattn_video_pipelines.video.progress import told_of_first_step

TFLOP = 1e12
# 320 tokens, fewer than --min-tokens.
SMALL = {"height": 64, "width": 64, "num_frames": 9}


@pytest.fixture
def plan_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plans of a run on this CPU, which has the given rows of the bench and no others."""

    def make(rows: tuple[dict[str, Any], ...] = (), **given: Any) -> Plan:
        values = {"model": "demo", "prompt": ("a b",), "out": tmp_path / "out", "device": "cpu", "attention": "both"}
        plan = make_plan(GenerateSettings(**values | given))
        here = plan.environment["device_name"]
        monkeypatch.setattr(cost, "bench_rows", lambda: [{"device": here, **row} for row in rows])
        return plan

    return make


def row(tokens: int = 4352, *, dense_ms: float = 100.0, attend_ms: float = 30.0, **more: Any) -> dict[str, Any]:
    """A row of the bench for the demo's heads: a dense call, and a sparse one with density 0.3."""
    best = {"sdpa": dense_ms, "score": 8.0, "select": 2.0, "attend": attend_ms, "total": 10.0 + attend_ms}
    shape = {"tokens": tokens, "heads": 4, "head_dim": 64, "dtype": "fp32", "causal": False, "density": 0.3}
    return {**shape, "dense_kernel": "sdpa", "best_ms": best, **more}


def test_work_is_counted_from_the_sizes_of_the_model(plan_of):
    found = estimate(plan_of())
    # 4 layers of width 256 with 4,352 tokens: scores and values; then projections, feed-forward and cross-attention.
    attention = 4 * 4 * 4352**2 * 256
    linear = 4 * 2 * 4352 * (4 * 256**2 + 2 * 256 * 1024 + 2 * 256**2)
    assert found.flop_per_video == pytest.approx(20 * (attention + linear))
    assert found.attention_share == pytest.approx(attention / (attention + linear))
    assert found.forwards == 1
    assert estimate(plan_of(guidance_scale=5.0)).flop_per_video == pytest.approx(2 * 20 * (attention + linear))
    # 15 of 20 steps are sparse.
    assert found.most_speedup == pytest.approx(1 / (1 - 0.75 * attention / (attention + linear)))
    assert found.break_even == 1 - 1 / 16
    # A quarter of the layers' steps that could be sparse refresh the residual, or more.
    kept = estimate(plan_of(residual="int4", refresh_every=4.0))
    assert 1 < kept.most_speedup < found.most_speedup


def test_times_come_from_the_row_of_the_bench_that_is_most_alike(plan_of):
    others = (row(4352, dense_ms=1.0, head_dim=128), row(65536, dense_ms=1.0), row(4352, dense_ms=1.0, dtype="bf16"))
    found = estimate(plan_of((*others, row(4352, dense_ms=1.0, device="another"), row())))
    # In a forward 4 dense calls take 0.4 s, and linear layers run at the same speed.
    dense = 20 * 0.4 / found.attention_share
    assert found.dense_seconds == pytest.approx(dense)
    # In 15 steps a sparse call takes 10 ms for its choice, and at density 0.5 50 ms for attention, of 100 ms.
    assert found.sparse_seconds == pytest.approx(dense - 15 * 0.4 * 0.4)
    assert found.density == 0.5
    assert found.seconds == pytest.approx(found.dense_seconds + found.sparse_seconds)
    # With 90 ms left for attention that takes 30 ms at density 0.3.
    assert found.break_even == pytest.approx(0.9)
    assert "this device's bench at 4,352 tokens" in first_line(found, 4352, 2)
    assert found.warnings == ()
    assert set(row()) <= set(real_rows()[0])
    assert "time      unknown; run: xattn-video bench --record" in lines_of(estimate(plan_of()))
    # A row of 4,352 tokens says nothing of calls with 320.
    assert estimate(plan_of((row(),), **SMALL)).source is None


def test_finished_videos_of_this_run_tell_more_than_the_bench(plan_of):
    plan = plan_of((row(),))
    found = {"seconds": 7.0, "device_name": plan.environment["device_name"], "mean_density": 0.6}
    jobs = tuple(
        replace(job, found={**found, "attention": job.kind, "seconds": 7.0 if job.kind == "dense" else 5.0})
        for job in plan.jobs
    )
    told = estimate(replace(plan, jobs=jobs))
    assert (told.dense_seconds, told.sparse_seconds, told.density) == (7.0, 5.0, 0.6)
    assert "by 2 finished videos of this run" in first_line(told, 4352, 2)
    elsewhere = tuple(replace(job, found={**job.found, "device_name": "another"}) for job in jobs)
    assert "bench" in str(estimate(replace(plan, jobs=elsewhere)).source)
    # The dense one alone says nothing of sparse ones, but is better than nothing.
    dense = replace(plan_of(), jobs=(jobs[0], plan.jobs[1]))
    assert (estimate(dense).dense_seconds, estimate(dense).sparse_seconds) == (7.0, None)


@pytest.mark.parametrize(
    ("rows", "given", "told"),
    [
        ((), {"model": "wan2.1-14b"}, "this is hopeless: a video takes more than 7.5 days even on a CPU with 1 TFLOP"),
        ((row(dense_ms=3e6),), {}, "this is hopeless: a video takes about 44 h"),
        ((row(attend_ms=95.0),), {}, "sparsity does not pay at this size and density: about "),
        ((), {"negative_prompt": "blur"}, "the negative prompt has no effect"),
        ((), SMALL | {"min_tokens": 0, "warmup_steps": 16}, "sparsity does not pay here: were attention free"),
        ((), {"residual": "int4", "refresh_every": 1.0}, "sparsity does not pay here: were attention free"),
    ],
)
def test_what_is_not_worth_starting_is_said(plan_of, rows, given, told):
    warnings = estimate(plan_of(rows, **given)).warnings
    assert any(line.startswith(f"warning: {told}") for line in warnings), warnings


def test_with_guidance_a_negative_prompt_has_an_effect(plan_of):
    assert estimate(plan_of(negative_prompt="blur", guidance_scale=5.0)).warnings == ()


def test_what_is_dense_in_every_call_is_told_elsewhere(plan_of):
    found = estimate(plan_of((row(1024, attend_ms=95.0),), **SMALL))
    assert found.dense_seconds is not None
    assert (found.most_speedup, found.warnings) == (1.0, ())
    assert found.sparse_seconds == found.dense_seconds


@pytest.mark.parametrize(
    "given",
    [
        {"num_layers": 0},
        {"num_attention_heads": 10**30},
        {"attention_head_dim": None},
        {"ffn_dim": "wide"},
        {"ffn_dim": None, "mlp_ratio": [4]},
        {"num_single_layers": -2},
    ],
    ids=str,
)
def test_of_a_model_with_odd_sizes_nothing_is_known(plan_of, tmp_path, given):
    parts = {"transformer": {"_class_name": "WanTransformer3DModel", **given}, "vae": {"_class_name": "none"}}
    index = {"_class_name": "WanPipeline", "transformer_2": None, **{part: ["diffusers", "A"] for part in parts}}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for part, config in parts.items():
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    found = estimate(plan_of(model=str(tmp_path)))
    assert (found.attention_share, found.flop_per_video, found.most_speedup) == (None, None, None)


def test_weights_that_do_not_fit_are_said(plan_of, monkeypatch):
    monkeypatch.setattr(cost, "_memory_bytes", lambda device: 10**6)
    (line,) = estimate(plan_of()).warnings
    assert "the weights alone take 21.4 MiB of memory, and cpu has 977 KiB" in line


def test_weights_are_counted_from_files_or_from_the_published_configurations():
    demo = find_model("demo")
    # The files of the demo hold 16 bits a weight, and beside them a header of some kB each.
    files = sum(path.stat().st_size for path in Path(demo.source).glob("*/*.safetensors"))
    assert 0.97 < weights_bytes(demo, "float32", None) / (2 * files) < 1
    wan = KNOWN_MODELS["wan2.1-1.3b"]
    parts = (1_418_996_800, 5_680_910_336, 126_892_531)
    assert weights_bytes(wan, "float32", None) == 4 * sum(parts)
    # The VAE stays in float32, and the transformer is what is quantised.
    assert weights_bytes(wan, "bfloat16", None) == 2 * (parts[0] + parts[1]) + 4 * parts[2]
    assert weights_bytes(wan, "bfloat16", "bitsandbytes_4bit") == parts[0] // 2 + 2 * parts[1] + 4 * parts[2]
    assert set(cost._PARAMETERS) == set(KNOWN_MODELS) - {"demo"}


def test_a_download_is_of_the_files_that_are_loaded():
    sizes = {
        "model_index.json": 1, "README.md": 2, "assets/a.png": 4, "vae/config.json": 8, "vae/x.safetensors": 16,
        "vae/x.fp16.safetensors": 32, "vae/x.bin": 64, "tokenizer/spiece.model": 128, "x.safetensors": 256,
    }  # fmt: skip
    assert sum(needed_files(sizes).values()) == 1 + 8 + 16 + 128


def test_the_first_step_tells_how_long_the_rest_takes():
    assert told_of_first_step(90.0, 50, 2) == "first step took 90.0 s: about 1 h 15 min a video, 2 h 30 min in all"
    assert told_of_first_step(1.0, 50, 1) is None
    assert told_of_first_step(90.0, None, 2) is None


def test_a_dry_run_has_the_cost_as_json(tmp_path, capfd):
    done = tool(capfd)("generate", "a b", "--model", "demo", "--out", tmp_path / "out", "--dry-run", "--json")
    told = json.loads(done.out)["cost"]
    assert told["download_bytes"] == 0
    assert told["disk_bytes"] == 128 * 128 * 33 * 3
    assert 0 < told["attention_share"] < 1
    assert told["flop_per_video"] < 10 * TFLOP
