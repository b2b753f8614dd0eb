"""A denoising loop of your own around a transformer: say which step it is.

python examples/own_loop.py --prompt "a red fox runs through fresh snow" --out fox.mp4
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from xattn_video import XAttnProcessor

# After the line above: xattn_video works around a torchvision that was built for another torch.
from diffusers import WanPipeline  # isort: skip
from diffusers.utils import export_to_video  # isort: skip


@torch.no_grad()
def denoise(  # noqa: PLR0913 - a loop that is read, not called
    transformer: Any,
    processor: XAttnProcessor,
    latents: Tensor,
    text: Tensor,
    negative_text: Tensor,
    *,
    steps: int,
    guidance_scale: float = 5.0,
    shift: float = 3.0,
) -> Tensor:
    """Euler steps of a flow-matching model, with guidance.

    Args:
        transformer: a Wan transformer that `processor` is attached to.
        latents: noise `[B, channels, frames, height, width]`, float32.
        text, negative_text: embeddings `[B, tokens, D]`.
        steps: at least 1; the first `warmup_steps` of the processor's settings are dense.
        guidance_scale: 1 is without guidance.
        shift: of the noise levels; larger spends more steps on much noise.

    Returns:
        The denoised latents, in the shape of `latents`.
    """
    levels = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    levels = shift * levels / (1 + (shift - 1) * levels)
    processor.start_generation()
    for index in range(steps):
        # Both forwards of guidance are in this step. Without this line the steps would be guessed from the timesteps.
        processor.step(index)
        timestep = (1000 * levels[index]).to(latents.device, torch.float32).expand(len(latents))
        noisy = latents.to(text.dtype)
        velocity = transformer(noisy, timestep, text).sample
        if guidance_scale != 1:
            negative = transformer(noisy, timestep, negative_text).sample
            velocity = negative + guidance_scale * (velocity - negative)
        latents = latents + float(levels[index + 1] - levels[index]) * velocity.float()
    return latents


def make_video(pipe: Any, processor: XAttnProcessor, prompt: str, *, steps: int, **size: int) -> Any:
    """Frames of one video: text encoder, the loop above, VAE.

    Args:
        pipe: a Wan pipeline; only its parts are used, not its own loop.
        processor: attached to the transformer alone, so nothing but `processor.step` tells it the step.
        prompt: what the video shows.
        steps: denoising steps.
        **size: height, width and num_frames.
    """
    device = pipe.transformer.device
    pipe.transformer.set_attn_processor(processor)
    text, negative = pipe.encode_prompt(prompt, negative_prompt="blurry", device=device)
    text, negative = text.to(pipe.transformer.dtype), negative.to(pipe.transformer.dtype)
    generator = torch.Generator("cpu").manual_seed(0)
    latents = pipe.prepare_latents(1, **size, dtype=torch.float32, device=device, generator=generator)
    latents = denoise(pipe.transformer, processor, latents, text, negative, steps=steps)
    # The latents are normalised per channel; the VAE takes them as it made them.
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(latents)
        for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    with torch.no_grad():
        video = pipe.vae.decode((latents * std + mean).to(pipe.vae.dtype)).sample
    return pipe.video_processor.postprocess_video(video)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="Hub id or local folder")
    parser.add_argument("--prompt", default="a red fox runs through fresh snow")
    parser.add_argument("--out", default="own_loop.mp4")
    args = parser.parse_args()

    pipe = WanPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16).to("cuda")
    processor = XAttnProcessor(threshold=0.9, warmup_steps=5)
    video = make_video(pipe, processor, args.prompt, steps=50, height=480, width=832, num_frames=81)
    export_to_video(video, args.out, fps=16)
    print(processor.stats.summary()["dense_calls"])


if __name__ == "__main__":
    main()
