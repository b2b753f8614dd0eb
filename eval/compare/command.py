"""Compare sparse videos with the dense ones of the same prompts and seeds: likeness, flicker, time, density.

    pair by (id, seed)  ->  decode both, frame by frame  ->  metrics a frame  ->  a row a video  ->  a summary

The program behind `xattn-video compare`; `compare()` is the same from Python.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xattn_video_eval.compare.measure import FrameValues, measure
from xattn_video_eval.compare.metrics.flicker import (
    DEFINITIONS,
    RegionErrors,
    flicker_db,
    mean_regions,
    pooled_flicker,
    worst_cell,
)
from xattn_video_eval.compare.metrics.psnr_ssim import (
    LPIPS_NETS,
    PSNR_CAP_DB,
    Lpips,
    LpipsUnavailable,
    definitions,
    mean_psnr,
)
from xattn_video_eval.compare.pairs import Pair, find_pairs
from xattn_video_eval.compare.table import format_summary
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import make_writable, write_texts
from xattn_video_pipelines.video.manifest import Key, Record, read_manifest

METRICS_CSV = "metrics.csv"
FRAMES_CSV = "metrics_frames.csv"
SUMMARY_JSON = "summary.json"
# Where `generate --attention dense-alt` writes.
FLOOR = "dense-alt"

EXAMPLE = """\
example:
  xattn-video compare out/dense out/xattn-s8-t0.90-w5
  xattn-video compare out/dense out/xattn-s8-t0.90-w5 --lpips-net vgg --lpips-weights ~/checkpoints
"""


def compare(
    dense_dir: str | os.PathLike[str],
    sparse_dir: str | os.PathLike[str],
    *,
    keys: Collection[Key] | None = None,
    out: str | os.PathLike[str] | None = None,
    lpips: bool = True,
    lpips_net: str = "alex",
    lpips_weights: str | os.PathLike[str] | None = None,
    device: str = "auto",
    allow_unmatched: bool = False,
    workers: int | None = None,
    floor: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure how far the videos of `sparse_dir` are from those of `dense_dir`.

    Videos are paired by the (id, seed) of each folder's manifest.jsonl. The lossless copies (.mkv) are decoded
    where both sides of a pair have one, otherwise both mp4 files. Only a few frames are held at a time.

    Args:
        dense_dir, sparse_dir: folders that `xattn-video generate` wrote.
        keys: the (id, seed) of the videos that are compared; None takes all. Each must be on both sides.
        out: where metrics.csv (a row a video), metrics_frames.csv (a row a frame) and summary.json go;
            default `sparse_dir`. They appear together at the end; an error writes none of them.
        lpips: also compute LPIPS if its weights can be loaded; where they cannot, the summary says why.
        lpips_net: backbone of LPIPS, "alex", "vgg" or "squeeze".
        lpips_weights: folder with that backbone's torchvision checkpoint, instead of torch hub's cache. Weights
            that were named must load: an error otherwise.
        device: device of LPIPS; `auto` takes a GPU if there is one.
        allow_unmatched: compare the pairs there are and list the rest, instead of raising.
        workers: threads for all but LPIPS; None takes one a core, at most 8.
        floor: measure the noise floor too, where a folder `dense-alt` beside `dense_dir` has these videos.
        progress: show a bar on stderr.

    Returns:
        What summary.json holds: means over videos, totals, those of the noise floor under "floor" (or None), what
        each figure means under "definitions", and the rows under "videos", each with its 4 x 4 grid of mean squared
        errors.

    Raises:
        UserError: one line; a folder or manifest is missing or empty, videos lack a partner, a file is missing
            or damaged, a pair differs in size, frame count, prompt or settings, `lpips_weights` do not load, or
            `out` cannot be written.
    """
    from tqdm import tqdm

    dense_dir, sparse_dir = Path(dense_dir), Path(sparse_dir)
    out_dir = sparse_dir if out is None else Path(out)
    pairs, unmatched = find_pairs(dense_dir, sparse_dir, keys=keys, allow_unmatched=allow_unmatched)
    make_writable(out_dir)
    distance, lpips_unavailable = _lpips(lpips, device, lpips_net, lpips_weights)

    floor_pairs = _floor_pairs(dense_dir, sparse_dir, pairs) if floor else []

    rows: list[Record] = []
    frame_rows: list[Record] = []
    floor_rows = [
        _row(pair, measure(pair, distance, workers=workers))
        for pair in tqdm(floor_pairs, desc="noise floor", unit="video", disable=not (progress and floor_pairs))
    ]
    for pair in tqdm(pairs, desc="compare", unit="video", disable=not progress):
        values = measure(pair, distance, workers=workers)
        rows.append(_row(pair, values))
        frame_rows += _frame_rows(pair, values)

    summary = {
        "dense": str(dense_dir),
        "sparse": str(sparse_dir),
        "config": pairs[0].sparse.get("config"),
        **_means(rows),
        "one_sided_lossless": sum(pair.one_sided for pair in pairs),
        "different_devices": sum(_devices_differ(pair) for pair in pairs),
        "lpips_net": lpips_net,
        "lpips_unavailable": lpips_unavailable,
        "psnr_cap_db": PSNR_CAP_DB,
        "definitions": definitions(lpips_net) | DEFINITIONS,
        "unmatched": unmatched,
        "floor": _means(floor_rows) if floor_rows else None,
        "videos": rows,
    }
    write_texts(
        {
            out_dir / METRICS_CSV: _csv(rows),
            out_dir / FRAMES_CSV: _csv(frame_rows),
            out_dir / SUMMARY_JSON: json.dumps(summary, indent=2, allow_nan=False) + "\n",
        }
    )
    return summary


def _floor_pairs(dense_dir: Path, sparse_dir: Path, pairs: Sequence[Pair]) -> list[Pair]:
    """The same videos in the noise floor's folder, as far as they are there; none where the reference is not dense."""
    folder = dense_dir.parent / FLOOR
    if any(pair.dense.get("attention", "dense") != "dense" for pair in pairs):
        return []
    if folder.resolve() in (dense_dir.resolve(), sparse_dir.resolve()):
        return []
    there = read_manifest(folder)
    keys = [pair.key for pair in pairs if pair.key in there]
    return find_pairs(dense_dir, folder, keys=keys)[0] if keys else []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `xattn-video compare`."""
    parser.add_argument("dense_dir", metavar="DENSE_DIR", help="folder of the dense videos (the reference)")
    parser.add_argument("sparse_dir", metavar="SPARSE_DIR", help="folder of the sparse videos")
    parser.add_argument(
        "--out", metavar="DIR", help=f"where {METRICS_CSV}, {FRAMES_CSV} and {SUMMARY_JSON} go (SPARSE_DIR)"
    )
    parser.add_argument("--no-lpips", action="store_true", help="leave LPIPS out")
    parser.add_argument("--lpips-net", choices=LPIPS_NETS, default="alex", help="backbone of LPIPS (alex)")
    parser.add_argument(
        "--lpips-weights",
        metavar="FOLDER",
        help="where the backbone's torchvision checkpoint is (torch hub's cache, filled by a download)",
    )
    parser.add_argument("--device", default="auto", help="device of LPIPS (default auto: a GPU if there is one)")
    parser.add_argument("--allow-unmatched", action="store_true", help="skip videos without a partner, and list them")
    parser.add_argument("--workers", type=int, metavar="N", help="threads for all but LPIPS (one a core, at most 8)")
    parser.add_argument("--no-floor", action="store_true", help=f"no row of the videos in {FLOOR} beside DENSE_DIR")
    parser.add_argument("--json", action="store_true", help="print the summary as the last line of stdout")


def run(args: argparse.Namespace) -> int:
    """`xattn-video compare`: print the table, write the files; returns the exit code. Raises UserError."""
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers must be at least 1, got {args.workers}")
    if args.no_lpips and args.lpips_weights is not None:
        raise UserError("--no-lpips and --lpips-weights exclude each other")
    out = args.out or args.sparse_dir
    summary = compare(
        args.dense_dir,
        args.sparse_dir,
        out=out,
        lpips=not args.no_lpips,
        lpips_net=args.lpips_net,
        lpips_weights=args.lpips_weights,
        device=args.device,
        allow_unmatched=args.allow_unmatched,
        workers=args.workers,
        floor=not args.no_floor,
    )
    print(format_summary(summary))
    print(f"wrote {METRICS_CSV}, {FRAMES_CSV} and {SUMMARY_JSON} in {out}")
    if args.json:
        print(json.dumps(summary, allow_nan=False))
    return 0


def _lpips(
    wanted: bool, device: str, net: str, weights: str | os.PathLike[str] | None
) -> tuple[Lpips | None, str | None]:
    """The network and None, or None and why there is none. Weights that were named must load."""
    from xattn_video_pipelines.video.make import resolve_device

    if not wanted:
        return None, "switched off"
    try:
        return Lpips(resolve_device(device), net, weights), None
    except LpipsUnavailable as error:
        if weights is not None:
            raise UserError(f"LPIPS: {error}") from error
        return None, str(error)


def _devices_differ(pair: Pair) -> bool:
    return bool(pair.dense.get("device_name") != pair.sparse.get("device_name"))


def _speedup(pair: Pair) -> float | None:
    """Dense seconds by sparse seconds; times of two different devices have no ratio worth the name."""
    dense, sparse = pair.dense.get("seconds"), pair.sparse.get("seconds")
    return dense / sparse if dense and sparse and not _devices_differ(pair) else None


def _row(pair: Pair, values: FrameValues) -> Record:
    regions = mean_regions(values.regions)
    return {
        "id": pair.key[0],
        "seed": pair.key[1],
        "frames": len(values.psnr),
        "height": values.height,
        "width": values.width,
        "source": pair.source,
        "psnr": mean_psnr(values.psnr),
        "psnr_worst_frame": min(PSNR_CAP_DB, *values.psnr),
        "ssim": float(np.mean(values.ssim)),
        "ssim_worst_frame": min(values.ssim),
        "lpips": None if values.lpips is None else float(np.mean(values.lpips)),
        "identical_frames": sum(np.isinf(values.psnr).tolist()),
        **_flicker_columns(values),
        **_region_columns(regions),
        "density": pair.sparse.get("mean_density"),
        "dense_seconds": pair.dense.get("seconds"),
        "sparse_seconds": pair.sparse.get("seconds"),
        "speedup": _speedup(pair),
        "dense_file": str(pair.dense_file),
        "sparse_file": str(pair.sparse_file),
        "region_mse": [list(row) for row in regions.grid],
    }


def _flicker_columns(values: FrameValues) -> dict[str, float | int | None]:
    """A video of one frame has no steps, so no flicker."""
    steps = values.steps
    if not steps:
        return {"flicker": None, "flicker_db": None, "flicker_worst_step": None, "flicker_worst_frame": None}
    pooled = pooled_flicker(steps)
    return {
        "flicker": pooled,
        "flicker_db": flicker_db(pooled),
        "flicker_worst_step": max(steps),
        # The frame that the step leads to: the first frame has none.
        "flicker_worst_frame": 1 + steps.index(max(steps)),
    }


def _region_columns(regions: RegionErrors) -> dict[str, float | str | None]:
    worst = worst_cell(regions.grid) or (None, None)
    return {
        "border_psnr": regions.border_psnr,
        "centre_psnr": regions.centre_psnr,
        "border_excess_db": regions.border_excess_db,
        "worst_region": worst[0],
        "worst_region_share": worst[1],
    }


def _frame_rows(pair: Pair, values: FrameValues) -> list[Record]:
    lpips: Sequence[float | None] = values.lpips or [None] * len(values.psnr)
    return [
        {
            "id": pair.key[0],
            "seed": pair.key[1],
            "frame": index,
            "psnr": values.psnr[index],
            "ssim": values.ssim[index],
            "lpips": lpips[index],
            "flicker": values.flicker[index],
            **_region_columns(values.regions[index]),
        }
        for index in range(len(values.psnr))
    ]


def _means(rows: Sequence[Record]) -> dict[str, Any]:
    """Means over videos; seconds too are means, and the speed-up is that of the whole set."""

    def mean(name: str) -> float | None:
        values = [row[name] for row in rows]
        return None if None in values else float(np.mean(values))

    likeness = ("psnr", "ssim", "lpips", "flicker", "flicker_db", "border_psnr", "centre_psnr", "border_excess_db")
    means = {name: mean(name) for name in (*likeness, "density", "dense_seconds", "sparse_seconds")}
    dense_seconds, sparse_seconds = means["dense_seconds"], means["sparse_seconds"]
    speedup = None
    if dense_seconds and sparse_seconds and all(row["speedup"] is not None for row in rows):
        speedup = dense_seconds / sparse_seconds
    grid = np.mean([row["region_mse"] for row in rows], axis=0).tolist()
    worst = worst_cell(grid) or (None, None)
    return {
        "pairs": len(rows),
        "frames": sum(row["frames"] for row in rows),
        "source": {kind: sum(row["source"] == kind for row in rows) for kind in ("lossless", "mp4")},
        **means,
        "speedup": speedup,
        "identical_frames": sum(row["identical_frames"] for row in rows),
        "worst_region": worst[0],
        "worst_region_share": worst[1],
        "region_mse": grid,
    }


def _csv(rows: Sequence[Record]) -> str:
    text = io.StringIO()
    # A grid is no cell of a table: summary.json holds it.
    names = [name for name in rows[0] if name != "region_mse"]
    writer = csv.DictWriter(text, fieldnames=names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
