"""Image and video similarity: PSNR, SSIM and LPIPS of a test picture against a reference.

Frames are RGB `[H, W, 3]`, both uint8 (data range 255) or both floating in [0, 1] (data range 1). A video is
`[T, H, W, 3]`; its value is the mean over its frames, not the metric of the pooled error. Every metric takes two
frames or two videos, and swapping the two changes nothing. What frame means miss is in `flicker`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from xattn_video_eval.compare.metrics.frames import check_frames, each_frame, is_video
from xattn_video_eval.compare.metrics.lpips import LPIPS_NETS, Lpips, LpipsUnavailable

__all__ = [
    "LPIPS_NETS",
    "PSNR_CAP_DB",
    "Lpips",
    "LpipsUnavailable",
    "capped_db",
    "definitions",
    "mean_psnr",
    "psnr",
    "ssim",
    "video_lpips",
    "video_psnr",
    "video_ssim",
]

# Identical frames have an infinite PSNR, which a mean cannot hold: each frame counts with at most this.
PSNR_CAP_DB = 100.0

_SSIM_WINDOW = 11
_SSIM_SIGMA = 1.5


def definitions(lpips_net: str) -> dict[str, str]:
    """What each figure of PSNR, SSIM and LPIPS means, one line a metric, to be shown beside the figures."""
    means = "mean over frames, then over videos"
    return {
        "psnr": f"10 log10(255^2 / mean squared error) in dB over the pixels and RGB channels of a frame; {means}; "
        f"each frame counts with at most {PSNR_CAP_DB:g} dB, an identical one with just that",
        "ssim": f"Gaussian window {_SSIM_WINDOW} x {_SSIM_WINDOW}, sigma {_SSIM_SIGMA}, population covariance, data "
        f"range 255, mean over RGB; {means}; identical frames count 1",
        "lpips": f"version 0.1, {lpips_net}, frames scaled to [-1, 1] at their own size; {means}; identical frames "
        "count 0",
    }


def psnr(reference: np.ndarray, test: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB: `10 log10(range^2 / mean squared error)`.

    The error of a frame is pooled over pixels and channels. Identical frames give `inf`. A video's is
    `mean_psnr` of its frames, at most `PSNR_CAP_DB`.

    Args:
        reference, test: two frames `[H, W, 3]` or two videos `[T, H, W, 3]`, uint8 or floats in [0, 1].

    Raises:
        ValueError: shapes or dtypes that differ, are not RGB frames or videos, or leave their range.
    """
    if is_video(reference, test):
        return video_psnr(reference, test)
    data_range = check_frames(reference, test)
    difference = reference.astype(np.float64) - test.astype(np.float64)
    error = float(np.mean(difference * difference))
    return math.inf if error == 0.0 else 10.0 * math.log10(data_range**2 / error)


def ssim(reference: np.ndarray, test: np.ndarray) -> float:
    """Structural similarity, at most 1: scikit-image's, with the settings of Wang et al. 2004.

    Gaussian window with sigma 1.5 (11 x 11), population covariance, mean over the three colour channels. A
    video's is the mean over its frames.

    Args:
        reference, test: two frames `[H, W, 3]` or two videos `[T, H, W, 3]`, uint8 or floats in [0, 1].

    Raises:
        ValueError: as `psnr`, or frames smaller than the 11 x 11 window.
    """
    from skimage.metrics import structural_similarity

    if is_video(reference, test):
        return video_ssim(reference, test)
    data_range = check_frames(reference, test)
    if min(reference.shape[:2]) < _SSIM_WINDOW:
        height, width = reference.shape[:2]
        raise ValueError(f"SSIM needs frames of at least {_SSIM_WINDOW} x {_SSIM_WINDOW}, got {width} x {height}")
    value = structural_similarity(
        reference,
        test,
        gaussian_weights=True,
        sigma=_SSIM_SIGMA,
        use_sample_covariance=False,
        data_range=data_range,
        channel_axis=2,
    )
    return float(value)


def capped_db(squared_error: float) -> float:
    """A mean squared error, in units of the squared data range, as dB below full range: at most `PSNR_CAP_DB`."""
    return PSNR_CAP_DB if squared_error == 0.0 else min(PSNR_CAP_DB, -10.0 * math.log10(squared_error))


def mean_psnr(frame_values: Sequence[float]) -> float:
    """PSNR of a video from those of its frames: their mean in dB, each counted with at most `PSNR_CAP_DB`."""
    return float(np.mean(np.minimum(np.asarray(frame_values, dtype=np.float64), PSNR_CAP_DB)))


def video_psnr(reference: np.ndarray, test: np.ndarray) -> float:
    """`mean_psnr` of two videos `[T, H, W, 3]`. Raises ValueError as `psnr`, or for different lengths."""
    return mean_psnr(each_frame(psnr, reference, test))


def video_ssim(reference: np.ndarray, test: np.ndarray) -> float:
    """Mean SSIM of two videos `[T, H, W, 3]`. Raises ValueError as `ssim`, or for different lengths."""
    return float(np.mean(each_frame(ssim, reference, test)))


def video_lpips(reference: np.ndarray, test: np.ndarray, distance: Lpips) -> float:
    """Mean LPIPS of two videos `[T, H, W, 3]`. Raises ValueError as `Lpips`, or for different lengths."""
    return float(np.mean(each_frame(distance, reference, test)))
