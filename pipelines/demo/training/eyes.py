"""Trains the vision tower of the demo's video-understanding model: what do two frames show?

Before any story. Colours and backgrounds are learnt from stories alone, shapes and motions hardly: a step there shows
few scenes. Here it shows many, two frames each, and what they show is read off the mean of their tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from xattn_video_pipelines.demo import watcher, world
from xattn_video_pipelines.demo.training.loop import Plan, mixed_precision, train

# What is read, and how many values it has.
SHOWN = {
    "colour": len(world.COLOURS),
    "shape": len(world.SHAPES),
    "motion": len(world.MOTIONS),
    "background": len(world.BACKGROUNDS),
}
# Scenes a step.
SCENES = 64


class Eyes(torch.nn.Module):
    """A vision tower, with the linear maps that read what a frame shows off the mean of its tokens.

    Two frames of the video are one here.
    """

    def __init__(self, visual: Any, width: int, seed: int) -> None:
        super().__init__()
        self.visual = visual
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.readers = torch.nn.ModuleList(torch.nn.Linear(width, count) for count in SHOWN.values())
        self._seen: torch.Tensor
        self.hook = visual.merger.register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        self._seen = output

    def read(self, frames: int) -> list[torch.Tensor]:
        """Logits `[frames, values]` of each of SHOWN, of the frames that the tower last saw."""
        pooled = self._seen.view(frames, -1, self._seen.shape[-1]).mean(1)
        return [reader(pooled).float() for reader in self.readers]


def shown(scene: world.Scene) -> list[int]:
    """What SHOWN names of a scene."""
    return [
        list(world.COLOURS).index(scene.colour),
        world.SHAPES.index(scene.shape),
        list(world.MOTIONS).index(scene.motion),
        list(world.BACKGROUNDS).index(scene.background),
    ]


def judged(read: list[torch.Tensor], labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean cross-entropy of several values, and the share that is right of each.

    Args:
        read: for each value, logits `[..., values]`.
        labels: int64 `[..., len(read)]`.
    """
    entropy = [
        torch.nn.functional.cross_entropy(one.flatten(0, -2), labels[..., at].flatten()) for at, one in enumerate(read)
    ]
    right = [(one.argmax(-1) == labels[..., at]).float().mean() for at, one in enumerate(read)]
    return torch.stack(entropy).mean(), torch.stack(right)


def draw_glances(seed: int, step: int, count: int) -> tuple[list[world.Scene], list[np.ndarray]]:
    """Training scenes and two frames of each, uint8 `[2, 128, 128, 3]`, as far apart as a watched story's."""
    rng = np.random.default_rng([seed, step, 4])
    pool = world.training_scenes()
    scenes = [pool[number] for number in rng.integers(len(pool), size=count)]
    seeds = rng.integers(2**31, size=count)
    frames = watcher.EVERY + 1
    clips = [
        world.render(scene, int(one), frames=frames)[:: watcher.EVERY] for scene, one in zip(scenes, seeds, strict=True)
    ]
    return scenes, clips


def train_eyes(plan: Plan, model: Any, seed: int, count: int = SCENES) -> int:
    """Train the vision tower of a watcher by `plan`, in place, and leave it its averaged weights; the steps done."""
    eyes = Eyes(model.model.visual, model.config.text_config.hidden_size, seed).to(model.device)
    processor = watcher.build_processor().video_processor

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        scenes, clips = draw_glances(seed, step, count)
        seen = processor(clips, do_sample_frames=False, return_tensors="pt").to(model.device)
        with mixed_precision(model.device):
            eyes.visual(seen["pixel_values_videos"], grid_thw=seen["video_grid_thw"])
            read = eyes.read(count)
        loss, right = judged(read, torch.tensor([shown(scene) for scene in scenes], device=model.device))
        return {"loss": loss, **dict(zip(SHOWN, right, strict=True))}

    steps, average = train(plan, eyes, loss_of)
    eyes.load_state_dict(average, strict=False)
    eyes.hook.remove()
    return steps
