"""Stories of the shapes world: scenes in a row, questions whose answers follow from them, and nothing held out."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest

from xattn_video_pipelines.demo import stories, world
from xattn_video_pipelines.demo.judge import judge
from xattn_video_pipelines.demo.stories import KINDS, ORDINALS, Story, draw_question, draw_story, look

RED = world.Scene("red", "circle", "left", "white", "small")
BLUE = world.Scene("blue", "star", "up", "black", "large")
GREEN = world.Scene("green", "square", "still", "grey", "small")


def answered(story: Story, question: str) -> str:
    """The answer, worked out from the words of the question alone."""
    question = " ".join(re.findall(r"\w+", question.lower()))
    looks = [look(scene) for scene in story.scenes]
    named = [one for one in looks if f"the {one} " in f"{question} "]
    if question.startswith("what came after"):
        return looks[looks.index(named[0]) + 1]
    if question.startswith("what came first"):
        return min(named, key=looks.index)
    asked = {"colour": "colour", "shape": "shape", "move": "motion", "behind": "background"}
    kind = next(asked[word] for word in ("colour", "move", "behind", "shape") if word in question.split())
    place = re.search(rf"the ({'|'.join(ORDINALS)}|last) ", question)
    number = 0
    if named:
        number = looks.index(named[0])
    elif place:
        number = -1 if place[1] == "last" else ORDINALS.index(place[1])
    return str(getattr(story.scenes[number], kind))


@pytest.mark.parametrize("part", stories.PARTS)
@pytest.mark.parametrize("scenes", [1, 2, 5, 16, 64])
def test_every_answer_follows_from_the_story(scenes: int, part: str) -> None:
    rng = np.random.default_rng(scenes)
    known = set(stories.words())
    for _ in range(20):
        story = draw_story(rng, scenes, part)
        for kind in KINDS if scenes > 1 else KINDS[:-1]:
            asked = draw_question(rng, story, kind)
            assert asked.answer == answered(story, asked.question), asked
            found = story.scenes[asked.scene]
            assert asked.answer == (look(found) if kind == "order" else getattr(found, kind))
            # Of many scenes another one has the same colour: only this one is meant.
            if place := re.search(rf"the ({'|'.join(ORDINALS)}|last) ", asked.question):
                assert asked.scene == (scenes - 1 if place[1] == "last" else ORDINALS.index(place[1]))
            assert set(re.findall(r"\w+|[^\w\s]", f"{asked.question} {asked.answer}".lower())) <= known


@pytest.mark.parametrize(("part", "held_out"), [("training", False), ("held-out", True)])
def test_a_story_has_scenes_of_its_part_alone(part: str, held_out: bool) -> None:
    rng = np.random.default_rng(0)
    seen = {scene for _ in range(100) for scene in draw_story(rng, 8, part).scenes}
    assert {world.is_held_out(scene) for scene in seen} == {held_out}
    assert len(seen) > (150 if held_out else 400)


def test_neighbours_differ_and_long_stories_have_shapes_that_come_once() -> None:
    rng = np.random.default_rng(0)
    for scenes in (2, 16, 32, 33, 64, 600):
        looks = [look(scene) for scene in draw_story(rng, scenes, "held-out").scenes]
        assert len(looks) == scenes
        assert all(one != other for one, other in pairwise(looks))
        assert sum(looks.count(one) == 1 for one in looks) >= min(scenes, 8)


def test_the_scenes_are_shown_one_after_the_other() -> None:
    story = Story((RED, BLUE, GREEN), seed=3)
    frames = story.render()
    assert frames.shape == (3 * stories.SCENE_FRAMES, 128, 128, 3)
    for scene, part in zip(story.scenes, np.split(frames, 3), strict=True):
        seen = judge(part)
        assert (seen.colour, seen.shape, seen.motion, seen.background) == (
            scene.colour, scene.shape, scene.motion, scene.background,
        )  # fmt: skip
    assert np.array_equal(story.render(every=4), frames[::4])
    assert np.array_equal(story.render(every=8, offset=3), frames[3::8])


def test_questions_use_every_way_to_name_a_scene() -> None:
    rng = np.random.default_rng(0)
    story = Story((RED, BLUE, GREEN), seed=0)
    asked = {draw_question(rng, story, kind).question for kind in KINDS for _ in range(100)}
    for part in ("the second shape", "the last shape", "the blue star move", "behind the red circle", "came after"):
        assert any(part in question for question in asked), part
    assert any(question.startswith("What came first, the ") for question in asked)
    assert not any("fourth" in question or "after the green square" in question for question in asked)


def test_what_cannot_be_told_or_asked() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="scenes must be at least 1, got 0"):
        draw_story(rng, 0, "training")
    with pytest.raises(ValueError, match="part must be one of training, held-out, got 'test'"):
        draw_story(rng, 1, "test")
    with pytest.raises(ValueError, match=r"kind must be one of .*, got 'size'"):
        draw_question(rng, Story((RED,), 0), "size")
    with pytest.raises(ValueError, match="needs two looks that occur once"):
        draw_question(rng, Story((RED, RED), 0), "order")
    with pytest.raises(ValueError, match="a single scene has no order"):
        draw_question(rng, Story((RED,), 0), "order")
    for every, offset in ((5, 0), (4, 4), (4, -1)):
        with pytest.raises(ValueError, match=f"every must divide 32 and offset be below it, got {every} and {offset}"):
            Story((RED,), 0).render(every, offset)
