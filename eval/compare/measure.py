"""Measure one pair of videos frame by frame, holding a few frames at a time whatever the length."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from xattn_video_eval.compare.metrics.flicker import RegionErrors, flicker_step, region_errors
from xattn_video_eval.compare.metrics.psnr_ssim import Lpips, psnr, ssim
from xattn_video_eval.compare.pairs import Pair
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.video import iter_frames

# SSIM of a 720p frame takes 120 MB while it runs: more threads at once would take gigabytes.
_MOST_WORKERS = 8

Frames = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class FrameValues:
    """The metrics of each frame of one pair.

    psnr: in dB, inf where identical. lpips: None where it was not computed. flicker: of the step from the frame
    before, None for the first. regions: errors by region.
    """

    height: int
    width: int
    psnr: list[float]
    ssim: list[float]
    lpips: list[float] | None
    flicker: list[float | None]
    regions: list[RegionErrors]

    @property
    def steps(self) -> list[float]:
        """Flicker of each step between frames: one fewer than frames."""
        return [value for value in self.flicker if value is not None]


def measure(pair: Pair, distance: Lpips | None, *, workers: int | None = None) -> FrameValues:
    """Decode both files of a pair side by side and measure each frame, all but LPIPS in `workers` threads.

    At most `2 * workers + 2` frames of each side are held. `workers` None takes one a core, at most 8.

    Raises:
        UserError: a file is damaged, the two differ in size or frame count, or are too small for a metric.
    """
    workers = workers or min(os.cpu_count() or 1, _MOST_WORKERS)
    pending: deque[Future[tuple[float, float, float | None, RegionErrors]]] = deque()
    measured: list[tuple[float, float, float | None, RegionErrors]] = []
    perceptual: list[float] = []
    height = width = 0
    before: Frames | None = None
    try:
        with ThreadPoolExecutor(workers) as pool:
            for frames in _frame_pairs(pair):
                height, width = frames[0].shape[:2]
                pending.append(pool.submit(_measure_frame, before, frames))
                before = frames
                if distance is not None:
                    perceptual.append(distance(*frames))
                # Waiting for the oldest bounds the frames in memory.
                if len(pending) > 2 * workers:
                    measured.append(pending.popleft().result())
            measured += [future.result() for future in pending]
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{pair.name}: {error}") from error
    return FrameValues(
        height=height,
        width=width,
        psnr=[values[0] for values in measured],
        ssim=[values[1] for values in measured],
        lpips=perceptual if distance is not None else None,
        flicker=[values[2] for values in measured],
        regions=[values[3] for values in measured],
    )


def _measure_frame(before: Frames | None, frames: Frames) -> tuple[float, float, float | None, RegionErrors]:
    step = None if before is None else flicker_step(before, frames)
    return psnr(*frames), ssim(*frames), step, region_errors(*frames)


def _frame_pairs(pair: Pair) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The frames of both files side by side; both must end together and have one size."""
    with (
        contextlib.closing(iter_frames(pair.dense_file)) as dense_frames,
        contextlib.closing(iter_frames(pair.sparse_file)) as sparse_frames,
    ):
        for index, (dense, sparse) in enumerate(itertools.zip_longest(dense_frames, sparse_frames)):
            if dense is None or sparse is None:
                longer = index + 1 + sum(1 for _ in (sparse_frames if dense is None else dense_frames))
                counts = (index, longer) if dense is None else (longer, index)
                raise UserError(
                    f"{pair.name}: different frame counts: {counts[0]} in {pair.dense_file}, "
                    f"{counts[1]} in {pair.sparse_file}"
                )
            if dense.shape != sparse.shape:
                raise UserError(
                    f"{pair.name}: different sizes: {dense.shape[1]} x {dense.shape[0]} in {pair.dense_file}, "
                    f"{sparse.shape[1]} x {sparse.shape[0]} in {pair.sparse_file}"
                )
            yield dense, sparse
