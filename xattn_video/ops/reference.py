"""XAttention in plain PyTorch: slow, clear, any device and dtype. Every kernel is judged by this module.

It materialises the whole `[Sq/S, Sk/S]` and `[Sq, Sk]` matrices, so it is for short sequences.
Float64 inputs are computed in float64, all others in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .block_lists import lists_to_mask, mask_to_lists
from .key_mask import KeyMask, num_blocks


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What a backend computes in, and the dtype of scores and log-sum-exps: float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _groups(tokens: Tensor, stride: int) -> Tensor:
    """`[B, H, N, D]` cut into groups of `stride` tokens, zeros after the last: `[B, H, ceil(N/S), S, D]`."""
    batch, heads, length, head_dim = tokens.shape
    count = num_blocks(length, stride)
    return pad(tokens, (0, 0, 0, count * stride - length)).view(batch, heads, count, stride, head_dim)


def _any_in_group(flags: Tensor, stride: int) -> Tensor:
    """Which groups of `stride` tokens hold a true flag: `[B, N]` -> `[B, ceil(N/S)]`."""
    count = num_blocks(flags.shape[-1], stride)
    return pad(flags, (0, count * stride - flags.shape[-1])).view(-1, count, stride).any(-1)


def antidiagonal_scores(  # noqa: PLR0913 - a backend's signature
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
    """Mass of each block under the softmax of antidiagonal sums (the paper's section 2.1).

    Returns:
        `[B, Hq, Nq, Nk]`, float64 for float64 inputs, else float32. A row sums to the number of query groups in
        it that hold a query which sees a key.
    """
    dtype, mask = compute_dtype(query), KeyMask(causal, kv_start, kv_lens)
    q_len, kv_len, device = query.shape[2], key.shape[2], query.device
    first, end = mask.query_range(q_len, kv_len, device)
    key_valid, query_valid = mask.valid_keys(kv_len, device), first < end
    queries = query.to(dtype).masked_fill(~query_valid[:, None, :, None], 0)
    keys = key.to(dtype).masked_fill(~key_valid[:, None, :, None], 0)
    keys = keys.repeat_interleave(query.shape[1] // key.shape[1], dim=1)

    query_groups = _groups(queries, stride).flip(3).flatten(3)
    key_groups = _groups(keys, stride).flatten(3)
    logits = query_groups @ key_groups.transpose(-1, -2) * (scale / stride)

    # A group row sees a key group that holds a valid key and starts at or before its last token's last key.
    visible = _any_in_group(key_valid, stride)[:, None, :]
    if causal:
        rows = torch.arange(query_groups.shape[2], device=device)
        _, stop = mask.valid_range(kv_len, device)
        last_key = rows * stride + stride - 1 + (stop - q_len)[:, None]
        columns = torch.arange(key_groups.shape[2], device=device) * stride
        visible = visible & (columns <= last_key[:, :, None])
    visible = visible & _any_in_group(query_valid, stride)[:, :, None]

    logits = logits.masked_fill(~visible[:, None], -torch.inf)
    prob = torch.softmax(logits, dim=-1).masked_fill(~visible[:, None], 0)
    ratio = block_size // stride
    query_blocks, key_blocks = num_blocks(q_len, block_size), num_blocks(kv_len, block_size)
    prob = pad(prob, (0, key_blocks * ratio - prob.shape[3], 0, query_blocks * ratio - prob.shape[2]))
    by_block: Tensor = prob.unflatten(3, (key_blocks, ratio))
    tiles: Tensor = by_block.sum(-1).unflatten(2, (query_blocks, ratio))
    return tiles.sum(3)


def rank_blocks(scores: Tensor, valid: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
    """Order in which blocks are taken: forced first, then by decreasing score, equal scores by lower index.

    Returns:
        order int64 `[B, H, Nq, Nk]` (block indices, invalid ones last) and their masses in that order (0 where
        invalid).
    """
    mass = torch.where(valid, scores, 0)
    priority = torch.where(valid, mass, -1)
    priority = torch.where(forced, torch.inf, priority)
    order = priority.sort(dim=-1, descending=True, stable=True).indices
    return order, mass.gather(-1, order)


def select(scores: Tensor, valid: Tensor, forced: Tensor, *, threshold: float | Tensor) -> Tensor:
    """Smallest set of valid blocks that holds `threshold` of each row's mass (the paper's section 2.2).

    Args:
        scores: `[B, H, Nq, Nk]`.
        valid, forced: bool, broadcastable to scores; forced is a subset of valid.
        threshold: a number, or a tensor `[H]` or 0-d; 1 or more keeps every valid block.

    Returns:
        bool `[B, H, Nq, Nk]`. A row whose mass is NaN or inf keeps every valid block, so that a NaN in a
        query or key shows where it shows in dense attention, and nowhere else.
    """
    valid, forced = valid.expand(scores.shape), forced.expand(scores.shape)
    tau = torch.as_tensor(threshold, dtype=torch.float64, device=scores.device).reshape(-1, 1, 1)
    order, mass = rank_blocks(scores.double(), valid, forced)
    before = mass.cumsum(-1) - mass
    wanted = tau * mass.sum(-1, keepdim=True)
    taken = before < wanted
    # A row whose scores are all zero still keeps its first block.
    taken[..., 0] = True
    kept = torch.zeros_like(valid).scatter(-1, order, taken)
    return torch.where((tau >= 1) | ~wanted.isfinite(), valid, (kept | forced) & valid)


def select_lists(scores: Tensor, valid: Tensor, forced: Tensor, *, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
    """`select` in the form that a backend has: indices int32 `[B, H, Nq, Nk]`, ascending, and counts int32."""
    return mask_to_lists(select(scores, valid, forced, threshold=threshold))


def select_top(scores: Tensor, valid: Tensor, forced: Tensor, *, count: Tensor) -> Tensor:
    """The `count` best valid blocks of each row, forced ones first and never dropped.

    Args:
        count: int64, broadcastable to `[B, H, Nq, 1]`.
    """
    valid, forced = valid.expand(scores.shape), forced.expand(scores.shape)
    order, _ = rank_blocks(scores, valid, forced)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    taken = (rank < count).expand(scores.shape)
    kept = torch.zeros_like(valid).scatter(-1, order, taken)
    # as in select
    broken = ~(scores * valid).sum(-1, keepdim=True).isfinite()
    return (kept | forced | broken) & valid


def block_sparse_forward(  # noqa: PLR0913 - a backend's signature
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
    """Exact softmax attention over the kept blocks (the paper's section 2.3).

    Returns:
        output `[B, Hq, Sq, D]` in query's dtype and the natural log-sum-exp `[B, Hq, Sq]` in float32 (float64 for
        float64 inputs); 0 and -inf for a query that sees no kept key. A value that is not finite spoils the rows of
        all query blocks that keep its block, as in a kernel that multiplies whole blocks, and no others.
    """
    dtype = compute_dtype(query)
    q_len, kv_len, repeats = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    masking = KeyMask(causal, kv_start, kv_lens)
    key_valid = masking.valid_keys(kv_len, query.device)
    kept = block_mask.repeat_interleave(block_size, 2)[:, :, :q_len]
    kept = kept.repeat_interleave(block_size, 3)[:, :, :, :kv_len]
    mask = kept & masking.visible(q_len, kv_len, query.device)[:, None]

    keys = key.to(dtype).masked_fill(~key_valid[:, None, :, None], 0).repeat_interleave(repeats, dim=1)
    values = value.to(dtype).masked_fill(~key_valid[:, None, :, None], 0).repeat_interleave(repeats, dim=1)
    logits = query.to(dtype) @ keys.transpose(-1, -2) * scale
    logits = logits.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(logits, dim=-1)
    prob = torch.exp(logits - torch.where(lse.isfinite(), lse, 0)[..., None]).masked_fill(~mask, 0)
    broken = ~values.isfinite()
    output = prob @ values.masked_fill(broken, 0)
    return spoil(output, broken, block_mask, block_size).to(query.dtype), lse


def spoil(output: Tensor, broken: Tensor, block_mask: Tensor, block_size: int) -> Tensor:
    """NaN for the rows of query blocks that keep a block with a broken value.

    Args:
        output: `[B, Hq, Sq, D]`.
        broken: where values are not finite, bool `[B, Hkv, Sk, D]`.
        block_mask: the kept blocks, bool `[B, Hq, Nq, Nk]`.
        block_size: tokens per block.
    """
    broken = torch.nn.functional.pad(broken, (0, 0, 0, -broken.shape[2] % block_size))
    by_block = broken.unflatten(2, (-1, block_size)).any(3).repeat_interleave(output.shape[1] // broken.shape[1], 1)
    # floats, since bool has no matrix product; all of them are 0 or positive
    rows = (block_mask.float() @ by_block.float() > 0).repeat_interleave(block_size, 2)
    return output.masked_fill(rows[:, :, : output.shape[2]], torch.nan)


def block_sparse_forward_lists(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor, **settings: Any
) -> tuple[Tensor, Tensor]:
    """`block_sparse_forward` in the form that a backend has: over lists of kept blocks."""
    return block_sparse_forward(query, key, value, lists_to_mask(indices, counts), **settings)
