"""Image and video similarity: PSNR, SSIM and LPIPS of a test picture against a reference.

Frames are RGB `[H, W, 3]`, both uint8 (data range 255) or both floating in [0, 1] (data range 1). A video is
`[T, H, W, 3]`; its value is the mean over its frames, not the metric of the pooled error.
"""

from __future__ import annotations

import contextlib
import math
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

# Identical frames have an infinite PSNR, which a mean cannot hold: each frame counts with at most this.
PSNR_CAP_DB = 100.0

_SSIM_WINDOW = 11
_ALEXNET_SMALLEST = 31
_DOWNLOAD_TIMEOUT_S = 20.0


class LpipsUnavailable(RuntimeError):
    """LPIPS cannot be computed here; the message is the reason, on one line."""


def psnr(reference: np.ndarray, test: np.ndarray) -> float:
    """Peak signal-to-noise ratio of one frame in dB: `10 log10(range^2 / mean squared error)`.

    The error is pooled over pixels and channels. Identical frames give `inf`.

    Raises:
        ValueError: shapes or dtypes that differ, are not RGB frames, or leave their range.
    """
    data_range = _check_frames(reference, test)
    difference = reference.astype(np.float64) - test.astype(np.float64)
    error = float(np.mean(difference * difference))
    return math.inf if error == 0.0 else 10.0 * math.log10(data_range**2 / error)


def ssim(reference: np.ndarray, test: np.ndarray) -> float:
    """Structural similarity of one frame, at most 1: scikit-image's, with the settings of Wang et al. 2004.

    Gaussian window with sigma 1.5 (11 x 11), population covariance, mean over the three colour channels.

    Raises:
        ValueError: as `psnr`, or frames smaller than the 11 x 11 window.
    """
    from skimage.metrics import structural_similarity

    data_range = _check_frames(reference, test)
    if min(reference.shape[:2]) < _SSIM_WINDOW:
        height, width = reference.shape[:2]
        raise ValueError(f"SSIM needs frames of at least {_SSIM_WINDOW} x {_SSIM_WINDOW}, got {width} x {height}")
    value = structural_similarity(
        reference,
        test,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=data_range,
        channel_axis=2,
    )
    return float(value)


def mean_psnr(frame_values: Sequence[float]) -> float:
    """PSNR of a video from those of its frames: their mean in dB, each counted with at most `PSNR_CAP_DB`."""
    return float(np.mean(np.minimum(np.asarray(frame_values, dtype=np.float64), PSNR_CAP_DB)))


def video_psnr(reference: np.ndarray, test: np.ndarray) -> float:
    """`mean_psnr` of two videos `[T, H, W, 3]`. Raises ValueError as `psnr`, or for different lengths."""
    return mean_psnr(_each_frame(psnr, reference, test))


def video_ssim(reference: np.ndarray, test: np.ndarray) -> float:
    """Mean SSIM of two videos `[T, H, W, 3]`. Raises ValueError as `ssim`, or for different lengths."""
    return float(np.mean(_each_frame(ssim, reference, test)))


class Lpips:
    """Learned perceptual distance (Zhang et al. 2018): 0 is identical, larger is further.

    The `lpips` package, version 0.1 linear heads on AlexNet. The heads ship with the package; AlexNet's own
    weights (233 MB) come from torch hub's cache or are downloaded into it once.

    Example:
        >>> distance = Lpips()                          # doctest: +SKIP
        >>> distance(reference_frame, test_frame)       # doctest: +SKIP
        0.031

    Args:
        device: where to compute.
        network: an `lpips.LPIPS` to use instead of loading one.

    Raises:
        LpipsUnavailable: the package or its weights cannot be loaded; the message says why.
    """

    def __init__(self, device: str | torch.device = "cpu", *, network: torch.nn.Module | None = None) -> None:
        import torch

        self.device = torch.device(device)
        self._network = (network if network is not None else _load_lpips()).to(self.device).eval()

    def __call__(self, reference: np.ndarray, test: np.ndarray) -> float:
        """Distance of two frames. Raises ValueError as `psnr`, or for frames smaller than 31 x 31."""
        import torch

        data_range = _check_frames(reference, test)
        if min(reference.shape[:2]) < _ALEXNET_SMALLEST:
            height, width = reference.shape[:2]
            smallest = f"{_ALEXNET_SMALLEST} x {_ALEXNET_SMALLEST}"
            raise ValueError(f"LPIPS needs frames of at least {smallest}, got {width} x {height}")
        with torch.inference_mode():
            first, second = (self._to_input(frame, data_range) for frame in (reference, test))
            return float(self._network(first, second).item())

    def _to_input(self, frame: np.ndarray, data_range: float) -> torch.Tensor:
        """`[H, W, 3]` in [0, data_range] to float32 `[1, 3, H, W]` in [-1, 1]."""
        import torch

        pixels = torch.from_numpy(np.ascontiguousarray(frame)).to(self.device)
        return (pixels.permute(2, 0, 1).unsqueeze(0).float() / data_range) * 2.0 - 1.0


def _load_lpips() -> torch.nn.Module:
    from xattn_video.integrations.torchvision_mend import mend_torchvision

    try:
        mend_torchvision()
        import lpips
    # A torch, torchvision and lpips that do not fit each other fail in many ways, and each leaves LPIPS out.
    except Exception as error:
        raise LpipsUnavailable(f"the lpips package cannot be imported: {_one_line(error)}") from error
    try:
        with _network_timeout(_DOWNLOAD_TIMEOUT_S), warnings.catch_warnings():
            # lpips asks torchvision for its weights in the older spelling.
            warnings.filterwarnings("ignore", message=".*'pretrained'.*", category=UserWarning)
            warnings.filterwarnings("ignore", message=".*weight enum.*", category=UserWarning)
            return lpips.LPIPS(net="alex", version="0.1", verbose=False)
    # Anything that stops the load (no network, a damaged cache, no space) means the same to the caller.
    except Exception as error:
        raise LpipsUnavailable(
            f"AlexNet's weights are neither in torch hub's cache nor can they be downloaded: {_one_line(error)}"
        ) from error


@contextlib.contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """torch hub sets no timeout of its own: behind a silent firewall it would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _each_frame(
    metric: Callable[[np.ndarray, np.ndarray], float], reference: np.ndarray, test: np.ndarray
) -> list[float]:
    for name, video in (("reference", reference), ("test", test)):
        if np.ndim(video) != 4:
            raise ValueError(f"{name} must be a video [T, H, W, 3], got shape {list(np.shape(video))}")
    if len(reference) != len(test) or len(reference) == 0:
        raise ValueError(
            "reference and test must have the same number of frames, at least one, "
            f"got {len(reference)} and {len(test)}"
        )
    return [metric(one, other) for one, other in zip(reference, test, strict=True)]


def _check_frames(reference: Any, test: Any) -> float:
    """The data range of two comparable frames: 255 for uint8, 1 for floats. Raises ValueError."""
    for name, frame in (("reference", reference), ("test", test)):
        if not isinstance(frame, np.ndarray):
            raise ValueError(f"{name} must be a numpy array, got {type(frame).__name__}")
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0:
            raise ValueError(f"{name} must be an RGB frame [H, W, 3], got shape {list(frame.shape)}")
    if reference.shape != test.shape:
        raise ValueError(
            f"reference and test must have the same shape, got {list(reference.shape)} and {list(test.shape)}"
        )
    if reference.dtype != test.dtype:
        raise ValueError(f"reference and test must have the same dtype, got {reference.dtype} and {test.dtype}")
    if reference.dtype == np.uint8:
        return 255.0
    if not np.issubdtype(reference.dtype, np.floating):
        raise ValueError(f"frames must be uint8 or floating, got {reference.dtype}")
    for name, frame in (("reference", reference), ("test", test)):
        low, high = float(frame.min()), float(frame.max())
        # Written so that a NaN fails too.
        if not (low >= 0.0 and high <= 1.0):
            raise ValueError(f"{name}: floating frames must lie in [0, 1], got {low:g} to {high:g}")
    return 1.0
