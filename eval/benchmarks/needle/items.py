"""Needles in haystacks: synthetic prompts whose answer stands somewhere in them, in the style of RULER.

    single      one code among sentences about nothing
    multikey    the same among codes of other towns
    tracking    a chain of names that stand for a number, beside a chain that stands for another; asked are all names

RULER: arXiv 2404.06654. Texts, names and numbers are this project's own. An item follows from its numbers alone.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

TASKS = ("single", "multikey", "tracking")
_DISTRACTORS = 8
_LINKS = 4

_ADJECTIVES = [
    "quiet",
    "old",
    "narrow",
    "bright",
    "distant",
    "wooden",
    "early",
    "heavy",
    "gentle",
    "rusty",
    "pale",
    "steep",
]
_NOUNS = [
    "river",
    "garden",
    "train",
    "market",
    "harbour",
    "engine",
    "lantern",
    "orchard",
    "bridge",
    "meadow",
    "kettle",
    "tower",
]
_VERBS = [
    "waits",
    "turns",
    "rests",
    "leans",
    "fades",
    "hums",
    "returns",
    "drifts",
    "gathers",
    "opens",
    "settles",
    "remains",
]
_PLACES = ["station", "hill", "window", "road", "field", "library", "coast", "yard", "mill", "valley", "stairs", "gate"]
_TOWNS = [
    "Arlen",
    "Brisk",
    "Corvale",
    "Dunmere",
    "Eastwick",
    "Farrow",
    "Glenhollow",
    "Hartsea",
    "Ironford",
    "Juniper",
    "Kestrel",
    "Larkspur",
    "Millbrae",
    "Northam",
    "Oakridge",
    "Pinefell",
    "Quarrow",
    "Redmoor",
    "Stonely",
    "Thornby",
    "Umber",
    "Velden",
    "Westmere",
    "Yarrow",
]


@dataclass(frozen=True)
class Item:
    """One question about a long text; an answer is right in so far as it holds the words of `answers`."""

    task: str
    length: int
    depth: float
    sample: int
    prompt: str
    answers: tuple[str, ...]

    @property
    def key(self) -> str:
        """Its name in files and tables."""
        return f"{self.task}-{self.length}-{self.depth:g}-{self.sample}"


def make_item(task: str, length: int, depth: float, sample: int, count: Callable[[str], int]) -> Item:
    """The item of a task whose prompt has at most `length` tokens, and nearly as many.

    Args:
        depth: where the needle stands, in percent of the text; of a chain, its first link.
        sample: number of the item among those of its task, length and depth.
        count: the number of tokens of a text.

    Raises:
        ValueError: another task or depth, or a length that not even the needles fit into.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if not 0 <= depth <= 100:
        raise ValueError(f"depth must be from 0 to 100 percent, got {depth}")
    rng = np.random.default_rng([TASKS.index(task), length, round(100 * depth), sample])
    needles, places, question, answers = _tracking(rng, depth) if task == "tracking" else _codes(rng, depth, task)
    intro = "Read the text and answer the question after it.\n\n"
    frame = count(intro + " ".join(needles) + question)
    sentences = []
    used = frame
    while used < length:
        sentences.append(_sentence(rng))
        used += count(" " + sentences[-1])
    # Tokens of a text are not those of its parts, so what is too much goes.
    while True:
        prompt = f"{intro}{_placed(sentences, needles, places)}\n\n{question}"
        over = count(prompt) - length
        if over <= 0:
            return Item(task, length, depth, sample, prompt, answers)
        if not sentences:
            raise ValueError(f"a prompt of {length} tokens is too short for task {task}, which needs {length + over}")
        del sentences[-max(1, over * len(sentences) // max(used, 1)) :]


def score(answers: tuple[str, ...], reply: str) -> float:
    """The share of `answers` that occur in the reply as whole words."""
    return sum(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", reply) is not None for word in answers) / len(answers)


def _codes(rng: np.random.Generator, depth: float, task: str) -> tuple[list[str], list[float], str, tuple[str, ...]]:
    number = 1 if task == "single" else 1 + _DISTRACTORS
    towns = rng.choice(_TOWNS, size=number, replace=False)
    codes = rng.choice(np.arange(1_000_000, 10_000_000), size=number, replace=False)
    needles = [f"The code of {town} is {code}." for town, code in zip(towns, codes, strict=True)]
    places = [depth, *rng.uniform(0, 100, size=number - 1)]
    question = f"Question: What is the code of {towns[0]}? Answer with the number alone.\nAnswer:"
    return needles, places, question, (str(codes[0]),)


def _tracking(rng: np.random.Generator, depth: float) -> tuple[list[str], list[float], str, tuple[str, ...]]:
    letters = np.array(list(string.ascii_uppercase))
    names: list[str] = []
    while len(names) < 2 * _LINKS:
        name = "".join(rng.choice(letters, size=5))
        names += [name] if name not in names else []
    wanted, other = names[:_LINKS], names[_LINKS:]
    first, second = rng.choice(np.arange(10_000, 100_000), size=2, replace=False)
    needles, places = [], []
    for chain, number, start in ((wanted, first, depth), (other, second, rng.uniform(0, 100))):
        needles += [f"Let {chain[0]} be {number}."]
        needles += [f"Let {name} be the same as {before}." for before, name in itertools.pairwise(chain)]
        # Each link after the one that it names.
        places += [start + (100 - start) * link / _LINKS for link in range(_LINKS)]
    question = f"Question: Which names stand for {first}? List all {_LINKS} of them.\nAnswer:"
    return needles, places, question, tuple(wanted)


def _sentence(rng: np.random.Generator) -> str:
    adjective, noun, verb, place = (rng.choice(words) for words in (_ADJECTIVES, _NOUNS, _VERBS, _PLACES))
    return f"The {adjective} {noun} {verb} by the {place}."


def _placed(sentences: list[str], needles: list[str], places: list[float]) -> str:
    """The sentences with each needle before the one that its place in percent falls on."""
    before: dict[int, list[str]] = {}
    for needle, place in zip(needles, places, strict=True):
        before.setdefault(round(place / 100 * len(sentences)), []).append(needle)
    parts: list[str] = []
    for index in range(len(sentences) + 1):
        parts += before.get(index, [])
        parts += sentences[index : index + 1]
    return " ".join(parts)
