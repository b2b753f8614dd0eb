"""The judge reads rendered ground truth back, codec noise included, and does not see shapes that are not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from xattn_video_pipelines.demo.judge import Verdict, judge
from xattn_video_pipelines.demo.world import COLOURS, MOTIONS, SHAPES, Scene, all_scenes, render
from xattn_video_pipelines.video.io import read_video, write_video

SCENES = all_scenes()


def through_codec(video: np.ndarray, folder: Path) -> np.ndarray:
    write_video(folder / "clip.mp4", video, fps=8)
    return read_video(folder / "clip.mp4")


def accuracy(numbers: np.ndarray, folder: Path) -> dict[str, float]:
    """The share of rendered and coded scenes that the judge reads right, by attribute; the size with them."""
    right: dict[str, list[bool]] = {}
    for number in numbers:
        scene = SCENES[number]
        verdict = judge(through_codec(render(scene, int(number) + 1000), folder))
        for name, value in {**verdict.right(scene), "size": verdict.size == scene.size}.items():
            right.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in right.items()}


def test_ground_truth_is_read_right_after_the_codec(tmp_path: Path) -> None:
    # 29 and 960 share no factor: every word is met.
    scores = accuracy(np.arange(0, 960, 29), tmp_path)
    assert scores == dict.fromkeys(scores, 1.0)


@pytest.mark.slow
def test_at_least_99_percent_of_all_scenes_are_read_right_after_the_codec(tmp_path: Path) -> None:
    scores = accuracy(np.arange(960), tmp_path)
    assert min(scores.values()) >= 0.99, scores


def test_noise_and_blur_do_not_change_the_verdict() -> None:
    from skimage.filters import gaussian

    rng = np.random.default_rng(0)
    for number in (5, 333, 614, 905):
        video = render(SCENES[number], number)
        blurred = gaussian(video.astype(float), sigma=(0, 1.2, 1.2, 0)) + rng.normal(0, 4, video.shape)
        assert judge(np.clip(np.rint(blurred), 0, 255).astype(np.uint8)).right(SCENES[number])["all"]


@pytest.mark.parametrize(("height", "width"), [(96, 144), (160, 120)])
def test_other_sizes_of_picture_do(height: int, width: int) -> None:
    scene = Scene("orange", "square", "still", "grey", "small")
    assert judge(render(scene, 2, height=height, width=width)).right(scene)["all"]


def test_each_wrong_word_is_noticed() -> None:
    seen = judge(render(Scene("red", "circle", "left", "white", "large"), 0))
    assert seen.right(Scene("red", "circle", "left", "white", "small")) == dict.fromkeys(seen.right(SCENES[0]), True)
    for other in (
        Scene("pink", "circle", "left", "white", "large"),
        Scene("red", "square", "left", "white", "large"),
        Scene("red", "circle", "up", "white", "large"),
        Scene("red", "circle", "left", "grey", "large"),
    ):
        assert sum(seen.right(other).values()) == 3


def test_an_empty_picture_has_a_background_and_nothing_else() -> None:
    seen = judge(np.full((9, 128, 128, 3), 16, np.uint8))
    assert seen == Verdict(None, None, None, "black", None, 0.0, 0.0)


def test_two_things_are_not_one() -> None:
    scene = Scene("red", "circle", "still", "white", "small")
    video = render(scene, 0, frames=9, width=256)
    twice = np.concatenate([video[:, :, :128], video[:, :, :128], video[:, :, 128:]], axis=2)
    both = np.minimum(twice, np.roll(twice, 128, axis=2))
    seen = judge(both)
    assert (seen.shape, seen.motion, seen.one_thing) == (None, None, 0.0)


def test_a_smear_is_no_shape_and_a_foreign_colour_no_word() -> None:
    video = np.full((9, 128, 128, 3), 240, np.uint8)
    video[:, 60:66, 10:118] = (120, 90, 40)
    seen = judge(video)
    assert (seen.colour, seen.shape, seen.background) == (None, None, "white")


def test_a_thing_that_comes_back_is_not_still() -> None:
    there = render(Scene("blue", "circle", "right", "white", "small"), 0)
    seen = judge(np.concatenate([there, there[::-1]]))
    assert (seen.colour, seen.shape, seen.motion) == ("blue", "circle", None)


def test_a_diagonal_is_no_direction() -> None:
    video = render(Scene("blue", "circle", "right", "white", "small"), 0)
    shifted = np.stack([np.roll(frame, time - 16, axis=0) for time, frame in enumerate(video)])
    centre_rows = np.nonzero((video[0] != 240).any(-1))[0]
    video = np.roll(shifted, 64 - int(centre_rows.mean()), axis=1)
    assert judge(video).motion is None


def test_verdicts_are_json_ready() -> None:
    seen = judge(render(SCENES[0], 0)).to_dict()
    assert set(seen) == {"colour", "shape", "motion", "background", "size", "one_thing", "overlap"}
    assert seen["colour"] in COLOURS
    assert seen["shape"] in SHAPES
    assert seen["motion"] in MOTIONS
    assert type(seen["overlap"]) is float


@pytest.mark.parametrize(
    "video",
    [
        np.zeros((3, 64, 64), np.uint8),
        np.zeros((3, 64, 64, 3), np.float32),
        np.zeros((0, 64, 64, 3), np.uint8),
        np.zeros((3, 16, 64, 3), np.uint8),
    ],
)
def test_bad_videos_are_refused(video: np.ndarray) -> None:
    with pytest.raises(ValueError, match="video must"):
        judge(video)
