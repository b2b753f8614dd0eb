"""The table that `xattn-video compare` prints, the notes under it, and what its columns mean."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from xattn_video_eval.compare.metrics.psnr_ssim import PSNR_CAP_DB
from xattn_video_eval.compare.pairs import shortened
from xattn_video_pipelines.common.tables import aligned
from xattn_video_pipelines.common.terminal import is_verbose
from xattn_video_pipelines.video import video_name

_WIDTH = 110

# Column heads and how their values are written, by the name in a summary's rows.
_COLUMNS = {
    "frames": ("frames", "d"),
    "dense_seconds": ("dense s", ".1f"),
    "sparse_seconds": ("sparse s", ".1f"),
    "speedup": ("speed-up", ".2f"),
    "density": ("density", ".3f"),
    "psnr": ("PSNR dB", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "lpips": ("LPIPS", ".4f"),
    "flicker": ("flicker", ".4f"),
    "border_excess_db": ("edge dB", "+z.1f"),
    "worst_region": ("worst", ""),
}
# A column's head by the name in a summary's rows, for those who explain the columns elsewhere.
COLUMN_HEADS = {name: head for name, (head, _) in _COLUMNS.items()}


def format_summary(summary: dict[str, Any]) -> str:
    """The table and the notes under it as printed; with `--verbose` also what its columns mean."""
    lines: list[tuple[str, ...]] = [("video", *(head for head, _ in _COLUMNS.values()))]
    lines += [_cells(row, shortened(video_name((row["id"], row["seed"])))) for row in summary["videos"]]
    means = [_cells(summary, "all (mean)")]
    means += [_cells(summary["floor"], "noise floor (mean)")] if summary["floor"] else []
    lines += means
    # One rule under the head, and one above the means.
    rules = (1, len(lines) - len(means))
    shown = {key: text for key, text in summary["definitions"].items() if summary[key] is not None}
    told = column_lines(shown) if is_verbose() else ["columns: explained by xattn-video compare --help"]
    return "\n".join([aligned(lines, left=1, rules=rules), *_notes(summary), *told])


def _cells(row: dict[str, Any], name: str) -> tuple[str, ...]:
    cells = {key: "-" if row[key] is None else format(row[key], spec) for key, (_, spec) in _COLUMNS.items()}
    if row["worst_region"] is not None:
        cells["worst_region"] += f" {100 * row['worst_region_share']:.0f}%"
    return (name, *cells.values())


def column_lines(definitions: Mapping[str, str]) -> list[str]:
    """What columns mean, by their names in a summary's rows, in lines of a terminal's width."""
    lines = []
    for key, text in definitions.items():
        head = f"{_COLUMNS[key][0]}: "
        lines += textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
    return lines


def _pairs(number: int) -> str:
    return "1 pair" if number == 1 else f"{number} pairs"


def _notes(summary: dict[str, Any]) -> list[str]:
    notes = []
    counts = summary["source"]
    if counts["lossless"]:
        notes.append(f"decoded: lossless copies (FFV1) of {_pairs(counts['lossless'])}")
    if counts["mp4"]:
        why = "compression loss included; generate both sides with --lossless to leave it out"
        notes.append(f"decoded: mp4 (H.264) of {_pairs(counts['mp4'])}, {why}")
    if summary["one_sided_lossless"]:
        notes.append(f"lossless copy on one side only, so mp4 on both: {_pairs(summary['one_sided_lossless'])}")
    if summary["different_devices"]:
        notes.append(f"made on different devices, so no speed-up: {_pairs(summary['different_devices'])}")
    if summary["busy"]:
        notes.append(f"{summary['busy']}: timings are not reliable")
    if summary["lpips_unavailable"]:
        notes.append(f"LPIPS: unavailable ({summary['lpips_unavailable']})")
    if summary["identical_frames"]:
        notes.append(
            f"identical frames: {summary['identical_frames']}, each counted with {PSNR_CAP_DB:g} dB in PSNR means"
        )
    if summary["floor"]:
        notes.append(f"noise floor: dense in another order of summation, {summary['floor']['pairs']} videos")
    else:
        notes.append("noise floor: not measured; xattn-video generate --attention dense-alt makes its videos")
    for side, names in summary["unmatched"].items():
        if names:
            notes.append(f"without a partner ({side.replace('_', ' ')}), left out: {', '.join(names)}")
    return notes
