"""One self-contained page about a run: settings, every configuration with the noise floor, players, density, speed.

    manifests, summaries (measured where missing)  ->  worst cases first  ->  videos, tables, charts  ->  report.html

The program behind `xattn-video report`; `write_report()` is the same from Python.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

from xattn_video_eval.report.data import load_run, worst_first
from xattn_video_eval.report.page import build_page
from xattn_video_eval.report.videos import embed
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import write_texts

REPORT = "report.html"
MAX_MEGABYTES = 64.0

EXAMPLE = """\
example:
  xattn-video generate --model demo --prompts prompts/demo.txt --attention all --lossless --out out
  xattn-video report out
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `xattn-video report`."""
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="the --out of generate: dense/ and what to compare")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"default: RUN/{REPORT}")
    parser.add_argument(
        "--max-megabytes", type=float, default=MAX_MEGABYTES, metavar="N",
        help=f"videos in the page, worst cases first, until this size; 0 for none (default {MAX_MEGABYTES:g})",
    )  # fmt: skip
    group = parser.add_argument_group("folders without a summary of their present videos are compared; options of that")
    group.add_argument("--no-lpips", action="store_true", help="leave LPIPS out")
    group.add_argument("--lpips-weights", metavar="FOLDER", help="as of compare")
    group.add_argument("--device", default="auto", help="device of LPIPS (default auto: a GPU if there is one)")


def run(args: argparse.Namespace) -> int:
    """`xattn-video report`: write the page; returns the exit code. Raises UserError."""
    if args.no_lpips and args.lpips_weights is not None:
        raise UserError("--no-lpips and --lpips-weights exclude each other")
    out = write_report(
        args.run_dir,
        args.out,
        max_megabytes=args.max_megabytes,
        lpips=not args.no_lpips,
        lpips_weights=args.lpips_weights,
        device=args.device,
    )
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB); it needs no other file and no network")
    return 0


def write_report(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    max_megabytes: float = MAX_MEGABYTES,
    progress: bool = True,
    **measuring: Any,
) -> Path:
    """Write the page about a run and give its path.

    Args:
        run_dir: folder with dense/ and at least one other folder that `generate` or `sweep` wrote.
        out: the page; default `run_dir`/report.html. Written whole or not at all.
        max_megabytes: limit in 10^6 bytes on the embedded videos (as base64), the worst cases first; 0 for none.
        progress: show bars on stderr.
        measuring: options of `compare` for folders without a summary of their present videos; that
            summary is then written there.

    Raises:
        UserError: one line; RUN is no run, a video is missing, damaged or cut off, or the page cannot be written.
    """
    if not (math.isfinite(max_megabytes) and max_megabytes >= 0):
        raise UserError(f"--max-megabytes must be a number from 0, got {max_megabytes}")
    run_dir = Path(run_dir)
    path = run_dir / REPORT if out is None else Path(out)
    if path.is_dir():
        raise UserError(f"--out {path}: is a folder; name the page's file")
    loaded = load_run(run_dir, progress=progress, **measuring)
    cases = worst_first(loaded)
    page = build_page(loaded, cases, embed(loaded, cases, max_megabytes, progress))
    write_texts({path: page})
    return path
