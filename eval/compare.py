"""Compare sparse videos with the dense ones of the same prompts and seeds: PSNR, SSIM, LPIPS, time, density.

    pair by (id, seed)  ->  decode both, frame by frame  ->  metrics a frame  ->  a row a video  ->  a summary

The program behind `xattn-video compare`; `compare()` is the same from Python.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import itertools
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.metrics import PSNR_CAP_DB, Lpips, LpipsUnavailable, mean_psnr, psnr, ssim
from eval.pairs import Pair, find_pairs, shortened
from pipelines.errors import UserError
from pipelines.manifest import Record, video_name
from pipelines.video_io import iter_frames

METRICS_CSV = "metrics.csv"
FRAMES_CSV = "metrics_frames.csv"
SUMMARY_JSON = "summary.json"

EXAMPLE = """\
example:
  xattn-video compare out/dense out/xattn-s8-t0.90-w5
"""


@dataclass(frozen=True)
class FrameValues:
    """The metrics of each frame of one pair; `lpips` is None where it was not computed."""

    height: int
    width: int
    psnr: list[float]
    ssim: list[float]
    lpips: list[float] | None


def compare(
    dense_dir: str | os.PathLike[str],
    sparse_dir: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    lpips: bool = True,
    device: str = "auto",
    allow_unmatched: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure how far the videos of `sparse_dir` are from those of `dense_dir`.

    Videos are paired by the (id, seed) of each folder's manifest.jsonl. The lossless copies (.mkv) are decoded
    where both sides of a pair have one, otherwise both mp4 files. Only a few frames are held at a time.

    Args:
        dense_dir, sparse_dir: folders that `xattn-video generate` wrote.
        out: where metrics.csv (a row a video), metrics_frames.csv (a row a frame) and summary.json go;
            default `sparse_dir`. They appear together at the end; an error writes none of them.
        lpips: also compute LPIPS if its weights can be loaded.
        device: device of LPIPS; `auto` takes a GPU if there is one.
        allow_unmatched: compare the pairs there are and list the rest, instead of raising.
        workers: threads for PSNR and SSIM; None takes one a core.
        progress: show a bar on stderr.

    Returns:
        What summary.json holds: means over videos, totals, and the rows under "videos".

    Raises:
        UserError: one line; a folder or manifest is missing or empty, videos lack a partner, a file is missing
            or damaged, a pair differs in size, frame count, prompt or settings, or `out` cannot be written.
    """
    from tqdm import tqdm

    dense_dir, sparse_dir = Path(dense_dir), Path(sparse_dir)
    out_dir = sparse_dir if out is None else Path(out)
    pairs, unmatched = find_pairs(dense_dir, sparse_dir, allow_unmatched=allow_unmatched)
    _check_writable(out_dir)
    distance, lpips_unavailable = _lpips(lpips, device)

    rows: list[Record] = []
    frame_rows: list[Record] = []
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
        "lpips_unavailable": lpips_unavailable,
        "psnr_cap_db": PSNR_CAP_DB,
        "unmatched": unmatched,
        "videos": rows,
    }
    _write_together(
        {
            out_dir / METRICS_CSV: _csv(rows),
            out_dir / FRAMES_CSV: _csv(frame_rows),
            out_dir / SUMMARY_JSON: json.dumps(summary, indent=2, allow_nan=False) + "\n",
        }
    )
    return summary


def measure(pair: Pair, distance: Lpips | None, *, workers: int | None = None) -> FrameValues:
    """Decode both files of a pair side by side and measure each frame, PSNR and SSIM in `workers` threads.

    Raises:
        UserError: a file is damaged, the two differ in size or frame count, or are too small for a metric.
    """
    workers = workers or os.cpu_count() or 1
    pending: deque[Future[tuple[float, float]]] = deque()
    similarity: list[tuple[float, float]] = []
    perceptual: list[float] = []
    height = width = 0
    try:
        with ThreadPoolExecutor(workers) as pool:
            for dense, sparse in _frame_pairs(pair):
                height, width = dense.shape[:2]
                pending.append(pool.submit(_psnr_and_ssim, dense, sparse))
                if distance is not None:
                    perceptual.append(distance(dense, sparse))
                # Waiting for the oldest bounds the frames in memory.
                if len(pending) > 2 * workers:
                    similarity.append(pending.popleft().result())
            similarity += [future.result() for future in pending]
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{pair.name}: {error}") from error
    return FrameValues(
        height=height,
        width=width,
        psnr=[value for value, _ in similarity],
        ssim=[value for _, value in similarity],
        lpips=perceptual if distance is not None else None,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `xattn-video compare`."""
    parser.add_argument("dense_dir", metavar="DENSE_DIR", help="folder of the dense videos (the reference)")
    parser.add_argument("sparse_dir", metavar="SPARSE_DIR", help="folder of the sparse videos")
    parser.add_argument(
        "--out", metavar="DIR", help=f"where {METRICS_CSV}, {FRAMES_CSV} and {SUMMARY_JSON} go (SPARSE_DIR)"
    )
    parser.add_argument("--no-lpips", action="store_true", help="PSNR and SSIM only")
    parser.add_argument("--device", default="auto", help="device of LPIPS (default auto: a GPU if there is one)")
    parser.add_argument("--allow-unmatched", action="store_true", help="skip videos without a partner, and list them")
    parser.add_argument("--workers", type=int, metavar="N", help="threads for PSNR and SSIM (one a core)")
    parser.add_argument("--json", action="store_true", help="print the summary as the last line of stdout")


def run(args: argparse.Namespace) -> int:
    """`xattn-video compare`: print the table, write the files; returns the exit code. Raises UserError."""
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers must be at least 1, got {args.workers}")
    out = args.out or args.sparse_dir
    summary = compare(
        args.dense_dir,
        args.sparse_dir,
        out=out,
        lpips=not args.no_lpips,
        device=args.device,
        allow_unmatched=args.allow_unmatched,
        workers=args.workers,
    )
    print(format_summary(summary))
    print(f"wrote {METRICS_CSV}, {FRAMES_CSV} and {SUMMARY_JSON} in {out}")
    if args.json:
        print(json.dumps(summary, allow_nan=False))
    return 0


def format_summary(summary: dict[str, Any]) -> str:
    """The table and the notes under it, as printed."""
    columns = ("video", "frames", "dense s", "sparse s", "speed-up", "density", "PSNR dB", "SSIM", "LPIPS")
    lines: list[tuple[str, ...]] = [columns]
    lines += [_cells(row, shortened(video_name((row["id"], row["seed"])))) for row in summary["videos"]]
    lines.append(_cells(summary, "all (mean)"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    rule = "-" * len(table[0])
    text = [table[0], rule, *table[1:-1], rule, table[-1], *_notes(summary)]
    return "\n".join(line.rstrip() for line in text)


def _cells(row: dict[str, Any], name: str) -> tuple[str, ...]:
    formats = {"frames": "d", "dense_seconds": ".1f", "sparse_seconds": ".1f", "speedup": ".2f", "density": ".3f"}
    formats |= {"psnr": ".2f", "ssim": ".4f", "lpips": ".4f"}
    return (name, *("-" if row[key] is None else format(row[key], spec) for key, spec in formats.items()))


def _notes(summary: dict[str, Any]) -> list[str]:
    notes = []
    counts = summary["source"]
    if counts["lossless"]:
        notes.append(f"decoded: lossless copies (FFV1) of {counts['lossless']} pairs")
    if counts["mp4"]:
        why = "compression loss included; generate both sides with --lossless to leave it out"
        notes.append(f"decoded: mp4 (H.264) of {counts['mp4']} pairs, {why}")
    if summary["one_sided_lossless"]:
        notes.append(f"lossless copy on one side only, so mp4 on both: {summary['one_sided_lossless']} pairs")
    if summary["different_devices"]:
        notes.append(f"made on different devices, so no speed-up: {summary['different_devices']} pairs")
    if summary["lpips_unavailable"]:
        notes.append(f"LPIPS: unavailable ({summary['lpips_unavailable']})")
    if summary["identical_frames"]:
        notes.append(
            f"identical frames: {summary['identical_frames']}, each counted with {PSNR_CAP_DB:g} dB in PSNR means"
        )
    for side, names in summary["unmatched"].items():
        if names:
            notes.append(f"without a partner ({side.replace('_', ' ')}), left out: {', '.join(names)}")
    return notes


def _psnr_and_ssim(dense: np.ndarray, sparse: np.ndarray) -> tuple[float, float]:
    return psnr(dense, sparse), ssim(dense, sparse)


def _frame_pairs(pair: Pair) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The frames of both files side by side; both must end together and have one size."""
    with (
        contextlib.closing(iter_frames(pair.dense_file)) as dense_frames,
        contextlib.closing(iter_frames(pair.sparse_file)) as sparse_frames,
    ):
        for index, (dense, sparse) in enumerate(itertools.zip_longest(dense_frames, sparse_frames)):
            if dense is None or sparse is None:
                longer = index + 1 + sum(1 for _ in (sparse_frames if dense is None else dense_frames))
                counts = (index, longer) if dense is None else (longer, index)
                raise UserError(
                    f"{pair.name}: different frame counts: {counts[0]} in {pair.dense_file}, "
                    f"{counts[1]} in {pair.sparse_file}"
                )
            if dense.shape != sparse.shape:
                raise UserError(
                    f"{pair.name}: different sizes: {dense.shape[1]} x {dense.shape[0]} in {pair.dense_file}, "
                    f"{sparse.shape[1]} x {sparse.shape[0]} in {pair.sparse_file}"
                )
            yield dense, sparse


def _lpips(wanted: bool, device: str) -> tuple[Lpips | None, str | None]:
    """The network and None, or None and why there is none."""
    from pipelines.runner import resolve_device

    if not wanted:
        return None, "switched off"
    try:
        return Lpips(resolve_device(device)), None
    except LpipsUnavailable as error:
        return None, str(error)


def _devices_differ(pair: Pair) -> bool:
    return bool(pair.dense.get("device_name") != pair.sparse.get("device_name"))


def _speedup(pair: Pair) -> float | None:
    """Dense seconds by sparse seconds; times of two different devices have no ratio worth the name."""
    dense, sparse = pair.dense.get("seconds"), pair.sparse.get("seconds")
    return dense / sparse if dense and sparse and not _devices_differ(pair) else None


def _row(pair: Pair, values: FrameValues) -> Record:
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
        "density": pair.sparse.get("mean_density"),
        "dense_seconds": pair.dense.get("seconds"),
        "sparse_seconds": pair.sparse.get("seconds"),
        "speedup": _speedup(pair),
        "dense_file": str(pair.dense_file),
        "sparse_file": str(pair.sparse_file),
    }


def _frame_rows(pair: Pair, values: FrameValues) -> list[Record]:
    lpips: Sequence[float | None] = values.lpips or [None] * len(values.psnr)
    return [
        {"id": pair.key[0], "seed": pair.key[1], "frame": index, "psnr": one, "ssim": two, "lpips": three}
        for index, (one, two, three) in enumerate(zip(values.psnr, values.ssim, lpips, strict=True))
    ]


def _means(rows: Sequence[Record]) -> dict[str, Any]:
    """Means over videos; seconds too are means, and the speed-up is that of the whole set."""

    def mean(name: str) -> float | None:
        values = [row[name] for row in rows]
        return None if None in values else float(np.mean(values))

    means = {name: mean(name) for name in ("psnr", "ssim", "lpips", "density", "dense_seconds", "sparse_seconds")}
    dense_seconds, sparse_seconds = means["dense_seconds"], means["sparse_seconds"]
    speedup = None
    if dense_seconds and sparse_seconds and all(row["speedup"] is not None for row in rows):
        speedup = dense_seconds / sparse_seconds
    return {
        "pairs": len(rows),
        "frames": sum(row["frames"] for row in rows),
        "source": {kind: sum(row["source"] == kind for row in rows) for kind in ("lossless", "mp4")},
        **means,
        "speedup": speedup,
        "identical_frames": sum(row["identical_frames"] for row in rows),
    }


def _csv(rows: Sequence[Record]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _check_writable(folder: Path) -> None:
    """Say so before hours of decoding, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{SUMMARY_JSON}.partial"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot write here: {error.strerror}") from error


def _write_together(texts: dict[Path, str]) -> None:
    """Write every file under a temporary name, then rename them all."""
    partial = {path: path.with_name(f".{path.name}.partial") for path in texts}
    try:
        for path, text in texts.items():
            partial[path].write_text(text, encoding="utf-8")
        for path in texts:
            os.replace(partial[path], path)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot write: {error.strerror}") from error
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
