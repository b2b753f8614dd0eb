"""What sparse attention costs the demo's model: does it still draw what was asked for?

    held-out prompts -> generate dense and sparse -> compare, judge -> paired differences -> a row

The dense and the sparse video of a prompt start from the same noise, so the difference of a share ("motion is right
in 2 of 100 videos less") is taken prompt by prompt; its interval is the percentile bootstrap over prompts. A
run that was killed goes on when started again. Curves over thresholds and other settings are `xattn-video sweep`'s.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from xattn_video import XAttnConfig
from xattn_video_eval.compare import CompareSettings, compare
from xattn_video_eval.results import RESULTS, append_rows, mean_interval, provenance
from xattn_video_eval.studies.held_out import write_prompts
from xattn_video_pipelines.cli import module_of
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.program import run_alone
from xattn_video_pipelines.common.settings import DtypeOrAuto, Option, Settings
from xattn_video_pipelines.demo import judge_folder
from xattn_video_pipelines.video import GenerateSettings, Key, read_manifest

EXAMPLE = """\
example:
  python -m xattn_video_eval.studies.demo_quality --out quality --record
  python -m xattn_video_eval.studies.demo_quality --out quick --videos 8 --threshold 0.95
"""

LEDGER = RESULTS / "demo_quality.jsonl"
ATTRIBUTES = ("colour", "shape", "motion", "background", "all")


@dataclass(frozen=True, kw_only=True)
class DemoQualitySettings(Settings):
    """Which videos are made, and how many. `threshold` is that of the sparse ones; 5 of the `steps` are dense."""

    out: Annotated[Path, Option("of the videos; a run goes on", metavar="DIR")]
    model: Annotated[str, Option("name or folder of a model of the shapes world")] = "demo"
    videos: Annotated[int, Option("held-out prompts", metavar="N")] = 100
    threshold: Annotated[float, Option("of the sparse videos", metavar="T")] = 0.9
    steps: Annotated[int, Option("denoising steps, of which 5 are dense")] = 20
    num_frames: Annotated[int, Option("frames a video")] = 33
    device: Annotated[str, Option("as of xattn-video generate")] = "auto"
    dtype: Annotated[DtypeOrAuto, Option("as of xattn-video generate")] = "auto"
    record: Annotated[bool, Option(f"append the rows to eval/results/{LEDGER.name}")] = False


def demo_quality(settings: DemoQualitySettings) -> int:
    """Make what is missing, judge and compare it, print the table; 0. Raises UserError."""
    file, prompts = write_prompts(settings.out, settings.videos)
    _generate(settings, file)
    row = _row(settings, prompts)
    print(_table(row))
    if settings.record:
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
    low, high = mean_interval(differences.tolist(), seed=seed)
    return {"difference": float(differences.mean()), "low": low, "high": high}


def _generate(settings: DemoQualitySettings, file: Path) -> None:
    """Make the videos of a prompt file that are missing, dense and sparse, as `xattn-video generate` does."""
    generating = GenerateSettings(
        model=settings.model, prompts=file, attention="both", lossless=True, threshold=settings.threshold,
        steps=settings.steps, num_frames=settings.num_frames, height=128, width=128, guidance_scale=1.0,
        device=settings.device, dtype=settings.dtype, out=settings.out,
    )  # fmt: skip
    if module_of("generate").command(generating):
        raise UserError("some videos failed, as said above; run the same command again")


def _row(settings: DemoQualitySettings, prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """What the videos of `prompts` show, dense and sparse."""
    config = XAttnConfig(threshold=settings.threshold)
    dense, sparse = settings.out / "dense", settings.out / config.label()
    keys = [(record["id"], record["seed"]) for record in prompts]
    compared = compare(CompareSettings(dense, sparse, lpips=False, floor=False), keys=keys)
    judged = [_judged(folder, keys) for folder in (dense, sparse)]
    manifest = read_manifest(sparse)
    steps = [density for key in keys for density in manifest[key]["density_by_step"][config.warmup_steps :]]
    record = manifest[keys[0]]
    return {
        "threshold": settings.threshold,
        "config": config.to_dict(),
        "videos": len(keys),
        "steps": settings.steps,
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program: 0, or 2 with one line for bad input."""
    return run_alone(demo_quality, "xattn_video_eval.studies.demo_quality", __doc__ or "", EXAMPLE, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
