"""The transformer's training data: clips of the training scenes, rendered and encoded once, kept on disk in shards.

A clip follows from its size and its number, so a shard that is missing is made again and a finished one is read.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from xattn_video_pipelines.common.files import whole_files
from xattn_video_pipelines.demo import world
from xattn_video_pipelines.demo.training.loop import mixed_precision
from xattn_video_pipelines.demo.training.vae import SPATIAL, TEMPORAL, to_tensor

logger = logging.getLogger(__name__)

_SHARD = 64


@dataclass(frozen=True)
class ClipSize:
    """`frames` of `side` x `side` pixels."""

    frames: int
    side: int

    @property
    def latent_frames(self) -> int:
        """The frames that the VAE makes of them."""
        return (self.frames - 1) // TEMPORAL + 1

    @property
    def side_tokens(self) -> int:
        """The transformer's tokens along a side: its patch is 1 x 2 x 2 latents."""
        return self.side // SPATIAL // 2

    @property
    def tokens(self) -> int:
        """The transformer's tokens."""
        return self.latent_frames * self.side_tokens**2

    def __str__(self) -> str:
        return f"{self.frames}x{self.side}x{self.side}"


def clip_scene(number: int) -> world.Scene:
    """The scene of the `number`-th clip of any size: all training scenes in a mixed order, then again in another."""
    scenes = world.training_scenes()
    rounds, place = divmod(number, len(scenes))
    order = np.random.default_rng(rounds).permutation(len(scenes))
    return scenes[int(order[place])]


def load_latents(vae: Any, size: ClipSize, count: int, folder: Path) -> torch.Tensor:
    """Normalised latents of the first `count` clips, bfloat16 `[count, channels, frames, height, width]`.

    Shards that `folder` has no file of are rendered, encoded by `vae` and written there.
    """
    shards = []
    for first in range(0, count, _SHARD):
        path = folder / str(size) / f"{first:06d}.safetensors"
        if not path.exists():
            latents = torch.cat([_encode(vae, size, number) for number in range(first, first + _SHARD)])
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_files(path) as (partial,):
                save_file({"latents": latents}, partial)
            logger.info("encoded %d of %d clips of %s", first + _SHARD, count, size)
        shards.append(load_file(path)["latents"])
    return torch.cat(shards)[:count]


def _encode(vae: Any, size: ClipSize, number: int) -> torch.Tensor:
    clip = world.render(clip_scene(number), number, frames=size.frames, height=size.side, width=size.side)
    with torch.no_grad(), mixed_precision(vae.device):
        latents: torch.Tensor = vae.encode(to_tensor(clip[None]).to(vae.device)).latent_dist.mode().float().cpu()
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    deviation = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return ((latents - mean) / deviation).bfloat16().contiguous()
