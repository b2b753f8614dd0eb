"""One prompt, dense and sparse from the same noise: how far are the two videos apart, and how fast was each?

python examples/compare.py --thresholds 0.8 0.9 0.95

`xattn-video generate` and `xattn-video compare` do the same for many prompts, with more measures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from xattn_video import XAttnConfig, XAttnProcessor

# After the line above: xattn_video works around a torchvision that was built for another torch.
from diffusers import WanPipeline  # isort: skip
from skimage.metrics import peak_signal_noise_ratio  # isort: skip


class Result(NamedTuple):
    """What one setting gave: a name, PSNR against dense in dB (inf for dense itself), density and seconds."""

    name: str
    psnr: float
    density: float
    seconds: float


def compare(pipe: Any, configs: Sequence[XAttnConfig], *, seed: int = 0, **inputs: Any) -> list[Result]:
    """Results of dense attention and of each setting, in this order.

    The first video of each kind also includes the compilation of its kernels, so on a GPU run it twice.

    Args:
        pipe: a video pipeline of diffusers; its transformers are as before afterwards.
        configs: settings of the sparse videos.
        seed: of the noise, the same for all videos.
        **inputs: what the pipeline takes, except `generator` and `output_type`.
    """
    results: list[Result] = []
    dense: Any = None
    for config in (None, *configs):
        processor = None if config is None else XAttnProcessor(config)
        pipe.set_attn_processor(processor)
        generator = torch.Generator("cpu").manual_seed(seed)
        started = time.perf_counter()
        video = np.asarray(pipe(**inputs, generator=generator, output_type="np").frames[0])
        seconds = time.perf_counter() - started
        if processor is None or config is None:
            dense = video
            results.append(Result("dense", float("inf"), 1.0, seconds))
        else:
            psnr = peak_signal_noise_ratio(dense, video, data_range=1.0)
            results.append(Result(config.label(), psnr, processor.stats.summary()["density"], seconds))
    pipe.set_attn_processor(None)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="Hub id or local folder")
    parser.add_argument("--prompt", default="a red fox runs through fresh snow")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    args = parser.parse_args()

    pipe = WanPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16).to("cuda")
    configs = [XAttnConfig(threshold=threshold) for threshold in args.thresholds]
    for result in compare(pipe, configs, prompt=args.prompt, num_frames=81):
        print(
            f"{result.name:22}  PSNR {result.psnr:5.1f} dB  density {result.density:.2f}  {result.seconds:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
