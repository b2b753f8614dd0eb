"""torch.autocast: whether it is on, what it makes of inputs, and how a stage keeps its own dtypes under it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for this kind of device."""
    # the common ones by name: torch.compile of torch 2.8 cannot look into is_autocast_available
    available = device.type in ("cpu", "cuda", "xpu") or torch.amp.is_autocast_available(device.type)
    return available and torch.is_autocast_enabled(device.type)


def cast_as_autocast(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that autocast asks for, where it is on; float64 and integers stay."""
    if tensor.dtype == torch.float64 or not tensor.is_floating_point() or not autocasts(tensor.device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What is computed inside keeps its dtypes: scores in float32 stay so."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else contextlib.nullcontext()
