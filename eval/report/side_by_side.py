"""The comparisons of a report as one mp4: dense and sparse beside each other, with captions, one after another."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from xattn_video_eval.report.data import Case, Run
from xattn_video_eval.report.videos import prompt_of
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.video import iter_frames, video_file, write_video

# Pixels; even, as H.264 asks of the whole picture.
_GAP, _TITLE, _CAPTION = 8, 28, 48
_TITLE_SIZE, _CAPTION_SIZE = 16, 14
# Smaller videos are enlarged by a whole factor, so that the captions beside them can be read.
_LEAST_SIDE = 256
# About a letter of the caption.
_LETTER = 7
_PAPER, _INK, _FAINT = (20, 22, 26), (240, 240, 240), (165, 172, 182)


@dataclass(frozen=True)
class _Clip:
    """One comparison: its two files, the texts around them, and its size in pixels as drawn."""

    dense: Path
    sparse: Path
    title: str
    caption: str
    note: str
    frames: int
    scale: int
    width: int
    height: int


def write_side_by_side(run: Run, cases: Sequence[Case], path: Path) -> None:
    """Write the comparisons to `path`, in the order of `cases`, at the frames a second of the first.

    Videos of different sizes are drawn at the top left of a picture in which the largest has room.

    Raises:
        UserError: there is no case, a file is missing or damaged or has too few frames, or `path` is in a folder of the
            run's own videos or cannot be written.
    """
    folders = (run.dense_folder, *(one.folder for one in run.compared))
    if path.parent.resolve() in [folder.resolve() for folder in folders]:
        raise UserError(f"--side-by-side {path}: that folder has the run's own videos; name a file elsewhere")
    if not cases:
        raise UserError(f"--side-by-side {path}: no sparse video is in the page (--max-megabytes)")
    clips = [_clip(run, case) for case in cases]
    frames: Any = _Reel(clips)
    write_video(path, frames, run.dense[cases[0].key].get("fps") or 16)


class _Reel:
    """The frames of all clips, uint8 `[T, H, W, 3]`, each drawn when it is asked for: a long run exceeds the memory.

    `write_video` asks for them in order, which is the only order that there is.
    """

    def __init__(self, clips: Sequence[_Clip]) -> None:
        width = 2 * max(clip.width for clip in clips) + _GAP
        height = max(clip.height for clip in clips) + _TITLE + _CAPTION
        self.shape = (sum(clip.frames for clip in clips), height, width, 3)
        self._frames = (frame for clip in clips for frame in _drawn(clip, width, height))

    def __getitem__(self, index: int) -> np.ndarray:
        return next(self._frames)


def _clip(run: Run, case: Case) -> _Clip:
    (one,) = (one for one in run.compared if one.label == case.label)
    row = case.row
    scale = -(-_LEAST_SIDE // min(row["height"], row["width"]))
    density = row["density"]
    return _Clip(
        dense=video_file(run.dense_folder, run.dense[case.key]),
        sparse=video_file(one.folder, one.records[case.key]),
        title="sparse" if density is None else f"sparse, {100 * (1 - density):.0f} % skipped",
        caption=prompt_of(run, case.key),
        note=f"{case.label}, PSNR {row['psnr']:.1f} dB",
        frames=row["frames"],
        scale=scale,
        width=scale * row["width"],
        height=scale * row["height"],
    )


def _drawn(clip: _Clip, width: int, height: int) -> Iterator[np.ndarray]:
    """Each frame of a clip with the texts around it."""
    page = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(page)
    title, caption = ImageFont.load_default(_TITLE_SIZE), ImageFont.load_default(_CAPTION_SIZE)
    right, below = clip.width + _GAP, _TITLE + clip.height
    draw.text((6, 5), "dense", _INK, title)
    draw.text((right + 6, 5), clip.title, _INK, title)
    letters = width // _LETTER
    draw.text((6, below + 5), textwrap.shorten(clip.caption, letters, placeholder=" ..."), _INK, caption)
    draw.text((6, below + 26), textwrap.shorten(clip.note, letters, placeholder=" ..."), _FAINT, caption)
    paper = np.asarray(page)
    pairs = zip(iter_frames(clip.dense), iter_frames(clip.sparse), strict=False)
    for _ in range(clip.frames):
        both = next(pairs, None)
        if both is None:
            raise UserError(f"{clip.sparse}: fewer than {clip.frames} frames in it, or in {clip.dense}")
        frame = paper.copy()
        for picture, left in zip(both, (0, right), strict=True):
            large = picture.repeat(clip.scale, axis=0).repeat(clip.scale, axis=1)
            frame[_TITLE : _TITLE + clip.height, left : left + clip.width] = large
        yield frame
