"""The settings of `xattn-video sweep`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from xattn_video_pipelines.common.settings import Option, sparse_config
from xattn_video_pipelines.video import GenerateSettings, VideoSettings

if TYPE_CHECKING:
    from xattn_video import XAttnConfig

_AXES = "axes; the base point is threshold 0.9, stride 8, 5 warm-up steps"
_MEASURING = "measuring"


@dataclass(frozen=True, kw_only=True)
class SweepSettings(VideoSettings):
    """`VideoSettings`, the values along each axis, and what is measured.

    One axis at a time is gone through, around the base point; with `grid` every combination.
    """

    out: Annotated[Path, Option("folder of the videos and the tables", metavar="DIR")] = Path("sweep")
    thresholds: Annotated[tuple[float, ...], Option("of XAttnConfig.threshold", _AXES, metavar="N")] = (
        0.5, 0.7, 0.8, 0.9, 0.95, 0.99,
    )  # fmt: skip
    strides: Annotated[tuple[int, ...], Option("of XAttnConfig.stride", _AXES, metavar="N")] = (4, 8, 16, 32)
    warmup_steps: Annotated[tuple[int, ...], Option("of XAttnConfig.warmup_steps", _AXES, metavar="N")] = (0, 2, 5, 8)
    grid: Annotated[bool, Option("every combination, not one axis at a time", _AXES)] = False
    lpips: Annotated[bool, Option("PSNR and SSIM only", _MEASURING)] = True
    floor: Annotated[bool, Option("leave the noise floor's videos out", _MEASURING)] = True
    plot: Annotated[bool, Option("no picture; without it matplotlib is not needed", _MEASURING)] = True

    @property
    def configs(self) -> list[XAttnConfig]:
        """The configurations of the sweep, each once: the base point first, then along each axis, or the grid.

        Raises:
            UserError: a value that `XAttnConfig` refuses.
        """
        axes = {"threshold": self.thresholds, "stride": self.strides, "warmup_steps": self.warmup_steps}
        if self.grid:
            points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        else:
            points = [{}] + [{name: value} for name, values in axes.items() for value in values]
        fixed = {"block_size": self.block_size, "min_tokens": self.min_tokens}
        return list(dict.fromkeys(sparse_config(**fixed, **point) for point in points))

    @property
    def of_videos(self) -> GenerateSettings:
        """What the videos are made with. Lossless copies are written too, because measures are taken from them."""
        shared = {field.name: getattr(self, field.name) for field in fields(VideoSettings)}
        return GenerateSettings(**shared, lossless=True)

    def check(self) -> None:
        super().check()
        _ = self.configs
