"""What every tiny pipeline shares: its row in the table of families, seeded construction, fixed inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from operator import attrgetter
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

# repairs a torchvision that does not fit this torch, so that diffusers and transformers can be imported
import xattn_video.integrations.diffusers  # noqa: F401  # isort: skip

import diffusers
from diffusers import DiffusionPipeline

SHARPNESS = 2.0


@dataclass(frozen=True, eq=False)
class Family:
    """A row of the table: a tiny pipeline of one model family, and what a right integration does with it."""

    name: str
    # the class of diffusers, and its parts by name: a function that makes the part, or a plain value
    pipeline: Callable[..., DiffusionPipeline]
    parts: Mapping[str, Any]
    # what the pipeline is called with to make the videos of `items`
    inputs: Callable[[tuple[int, ...]], dict[str, Any]]
    # sequence lengths that reach sparse attention: the video's tokens, with the text's in joint attention
    tokens: tuple[int, ...]
    # where the text sits: 'cross-attention' or 'joint, after the video', ...
    text: str = "cross-attention"
    # what is peculiar about it
    notes: str = ""
    # names of the pipeline's components that hold sparse layers
    transformers: tuple[str, ...] = ("transformer",)
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
    # takes the videos from the pipeline's output
    result: Callable[[Any], Tensor] = attrgetter("frames")

    def build(self, seed: int, **changes: Any) -> DiffusionPipeline:
        """The pipeline with random weights from `seed`; `changes` are parts in place of the row's own."""
        with seeded(seed):
            made = {name: part() if callable(part) else part for name, part in {**self.parts, **changes}.items()}
        for part in made.values():
            if isinstance(part, nn.Module):
                part.eval()
        return assemble(self.pipeline, made)

    def call(self, pipe: DiffusionPipeline, items: tuple[int, ...] = (0,), **overrides: Any) -> Tensor:
        """Run the pipeline with fixed text and noise; the result is `[items, ...]`.

        `items` tells which of the fixed prompts and noises to run as one batch. `overrides` go to the pipeline.
        """
        noise = generators(items) if self.batches else generators(items)[0]
        arguments = {"generator": noise, "output_type": "latent", **self.inputs(items), **overrides}
        # the noise between the stages of Helios comes from torch's global generator
        with seeded(items[0]):
            return self.result(pipe(**arguments))


def quiet(pipe: Any) -> Any:
    """The pipeline, without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assemble(pipeline: Callable[..., DiffusionPipeline], parts: Mapping[str, Any]) -> DiffusionPipeline:
    """A pipeline of `parts`; all else that it asks for (tokenizers, text encoders) is None."""
    asked = [
        parameter.name
        for parameter in signature(pipeline).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    return pipeline(**{**dict.fromkeys(asked), **parts})


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


def prefix_mask(valid: Sequence[int], items: Sequence[int], length: int) -> Tensor:
    """Padding mask `[items, length]`, int64: the first `valid[item]` tokens of each item are real."""
    counts = torch.tensor([valid[item] for item in items])
    return (torch.arange(length)[None] < counts[:, None]).long()


def sharpen(module: nn.Module) -> nn.Module:
    """Scale the query and key norms: random weights then attend to few tokens, and a wrong mask shows."""
    norms = ("norm_q", "norm_k", "norm_added_q", "norm_added_k", "query_norm", "key_norm")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(tuple(f"{norm}.weight" for norm in norms)):
                parameter.mul_(SHARPNESS)
    return module


def two_heads(cls: Callable[..., nn.Module], **config: Any) -> nn.Module:
    """A transformer of two heads of 32, with sharpened attention."""
    return sharpen(cls(num_attention_heads=2, attention_head_dim=32, **config))
