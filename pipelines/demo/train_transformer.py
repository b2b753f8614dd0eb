"""Trains the demo's `WanTransformer3DModel` by rectified flow: on short small clips first, at full size last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.demo import text, world
from pipelines.demo.train_attention import TrainingAttention, padding_bias
from pipelines.demo.train_latents import ClipSize, clip_scene, load_latents
from pipelines.demo.train_loop import Plan, train
from pipelines.demo.train_vae import LATENT_CHANNELS
from pipelines.models import import_diffusers

# AdamW's, and Muon's for the matrices of the blocks. After 120 steps of 24 clips the loss was 0.24 (with a rate of
# 4e-3), with AdamW alone 0.31.
LEARNING_RATE, MATRIX_LEARNING_RATE = 1e-3, 3e-3
# Sampling's shift of the noise levels at full size; smaller clips have fewer tokens to average noise over.
FLOW_SHIFT = 4.0
# The share of captions that are left empty, for guidance.
_DROPPED = 0.1


@dataclass(frozen=True)
class Phase:
    """A part of the training: up to the share `until` of all steps, `batch` clips of one size from `clips` many.

    With `kept`, a step sees that many latent frames of its clips, drawn anew each time, at their own places in time:
    for a part of the price the model learns distances that only long clips have.
    """

    until: float
    size: ClipSize
    batch: int
    clips: int
    kept: int | None = None

    @property
    def tokens(self) -> int:
        """The tokens that a step sees of each clip."""
        return self.size.tokens if self.kept is None else self.size.tokens // self.size.latent_frames * self.kept


FULL = ClipSize(33, 128)
# Many small steps: 1,000 of eight times these batches left the shapes ragged.
PHASES = (
    Phase(0.40, ClipSize(1, 80), 24, 6144),
    Phase(0.65, ClipSize(5, 80), 8, 3072),
    Phase(0.83, ClipSize(9, 96), 4, 2304),
    Phase(0.95, ClipSize(17, 104), 2, 768),
    Phase(1.00, FULL, 1, 384),
)
# For a model that PHASES has taught to draw. Trained on short small clips alone, it repeats itself after 14 tokens in
# time or space: there the second of the rotary frequencies comes around, and it has never had to tell the two apart.
# Full size, one clip a step, is too slow a teacher of that.
CONTINUED_PHASES = (
    Phase(0.92, FULL, 3, 1536, kept=8),
    Phase(1.00, FULL, 1, 1536),
)
# Of the learning rates, for weights that know something already.
CONTINUED_RATE = 0.5


def build_transformer(seed: int = 0) -> Any:
    """An untrained `WanTransformer3DModel`; torch's global generator is left as it was."""
    diffusers = import_diffusers()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=4,
            attention_head_dim=64,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            text_dim=text.TEXT_DIM,
            freq_dim=128,
            ffn_dim=1024,
            num_layers=4,
        )


@dataclass(frozen=True)
class Batch:
    """What a step sees: the numbers of its clips, their captions (empty where dropped), noise levels in (0, 1).

    `frames` are the latent frames of them that are kept, in order.
    """

    phase: Phase
    clips: np.ndarray
    captions: list[str]
    sigmas: np.ndarray
    frames: np.ndarray


def draw_batch(seed: int, step: int, steps: int, phases: tuple[Phase, ...] = PHASES) -> Batch:
    """The batch of a step, from the seed and the step alone."""
    rng = np.random.default_rng([seed, step])
    phase = next((phase for phase in phases if step < phase.until * steps), phases[-1])
    clips = rng.integers(phase.clips, size=phase.batch)
    captions = [world.caption(clip_scene(int(number)), int(rng.integers(2**31))) for number in clips]
    captions = ["" if rng.random() < _DROPPED else words for words in captions]
    # One noise level from each of `batch` equal parts: less chance in the loss than with independent ones.
    uniform = (rng.permutation(phase.batch) + rng.random(phase.batch)) / phase.batch
    shift = max(1.0, FLOW_SHIFT * (phase.size.tokens / FULL.tokens) ** 0.5)
    frames = np.arange(phase.size.latent_frames)
    if phase.kept is not None:
        frames = np.sort(rng.choice(frames, size=phase.kept, replace=False))
    return Batch(phase, clips, captions, shift * uniform / (1 + (shift - 1) * uniform), frames)


def rotary_of(transformer: Any, clip: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rotary embedding of the tokens of `frames`, each at its place in the whole clip `[B, C, F, H, W]`."""
    whole = (part.unflatten(1, (clip.shape[2], -1)) for part in transformer.rope(clip))
    return tuple(part[:, frames.to(part.device)].flatten(1, 2) for part in whole)


def train_transformer(
    plan: Plan,
    vae: Any,
    device: torch.device,
    seed: int,
    folder: Path,
    *,
    phases: tuple[Phase, ...] = PHASES,
    build: Callable[[int], Any] = build_transformer,
    on_checkpoint: Callable[[int, Any], None] | None = None,
) -> tuple[Any, int]:
    """Train by `plan` on clips encoded by `vae`, whose latents are kept in `folder`.

    Args:
        on_checkpoint: called with the step and a transformer of the averaged weights after each checkpoint.

    Returns:
        The transformer with its averaged weights, and the steps done.
    """
    transformer, averaged = build(seed).to(device), build(seed).to(device).eval().requires_grad_(False)
    processor = TrainingAttention()
    transformer.set_attn_processor(processor)
    tokenizer, text_encoder = text.build_tokenizer(), text.build_text_encoder()
    latents: dict[Phase, torch.Tensor] = {}

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        batch = draw_batch(seed, step, plan.steps, phases)
        if batch.phase not in latents:
            latents.clear()
            latents[batch.phase] = load_latents(vae, batch.phase.size, batch.phase.clips, folder)
        whole = latents[batch.phase][torch.from_numpy(batch.clips)].float().to(device)
        frames = torch.from_numpy(batch.frames)
        clean = whole[:, :, frames]
        processor.rotary = rotary_of(transformer, whole, frames)
        words = text.encode(tokenizer, text_encoder, batch.captions).to(device)
        processor.text_bias = padding_bias(words, text.MAX_TEXT_TOKENS)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + step)).to(device)
        sigmas = torch.from_numpy(batch.sigmas).float().to(device)
        mix = sigmas.view(-1, 1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16):
            velocity = transformer((1 - mix) * clean + mix * noise, sigmas * 1000, words, return_dict=False)[0]
        error = (velocity.float() - (noise - clean)).square().mean(dim=(1, 2, 3, 4))
        return {"loss": error.mean(), "tokens": torch.tensor(float(batch.phase.tokens))}

    def checkpointed(step: int, average: dict[str, torch.Tensor]) -> None:
        if on_checkpoint:
            averaged.load_state_dict(average, strict=False)
            on_checkpoint(step, averaged)

    steps, average = train(plan, transformer, loss_of, checkpointed)
    averaged.load_state_dict(average, strict=False)
    return averaged, steps
