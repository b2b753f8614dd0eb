"""The study of step caches: a row per cache, judged against the same dense videos as sparse attention."""

from __future__ import annotations

import importlib.util
import json

import pytest

from xattn_video_eval.studies import step_caches
from xattn_video_eval.studies.step_caches import CACHES, main
from xattn_video_pipelines.video.manifest import read_manifest

SMALL = ["--videos", "1", "--steps", "6", "--num-frames", "5"]


def test_the_program_makes_measures_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step_caches, "LEDGER", tmp_path / "ledger.jsonl")
    file, out = tmp_path / "some.json", tmp_path / "out"
    named = {
        "never skips": {"cache": "first-block", "threshold": 0.0},
        "Skips!": {"cache": "first-block", "threshold": 1e9},
        "measured first": {"cache": "mag", "threshold": 10.0},
        "both": {
            "cache": "first-block",
            "threshold": 1e9,
            "attention": {"threshold": 0.2, "warmup_steps": 0, "min_tokens": 64},
        },
    }
    file.write_text(json.dumps(named))
    command = ["--out", str(out), "--caches", str(file), *SMALL]
    assert main([*command, "--record"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()] == rows
    never, skips, mag, both = rows
    assert [row["name"] for row in rows] == list(named)
    assert never["density"] == 1
    assert never["psnr"] == 100
    # The first step computes all of the layers, the five after it the first one of them.
    layers = 4
    assert skips["density"] == pytest.approx((layers + 5) / (6 * layers))
    assert skips["psnr"] < never["psnr"]
    # It skips three steps at most, and none of the first fifth.
    assert 0.3 < mag["density"] < 1
    # What the cache leaves is sparse.
    assert both["density"] < skips["density"]
    assert both["config"]["threshold"] == 0.2
    assert {path.name for path in out.iterdir()} >= {"dense", "never-skips", "skips-", "measured-first", "both"}
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")} == times
    assert len(read_manifest(out / "dense")) == 1


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"a": 1}', '{"a": {"cache": "none", "threshold": 1}}', '{"a": {"cache": "mag"}}']
)
def test_a_wrong_file_of_caches_is_one_line(tmp_path, capsys, text):
    file = tmp_path / "caches.json"
    file.write_text(text)
    assert main(["--out", str(tmp_path / "out"), "--caches", str(file), *SMALL]) == 2
    message = capsys.readouterr().err.strip()
    assert str(file) in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("cache_dit") is not None, reason="cache-dit is installed")
def test_without_cache_dit_the_message_says_what_to_install(tmp_path, capsys):
    file = tmp_path / "caches.json"
    file.write_text('{"a": {"cache": "cache-dit", "threshold": 0.1}}')
    assert main(["--out", str(tmp_path / "out"), "--caches", str(file), *SMALL]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("cache-dit is not installed; pip install cache-dit")


def test_the_shipped_caches_are_two_settings_of_three_kinds():
    named = json.loads(CACHES.read_text())
    kinds = [values["cache"] for values in named.values() if "attention" not in values]
    assert sorted(set(kinds)) == ["cache-dit", "first-block", "mag"]
    assert all(kinds.count(kind) >= 2 for kind in set(kinds))
