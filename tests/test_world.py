"""The shapes world: what is drawn, that it is the same each time, and that the held-out fifth is kept apart."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from xattn_video_pipelines.demo.world import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    Scene,
    all_scenes,
    caption,
    held_out_scenes,
    render,
    training_scenes,
)

ATTRIBUTES = ("colour", "shape", "motion", "background")


def combination(scene: Scene) -> tuple[str, ...]:
    return tuple(getattr(scene, name) for name in ATTRIBUTES)


def centres(video: np.ndarray) -> np.ndarray:
    """x and y of the thing's centre of mass, a row a frame."""
    mask = np.abs(video.astype(int) - video[0, 0, 0]).sum(-1) > 40
    return np.array([(np.nonzero(frame)[1].mean(), np.nonzero(frame)[0].mean()) for frame in mask])


def test_the_world_has_every_combination_once() -> None:
    scenes = all_scenes()
    assert len(set(scenes)) == len(scenes) == 8 * 4 * 5 * 3 * 2
    assert (len(COLOURS), len(SHAPES), len(MOTIONS), len(BACKGROUNDS), len(SIZES)) == (8, 4, 5, 3, 2)


def test_a_fifth_is_held_out_and_no_combination_is_on_both_sides() -> None:
    held_out, training = held_out_scenes(), training_scenes()
    assert len(held_out) * 5 == len(held_out) + len(training) == 960
    # Sizes do not count: a caption without the size must not name a scene of the other side.
    assert not {combination(scene) for scene in held_out} & {combination(scene) for scene in training}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_each_word_is_held_out_about_as_often(name: str) -> None:
    shares = Counter(getattr(scene, name) for scene in held_out_scenes())
    everything = Counter(getattr(scene, name) for scene in all_scenes())
    assert set(shares) == set(everything)
    assert all(0.18 < shares[word] / everything[word] < 0.22 for word in everything)


def test_training_shows_every_pair_of_words() -> None:
    scenes = training_scenes()
    for first in ATTRIBUTES:
        for second in ATTRIBUTES:
            pairs = {(getattr(scene, first), getattr(scene, second)) for scene in all_scenes()}
            assert {(getattr(scene, first), getattr(scene, second)) for scene in scenes} == pairs


def test_captions_name_the_scene_and_vary() -> None:
    for number, scene in enumerate(all_scenes()[::7]):
        words = caption(scene, number).replace(",", "").split()
        assert {scene.colour, scene.shape, scene.background} <= set(words)
        assert (scene.motion in words) or (scene.motion == "still" and "not" in words)
        others = set(COLOURS) | set(SHAPES) | set(MOTIONS) | set(BACKGROUNDS)
        assert set(words) & others <= {scene.colour, scene.shape, scene.motion, scene.background}
    scene = Scene("red", "star", "left", "grey", "small")
    wordings = {caption(scene, seed) for seed in range(200)}
    assert len(wordings) == 27
    assert any("small" in words for words in wordings)
    assert any("small" not in words and "little" not in words for words in wordings)
    assert caption(scene, 5) == caption(scene, 5)


def test_a_seed_gives_the_same_pixels_and_another_seed_others() -> None:
    scene = Scene("pink", "triangle", "up", "black", "large")
    first = render(scene, 3)
    assert first.shape == (33, 128, 128, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, render(scene, 3))
    assert (first != render(scene, 4)).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("motion", MOTIONS)
def test_things_go_where_they_should_and_stay_in_the_picture(shape: str, motion: str) -> None:
    for size in SIZES:
        for seed in range(3):
            video = render(Scene("red", shape, motion, "white", size), seed)
            border = np.concatenate([video[:, 0], video[:, -1], video[:, :, 0], video[:, :, -1]], axis=1)
            assert (border == BACKGROUNDS["white"]).all()
            steps = np.diff(centres(video), axis=0)
            direction = np.array(MOTIONS[motion])
            # The mask's centre wobbles by a fraction of a pixel.
            speed = steps.mean(axis=0) @ direction
            assert motion == "still" or SPEEDS[0] - 0.05 <= speed <= SPEEDS[1] + 0.05
            assert np.abs(steps.mean(axis=0) - speed * direction).max() < 0.05


def test_left_is_left_and_up_is_up() -> None:
    for motion, axis, sign in (("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)):
        path = centres(render(Scene("red", "circle", motion, "white", "small"), 0))
        assert sign * (path[-1] - path[0])[axis] > 30


def test_edges_are_smooth_and_insides_have_the_named_colour() -> None:
    video = render(Scene("blue", "circle", "still", "white", "large"), 1, frames=1)
    x, y = np.rint(centres(video)[0]).astype(int)
    assert tuple(video[0, y, x]) == COLOURS["blue"]
    levels = {tuple(pixel) for pixel in video.reshape(-1, 3)}
    assert len(levels) > 20


def test_the_four_shapes_differ_in_area_and_outline() -> None:
    areas = {}
    for shape in SHAPES:
        video = render(Scene("red", shape, "still", "black", "large"), 1, frames=1)
        mask = video[0, :, :, 0] > 110
        rows, columns = np.nonzero(mask)
        areas[shape] = mask.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
    assert areas["square"] == pytest.approx(1.0, abs=0.02)
    assert areas["circle"] == pytest.approx(np.pi / 4, abs=0.02)
    assert areas["triangle"] == pytest.approx(0.5, abs=0.03)
    assert 0.3 < areas["star"] < 0.5


def test_bad_arguments_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"colour must be one of red, .* got 'teal'"):
        Scene("teal", "star", "left", "grey", "small")
    scene = Scene("red", "star", "left", "grey", "large")
    with pytest.raises(ValueError, match="frames must be at least 1, got 0"):
        render(scene, 0, frames=0)
    with pytest.raises(ValueError, match="64 x 64 is too small for 33 frames of a large shape"):
        render(scene, 0, height=64, width=64)
