"""`compare`: flicker, regions, LPIPS's options and definitions reach its files and table; memory stays bounded."""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.test_compare import add, clip, noisy, rows, run_compare
from xattn_video_eval.compare import measure as measuring
from xattn_video_eval.compare.command import EXAMPLE, compare
from xattn_video_eval.compare.metrics.flicker import flicker, flicker_db, region_errors, worst_cell
from xattn_video_eval.compare.metrics.psnr_ssim import psnr
from xattn_video_eval.compare.pairs import Pair
from xattn_video_eval.compare.settings import CompareSettings
from xattn_video_eval.compare.table import column_lines
from xattn_video_pipelines.cli import main
from xattn_video_pipelines.common.errors import UserError

NEW_COLUMNS = ["border_psnr", "centre_psnr", "border_excess_db", "worst_region", "worst_region_share"]


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path, list[tuple[np.ndarray, np.ndarray]]]:
    """Two pairs: noise with a flash in frame 3, and noise with a bright strip at the right edge."""
    videos = []
    for number, id in enumerate(["flash", "strip"]):
        reference = clip(number, frames=6, height=48, width=64)
        test = noisy(reference, 4, seed=number)
        if id == "flash":
            test[3] = np.clip(test[3].astype(int) + 25, 0, 255)
        else:
            test[:, 12:24, -2:] = np.clip(test[:, 12:24, -2:].astype(int) + 90, 0, 255)
        videos.append((reference, test))
        add(tmp_path / "dense", id, 0, reference)
        add(tmp_path / "sparse", id, 0, test)
    return tmp_path / "dense", tmp_path / "sparse", videos


@pytest.mark.parametrize("workers", [1, 3])
def test_columns_are_the_measures_of_the_videos(runs: Any, workers: int) -> None:
    dense, sparse, videos = runs
    summary = compare(CompareSettings(dense, sparse, lpips=False, workers=workers), progress=False)
    table, frames = rows(sparse / "metrics.csv"), rows(sparse / "metrics_frames.csv")
    for row, written, (reference, test) in zip(summary["videos"], table, videos, strict=True):
        regions = region_errors(reference, test)
        assert row["flicker"] == pytest.approx(flicker(reference, test), rel=1e-12)
        assert row["flicker_db"] == pytest.approx(flicker_db(row["flicker"]))
        assert row["border_psnr"] == pytest.approx(regions.border_psnr)
        assert row["centre_psnr"] == pytest.approx(regions.centre_psnr)
        assert row["border_excess_db"] == pytest.approx(row["centre_psnr"] - row["border_psnr"])
        assert (row["worst_region"], row["worst_region_share"]) == worst_cell(regions.grid)
        assert np.asarray(row["region_mse"]) == pytest.approx(np.asarray(regions.grid))
        assert float(written["flicker"]) == row["flicker"]
        assert written["worst_region"] == row["worst_region"]
        assert "region_mse" not in written
        own = [one for one in frames if one["id"] == row["id"]]
        assert own[0]["flicker"] == ""
        steps = [float(one["flicker"]) for one in own[1:]]
        assert math.sqrt(np.mean(np.square(steps))) == pytest.approx(row["flicker"])
        assert row["flicker_worst_step"] == max(steps)
        assert own[row["flicker_worst_frame"]]["flicker"] == str(max(steps))
        for index, one in enumerate(own):
            assert float(one["border_psnr"]) == pytest.approx(region_errors(reference[index], test[index]).border_psnr)
            assert list(one)[-5:] == NEW_COLUMNS
    flash, strip = summary["videos"]
    assert flash["flicker"] > 2.5 * strip["flicker"]
    assert flash["flicker_worst_frame"] in (3, 4)
    assert strip["border_excess_db"] > 5 > flash["border_excess_db"]
    assert (strip["worst_region"], flash["worst_region_share"] < 0.1) == ("r2c4", True)
    assert summary["flicker"] == pytest.approx((flash["flicker"] + strip["flicker"]) / 2)
    grid = np.mean([flash["region_mse"], strip["region_mse"]], axis=0)
    assert np.asarray(summary["region_mse"]) == pytest.approx(grid)
    assert (summary["worst_region"], summary["worst_region_share"]) == worst_cell(grid)


def test_table_shows_them_and_verbose_says_what_they_mean(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    dense, sparse, _ = runs
    assert run_compare(dense, sparse, "--no-lpips") == 0
    usual = capsys.readouterr().out.splitlines()
    assert usual[-2] == "columns: explained by xattn-video compare --help"
    assert run_compare(dense, sparse, "--no-lpips", "--verbose") == 0
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads((sparse / "summary.json").read_text())
    strip = summary["videos"][1]
    cells = next(line for line in lines if line.startswith("strip-s0")).split()
    assert cells[-5:] == [
        "-",
        f"{strip['flicker']:.4f}",
        f"{strip['border_excess_db']:+.1f}",
        "r2c4",
        f"{100 * strip['worst_region_share']:.0f}%",
    ]
    assert max(len(line) for line in lines if not line.startswith("wrote")) <= 112
    assert set(summary["definitions"]) == {"psnr", "ssim", "lpips", "flicker", "border_excess_db", "worst_region"}
    printed = " ".join(" ".join(lines).split())
    for key, head in {"psnr": "PSNR dB", "ssim": "SSIM", "flicker": "flicker", "border_excess_db": "edge dB"}.items():
        assert f"{head}: {summary['definitions'][key]}" in printed
        assert not any(line.startswith(f"{head}: ") for line in usual)
    assert f"worst: {summary['definitions']['worst_region']}" in printed
    assert "\n".join(column_lines(summary["definitions"])) in EXAMPLE
    # Nothing is explained that is not shown.
    assert "LPIPS: version" not in printed


def test_identical_videos_have_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        add(tmp_path / name, "cat", 0, clip())
    run_compare(tmp_path / "a", tmp_path / "b", "--no-lpips", "--json")
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert (summary["flicker"], summary["flicker_db"], summary["border_excess_db"]) == (0, 100, 0)
    assert summary["worst_region"] is summary["worst_region_share"] is None
    (line,) = (line for line in captured.err.splitlines() if line.startswith("cat-s0"))
    assert line.split()[-3:] == [
        "0.0000",
        "+0.0",
        "-",
    ]


def test_a_picture_has_no_flicker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(tmp_path / "a", "cat", 0, clip(frames=1))
    add(tmp_path / "b", "cat", 0, noisy(clip(frames=1)))
    assert run_compare(tmp_path / "a", tmp_path / "b", "--no-lpips") == 0
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert summary["flicker"] is summary["flicker_db"] is summary["videos"][0]["flicker_worst_frame"] is None
    assert summary["border_psnr"] > 0
    assert "flicker:" not in capsys.readouterr().out


@pytest.mark.parametrize("workers", [1, 2])
def test_a_long_video_is_never_held(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workers: int) -> None:
    length, alive, most = 120, 0, 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def decoded(path: Path) -> Iterator[np.ndarray]:
        nonlocal alive, most
        rng = np.random.default_rng(len(path.name))
        for _ in range(length):
            frame = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            alive += 1
            most = max(most, alive)
            weakref.finalize(frame, gone)
            yield frame
            # A generator's own variable is no frame of the reader's.
            del frame

    monkeypatch.setattr(measuring, "iter_frames", decoded)
    record: dict[str, Any] = {}
    pair = Pair(("cat", 0), record, record, tmp_path / "a.mkv", tmp_path / "bb.mkv", "lossless", one_sided=False)
    values = measuring.measure(pair, None, workers=workers)
    assert len(values.psnr) == len(values.flicker) == length
    assert len(values.steps) == length - 1
    # On both sides, and one pair in the reader's hands.
    assert most <= 2 * (2 * workers + 3)
    assert most < length / 2


def test_lpips_options_reach_the_network(
    runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import warnings

    from xattn_video.integrations.torchvision_ops import repair_torchvision

    repair_torchvision()
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(0)
        network = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    state = {f"features.{name.split('.', 1)[1]}": value for name, value in network.net.state_dict().items()}
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save(state, folder / "squeezenet1_1-b8a52dc0.pth")
    dense, sparse, videos = runs
    options = ("--lpips-net", "squeeze", "--lpips-weights", folder, "--device", "cpu", "--verbose")
    assert run_compare(dense, sparse, *options) == 0
    summary = json.loads((sparse / "summary.json").read_text())
    with torch.no_grad():
        frames = zip(*videos[1], strict=True)
        expected = np.mean([network(*(lpips.im2tensor(side) for side in pair)).item() for pair in frames])
    assert summary["videos"][1]["lpips"] == pytest.approx(expected, rel=1e-5)
    assert summary["lpips_net"] == "squeeze"
    assert "LPIPS: version 0.1, squeeze" in capsys.readouterr().out


def test_named_weights_that_do_not_load_are_an_error(runs: Any, tmp_path: Path) -> None:
    before = sorted(os.listdir(runs[1]))
    with pytest.raises(UserError, match=r"LPIPS: VGG16's weights are not there: no vgg16-397923af\.pth in .*nowhere"):
        run_compare(*runs[:2], "--lpips-net", "vgg", "--lpips-weights", tmp_path / "nowhere", "--device", "cpu")
    with pytest.raises(UserError, match="--no-lpips and --lpips-weights exclude each other"):
        run_compare(*runs[:2], "--no-lpips", "--lpips-weights", tmp_path)
    assert sorted(os.listdir(runs[1])) == before


def test_an_unknown_net_is_one_line(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["compare", str(runs[0]), str(runs[1]), "--lpips-net", "resnet"])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert "resnet" in capsys.readouterr().err


def test_the_values_of_psnr_stay_what_they_were(runs: Any) -> None:
    dense, sparse, videos = runs
    compare(CompareSettings(dense, sparse, lpips=False), progress=False)
    values = [float(row["psnr"]) for row in rows(sparse / "metrics_frames.csv") if row["id"] == "flash"]
    assert values == pytest.approx([psnr(*pair) for pair in zip(*videos[0], strict=True)])
