"""The fast CPU path: scores in `cpu_scores`, attention in `cpu_attend`, on the threads of `cpu_workers`.

Both compute in float32 (float64 for float64 inputs) whatever the input dtype: a product of bfloat16 tensors rounds its
result to bfloat16, and such scores choose worse blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..key_mask import KeyMask, num_blocks
from ..reference import compute_dtype
from .attend import attend_item
from .scores import score_item
from .tensors import geometries

# Pairs of blocks that are sorted at once, for all heads together: 3 MB.
_SELECT_ELEMENTS = 1 << 16


def antidiagonal_scores(
    query: Tensor,
    key: Tensor,
    *,
    stride: int,
    block_size: int,
    causal: bool,
    scale: float,
    kv_start: Tensor | None,
    kv_lens: Tensor | None,
) -> Tensor:
    """Mass of each block, as `reference.antidiagonal_scores`: `[B, Hq, Nq, Nk]`, float32 (float64 for float64)."""
    return _cpu_scores(query, key, stride, block_size, causal, scale, kv_start, kv_lens)


def select(scores: Tensor, valid: Tensor, forced: Tensor, *, threshold: float | Tensor) -> Tensor:
    """`reference.select`, a few rows at a time: what it holds beside the scores is ten times as large as they are."""
    query_blocks = scores.shape[2]
    rows = max(_SELECT_ELEMENTS * query_blocks // scores.numel(), 1)
    if rows >= query_blocks:
        return reference.select(scores, valid, forced, threshold=threshold)
    valid, forced = valid.expand(scores.shape), forced.expand(scores.shape)
    kept = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for begin in range(0, query_blocks, rows):
        part = [tensor[:, :, begin : begin + rows] for tensor in (scores, valid, forced)]
        kept[:, :, begin : begin + rows] = reference.select(*part, threshold=threshold)
    return kept


def block_sparse_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    *,
    block_size: int,
    causal: bool,
    scale: float,
    kv_start: Tensor | None,
    kv_lens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks, as `reference.block_sparse_forward`: output and natural log-sum-exp.

    Keys and values outside the valid range are never read, so NaN there reaches nothing.
    """
    return _cpu_attend(query, key, value, block_mask, block_size, causal, scale, kv_start, kv_lens)


@torch.library.custom_op("xattn_video::cpu_scores", mutates_args=(), device_types="cpu")
def _cpu_scores(
    query: Tensor,
    key: Tensor,
    stride: int,
    block_size: int,
    causal: bool,
    scale: float,
    kv_start: Tensor | None,
    kv_lens: Tensor | None,
) -> Tensor:
    shape = (*query.shape[:2], num_blocks(query.shape[2], block_size), num_blocks(key.shape[2], block_size))
    scores = torch.zeros(shape, dtype=compute_dtype(query))
    for item, geometry in enumerate(geometries(query, key, KeyMask(causal, kv_start, kv_lens), block_size, scale)):
        score_item(query[item], key[item], scores[item], geometry, stride)
    return scores


@_cpu_scores.register_fake
def _(
    query: Tensor,
    key: Tensor,
    stride: int,
    block_size: int,
    causal: bool,
    scale: float,
    kv_start: Tensor | None,
    kv_lens: Tensor | None,
) -> Tensor:
    shape = (*query.shape[:2], num_blocks(query.shape[2], block_size), num_blocks(key.shape[2], block_size))
    return query.new_empty(shape, dtype=compute_dtype(query))


@torch.library.custom_op("xattn_video::cpu_attend", mutates_args=(), device_types="cpu")
def _cpu_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    kv_start: Tensor | None,
    kv_lens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, heads, q_len, head_dim = query.shape
    mask = KeyMask(causal, kv_start, kv_lens)
    block_mask = block_mask & mask.valid_blocks(batch, q_len, key.shape[2], block_size=block_size, device=query.device)
    output = torch.empty(batch, heads, q_len, head_dim, dtype=query.dtype)
    lse = torch.empty(batch, heads, q_len, dtype=compute_dtype(query))
    for item, geometry in enumerate(geometries(query, key, mask, block_size, scale)):
        attend_item(query[item], key[item], value[item], block_mask[item], output[item], lse[item], geometry)
    return output, lse


@_cpu_attend.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    kv_start: Tensor | None,
    kv_lens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return output, query.new_empty(query.shape[:3], dtype=compute_dtype(query))
