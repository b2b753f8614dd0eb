"""Launch configurations (data, not code) and the small host-side helpers that every launcher shares."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction

LaunchConfig = Mapping[str, int]

# natural logarithm of 2, and its inverse: the kernels work in powers of two
LN2 = 0.6931471805599453
LOG2E = 1.4426950408889634

# said aloud because Triton's default changes between versions; the softmax leans on fused multiply-adds
COMPILE_OPTIONS = {"enable_fp_fusion": True}

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256


@functools.cache
def load_table(name: str) -> dict[str, Any]:
    """Read launch_configs/<name>.json: {kernel: {"16-bit" | "32-bit": {largest head_dim: configuration}}}."""
    file = resources.files(__package__).joinpath("launch_configs", f"{name}.json")
    return json.loads(file.read_text(encoding="utf-8"))


def check_supported(dtype: torch.dtype, head_dim: int) -> None:
    """Raise ValueError for a dtype or head dimension that the kernels cannot take."""
    if dtype not in SUPPORTED_DTYPES:
        names = ", ".join(str(item) for item in SUPPORTED_DTYPES)
        raise ValueError(f"query must be one of {names} for the triton backend, got {dtype}; use backend='reference'")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim must be at most {MAX_HEAD_DIM} for the triton backend, got {head_dim}; use backend='reference'"
        )


def launch_config(kernel: str, dtype: torch.dtype, head_dim: int, table: str = "default") -> LaunchConfig:
    """Tile sizes, warps and stages of a kernel: the entry of the smallest listed head_dim that is large enough."""
    rows = load_table(table)[kernel]["32-bit" if dtype == torch.float32 else "16-bit"]
    return rows[str(min(int(limit) for limit in rows if int(limit) >= head_dim))]


def is_interpreted(kernel: object) -> bool:
    """True when TRITON_INTERPRET=1 was set as the kernels were imported: they then run in NumPy on CPU tensors."""
    return isinstance(kernel, InterpretedFunction)


def unit_inner_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself when its last dimension is dense (what the kernels assume), else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU the current one: Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def processors(device: torch.device) -> int:
    """How many programs a kernel needs that share out the work among themselves: one a multiprocessor of the GPU.

    In the interpreter a small number, so that programs have more than one share there too.
    """
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
