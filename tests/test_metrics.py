"""PSNR and SSIM against closed forms and the packages that define them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from xattn_video_eval.compare.metrics import psnr_ssim
from xattn_video_eval.compare.metrics.psnr_ssim import definitions, mean_psnr, psnr, ssim, video_psnr, video_ssim


def frames(height: int = 37, width: int = 53, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A smooth picture and a noisy copy of it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    picture = np.stack([60 + 2 * x, 70 + 2 * y, 90 + x + y], axis=-1)
    noisy = np.clip(picture + rng.normal(0, 9, picture.shape), 0, 255)
    return picture.astype(np.uint8), noisy.astype(np.uint8)


@pytest.mark.parametrize("offset", [1, 3, 40, 255])
def test_psnr_of_a_constant_offset(offset: int) -> None:
    black = np.zeros((12, 17, 3), dtype=np.uint8)
    assert psnr(black, black + np.uint8(offset)) == pytest.approx(20 * math.log10(255 / offset), abs=1e-9)


def test_psnr_counts_every_pixel_and_channel_alike() -> None:
    black = np.zeros((10, 10, 3), dtype=np.uint8)
    one = black.copy()
    one[4, 7, 2] = 255
    assert psnr(black, one) == pytest.approx(10 * math.log10(300))


def test_ssim_of_constant_pictures() -> None:
    # No variance: only the luminance term (2 a b + C1) / (a^2 + b^2 + C1) is left.
    first, second, c1 = 100.0, 140.0, (0.01 * 255) ** 2
    expected = (2 * first * second + c1) / (first**2 + second**2 + c1)
    value = ssim(np.full((16, 20, 3), 100, np.uint8), np.full((16, 20, 3), 140, np.uint8))
    assert value == pytest.approx(expected, abs=1e-7)


def test_equal_scikit_image_called_directly() -> None:
    reference, test = frames()
    assert psnr(reference, test) == pytest.approx(peak_signal_noise_ratio(reference, test), abs=1e-9)
    settings: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = structural_similarity(reference, test, data_range=255, channel_axis=2, **settings)
    assert ssim(reference, test) == pytest.approx(expected, abs=1e-12)
    # The picture tells the settings apart.
    other = structural_similarity(reference, test, data_range=255, channel_axis=2)
    assert abs(other - expected) > 1e-3


def test_floats_in_unit_range_agree_with_uint8() -> None:
    reference, test = frames()
    scaled = reference.astype(np.float64) / 255, test.astype(np.float64) / 255
    assert psnr(*scaled) == pytest.approx(psnr(reference, test), abs=1e-6)
    assert ssim(*scaled) == pytest.approx(ssim(reference, test), abs=1e-6)


def test_swapping_the_arguments_changes_nothing() -> None:
    reference, test = frames()
    assert psnr(reference, test) == psnr(test, reference)
    assert ssim(reference, test) == pytest.approx(ssim(test, reference), abs=1e-12)


def test_more_noise_is_worse() -> None:
    reference, test = frames()
    noisier = np.clip(reference + 3.0 * (test.astype(float) - reference), 0, 255).astype(np.uint8)
    assert psnr(reference, noisier) < psnr(reference, test)
    assert ssim(reference, noisier) < ssim(reference, test)


def test_identical_frames_and_videos() -> None:
    reference, _ = frames()
    assert psnr(reference, reference) == math.inf
    assert ssim(reference, reference) == pytest.approx(1.0)
    video = np.stack([reference] * 3)
    assert video_psnr(video, video) == psnr_ssim.PSNR_CAP_DB == 100.0
    assert video_ssim(video, video) == pytest.approx(1.0)


def test_video_is_the_mean_over_its_frames_with_the_cap() -> None:
    pairs = [frames(seed=seed) for seed in range(3)]
    reference = np.stack([first for first, _ in pairs])
    test = np.stack([second for _, second in pairs])
    test[1] = reference[1]
    expected = (psnr(reference[0], test[0]) + 100.0 + psnr(reference[2], test[2])) / 3
    assert video_psnr(reference, test) == pytest.approx(expected)
    assert mean_psnr([20.0, math.inf, 30.0]) == pytest.approx(50.0)
    expected = sum(ssim(one, other) for one, other in zip(reference, test, strict=True)) / 3
    assert video_ssim(reference, test) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("test", "message"),
    [
        (np.zeros((20, 21, 3), np.uint8), r"same shape, got \[20, 20, 3\] and \[20, 21, 3\]"),
        (np.zeros((20, 20, 3), np.float32), "same dtype, got uint8 and float32"),
        (np.zeros((20, 20), np.uint8), r"test must be an RGB frame \[H, W, 3\], got shape \[20, 20\]"),
        (np.zeros((3, 20, 20), np.uint8), r"RGB frame"),
        (torch.zeros(20, 20, 3), "test must be a numpy array, got Tensor"),
    ],
)
def test_frames_that_do_not_go_together(metric: Any, test: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(np.zeros((20, 20, 3), np.uint8), test)


def test_ranges_sizes_and_lengths_are_checked() -> None:
    unit = np.zeros((20, 20, 3), np.float32)
    with pytest.raises(ValueError, match=r"test: floating frames must lie in \[0, 1\], got 0 to 255"):
        psnr(unit, np.linspace(0, 255, unit.size, dtype=np.float32).reshape(unit.shape))
    with pytest.raises(ValueError, match="must lie in"):
        psnr(unit, np.full_like(unit, np.nan))
    with pytest.raises(ValueError, match="uint8 or floating, got int64"):
        psnr(unit.astype(np.int64), unit.astype(np.int64))
    small = np.zeros((10, 20, 3), np.uint8)
    with pytest.raises(ValueError, match="at least 11 x 11, got 20 x 10"):
        ssim(small, small)
    with pytest.raises(ValueError, match="same number of frames, at least one, got 2 and 3"):
        video_psnr(np.zeros((2, 20, 20, 3), np.uint8), np.zeros((3, 20, 20, 3), np.uint8))
    with pytest.raises(ValueError, match="at least one, got 0 and 0"):
        video_ssim(np.zeros((0, 20, 20, 3), np.uint8), np.zeros((0, 20, 20, 3), np.uint8))
    with pytest.raises(ValueError, match=r"reference must be an RGB video \[T, H, W, 3\]"):
        video_psnr(small, small)


def test_one_function_takes_a_frame_or_a_video() -> None:
    reference, test = frames()
    videos = np.stack([reference, test, reference]), np.stack([test, reference, reference])
    assert psnr(*videos) == pytest.approx((2 * psnr(reference, test) + 100.0) / 3)
    assert psnr(*videos) == video_psnr(*videos)
    assert ssim(*videos) == video_ssim(*videos) == pytest.approx((2 * ssim(reference, test) + 1) / 3)
    unit = videos[0].astype(np.float32) / 255, videos[1].astype(np.float32) / 255
    assert psnr(*unit) == pytest.approx(psnr(*videos), abs=1e-4)
    assert ssim(*unit) == pytest.approx(ssim(*videos), abs=1e-5)


@pytest.mark.parametrize("metric", [psnr, ssim, video_psnr, video_ssim])
@pytest.mark.parametrize(
    ("reference", "test", "message"),
    [
        ((2, 20, 20, 3), (20, 20, 3), r"test must be an RGB video \[T, H, W, 3\], got shape \[20, 20, 3\]"),
        ((20, 20, 3), (2, 20, 20, 3), r"reference must be an RGB video \[T, H, W, 3\], got shape \[20, 20, 3\]"),
        ((2, 3, 20, 20), (2, 3, 20, 20), r"reference must be an RGB video .*, got shape \[2, 3, 20, 20\]"),
        ((2, 20, 20, 3), (2, 20, 21, 3), r"same shape, got \[2, 20, 20, 3\] and \[2, 20, 21, 3\]"),
        ((2, 20, 0, 3), (2, 20, 0, 3), r"must have pixels, got shape \[2, 20, 0, 3\]"),
    ],
)
def test_videos_that_do_not_go_together(metric: Any, reference: Any, test: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(np.zeros(reference, np.uint8), np.zeros(test, np.uint8))


def test_definitions_name_the_settings_that_are_used() -> None:
    texts = definitions("squeeze")
    assert set(texts) == {"psnr", "ssim", "lpips"}
    assert all("mean over frames, then over videos" in text for text in texts.values())
    assert "255^2" in texts["psnr"]
    assert "at most 100 dB" in texts["psnr"]
    assert "Gaussian window 11 x 11, sigma 1.5" in texts["ssim"]
    assert "data range 255" in texts["ssim"]
    assert "version 0.1, squeeze" in texts["lpips"]
