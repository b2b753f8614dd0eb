"""What sparse attention costs the demo's model: does it still draw what was asked for?

    held-out prompts -> generate dense and sparse -> compare, judge -> paired differences -> a row

The dense and the sparse video of a prompt start from the same noise, so the difference of a share ("motion is right
in 2 of 100 videos less") is taken prompt by prompt; its interval is the percentile bootstrap over prompts. A
run that was killed goes on when started again. Curves over thresholds and other settings are `xattn-video sweep`'s.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xattn_video import XAttnConfig
from xattn_video_eval.compare import CompareSettings, compare
from xattn_video_eval.results import RESULTS, append_rows, provenance
from xattn_video_pipelines import cli
from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.demo_data import shipped_prompts
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import make_writable, write_texts
from xattn_video_pipelines.common.program import Parser, run_program
from xattn_video_pipelines.demo import judge_folder
from xattn_video_pipelines.video import Key, evenly_spaced, read_manifest

EXAMPLE = """\
example:
  python -m xattn_video_eval.studies.demo_quality --out quality --record
  python -m xattn_video_eval.studies.demo_quality --out quick --videos 8 --threshold 0.95
"""

LEDGER = RESULTS / "demo_quality.jsonl"
ATTRIBUTES = ("colour", "shape", "motion", "background", "all")
RESAMPLES = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m xattn_video_eval.studies.demo_quality`."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the videos; a run goes on")
    parser.add_argument("--model", default="demo", help="name or folder of a model of the shapes world (demo)")
    parser.add_argument("--videos", type=int, default=100, metavar="N", help="held-out prompts (default: 100)")
    parser.add_argument("--threshold", type=float, default=0.9, metavar="T", help="of the sparse videos (0.9)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps, of which 5 are dense (20)")
    parser.add_argument("--num-frames", type=int, default=33, help="frames a video (33)")
    parser.add_argument("--device", default="auto", help="as of xattn-video generate")
    parser.add_argument("--dtype", default="auto", help="as of xattn-video generate")
    parser.add_argument("--record", action="store_true", help=f"append the rows to eval/results/{LEDGER.name}")


def run(args: argparse.Namespace) -> int:
    """Make what is missing, judge and compare it, print the table; 0, or a failed program's code. Raises UserError."""
    prompts = _prompt_records(args.videos)
    # It has said itself what was wrong.
    if code := _generate(args, prompts):
        return code
    row = _row(args, prompts)
    print(_table(row))
    if args.record:
        append_rows(LEDGER, [row])
    print(json.dumps(row))
    return 0


def paired_difference(dense: Sequence[float], sparse: Sequence[float], *, seed: int = 0) -> dict[str, float]:
    """Mean of `sparse - dense` over the same prompts, with the 95 % percentile bootstrap interval over prompts.

    Args:
        dense, sparse: for each prompt whether it is right, or a share of it.

    Returns:
        `difference`, `low` and `high`, as shares (0.01 is one point).

    Raises:
        ValueError: different lengths, or none.
    """
    if len(dense) != len(sparse) or not dense:
        raise ValueError(f"dense and sparse must be of one length above 0, got {len(dense)} and {len(sparse)}")
    differences = np.array(sparse, np.float64) - np.array(dense, np.float64)
    draws = np.random.default_rng(seed).integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.percentile(differences[draws].mean(axis=1), (2.5, 97.5))
    return {"difference": float(differences.mean()), "low": float(low), "high": float(high)}


def _prompt_records(count: int) -> list[dict[str, Any]]:
    records = [record for _, record in jsonl.read(shipped_prompts("shapes-held-out.jsonl"))]
    if not 1 <= count <= len(records):
        raise UserError(f"--videos must be from 1 to {len(records)}, got {count}")
    return evenly_spaced(records, count)


def _generate(args: argparse.Namespace, prompts: list[dict[str, Any]]) -> int:
    """Make the videos of `prompts` that are missing, dense and sparse; the exit code of `xattn-video generate`."""
    make_writable(args.out)
    file = args.out / "prompts.jsonl"
    write_texts({file: jsonl.text(prompts)})
    generate = ["generate", "--model", args.model, "--prompts", str(file), "--attention", "both", "--lossless"]
    for name in ("threshold", "steps", "num_frames", "device", "dtype", "out"):
        generate += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return cli.main([*generate, "--height", "128", "--width", "128", "--guidance-scale", "1"])


def _row(args: argparse.Namespace, prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """What the videos of `prompts` show, dense and sparse."""
    config = XAttnConfig(threshold=args.threshold)
    dense, sparse = args.out / "dense", args.out / config.label()
    keys = [(record["id"], record["seed"]) for record in prompts]
    compared = compare(CompareSettings(dense, sparse, lpips=False, floor=False), keys=keys)
    judged = [_judged(folder, keys) for folder in (dense, sparse)]
    manifest = read_manifest(sparse)
    steps = [density for key in keys for density in manifest[key]["density_by_step"][config.warmup_steps :]]
    record = manifest[keys[0]]
    return {
        "threshold": args.threshold,
        "config": config.to_dict(),
        "videos": len(keys),
        "steps": args.steps,
        "tokens": record["tokens"],
        "right": {
            side: {name: float(np.mean(values)) for name, values in right.items()}
            for side, right in zip(("dense", "sparse"), judged, strict=True)
        },
        "difference": {name: paired_difference(judged[0][name], judged[1][name]) for name in ATTRIBUTES},
        "density": compared["density"],
        "sparse_density": float(np.mean(steps)),
        **{name: compared[name] for name in ("psnr", "ssim", "dense_seconds", "sparse_seconds", "speedup")},
        "device": record["device_name"],
        "dtype": record["dtype"],
        **provenance("diffusers", "transformers"),
    }


def _judged(folder: Path, keys: list[Key]) -> dict[str, list[bool]]:
    """For each attribute and for all of them: whether each video, in the order of `keys`, shows what was asked."""
    wrong = {(video["id"], video["seed"]): set(video["wrong"]) for video in judge_folder(folder, keys=keys)["videos"]}
    every = set(ATTRIBUTES) - {"all"}
    return {name: [wrong[key].isdisjoint(every if name == "all" else {name}) for key in keys] for name in ATTRIBUTES}


def _table(row: dict[str, Any]) -> str:
    """Shares in percent, dense -> sparse with the paired difference in points; then density, similarity, time."""
    lines = [f"threshold {row['threshold']:g}, {row['videos']} prompts, {row['steps']} steps:"]
    for name in ATTRIBUTES:
        dense, sparse = (100 * row["right"][side][name] for side in ("dense", "sparse"))
        points = {key: 100 * value for key, value in row["difference"][name].items()}
        interval = f"[{points['low']:+.1f}, {points['high']:+.1f}]"
        lines.append(f"  {name:<10} {dense:5.1f} % -> {sparse:5.1f} %  {points['difference']:+.1f} {interval}")
    lines.append(
        f"  density {row['sparse_density']:.3f} of the sparse calls, {row['density']:.3f} of all; "
        f"PSNR {row['psnr']:.2f} dB, SSIM {row['ssim']:.4f}; "
        f"{row['dense_seconds']:.1f} s -> {row['sparse_seconds']:.1f} s a video, {row['speedup']:.2f}x"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run as a program: 0, or 2 with one line for bad input."""
    parser = Parser(prog="python -m xattn_video_eval.studies.demo_quality", description=__doc__, epilog=EXAMPLE)
    add_arguments(parser)
    return run_program(parser, run, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
