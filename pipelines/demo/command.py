"""`xattn-video demo`: prompt file -> dense and sparse videos -> comparison, on a small model, on any CPU."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from pipelines.demo import model
from pipelines.errors import UserError
from pipelines.manifest import read_manifest

EXAMPLE = """\
example:
  xattn-video demo --out demo-out
"""

# A fifth of the steps is dense, where real runs have a tenth (5 of 50).
STEPS, WARMUP_STEPS = 10, 2

_INTRODUCTION = """\
A small Wan pipeline (diffusers' and transformers' real classes, {parameters:.1f} M parameters) makes each video twice.
Its weights are a seeded random initialisation, not trained: the pictures are noise, whatever the prompt. What the
demo shows is the whole path, the time and the difference that sparse attention makes to the same noise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `xattn-video demo`."""
    parser.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="default: demo-out")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="default: the demo's own four prompts")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N prompts")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"denoising steps; default: {STEPS}")
    parser.add_argument("--num-frames", type=int, default=model.NUM_FRAMES, help=f"default: {model.NUM_FRAMES}")
    parser.add_argument("--overwrite", action="store_true", help="make finished videos anew")
    parser.add_argument("--json", action="store_true", help="the summary as one JSON document on the last line")


def run(args: argparse.Namespace) -> int:
    """Build the model, generate, compare, print the summary; returns the exit code of the first that fails.

    `args.run_command` runs another subcommand: the demo does what a user would type, and shows it.
    """
    out: Path = args.out
    prompts = args.prompts or demo_prompts()
    try:
        parameters = model.save_model(out / "model")
    except OSError as error:
        raise UserError(f"--out: cannot write to {out}: {error.strerror}") from None
    print(_INTRODUCTION.format(parameters=parameters / 1e6), flush=True)

    generate = ["generate", "--model", str(out / "model"), "--prompts", str(prompts), "--attention", "both"]
    generate += ["--height", str(model.HEIGHT), "--width", str(model.WIDTH), "--num-frames", str(args.num_frames)]
    generate += ["--fps", str(model.FPS), "--steps", str(args.steps), "--warmup-steps", str(WARMUP_STEPS)]
    generate += ["--lossless", "--device", "cpu", "--out", str(out)]
    generate += [] if args.limit is None else ["--limit", str(args.limit)]
    generate += ["--overwrite"] if args.overwrite else []
    code = _run(args, generate)
    if code != 0:
        return code

    dense, sparse = out / "dense", out / _label()
    compare = ["compare", str(dense), str(sparse), "--no-lpips", "--allow-unmatched"]
    code = _run(args, compare)
    if code != 0:
        return code
    summary = _summary(dense, sparse)
    print(_table(summary))
    print(f"videos: {dense} and {sparse}")
    if args.json:
        print(json.dumps(summary))
    return 0


def demo_prompts() -> Path:
    """The demo's prompt file: beside this module in an installed package, in `prompts/` of a checkout."""
    here = Path(__file__).resolve()
    for path in (here.parent / "demo.txt", here.parents[2] / "prompts" / "demo.txt"):
        if path.is_file():
            return path
    raise UserError("the demo's prompt file is missing from this installation; give one with --prompts")


def _run(args: argparse.Namespace, command: list[str]) -> int:
    print(f"\n$ xattn-video {shlex.join(command)}", flush=True)
    return args.run_command(command)


def _label() -> str:
    from xattn_video import XAttnConfig

    return XAttnConfig(warmup_steps=WARMUP_STEPS).label()


def _summary(dense: Path, sparse: Path) -> dict[str, Any]:
    """Means over the compared videos; step seconds leave text encoding and decoding out."""
    compared = json.loads((sparse / "summary.json").read_text(encoding="utf-8"))
    names = ("pairs", "dense_seconds", "sparse_seconds", "speedup", "density", "psnr", "ssim")
    keys = [(video["id"], video["seed"]) for video in compared["videos"]]
    records = [read_manifest(folder) for folder in (dense, sparse)]
    steps = [sum(side[key]["seconds_per_step"] for key in keys) for side in records]
    return {name: compared[name] for name in names} | {"speedup_of_steps": steps[0] / steps[1]}


def _table(summary: dict[str, Any]) -> str:
    columns = {
        "dense s": f"{summary['dense_seconds']:.1f}",
        "sparse s": f"{summary['sparse_seconds']:.1f}",
        "speed-up": f"{summary['speedup']:.2f}",
        "steps alone": f"{summary['speedup_of_steps']:.2f}",
        "density": f"{summary['density']:.3f}",
        "PSNR dB": f"{summary['psnr']:.2f}",
        "SSIM": f"{summary['ssim']:.4f}",
    }
    widths = [max(map(len, column)) for column in columns.items()]
    rows = (columns.keys(), columns.values())
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(["", f"summary: means over {summary['pairs']} videos", *lines])
