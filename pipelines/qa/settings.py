"""The settings of `xattn-video qa`, and those that all programs for language models share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from xattn_video_pipelines.common.demo_data import WATCHER_FPS
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.settings import (
    DtypeOrAuto,
    MaxHours,
    Option,
    Settings,
    check_max_hours,
    option_name,
    sparse_config,
)

if TYPE_CHECKING:
    from xattn_video import XAttnConfig

ANSWERS, SUMMARY = "answers.jsonl", "summary.json"
MODEL = "Qwen/Qwen2-VL-7B-Instruct"
# The video-understanding model that this project trained; the card in its folder says how.
DEMO = "demo"

_ATTENTION = "attention"
_MACHINE = "machine"
_ASKED = "what is asked"
_SEEN = "what the model sees"


@dataclass(frozen=True, kw_only=True)
class PrefillSettings(Settings):
    """With which attention prompts are read. The values are those of `XAttnConfig`.

    `dense_last` keeps the blocks of a prompt's last tokens dense, those of a question for example; the paper has 0.
    """

    attention: Annotated[Literal["dense", "xattn", "both"], Option("of prefill", _ATTENTION)] = "both"
    stride: Annotated[int, Option("antidiagonal stride, a power of two", _ATTENTION)] = 8
    threshold: Annotated[
        float | Path,
        Option("share of the score mass to keep, in (0, 1], or a file of xattn-video calibrate", _ATTENTION, "N"),
    ] = 0.9
    block_size: Annotated[int, Option("tokens a block, a multiple of the stride", _ATTENTION)] = 128
    min_tokens: Annotated[int, Option("shorter prompts stay dense", _ATTENTION)] = 1024
    dense_last: Annotated[
        int,
        Option("the blocks of a prompt's last N tokens stay dense: a question's; 0 as in the paper", _ATTENTION, "N"),
    ] = 0

    @property
    def config(self) -> XAttnConfig:
        """The settings of sparse prefill. Raises UserError for a value that is out of its range."""
        names = ("stride", "threshold", "block_size", "min_tokens", "dense_last")
        return sparse_config(**{name: getattr(self, name) for name in names}, warmup_steps=0, anchors=0)

    @property
    def configurations(self) -> dict[str, XAttnConfig | None]:
        """What `attention` asks for, by the name that its answers have; None is dense."""
        config = self.config
        dense: dict[str, XAttnConfig | None] = {"dense": None}
        sparse: dict[str, XAttnConfig | None] = {config.label(): config}
        return {"dense": dense, "xattn": sparse, "both": dense | sparse}[self.attention]

    def check(self) -> None:
        _ = self.config


@dataclass(frozen=True, kw_only=True)
class LoadSettings(Settings):
    """Where a model runs, and in which type; `auto` takes a GPU if there is one, and the type of the weights."""

    device: Annotated[str, Option("auto, cpu, cuda, cuda:1", _MACHINE)] = "auto"
    dtype: Annotated[
        DtypeOrAuto, Option("auto is the weights' own, and float32 on a CPU that emulates bfloat16", _MACHINE)
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class QaSettings(LoadSettings, PrefillSettings):
    """What is asked, what the model sees of a video, and with which attention it reads.

    Either `video` and `question`, or `items`, a file of many questions. `fps` is in frames a second; None is 1, and
    the rate that the model `demo` was trained with for that one. `max_pixels` are those of a frame.
    """

    model: Annotated[str, Option("Hub id, local folder, or demo, a small one for the demo's videos")] = MODEL
    out: Annotated[Path | None, Option(f"{ANSWERS} and {SUMMARY} go there; a run goes on", metavar="DIR")] = None

    video: Annotated[Path | None, Option("the video", _ASKED, "FILE")] = None
    question: Annotated[str | None, Option("the question", _ASKED, "TEXT")] = None
    options: Annotated[tuple[str, ...], Option("answers to choose from", _ASKED, "TEXT")] = ()
    answer: Annotated[str | None, Option("the right one", _ASKED, "TEXT")] = None
    items: Annotated[
        Path | None, Option("many: video, question, and if wanted options, answer and id", _ASKED, "FILE.jsonl")
    ] = None

    fps: Annotated[float | None, Option("frames a second; default: 1, for the model demo 2", _SEEN)] = None
    max_frames: Annotated[int, Option("of a video", _SEEN, "N")] = 768
    max_pixels: Annotated[int, Option("of a frame", _SEEN, "N")] = 360 * 420

    attention: Annotated[Literal["dense", "xattn", "both"], Option("of prefill", _ATTENTION)] = "xattn"
    stride: Annotated[int, Option("antidiagonal stride, a power of two", _ATTENTION)] = 16
    # `xattn_video_eval.studies.story_quality` shows what a short question loses otherwise.
    dense_last: Annotated[
        int,
        Option("the blocks of a prompt's last N tokens stay dense: a question's; 0 as in the paper", _ATTENTION, "N"),
    ] = 64

    max_new_tokens: Annotated[int, Option("of an answer", _MACHINE, "N")] = 64
    trust_remote_code: Annotated[
        bool,
        Option("run code that comes with the model; without this it is never run", _MACHINE, command_line_only=True),
    ] = False
    max_hours: MaxHours = None

    @property
    def frames_per_second(self) -> float:
        """`fps`, or the model's own."""
        if self.fps is not None:
            return self.fps
        return WATCHER_FPS if self.model == DEMO else 1.0

    def check(self) -> None:
        from xattn_video_pipelines.qa.frames import check_sampling

        given = [name for name in ("video", "question", "options", "answer") if getattr(self, name) not in (None, ())]
        if self.items is not None and given:
            raise UserError(f"--items and {option_name(given[0])} exclude each other")
        for name in ("video", "question"):
            if self.items is None and name not in given:
                raise UserError(f"needs {option_name(name)}, or a file of questions as --items")
        super().check()
        check_sampling(fps=self.frames_per_second, max_frames=self.max_frames, max_pixels=self.max_pixels)
        self.check_at_least(1, "max_new_tokens")
        check_max_hours(self.max_hours)
