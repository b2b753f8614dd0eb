"""How long a call takes on a device, and the memory that it needs there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """The seconds of one call, from an idle device to an idle device."""
    _wait_for(device)
    begin = time.perf_counter()
    function()
    _wait_for(device)
    return time.perf_counter() - begin


def median_seconds(function: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The median of so many calls. The caller has run it once before, as the first call may compile."""
    return statistics.median(seconds_of(function, device) for _ in range(rounds))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_extra_mb(function: Callable[[], object], device: torch.device) -> float | None:
    """Memory beyond what is there already, the output included; None on a CPU, where nobody counts it."""
    if device.type != "cuda":
        return None
    _wait_for(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    _wait_for(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6
