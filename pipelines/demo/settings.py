"""The settings of `xattn-video judge` and `xattn-video demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from xattn_video_pipelines.common.settings import Option, Settings
from xattn_video_pipelines.video import PresetOption

JUDGED_JSON = "judged.json"


@dataclass(frozen=True)
class JudgeSettings(Settings):
    """The folders whose videos are judged."""

    folders: Annotated[tuple[Path, ...], Option(f"a folder of videos; {JUDGED_JSON} is written there", metavar="DIR")]


@dataclass(frozen=True, kw_only=True)
class DemoSettings(Settings):
    """How much of the demo is run. None leaves a value to the demo's model, and to its own four prompts."""

    out: Annotated[Path, Option("folder of everything that is made", metavar="DIR")] = Path("demo-out")
    prompts: Annotated[Path | None, Option("default: the demo's own four prompts", metavar="FILE")] = None
    limit: Annotated[int | None, Option("the first N prompts", metavar="N")] = None
    steps: Annotated[int | None, Option("denoising steps; default: the model's 20")] = None
    preset: PresetOption = None
    warmup_steps: Annotated[
        int | None, Option("first steps that stay dense; default: the preset's, 5 without one", "attention")
    ] = None
    num_frames: Annotated[int | None, Option("default: the model's 33")] = None
    overwrite: Annotated[bool, Option("make finished videos again")] = False
