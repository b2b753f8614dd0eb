"""`xattn-video sweep`: one loaded model, one dense set, a row a configuration, resumable."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli_tools import Run, save_tiny_wan, tool
from xattn_video import XAttnConfig
from xattn_video_eval.sweep import plot as sweep_plot
from xattn_video_eval.sweep.settings import SweepSettings
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.video import make as runner
from xattn_video_pipelines.video.manifest import read_manifest

AXES = ("--thresholds", 0.3, 0.9, "--strides", 8, "--warmup-steps", 1, 5)
TINY = ("--height", 64, "--width", 64, "--num-frames", 9, "--steps", 6, "--min-tokens", 0, "--block-size", 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("model"))


@pytest.fixture
def xattn(capfd: pytest.CaptureFixture[str]) -> Run:
    return tool(capfd)


def settings(**given: Any) -> SweepSettings:
    return SweepSettings(model="m", prompts=Path("p.txt"), **given)


def test_one_axis_at_a_time_passes_through_the_base_point_once():
    configs = settings().configs
    assert configs[0] == XAttnConfig()
    assert len(configs) == len(set(configs)) == 1 + 5 + 3 + 3
    for config in configs:
        changed = [
            name
            for name in ("threshold", "stride", "warmup_steps")
            if getattr(config, name) != getattr(configs[0], name)
        ]
        assert len(changed) <= 1


def test_the_grid_has_every_combination():
    configs = settings(grid=True, thresholds=(0.5, 0.9), strides=(4, 8, 16), warmup_steps=(0, 5)).configs
    points = {(config.threshold, config.stride, config.warmup_steps) for config in configs}
    assert points == {(t, s, w) for t in (0.5, 0.9) for s in (4, 8, 16) for w in (0, 5)}


def test_a_value_without_a_meaning_is_refused():
    with pytest.raises(UserError, match="stride"):
        settings(strides=(7,))


def test_a_sweep_makes_measures_draws_and_goes_on(model, tmp_path, xattn, monkeypatch):
    loads = []
    load = runner.load_pipeline
    monkeypatch.setattr(runner, "load_pipeline", lambda *args, **kwargs: loads.append(1) or load(*args, **kwargs))
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a red circle moving left on a white background\n", encoding="utf-8")
    command = ("sweep", "--model", model, "--prompts", prompts, "--out", out, *AXES, *TINY, "--no-lpips", "--json")
    done = xattn(*command)
    assert done.code == 0, done.err
    assert len(loads) == 1
    assert "3 configurations, 5 of 5 videos to make" in done.err
    # Told again with a time, once there is one.
    assert "3 configurations, 4 of 5 videos to make: at most about" in done.err
    rows = json.loads(done.out.splitlines()[-1])["rows"]
    labels = [f"xattn-s8-t{t}-w{w}-b16-m0" for t, w in (("0.90", 5), ("0.30", 5), ("0.90", 1))]
    assert [row["attention"] for row in rows] == ["dense", "dense-alt", *labels]
    dense, floor, base, lower, shorter = rows
    assert (dense["density"], dense["speedup"], dense["psnr"]) == (1.0, 1.0, None)
    assert floor["density"] == 1.0
    assert floor["psnr"] > base["psnr"] > lower["psnr"]
    assert base["density"] > lower["density"]
    assert base["density"] > shorter["density"]
    assert base["density"] == pytest.approx(read_manifest(out / labels[0])["0001", 0]["mean_density"])
    # Every prompt is of the shapes world, so the judge looks; a random model draws nothing that was asked.
    assert all(row["as_asked"] == 0.0 for row in rows)
    with open(out / "sweep.csv", encoding="utf-8", newline="") as file:
        assert [row["attention"] for row in csv.DictReader(file)] == [row["attention"] for row in rows]
    document = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    assert document["rows"] == rows
    assert document["tokens"]
    assert document["devices"]
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")

    again = xattn(*command)
    assert "0 of 5 videos to make" in again.err
    assert len(loads) == 1
    assert json.loads(again.out.splitlines()[-1])["rows"] == rows


def test_dense_and_sparse_videos_of_a_prompt_are_made_one_after_another(model, tmp_path, xattn):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a cat\na dog\n", encoding="utf-8")
    command = ("sweep", "--model", model, "--prompts", prompts, "--out", out, "--grid", "--thresholds", "0.3")
    command += ("--strides", "8", "--warmup-steps", "1", "--no-floor", "--no-plot", *TINY, "--no-lpips")
    done = xattn(*command)
    assert done.code == 0, done.err
    files = [Path(line.split()[0]) for line in done.out.splitlines() if ".mp4  " in line]
    assert [file.stem for file in files] == ["0001-s0"] * 2 + ["0002-s0"] * 2
    assert [file.parent.name for file in files] == ["dense", "xattn-s8-t0.30-w1-b16-m0"] * 2
    # Each was made with what its folder says.
    assert [read_manifest(file.parent)[file.stem[:4], 0]["mean_density"] == 1 for file in files] == [True, False] * 2


def test_other_prompts_are_not_judged(model, tmp_path, xattn):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\n", encoding="utf-8")
    done = xattn(
        "sweep", "--model", model, "--prompts", prompts, "--out", tmp_path / "out", *TINY, "--no-lpips", "--no-floor",
        "--no-plot", "--thresholds", 0.9, "--strides", 8, "--warmup-steps", 5, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = json.loads(done.out.splitlines()[-1])["rows"]
    assert [row["as_asked"] for row in rows] == [None, None]
    assert not (tmp_path / "out" / "sweep.png").exists()


def test_a_dry_run_makes_nothing(model, tmp_path, xattn):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\n", encoding="utf-8")
    done = xattn("sweep", "--model", model, "--prompts", prompts, "--out", tmp_path / "out", *AXES, *TINY, "--dry-run")
    assert done.code == 0
    assert str(tmp_path / "out" / "dense-alt") in done.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--thresholds", 1.5), "threshold"),
        (("--warmup-steps", -1), "warmup_steps"),
        (("--limit", 0), "--limit must be 1 or more"),
        (("--dtype", "int8"), "int8"),
    ],
)
def test_bad_input_is_one_line(model, tmp_path, xattn, given, message):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\n", encoding="utf-8")
    done = xattn("sweep", "--model", model, "--prompts", prompts, "--out", tmp_path / "out", *AXES, *TINY, *given)
    assert done.code == 2
    assert message in done.err.splitlines()[-1]
    assert done.err.splitlines()[-1].startswith("xattn-video")
    assert not (tmp_path / "out").exists()


def test_the_lines_of_a_grid_go_through_the_base_point() -> None:
    grid = itertools.product((0.5, 0.9, 0.95), (4, 8), (0, 5))
    rows = [dict(zip(("threshold", "stride", "warmup_steps"), point, strict=True)) for point in grid]
    lines = sweep_plot._lines(rows)
    assert [row["threshold"] for row in lines["threshold"]] == [0.5, 0.9, 0.95]
    assert {(row["stride"], row["warmup_steps"]) for row in lines["threshold"]} == {(8, 5)}
    without = [row for row in rows if row["threshold"] != 0.9]
    assert sweep_plot._lines(without)["stride"][0] == without[0]
