"""The settings of `xattn-video judge` and `xattn-video demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from xattn_video_pipelines.common.settings import Option, Settings
from xattn_video_pipelines.video import PresetOption

JUDGED_JSON = "judged.json"
DEMO_JSON = "demo.json"
SIDE_BY_SIDE = "side-by-side.mp4"
# At 10 steps of 65 frames all of the demo's four prompts but the third are as asked with these. The blocks are chosen
# once a video: on a CPU every choice takes a tenth of a sparse call.
DEMO_THRESHOLD, DEMO_WARMUP = 0.35, 2
_OWN = {"threshold": DEMO_THRESHOLD, "warmup_steps": DEMO_WARMUP, "keep_masks": 8}
# So many are made within three minutes on two cores.
DEMO_PROMPTS = 2


@dataclass(frozen=True)
class JudgeSettings(Settings):
    """The folders whose videos are judged."""

    folders: Annotated[tuple[Path, ...], Option(f"a folder of videos; {JUDGED_JSON} is written there", metavar="DIR")]


@dataclass(frozen=True, kw_only=True)
class DemoSettings(Settings):
    """How much of the demo is run, and with which attention.

    Videos are longer than the model's own 33 frames and have fewer steps than its 20: in a longer sequence attention
    takes a larger share of the time, and that is what the demo is to show.
    """

    out: Annotated[Path, Option("folder of everything that is made", metavar="DIR")] = Path("demo-out")
    prompts: Annotated[Path | None, Option("default: the demo's own", metavar="FILE")] = None
    limit: Annotated[
        int | None,
        Option(f"the first N prompts; default: {DEMO_PROMPTS} of the demo's own, or all of yours", metavar="N"),
    ] = None
    steps: Annotated[int, Option("denoising steps")] = 10
    num_frames: Annotated[int, Option("frames of a video")] = 65
    preset: PresetOption = None
    threshold: Annotated[
        float | None,
        Option(
            f"share of the score mass to keep; default: the preset's, {DEMO_THRESHOLD} without one",
            "attention",
            metavar="N",
        ),
    ] = None
    warmup_steps: Annotated[
        int | None,
        Option(f"first steps that stay dense; default: the preset's, {DEMO_WARMUP} without one", "attention"),
    ] = None
    device: Annotated[str, Option("auto, cpu, cuda, cuda:1, xpu, mps")] = "auto"
    overwrite: Annotated[bool, Option("make finished videos again", command_line_only=True)] = False

    @property
    def first(self) -> int | None:
        """How many prompts are taken, from the first; None for all."""
        return DEMO_PROMPTS if self.limit is None and self.prompts is None else self.limit

    @property
    def attention(self) -> dict[str, Any]:
        """The settings of attention that `GenerateSettings` takes: the preset's, or without one the demo's own."""
        own = _OWN if self.preset is None else {}
        given = {"threshold": self.threshold, "warmup_steps": self.warmup_steps}
        return {"preset": self.preset, **own, **{name: value for name, value in given.items() if value is not None}}
