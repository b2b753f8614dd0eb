"""A picture of frames, dense above sparse, for several prompts: what the numbers of `compare` look like.

python -m xattn_video_eval.compare.contact_sheet DENSE_DIR SPARSE_DIR --out sheet.png
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from xattn_video_eval.compare.pairs import Pair, find_pairs
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import make_writable, whole_files
from xattn_video_pipelines.common.program import run_alone
from xattn_video_pipelines.common.settings import Option, Settings
from xattn_video_pipelines.common.terminal import say
from xattn_video_pipelines.video import iter_frames

EXAMPLE = "example: python -m xattn_video_eval.compare.contact_sheet out/dense out/xattn-s8-t0.90-w5 --out sheet.png"

COLUMNS = 2
# Pixels.
MARGIN, COLUMN_GAP, GAP = 16, 36, 2
TITLE_HEIGHT, LABEL_WIDTH = 26, 92
_TITLE_SIZE, _LABEL_SIZE, _SMALL_SIZE = 16, 15, 12
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (90, 90, 90)
# A white background of a video must not run into the paper.
_FRAME_EDGE = (190, 190, 190)


@dataclass(frozen=True)
class SheetSettings(Settings):
    """Which videos are drawn, how many of them, and how many frames of each."""

    dense_dir: Annotated[Path, Option("folder of the dense videos", metavar="DENSE_DIR")]
    sparse_dir: Annotated[Path, Option("folder of the sparse videos", metavar="SPARSE_DIR")]
    _: KW_ONLY
    out: Annotated[Path, Option("the picture, a .png", metavar="FILE")]
    prompts: Annotated[int, Option("pairs to draw", metavar="N")] = 8
    frames: Annotated[int, Option("frames of each", metavar="N")] = 6

    def check(self) -> None:
        if self.out.suffix != ".png":
            raise UserError(f"--out must end in .png, got {self.out}")


def contact_sheet(
    dense_dir: str | os.PathLike[str], sparse_dir: str | os.PathLike[str], prompts: int = 8, frames: int = 6
) -> np.ndarray:
    """Draw `prompts` pairs of videos, taken evenly from all pairs, each as `frames` frames taken evenly.

    A pair is its prompt and under it two rows, dense above sparse; the pairs fill two columns, row by row. The
    frames keep their own size. Fewer pairs than `prompts` are all drawn; videos without a partner are left out.

    Args:
        dense_dir, sparse_dir: folders that `xattn-video generate` wrote.
        prompts, frames: at least 1; frames at most as many as each video has.

    Returns:
        uint8 RGB `[height, width, 3]`.

    Raises:
        UserError: a number below 1 or too many frames, or folders, manifests or files that are missing, empty,
            damaged, do not belong together, or whose videos differ in size.
    """
    for name, value in (("prompts", prompts), ("frames", frames)):
        if value < 1:
            raise UserError(f"{name} must be 1 or more, got {value}")
    pairs, _ = find_pairs(Path(dense_dir), Path(sparse_dir), allow_unmatched=True)
    pairs = [pairs[index] for index in _evenly(len(pairs), min(prompts, len(pairs)))]
    strips = [[_strip(file, frames) for file in (pair.dense_file, pair.sparse_file)] for pair in pairs]
    _check_sizes(pairs, strips)

    height, width = strips[0][0][0].shape[:2]
    pair_width = LABEL_WIDTH + frames * (width + GAP) - GAP
    pair_height = TITLE_HEIGHT + 2 * height + GAP
    columns = min(COLUMNS, len(pairs))
    rows = -(-len(pairs) // columns)
    size = (columns * (pair_width + COLUMN_GAP) - COLUMN_GAP + 2 * MARGIN, rows * (pair_height + MARGIN) + MARGIN)
    sheet = Image.new("RGB", size, _PAPER)
    for index, (pair, both) in enumerate(zip(pairs, strips, strict=True)):
        row, column = divmod(index, columns)
        left, top = MARGIN + column * (pair_width + COLUMN_GAP), MARGIN + row * (pair_height + MARGIN)
        _draw_pair(sheet, pair, both, left, top, pair_width)
    return np.array(sheet)


def command(settings: SheetSettings) -> int:
    """`python -m xattn_video_eval.compare.contact_sheet`: write the picture; 0. Raises UserError."""
    make_writable(settings.out.parent)
    sheet = contact_sheet(settings.dense_dir, settings.sparse_dir, settings.prompts, settings.frames)
    with whole_files(settings.out) as (partial,):
        Image.fromarray(sheet).save(partial, optimize=True)
    say(f"wrote {settings.out} ({sheet.shape[1]} x {sheet.shape[0]})")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program: 0, or 2 with one line for bad input."""
    about = "Draw frames of several prompts, dense above sparse, into one PNG."
    return run_alone(command, "xattn_video_eval.compare.contact_sheet", about, EXAMPLE, arguments)


def _evenly(count: int, wanted: int) -> list[int]:
    """`wanted` different indices below `count`, the first and the last among them."""
    return [round(index) for index in np.linspace(0, count - 1, wanted)]


def _strip(file: Path, wanted: int) -> list[np.ndarray]:
    frames = list(iter_frames(file))
    if len(frames) < wanted:
        raise UserError(f"{file}: frames must be at most {len(frames)}, as many as the video has, got {wanted}")
    return [frames[index] for index in _evenly(len(frames), wanted)]


def _check_sizes(pairs: list[Pair], strips: list[list[list[np.ndarray]]]) -> None:
    files = [file for pair in pairs for file in (pair.dense_file, pair.sparse_file)]
    sizes = [f"{frame.shape[1]} x {frame.shape[0]}" for both in strips for frame, *_ in both]
    for file, size in zip(files, sizes, strict=True):
        if size != sizes[0]:
            raise UserError(f"videos of different sizes: {sizes[0]} in {files[0]}, {size} in {file}")


def _draw_pair(sheet: Image.Image, pair: Pair, strips: list[list[np.ndarray]], left: int, top: int, width: int) -> None:
    draw = ImageDraw.Draw(sheet)
    title, label, small = (ImageFont.load_default(size) for size in (_TITLE_SIZE, _LABEL_SIZE, _SMALL_SIZE))
    prompt = " ".join(str(pair.dense.get("prompt") or pair.name).split())
    draw.text((left + LABEL_WIDTH, top), _fitting(prompt, title, width - LABEL_WIDTH), _INK, title)
    for strip, record, name in zip(strips, (pair.dense, pair.sparse), ("dense", "sparse"), strict=True):
        frame_height, frame_width = strip[0].shape[:2]
        y = top + TITLE_HEIGHT + (name == "sparse") * (frame_height + GAP)
        draw.text((left, y + frame_height // 2 - 2), name, _INK, label, anchor="ls")
        density = record.get("mean_density")
        if density is not None:
            draw.text((left, y + frame_height // 2 + 14), f"density {density:.2f}", _FAINT, small, anchor="ls")
        for index, frame in enumerate(strip):
            x = left + LABEL_WIDTH + index * (frame_width + GAP)
            # One pixel outside: no pixel of the frame is drawn over.
            draw.rectangle((x - 1, y - 1, x + frame_width, y + frame_height), outline=_FRAME_EDGE)
            sheet.paste(Image.fromarray(frame), (x, y))


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text`, or as much of its beginning as has room for an ellipsis."""
    if font.getlength(text) <= width:
        return text
    # A letter has at least a pixel.
    text = text[:width]
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


if __name__ == "__main__":
    sys.exit(main())
