"""Text to video with HunyuanVideo: text and video share one sequence, some layers stay dense, blocks are compiled.

python examples/hunyuan.py --prompt "a cat walks on the grass" --out cat.mp4
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from xattn_video import XAttnConfig, XAttnProcessor

# After the line above: xattn_video works around a torchvision that was built for another torch.
from diffusers import HunyuanVideoPipeline  # isort: skip
from diffusers.utils import export_to_video  # isort: skip

# The paper's settings for HunyuanVideo, with the first two layers dense.
CONFIG = XAttnConfig.preset("hunyuan-video", dense_layers=(0, 1))


def make_video(pipe: Any, config: XAttnConfig, *, compile_blocks: bool = False, **inputs: Any) -> tuple[Any, Any]:
    """Frames of one video, and what its attention calls did (`stats.summary()`).

    The text after the video stays exact: its keys are always selected, and its queries see everything.
    """
    processor = XAttnProcessor(config)
    pipe.set_attn_processor(processor)
    if compile_blocks:
        # Attach first, then compile. Two graphs are made, one dense and one sparse.
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    return pipe(**inputs).frames[0], processor.stats.summary()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hunyuanvideo-community/HunyuanVideo", help="Hub id or local folder")
    parser.add_argument("--prompt", default="a cat walks on the grass")
    parser.add_argument("--out", default="hunyuan.mp4")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks of the transformer")
    args = parser.parse_args()

    pipe = HunyuanVideoPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16)
    pipe.vae.to(torch.float16).enable_tiling()
    pipe.enable_model_cpu_offload()
    generator = torch.Generator("cpu").manual_seed(0)
    video, summary = make_video(
        pipe, CONFIG, compile_blocks=args.compile, prompt=args.prompt, num_frames=129, generator=generator
    )
    export_to_video(video, args.out, fps=24)
    for layer, density in summary["density_by_layer"].items():
        print(f"{density:.2f}  {layer}")


if __name__ == "__main__":
    main()
