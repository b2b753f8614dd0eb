"""Stage three: exact attention over the kept blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import check_geometry
from .autocast import without_autocast
from .backends import resolve
from .blocks import num_blocks, valid_blocks
from .checks import check_key_bounds, check_query_key, check_value, default_scale


def block_sparse_attention(
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
        block_size: tokens a block, a power of two.
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
    kv_len = key.shape[2]
    kv_start, kv_lens = check_key_bounds(kv_start, kv_lens, batch, kv_len, query.device)
    block_mask = _expanded_mask(
        block_mask,
        (batch, heads, num_blocks(q_len, block_size), num_blocks(kv_len, block_size)),
        query.device,
    )
    # A block without a visible pair adds nothing, so it is never visited.
    block_mask = block_mask & valid_blocks(
        batch,
        q_len,
        kv_len,
        block_size=block_size,
        causal=causal,
        kv_start=kv_start,
        kv_lens=kv_lens,
        device=query.device,
    )
    with without_autocast(query.device):
        output, lse = resolve(backend, query.device, query.dtype).block_sparse_forward(
            query,
            key,
            value,
            block_mask,
            block_size=block_size,
            causal=causal,
            scale=default_scale(scale, head_dim),
            kv_start=kv_start,
            kv_lens=kv_lens,
        )
    return (output, lse) if return_lse else output


def _expanded_mask(block_mask: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if block_mask.dtype != torch.bool:
        raise ValueError(f"block_mask must be bool, got {block_mask.dtype}")
    fits = block_mask.ndim == 4 and block_mask.shape[2:] == shape[2:]
    if not fits or any(have not in (1, want) for have, want in zip(block_mask.shape[:2], shape[:2], strict=True)):
        raise ValueError(f"block_mask must have shape {shape}, got {tuple(block_mask.shape)}")
    if block_mask.device != device:
        raise ValueError(f"block_mask must be on query's device {device}, got {block_mask.device}")
    return block_mask.expand(shape)
