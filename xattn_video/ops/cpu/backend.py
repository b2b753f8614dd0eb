"""The fast CPU path: scores in `scores.py`, attention in `attend.py`, on the threads of `workers.py`.

Scores are computed in float32 (float64 for float64 inputs) whatever the input dtype: a product of bfloat16 tensors
rounds its result to bfloat16, and such scores choose worse blocks. Attention holds its logits and its sums in float32
too, but torch's fused attention rounds the probabilities of 16-bit inputs to 16 bits. Keys and values outside the valid
range are never read, so NaN there reaches nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..block_lists import empty_lists, mask_to_lists
from ..key_mask import KeyMask, num_blocks
from ..reference import compute_dtype
from .attend import attend_item
from .scores import score_item
from .tensors import geometries

# Pairs of blocks that are sorted at once, for all heads together: 3 MB.
_SELECT_ELEMENTS = 1 << 16


@torch.library.custom_op("xattn_video::cpu_scores", mutates_args=(), device_types="cpu")
def antidiagonal_scores(  # noqa: PLR0913 - torch takes neither a KeyMask nor a pair of lists
    query: Tensor,
    key: Tensor,
    kv_start: Tensor | None,
    kv_lens: Tensor | None,
    *,
    causal: bool,
    stride: int,
    block_size: int,
    scale: float,
) -> Tensor:
    """Mass of each block, as `reference.antidiagonal_scores`: `[B, Hq, Nq, Nk]`, float32 (float64 for float64)."""
    shape = (*query.shape[:2], num_blocks(query.shape[2], block_size), num_blocks(key.shape[2], block_size))
    scores = torch.zeros(shape, dtype=compute_dtype(query))
    mask = KeyMask(causal, kv_start, kv_lens)
    for item, geometry in enumerate(geometries(query, key, mask, block_size, scale)):
        score_item(query[item], key[item], scores[item], geometry, stride)
    return scores


@antidiagonal_scores.register_fake
def _(query: Tensor, key: Tensor, *_: Any, block_size: int, **__: Any) -> Tensor:
    shape = (*query.shape[:2], num_blocks(query.shape[2], block_size), num_blocks(key.shape[2], block_size))
    return query.new_empty(shape, dtype=compute_dtype(query))


def select(scores: Tensor, valid: Tensor, forced: Tensor, *, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
    """`reference.select` as lists, some rows at a time: what it holds beside the scores is ten times their size."""
    query_blocks = scores.shape[2]
    rows = max(_SELECT_ELEMENTS * query_blocks // scores.numel(), 1)
    if rows >= query_blocks:
        return mask_to_lists(reference.select(scores, valid, forced, threshold=threshold))
    valid, forced = valid.expand(scores.shape), forced.expand(scores.shape)
    indices, counts = empty_lists(scores)
    for begin in range(0, query_blocks, rows):
        part = slice(begin, begin + rows)
        kept = reference.select(*(flags[:, :, part] for flags in (scores, valid, forced)), threshold=threshold)
        indices[:, :, part], counts[:, :, part] = mask_to_lists(kept)
    return indices, counts


@torch.library.custom_op("xattn_video::cpu_attend", mutates_args=(), device_types="cpu")
def block_sparse_forward(  # noqa: PLR0913 - torch takes neither a KeyMask nor a pair of lists
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    kv_start: Tensor | None,
    kv_lens: Tensor | None,
    *,
    causal: bool,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks, as `reference.block_sparse_forward`: output and natural log-sum-exp.

    The lists name only valid blocks, in ascending order.
    """
    output = torch.empty(query.shape, dtype=query.dtype)
    lse = torch.empty(query.shape[:3], dtype=compute_dtype(query))
    mask = KeyMask(causal, kv_start, kv_lens)
    for item, geometry in enumerate(geometries(query, key, mask, block_size, scale)):
        lists = indices[item], counts[item]
        attend_item(query[item], key[item], value[item], lists, output[item], lse[item], geometry)
    return output, lse


@block_sparse_forward.register_fake
def _(query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return output, query.new_empty(query.shape[:3], dtype=compute_dtype(query))
