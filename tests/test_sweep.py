"""`xattn-video sweep`: one loaded model, one dense set, a row a configuration, resumable."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xattn_video import XAttnConfig
from xattn_video_eval.sweep import plot as sweep_plot
from xattn_video_eval.sweep.settings import SweepSettings
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.video import make as runner
from xattn_video_pipelines.video.manifest import read_manifest

AXES = ("--thresholds", 0.3, 0.9, "--strides", 8, "--warmup-steps", 1, 5)
TINY = ("--height", 64, "--width", 64, "--num-frames", 9, "--steps", 6, "--min-tokens", 0, "--block-size", 16)


def settings(**given: Any) -> SweepSettings:
    return SweepSettings(model="m", prompts=Path("p.txt"), **given)


def test_one_axis_at_a_time_passes_through_the_base_point_once():
    configs = settings().configs
    assert configs[0] == XAttnConfig(anchors=0)
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


def test_an_axis_that_is_asked_for_is_swept_alone_around_the_preset():
    base = XAttnConfig.preset("balanced")
    found = settings(preset="balanced", residuals=("off", "int4", "fp8"), refresh_every=(2.0, 0.25), anchors=(0,))
    assert found.configs == [
        base,
        XAttnConfig.preset("balanced", residual="off"),
        base.replace(residual="fp8"),
        base.replace(refresh_every=2),
        base.replace(refresh_every=0.25),
        base.replace(anchors=0),
    ]
    assert found.names == {base: "balanced"}
    others = settings(threshold_ramps=(0.3,), keep_masks=(1, 4), min_tokens=0).configs
    plain = XAttnConfig(min_tokens=0, anchors=0)
    assert others == [plain, plain.replace(threshold_ramp=0.3), plain.replace(keep_masks=4)]
    grid = settings(grid=True, residuals=("off", "int4"), anchors=(0, 1)).configs
    assert {(config.residual, config.anchors) for config in grid} == {(r, a) for r in ("off", "int4") for a in (0, 1)}


def test_presets_and_named_points_come_after_the_base_point(tmp_path):
    file = tmp_path / "points.json"
    named = {
        "reuse": {"threshold": 0.02, "residual": "int4", "refresh": [0, 1, 2]},
        "fp8": {"preset": "balanced", "residual": "fp8"},
    }
    file.write_text(json.dumps(named), encoding="utf-8")
    found = settings(presets=("fast", "wan"), points=file, block_size=64)
    fast, fp8 = (XAttnConfig.preset(name, block_size=64) for name in ("fast", "balanced"))
    reuse = XAttnConfig(threshold=0.02, residual="int4", refresh=(0, 1, 2), block_size=64, anchors=1)
    assert found.configs == [XAttnConfig(block_size=64, anchors=0), fast, reuse, fp8.replace(residual="fp8")]
    # The paper's settings for Wan are the defaults.
    assert list(found.names.values()) == ["fast", "wan", "reuse", "fp8"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "must hold an object of objects"),
        ('{"a": {"taste": 1}}', "a: unknown settings taste"),
        ('{"a": {"preset": "sora"}}', "a: preset must be one of"),
        ('{"a": {"threshold": 2}}', "a: threshold must be in"),
    ],
)
def test_a_file_of_named_points_that_says_nothing_is_refused(tmp_path, text, message):
    file = tmp_path / "points.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"--points .*points.json: {message}"):
        settings(points=file)


@pytest.mark.parametrize(
    "given",
    [
        {"refresh_every": (4.0,)},
        {"refresh_every": (4.0,), "residuals": ("int4",)},
        {"refresh_every": (4.0,), "residuals": ("off", "int4"), "grid": True, "preset": "balanced"},
    ],
)
def test_refreshes_without_a_residual_are_refused(given):
    with pytest.raises(UserError, match=r"--refresh-every needs a residual .* got residual off"):
        settings(**given)
    assert settings(refresh_every=(4.0,), residuals=("int4", "fp8"), grid=True).configs


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
    labels = ["xattn-s8-t0.90-w5-b16-m0", "xattn-s8-t0.30-w5-b16-m0-a1", "xattn-s8-t0.90-w1-b16-m0"]
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


def test_rows_tell_the_residual_its_memory_and_the_worst_video(model, tmp_path, xattn):
    prompts, out, file = tmp_path / "prompts.txt", tmp_path / "out", tmp_path / "points.json"
    prompts.write_text("a cat\na dog\n", encoding="utf-8")
    file.write_text(
        '{"reuse": {"threshold": 0.02, "anchors": 0, "residual": "fp8", "refresh": [0, 1, 3]}}', encoding="utf-8"
    )
    done = xattn(
        "sweep", "--model", model, "--prompts", prompts, "--out", out, *TINY, "--steps", 10, "--no-lpips", "--no-floor",
        "--preset", "balanced", "--residuals", "off", "int4", "--points", file, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = json.loads(done.out.splitlines()[-1])["rows"]
    dense, base, off, reuse = rows
    assert [row["name"] for row in rows] == [None, "balanced", None, "reuse"]
    assert [row["residual"] for row in rows] == [None, "int4", "off", "fp8"]
    assert [row["refresh"] for row in rows] == [None, "growing", None, [0, 1, 3]]
    assert [row["anchors"] for row in rows] == [None, 1, 1, 0]
    # What nothing changes is no column.
    assert not {"keep_masks", "threshold_ramp", "last_steps"} & base.keys()
    for row in (base, off, reuse):
        summary = json.loads((out / row["attention"] / "summary.json").read_text(encoding="utf-8"))
        each = sorted(video["psnr"] for video in summary["videos"])
        assert each[0] < each[1]
        # Two videos: the bootstrap's means reach both of them.
        assert (row["psnr_worst"], row["psnr_low"], row["psnr_high"]) == pytest.approx((each[0], *each))
        assert row["flicker"] == summary["flicker"] > 0
    held = [record["residual_bytes"] for record in read_manifest(out / base["attention"]).values()]
    assert base["residual_mib"] == max(held) / 2**20 > 0
    assert dense["residual_mib"] is off["residual_mib"] is None
    assert base["calls_without_residual"] == 0
    # Refreshes count as dense calls.
    records = read_manifest(out / base["attention"])
    assert all(record["dense_reasons"]["refresh"] for record in records.values())
    assert base["density"] == pytest.approx(sum(record["mean_density"] for record in records.values()) / 2)
    printed = next(line for line in done.err.splitlines() if line.startswith("configuration "))
    for head in ("name", "residual", "refresh", "anchors", "worst dB", "flicker", "residual MiB"):
        assert head in printed
    assert "LPIPS" not in printed
    with open(out / "sweep.csv", encoding="utf-8", newline="") as table:
        assert [row["name"] for row in csv.DictReader(table)] == ["", "balanced", "", "reuse"]
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_dense_and_sparse_videos_of_a_prompt_are_made_one_after_another(model, tmp_path, xattn):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a cat\na dog\n", encoding="utf-8")
    command = ("sweep", "--model", model, "--prompts", prompts, "--out", out, "--grid", "--thresholds", "0.3")
    command += ("--strides", "8", "--warmup-steps", "1", "--no-floor", "--no-plot", *TINY, "--no-lpips")
    done = xattn(*command)
    assert done.code == 0, done.err
    files = [Path(line.split()[0]) for line in done.out.splitlines() if ".mp4  " in line]
    assert [file.stem for file in files] == ["0001-s0"] * 2 + ["0002-s0"] * 2
    assert [file.parent.name for file in files] == ["dense", "xattn-s8-t0.30-w1-b16-m0-a1"] * 2
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
        (("--refresh-every", 0.2), "--refresh-every needs a residual"),
        (("--presets", "sora"), "sora"),
        (("--preset", "fast", "--keep-masks", 4), "keep_masks goes without a residual"),
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
    # Thresholds below 0.9 come with anchors, and stay on the line. Anchors that were asked for do not.
    anchored = [row | {"anchors": int(row["threshold"] < 0.9)} for row in rows]
    found = sweep_plot._lines([*anchored, rows[3] | {"anchors": 2}, rows[0] | {"anchors": 0}])
    assert [(row["threshold"], row["anchors"]) for row in found["threshold"]] == [(0.5, 1), (0.9, 0), (0.95, 0)]
    # A preset asks for anchors at any threshold.
    preset = [rows[0] | {"threshold": value, "anchors": 1} for value in (0.2, 0.5, 0.95)]
    assert [row["threshold"] for row in sweep_plot._lines(preset)["threshold"]] == [0.2, 0.5, 0.95]
    without = [row for row in rows if row["threshold"] != 0.9]
    assert sweep_plot._lines(without)["stride"][0] == without[0]


def test_a_point_without_a_residual_is_on_the_residuals_line_alone() -> None:
    base = {"threshold": 0.3, "stride": 8, "warmup_steps": 5, "residual": "int4", "refresh_every": 0.2}
    base |= {"anchors": 1, "refresh": "growing", "extrapolate": True, "name": "balanced"}
    off = base | {"residual": "off", "refresh_every": None, "refresh": None, "extrapolate": False, "name": None}
    changes = ({"residual": "fp8"}, {"refresh_every": 2}, {"anchors": 0}, {"threshold": 0.9, "name": "a point"})
    fp8, often, bare, named = (base | {"name": None} | change for change in changes)
    lines = sweep_plot._lines([base, fp8, off, often, bare, named])
    assert lines == {"residual": [off, base, fp8], "refresh_every": [base, often], "anchors": [bare, base]}
    assert sweep_plot._lines([base, named]) == {}
    # Without a name the base point would have no mark of its own.
    plain = base | {"name": None}
    assert sweep_plot._lines([plain, named]) == {"threshold": [plain]}


def test_the_names_of_points_cover_neither_each_other_nor_points() -> None:
    """Points at one place, as the base point of all axes is, and points that are close to each other."""
    usual = {"threshold": 0.9, "stride": 8, "warmup_steps": 5, "attention": "x", "name": None}
    measured = {"density": 0.77, "speedup": 1.13, "psnr": 36.8, "as_asked": 0.97}
    changes = [
        {},
        {"stride": 4, "psnr": 36.9, "speedup": 1.09},
        {"stride": 16, "density": 0.767, "psnr": 36.2},
        {"stride": 32, "density": 0.769, "psnr": 36.2},
        {"warmup_steps": 2, "density": 0.731, "psnr": 33.9},
        {"threshold": 0.95, "density": 0.843, "psnr": 42.8},
        {"threshold": 0.5, "density": 0.468, "psnr": 25.1, "name": "a point with a rather long name"},
    ]
    rows = [usual | measured | change for change in changes]
    figure = sweep_plot.draw(rows, "demo on a CPU")
    assert figure.get_suptitle() == "demo on a CPU"
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
        assert len(boxes) >= 8
        assert not [(one, other) for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]
        marks = [axes.transData.transform(line.get_xydata()) for line in axes.get_lines() if len(line.get_xdata()) != 2]
        assert not [box for box in boxes for x, y in np.concatenate(marks) if box.contains(x, y)]
        frame = axes.get_window_extent()
        assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
