"""Which pictures may be compared: two RGB frames or two RGB videos of one shape, one dtype and a known range."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

Value = TypeVar("Value")


def check_frames(reference: np.ndarray, test: np.ndarray) -> float:
    """The data range of two comparable frames `[H, W, 3]`: 255 for uint8, 1 for floats. Raises ValueError."""
    return _check(reference, test, 3, "frame [H, W, 3]")


def check_videos(reference: np.ndarray, test: np.ndarray) -> float:
    """The data range of two comparable videos `[T, H, W, 3]`, T at least 1. Raises ValueError."""
    return _check(reference, test, 4, "video [T, H, W, 3]")


def is_video(reference: np.ndarray, test: np.ndarray) -> bool:
    """Whether either is meant as a video, by its number of dimensions; nothing else is checked here."""
    return 4 in (np.ndim(reference), np.ndim(test))


def each_frame(
    metric: Callable[[np.ndarray, np.ndarray], Value], reference: np.ndarray, test: np.ndarray
) -> list[Value]:
    """`metric` of each frame of two videos. Raises ValueError as `check_videos`."""
    check_videos(reference, test)
    return [metric(one, other) for one, other in zip(reference, test, strict=True)]


def signed(frame: np.ndarray) -> np.ndarray:
    """`frame` in a type that holds differences of differences exactly (uint8) or to double precision (floats)."""
    return frame.astype(np.int16 if frame.dtype == np.uint8 else np.float64)


def squared(difference: np.ndarray) -> np.ndarray:
    """The square of a difference of `signed` frames, without overflow."""
    square: np.ndarray = np.square(difference, dtype=np.int32 if difference.dtype == np.int16 else np.float64)
    return square


def _check(reference: np.ndarray, test: np.ndarray, dimensions: int, wanted: str) -> float:
    for name, pixels in (("reference", reference), ("test", test)):
        if not isinstance(pixels, np.ndarray):
            raise ValueError(f"{name} must be a numpy array, got {type(pixels).__name__}")
        if pixels.ndim != dimensions or pixels.shape[-1] != 3:
            raise ValueError(f"{name} must be an RGB {wanted}, got shape {list(pixels.shape)}")
    if dimensions == 4 and (len(reference) != len(test) or len(reference) == 0):
        raise ValueError(
            "reference and test must have the same number of frames, at least one, "
            f"got {len(reference)} and {len(test)}"
        )
    if reference.shape != test.shape:
        raise ValueError(
            f"reference and test must have the same shape, got {list(reference.shape)} and {list(test.shape)}"
        )
    if reference.size == 0:
        raise ValueError(f"frames must have pixels, got shape {list(reference.shape)}")
    if reference.dtype != test.dtype:
        raise ValueError(f"reference and test must have the same dtype, got {reference.dtype} and {test.dtype}")
    if reference.dtype == np.uint8:
        return 255.0
    if not np.issubdtype(reference.dtype, np.floating):
        raise ValueError(f"frames must be uint8 or floating, got {reference.dtype}")
    for name, pixels in (("reference", reference), ("test", test)):
        low, high = float(pixels.min()), float(pixels.max())
        # Written so that a NaN fails too.
        if not (low >= 0.0 and high <= 1.0):
            raise ValueError(f"{name}: floating frames must lie in [0, 1], got {low:g} to {high:g}")
    return 1.0
