"""When and where the error sits: flicker over time, border and grid over the picture. What frame means miss.

Flicker. With the error of frame t, `e_t = test_t - reference_t`, it is the root mean square of `e_t - e_(t-1)`,
which equals the difference between the test's step to the next frame and the reference's: motion that both share
cancels. An error that stands still, however large, has none; noise drawn anew for every frame with a standard
deviation of sigma has sqrt(2) sigma; a flash of height d in one frame inside T has d sqrt(2 / (T - 1)).

It is pooled over a video's T - 1 steps, not averaged: the mean over frames of PSNR gives one bad frame in T the
weight 1 / T and no more, however bad, while here it counts by its squared height.

Regions. The border band is the outer 1/16 of the shorter side (at least a pixel) on all four sides, the centre is
the rest; the grid cuts the picture into 4 x 4 cells. Mean squared errors are pooled over a video's frames, in
units of the squared data range, so that frames of uint8 and of floats give the same figures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xattn_video_eval.compare.metrics.frames import check_frames, check_videos, each_frame, is_video, signed, squared
from xattn_video_eval.compare.metrics.psnr_ssim import PSNR_CAP_DB, capped_db

GRID = 4
_BORDER_FRACTION = 16

DEFINITIONS = {
    "flicker": "root mean square of (test's step to the next frame - the reference's), in units of the data range; "
    "pooled over a video's steps, mean over videos; 0 for an error that stands still and for identical frames",
    "border_excess_db": f"dB by which the outer 1/{_BORDER_FRACTION} of the shorter side is worse than the rest, from "
    f"squared errors pooled over a video's frames, each of the two at most {PSNR_CAP_DB:g} dB; mean over videos; 0 "
    "where the edge is like the rest",
    "worst_region": f"the cell of {GRID} x {GRID} with the largest squared error, pooled over frames (over videos: of "
    f"the mean grid), and its part of the grid's sum, {100 / GRID**2:g} % where all are alike; r1c1 is the top left",
}


def flicker(reference: np.ndarray, test: np.ndarray) -> float:
    """Flicker of a video against a reference, in units of the data range: 0 is none, at most 2.

    Args:
        reference, test: videos `[T, H, W, 3]`, T at least 2, uint8 or floats in [0, 1].

    Raises:
        ValueError: as `psnr_ssim.psnr`, or fewer than two frames (flicker is about steps between frames).
    """
    check_videos(reference, test)
    if len(reference) < 2:
        raise ValueError(f"flicker needs videos of at least 2 frames, got {len(reference)}")
    frames = list(zip(reference, test, strict=True))
    return pooled_flicker([flicker_step(before, now) for before, now in itertools.pairwise(frames)])


def flicker_step(before: tuple[np.ndarray, np.ndarray], now: tuple[np.ndarray, np.ndarray]) -> float:
    """Flicker of one step, from a pair (reference, test) of frames `[H, W, 3]` to the next pair.

    Raises:
        ValueError: as `psnr_ssim.psnr`, or two pairs that differ in shape or dtype.
    """
    data_range = check_frames(*now)
    check_frames(*before)
    check_frames(before[0], now[0])
    change = signed(now[1]) - signed(now[0])
    change -= signed(before[1]) - signed(before[0])
    return math.sqrt(float(np.mean(squared(change), dtype=np.float64))) / data_range


def pooled_flicker(steps: Sequence[float]) -> float:
    """Flicker of a video from that of its steps: their root mean square. Raises ValueError without any step."""
    if not steps:
        raise ValueError("steps must hold at least one step, got none")
    return math.sqrt(float(np.mean(np.square(np.asarray(steps, dtype=np.float64)))))


def flicker_db(value: float) -> float:
    """Flicker on PSNR's scale, `-20 log10(flicker)`, at most `PSNR_CAP_DB`: 3.01 dB below PSNR for fresh noise."""
    return capped_db(value**2)


@dataclass(frozen=True)
class RegionErrors:
    """Mean squared errors by region, in units of the squared data range.

    border: of the border band. centre: of the rest. grid: of the 4 x 4 cells `[row][column]`, from the top left.
    """

    border: float
    centre: float
    grid: tuple[tuple[float, ...], ...]

    @property
    def border_psnr(self) -> float:
        """PSNR of the border band in dB, at most `PSNR_CAP_DB`."""
        return capped_db(self.border)

    @property
    def centre_psnr(self) -> float:
        """PSNR of the rest in dB, at most `PSNR_CAP_DB`."""
        return capped_db(self.centre)

    @property
    def border_excess_db(self) -> float:
        """By how many dB the border is worse than the centre; negative where it is better, 0 without error."""
        return self.centre_psnr - self.border_psnr


def worst_cell(grid: Sequence[Sequence[float]]) -> tuple[str, float] | None:
    """The cell of a grid of squared errors with the largest: its name and its part of the grid's sum.

    Rows and columns are named from 1: "r1c4" is the top right cell of 4 x 4. None for a grid without error.
    """
    cells = np.asarray(grid, dtype=np.float64)
    if not cells.any():
        return None
    row, column = np.unravel_index(int(np.argmax(cells)), cells.shape)
    return f"r{row + 1}c{column + 1}", float(cells.max() / cells.sum())


def region_errors(reference: np.ndarray, test: np.ndarray) -> RegionErrors:
    """Errors by region of two frames `[H, W, 3]`, or of two videos `[T, H, W, 3]`, pooled over their frames.

    Raises:
        ValueError: as `psnr_ssim.psnr`, or frames smaller than 4 x 4.
    """
    if is_video(reference, test):
        return mean_regions(each_frame(region_errors, reference, test))
    data_range = check_frames(reference, test)
    height, width = reference.shape[:2]
    if min(height, width) < GRID:
        raise ValueError(f"region errors need frames of at least {GRID} x {GRID}, got {width} x {height}")
    errors = squared(signed(test) - signed(reference)).mean(axis=2, dtype=np.float64) / data_range**2
    band = max(1, min(height, width) // _BORDER_FRACTION)
    centre = errors[band:-band, band:-band]
    grid = [[cell.mean() for cell in np.array_split(row, GRID, axis=1)] for row in np.array_split(errors, GRID)]
    # Not the whole less the centre: rounding would leave an error in a border that has none.
    border = errors.copy()
    border[band:-band, band:-band] = 0.0
    return RegionErrors(
        border=float(border.sum()) / (errors.size - centre.size),
        centre=float(centre.mean()),
        grid=_rows(np.asarray(grid)),
    )


def mean_regions(frames: Sequence[RegionErrors]) -> RegionErrors:
    """The errors by region of a video from those of its frames, or of a set of videos from theirs."""
    return RegionErrors(
        border=float(np.mean([frame.border for frame in frames])),
        centre=float(np.mean([frame.centre for frame in frames])),
        grid=_rows(np.mean([frame.grid for frame in frames], axis=0)),
    )


def _rows(grid: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in grid.tolist())
