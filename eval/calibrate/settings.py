"""The settings of `xattn-video calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from xattn_video import XAttnConfig
from xattn_video.config import not_percent
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.settings import DtypeOrAuto, Option, Settings, option_name, sparse_config
from xattn_video_pipelines.qa import QaSettings
from xattn_video_pipelines.video import GenerateSettings

_INPUTS = "inputs, one of the three"
_CHOICE = "thresholds"
_ATTENTION = "attention"
_VIDEO = "video diffusion (defaults: the model's own)"
_SEEN = "what a video-understanding model sees"
_MACHINE = "machine"
# The largest of 8 bits, in which the choices are kept.
_MOST_VALUES = 255


@dataclass(frozen=True, kw_only=True)
class CalibrateSettings(Settings):
    """Which model is calibrated on what, which thresholds are tried, and how much error is allowed.

    Exactly one of `prompts` (a video diffusion model), `items` (a video-understanding model) and `texts` (a language
    model) says what kind of model it is. The thresholds are `start`, `start * factor` and so on, `values` of them.
    `budget` is the mean relative error over all heads; None takes that of the second threshold for all heads.
    """

    model: Annotated[str, Option("as of generate with --prompts, of qa with --items; a language model with --texts")]
    out: Annotated[Path, Option("the file of thresholds", metavar="FILE")] = Path("thresholds.json")
    overwrite: Annotated[bool, Option("replace the file that is there", command_line_only=True)] = False

    prompts: Annotated[Path | None, Option("video diffusion: .txt or .jsonl as of generate", _INPUTS, "FILE")] = None
    items: Annotated[Path | None, Option("video understanding: questions as of qa", _INPUTS, "FILE.jsonl")] = None
    texts: Annotated[tuple[Path, ...], Option("language: text files, a prompt each", _INPUTS, "FILE")] = ()
    limit: Annotated[int | None, Option("the first N inputs", _INPUTS, "N")] = None

    budget: Annotated[
        float | None, Option("mean relative error of a head; default: that of start * factor for all", _CHOICE)
    ] = None
    start: Annotated[float, Option("the largest threshold, in (0, 1]; 1 lets heads stay dense", _CHOICE)] = 0.9
    factor: Annotated[float, Option("from a threshold to the next one, in (0, 1)", _CHOICE)] = 0.9
    values: Annotated[int, Option("thresholds that are tried", _CHOICE, "N")] = 8

    stride: Annotated[int | None, Option("antidiagonal stride; default: 8, with --items 16", _ATTENTION)] = None
    block_size: Annotated[int, Option("tokens a block, a multiple of the stride", _ATTENTION)] = 128
    min_tokens: Annotated[int, Option("calls with fewer tokens stay dense", _ATTENTION)] = 1024

    warmup_steps: Annotated[int, Option("first denoising steps, which stay dense and are not measured", _VIDEO)] = 5
    measured_steps: Annotated[int, Option("of each video, evenly spaced over the others", _VIDEO, "N")] = 3
    steps: Annotated[int | None, Option("denoising steps", _VIDEO)] = None
    height: Annotated[int | None, Option("pixels", _VIDEO)] = None
    width: Annotated[int | None, Option("pixels", _VIDEO)] = None
    num_frames: Annotated[int | None, Option("frames of a video", _VIDEO)] = None

    fps: Annotated[float | None, Option("frames a second; default: as of qa", _SEEN)] = None
    max_frames: Annotated[int, Option("of a video", _SEEN, "N")] = QaSettings.max_frames
    max_pixels: Annotated[int, Option("of a frame", _SEEN, "N")] = QaSettings.max_pixels

    dtype: Annotated[DtypeOrAuto, Option("of the model", _MACHINE)] = "auto"
    device: Annotated[str, Option("auto, cpu, cuda, cuda:1", _MACHINE)] = "auto"
    offload: Annotated[
        Literal["none", "model", "sequential"],
        Option("of a video diffusion model: keep parts in CPU memory until they run", _MACHINE),
    ] = "none"

    @property
    def grid(self) -> tuple[float, ...]:
        """The thresholds that are tried, falling."""
        return tuple(self.start * self.factor**power for power in range(self.values))

    @property
    def score_stride(self) -> int:
        """`stride`, or that of the command that will use the thresholds."""
        return self.stride or (QaSettings.stride if self.items else XAttnConfig.stride)

    @property
    def of_videos(self) -> GenerateSettings:
        """The videos whose calls are measured. With threshold 1 every layer gets what dense attention gives."""
        assert self.prompts is not None
        names = ("model", "prompts", "limit", "block_size", "min_tokens", "warmup_steps", "steps", "height", "width")
        shared = {name: getattr(self, name) for name in (*names, "num_frames", "dtype", "device", "offload")}
        return GenerateSettings(
            **shared, out=self.out.parent, attention="xattn", threshold=1.0, stride=self.score_stride, overwrite=True
        )

    @property
    def of_questions(self) -> QaSettings:
        """The questions whose prompts are measured. With threshold 1 every layer gets what dense attention gives."""
        names = ("model", "items", "fps", "max_frames", "max_pixels", "block_size", "min_tokens", "dtype", "device")
        shared = {name: getattr(self, name) for name in names}
        return QaSettings(**shared, attention="xattn", threshold=1.0, stride=self.score_stride)

    def check(self) -> None:
        given = [name for name in ("prompts", "items", "texts") if getattr(self, name)]
        if len(given) != 1:
            told = " and ".join(map(option_name, given)) or "none"
            raise UserError(f"needs one of --prompts, --items and --texts, got {told}")
        for name, most_too in (("start", True), ("factor", False)):
            value = getattr(self, name)
            if not 0 < value <= 1 or (value == 1 and not most_too):
                raise UserError(f"--{name} must be in (0, 1{']' if most_too else ')'}, got {value}{not_percent(value)}")
        self.check_from_zero("budget")
        self.check_at_least(1, "limit", "measured_steps", "stride")
        if not 2 <= self.values <= _MOST_VALUES:
            raise UserError(f"--values must be from 2 to {_MOST_VALUES}, got {self.values}")
        if self.grid[-1] < 1e-3:
            raise UserError(f"--values: the last threshold must be 0.001 or more, got {self.grid[-1]:.2g}")
        sparse_config(stride=self.score_stride, block_size=self.block_size, min_tokens=self.min_tokens)
        if self.prompts is not None:
            _ = self.of_videos
        if self.items is not None:
            _ = self.of_questions
