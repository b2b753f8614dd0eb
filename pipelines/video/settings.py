"""The settings of `xattn-video generate`, and the part of them that a sweep has too."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.settings import (
    DtypeOrAuto,
    MaxHours,
    Option,
    Settings,
    check_max_hours,
    sparse_config,
)
from xattn_video_pipelines.video.adaptation import Quantization, read_loras
from xattn_video_pipelines.video.models import KNOWN_MODELS
from xattn_video_pipelines.video.prompts import MAX_SEED

if TYPE_CHECKING:
    from xattn_video import XAttnConfig

ATTENTION_SETTINGS = (
    "threshold", "stride", "block_size", "warmup_steps", "warmup", "last_steps", "min_tokens", "residual",
    "refresh", "refresh_every", "extrapolate", "anchors", "threshold_ramp", "keep_masks", "per_head",
)  # fmt: skip
# The presets that are of video models.
VideoPreset = Literal["fast", "balanced", "faithful", "hunyuan-video", "wan"]
PresetOption = Annotated[
    VideoPreset | None,
    Option("settings of attention under one name; an option that is given replaces the preset's value", "attention"),
]
# No video has more pixels on a side, frames or steps. Much larger numbers overflow where its cost is computed.
_MOST = 100_000
_ATTENTION = "attention"
_VIDEO = "video (defaults: the model's own)"
_WHICH = "which videos"
_MACHINE = "machine"


@dataclass(frozen=True, kw_only=True)
class VideoSettings(Settings):
    """Which videos are made, of what size, by which model and where.

    Prompts are given as texts, or as the file `prompts`. `image` and `negative_prompt` are for those prompts of the
    file that have none of their own.

    Sizes are in pixels. None leaves a value to the model, or a setting of attention to the `preset`. `seeds` gives
    every prompt a video for each of them; empty, a prompt has its own seed, or else 0. `sample` takes so many prompts,
    evenly spaced over the file; `limit` then takes the first ones of those.
    """

    prompt: Annotated[
        tuple[str, ...],
        Option("what the video shows, in quotes; several make a video each", metavar="TEXT", named=True),
    ] = field(default=(), kw_only=False)
    model: Annotated[str, Option(f"{', '.join(KNOWN_MODELS)}; or a local folder; or a Hub id")]
    prompts: Annotated[Path | None, Option("prompts from a file, .txt or .jsonl, instead", metavar="FILE")] = None
    image: Annotated[Path | None, Option("picture that the video starts from (image-to-video)", metavar="FILE")] = None
    negative_prompt: Annotated[str | None, Option("what the video must not show", metavar="TEXT")] = None
    out: Annotated[Path, Option("folder of the videos", metavar="DIR")] = Path("out")

    preset: PresetOption = None
    block_size: Annotated[
        int | None,
        Option("tokens a block, a multiple of the stride; default: the preset's, 128 without one", _ATTENTION),
    ] = None
    min_tokens: Annotated[
        int | None,
        Option("calls with fewer tokens stay dense; default: the preset's, 1024 without one", _ATTENTION),
    ] = None

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

    lora: Annotated[
        tuple[str, ...],
        Option("LoRA to add, a .safetensors file; :WEIGHT behind it scales it; several are added up", metavar="FILE"),
    ] = ()
    lora_2: Annotated[
        tuple[str, ...],
        Option(
            "the same for the second transformer of Wan 2.2 A14B, that for low noise; --lora is then for the first one "
            "alone, and without this for both",
            metavar="FILE",
        ),
    ] = ()
    quantize: Annotated[
        Quantization | None, Option("keep the transformer's weights in so many bits, which takes less memory", _MACHINE)
    ] = None
    dtype: Annotated[DtypeOrAuto, Option("of the model", _MACHINE)] = "auto"
    device: Annotated[str, Option("auto, cpu, cuda, cuda:1, xpu, mps", _MACHINE)] = "auto"
    offload: Annotated[
        Literal["none", "model", "sequential"],
        Option("keep parts in CPU memory until they run: whole models, or layer by layer (slower)", _MACHINE),
    ] = "none"
    max_hours: MaxHours = None

    def check(self) -> None:
        self._check_prompts()
        read_loras(self.lora, "--lora")
        read_loras(self.lora_2, "--lora-2")
        self.check_at_least(1, "height", "width", "num_frames", "fps", "steps", "sample", "limit")
        self.check_at_most(_MOST, "height", "width", "num_frames", "fps", "steps")
        self.check_from_zero("guidance_scale", "flow_shift")
        check_max_hours(self.max_hours)
        for seed in self.seeds:
            if not 0 <= seed <= MAX_SEED:
                raise UserError(f"--seeds must be integers from 0 to 2**63 - 1, got {seed}")
        if len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"--seeds must differ, got {' '.join(map(str, self.seeds))}")

    def _check_prompts(self) -> None:
        """Raise UserError unless there are prompts or a file of them, and for what is likely a slip of the keyboard."""
        if bool(self.prompt) == (self.prompts is not None):
            given = "both" if self.prompt else "neither"
            raise UserError(
                f'needs a prompt in quotes, such as "a red fox", or a file of them as --prompts, got {given}'
            )
        for text in self.prompt:
            if text.endswith((".txt", ".jsonl")) and Path(text).is_file():
                raise UserError(f"{text} is a file; give it as --prompts {text}")
        if len(self.prompt) > 1 and not any(" " in text for text in self.prompt):
            raise UserError(f'put a prompt of several words in quotes: "{" ".join(self.prompt)}"')


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(VideoSettings):
    """`VideoSettings`, and with which attention the videos are made.

    `dense-alt` is dense attention in another order of summation, the noise floor of every comparison. `both` is dense
    and xattn, `all` is the three. The other settings of attention are those of `XAttnConfig`; None, or no steps in
    `refresh`, takes the value of the `preset`, or without one the default of `XAttnConfig`.
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
        float | Path | None,
        Option(
            "share of the score mass to keep, in (0, 1], or a file of xattn-video calibrate; default: the preset's, "
            "0.9 without one",
            _ATTENTION,
            "N",
        ),
    ] = None
    stride: Annotated[
        int | None,
        Option("antidiagonal stride, a power of two; default: the preset's, 8 without one", _ATTENTION),
    ] = None
    warmup_steps: Annotated[
        int | None,
        Option("first denoising steps that stay dense; default: the preset's, 5 without one", _ATTENTION),
    ] = None
    warmup: Annotated[
        float | None,
        Option("the largest share of all steps that the warm-up may take; 0.25 suits models of few steps", _ATTENTION),
    ] = None
    last_steps: Annotated[
        int | None,
        Option("last denoising steps that stay dense; default: the preset's, 0 without one", _ATTENTION),
    ] = None
    residual: Annotated[
        Literal["off", "int4", "fp8", "full"] | None,
        Option(
            "remember what the kept blocks miss and add it back; int4 takes least memory; default: the preset's, off "
            "without one",
            _ATTENTION,
        ),
    ] = None
    refresh: Annotated[
        tuple[int, ...],
        Option(
            "the sparse steps, counted from 0, that refresh the residual; default: the preset's, without one gaps that "
            "grow",
            _ATTENTION,
            metavar="N",
        ),
    ] = ()
    refresh_every: Annotated[
        float | None,
        Option(
            "steps (or share of all) between refreshes of the residual, at most; default: the preset's, "
            "without one gaps that grow",
            _ATTENTION,
        ),
    ] = None
    extrapolate: Annotated[
        bool | None,
        Option(
            "continue the residual's change, which takes its memory twice; default: the preset's, no without one",
            _ATTENTION,
        ),
    ] = None
    anchors: Annotated[
        int | None,
        Option(
            "always keep so many neighbours of a block, in the sequence and in time; default: the preset's; without "
            "one 1 below a threshold of 0.9, else 0",
            _ATTENTION,
            metavar="N",
        ),
    ] = None
    threshold_ramp: Annotated[
        float | None,
        Option("how far the threshold falls over the sparse steps; default: the preset's, 0 without one", _ATTENTION),
    ] = None
    keep_masks: Annotated[
        int | None,
        Option(
            "sparse steps that share one choice of blocks; default: the preset's, 1 without one",
            _ATTENTION,
            metavar="N",
        ),
    ] = None
    per_head: Annotated[
        bool | None,
        Option(
            "a threshold for each layer and head, chosen in the last dense step; default: the preset's, no without one",
            _ATTENTION,
        ),
    ] = None
    lossless: Annotated[bool, Option("also write an FFV1 .mkv copy, for measuring", _VIDEO)] = False
    overwrite: Annotated[bool, Option("make finished videos again", _WHICH, command_line_only=True)] = False
    compile: Annotated[
        bool, Option("torch.compile the transformer's blocks; the first video's time includes it", _MACHINE)
    ] = False

    @property
    def config(self) -> XAttnConfig:
        """The settings of sparse attention: the preset's, or the defaults of `XAttnConfig`, with what is given.

        Raises:
            UserError: a value is out of its range.
        """
        given = {name: value for name in ATTENTION_SETTINGS if (value := getattr(self, name)) not in (None, ())}
        if "refresh_every" in given:
            given["refresh_every"] = steps_or_share(given["refresh_every"])
        return sparse_config(self.preset, **given)

    def check(self) -> None:
        super().check()
        _ = self.config
        if self.compile and self.attention in ("dense-alt", "all"):
            raise UserError(f"--attention {self.attention} makes dense-alt videos, which do not go with --compile")


def steps_or_share(value: float) -> int | float:
    """A number of steps as an integer, which is how `XAttnConfig` tells it from a share of all steps."""
    return int(value) if value >= 1 and value == int(value) else value
