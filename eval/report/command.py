"""One self-contained page about a run: a verdict, players, every configuration with the noise floor, density, speed.

    manifests, summaries (measured where missing)  ->  worst cases first  ->  videos, tables, charts  ->  report.html

The program behind `xattn-video report`; from Python it is `write_report(ReportSettings(run_dir))`.
"""

from __future__ import annotations

import contextlib
from json import dumps
from pathlib import Path
from typing import Annotated

from xattn_video_eval.compare import FLOOR
from xattn_video_eval.report.data import load_run, worst_first
from xattn_video_eval.report.page import build_page
from xattn_video_eval.report.scores import read_scores
from xattn_video_eval.report.settings import ReportSettings
from xattn_video_eval.report.side_by_side import write_side_by_side
from xattn_video_eval.report.videos import embed
from xattn_video_pipelines.common.browser import show_page
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import write_texts
from xattn_video_pipelines.common.program import for_people
from xattn_video_pipelines.common.settings import Json, Option
from xattn_video_pipelines.common.tables import size
from xattn_video_pipelines.common.terminal import say

EXAMPLE = """\
example:
  xattn-video generate --model demo --prompts prompts/demo.txt --attention all --lossless --out out
  xattn-video report out
"""


def command(
    settings: ReportSettings,
    *,
    open: Annotated[bool, Option("show the page in a browser")] = False,
    json: Json = False,
) -> int:
    """`xattn-video report`: write the page; returns the exit code. Raises UserError."""
    with contextlib.redirect_stdout(for_people(json)):
        out, both = write_report(settings), settings.side_by_side
        number = out.stat().st_size
        say(f"wrote {out} ({size(number)}); it needs no other file and no network")
        if both is not None:
            say(f"wrote {both}: dense and sparse beside each other")
        if open:
            show_page(out)
    if json:
        print(dumps({"page": str(out), "bytes": number, "side_by_side": None if both is None else str(both)}))
    return 0


def write_report(settings: ReportSettings, *, progress: bool = True) -> Path:
    """Write the page about a run and give its path. It is written whole or not at all.

    Folders of the run without a summary of their present videos are compared; the summary is then written there.

    Args:
        settings: the folder of the run, with dense/ and at least one other folder that `generate` or `sweep` wrote.
        progress: show bars on stderr.

    Raises:
        UserError: one line; RUN is no run, a video is missing, damaged or cut off, the scores are of no video of the
            run, or a file cannot be written.
    """
    if settings.path.is_dir():
        raise UserError(f"--out {settings.path}: is a folder; name the page's file")
    loaded = load_run(settings, progress=progress)
    cases = worst_first(loaded)
    scores = read_scores(loaded, settings.scores)
    embedded = embed(loaded, cases, settings.max_megabytes, progress)
    page = build_page(loaded, cases, embedded, scores)
    if settings.side_by_side is not None:
        sparse = [case for case in embedded.cases if case.label != FLOOR]
        write_side_by_side(loaded, sparse, settings.side_by_side)
    write_texts({settings.path: page})
    return settings.path
