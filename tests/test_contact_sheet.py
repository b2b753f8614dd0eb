"""The contact sheet: every frame is where it should be, pixel by pixel, and bad input is one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from xattn_video_eval.compare.contact_sheet import (
    COLUMN_GAP,
    GAP,
    LABEL_WIDTH,
    MARGIN,
    TITLE_HEIGHT,
    contact_sheet,
    main,
)
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.video.io import lossless_path, read_video, write_video
from xattn_video_pipelines.video.manifest import append_record

ROOT = Path(__file__).resolve().parent.parent
HEIGHT, WIDTH, FRAMES = 48, 40, 9
PAPER = 255


def clip(number: int, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Noise, so that no two frames and no two places are alike."""
    return np.random.default_rng(number).integers(0, 250, (frames, height, width, 3), dtype=np.uint8)


def add(folder: Path, id: str, video: np.ndarray, *, prompt: str = "", density: float | None = None) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / f"{id}-s0.mp4"
    write_video(path, video, 8)
    write_video(lossless_path(path), video, 8, lossless=True)
    append_record(folder, {"id": id, "seed": 0, "file": path.name, "prompt": prompt or id, "mean_density": density})


def runs(folder: Path, count: int, **fields: str) -> tuple[Path, Path]:
    """Dense videos 0, 1, ... and sparse ones 100, 101, ..."""
    for number in range(count):
        add(folder / "dense", f"p{number}", clip(number), density=1.0, **fields)
        add(folder / "sparse", f"p{number}", clip(100 + number), density=0.25, **fields)
    return folder / "dense", folder / "sparse"


def corner(position: int, frames: int, row: int, frame: int) -> tuple[int, int]:
    """Where a frame's upper left pixel is: `position` counts the pairs in reading order, `row` 0 is dense."""
    pair_width = LABEL_WIDTH + frames * WIDTH + (frames - 1) * GAP
    pair_height = TITLE_HEIGHT + 2 * HEIGHT + GAP
    y = MARGIN + position // 2 * (pair_height + MARGIN) + TITLE_HEIGHT + row * (HEIGHT + GAP)
    x = MARGIN + position % 2 * (pair_width + COLUMN_GAP) + LABEL_WIDTH + frame * (WIDTH + GAP)
    return y, x


def frame_of(sheet: np.ndarray, position: int, frames: int, row: int, frame: int) -> np.ndarray:
    y, x = corner(position, frames, row, frame)
    return sheet[y : y + HEIGHT, x : x + WIDTH]


def test_frames_are_taken_evenly_and_put_dense_above_sparse(tmp_path: Path) -> None:
    sheet = contact_sheet(*runs(tmp_path, 5), prompts=3, frames=3)
    assert sheet.dtype == np.uint8
    last = corner(3, 3, 1, 2)
    assert sheet.shape == (last[0] + HEIGHT + MARGIN, last[1] + WIDTH + MARGIN, 3)
    for position, number in enumerate([0, 2, 4]):
        for row, first in enumerate([0, 100]):
            for index, time in enumerate([0, 4, 8]):
                np.testing.assert_array_equal(
                    frame_of(sheet, position, 3, row, index), clip(first + number)[time], f"{number} {row} {time}"
                )
    # The fourth place stays empty, its label too.
    y, x = corner(3, 3, 0, 0)
    assert (sheet[y - TITLE_HEIGHT + 5 :, x - LABEL_WIDTH :] == PAPER).all()


def test_one_pair_and_one_frame(tmp_path: Path) -> None:
    sheet = contact_sheet(*runs(tmp_path, 1), frames=1)
    assert sheet.shape[1] == 2 * MARGIN + LABEL_WIDTH + WIDTH
    np.testing.assert_array_equal(frame_of(sheet, 0, 1, 1, 0), clip(100)[0])


def test_titles_and_labels_are_written_and_stay_in_their_places(tmp_path: Path) -> None:
    folders = runs(tmp_path, 2, prompt="a red circle\nmoving left " * 40)
    sheet = contact_sheet(*folders, frames=6)
    right_end = corner(0, 6, 0, 5)[1] + WIDTH
    titles = (sheet[MARGIN : MARGIN + TITLE_HEIGHT - 1] != PAPER).any(axis=(0, 2))
    for position in (0, 1):
        y, x = corner(position, 6, 0, 0)
        assert titles[x : x + 6 * WIDTH].any()
        assert not titles[x - LABEL_WIDTH : x - 1].any()
        for row in (0, 1):
            label = sheet[y + row * (HEIGHT + GAP) :, x - LABEL_WIDTH : x - 1][:HEIGHT]
            assert (label < 100).any()
            # Room on both sides: nothing is cut off.
            assert (label[:, -8:] == PAPER).all()
    # A prompt that is too long ends above its own last frame.
    assert not titles[right_end + 1 : right_end + COLUMN_GAP].any()
    assert titles[right_end - 60 : right_end].any()


def test_the_two_rows_of_a_pair_have_labels_of_their_own(tmp_path: Path) -> None:
    add(tmp_path / "a", "cat", clip(0), density=0.5)
    add(tmp_path / "b", "cat", clip(0), density=0.5)
    add(tmp_path / "none", "cat", clip(0), density=None)

    def labels(dense: str, sparse: str) -> list[np.ndarray]:
        sheet = contact_sheet(tmp_path / dense, tmp_path / sparse)
        y, x = corner(0, 6, 0, 0)
        return [sheet[y + row * (HEIGHT + GAP) :, MARGIN : x - 1][:HEIGHT] for row in (0, 1)]

    dense, sparse = labels("a", "b")
    below = HEIGHT // 2 + 1
    assert (dense[:below] != sparse[:below]).any()
    np.testing.assert_array_equal(dense[below:], sparse[below:])
    unknown = labels("a", "none")[1]
    np.testing.assert_array_equal(unknown[:below], sparse[:below])
    assert (unknown[below:] == PAPER).all()


def test_videos_without_a_partner_are_left_out(tmp_path: Path) -> None:
    folders = runs(tmp_path, 1)
    before = contact_sheet(*folders)
    add(folders[0], "alone", clip(7))
    np.testing.assert_array_equal(contact_sheet(*folders), before)


def test_the_program_writes_the_png(tmp_path: Path) -> None:
    folders = runs(tmp_path, 2)
    out = tmp_path / "new" / "sheet.png"
    command = [
        sys.executable,
        "-m",
        "xattn_video_eval.compare.contact_sheet",
        *map(str, folders),
        "--out",
        str(out),
        "--frames",
        "2",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    # A PNG is lossless, and ffmpeg reads pictures too.
    np.testing.assert_array_equal(read_video(out)[0], contact_sheet(*folders, frames=2))
    assert os.listdir(out.parent) == ["sheet.png"]


def too_many_frames(dense: Path, sparse: Path) -> None:
    add(sparse, "p1", clip(1, frames=5))


def other_size(dense: Path, sparse: Path) -> None:
    add(sparse, "p1", clip(1, height=50))


def damaged(dense: Path, sparse: Path) -> None:
    (dense / "p0-s0.mkv").write_bytes(b"nothing")


def missing_manifest(dense: Path, sparse: Path) -> None:
    (dense / "manifest.jsonl").unlink()


def no_pairs(dense: Path, sparse: Path) -> None:
    (sparse / "manifest.jsonl").unlink()
    add(sparse, "other", clip(1))


def nothing(dense: Path, sparse: Path) -> None:
    pass


def in_the_way(dense: Path, sparse: Path) -> None:
    (dense.parent / "sheet.png").mkdir()


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (too_many_frames, (), "p1-s0.mkv: frames must be at most 5, as many as the video has, got 6"),
        (other_size, (), "videos of different sizes: 40 x 48 in "),
        (damaged, (), "p0-s0.mkv: damaged or not a video"),
        (missing_manifest, (), "dense: no manifest.jsonl in it"),
        (no_pairs, (), "have no video (id, seed) in common"),
        (in_the_way, (), "sheet.png: cannot write: "),
        (nothing, ("--prompts", "0"), "prompts must be 1 or more, got 0"),
        (nothing, ("--frames", "-1"), "frames must be 1 or more, got -1"),
        (nothing, ("--out", "sheet.jpg"), "--out must end in .png, got sheet.jpg"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path, Path], None],
    options: tuple[str, ...],
    message: str,
) -> None:
    folders = runs(tmp_path, 2)
    spoil(*folders)
    before = sorted(os.listdir(tmp_path))
    assert main([*map(str, folders), "--out", str(tmp_path / "sheet.png"), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("contact_sheet: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert sorted(os.listdir(tmp_path)) == before


def test_a_failing_run_keeps_the_last_picture(tmp_path: Path) -> None:
    dense, sparse = runs(tmp_path, 1)
    (tmp_path / "sheet.png").write_bytes(b"the last one")
    add(sparse, "p0", clip(1, frames=2))
    assert main([str(dense), str(sparse), "--out", str(tmp_path / "sheet.png")]) == 2
    assert (tmp_path / "sheet.png").read_bytes() == b"the last one"
    with pytest.raises(UserError, match="no such folder"):
        contact_sheet(tmp_path / "nowhere", sparse)
