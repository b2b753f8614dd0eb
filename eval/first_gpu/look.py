"""What a step of the first look is given: where its rows go, on which device it runs and at which size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from xattn_video_eval.first_gpu.plan import TIMED, TIMED_IN_REHEARSAL, Call
from xattn_video_eval.results import provenance
from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.environment import device_name

ROWS = "rows.jsonl"


@dataclass(frozen=True)
class Look:
    """One step's view of the run.

    Attributes:
        step: its name, which its rows carry.
        out: the folder of the rows and logs.
        seconds: after so many seconds the step is ended.
        rehearse: run at a tiny size on the CPU, to try the code.
    """

    step: str
    out: Path
    seconds: float
    rehearse: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")

    @property
    def timed(self) -> Call:
        """The attention call that is timed."""
        return TIMED_IN_REHEARSAL if self.rehearse else TIMED

    @property
    def rounds(self) -> int:
        """Timed calls of each kernel, of which the median counts."""
        return 1 if self.rehearse else 3

    def row(self, **values: Any) -> None:
        """Write one result now, so that nothing that comes later can lose it."""
        # JSON has no NaN and no infinity
        written = {name: _as_json(value) for name, value in values.items()}
        row = {"step": self.step, **written, **self._source}
        jsonl.append(self.out / ROWS, [row])

    def skip(self, name: str, reason: str) -> None:
        """Say that something could not be tried, and why."""
        self.row(name=name, skipped=reason)

    @cached_property
    def _source(self) -> dict[str, Any]:
        return {"rehearsal": self.rehearse, "device": device_name(self.device), **provenance("triton", "numpy")}


def _as_json(value: object) -> object:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
