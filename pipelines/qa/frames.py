"""Frames of a video as a video-understanding model sees it: a few a second, small, and never all of it in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.video import frame_times, iter_frames

# A model looks at pairs of frames.
_FEWEST = 2


@dataclass(frozen=True)
class SampledVideo:
    """`frames` uint8 RGB `[T, H, W, 3]`, taken at `fps` frames a second from a video of `seconds`.

    `complaint` is what ffmpeg said of damage that was let pass, on one line, or None.
    """

    frames: np.ndarray
    fps: float
    seconds: float
    complaint: str | None = None


def check_sampling(*, fps: float, max_frames: int, max_pixels: int) -> None:
    """Raise UserError if a number of `sample_video` is out of its range."""
    if not 0 < fps < float("inf"):
        raise UserError(f"--fps must be a positive number, got {fps}")
    if max_frames < _FEWEST:
        raise UserError(f"--max-frames must be {_FEWEST} or more, got {max_frames}")
    if max_pixels < 1:
        raise UserError(f"--max-pixels must be 1 or more, got {max_pixels}")


def sample_video(path: Path, *, fps: float, max_frames: int, max_pixels: int) -> SampledVideo:
    """Frames at even distances in time, each the last one that is shown at its time.

    Args:
        path: any file that ffmpeg reads. Pixels that are not square are made so. Errors that ffmpeg logs are let pass
            and told, as `frame_times` says.
        fps: frames a second; fewer are taken where that would be more than `max_frames` or than the video has, more
            where fewer than two. Of a video whose frames last for different times, one that lasts long is taken often.
        max_frames: at least 2.
        max_pixels: of a frame; larger ones are made smaller in proportion, smaller ones stay.

    Raises:
        VideoError: missing, empty, damaged or cut-off file.
        UserError: a number is out of its range.
    """
    check_sampling(fps=fps, max_frames=max_frames, max_pixels=max_pixels)
    times = frame_times(path)
    # No frame twice while the next one is due, unless there is but one.
    rate = min(fps, times.rate, max_frames / times.seconds)
    rate = max(rate, _FEWEST / times.seconds)
    count = min(max_frames, max(_FEWEST, math.ceil(times.seconds * rate)))
    # Even sides, in proportion, within the pixels.
    share = f"min(1,sqrt({max_pixels}/(iw*sar*ih)))"
    scale = ":".join(f"{name}='max(2,trunc({size}*{share}/2)*2)'" for name, size in (("w", "iw*sar"), ("h", "ih")))
    # Rounded up, a frame counts from the first time that is asked for after it appears.
    sampled = f"setpts=PTS-STARTPTS,fps={rate:.9g}:round=up,scale={scale}"
    frames: list[np.ndarray] = []
    # To the end, also where the filter gives too many: damage behind the last one taken counts too.
    for frame in iter_frames(path, filters=sampled, strict=False):
        if len(frames) < count:
            frames.append(frame)
    return SampledVideo(np.stack(frames), rate, times.seconds, times.complaint)
