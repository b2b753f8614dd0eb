"""What should be sparse and is dense in every call is told before a model is loaded, at the end, and by a sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli_tools import SIZE
from tests.test_sweep import TINY
from xattn_video import XAttnConfig
from xattn_video.integrations.diffusers import NothingSparse
from xattn_video_eval.sweep import SweepSettings
from xattn_video_eval.sweep.plot import plot, with_sparse_calls
from xattn_video_pipelines.video import GenerateSettings, make_plan, told_of_all_dense, warn_of_all_dense


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"steps": 4}, "the 5 warm-up steps cover all 4 steps; give fewer --warmup-steps, or --warmup 0.25"),
        ({"steps": 4, "warmup": 0.25}, None),
        ({"steps": 6}, None),
        ({"steps": 6, "last_steps": 1}, "--warmup-steps 5 and --last-steps 1 cover all 6 steps; give fewer"),
        ({"min_tokens": 5000}, "4,352 tokens are fewer than --min-tokens 5,000; give a smaller --min-tokens"),
        ({"min_tokens": 4352}, None),
    ],
)
def test_it_is_foreseen_from_settings_and_size(given, told, tmp_path):
    plan = make_plan(GenerateSettings(model="demo", prompt=("a b",), out=tmp_path / "out", **given))
    lines = warn_of_all_dense([None, plan.jobs[0].config, plan.jobs[0].config], plan.recipe)
    assert len(lines) == (told is not None)
    assert told is None or f"{plan.jobs[0].attention}: every call will be dense: {told}" in lines[0]


def test_generate_says_it_before_and_after_and_the_library_does_not(model, tmp_path, xattn, recwarn):
    command = ("generate", "a b", "--model", model, "--out", tmp_path, *SIZE)
    done = xattn(*command, "--attention", "both", "--min-tokens", 0)
    assert done.code == 0, done.err
    before, after = (line for line in done.err.splitlines() if line.startswith("warning: "))
    assert "the 5 warm-up steps cover all 2 steps" in before
    assert "1 of 1 sparse videos had no sparse call (dense calls of the first: 8 warmup); give fewer" in after
    assert not [warning for warning in recwarn if issubclass(warning.category, NothingSparse)]
    assert done.err.index(before) < done.err.index("videos: ") < done.err.index(after)


def test_what_is_in_the_way_of_sparse_calls_counts_for_more_than_the_warm_up():
    record = {"attention": "xattn", "sparse_calls": 0, "dense_reasons": {"warmup": 8, "min_tokens": 4}}
    assert str(told_of_all_dense([record])).endswith("give a smaller --min-tokens, or a larger video")
    assert told_of_all_dense([record | {"sparse_calls": 1}, {"attention": "dense", "sparse_calls": 0}]) is None
    older = {"attention": "xattn", "mean_density": 1.0, "dense_reasons": {"warmup": 8}}
    assert "1 of 2 sparse videos" in str(told_of_all_dense([older, older | {"mean_density": 0.5}]))


@pytest.mark.parametrize(("steps", "warmup"), [(None, 5), (50, 5), (6, 5), (5, 1), (4, 1), (3, 0), (1, 0)])
def test_the_base_point_of_a_sweep_has_sparse_steps(steps, warmup):
    configs = SweepSettings(model="m", prompts=Path("p.txt"), thresholds=(0.5,), warmup_steps=(0, 8)).configs_at(steps)
    base = XAttnConfig(warmup_steps=warmup, anchors=0)
    points = [base, base.replace(threshold=0.5, anchors=1), base.replace(warmup_steps=0), base.replace(warmup_steps=8)]
    assert configs == list(dict.fromkeys(points))


def test_a_sweep_marks_rows_that_are_all_dense_and_leaves_them_out_of_the_picture(model, tmp_path, xattn):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a red fox\n", encoding="utf-8")
    command = ("sweep", "--model", model, "--prompts", prompts, "--out", out, *TINY, "--steps", 2, "--no-lpips")
    done = xattn(*command, "--no-floor", "--thresholds", 0.5, "--warmup-steps", 2, "--json")
    assert done.code == 0, done.err
    assert "warning: xattn-s8-t0.90-w2-b16-m0: every call will be dense: the 2 warm-up steps cover all 2" in done.err
    rows = json.loads(done.out)["rows"]
    assert [row["all_dense"] for row in rows] == [None, None, None, True]
    assert [row["warmup_steps"] for row in rows[1:]] == [0, 0, 2]
    assert [row["threshold"] for row in with_sparse_calls(rows)] == [0.9, 0.5]
    assert "all dense: no call was sparse, so these rows say nothing of sparse attention" in done.err
    # The picture is the one of the other rows alone, and says of which model and device.
    told = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    title = f"{model}, {told['tokens']} tokens, 2 steps, {told['devices'][0]}"
    plot(rows[:3], tmp_path / "others.png", title)
    assert (out / "sweep.png").read_bytes() == (tmp_path / "others.png").read_bytes()
