"""The settings of `xattn-video judge` and `xattn-video demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from xattn_video_pipelines.common.settings import Option, Settings

JUDGED_JSON = "judged.json"


@dataclass(frozen=True)
class JudgeSettings(Settings):
    """The folders whose videos are judged."""

    folders: Annotated[tuple[Path, ...], Option(f"a folder of videos; {JUDGED_JSON} is written there", metavar="DIR")]
