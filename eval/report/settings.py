"""The settings of `xattn-video report`."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.settings import Option, Settings

REPORT = "report.html"
_MEASURING = "folders that are not compared yet"


@dataclass(frozen=True)
class ReportSettings(Settings):
    """What the page is about, and how large it may become.

    `max_megabytes` is in 10^6 bytes of embedded videos (as base64). The last three are those of `CompareSettings`.
    """

    run_dir: Annotated[Path, Option("the --out of generate: dense/ and what to compare", metavar="RUN")]
    _: KW_ONLY
    out: Annotated[Path | None, Option(f"default: RUN/{REPORT}", metavar="FILE", command_line_only=True)] = None
    max_megabytes: Annotated[
        float, Option("videos in the page, worst cases first, until this size; 0 for none", metavar="N")
    ] = 64.0
    scores: Annotated[
        Path | None,
        Option(
            'your own scores: a .jsonl of {"id": ..., "folder": ..., "any name": number}; seed may stand in it too',
            metavar="FILE",
        ),
    ] = None
    side_by_side: Annotated[
        Path | None,
        Option(
            "also write the page's sparse videos beside their dense ones, as one video",
            metavar="FILE.mp4",
            command_line_only=True,
        ),
    ] = None
    lpips: Annotated[bool, Option("leave LPIPS out", group=_MEASURING)] = True
    lpips_weights: Annotated[Path | None, Option("as in compare", group=_MEASURING, metavar="FOLDER")] = None
    device: Annotated[str, Option("device of LPIPS; auto takes a GPU if there is one", group=_MEASURING)] = "auto"

    @property
    def path(self) -> Path:
        """The page's file."""
        return self.run_dir / REPORT if self.out is None else self.out

    def check(self) -> None:
        if not (math.isfinite(self.max_megabytes) and self.max_megabytes >= 0):
            raise UserError(f"--max-megabytes must be a number from 0, got {self.max_megabytes}")
        if self.path.suffix != ".html" and not self.path.is_dir():
            # so that a file of the run is not written over
            raise UserError(f"--out must end in .html, got {self.out}")
        if self.side_by_side is not None and self.side_by_side.suffix != ".mp4":
            raise UserError(f"--side-by-side must end in .mp4, got {self.side_by_side}")
        if not self.lpips and self.lpips_weights is not None:
            raise UserError("--no-lpips and --lpips-weights exclude each other")
