"""`compare`: the right videos meet, the numbers are the metrics', bad input is one line and writes nothing."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xattn_video_eval.compare.command import compare
from xattn_video_eval.compare.metrics.psnr_ssim import Lpips, LpipsUnavailable, psnr, video_psnr, video_ssim
from xattn_video_eval.compare.settings import CompareSettings
from xattn_video_pipelines.cli import build_app, main
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.program import run_app
from xattn_video_pipelines.video.io import lossless_path, read_video, write_video
from xattn_video_pipelines.video.manifest import append_record

OUTPUTS = {"metrics.csv", "metrics_frames.csv", "summary.json"}


def clip(seed: int = 0, frames: int = 3, height: int = 36, width: int = 48) -> np.ndarray:
    """A smooth moving picture, so that the mp4 is close to it but not equal."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin((x + y * (channel + 1) + 3 * t) / 9 + seed) for channel in range(3)]
    return (127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def noisy(video: np.ndarray, sigma: float = 8, seed: int = 1) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, sigma, video.shape)
    return np.clip(video + noise, 0, 255).astype(np.uint8)


def add(folder: Path, id: str, seed: int, video: np.ndarray, *, lossless: bool = True, **fields: Any) -> Path:
    """One finished video, as generate leaves it."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{id}-s{seed}.mp4"
    write_video(path, video, 16)
    copy = lossless_path(path)
    if lossless:
        write_video(copy, video, 16, lossless=True)
    record = {"id": id, "seed": seed, "file": path.name, "lossless_file": copy.name if lossless else None}
    record |= {"prompt": f"a {id}", "model": "tiny", "steps": 8, "device_name": "CPU"}
    append_record(folder, {**record, "seconds": 10.0, "mean_density": 1.0, **fields})
    return path


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    dense, sparse = tmp_path / "dense", tmp_path / "xattn-s8-t0.90-w5"
    for number, (id, seed) in enumerate([("cat", 0), ("cat", 1), ("dog", 0)]):
        add(dense, id, seed, clip(number), config=None)
    # Another order, so that pairing by line would show.
    for number, (id, seed) in reversed(list(enumerate([("cat", 0), ("cat", 1), ("dog", 0)]))):
        seconds, density = 4.0 + number, 0.5 + number / 10
        config = {"stride": 8}
        add(sparse, id, seed, noisy(clip(number), 4 + 8 * number), seconds=seconds, mean_density=density, config=config)
    return dense, sparse


def run_compare(*arguments: object) -> int:
    return run_app(build_app("compare"), ["compare", *map(str, arguments)])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_values_are_the_metrics_of_the_right_pairs(runs: tuple[Path, Path]) -> None:
    summary = compare(CompareSettings(*runs, lpips=False, workers=2), progress=False)
    assert [(row["id"], row["seed"]) for row in summary["videos"]] == [("cat", 0), ("cat", 1), ("dog", 0)]
    for number, row in enumerate(summary["videos"]):
        reference, test = clip(number), noisy(clip(number), 4 + 8 * number)
        assert row["psnr"] == pytest.approx(video_psnr(reference, test), abs=1e-9)
        assert row["ssim"] == pytest.approx(video_ssim(reference, test), abs=1e-9)
        assert row["source"] == "lossless"
        assert (row["frames"], row["height"], row["width"]) == (3, 36, 48)
        assert row["speedup"] == pytest.approx(10 / (4 + number))
        assert row["density"] == pytest.approx(0.5 + number / 10)
    assert summary["psnr"] == pytest.approx(np.mean([row["psnr"] for row in summary["videos"]]))
    assert summary["ssim"] == pytest.approx(np.mean([row["ssim"] for row in summary["videos"]]))
    assert summary["density"] == pytest.approx(0.6)
    # Of the whole set: the sums' ratio, not the mean of ratios.
    assert summary["speedup"] == pytest.approx(30 / 15)
    assert (summary["pairs"], summary["frames"]) == (3, 9)
    assert summary["config"] == {"stride": 8}
    assert summary["lpips"] is None
    assert summary["lpips_unavailable"] == "switched off"


def test_files_hold_a_row_a_video_and_a_row_a_frame(runs: tuple[Path, Path], tmp_path: Path) -> None:
    before = set(os.listdir(runs[1]))
    out = tmp_path / "new" / "folder"
    summary = compare(CompareSettings(*runs, out=out, lpips=False), progress=False)
    assert set(os.listdir(out)) == OUTPUTS
    assert set(os.listdir(runs[1])) == before
    assert json.loads((out / "summary.json").read_text()) == summary
    videos, frames = rows(out / "metrics.csv"), rows(out / "metrics_frames.csv")
    assert [row["id"] for row in videos] == ["cat", "cat", "dog"]
    assert videos[0]["lpips"] == ""
    assert [(row["id"], row["seed"], row["frame"]) for row in frames[2:5]] == [
        ("cat", "0", "2"),
        ("cat", "1", "0"),
        ("cat", "1", "1"),
    ]
    for video in videos:
        own = [row for row in frames if (row["id"], row["seed"]) == (video["id"], video["seed"])]
        assert float(video["psnr"]) == pytest.approx(np.mean([float(row["psnr"]) for row in own]))
        assert float(video["ssim_worst_frame"]) == min(float(row["ssim"]) for row in own)


@pytest.mark.parametrize("workers", [1, 3])
def test_frame_rows_are_in_order(tmp_path: Path, workers: int) -> None:
    reference = clip(frames=11)
    test = np.stack([noisy(frame, 3 + 2 * index) for index, frame in enumerate(reference)])
    add(tmp_path / "a", "cat", 0, reference)
    add(tmp_path / "b", "cat", 0, test)
    compare(CompareSettings(tmp_path / "a", tmp_path / "b", lpips=False, workers=workers), progress=False)
    values = [float(row["psnr"]) for row in rows(tmp_path / "b" / "metrics_frames.csv")]
    assert values == pytest.approx([psnr(*pair) for pair in zip(reference, test, strict=True)])


def test_command_prints_table_notes_and_json(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_compare(*runs, "--no-lpips", "--json") == 0
    captured = capsys.readouterr()
    # The document alone is on stdout.
    summary = json.loads(captured.out)
    lines = captured.err.splitlines()
    assert summary == json.loads((runs[1] / "summary.json").read_text())
    assert next(line for line in lines if line.startswith("video")).split() == [
        "video",
        "frames",
        "dense",
        "s",
        "sparse",
        "s",
        "speed-up",
        "density",
        "PSNR",
        "dB",
        "SSIM",
        "LPIPS",
        "flicker",
        "edge",
        "dB",
        "worst",
    ]
    mean = next(line for line in lines if line.startswith("all (mean)")).split()
    likeness = [f"{summary['psnr']:.2f}", f"{summary['ssim']:.4f}", "-", f"{summary['flicker']:.4f}"]
    where = [f"{summary['border_excess_db']:+z.1f}", summary["worst_region"]]
    assert mean[2:-1] == ["9", "10.0", "5.0", "2.00", "0.600", *likeness, *where]
    assert "decoded: lossless copies (FFV1) of 3 pairs" in lines
    assert "LPIPS: unavailable (switched off)" in lines
    assert "compare" in captured.err


def test_identical_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(tmp_path / "a", "cat", 0, clip())
    add(tmp_path / "b", "cat", 0, clip())
    run_compare(tmp_path / "a", tmp_path / "b", "--no-lpips", "--json")
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert summary["psnr"] == 100
    assert summary["ssim"] == pytest.approx(1)
    assert summary["identical_frames"] == 3
    assert "identical frames: 3, each counted with 100 dB" in captured.err
    assert rows(tmp_path / "b" / "metrics_frames.csv")[0]["psnr"] == "inf"


@pytest.mark.parametrize("with_copy", [(False, False), (True, False), (False, True)])
def test_mp4_on_both_sides_unless_both_have_a_copy(
    tmp_path: Path, with_copy: tuple[bool, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    dense = add(tmp_path / "a", "cat", 0, clip(), lossless=with_copy[0])
    sparse = add(tmp_path / "b", "cat", 0, noisy(clip()), lossless=with_copy[1])
    assert run_compare(tmp_path / "a", tmp_path / "b", "--no-lpips") == 0
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert summary["source"] == {"lossless": 0, "mp4": 1}
    assert summary["psnr"] == pytest.approx(video_psnr(read_video(dense), read_video(sparse)))
    assert summary["psnr"] != pytest.approx(video_psnr(clip(), noisy(clip())), abs=1e-3)
    out = capsys.readouterr().out
    assert "decoded: mp4 (H.264) of 1 pair, " in out
    assert ("lossless copy on one side only" in out) == any(with_copy)


def test_a_stray_copy_that_the_manifest_does_not_name_is_not_used(tmp_path: Path) -> None:
    for name in ("a", "b"):
        video = add(tmp_path / name, "cat", 0, clip(), lossless=False)
        write_video(lossless_path(video), noisy(clip()), 16, lossless=True)
    assert compare(CompareSettings(tmp_path / "a", tmp_path / "b", lpips=False), progress=False)["source"]["mp4"] == 1


def test_no_speed_up_across_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(tmp_path / "a", "cat", 0, clip(), device_name="slow")
    add(tmp_path / "b", "cat", 0, clip(), device_name="fast")
    run_compare(tmp_path / "a", tmp_path / "b", "--no-lpips", "--json")
    captured = capsys.readouterr()
    assert "made on different devices, so no speed-up: 1 pair\n" in captured.err
    summary = json.loads(captured.out)
    assert summary["speedup"] is summary["videos"][0]["speedup"] is None


@pytest.mark.parametrize(
    ("of_dense", "of_sparse", "told"),
    [
        ({"cpu_share": 0.95}, {"cpu_share": 0.9}, None),
        ({}, {}, None),
        # Too short to tell.
        ({"cpu_share": 0.95}, {"cpu_share": 0.4, "seconds": 0.5}, None),
        ({"cpu_share": 0.95}, {"cpu_share": 0.4, "compile": True}, None),
        ({"cpu_share": 0.95}, {"cpu_share": 0.4}, 40),
        ({"cpu_share": 0.5}, {}, 50),
    ],
)
def test_a_busy_machine_is_told(tmp_path, capsys, of_dense, of_sparse, told):
    add(tmp_path / "dense", "cat", 0, clip(), **of_dense)
    add(tmp_path / "sparse", "cat", 0, clip(1), **of_sparse)
    sides = str(tmp_path / "dense"), str(tmp_path / "sparse")
    assert main(["compare", *sides, "--no-lpips", "--json"]) == 0
    captured = capsys.readouterr()
    text = told and f"this machine was busy (a video got {told} % of the time of its threads)"
    assert json.loads(captured.out)["busy"] == text
    lines = [line for line in captured.err.splitlines() if "timings are not reliable" in line]
    assert lines == ([f"{text}: timings are not reliable"] if told else [])


def test_lpips_where_its_weights_load(runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Distance(Lpips):
        """LPIPS's call with a network that needs no weights: the mean absolute difference."""

        def __init__(self, device: Any, net: str, weights: Any) -> None:
            import torch

            class Network(torch.nn.Module):
                def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
                    return (first - second).abs().mean()

            super().__init__(device, net, network=Network())

    monkeypatch.setattr("xattn_video_eval.compare.command.Lpips", Distance)
    summary = compare(CompareSettings(*runs, device="cpu"), progress=False)
    expected = np.abs(clip(0).astype(float) - noisy(clip(0), 4)).mean() / 127.5
    assert summary["videos"][0]["lpips"] == pytest.approx(expected, rel=1e-5)
    assert summary["lpips"] == pytest.approx(np.mean([row["lpips"] for row in summary["videos"]]))
    assert summary["lpips_unavailable"] is None
    assert float(rows(runs[1] / "metrics.csv")[0]["lpips"]) == summary["videos"][0]["lpips"]


def test_lpips_without_weights_says_unavailable_and_why(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_weights(net: str, weights: Any) -> None:
        raise LpipsUnavailable("AlexNet's weights are not here")

    monkeypatch.setattr("xattn_video_eval.compare.metrics.lpips._load_lpips", no_weights)
    assert run_compare(*runs, "--device", "cpu") == 0
    assert "LPIPS: unavailable (AlexNet's weights are not here)" in capsys.readouterr().out
    assert json.loads((runs[1] / "summary.json").read_text())["lpips_unavailable"] == "AlexNet's weights are not here"


def test_missing_partners_are_named_or_skipped_when_asked(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    add(runs[0], "owl", 7, clip())
    add(runs[1], "fox", 2, clip())
    with pytest.raises(UserError, match=r"without a partner: only in .*dense: owl-s7; only in .*w5: fox-s2 "):
        run_compare(*runs, "--no-lpips")
    assert not OUTPUTS & set(os.listdir(runs[1]))
    assert run_compare(*runs, "--no-lpips", "--allow-unmatched") == 0
    assert "without a partner (dense only), left out: owl-s7" in capsys.readouterr().out
    summary = json.loads((runs[1] / "summary.json").read_text())
    assert summary["unmatched"] == {"dense_only": ["owl-s7"], "sparse_only": ["fox-s2"]}
    assert summary["pairs"] == 3


def test_videos_of_other_weights_are_no_pair_and_unknown_ones_are(tmp_path: Path) -> None:
    for folder, fields in (("a", {"weights": "1"}), ("b", {"weights": "2"}), ("c", {}), ("d", {"weights": None})):
        add(tmp_path / folder, "cat", 0, clip(), **fields)
    with pytest.raises(UserError, match=r"the two sides differ in weights: '1' in .*, '2' in "):
        compare(CompareSettings(tmp_path / "a", tmp_path / "b", lpips=False), progress=False)
    for unknown in ("c", "d"):
        assert compare(CompareSettings(tmp_path / "a", tmp_path / unknown, lpips=False), progress=False)["pairs"] == 1


def test_the_floor_is_of_dense_videos_alone(tmp_path: Path) -> None:
    dense, floor, one, other = (tmp_path / name for name in ("dense", "dense-alt", "xattn-a", "xattn-b"))
    for folder, noise in ((dense, 0), (floor, 1), (one, 9), (other, 20)):
        add(folder, "cat", 0, noisy(clip(), noise), attention="xattn" if "xattn" in folder.name else folder.name)

    def floor_of(*folders: Path) -> Any:
        return compare(CompareSettings(*folders, lpips=False), progress=False)["floor"]

    assert floor_of(dense, one)["psnr"] > 40
    # Two sparse settings: how far either is from dense in another order is no floor of their difference.
    assert floor_of(one, other) is None
    assert floor_of(one, dense) is None


def test_nothing_in_common(tmp_path: Path) -> None:
    add(tmp_path / "a", "cat", 0, clip())
    add(tmp_path / "b", "cat", 1, clip())
    for allow in (False, True):
        with pytest.raises(UserError, match=r"no video \(id, seed\) in common"):
            compare(CompareSettings(tmp_path / "a", tmp_path / "b", allow_unmatched=allow, lpips=False), progress=False)


def truncate(dense: Path, sparse: Path) -> None:
    lossless_path(sparse).unlink()
    sparse.write_bytes(sparse.read_bytes()[: sparse.stat().st_size // 2])


def truncate_copy(dense: Path, sparse: Path) -> None:
    copy = lossless_path(dense)
    copy.write_bytes(copy.read_bytes()[: copy.stat().st_size // 2])


def empty(dense: Path, sparse: Path) -> None:
    lossless_path(sparse).write_bytes(b"")


def other_size(dense: Path, sparse: Path) -> None:
    write_video(lossless_path(sparse), clip(height=38), 16, lossless=True)


def fewer_frames(dense: Path, sparse: Path) -> None:
    write_video(lossless_path(sparse), clip(frames=1), 16, lossless=True)


def more_frames(dense: Path, sparse: Path) -> None:
    write_video(lossless_path(sparse), clip(frames=8), 16, lossless=True)


def too_small(dense: Path, sparse: Path) -> None:
    for path in (dense, sparse):
        write_video(lossless_path(path), clip(height=10), 16, lossless=True)


def missing_file(dense: Path, sparse: Path) -> None:
    lossless_path(sparse).unlink()
    sparse.unlink()


def missing_manifest(dense: Path, sparse: Path) -> None:
    (sparse.parent / "manifest.jsonl").unlink()


def empty_manifest(dense: Path, sparse: Path) -> None:
    (sparse.parent / "manifest.jsonl").write_text("")


def broken_manifest(dense: Path, sparse: Path) -> None:
    with (sparse.parent / "manifest.jsonl").open("a") as file:
        file.write("{broken\n")


def missing_folder(dense: Path, sparse: Path) -> None:
    shutil.rmtree(dense.parent)


def other_prompt(dense: Path, sparse: Path) -> None:
    add(sparse.parent, "cat", 0, clip(), prompt="another cat")


def other_steps(dense: Path, sparse: Path) -> None:
    add(sparse.parent, "cat", 0, clip(), steps=50)


def no_file(dense: Path, sparse: Path) -> None:
    add(sparse.parent, "cat", 0, clip(), file=None)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, r"cat-s0\.mp4: damaged or not a video: moov atom not found"),
        (truncate_copy, r"cat-s0\.mkv: damaged or not a video"),
        (empty, r"cat-s0\.mkv: the video file is empty"),
        (other_size, r"cat-s0: different sizes: 48 x 36 in .*a/cat-s0\.mkv, 48 x 38 in .*b/cat-s0\.mkv"),
        (fewer_frames, r"cat-s0: different frame counts: 3 in .*a/cat-s0\.mkv, 1 in .*b/cat-s0\.mkv"),
        (more_frames, r"cat-s0: different frame counts: 3 in .*a/cat-s0\.mkv, 8 in .*b/cat-s0\.mkv"),
        (too_small, r"cat-s0: SSIM needs frames of at least 11 x 11, got 48 x 10"),
        (missing_file, r"b/cat-s0\.mp4: listed in the manifest, but missing"),
        (missing_manifest, r"b: no manifest\.jsonl in it"),
        (empty_manifest, r"b/manifest\.jsonl: no finished video in it"),
        (broken_manifest, r"b/manifest\.jsonl:2: not a manifest line"),
        (missing_folder, r"a: no such folder"),
        (other_prompt, r"cat-s0: the two sides differ in prompt: 'a cat' in .*a, 'another cat' in .*b"),
        (no_file, r"b/manifest\.jsonl: cat-s0 names no file"),
        (other_steps, r"cat-s0: the two sides differ in steps: 8 in .*a, 50 in .*b"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path, spoil: Callable[[Path, Path], None], message: str
) -> None:
    dense, sparse = add(tmp_path / "a", "cat", 0, clip()), add(tmp_path / "b", "cat", 0, noisy(clip()))
    spoil(dense, sparse)
    before = sorted(os.listdir(tmp_path / "b"))
    with pytest.raises(UserError, match=message) as caught:
        run_compare(tmp_path / "a", tmp_path / "b", "--no-lpips")
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path / "b")) == before


def test_command_line_exits_with_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(tmp_path / "a", "cat", 0, clip())
    add(tmp_path / "b", "dog", 0, clip())
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "no video (id, seed) in common" in captured.err


def test_an_error_keeps_the_results_of_the_last_run(runs: tuple[Path, Path]) -> None:
    compare(CompareSettings(*runs, lpips=False), progress=False)
    before = {name: (runs[1] / name).read_bytes() for name in OUTPUTS}
    # The last pair fails, after the others were measured.
    lossless_path(runs[1] / "dog-s0.mp4").write_bytes(b"not a video")
    with pytest.raises(UserError):
        compare(CompareSettings(*runs, lpips=False), progress=False)
    assert {name: (runs[1] / name).read_bytes() for name in OUTPUTS} == before


def test_output_that_cannot_be_written_fails_before_decoding(runs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    truncate_copy(runs[0] / "cat-s0.mp4", runs[1] / "cat-s0.mp4")
    with pytest.raises(UserError, match=r"file/out: cannot write here: Not a directory"):
        run_compare(*runs, "--no-lpips", "--out", tmp_path / "file" / "out")


def test_bad_options(runs: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="--workers must be at least 1, got 0"):
        run_compare(*runs, "--workers", 0)
    with pytest.raises(UserError, match="--device must be"):
        run_compare(*runs, "--device", "nonsense")
    assert not OUTPUTS & set(os.listdir(runs[1]))


def test_timings_and_density_may_be_unknown(tmp_path: Path) -> None:
    for name in ("a", "b"):
        add(tmp_path / name, "cat", 0, clip(), seconds=None, mean_density=None)
    summary = compare(CompareSettings(tmp_path / "a", tmp_path / "b", lpips=False), progress=False)
    assert summary["speedup"] is summary["density"] is summary["dense_seconds"] is None


def test_a_run_is_compared_by_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which folder is dense is in the manifests, whatever the folders are called."""
    run = tmp_path / "run"
    run.mkdir()
    for folder, kind, noise in (("a", "dense", 0), ("b", "dense-alt", 1), ("c", "xattn", 9), ("d", "xattn", 20)):
        add(run / folder, "cat", 0, noisy(clip(), noise), attention=kind)
    assert run_compare(run, "--no-lpips", "--json") == 0
    first, second = json.loads(capsys.readouterr().out)
    assert [(Path(found["dense"]).name, Path(found["sparse"]).name) for found in (first, second)] == [
        ("a", "c"), ("a", "d"),
    ]  # fmt: skip
    assert first["psnr"] > second["psnr"]
    with pytest.raises(UserError, match=r"--out is for one comparison, and .*run has 2 sparse folders"):
        run_compare(run, "--no-lpips", "--out", tmp_path / "out")
    with pytest.raises(UserError, match=r"several sparse folders: .*c, .*d; compare them one by one"):
        compare(CompareSettings(run, lpips=False), progress=False)
    shutil.rmtree(run / "d")
    assert compare(CompareSettings(run, lpips=False), progress=False)["psnr"] == first["psnr"]
    for gone, there in (("a", r"b \(dense-alt\), c \(sparse\)"), ("c", r"b \(dense-alt\)"), ("b", "none")):
        shutil.rmtree(run / gone)
        with pytest.raises(UserError, match=f"needs one folder of dense videos and at least one of .*, has {there};"):
            run_compare(run, "--no-lpips")


def test_sides_that_are_swapped_or_the_same_are_told(runs: tuple[Path, Path]) -> None:
    dense, sparse = runs
    with pytest.raises(UserError, match=f"the sides are swapped: .*: xattn-video compare {dense} {sparse}"):
        run_compare(sparse, dense, "--no-lpips")
    for folder in runs:
        with pytest.raises(UserError, match="is given as both sides, and a folder is always equal to itself"):
            run_compare(folder, folder.parent / "." / folder.name, "--no-lpips")
