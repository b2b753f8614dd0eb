"""The three stages of the method: score blocks, select some of them, attend over these.

Each public function checks its arguments, turns autocast off and hands plain tensors to a backend. Nothing behind it
checks again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..config import check_geometry, check_selection
from .backends import auto_name, resolve
from .block_lists import lists_to_mask
from .checks import (
    check_block_mask,
    check_dense_last,
    check_dense_tokens,
    check_query_key,
    check_threshold,
    check_value,
    checked_mask,
    default_scale,
    without_autocast,
)
from .key_mask import KeyMask, num_blocks
from .sparse import select_lists


def score_blocks(  # noqa: PLR0913 - public, its parameters are settings
    query: Tensor,
    key: Tensor,
    *,
    stride: int = 8,
    block_size: int = 128,
    causal: bool = False,
    scale: float | None = None,
    kv_start: Tensor | None = None,
    kv_lens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Estimate the attention mass of every block (the paper's section 2.1).

    The logit of a pair of token groups is `scale / stride` times the sum of query-key products over the
    antidiagonal of their `stride x stride` tile; a softmax over key groups follows, and its entries are summed
    over each block. Costs `1 / (2 * stride)` of dense attention's floating point operations.

    Args:
        query: `[B, Hq, Sq, D]`, floating point.
        key: `[B, Hkv, Sk, D]`; `Hq % Hkv == 0`, query head h uses key head `h // (Hq / Hkv)`.
        stride: side of the tiles, a power of two that divides block_size.
        block_size: side of the blocks in tokens, a power of two.
        causal: query i of item b sees keys up to `i + kv_lens[b] - Sq`.
        scale: factor on the products; None is `1 / sqrt(D)`.
        kv_start, kv_lens: integer `[B]`, the range of valid keys; None is 0 and Sk.
        backend: `auto`, `triton`, `triton-hopper`, `cpu`, `flex`, `fa4` or `reference`.

    Returns:
        float32 `[B, Hq, Nq, Nk]` (float64 from `reference` for float64 inputs). A row sums to the number of
        groups in it that hold a query which sees a key: `block_size / stride` for a full row.

    Raises:
        ValueError: shapes or settings that do not go together, or a backend that cannot run here.
    """
    check_query_key(query, key)
    check_geometry(stride, block_size)
    device = query.device
    mask = checked_mask(KeyMask(causal, kv_start, kv_lens), key)
    sizes: dict[str, Any] = {"stride": stride, "block_size": block_size, "scale": default_scale(scale, query.shape[3])}
    with without_autocast(device):
        return resolve(backend, device, query.dtype).antidiagonal_scores(query, key, **sizes, **mask.keywords)


def select_blocks(  # noqa: PLR0913 - public, its parameters are settings
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
        block_size: tokens per block.
        q_len, kv_len: tokens; None is full blocks.
        kv_start, kv_lens: integer `[B]`, the range of valid keys; None is 0 and kv_len.
        dense_tokens: token range of a joint sequence that stays exact on both sides (text), or None.
        dense_last: queries at the end of a causal call whose blocks keep every valid block.
        selection: `threshold`; or `top_k` (the `top_k` best blocks per row) or `top_ratio` (a share `top_ratio`
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
    device = scores.device
    mask = checked_mask(KeyMask(causal, kv_start, kv_lens), scores, kv_len)
    valid, forced = mask.valid_and_forced_blocks(
        batch,
        q_len,
        kv_len,
        block_size=block_size,
        dense_tokens=dense_tokens,
        dense_last=dense_last,
        device=device,
    )
    if backend == "auto":
        backend = auto_name(device, scores.dtype) or "reference"
    chosen = resolve(backend, device, scores.dtype)
    lists = select_lists(chosen, scores, valid, forced, threshold=threshold, top_k=top_k, top_ratio=top_ratio)
    return lists_to_mask(*lists)


def block_sparse_attention(  # noqa: PLR0913 - public, its parameters are settings
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    *,
    block_size: int = 128,
    causal: bool = False,
    scale: float | None = None,
    kv_start: Tensor | None = None,
    kv_lens: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which each query block sees only its kept key blocks (the paper's section 2.3).

    Inside the kept blocks attention is exact, with token-level causal and validity masks.

    Args:
        query: `[B, Hq, Sq, D]`, floating point.
        key, value: `[B, Hkv, Sk, D]`; `Hq % Hkv == 0`.
        block_mask: bool `[B, Hq, Nq, Nk]`; sizes of 1 in the first two dimensions are expanded.
        block_size: tokens per block, a power of two.
        causal: query i of item b sees keys up to `i + kv_lens[b] - Sq`.
        scale: factor on the products; None is `1 / sqrt(D)`.
        kv_start, kv_lens: integer `[B]`, the range of valid keys; None is 0 and Sk.
        return_lse: also return the log-sum-exp of the scaled logits.
        backend: `auto`, `triton`, `triton-hopper`, `cpu`, `flex`, `fa4` or `reference`.

    Returns:
        output `[B, Hq, Sq, D]` in query's dtype; with `return_lse` also the natural log-sum-exp, float32
        `[B, Hq, Sq]`. A query that sees no kept key gets 0 and -inf.

    Raises:
        ValueError: shapes or settings that do not go together, or a backend that cannot run here.
    """
    check_query_key(query, key)
    check_value(key, value)
    check_geometry(1, block_size)
    batch, heads, q_len, head_dim = query.shape
    kv_len, device = key.shape[2], query.device
    mask = checked_mask(KeyMask(causal, kv_start, kv_lens), key)
    shape = (batch, heads, num_blocks(q_len, block_size), num_blocks(kv_len, block_size))
    check_block_mask(block_mask, shape, device)
    # The backends take no block without a visible pair.
    kept = block_mask.expand(shape) & mask.valid_blocks(batch, q_len, kv_len, block_size=block_size, device=device)
    sizes: dict[str, Any] = {"block_size": block_size, "scale": default_scale(scale, head_dim)}
    chosen = resolve(backend, device, query.dtype)
    with without_autocast(device):
        lists = chosen.mask_to_lists(kept)
        output, lse = chosen.block_sparse_forward(query, key, value, *lists, **sizes, **mask.keywords)
    return (output, lse) if return_lse else output
