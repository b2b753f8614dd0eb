"""Trains the demo's video-understanding model on stories of the shapes world: one scene first, long stories last.

Every step shows new stories and asks several questions about each at once. A question sees its story and itself
alone and stands where it would stand as the only one, so one step does the work of many, and no question can be
answered from another.

Its vision tower is trained before, on two frames at a time (`train_eyes`). What a scene shows, which one it is, and
what the one before it showed is also read off its tokens halfway through the model. Off each token that a word of an
answer follows is read what the question names there, and a layer later which scenes these are and which one is meant.
Linear maps do that which are trained with the model and then thrown away. The answers alone, a few dozen words a step,
did not teach it to find a scene by its look, nor an answer's second word to find it again.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xattn_video_pipelines.common.program import Parser, run_program
from xattn_video_pipelines.demo import stories, watcher, world
from xattn_video_pipelines.demo.stories import Asked, Story
from xattn_video_pipelines.demo.training.eyes import SHOWN, Eyes, judged, shown, train_eyes
from xattn_video_pipelines.demo.training.loop import Plan, mixed_precision, phase_at, train

LEARNING_RATE = 1e-3
# Muon's, of the two stages; and what is in the names of the parameters that it trains.
EYE_RATE, STORY_RATE = 1e-2, 3e-3
BLOCKS = ("visual.blocks.", "language_model.layers.")
# The layer of the language model after which scenes are read off their tokens.
READ_AFTER = 2
# What is read, and how many values it has; before the first scene there is nothing.
READ = {
    **SHOWN,
    "place": 16,
    "colour before": len(world.COLOURS) + 1,
    "shape before": len(world.SHAPES) + 1,
}
# What a question names: of these words the first ones in it, so many, or none.
NAMED = ((tuple(world.COLOURS), 2), (world.SHAPES, 2), ((*stories.ORDINALS, "last"), 1))
_IGNORED = -100


@dataclass(frozen=True)
class Phase:
    """Up to the share `until` of all steps: stories that all have one of `lengths`, drawn anew for each step.

    A step shows as many of them as come to at most `scenes`, but at least one, and asks `questions` about them all.
    """

    until: float
    lengths: tuple[int, ...]
    scenes: int
    questions: int


PHASES = (
    Phase(0.10, (1, 2), 16, 128),
    Phase(0.40, (2, 3, 4), 16, 128),
    Phase(1.00, (1, 2, 4, 8, 8, 16, 16), 16, 128),
)


@dataclass(frozen=True)
class Batch:
    """What a step sees: stories of the same number of scenes, and for each its questions and the first frame shown."""

    stories: list[Story]
    asked: list[list[Asked]]
    offsets: list[int]


def draw_batch(seed: int, step: int, steps: int, phases: tuple[Phase, ...] = PHASES) -> Batch:
    """The batch of a step, from the seed and the step alone."""
    rng = np.random.default_rng([seed, step])
    phase = phase_at(phases, step, steps)
    length = int(rng.choice(phase.lengths))
    told = [stories.draw_story(rng, length, "training") for _ in range(max(1, phase.scenes // length))]
    # The order of scenes is the hardest: as many questions as of three other kinds.
    kinds = [*stories.KINDS, "order", "order"] if length > 1 else list(stories.KINDS[:-1])
    each = max(1, phase.questions // len(told))
    asked = [
        [stories.draw_question(rng, story, kinds[number % len(kinds)]) for number in range(each)] for story in told
    ]
    return Batch(told, asked, rng.integers(watcher.EVERY, size=len(told)).tolist())


@dataclass(frozen=True)
class Tokens:
    """A step's stories and questions as the model's inputs.

    `ids` and `labels` are int64 `[stories, tokens]`, a label being the token that should follow or -100;
    `positions` int64 `[3, stories, tokens]` in time, height and width; `mask` bool `[stories, 1, tokens, tokens]`,
    True where a token (the third axis) sees another.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor

    def telling(self, stop: int) -> torch.Tensor:
        """Where a word of an answer follows, bool `[stories, tokens]`; `stop` is the token after the last word."""
        return (self.labels != _IGNORED) & (self.labels != stop)


def tokenise(tokenizer: Any, batch: Batch, grid: tuple[int, int, int]) -> Tokens:
    """Lay out each story once and its questions behind it, each of them as if it were the only one.

    Args:
        grid: the video's tokens in time, height and width.
    """
    video = int(np.prod(grid))
    start, pad, end, stop, answer = tokenizer.convert_tokens_to_ids(
        ["<|vision_start|>", "<|video_pad|>", "<|vision_end|>", "</s>", "<answer>"]
    )
    head = [start, *[pad] * video, end]
    places = torch.stack(torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")).flatten(1)
    after = 1 + max(grid)
    prefix = torch.cat([torch.zeros(3, 1), 1 + places, torch.full((3, 1), after)], dim=1).long()
    rows = []
    texts = [text for asked in batch.asked for one in asked for text in (one.question, one.answer)]
    words = iter(tokenizer(texts).input_ids)
    for asked in batch.asked:
        ids, row_labels, owner = list(head), [_IGNORED] * len(head), [0] * len(head)
        spots: list[int] = []
        for number in range(1, len(asked) + 1):
            question, reply = [*next(words), answer], [*next(words), stop]
            ids += question + reply[:-1]
            row_labels += [_IGNORED] * (len(question) - 1) + reply
            spots += range(after + 1, after + len(question) + len(reply))
            owner += [number] * (len(question) + len(reply) - 1)
        rows.append((ids, row_labels, spots, owner))
    longest = max(len(ids) for ids, *_ in rows)
    shape = (len(rows), longest)
    tokens, labels, owners = torch.zeros(shape).long(), torch.full(shape, _IGNORED), torch.full(shape, -1)
    positions = torch.zeros(3, *shape).long()
    for number, (ids, row_labels, spots, owner) in enumerate(rows):
        tokens[number, : len(ids)] = torch.tensor(ids)
        labels[number, : len(ids)] = torch.tensor(row_labels)
        owners[number, : len(ids)] = torch.tensor(owner)
        positions[:, number, : len(ids)] = torch.cat([prefix, torch.tensor(spots).expand(3, -1)], dim=1)
    same = owners[:, :, None] == owners[:, None]
    mask = (same | (owners[:, None] == 0)).tril()
    return Tokens(tokens, labels, positions, mask[:, None])


class Learner(torch.nn.Module):
    """A model in training, with the linear maps that read scenes off its tokens and frames off its vision tower."""

    def __init__(self, model: Any, seed: int) -> None:
        super().__init__()
        self.watcher = model
        width = model.config.text_config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.readers = torch.nn.ModuleList(torch.nn.Linear(width, count) for count in READ.values())
            self.naming = torch.nn.ModuleList(
                torch.nn.Linear(width, len(names) + 1) for names, times in NAMED for _ in range(times)
            )
            # The scene that is meant, and those of the first and the second look that are named; there may be none.
            self.finding = torch.nn.ModuleList(torch.nn.Linear(width, READ["place"] + 1) for _ in range(3))
        self.eyes = Eyes(model.model.visual, width, seed)


def scene_labels(batch: Batch) -> torch.Tensor:
    """What READ names of each scene, int64 `[stories, scenes, len(READ)]`."""

    def label(story: Story, number: int) -> list[int]:
        before = shown(story.scenes[number - 1])[:2] if number else [len(world.COLOURS), len(world.SHAPES)]
        return [*shown(story.scenes[number]), number, *before]

    return torch.tensor([[label(story, number) for number in range(len(story.scenes))] for story in batch.stories])


def question_labels(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What NAMED names of a question, and the scene that it means with those that it names by their looks.

    A row for each word of its answer, int64 `[words, 5]` and `[words, 3]`; what is not named is the highest value.
    """

    def padded(values: list[int], times: int, none: int) -> list[int]:
        return (values + [none] * times)[:times]

    named, found = [], []
    for story, several in zip(batch.stories, batch.asked, strict=True):
        looks = [stories.look(scene) for scene in story.scenes]
        for asked in several:
            spoken = re.findall(r"\w+", asked.question.lower())
            # A look is two words; one that is named occurs once.
            pairs = [" ".join(pair) for pair in itertools.pairwise(spoken)]
            scenes = padded([looks.index(pair) for pair in pairs if pair in looks], 2, READ["place"])
            mentioned = [
                value
                for names, times in NAMED
                for value in padded([names.index(word) for word in spoken if word in names], times, len(names))
            ]
            words = len(asked.answer.split())
            named += [mentioned] * words
            found += [[asked.scene, *scenes]] * words
    return torch.tensor(named), torch.tensor(found)


def batch_loss(learner: Learner, processor: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """The losses of a step, and how much of it is right already.

    `loss`: the mean cross-entropy of the answers' tokens, plus that of what is read off the scenes' tokens, off the
    questions and off the frames. Shares that are right: `right` of the answers' words, `read` of the scenes' values,
    `seen` of the frames', `found` of the scenes that are meant and named ("none" counts).
    """
    model, device = learner.watcher, learner.watcher.device
    videos = [story.render(watcher.EVERY, offset) for story, offset in zip(batch.stories, batch.offsets, strict=True)]
    seen = processor.video_processor(videos, do_sample_frames=False, return_tensors="pt").to(device)
    frames, height, width = seen["video_grid_thw"][0].tolist()
    merge = processor.video_processor.merge_size
    tokens = tokenise(processor.tokenizer, batch, (frames, height // merge, width // merge))
    with mixed_precision(device):
        hidden = model.model(
            input_ids=tokens.ids.to(device),
            position_ids=tokens.positions.to(device),
            attention_mask=tokens.mask.to(device),
            use_cache=False,
            output_hidden_states=True,
            **seen,
        )
        wanted = tokens.labels.to(device)
        counted = wanted != _IGNORED
        logits = model.lm_head(hidden.last_hidden_state[counted]).float()
        # The video's tokens come second, after the one that says that they do.
        video = hidden.hidden_states[READ_AFTER][:, 1 : 1 + frames * height * width // merge**2]
        read = [reader(video).float() for reader in learner.readers]
        telling = tokens.telling(processor.tokenizer.eos_token_id).to(device)
        named = [reader(hidden.hidden_states[READ_AFTER][telling]).float() for reader in learner.naming]
        found = [reader(hidden.hidden_states[READ_AFTER + 1][telling]).float() for reader in learner.finding]
        seen_frames = learner.eyes.read(len(batch.stories) * frames)
    wanted = wanted[counted]
    words = wanted != processor.tokenizer.eos_token_id
    labels = scene_labels(batch).to(device)
    scenes = labels.shape[1]
    reading, read_right = judged(read, labels.repeat_interleave(video.shape[1] // scenes, dim=1))
    of_frames = labels[..., : len(SHOWN)].repeat_interleave(frames // scenes, dim=1)
    seeing, seen_right = judged(seen_frames, of_frames.flatten(0, 1))
    of_named, of_found = question_labels(batch)
    naming, _ = judged(named, of_named.to(device))
    finding, found_right = judged(found, of_found.to(device))
    answering = torch.nn.functional.cross_entropy(logits, wanted)
    return {
        "loss": answering + reading + naming + finding + seeing,
        "answering": answering,
        "right": (logits.argmax(-1) == wanted)[words].float().mean(),
        "read": read_right.mean(),
        "seen": seen_right.mean(),
        "found": found_right.mean(),
    }


def train_watcher(plan: Plan, model: Any, seed: int, phases: tuple[Phase, ...] = PHASES) -> tuple[Any, int]:
    """Train a model by `plan`; one with its averaged weights, and the steps done."""
    learner = Learner(model, seed).to(model.device)
    averaged = watcher.build_watcher(seed).to(model.device)
    processor = watcher.build_processor()

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        batch = draw_batch(seed, step, plan.steps, phases)
        scenes = torch.tensor(float(len(batch.stories[0].scenes)))
        return {**batch_loss(learner, processor, batch), "scenes": scenes}

    steps, average = train(plan, learner, loss_of)
    own = {name.removeprefix("watcher."): value for name, value in average.items() if name.startswith("watcher.")}
    # What it lacks is no parameter, or one with another name.
    averaged.load_state_dict(own, strict=False)
    return averaged.eval(), steps


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and train; 0 if the whole training is done, 3 if there is more to do."""
    parser = Parser(
        prog="python -m xattn_video_pipelines.demo.training.train_watcher",
        description=__doc__,
        epilog="example: python -m xattn_video_pipelines.demo.training.train_watcher --out watcher --minutes 60",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; an existing run goes on")
    parser.add_argument("--minutes", type=float, help="stop after this long, to be continued (default: no limit)")
    parser.add_argument("--eye-steps", type=int, default=1500, help="of the vision tower alone (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5200, help="of stories (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return run_program(parser, _run, arguments)


def _run(options: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    model = watcher.build_watcher(options.seed).to(options.device)
    of_both: dict[str, Any] = {"blocks": BLOCKS, "deadline": deadline}
    eyes = Plan("eyes", options.out, options.eye_steps, LEARNING_RATE, matrix_learning_rate=EYE_RATE, **of_both)
    if train_eyes(eyes, model, options.seed) < options.eye_steps:
        return 3
    plan = Plan("watcher", options.out, options.steps, LEARNING_RATE, matrix_learning_rate=STORY_RATE, **of_both)
    averaged, steps = train_watcher(plan, model, options.seed, PHASES)
    watcher.save_watcher(averaged, options.out / "model")
    return 0 if steps >= options.steps else 3


if __name__ == "__main__":
    raise SystemExit(main())
