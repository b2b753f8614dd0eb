"""Flicker and errors by region: closed forms, and the artefacts that a mean over frames does not show."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from xattn_video_eval.compare.metrics.flicker import (
    DEFINITIONS,
    flicker,
    flicker_db,
    flicker_step,
    mean_regions,
    pooled_flicker,
    region_errors,
    worst_cell,
)
from xattn_video_eval.compare.metrics.psnr_ssim import psnr, video_psnr


def moving(frames: int = 9, height: int = 37, width: int = 53) -> np.ndarray:
    """A moving picture with room for errors of 60 levels on both sides."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin((x + y * (channel + 1) + 5 * t) / 7) for channel in range(3)]
    return (127 + 60 * np.stack(waves, axis=-1)).astype(np.uint8)


def noisy(video: np.ndarray, sigma: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, sigma, video.shape)
    return np.clip(np.rint(video + noise), 0, 255).astype(np.uint8)


def unit(video: np.ndarray) -> np.ndarray:
    return video.astype(np.float64) / 255


def test_identical_videos_and_still_errors_do_not_flicker() -> None:
    video = moving()
    assert flicker(video, video) == 0.0
    assert flicker_db(0.0) == 100.0
    # However large, an error that stands still is not flicker, though the picture moves under it.
    assert flicker(video, video + np.uint8(40)) == 0.0
    pattern = np.random.default_rng(0).integers(0, 50, video.shape[1:], dtype=np.uint8)
    assert flicker(video, video + pattern) == 0.0
    assert psnr(video, video + pattern) < 20


def test_missing_motion_is_flicker() -> None:
    video = moving()
    frozen = np.broadcast_to(video[:1], video.shape)
    steps = np.diff(unit(video), axis=0)
    assert flicker(video, frozen) == pytest.approx(math.sqrt(np.mean(steps**2)), rel=1e-12)


@pytest.mark.parametrize("height", [1, 7, 60])
@pytest.mark.parametrize("frames", [3, 9])
def test_a_flash_has_its_closed_form(height: int, frames: int) -> None:
    video = moving(frames)
    for where, steps in ((frames // 2, 2), (0, 1), (frames - 1, 1)):
        test = video.copy()
        test[where] += np.uint8(height)
        expected = height / 255 * math.sqrt(steps / (frames - 1))
        assert flicker(video, test) == pytest.approx(expected, rel=1e-12)
        assert flicker_db(flicker(video, test)) == pytest.approx(-20 * math.log10(expected))


def test_the_largest_differences_do_not_overflow() -> None:
    video = np.zeros((3, 8, 8, 3), np.uint8)
    test = video.copy()
    video[1], test[0], test[2] = 255, 255, 255
    # One steps down by the whole range while the other steps up.
    assert flicker(video, test) == pytest.approx(2.0, rel=1e-12)
    assert region_errors(video, test).border == pytest.approx(1.0, rel=1e-12)


def test_fresh_noise_lies_3_db_below_psnr() -> None:
    video = moving()
    test = noisy(video, 6)
    assert flicker(video, test) == pytest.approx(math.sqrt(2) * 6 / 255, rel=0.01)
    assert psnr(video, test) - flicker_db(flicker(video, test)) == pytest.approx(10 * math.log10(2), abs=0.1)


def test_a_flash_raises_flicker_while_mean_psnr_barely_moves() -> None:
    video = moving(61, 24, 32)
    test = noisy(video, 6)
    flashing = test.copy()
    flashing[30] = np.clip(test[30].astype(int) + 40, 0, 255)
    assert 0 < video_psnr(video, test) - video_psnr(video, flashing) < 0.3
    assert flicker(video, flashing) > 1.3 * flicker(video, test)
    # The steps into and out of the flash stand out by far.
    pairs = list(zip(video, flashing, strict=True))
    steps = [flicker_step(pairs[index], pairs[index + 1]) for index in range(60)]
    assert sorted(np.argsort(steps)[-2:].tolist()) == [29, 30]
    assert sorted(steps)[-2] > 3 * sorted(steps)[-3]


def test_steps_pool_to_the_video_and_floats_agree() -> None:
    video, test = moving(), noisy(moving(), 9)
    pairs = list(zip(video, test, strict=True))
    steps = [flicker_step(pairs[index], pairs[index + 1]) for index in range(8)]
    errors = np.diff(unit(test) - unit(video), axis=0)
    assert steps == pytest.approx(np.sqrt(np.mean(errors**2, axis=(1, 2, 3))).tolist())
    assert pooled_flicker(steps) == flicker(video, test)
    assert flicker(unit(video), unit(test)) == pytest.approx(flicker(video, test), rel=1e-9)
    single = unit(video).astype(np.float32), unit(test).astype(np.float32)
    assert flicker(*single) == pytest.approx(flicker(video, test), rel=1e-5)


def test_swapping_the_arguments_changes_nothing() -> None:
    video, test = moving(), noisy(moving(), 9)
    assert flicker(video, test) == flicker(test, video)
    assert region_errors(video, test) == region_errors(test, video)


def test_inputs_are_left_as_they_were() -> None:
    video, test = unit(moving(3)), unit(noisy(moving(3), 5))
    copies = video.copy(), test.copy()
    flicker(video, test)
    region_errors(video, test)
    assert np.array_equal(video, copies[0])
    assert np.array_equal(test, copies[1])


@pytest.mark.parametrize("shape", [(37, 53), (64, 48), (4, 4), (11, 90)])
def test_a_constant_offset_is_alike_everywhere(shape: tuple[int, int]) -> None:
    frame = np.full((*shape, 3), 100, np.uint8)
    errors = region_errors(frame, frame + np.uint8(9))
    expected = (9 / 255) ** 2
    assert errors.border == pytest.approx(expected, rel=1e-12)
    assert errors.centre == pytest.approx(expected, rel=1e-12)
    assert np.asarray(errors.grid) == pytest.approx(np.full((4, 4), expected), rel=1e-12)
    assert errors.border_psnr == pytest.approx(20 * math.log10(255 / 9))
    assert errors.border_excess_db == pytest.approx(0, abs=1e-9)
    worst = worst_cell(errors.grid)
    assert worst is not None
    assert worst[1] == pytest.approx(1 / 16)


def test_no_error_has_no_worst_region() -> None:
    video = moving(2)
    errors = region_errors(video, video)
    assert (errors.border, errors.centre, errors.border_excess_db) == (0, 0, 0)
    assert errors.border_psnr == errors.centre_psnr == 100.0
    assert worst_cell(errors.grid) is None


@pytest.mark.parametrize(
    ("side", "cells"),
    [
        ((slice(0, 2), slice(None)), {"r1c1", "r1c2", "r1c3", "r1c4"}),
        ((slice(-2, None), slice(None)), {"r4c1", "r4c2", "r4c3", "r4c4"}),
        ((slice(None), slice(0, 2)), {"r1c1", "r2c1", "r3c1", "r4c1"}),
        ((slice(None), slice(-2, None)), {"r1c4", "r2c4", "r3c4", "r4c4"}),
    ],
)
def test_an_artefact_in_the_edge_band_shows_in_the_border(side: Any, cells: set[str]) -> None:
    video = noisy(moving(3, 64, 96), 3)
    test = noisy(video, 3, seed=1)
    clean = region_errors(video, test)
    assert abs(clean.border_excess_db) < 0.3
    for frame in test:
        frame[side] = np.clip(frame[side].astype(int) + 30, 0, 255)
    errors = region_errors(video, test)
    assert errors.centre == clean.centre
    assert errors.border_excess_db > 8
    worst = worst_cell(errors.grid)
    assert worst is not None
    assert worst[0] in cells


def test_an_artefact_inside_one_cell_is_named() -> None:
    video = moving(2, 64, 96)
    test = video.copy()
    # Row 2, column 3 of cells of 16 x 24; away from the edge.
    test[:, 20:28, 50:70] += np.uint8(30)
    errors = region_errors(video, test)
    assert worst_cell(errors.grid) == ("r2c3", pytest.approx(1.0))
    assert errors.border == 0.0
    assert errors.border_psnr == 100.0
    assert errors.border_excess_db < 0
    assert errors.grid[1][2] == pytest.approx((30 / 255) ** 2 * 8 * 20 / (16 * 24), rel=1e-12)


@pytest.mark.parametrize(("height", "width", "band"), [(64, 96, 4), (37, 53, 2), (53, 37, 2), (15, 90, 1), (4, 5, 1)])
def test_border_and_centre_against_a_mask(height: int, width: int, band: int) -> None:
    video, test = moving(3, height, width), noisy(moving(3, height, width), 20)
    inside = np.zeros((height, width), bool)
    inside[band : height - band, band : width - band] = True
    squares = (unit(test) - unit(video)) ** 2
    errors = region_errors(video, test)
    assert errors.border == pytest.approx(squares[:, ~inside].mean())
    assert errors.centre == pytest.approx(squares[:, inside].mean())
    whole = (errors.border * (~inside).sum() + errors.centre * inside.sum()) / inside.size
    assert whole == pytest.approx(squares.mean())
    assert region_errors(unit(video), unit(test)).border == pytest.approx(errors.border)


def test_a_video_pools_its_frames() -> None:
    video, test = moving(4), noisy(moving(4), 9)
    test[3] = video[3]
    frames = [region_errors(*pair) for pair in zip(video, test, strict=True)]
    errors = region_errors(video, test)
    assert errors == mean_regions(frames)
    assert errors.border == pytest.approx(np.mean([frame.border for frame in frames]))
    assert errors.grid[2][1] == pytest.approx(np.mean([frame.grid[2][1] for frame in frames]))


@pytest.mark.parametrize("metric", [flicker, region_errors])
@pytest.mark.parametrize(
    ("reference", "test", "message"),
    [
        (np.zeros((3, 8, 8, 3), np.uint8), np.zeros((3, 8, 9, 3), np.uint8), "same shape"),
        (np.zeros((3, 8, 8, 3), np.uint8), np.zeros((3, 8, 8, 3), np.float32), "same dtype"),
        (np.zeros((3, 8, 8, 3), np.uint8), np.zeros((4, 8, 8, 3), np.uint8), "same number of frames"),
        (np.zeros((3, 3, 8, 8), np.uint8), np.zeros((3, 3, 8, 8), np.uint8), "must be an RGB video"),
        (np.zeros((3, 8, 8, 3), np.int16), np.zeros((3, 8, 8, 3), np.int16), "uint8 or floating, got int16"),
        (np.zeros((3, 8, 8, 3)), np.full((3, 8, 8, 3), 1.5), r"test: floating frames must lie in \[0, 1\]"),
        (np.full((3, 8, 8, 3), np.nan), np.zeros((3, 8, 8, 3)), r"reference: floating frames must lie in"),
        (np.zeros((0, 8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8), "at least one, got 0 and 0"),
    ],
)
def test_bad_input(metric: Any, reference: np.ndarray, test: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(reference, test)


def test_too_little_to_measure() -> None:
    frame = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        flicker(frame[None], frame[None])
    with pytest.raises(ValueError, match="must be an RGB video"):
        flicker(frame, frame)
    with pytest.raises(ValueError, match="at least one step, got none"):
        pooled_flicker([])
    with pytest.raises(ValueError, match="at least 4 x 4, got 8 x 3"):
        region_errors(frame[:3], frame[:3])
    with pytest.raises(ValueError, match="same shape"):
        flicker_step((frame, frame), (frame[1:], frame[1:]))


def test_definitions_name_the_settings_that_are_used() -> None:
    assert set(DEFINITIONS) == {"flicker", "border_excess_db", "worst_region"}
    assert "units of the data range" in DEFINITIONS["flicker"]
    assert "1/16 of the shorter side" in DEFINITIONS["border_excess_db"]
    assert "at most 100 dB" in DEFINITIONS["border_excess_db"]
    assert "4 x 4" in DEFINITIONS["worst_region"]
