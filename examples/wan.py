"""Text to video with Wan and sparse attention.

python examples/wan.py --prompt "a red fox runs through fresh snow" --out fox.mp4
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from xattn_video import XAttnProcessor

# After the line above: xattn_video works around a torchvision that was built for another torch.
from diffusers import WanPipeline  # isort: skip
from diffusers.utils import export_to_video  # isort: skip


def make_video(pipe: Any, processor: XAttnProcessor, **inputs: Any) -> Any:
    """Frames of one video, made with sparse attention.

    Args:
        pipe: any video pipeline of diffusers; its transformers are as before afterwards.
        processor: the settings; its `stats` say what the attention calls did.
        **inputs: what the pipeline takes: prompt, num_frames, generator, ...
    """
    pipe.set_attn_processor(processor)
    try:
        return pipe(**inputs).frames[0]
    finally:
        pipe.set_attn_processor(None)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="Hub id or local folder")
    parser.add_argument("--prompt", default="a red fox runs through fresh snow")
    parser.add_argument("--size", type=int, nargs=3, default=(480, 832, 81), metavar=("HEIGHT", "WIDTH", "FRAMES"))
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--out", default="wan.mp4")
    args = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = WanPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16).to(device)
    processor = XAttnProcessor(stride=8, threshold=0.9, warmup_steps=5)
    height, width, frames = args.size
    video = make_video(
        pipe,
        processor,
        prompt=args.prompt,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=args.steps,
        # A generator on the CPU gives the same noise on every machine.
        generator=torch.Generator("cpu").manual_seed(0),
    )
    export_to_video(video, args.out, fps=16)
    summary = processor.stats.summary()
    print(f"{args.out}: density {summary['density']:.2f}, dense calls {summary['dense_calls']}")


if __name__ == "__main__":
    main()
