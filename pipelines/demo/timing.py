"""How busy the machine was before the demo, and how long its attention layers took: what `generate` does not note."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from xattn_video_pipelines.common.files import read_own
from xattn_video_pipelines.common.schema import Count, Seconds, complaint, parse_json
from xattn_video_pipelines.demo.settings import DEMO_JSON

if TYPE_CHECKING:
    from torch.nn import Module

# With more work than this waiting per core before the start, the machine is busy.
_MOST_LOAD = 0.75
_MOST_BYTES = 2**24


class Load(TypedDict):
    """The load average before one run, and the cores."""

    load: float | None
    cores: Count


class Timing(TypedDict):
    """What `demo.json` holds: the load before each run that made videos, and attention seconds by `folder/video`."""

    runs: list[Load]
    attention_seconds: dict[str, Seconds]


def read_timing(folder: Path) -> Timing:
    """What `demo` noted in the folder of a run; empty where it noted nothing that can be read."""
    try:
        value: Any = parse_json(read_own(folder / DEMO_JSON, _MOST_BYTES))
    except (OSError, ValueError):
        return {"runs": [], "attention_seconds": {}}
    if complaint(value, Timing) is not None:
        return {"runs": [], "attention_seconds": {}}
    timing: Timing = value
    return timing


def loaded(runs: list[Load]) -> str | None:
    """Why the times of these runs are not reliable, in words; None where no load average speaks against them."""
    for run in runs:
        load = run["load"]
        if load is not None and load > _MOST_LOAD * run["cores"]:
            return f"this machine was busy (load {load:.1f} on {run['cores']} cores before the start)"
    return None


def attention_speedup(timing: Timing, pairs: list[tuple[str, str]]) -> float | None:
    """Dense by sparse seconds of the self-attention layers of these videos, named `folder/video`; None if unknown."""
    seconds = [[timing["attention_seconds"].get(name) for name in side] for side in zip(*pairs, strict=True)]
    dense, sparse = (sum(value for value in side if value) if all(side) else 0.0 for side in seconds)
    return dense / sparse if dense and sparse else None


class Watch:
    """Measures one run: the load before it, and the time of its attention layers."""

    def __init__(self) -> None:
        # Windows has no load average.
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        self.load: Load = {"load": load, "cores": _cores()}
        self._attention = 0.0

    def attach(self, pipe: Any) -> None:
        """Time the self-attention layers of a pipeline from now on."""
        import torch

        device = pipe.transformer.device
        layers = [layer for name, layer in pipe.transformer.named_modules() if name.endswith(".attn1")]
        assert layers, "the demo's transformer has layers of this name"

        def wait() -> None:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)

        started: dict[Module, float] = {}

        def start(module: Module, _: Any) -> None:
            wait()
            started[module] = time.perf_counter()

        def stop(module: Module, _: Any, __: Any) -> None:
            wait()
            self._attention += time.perf_counter() - started.pop(module)

        for module in layers:
            module.register_forward_pre_hook(start)
            module.register_forward_hook(stop)

    def take_attention(self) -> float:
        """Seconds that the attention layers took since the last call."""
        seconds, self._attention = self._attention, 0.0
        return round(seconds, 4)


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
