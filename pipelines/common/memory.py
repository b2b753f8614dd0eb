"""The most memory that a piece of work takes, weights included: a GPU's allocations, or a CPU process's pages."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# What the kernel takes as "begin the peak of the resident size again".
_RESET = "5"


def reset_peak(device: torch.device) -> None:
    """Begin to measure again; does nothing where this device has no peak to read."""
    if device.type == "cpu":
        with contextlib.suppress(OSError):
            _CLEAR.write_text(_RESET)
    elif (module := _counters(device)) is not None:
        module.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most since `reset_peak`: allocated on a GPU, resident on a CPU (Linux). None where it cannot be read.

    Where the kernel does not let the peak of a process be reset, it is the process's peak since its start.
    """
    if device.type != "cpu":
        module = _counters(device)
        return None if module is None else module.max_memory_allocated(device)
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _counters(device: torch.device) -> Any | None:
    module = torch.get_device_module(device)
    return module if hasattr(module, "max_memory_allocated") and hasattr(module, "reset_peak_memory_stats") else None
