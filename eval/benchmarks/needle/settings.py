"""The settings of `xattn-video needle`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from xattn_video_pipelines.common.settings import Option
from xattn_video_pipelines.qa import LoadSettings, PrefillSettings


@dataclass(frozen=True, kw_only=True)
class NeedleSettings(LoadSettings, PrefillSettings):
    """Which model is asked what, and with which attention it reads the prompt.

    `lengths` are in tokens, `depths` in percent of the prompt. `samples` are those of each task, length and depth.
    """

    model: Annotated[str, Option("Hub id or local folder of a causal language model")]
    out: Annotated[Path, Option("answers and pictures; a run goes on", metavar="DIR")]
    tasks: Annotated[tuple[Literal["single", "multikey", "tracking"], ...], Option("what is asked")] = (
        "single", "multikey", "tracking",
    )  # fmt: skip
    lengths: Annotated[tuple[int, ...], Option("prompt tokens", metavar="N")] = (4096, 8192, 16384)
    depths: Annotated[tuple[float, ...], Option("of the needle, in percent", metavar="P")] = (0, 25, 50, 75, 100)
    samples: Annotated[int, Option("of each task, length and depth", metavar="N")] = 4
    chat: Annotated[bool, Option("do not put prompts into the tokenizer's chat template")] = True

    def check(self) -> None:
        super().check()
        self.check_at_least(1, "samples")
