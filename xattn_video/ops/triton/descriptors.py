"""Tensor descriptors of keys and values: the copy engine (TMA) of GPUs from sm_90 on then fetches whole tiles."""

# Triton gives the parameters of jit functions their types, one launch at a time
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # an older Triton: everything is fetched through pointers
    TensorDescriptor = None

# bytes that addresses and strides must be a multiple of
_ALIGNMENT = 16
_LEAST_CAPABILITY = (9, 0)


class Described(NamedTuple):
    """Descriptors of key and value, their dimensions in the order of falling strides.

    `heads_inside`: the heads of a token lie next to each other, so the order is [B, S, H, D] and not [B, H, S, D].
    """

    key: Any
    value: Any
    heads_inside: bool


def has_copy_engine(device: torch.device) -> bool:
    """Whether tensor descriptors can be used there: on an NVIDIA GPU from sm_90 on (and in the interpreter, to try), if
    Triton has them.
    """
    if TensorDescriptor is None:
        return False
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


def describe(key: torch.Tensor, value: torch.Tensor, rows: int, columns: int) -> Described | None:
    """Descriptors for tiles of `rows` tokens by `columns` of [B, H, S, D] tensors, or None where a GPU or a layout has
    none: see `has_copy_engine`; unaligned, not in one of the two orders, or expanded.
    """
    if not has_copy_engine(key.device) or 0 in key.shape:
        return None
    inside = heads_inside(key)
    order = (0, 2, 1, 3) if inside else (0, 1, 2, 3)
    tile = [1, rows, 1, columns] if inside else [1, 1, rows, columns]
    made = []
    for tensor in (key, value):
        ordered = tensor.permute(order)
        if not describable(ordered):
            return None
        made.append(TensorDescriptor(ordered, list(ordered.shape), list(ordered.stride()), tile))
    return Described(made[0], made[1], inside)


def heads_inside(tensor: torch.Tensor) -> bool:
    """Whether the heads of a token of a [B, H, S, D] tensor lie next to each other: its order is [B, S, H, D]."""
    return tensor.stride(1) < tensor.stride(2)


def describable(tensor: torch.Tensor) -> bool:
    """Whether the strides fall and none is 0, and all addresses are aligned."""
    *outer, last = tensor.stride()
    width = tensor.element_size()
    falling = all(one >= other for one, other in zip(outer, [*outer[1:], tensor.shape[-1]], strict=True))
    aligned = tensor.data_ptr() % _ALIGNMENT == 0 and all(stride * width % _ALIGNMENT == 0 for stride in outer)
    return last == 1 and falling and aligned and min(outer) > 0


@triton.jit
def load_rows(descriptor, batch, head, row, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEADS_INSIDE: tl.constexpr):
    """The tile [ROWS, COLUMNS] of a head from a row on; what lies past the tensor's ends reads as zero."""
    # a ternary would need both sides to have a type
    if HEADS_INSIDE:  # noqa: SIM108
        tile = descriptor.load([batch, row, head, 0])
    else:
        tile = descriptor.load([batch, head, row, 0])
    return tile.reshape(ROWS, COLUMNS)
