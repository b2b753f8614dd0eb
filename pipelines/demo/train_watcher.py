"""Trains the demo's video-understanding model on stories of the shapes world: one scene first, long stories last.

Every step shows new stories and asks several questions about each at once. A question sees its story and itself
alone and stands where it would stand as the only one, so a step is worth as many as it has questions, and the model
learns no more than what one question at a time will show it.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.demo import stories, watcher
from pipelines.demo.train_loop import Plan, train
from pipelines.program import Parser, run_program

LEARNING_RATE, MATRIX_LEARNING_RATE = 1e-3, 3e-3
_IGNORED = -100


@dataclass(frozen=True)
class Phase:
    """Up to the share `until` of all steps: stories of one of `scenes` lengths, about `most` scenes a step."""

    until: float
    scenes: tuple[int, ...]
    most: int
    questions: int


PHASES = (
    Phase(0.20, (1,), 16, 4),
    Phase(0.50, (2, 3, 4), 16, 12),
    Phase(1.00, (1, 2, 4, 8, 16), 16, 16),
)


@dataclass(frozen=True)
class Batch:
    """What a step sees: stories of the same number of scenes, and for each its questions and its first frame."""

    stories: list[stories.Story]
    asked: list[list[stories.Asked]]
    offsets: list[int]


def draw_batch(seed: int, step: int, steps: int, phases: tuple[Phase, ...] = PHASES) -> Batch:
    """The batch of a step, from the seed and the step alone."""
    rng = np.random.default_rng([seed, step])
    phase = next((phase for phase in phases if step < phase.until * steps), phases[-1])
    scenes = int(rng.choice(phase.scenes))
    told = [stories.draw_story(rng, scenes, "training") for _ in range(max(1, phase.most // scenes))]
    kinds = [kind for kind in stories.KINDS if scenes > 1 or kind != "order"]
    asked = [
        [stories.draw_question(rng, story, kinds[number % len(kinds)]) for number in range(phase.questions)]
        for story in told
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
    for asked in batch.asked:
        ids, labels, spot, owner = list(head), [_IGNORED] * len(head), [], [0] * len(head)
        for number, one in enumerate(asked, start=1):
            question = [*tokenizer(one.question).input_ids, answer]
            reply = [*tokenizer(one.answer).input_ids, stop]
            ids += question + reply[:-1]
            labels += [_IGNORED] * (len(question) - 1) + reply
            spot += range(after + 1, after + len(question) + len(reply))
            owner += [number] * (len(question) + len(reply) - 1)
        rows.append((ids, labels, spot, owner))
    longest = max(len(ids) for ids, *_ in rows)
    shape = (len(rows), longest)
    tokens, labels_, owners = torch.zeros(shape).long(), torch.full(shape, _IGNORED), torch.full(shape, -1)
    positions = torch.zeros(3, *shape).long()
    for number, (ids, labels, spot, owner) in enumerate(rows):
        tokens[number, : len(ids)] = torch.tensor(ids)
        labels_[number, : len(ids)] = torch.tensor(labels)
        owners[number, : len(ids)] = torch.tensor(owner)
        positions[:, number, : len(ids)] = torch.cat([prefix, torch.tensor(spot).expand(3, -1)], dim=1)
    same = owners[:, :, None] == owners[:, None]
    mask = (same | (owners[:, None] == 0)).tril()
    return Tokens(tokens, labels_, positions, mask[:, None])


def train_watcher(plan: Plan, device: torch.device, seed: int, phases: tuple[Phase, ...] = PHASES) -> tuple[Any, int]:
    """Train by `plan`; the model with its averaged weights, and the steps done."""
    model, averaged = watcher.build_watcher(seed).to(device), watcher.build_watcher(seed).to(device)
    processor = watcher.build_processor()

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        batch = draw_batch(seed, step, plan.steps, phases)
        videos = [
            story.render(watcher.EVERY, offset) for story, offset in zip(batch.stories, batch.offsets, strict=True)
        ]
        seen = processor.video_processor(videos, do_sample_frames=False, return_tensors="pt").to(device)
        time, height, width = seen["video_grid_thw"][0].tolist()
        merge = processor.video_processor.merge_size
        tokens = tokenise(processor.tokenizer, batch, (time, height // merge, width // merge))
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.model(
                input_ids=tokens.ids.to(device),
                position_ids=tokens.positions.to(device),
                attention_mask=tokens.mask.to(device),
                use_cache=False,
                **seen,
            )[0]
            counted = tokens.labels.to(device) != _IGNORED
            logits = model.lm_head(hidden[counted]).float()
        wanted = tokens.labels.to(device)[counted]
        right = (logits.argmax(-1) == wanted).float().mean()
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        return {"loss": loss, "right": right, "scenes": torch.tensor(float(len(batch.stories[0].scenes)))}

    steps, average = train(plan, model, loss_of)
    averaged.load_state_dict(average, strict=False)
    return averaged.eval(), steps


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and train; 0 if the whole training is done, 3 if there is more to do."""
    parser = Parser(
        prog="python -m pipelines.demo.train_watcher",
        description=__doc__,
        epilog="example: python -m pipelines.demo.train_watcher --out watcher --minutes 60",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; an existing run goes on")
    parser.add_argument("--minutes", type=float, help="stop after this long, to be continued (default: no limit)")
    parser.add_argument("--steps", type=int, default=6000, help="of the whole training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return run_program(parser, _run, arguments)


def _run(options: argparse.Namespace) -> int:
    import time

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    plan = Plan(
        "watcher",
        options.out,
        options.steps,
        LEARNING_RATE,
        matrix_learning_rate=MATRIX_LEARNING_RATE,
        blocks=("visual.blocks.", "language_model.layers."),
        deadline=deadline,
    )
    model, steps = train_watcher(plan, torch.device(options.device), options.seed, PHASES)
    watcher.save_watcher(model, options.out / "model")
    return 0 if steps >= options.steps else 3


if __name__ == "__main__":
    raise SystemExit(main())
