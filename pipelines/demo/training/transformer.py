"""Trains the demo's `WanTransformer3DModel` by rectified flow: on short small clips first, at full size last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from xattn_video_pipelines.demo import text
from xattn_video_pipelines.demo.training.attention import TrainingAttention, padding_bias
from xattn_video_pipelines.demo.training.latents import load_latents
from xattn_video_pipelines.demo.training.loop import Plan, mixed_precision, train
from xattn_video_pipelines.demo.training.phases import PHASES, Batch, Phase, draw_batch
from xattn_video_pipelines.demo.training.vae import LATENT_CHANNELS
from xattn_video_pipelines.video import import_diffusers

# AdamW's, and Muon's for the matrices of the blocks. After 120 steps of 24 clips the loss was 0.24 (with a rate of
# 4e-3), with AdamW alone 0.31.
LEARNING_RATE, MATRIX_LEARNING_RATE = 1e-3, 3e-3


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


def rotary_of(transformer: Any, clip: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotary embedding of the tokens of `frames`, each at its place in `clip` `[B, C, F, H, W]`."""
    whole = (part.unflatten(1, (clip.shape[2], -1)) for part in transformer.rope(clip))
    cosines, sines = (part[:, frames.to(part.device)].flatten(1, 2) for part in whole)
    return cosines, sines


def cut_out(clips: torch.Tensor, batch: Batch) -> torch.Tensor:
    """What a step sees of the whole latents `[B, C, F, H, W]` of its clips: all, or a square of each."""
    if batch.corners is None or batch.phase.cut is None:
        return clips
    side = 2 * batch.phase.cut
    corners = (2 * batch.corners).tolist()
    return torch.stack([clip[..., y : y + side, x : x + side] for clip, (y, x) in zip(clips, corners, strict=True)])


def noise_levels(batch: Batch) -> torch.Tensor:
    """The noise level of each kept frame of each clip, float32 `[clips, frames]`."""
    levels = torch.from_numpy(batch.sigmas).float()[:, None].repeat(1, len(batch.frames))
    if batch.anchored is not None:
        place, shares = batch.anchored
        levels[:, place] *= torch.from_numpy(shares).float()
    return levels


def train_transformer(  # noqa: PLR0913 - settings of a training
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
        seen = cut_out(latents[batch.phase][torch.from_numpy(batch.clips)], batch).float().to(device)
        frames = torch.from_numpy(batch.frames)
        clean = seen[:, :, frames]
        processor.rotary = rotary_of(transformer, seen, frames)
        words = text.encode(tokenizer, text_encoder, batch.captions).to(device)
        processor.text_bias = padding_bias(words, text.MAX_TEXT_TOKENS)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + step)).to(device)
        levels = noise_levels(batch).to(device)
        # A time for each token only where they differ: it costs a modulation for each token.
        times = levels[:, 0]
        if batch.anchored is not None:
            times = levels.repeat_interleave(batch.phase.tokens // len(frames), dim=1)
        mix = levels[:, None, :, None, None]
        with mixed_precision(device):
            velocity = transformer((1 - mix) * clean + mix * noise, times * 1000, words, return_dict=False)[0]
        error = (velocity.float() - (noise - clean)).square().mean(dim=(1, 3, 4))
        counted = [place for place in range(len(frames)) if batch.anchored is None or place != batch.anchored[0]]
        return {"loss": error[:, counted].mean(), "tokens": torch.tensor(float(batch.phase.tokens))}

    def checkpointed(step: int, average: dict[str, torch.Tensor]) -> None:
        if on_checkpoint:
            averaged.load_state_dict(average, strict=False)
            on_checkpoint(step, averaged)

    steps, average = train(plan, transformer, loss_of, checkpointed)
    averaged.load_state_dict(average, strict=False)
    return averaged, steps
