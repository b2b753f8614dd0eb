"""The settings of `xattn-video compare`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.settings import Option, Settings

METRICS_CSV = "metrics.csv"
FRAMES_CSV = "metrics_frames.csv"
SUMMARY_JSON = "summary.json"
# Where `generate --attention dense-alt` writes.
FLOOR = "dense-alt"


@dataclass(frozen=True)
class CompareSettings(Settings):
    """Which folders are compared, and how.

    `lpips` is computed if its weights can be loaded; where they cannot, the summary says why. `lpips_weights` that
    were named must load. The files go to `out`, or else into `sparse_dir`. Without `sparse_dir`, `dense_dir` is the
    folder of a run, and its dense and sparse folders are found by their manifests.
    """

    dense_dir: Annotated[
        Path,
        Option(
            "folder of the dense videos (the reference); or alone the --out of generate, whose folders are found",
            metavar="DENSE_DIR",
        ),
    ]
    sparse_dir: Annotated[Path | None, Option("folder of the sparse videos", metavar="SPARSE_DIR")] = None
    _: KW_ONLY
    out: Annotated[
        Path | None,
        Option(f"where {METRICS_CSV}, {FRAMES_CSV} and {SUMMARY_JSON} go; default: SPARSE_DIR", metavar="DIR"),
    ] = None
    lpips: Annotated[bool, Option("leave LPIPS out")] = True
    lpips_net: Annotated[Literal["alex", "vgg", "squeeze"], Option("backbone of LPIPS")] = "alex"
    lpips_weights: Annotated[
        Path | None,
        Option(
            "has the backbone's torchvision checkpoint; default: torch hub's cache, where it is downloaded to",
            metavar="FOLDER",
        ),
    ] = None
    device: Annotated[str, Option("device of LPIPS; auto takes a GPU if there is one")] = "auto"
    allow_unmatched: Annotated[bool, Option("skip videos without a partner, and list them")] = False
    workers: Annotated[
        int | None, Option("threads for all but LPIPS; default: one per core, at most 8", metavar="N")
    ] = None
    floor: Annotated[bool, Option(f"no row of the videos in {FLOOR} beside DENSE_DIR")] = True

    @property
    def folder(self) -> Path:
        """Where the files go."""
        return self.out or self.sparse_dir or self.dense_dir

    def check(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers must be at least 1, got {self.workers}")
        if not self.lpips and self.lpips_weights is not None:
            raise UserError("--no-lpips and --lpips-weights exclude each other")
