"""The study of residuals: a row per named configuration, judged against the same dense videos."""

from __future__ import annotations

import json

import pytest

from xattn_video import XAttnConfig
from xattn_video_eval.studies import residual_quality
from xattn_video_eval.studies.residual_quality import CONFIGURATIONS, main
from xattn_video_eval.sweep import SweepSettings
from xattn_video_pipelines.video.manifest import read_manifest


def test_the_program_makes_measures_draws_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(residual_quality, "LEDGER", tmp_path / "ledger.jsonl")
    file, out = tmp_path / "some.json", tmp_path / "out"
    named = {
        "plain": {"threshold": 0.3, "warmup_steps": 1},
        "reuse": {"threshold": 0.02, "warmup_steps": 1, "residual": "int4", "refresh": [0]},
    }
    file.write_text(json.dumps(named))
    command = ["--out", str(out), "--configurations", str(file), "--videos", "2", "--steps", "3", "--num-frames", "9"]
    assert main([*command, "--record", "--plot", str(tmp_path / "plot.png")]) == 0
    printed = capsys.readouterr()
    plain, reuse = (json.loads(line) for line in printed.out.splitlines()[-2:])
    assert [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()] == [plain, reuse]
    assert (plain["name"], reuse["name"], reuse["config"]["refresh"]) == ("plain", "reuse", [0])
    for row in (plain, reuse):
        summary = json.loads((out / XAttnConfig.from_dict(row["config"]).label() / "summary.json").read_text())
        assert row["psnr"] == summary["psnr"]
        assert row["psnr_worst"] == min(video["psnr"] for video in summary["videos"]) <= row["psnr_low"] < row["psnr"]
        assert row["videos"] == 2
        assert set(row["right"]) == {"dense", "sparse"}
        assert row["device"]
    # A dense step, then one that refreshes and one that is sparse.
    assert reuse["density"] > 2 / 3
    assert reuse["residual_mib"] > 0
    assert plain["residual_mib"] is None
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")} == times
    assert len(read_manifest(out / "dense")) == 2


def test_the_shipped_configurations_are_presets_pure_reuse_and_plain_selection(tmp_path):
    names = SweepSettings(model="demo", prompts=tmp_path / "p.txt", points=CONFIGURATIONS).names
    found = {name: config for config, name in names.items()}
    assert [found[name] for name in ("fast", "balanced", "faithful")] == [
        XAttnConfig.preset(name) for name in ("fast", "balanced", "faithful")
    ]
    for name in ("pure reuse as fast", "pure reuse as balanced"):
        # one block a row: all else is reused
        assert (found[name].threshold, found[name].anchors) == (0.02, 0)
        assert found[name].residual == "int4"
    plain = {name: config for name, config in found.items() if name.startswith("plain")}
    # The base point of a sweep is made anyway, so it has a name too.
    assert plain == {f"plain {threshold}": XAttnConfig(threshold=threshold, anchors=0) for threshold in (0.7, 0.8, 0.9)}


def test_more_videos_than_prompts_is_one_line(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--videos", "1000"]) == 2
    assert capsys.readouterr().err.strip() == "residual_quality: error: --videos must be from 1 to 192, got 1000"


@pytest.mark.parametrize("text", ["", "[]"])
def test_a_file_without_configurations_is_one_line(tmp_path, capsys, text):
    file = tmp_path / "some.json"
    file.write_text(text)
    assert main(["--out", str(tmp_path / "out"), "--configurations", str(file)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert f"--points {file}" in errors[0]


def test_the_configurations_for_few_steps_keep_the_warm_up_to_a_quarter(tmp_path):
    file = CONFIGURATIONS.with_name("few_steps.json")
    names = SweepSettings(model="demo", prompts=tmp_path / "p.txt", preset="fast", points=file).names
    assert set(names.values()) == set(json.loads(file.read_text()))
    assert {config.warmup for config in names} == {0.25}
