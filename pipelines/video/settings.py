"""The settings of `xattn-video generate`, and the part of them that a sweep has too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.settings import Option, Settings, sparse_config
from xattn_video_pipelines.video.models import KNOWN_MODELS
from xattn_video_pipelines.video.prompts import MAX_SEED

if TYPE_CHECKING:
    from xattn_video import XAttnConfig

ATTENTION_SETTINGS = (
    "threshold", "stride", "block_size", "warmup_steps", "warmup", "last_steps", "min_tokens", "residual",
    "refresh_every", "extrapolate", "anchors", "threshold_ramp", "keep_masks",
)  # fmt: skip
_ATTENTION = "attention"
_VIDEO = "video (defaults: the model's own)"
_WHICH = "which videos"
_MACHINE = "machine"


@dataclass(frozen=True, kw_only=True)
class VideoSettings(Settings):
    """Which videos are made, of what size, by which model and where.

    Sizes are in pixels. None leaves a value to the model. `seeds` gives every prompt a video for each of them; empty,
    a prompt has its own seed, or else 0. `sample` takes so many prompts, evenly spaced over the file; `limit` then
    takes the first ones of those.
    """

    model: Annotated[str, Option(f"{', '.join(KNOWN_MODELS)}; or a local folder; or a Hub id")]
    prompts: Annotated[Path, Option(".txt or .jsonl", metavar="FILE")]
    out: Annotated[Path, Option("folder of the videos", metavar="DIR")] = Path("out")

    block_size: Annotated[int, Option("tokens a block, a multiple of the stride", _ATTENTION)] = 128
    min_tokens: Annotated[int, Option("calls with fewer tokens stay dense", _ATTENTION)] = 1024

    steps: Annotated[int | None, Option("denoising steps", _VIDEO)] = None
    guidance_scale: Annotated[float | None, Option("how closely the prompt is followed", _VIDEO)] = None
    flow_shift: Annotated[float | None, Option("shift of the scheduler's noise levels", _VIDEO)] = None
    height: Annotated[int | None, Option("pixels", _VIDEO)] = None
    width: Annotated[int | None, Option("pixels", _VIDEO)] = None
    num_frames: Annotated[int | None, Option("frames of a video", _VIDEO)] = None
    fps: Annotated[int | None, Option("frames a second of the file", _VIDEO)] = None

    seeds: Annotated[
        tuple[int, ...],
        Option("one video per prompt and seed; default: the prompt's own seed, else 0", _WHICH, metavar="SEED"),
    ] = ()
    sample: Annotated[int | None, Option("N prompts, evenly spaced over the file", _WHICH, metavar="N")] = None
    limit: Annotated[int | None, Option("the first N prompts (of the sample)", _WHICH, metavar="N")] = None

    dtype: Annotated[Literal["auto", "float32", "float16", "bfloat16"], Option("of the model", _MACHINE)] = "auto"
    device: Annotated[str, Option("auto, cpu, cuda, cuda:1, xpu, mps", _MACHINE)] = "auto"
    offload: Annotated[
        Literal["none", "model", "sequential"],
        Option("keep parts in CPU memory until they run: whole models, or layer by layer (slower)", _MACHINE),
    ] = "none"

    def check(self) -> None:
        self.check_at_least(1, "height", "width", "num_frames", "fps", "steps", "sample", "limit")
        self.check_from_zero("guidance_scale", "flow_shift")
        for seed in self.seeds:
            if not 0 <= seed <= MAX_SEED:
                raise UserError(f"--seeds must be integers from 0 to 2**63 - 1, got {seed}")
        if len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"--seeds must differ, got {' '.join(map(str, self.seeds))}")


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(VideoSettings):
    """`VideoSettings`, and with which attention the videos are made.

    `dense-alt` is dense attention in another order of summation, the noise floor of every comparison. `both` is dense
    and xattn, `all` is the three. The other settings of attention are those of `XAttnConfig`.
    """

    attention: Annotated[
        Literal["dense", "dense-alt", "xattn", "both", "all"],
        Option(
            "dense-alt is dense in another order of summation, the noise floor of every comparison; both is dense and "
            "xattn, all is the three",
            _ATTENTION,
        ),
    ] = "xattn"
    threshold: Annotated[
        float | Path,
        Option("share of the score mass to keep, in (0, 1], or a file of xattn-video calibrate", _ATTENTION, "N"),
    ] = 0.9
    stride: Annotated[int, Option("antidiagonal stride, a power of two", _ATTENTION)] = 8
    warmup_steps: Annotated[int, Option("first denoising steps that stay dense", _ATTENTION)] = 5
    warmup: Annotated[
        float | None, Option("the largest share of all steps that they may be; 0.25 for few steps", _ATTENTION)
    ] = None
    last_steps: Annotated[int, Option("last denoising steps that stay dense", _ATTENTION)] = 0
    residual: Annotated[
        Literal["off", "int4", "fp8", "full"],
        Option("remember what the kept blocks miss and add it back; int4 takes least memory", _ATTENTION),
    ] = "off"
    refresh_every: Annotated[
        float | None,
        Option("steps (or share of all) between refreshes of the residual; default: gaps that grow", _ATTENTION),
    ] = None
    extrapolate: Annotated[bool, Option("continue the residual's change; takes its memory twice", _ATTENTION)] = False
    anchors: Annotated[
        int, Option("always keep so many neighbours of a block, in the sequence and in time", _ATTENTION, metavar="N")
    ] = 0
    threshold_ramp: Annotated[float, Option("how far the threshold falls over the sparse steps", _ATTENTION)] = 0.0
    keep_masks: Annotated[int, Option("sparse steps that share one choice of blocks", _ATTENTION, metavar="N")] = 1
    lossless: Annotated[bool, Option("also write an FFV1 .mkv copy, for measuring", _VIDEO)] = False
    overwrite: Annotated[bool, Option("make finished videos again", _WHICH)] = False
    compile: Annotated[
        bool, Option("torch.compile the transformer's blocks; the first video's time includes it", _MACHINE)
    ] = False

    @property
    def config(self) -> XAttnConfig:
        """The settings of sparse attention. Raises UserError for a value that is out of its range."""
        values = {name: getattr(self, name) for name in ATTENTION_SETTINGS}
        every = self.refresh_every
        if every is not None and every >= 1 and every == int(every):
            values["refresh_every"] = int(every)
        return sparse_config(**values)

    def check(self) -> None:
        super().check()
        _ = self.config
        if self.compile and self.attention in ("dense-alt", "all"):
            raise UserError(f"--attention {self.attention} makes dense-alt videos, which do not go with --compile")
