"""What both stages of the CPU path share: geometry as numbers, padded copies, the matrix product."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..key_mask import KeyMask

# Copies of keys and values that are alive at once (at least one head's): what the masks leave of the default bound.
_COPY_BYTES = 64 << 20


class Geometry(NamedTuple):
    """What one batch item sees: keys `[start, stop)`, and if causal query i those up to `i + offset`."""

    block_size: int
    q_len: int
    start: int
    stop: int
    offset: int | None
    scale: float


def geometries(query: Tensor, key: Tensor, mask: KeyMask, block_size: int, scale: float) -> list[Geometry]:
    """The geometry of each batch item."""
    batch, q_len, kv_len = query.shape[0], query.shape[2], key.shape[2]
    starts, stops = (part.expand(batch).tolist() for part in mask.valid_range(kv_len, query.device))
    return [
        Geometry(block_size, q_len, start, stop, stop - q_len if mask.causal else None, scale)
        for start, stop in zip(starts, stops, strict=True)
    ]


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.T` for `[M, K]` and `[N, K]`."""
    if left.dtype == torch.float32 and _onednn_is_faster():
        result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
        return result
    return left @ right.t()


def is_fused(dtype: torch.dtype, geometry: Geometry) -> bool:
    """Whether torch's own fused attention is used for inputs of that dtype, and not two of `product` and a softmax.

    It is not used for float64, where its result is less exact, and not for causal calls: it adds the mask to the
    logits, so NaN in a key would reach queries that do not see this key.
    """
    return dtype != torch.float64 and geometry.offset is None and not _onednn_is_faster()


@cache
def _onednn_is_faster() -> bool:
    """Whether oneDNN's products are faster than those of torch.mm, which its fused attention has inside too.

    oneDNN uses the widest vectors of every x86 CPU, torch.mm's library only those of Intel's. With AVX2 torch.mm is the
    faster one.
    """
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_onednn and torch.backends.cpu.get_cpu_capability() != "AVX2"


def head_slabs(kv_heads: int, bytes_per_head: int) -> Iterator[range]:
    """Key heads whose copies are made together."""
    step = max(1, _COPY_BYTES // bytes_per_head)
    for begin in range(0, kv_heads, step):
        yield range(begin, min(begin + step, kv_heads))


def fill(target: Tensor, tokens: Tensor, begin: int, start: int, stop: int) -> Tensor:
    """Copy tokens `begin, begin + 1, ...` of `[N, D]` to target `[n, D]`, zeros for those outside `[start, stop)`."""
    first = min(max(start - begin, 0), target.shape[0])
    last = max(min(stop - begin, target.shape[0]), first)
    target[first:last].copy_(tokens[begin + first : begin + last])
    if first > 0:
        target[:first].zero_()
    if last < target.shape[0]:
        target[last:].zero_()
    return target
