"""Trains the demo's `AutoencoderKLWan`: 4 x 4 pixels and 2 frames to one latent of 4 channels.

Three of the channels are held to the mean colour of the pixels they stand for. That costs the decoder nothing
(edges follow from how much of a cell is covered) and leaves the transformer a small picture to draw instead of a code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from xattn_video_pipelines.demo import world
from xattn_video_pipelines.demo.training.loop import Plan, mixed_precision, train
from xattn_video_pipelines.video import import_diffusers

LATENT_CHANNELS = 4
SPATIAL, TEMPORAL = 4, 2
LEARNING_RATE = 1e-3
_FRAMES, _SIDE, _RENDERED, _BATCH = 5, 40, 80, 8
_KL_WEIGHT = 1e-4
_COLOUR_WEIGHT = 1.0
_LOG_VARIANCE = -6.0
# Beside colours in [-1, 1] it keeps a norm over both nearly linear.
_CONSTANT = 4.0
_LEAST_DEVIATION = 0.25


def build_vae(seed: int = 0) -> Any:
    """An untrained `AutoencoderKLWan` in the form of Wan 2.2's (2 x 2 pixels are channels); no global state changes."""
    diffusers = import_diffusers()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = diffusers.AutoencoderKLWan(
            base_dim=12,
            decoder_base_dim=24,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[True],
            in_channels=12,
            out_channels=12,
            patch_size=2,
            latents_mean=[0.0] * LATENT_CHANNELS,
            latents_std=[1.0] * LATENT_CHANNELS,
            scale_factor_temporal=TEMPORAL,
            scale_factor_spatial=SPATIAL,
        )
    _start_as_resampler(vae)
    for block in (vae.encoder.mid_block, vae.decoder.mid_block):
        # Attention over a picture depends on its size and has nothing to tell here: it stays switched off.
        for attention in block.attentions:
            attention.requires_grad_(False)
    return vae


def train_vae(plan: Plan, device: torch.device, seed: int) -> tuple[Any, int]:
    """Train by `plan`; gives the VAE with its averaged weights and measured `latents_mean`, and the steps done."""
    vae = build_vae(seed).to(device)

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        video = to_tensor(training_crops(seed, step)).to(device)
        noise = torch.Generator().manual_seed(seed * 1_000_003 + step)
        with mixed_precision(device):
            return _losses(vae, video, noise)

    steps, average = train(plan, vae, loss_of)
    vae.load_state_dict(average, strict=False)
    vae.eval().requires_grad_(False)
    _measure_latents(vae, device, seed)
    return vae, steps


def training_crops(seed: int, step: int) -> np.ndarray:
    """The batch of a step: uint8 `[batch, frames, side, side, 3]`, from training scenes only."""
    rng = np.random.default_rng([seed, step])
    scenes = world.training_scenes()
    clips = []
    for _ in range(_BATCH):
        clip = world.render(
            scenes[rng.integers(len(scenes))],
            int(rng.integers(2**31)),
            frames=_FRAMES,
            height=_RENDERED,
            width=_RENDERED,
        )
        top, left = rng.integers(_RENDERED - _SIDE + 1, size=2)
        clips.append(clip[:, top : top + _SIDE, left : left + _SIDE])
    return np.stack(clips)


def to_tensor(video: np.ndarray) -> torch.Tensor:
    """uint8 `[batch, frames, height, width, 3]` to float32 `[batch, 3, frames, height, width]` in [-1, 1]."""
    return torch.from_numpy(video).permute(0, 4, 1, 2, 3).contiguous().float() / 127.5 - 1.0


def to_uint8(video: torch.Tensor) -> np.ndarray:
    """The inverse of `to_tensor`, rounded and clipped."""
    pixels = ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1).cpu().numpy()


def reconstruction_psnr(vae: Any, count: int = 8, seed: int = 1) -> float:
    """Mean PSNR in dB of full-size held-out clips through the VAE (the mean of the posterior, no noise)."""
    scenes = world.held_out_scenes()
    chosen = np.random.default_rng(seed).choice(len(scenes), size=min(count, len(scenes)), replace=False)
    values = []
    for index in chosen:
        clip = world.render(scenes[index], seed + int(index))[None]
        with torch.no_grad():
            latents = vae.encode(to_tensor(clip).to(vae.device)).latent_dist.mode()
            decoded = to_uint8(vae.decode(latents).sample)
        error = np.mean((decoded.astype(np.float64) - clip) ** 2)
        values.append(10 * np.log10(255.0**2 / max(error, 1e-10)))
    return float(np.mean(values))


def _losses(vae: Any, video: torch.Tensor, noise: torch.Generator) -> dict[str, torch.Tensor]:
    posterior = vae.encode(video).latent_dist
    mean, variance = posterior.mean.float(), posterior.var.float()
    sample = torch.randn(mean.shape, generator=noise).to(mean.device)
    # `decode` clamps, and a clamp has no gradient outside: small residues there are harmless.
    decoded = vae.decode(mean + variance.sqrt() * sample).sample.float()
    difference = decoded - video
    pixels = difference.abs().mean() + 4.0 * difference.square().mean()
    divergence = 0.5 * (mean.square() + variance - 1.0 - posterior.logvar.float()).mean()
    # The first latent frame stands for the first frame alone.
    cells = F.avg_pool3d(video[:, :, 1:], (TEMPORAL, SPATIAL, SPATIAL))
    cells = torch.cat([F.avg_pool3d(video[:, :, :1], (1, SPATIAL, SPATIAL)), cells], dim=2)
    colour = (mean[:, :3] - cells).square().mean()
    loss = pixels + _KL_WEIGHT * divergence + _COLOUR_WEIGHT * colour
    return {"loss": loss, "mse": difference.square().mean().detach(), "colour": colour.detach()}


@torch.no_grad()
def _start_as_resampler(vae: Any) -> None:
    """Set the weights so that the VAE halves, averages and repeats pixels: training starts at 20 dB and adds the edges.

    Colour travels as the pair (x, -x), since silu(x) - silu(-x) = x, beside a constant that keeps the norms linear.
    """
    encoder, decoder = vae.encoder, vae.decoder
    for module in vae.modules():
        if hasattr(module, "conv2"):
            module.conv2.weight.mul_(0.1)
            module.conv2.bias.zero_()
        if hasattr(module, "to_qkv"):
            module.proj.weight.zero_()
            module.proj.bias.zero_()
    width, pixels = encoder.conv_in.out_channels, encoder.conv_in.in_channels
    # Index 2 of a causal kernel is the present frame.
    _set(encoder.conv_in, (2, 1, 1), torch.eye(width, pixels))
    down = next(module for module in encoder.modules() if getattr(module, "mode", "") == "downsample3d")
    down.resample[1].weight.zero_()
    down.resample[1].bias.zero_()
    down.resample[1].weight[:, :, :2, :2] = torch.eye(width)[:, :, None, None] / 4
    _set(down.time_conv, (slice(1, 3), 0, 0), torch.eye(width)[..., None] / 2)
    shortcut = next(m.conv_shortcut for m in encoder.modules() if hasattr(m, "conv_shortcut") and _is_conv(m))
    colour = torch.eye(3).repeat_interleave(pixels // 3, dim=1) / (pixels // 3)
    _set(shortcut, (0, 0, 0), _paired(colour), constant=True)
    _set(encoder.conv_out, (2, 1, 1), _unpaired(torch.eye(3), encoder.conv_out), rows=3)
    vae.quant_conv.weight.zero_()
    vae.quant_conv.weight[:, :, 0, 0, 0] = torch.eye(2 * LATENT_CHANNELS)
    # Almost no noise: at a deviation of 1 the decoder would see little else for long.
    vae.quant_conv.weight[LATENT_CHANNELS:] *= 0.1
    vae.quant_conv.bias.zero_()
    vae.quant_conv.bias[LATENT_CHANNELS:] = _LOG_VARIANCE
    _set(vae.post_quant_conv, (0, 0, 0), torch.eye(LATENT_CHANNELS))

    _set(decoder.conv_in, (2, 1, 1), _paired(torch.eye(3, LATENT_CHANNELS)), constant=True)
    up = next(module for module in decoder.modules() if getattr(module, "mode", "") == "upsample3d")
    _set(up.time_conv, (2, 0, 0), torch.eye(up.dim).repeat(2, 1))
    up.resample[1].weight.mul_(0.1)
    up.resample[1].weight[:7] = 0
    up.resample[1].weight[:7, :7, 1, 1] = torch.eye(7)
    up.resample[1].bias.zero_()
    _set(decoder.conv_out, (2, 1, 1), _unpaired(colour.T * (pixels // 3), decoder.conv_out))


def _is_conv(module: Any) -> bool:
    return isinstance(module.conv_shortcut, torch.nn.Conv3d)


def _set(
    conv: Any,
    place: tuple[int | slice, int, int],
    matrix: torch.Tensor,
    *,
    constant: bool = False,
    rows: int | None = None,
) -> None:
    """Make `conv` apply `matrix` `[out, in]` at one `place` of its kernel; the other outputs keep a tenth."""
    rows = matrix.shape[0] if rows is None else rows
    conv.weight.mul_(0.1)
    conv.bias.zero_()
    conv.weight[:rows] = 0
    conv.weight[(slice(0, rows), slice(0, matrix.shape[1]), *place)] = matrix[:rows]
    if constant:
        conv.weight[6] = 0
        conv.bias[6] = _CONSTANT


def _paired(matrix: torch.Tensor) -> torch.Tensor:
    """Rows for x, then for -x, and one of zeros for the constant."""
    return torch.cat([matrix, -matrix, torch.zeros(1, matrix.shape[1])])


def _unpaired(matrix: torch.Tensor, conv: Any) -> torch.Tensor:
    """`matrix` applied to silu(x) - silu(-x), with the scale that the norm before took away."""
    scale: float = _CONSTANT / conv.in_channels**0.5
    return torch.cat([matrix, -matrix, torch.zeros(matrix.shape[0], conv.in_channels - 6)], dim=1) * scale


def _measure_latents(vae: Any, device: torch.device, seed: int, count: int = 48) -> None:
    """Write the channels' mean and standard deviation over training clips into the VAE's configuration."""
    rng = np.random.default_rng([seed, 2**31])
    scenes = world.training_scenes()
    latents = []
    for _ in range(count):
        scene = scenes[rng.integers(len(scenes))]
        clip = world.render(scene, int(rng.integers(2**31)), frames=5)[None]
        with torch.no_grad():
            latents.append(vae.encode(to_tensor(clip).to(device)).latent_dist.mode().float())
    values = torch.cat(latents).transpose(0, 1).flatten(1)
    vae.register_to_config(
        latents_mean=[round(v, 5) for v in values.mean(1).tolist()],
        # A channel that says little must not be blown up: its noise would be most of what the transformer learns.
        latents_std=[round(max(v, _LEAST_DEVIATION), 5) for v in values.std(1).tolist()],
    )
