"""The small host-side helpers that every launcher shares; launch configurations are data, see launch_tables.py."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction

from .launch_tables import LaunchConfig, find_config

# natural logarithm of 2, and its inverse: the kernels work in powers of two
LN2 = 0.6931471805599453
LOG2E = 1.4426950408889634

# said aloud because Triton's default changes between versions; the softmax leans on fused multiply-adds
COMPILE_OPTIONS = {"enable_fp_fusion": True}

# below it a float32 kernel might see 0, which is no factor for a masked logit of -inf
_NO_SCALE = 1e-30

# of a grid's second axis, CUDA's limit
_MOST_IN_Y = 65_535

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256


def check_supported(dtype: torch.dtype, head_dim: int) -> None:
    """Raise ValueError for a dtype or head dimension that the kernels cannot take."""
    if dtype not in SUPPORTED_DTYPES:
        names = ", ".join(str(item) for item in SUPPORTED_DTYPES)
        raise ValueError(f"query must be one of {names} for the triton backend, got {dtype}; use backend='reference'")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim must be at most {MAX_HEAD_DIM} for the triton backend, got {head_dim}; use backend='reference'"
        )


def headroom(dtype: torch.dtype) -> float:
    """By which power of two the probabilities of an attention kernel are scaled down while it sums: 20 or 0.

    The sum over keys of probability * value is divided by the sum of probabilities only at the end. Until then a
    probability is at most 1, so values near the largest number of their type would sum to inf. Scaled by 2^-20, the
    probabilities of up to a million keys sum to at most 1. A power of two rounds no probability in float32 and
    bfloat16. Added to the exponent it is free but rounds that to 2e-6: enough for bfloat16 results, not for float32.
    float16 has too few exponents below 1 for it, and its values cannot make a float32 sum overflow.
    """
    return 0.0 if dtype == torch.float16 else 20.0


def rows_by_heads(rows: int, batch: int, heads: int) -> tuple[int, int]:
    """A grid with a program for every row of every head. Raises ValueError for more heads than a launch can have."""
    if batch * heads > _MOST_IN_Y:
        raise ValueError(
            f"batch * heads must be at most {_MOST_IN_Y} for the triton backend, got {batch} * {heads}; split the batch"
        )
    return rows, batch * heads


def launch_config(kernel: str, dtype: torch.dtype, head_dim: int, device: torch.device | None = None) -> LaunchConfig:
    """Tile sizes, warps and stages of a kernel on that device; None is the default table's.

    Raises ValueError for a malformed table.
    """
    return find_config(kernel, dtype, head_dim, device)


def is_interpreted(kernel: object) -> bool:
    """True when TRITON_INTERPRET=1 was set as the kernels were imported: they then run in NumPy on CPU tensors."""
    return isinstance(kernel, InterpretedFunction)


def unit_inner_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself when its last dimension is dense (what the kernels assume), else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def positive_scale(query: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """A query and a scale above 0 with the same scaled products: the kernels take maxima before they scale."""
    if abs(scale) < _NO_SCALE:
        return torch.zeros_like(query), 1.0
    return (query, scale) if scale > 0 else (-query, -scale)


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU the current one: Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def processors(device: torch.device) -> int:
    """How many programs a kernel needs that share out the work among themselves: one a multiprocessor of the GPU.

    In the interpreter a small number, so that programs have more than one share there too.
    """
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
