"""Stories of the shapes world: several scenes in a row, and questions about them with their answers.

A story is what a model of video understanding is asked about: long enough that its prompt is long, with questions
that name a scene by its place ("the second shape") or by what it shows ("the red circle").
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from xattn_video_pipelines.demo import world

# Frames of a scene, at world.FPS: four seconds.
SCENE_FRAMES = 32
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
KINDS = ("colour", "shape", "motion", "background", "order")
# How scenes are drawn: those that training may see, or the others.
PARTS = ("training", "held-out")
# So many looks occur only once in a story of any length: questions use them as names.
_ONCE = 8

# Questions that name a scene by its place, one of ORDINALS or "last".
BY_PLACE = {
    "colour": "What colour was the {} shape?",
    "shape": "What shape was the {} one?",
    "motion": "How did the {} shape move?",
    "background": "What was behind the {} shape?",
}
_BY_LOOK = {"motion": "How did the {} move?", "background": "What was behind the {}?"}
# Questions about a story of one scene.
ALONE = {
    "colour": "What colour is the shape?",
    "shape": "What shape is it?",
    "motion": "How does the shape move?",
    "background": "What is behind the shape?",
}
_AFTER, _FIRST = "What came after the {}?", "What came first, the {} or the {}?"


@dataclass(frozen=True)
class Story:
    """Scenes in a row; `seed` says where in the picture, and how fast."""

    scenes: tuple[world.Scene, ...]
    seed: int

    def render(self, every: int = 1, offset: int = 0) -> np.ndarray:
        """Every `every`-th frame from the `offset`-th on, uint8 RGB `[frames, 128, 128, 3]`.

        Raises:
            ValueError: `every` does not divide SCENE_FRAMES, or `offset` is not below it.
        """
        if SCENE_FRAMES % every or not 0 <= offset < every:
            raise ValueError(f"every must divide {SCENE_FRAMES} and offset be below it, got {every} and {offset}")
        seeds = np.random.default_rng([self.seed, 2]).integers(2**31, size=len(self.scenes))
        clips = [
            world.render(scene, int(seed), frames=SCENE_FRAMES, taken=slice(offset, None, every))
            for scene, seed in zip(self.scenes, seeds, strict=True)
        ]
        return np.concatenate(clips)


@dataclass(frozen=True)
class Asked:
    """A question about a story: one of KINDS, its words, the words of its answer, and the scene that has the answer."""

    kind: str
    question: str
    answer: str
    scene: int


def draw_story(rng: np.random.Generator, scenes: int, part: str) -> Story:
    """A story of so many scenes of a part of the world; neighbours differ in colour or shape.

    Raises:
        ValueError: no scene, or an unknown part.
    """
    if scenes < 1:
        raise ValueError(f"scenes must be at least 1, got {scenes}")
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    pool = world.training_scenes() if part == "training" else world.held_out_scenes()
    of_look: dict[str, list[world.Scene]] = {}
    for scene in pool:
        of_look.setdefault(look(scene), []).append(scene)
    looks = [str(one) for one in rng.permutation(list(of_look))]
    # Only in stories longer than that do looks come again, and even there not all of them.
    while len(looks) < scenes:
        looks += [str(one) for one in rng.permutation(looks[_ONCE : len(of_look)])]
    looks = _apart(rng, looks[:scenes])
    chosen = [of_look[one][rng.integers(len(of_look[one]))] for one in looks]
    return Story(tuple(chosen), int(rng.integers(2**31)))


def _apart(rng: np.random.Generator, looks: list[str]) -> list[str]:
    """The looks in a random order in which no two neighbours are the same."""
    while True:
        left, order = list(looks), [""]
        while left:
            others = [number for number, one in enumerate(left) if one != order[-1]]
            if not others:
                break
            order.append(left.pop(others[rng.integers(len(others))]))
        if not left:
            return order[1:]


def look(scene: world.Scene) -> str:
    """What a question calls a scene: its colour and shape."""
    return f"{scene.colour} {scene.shape}"


def draw_question(rng: np.random.Generator, story: Story, kind: str) -> Asked:
    """A question of one of KINDS about a story.

    A scene is named by its place, one of the first eight or the last, or where that is not what is asked, by a look
    that no other scene has.

    Raises:
        ValueError: unknown kind, one about the order of a single scene, or about looks where none occurs once.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    scenes = story.scenes
    if kind == "order":
        if len(scenes) < 2:
            raise ValueError("a single scene has no order")
        return _order(rng, scenes)
    if len(scenes) == 1:
        return Asked(kind, ALONE[kind], str(getattr(scenes[0], kind)), 0)
    if kind in _BY_LOOK and rng.random() < 0.5:
        once = _once(scenes)
        number = once[rng.integers(len(once))]
        question = _BY_LOOK[kind].format(look(scenes[number]))
    else:
        places = min(len(scenes), len(ORDINALS))
        number = int(rng.integers(places + 1))
        # The last has a name in a story of any length.
        place = "last" if number == places else ORDINALS[number]
        number = len(scenes) - 1 if number == places else number
        question = BY_PLACE[kind].format(place)
    return Asked(kind, question, str(getattr(scenes[number], kind)), number)


def words() -> list[str]:
    """Every word and sign of the questions and answers, in lower case, each once."""
    templates = (*BY_PLACE.values(), *_BY_LOOK.values(), *ALONE.values(), _AFTER, _FIRST)
    own = re.findall(r"\w+|[^\w\s]", " ".join(templates).replace("{}", "").lower())
    named = (*world.COLOURS, *world.SHAPES, *world.MOTIONS, *world.BACKGROUNDS)
    return list(dict.fromkeys([*own, *ORDINALS, "last", *named]))


def _order(rng: np.random.Generator, scenes: tuple[world.Scene, ...]) -> Asked:
    once = _once(scenes)
    if rng.random() < 0.5:
        befores = [number for number in once if number + 1 < len(scenes)]
        number = befores[rng.integers(len(befores))]
        return Asked("order", _AFTER.format(look(scenes[number])), look(scenes[number + 1]), number + 1)
    one, other = (int(number) for number in rng.choice(once, size=2, replace=False))
    first = min(one, other)
    return Asked("order", _FIRST.format(look(scenes[one]), look(scenes[other])), look(scenes[first]), first)


def _once(scenes: tuple[world.Scene, ...]) -> list[int]:
    """The scenes whose look no other has, at least two."""
    counts = Counter(map(look, scenes))
    once = [number for number, scene in enumerate(scenes) if counts[look(scene)] == 1]
    if len(once) < 2:
        raise ValueError("a question by look needs two looks that occur once")
    return once
