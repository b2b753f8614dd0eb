"""What every tiny pipeline shares: its description, seeded construction, fixed inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

# repairs a torchvision that does not fit this torch, so that diffusers and transformers can be imported
import xattn_video.integrations.diffusers  # noqa: F401  # isort: skip

import diffusers
from diffusers import DiffusionPipeline

SHARPNESS = 2.0


@dataclass(frozen=True)
class Family:
    """A tiny pipeline of one model family and what a right integration does with it.

    `call(pipe, **overrides)` runs the pipeline with fixed text and noise and gives the result as a tensor
    `[items, ...]`. Every `call` takes `items` (a tuple of ints, default `(0,)`: which of the fixed prompts
    and noises to run as one batch); anything else goes to the pipeline.
    """

    name: str
    build: Callable[[int], DiffusionPipeline]
    call: Callable[..., Tensor]
    # where the text sits: 'cross-attention' or 'joint, after the video', ...
    text: str
    # names of the pipeline's components that hold sparse layers
    transformers: tuple[str, ...] = ("transformer",)
    # sequence lengths that reach sparse attention: the video's tokens, with the text's in joint attention
    tokens: tuple[int, ...] = ()
    # video self-attention layers that one forward runs through
    layers: int = 2
    # 2 where guidance runs the two prompts one after the other
    forwards_per_step: int = 2
    # denoising steps really run in one generation
    steps: int = 8
    # generations in one call: each starts with dense steps of its own (video made in sections)
    generations: int = 1
    # whether the pipeline takes several prompts at once
    batches: bool = True
    # relative error between two ways to compute the same in float32
    tolerance: float = 1e-5
    notes: str = field(default="", compare=False)


def newer_classes(*names: str) -> list[Any]:
    """Classes that the oldest supported diffusers lacks; a missing one skips the test that builds with it."""
    return [getattr(diffusers, name, None) or partial(_skip, name) for name in names]


def _skip(name: str, *_: Any, **__: Any) -> NoReturn:
    pytest.skip(f"diffusers {diffusers.__version__} has no {name}")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with torch's global generator at `seed`, then put it back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def generators(items: Sequence[int]) -> list[torch.Generator]:
    """One generator for each item, so that an item's noise does not depend on its batch."""
    return [torch.Generator("cpu").manual_seed(1000 + item) for item in items]


def normal(shape: Sequence[int], items: Sequence[int], *, salt: int = 0) -> Tensor:
    """Fixed normal values `[items, *shape]`, float32; different for every item and every `salt`."""
    rows = [torch.randn(tuple(shape), generator=_generator(salt, item)) for item in items]
    return torch.stack(rows)


def _generator(salt: int, item: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(7919 * (salt + 1) + item)


def sharpen(module: nn.Module, factor: float = SHARPNESS) -> nn.Module:
    """Scale the query and key norms: random weights then attend to few tokens, and a wrong mask shows."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("norm_q.weight", "norm_k.weight")):
                parameter.mul_(factor)
    return module
