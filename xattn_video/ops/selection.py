"""Stage two: which blocks are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import check_geometry, check_selection
from . import reference
from .backends import auto_name, resolve
from .blocks import num_blocks, valid_and_forced_blocks
from .call_blocks import exact_type
from .checks import check_dense_last, check_dense_tokens, check_key_bounds, check_threshold


def select_blocks(
    scores: Tensor,
    *,
    threshold: float | Tensor = 0.9,
    causal: bool = False,
    block_size: int = 128,
    q_len: int | None = None,
    kv_len: int | None = None,
    kv_start: Tensor | None = None,
    kv_lens: Tensor | None = None,
    dense_tokens: tuple[int, int] | None = None,
    dense_last: int = 0,
    selection: str = "threshold",
    top_k: int | None = None,
    top_ratio: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Keep the fewest blocks that hold a share `threshold` of each row's mass (the paper's section 2.2).

    Blocks are taken in order of decreasing score, equal scores by lower index, after the forced ones: under
    `causal` the first valid block, those that overlap the query block's own positions and all of the query blocks
    that hold one of the `dense_last` last queries, and with `dense_tokens` every valid block that touches the range
    on either side.

    Args:
        scores: `[B, Hq, Nq, Nk]`, as `score_blocks` gives them.
        threshold: share tau in (0, 1], or a tensor `[Hq]` or 0-d of shares; 1 keeps every valid block.
        causal: as given to `score_blocks`.
        block_size: tokens a block.
        q_len, kv_len: tokens; None is full blocks.
        kv_start, kv_lens: integer `[B]`, the range of valid keys; None is 0 and kv_len.
        dense_tokens: token range of a joint sequence that stays exact on both sides (text), or None.
        dense_last: queries at the end of a causal call whose blocks keep every valid block.
        selection: `threshold`; or `top_k` (the `top_k` best blocks a row) or `top_ratio` (a share `top_ratio`
            of the row's valid blocks, rounded up), the rules of the paper's Table 8.
        top_k, top_ratio: the number that goes with `selection`.
        backend: `auto`, `triton`, `triton-hopper`, `cpu`, `flex`, `fa4` or `reference`; `auto` is `reference` where
            there is no fast one.

    Returns:
        bool `[B, Hq, Nq, Nk]`. Every row with a valid block keeps at least one.

    Raises:
        ValueError: sizes that do not fit the scores, or settings out of range.
    """
    if scores.ndim != 4:
        raise ValueError(f"scores must be [batch, heads, query blocks, key blocks], got {tuple(scores.shape)}")
    batch, heads, query_blocks, key_blocks = scores.shape
    check_geometry(1, block_size)
    q_len = query_blocks * block_size if q_len is None else q_len
    kv_len = key_blocks * block_size if kv_len is None else kv_len
    for name, length, blocks in (("q_len", q_len, query_blocks), ("kv_len", kv_len, key_blocks)):
        if num_blocks(length, block_size) != blocks:
            raise ValueError(f"{name} must fill {blocks} blocks of {block_size}, got {length}")
    check_selection(selection, top_k, top_ratio)
    check_threshold(threshold, heads)
    check_dense_tokens(dense_tokens, q_len, kv_len)
    check_dense_last(dense_last, causal)
    kv_start, kv_lens = check_key_bounds(kv_start, kv_lens, batch, kv_len, scores.device)
    geometry: dict[str, Any] = {
        "block_size": block_size,
        "causal": causal,
        "kv_start": kv_start,
        "kv_lens": kv_lens,
        "device": scores.device,
    }
    exact: dict[str, Any] = {"dense_tokens": dense_tokens, "dense_last": dense_last}
    valid, forced = valid_and_forced_blocks(batch, q_len, kv_len, **exact, **geometry)
    if backend == "auto":
        backend = auto_name(scores.device, scores.dtype) or "reference"
    select = resolve(backend, scores.device, scores.dtype).select
    return select_valid(scores, valid, forced, select=select, threshold=threshold, top_k=top_k, top_ratio=top_ratio)


def select_valid(
    scores: Tensor,
    valid: Tensor,
    forced: Tensor,
    *,
    select: Callable[..., Tensor],
    threshold: float | Tensor,
    top_k: int | None = None,
    top_ratio: float | None = None,
) -> Tensor:
    """`select_blocks` after the geometry is known: valid and forced are bool `[B, 1, Nq, Nk]`.

    `select` is the backend's, for a threshold; the ablations' rules sort.
    """
    if top_k is not None:
        return reference.select_top(scores, valid, forced, count=torch.tensor(top_k, device=scores.device))
    if top_ratio is not None:
        # 0.3 of 50 blocks is 15 and 0.14 of them 7, whatever binary fractions say
        rows = valid.sum(-1, keepdim=True).to(exact_type(valid.device))
        count = (rows * top_ratio - 1e-9).ceil().clamp(min=1).to(torch.int64)
        return reference.select_top(scores, valid, forced, count=count)
    return select(scores, valid, forced, threshold=threshold)
