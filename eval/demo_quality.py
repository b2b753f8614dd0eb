"""What sparse attention costs the demo's model: does it still draw what was asked for?

    held-out prompts -> generate dense and at every threshold -> compare, judge -> paired differences -> rows, a plot

The dense and the sparse video of a prompt start from the same noise, so the difference of a share ("motion is right
in 2 of 100 videos less") is taken prompt by prompt; its interval is the percentile bootstrap over prompts. The
noise floor is dense attention in another order of summation. A run that was killed goes on when started again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from eval.compare import compare
from pipelines import cli
from pipelines.demo.judging import judge_folder
from pipelines.environment import source_commit, versions
from pipelines.errors import UserError
from pipelines.manifest import Key, read_manifest
from pipelines.prompts import evenly_spaced, shipped_prompts
from xattn_video import XAttnConfig

EXAMPLE = """\
example:
  python -m eval.demo_quality --out quality --record
  python -m eval.demo_quality --out quick --videos 8 --curve 0
"""

LEDGER = Path(__file__).resolve().parent / "results" / "demo_quality.jsonl"
ATTRIBUTES = ("colour", "shape", "motion", "background", "all")
THRESHOLD = 0.9
CURVE = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
RESAMPLES = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m eval.demo_quality`."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="videos, tables, plot; a run goes on")
    parser.add_argument("--model", default="demo", help="name or folder of a model of the shapes world (demo)")
    parser.add_argument("--videos", type=int, default=100, metavar="N", help="held-out prompts (default: 100)")
    parser.add_argument("--curve", type=int, default=16, metavar="N", help="of them, for each threshold (16; 0: none)")
    parser.add_argument("--thresholds", type=float, nargs="+", default=CURVE, metavar="T", help=f"default: {CURVE}")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps, of which 5 are dense (20)")
    parser.add_argument("--num-frames", type=int, default=33, help="frames a video (33)")
    parser.add_argument("--device", default="auto", help="as of xattn-video generate")
    parser.add_argument("--dtype", default="auto", help="as of xattn-video generate")
    parser.add_argument("--record", action="store_true", help=f"append the rows to eval/results/{LEDGER.name}")


def run(args: argparse.Namespace) -> int:
    """Generate what is missing, judge and compare it all, print the tables; 0. Raises UserError."""
    prompts = _prompt_records(args.videos)
    few = evenly_spaced(prompts, args.curve) if args.curve else []
    rows = [_row(args, prompts, THRESHOLD, "main")]
    curve = [_row(args, few, threshold, "curve") for threshold in args.thresholds if few]
    rows += [*curve, _row(args, few, None, "floor")] if few else []
    print(_table(rows))
    if few:
        plot(curve, rows[-1], args.out / "thresholds.png")
        print(f"plot: {args.out / 'thresholds.png'}")
    if args.record:
        with open(LEDGER, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"appended {len(rows)} rows to {LEDGER}")
    print(json.dumps({"rows": rows}))
    return 0


def paired_difference(dense: list[bool], sparse: list[bool], *, seed: int = 0) -> dict[str, float]:
    """Mean of `sparse - dense` over the same prompts, with the 95 % percentile bootstrap interval over prompts.

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


def plot(rows: list[dict[str, Any]], floor: dict[str, Any], path: Path) -> None:
    """Density of the sparse calls against the threshold, and what is kept of the dense video at each density.

    `floor` is the row of dense attention in another order of summation, against which the others are read.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a plot needs matplotlib: pip install 'xattn-video[plot]'; or use --curve 0") from None
    rows = sorted(rows, key=lambda row: row["threshold"])
    thresholds, densities = ([row[name] for row in rows] for name in ("threshold", "sparse_density"))
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    first.plot(thresholds, densities, "o-")
    first.set(xlabel="threshold", ylabel="density of the sparse calls", ylim=(0, 1))
    second.plot(densities, [row["psnr"] for row in rows], "o-")
    second.axhline(floor["psnr"], color="grey", linestyle="--", label="noise floor")
    second.set(xlabel="density of the sparse calls", ylabel="PSNR against dense, dB", xlim=(0, 1))
    second.legend(loc="upper left")
    third.plot(densities, [100 * row["right"]["sparse"]["all"] for row in rows], "o-", label="sparse")
    third.axhline(100 * rows[0]["right"]["dense"]["all"], color="grey", linestyle="--", label="dense")
    third.set(xlabel="density of the sparse calls", ylabel="all as asked, % of videos", xlim=(0, 1), ylim=(0, 103))
    third.legend(loc="lower right")
    for axes in (first, second, third):
        axes.grid(alpha=0.3)
    figure.suptitle(f"demo model, {rows[0]['tokens']:,} tokens, {rows[0]['videos']} held-out prompts")
    figure.savefig(path, dpi=110)


def _prompt_records(count: int) -> list[dict[str, Any]]:
    records = [
        json.loads(line) for line in shipped_prompts("shapes-held-out.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    if not 1 <= count <= len(records):
        raise UserError(f"--videos must be from 1 to {len(records)}, got {count}")
    return evenly_spaced(records, count)


def _row(args: argparse.Namespace, prompts: list[dict[str, Any]], threshold: float | None, kind: str) -> dict[str, Any]:
    """Make the videos of `prompts` that are missing, dense and at `threshold` (None: the floor's), and measure all."""
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{kind}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in prompts), encoding="utf-8")
    attention = ["dense-alt"] if threshold is None else ["both", "--threshold", str(threshold)]
    generate = ["generate", "--model", args.model, "--prompts", str(file), "--attention", *attention]
    generate += ["--steps", str(args.steps), "--guidance-scale", "1"]
    generate += ["--height", "128", "--width", "128", "--num-frames", str(args.num_frames)]
    generate += ["--lossless", "--device", args.device, "--dtype", args.dtype, "--out", str(args.out)]
    started = time.perf_counter()
    code = cli.main(generate)
    if code != 0:
        raise UserError(f"xattn-video {' '.join(generate)} failed with exit code {code}")

    config = None if threshold is None else XAttnConfig(threshold=threshold)
    label = "dense-alt" if config is None else config.label()
    dense, sparse = args.out / "dense", args.out / label
    keys = [(record["id"], record["seed"]) for record in prompts]
    compared = compare(dense, sparse, lpips=False, allow_unmatched=True, floor=False, out=args.out / f"{kind}-{label}")
    videos = [video for video in compared["videos"] if (video["id"], video["seed"]) in set(keys)]
    records = [[read_manifest(folder)[key] for key in keys] for folder in (dense, sparse)]
    judged = [_judged(folder, keys) for folder in (dense, sparse)]
    seconds = [sum(record["seconds"] for record in side) for side in records]
    warmup = 0 if config is None else config.warmup_steps
    sparse_steps = [density for record in records[1] for density in record["density_by_step"][warmup:]]
    record = records[1][0]
    return {
        "kind": kind,
        "threshold": threshold,
        "config": None if config is None else config.to_dict(),
        "videos": len(keys),
        "steps": args.steps,
        "tokens": record["tokens"],
        "right": {
            side: {name: float(np.mean(values)) for name, values in right.items()}
            for side, right in zip(("dense", "sparse"), judged, strict=True)
        },
        "difference": {name: paired_difference(judged[0][name], judged[1][name]) for name in ATTRIBUTES},
        "density": float(np.mean([video["density"] for video in videos])),
        "sparse_density": float(np.mean(sparse_steps)),
        "psnr": float(np.mean([video["psnr"] for video in videos])),
        "ssim": float(np.mean([video["ssim"] for video in videos])),
        "dense_seconds": seconds[0] / len(keys),
        "sparse_seconds": seconds[1] / len(keys),
        "speedup": seconds[0] / seconds[1],
        "made_in_seconds": round(time.perf_counter() - started, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": record["device_name"],
        "dtype": record["dtype"],
        "versions": versions(("xattn-video", "torch", "diffusers", "transformers")),
        "commit": source_commit(),
    }


def _judged(folder: Path, keys: list[Key]) -> dict[str, list[bool]]:
    """For each attribute and for all of them: whether each video, in the order of `keys`, shows what was asked."""
    wrong = {(video["id"], video["seed"]): set(video["wrong"]) for video in judge_folder(folder, keys=keys)["videos"]}
    every = set(ATTRIBUTES) - {"all"}
    return {name: [wrong[key].isdisjoint(every if name == "all" else {name}) for key in keys] for name in ATTRIBUTES}


def _table(rows: list[dict[str, Any]]) -> str:
    """Shares in percent, dense > sparse with the paired difference in points; then density, similarity, time."""
    lines = []
    for row in rows:
        what = "noise floor" if row["threshold"] is None else f"threshold {row['threshold']:g}"
        lines.append(f"{what}, {row['videos']} prompts, {row['steps']} steps:")
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
    parser = argparse.ArgumentParser(
        prog="python -m eval.demo_quality",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(arguments))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
