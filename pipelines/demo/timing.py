"""How far the demo's times can be believed, and how long the attention layers took: what `generate` does not note."""

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
# A run that gets less than this share of the time of its threads had to share the cores. The rest is what Python and
# the ends of parallel parts cost.
_LEAST_SHARE = 0.75
_MOST_BYTES = 2**24


class Load(TypedDict):
    """How busy the machine was in one run: see `busy`."""

    load: float | None
    cores: Count
    share: float | None
    threads: Count


class Timing(TypedDict):
    """What `demo.json` holds: the load in each run that made videos, and attention seconds by `folder/video`."""

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


def busy(runs: list[Load]) -> str | None:
    """Why the times of these runs are not reliable, in words; None where nothing speaks against them.

    Two signs: the load average before the start against the cores, and the CPU time of the process while the
    transformer ran against wall time and threads.
    """
    for run in runs:
        load, share = run["load"], run["share"]
        if load is not None and load > _MOST_LOAD * run["cores"]:
            return f"this machine was busy (load {load:.1f} on {run['cores']} cores before the start)"
        if share is not None and share < _LEAST_SHARE:
            got = f"{100 * share:.0f} % of the time of its {run['threads']} threads"
            return f"this machine was busy (the run got {got})"
    return None


def attention_speedup(timing: Timing, pairs: list[tuple[str, str]]) -> float | None:
    """Dense by sparse seconds of the self-attention layers of these videos, named `folder/video`; None if unknown."""
    seconds = [[timing["attention_seconds"].get(name) for name in side] for side in zip(*pairs, strict=True)]
    dense, sparse = (sum(value for value in side if value) if all(side) else 0.0 for side in seconds)
    return dense / sparse if dense and sparse else None


class Watch:
    """Measures one run: the load before it, the time of its attention layers, and its share of the CPU."""

    def __init__(self) -> None:
        # Windows has no load average.
        self._load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        self._wall = self._cpu = 0.0
        self._attention = 0.0
        self._threads = 1
        self._on_cpu = True

    def attach(self, pipe: Any) -> None:
        """Time the transformer of a pipeline and its self-attention layers from now on."""
        import torch

        device = pipe.transformer.device
        self._threads, self._on_cpu = torch.get_num_threads(), device.type == "cpu"
        layers = [layer for name, layer in pipe.transformer.named_modules() if name.endswith(".attn1")]
        assert layers, "the demo's transformer has layers of this name"

        def wait() -> None:
            if not self._on_cpu:
                torch.accelerator.synchronize(device)

        started: dict[Module, tuple[float, float]] = {}

        def start(module: Module, _: Any) -> None:
            wait()
            started[module] = time.perf_counter(), time.process_time()

        def stop(module: Module, _: Any, __: Any) -> None:
            wait()
            wall, cpu = started.pop(module)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if module is pipe.transformer:
                self._wall, self._cpu = self._wall + wall, self._cpu + cpu
            else:
                self._attention += wall

        for module in (pipe.transformer, *layers):
            module.register_forward_pre_hook(start)
            module.register_forward_hook(stop)

    def take_attention(self) -> float:
        """Seconds that the attention layers took since the last call."""
        seconds, self._attention = self._attention, 0.0
        return round(seconds, 4)

    @property
    def load(self) -> Load:
        """How busy the machine was. A process that waits for an accelerator has no share of the CPU to tell."""
        share = self._cpu / (self._wall * self._threads) if self._on_cpu and self._wall else None
        return {"load": self._load, "cores": _cores(), "share": share, "threads": self._threads}


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
