"""Compare sparse videos with the dense ones of the same prompts and seeds: likeness, flicker, time, density.

    pair by (id, seed)  ->  decode both, frame by frame  ->  metrics a frame  ->  a row a video  ->  a summary

The program behind `xattn-video compare`; from Python it is `compare(CompareSettings(dense_dir, sparse_dir))`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from dataclasses import replace
from json import dumps
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
    PSNR_CAP_DB,
    Lpips,
    LpipsUnavailable,
    definitions,
    mean_psnr,
)
from xattn_video_eval.compare.pairs import Pair, check_sides, find_pairs, find_sides
from xattn_video_eval.compare.settings import FLOOR, FRAMES_CSV, METRICS_CSV, SUMMARY_JSON, CompareSettings
from xattn_video_eval.compare.summary import read_summary
from xattn_video_eval.compare.table import column_lines, format_summary
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import check_stays, claimed, make_writable, write_texts
from xattn_video_pipelines.common.program import for_people
from xattn_video_pipelines.common.run_file import note_run
from xattn_video_pipelines.common.settings import Json
from xattn_video_pipelines.common.terminal import is_quiet, say
from xattn_video_pipelines.video import Key, Record, busy, read_manifest

_COLUMN_LINES = "\n".join(column_lines(definitions(CompareSettings.lpips_net) | DEFINITIONS))
EXAMPLE = f"""\
example:
  xattn-video compare out
  xattn-video compare out/dense out/xattn-s8-t0.90-w5
  xattn-video compare out/dense out/xattn-s8-t0.90-w5 --lpips-net vgg --lpips-weights ~/checkpoints

columns, which --verbose explains below the table too:
{_COLUMN_LINES}
"""


def compare(settings: CompareSettings, *, keys: Collection[Key] | None = None, progress: bool = True) -> dict[str, Any]:
    """Measure how far the videos of `sparse_dir` are from those of `dense_dir`, and write the files of the settings.

    Videos are paired by the (id, seed) of each folder's manifest.jsonl. The lossless copies (.mkv) are decoded
    where both sides of a pair have one, otherwise both mp4 files. Only a few frames are held at a time.
    metrics.csv has a row per video, metrics_frames.csv a row per frame. The three files appear together at the end;
    an error writes none of them. Where another process compares into the same folder, this one waits for it, and takes
    its summary if it is of the same videos and settings.

    Args:
        settings: the folders, which `xattn-video generate` wrote, or that of a run with one sparse folder, and how
            they are compared.
        keys: the (id, seed) of the videos that are compared; None takes all. Each must be on both sides.
        progress: show a bar on stderr.

    Returns:
        What summary.json holds: means over videos, totals, those of the noise floor under "floor" (or None), what
        each figure means under "definitions", and the rows under "videos", each with its 4 x 4 grid of mean squared
        errors.

    Raises:
        UserError: one line; a folder or manifest is missing or empty, videos lack a partner, a file is missing
            or damaged, a pair differs in size, frame count, prompt or settings, `lpips_weights` do not load, or
            the files cannot be written.
    """
    found = each_of(settings)
    if len(found) > 1:
        listed = ", ".join(str(one.sparse_dir) for one in found)
        raise UserError(f"{settings.dense_dir}: has several sparse folders: {listed}; compare them one by one")
    (settings,) = found
    dense_dir, sparse_dir = _sides(settings)
    pairs, unmatched = find_pairs(dense_dir, sparse_dir, keys=keys, allow_unmatched=settings.allow_unmatched)
    make_writable(settings.folder)
    note_run(settings.folder)
    asked = _asked(settings, pairs)
    with claimed(settings.folder / SUMMARY_JSON, wait=True) as waited:
        made = _made_meanwhile(settings, asked) if waited else None
        if made is not None:
            return made
        summary = _measured(settings, pairs, progress) | {"unmatched": unmatched, "asked": asked}
        rows, frame_rows = summary["videos"], summary.pop("frame_rows")
        write_texts(
            {
                settings.folder / METRICS_CSV: _csv(rows),
                settings.folder / FRAMES_CSV: _csv(frame_rows),
                settings.folder / SUMMARY_JSON: dumps(summary, indent=2, allow_nan=False) + "\n",
            }
        )
    return summary


def each_of(settings: CompareSettings) -> list[CompareSettings]:
    """The comparisons that are asked for, each of two folders: one, or where a run is named, one per sparse folder.

    Raises:
        UserError: as `find_sides`; `out` is given and there are several.
    """
    if settings.sparse_dir is not None:
        return [settings]
    dense, sparse = find_sides(settings.dense_dir)
    if settings.out is not None and len(sparse) > 1:
        raise UserError(f"--out is for one comparison, and {settings.dense_dir} has {len(sparse)} sparse folders")
    return [replace(settings, dense_dir=dense, sparse_dir=folder) for folder in sparse]


def _sides(settings: CompareSettings) -> tuple[Path, Path]:
    assert settings.sparse_dir is not None
    return settings.dense_dir, settings.sparse_dir


def _asked(settings: CompareSettings, pairs: Sequence[Pair]) -> dict[str, Any]:
    """What a summary is of: with equal values, another process measures the same."""
    return {
        "lpips_net": settings.lpips_net if settings.lpips else None,
        "lpips_weights": settings.lpips_weights and str(settings.lpips_weights),
        "floor": settings.floor,
        "device": settings.device,
        "videos": [[*pair.key, pair.dense.get("finished"), pair.sparse.get("finished")] for pair in pairs],
    }


def _made_meanwhile(settings: CompareSettings, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The summary that another process has written while this one waited, if it is the one that is wanted."""
    try:
        summary = read_summary(settings.folder)
    except (OSError, ValueError):
        return None
    same = (summary.get("dense"), summary.get("sparse")) == (str(settings.dense_dir), str(settings.sparse_dir))
    found = summary.get("asked")
    if not same or not isinstance(found, dict):
        return None
    # A noise floor that nobody asked for does no harm.
    return summary if found == asked or (not settings.floor and {**found, "floor": False} == asked) else None


def _measured(settings: CompareSettings, pairs: Sequence[Pair], progress: bool) -> dict[str, Any]:
    """The summary but for what was asked, and under "frame_rows" the rows of metrics_frames.csv."""
    from tqdm import tqdm

    dense_dir, sparse_dir = _sides(settings)
    distance, lpips_unavailable = _lpips(settings)
    floor_pairs = _floor_pairs(dense_dir, sparse_dir, pairs) if settings.floor else []

    rows: list[Record] = []
    frame_rows: list[Record] = []
    no_bar = is_quiet() or not progress
    floor_rows = [
        _row(pair, measure(pair, distance, workers=settings.workers))
        for pair in tqdm(floor_pairs, desc="noise floor", unit="video", disable=no_bar or not floor_pairs)
    ]
    for pair in tqdm(pairs, desc="compare", unit="video", disable=no_bar):
        values = measure(pair, distance, workers=settings.workers)
        rows.append(_row(pair, values))
        frame_rows += _frame_rows(pair, values)

    return {
        "dense": str(dense_dir),
        "sparse": str(sparse_dir),
        "config": pairs[0].sparse.get("config"),
        **_means(rows),
        "one_sided_lossless": sum(pair.one_sided for pair in pairs),
        "different_devices": sum(_devices_differ(pair) for pair in pairs),
        "busy": busy(record for pair in pairs for record in (pair.dense, pair.sparse)),
        "lpips_net": settings.lpips_net,
        "lpips_unavailable": lpips_unavailable,
        "psnr_cap_db": PSNR_CAP_DB,
        "definitions": definitions(settings.lpips_net) | DEFINITIONS,
        "floor": _means(floor_rows) if floor_rows else None,
        "videos": rows,
        "frame_rows": frame_rows,
    }


def _floor_pairs(dense_dir: Path, sparse_dir: Path, pairs: Sequence[Pair]) -> list[Pair]:
    """The same videos in the noise floor's folder, as far as they are there; none where the reference is not dense."""
    folder = dense_dir.parent / FLOOR
    if any(pair.dense.get("attention", "dense") != "dense" for pair in pairs):
        return []
    if folder.resolve() in (dense_dir.resolve(), sparse_dir.resolve()):
        return []
    check_stays(folder, dense_dir.parent)
    there = read_manifest(folder)
    keys = [pair.key for pair in pairs if pair.key in there]
    return find_pairs(dense_dir, folder, keys=keys)[0] if keys else []


def command(settings: CompareSettings, *, json: Json = False) -> int:
    """`xattn-video compare`: write the files, print the tables; returns the exit code. Raises UserError.

    With `json` it prints the summary, or where a run was named the list of its summaries.
    """
    people, summaries = for_people(json), []
    for one in each_of(settings):
        if settings.sparse_dir is None:
            say(f"videos of {one.sparse_dir}, compared with the dense ones of {one.dense_dir}:", people)
        check_sides(*_sides(one))
        summaries.append(compare(one))
        say(format_summary(summaries[-1]), people)
        say(f"wrote {METRICS_CSV}, {FRAMES_CSV} and {SUMMARY_JSON} in {one.folder}", people)
    if json:
        print(dumps(summaries if settings.sparse_dir is None else summaries[0], allow_nan=False))
    return 0


def _lpips(settings: CompareSettings) -> tuple[Lpips | None, str | None]:
    """The network and None, or None and why there is none. Weights that were named must load."""
    from xattn_video_pipelines.common.environment import resolve_device

    if not settings.lpips:
        return None, "switched off"
    try:
        return Lpips(resolve_device(settings.device), settings.lpips_net, settings.lpips_weights), None
    except LpipsUnavailable as error:
        if settings.lpips_weights is not None:
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
