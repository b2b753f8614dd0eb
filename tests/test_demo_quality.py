"""The quality program: its interval is a bootstrap interval, and its rows say what was made."""

from __future__ import annotations

import json

import numpy as np
import pytest

from xattn_video_eval.studies import demo_quality
from xattn_video_eval.studies.demo_quality import ATTRIBUTES, main, paired_difference
from xattn_video_pipelines.video.manifest import read_manifest


def test_no_difference_has_no_width():
    assert paired_difference([True, False, True], [True, False, True]) == {"difference": 0.0, "low": 0.0, "high": 0.0}


def test_the_difference_is_sparse_minus_dense_prompt_by_prompt():
    dense = [True] * 90 + [False] * 10
    sparse = [True] * 87 + [False] * 13
    found = paired_difference(dense, sparse)
    assert found["difference"] == pytest.approx(-0.03)
    # Three losses in a hundred pairs: the binomial's 2.5 % and 97.5 % points are 0 and 7 losses.
    assert found["low"] == pytest.approx(-0.07, abs=0.011)
    assert found["high"] == pytest.approx(0.0, abs=0.001)
    # The same shares with many changes both ways are far less certain.
    mixed = paired_difference([True, False] * 50, [False, True] * 48 + [False] * 4)
    assert mixed["difference"] == pytest.approx(-0.02)
    assert mixed["high"] - mixed["low"] > 3 * (found["high"] - found["low"])


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        dense, sparse = rng.random(60) < 0.8, rng.random(60) < 0.6
        found = paired_difference(list(dense), list(sparse))
        covered += found["low"] <= -0.2 <= found["high"]
    assert 85 <= covered <= 100


@pytest.mark.parametrize(("dense", "sparse"), [([], []), ([True], [True, False])])
def test_unpaired_values_are_refused(dense, sparse):
    with pytest.raises(ValueError, match="one length above 0"):
        paired_difference(dense, sparse)


def test_the_program_makes_and_measures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_quality, "LEDGER", tmp_path / "ledger.jsonl")
    command = ["--out", str(tmp_path / "out"), "--steps", "6", "--num-frames", "9", "--record"]

    def row(*options):
        assert main([*command, *options]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    low, high = row("--videos", "2", "--threshold", "0.5"), row("--videos", "1")
    assert [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()] == [low, high]
    assert (low["threshold"], low["videos"], high["threshold"], high["videos"]) == (0.5, 2, 0.9, 1)
    assert low["sparse_density"] < high["sparse_density"] < 1
    # One step in six is sparse.
    assert high["density"] == pytest.approx((5 + high["sparse_density"]) / 6)
    assert high["psnr"] > low["psnr"]
    # Of the one video that was asked for, though the folder has two dense ones.
    assert (
        high["dense_seconds"] == read_manifest(tmp_path / "out" / "dense")["red-circle-left-white-small", 0]["seconds"]
    )
    for found in (low, high):
        for name in ATTRIBUTES:
            shares = found["right"]["dense"][name], found["right"]["sparse"][name]
            assert found["difference"][name]["difference"] == shares[1] - shares[0]
        assert found["device"]


def test_more_videos_than_prompts_is_one_line(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--videos", "1000"]) == 2
    assert capsys.readouterr().err.strip() == "demo_quality: error: --videos must be from 1 to 192, got 1000"


def test_what_generate_finds_wrong_is_said_once(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--videos", "1", "--model", "nowhere"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert "--model nowhere" in errors[0]
