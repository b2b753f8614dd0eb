"""Block geometry: which blocks exist, which hold a visible (query, key) pair, which are always kept.

A query sees one contiguous range of keys, so everything here follows from two numbers a query: its first
visible key and the end of its visible keys. All functions are pure torch, never read a value back to the host
and trace under `torch.compile`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def num_blocks(length: int, block_size: int) -> int:
    """Blocks that cover `length` tokens, the last one possibly partial."""
    return -(-length // block_size)


def key_range(
    kv_len: int, kv_start: Tensor | None, kv_lens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """First valid key and end of the valid keys of each batch item, int64 `[B]` (`[1]` where all are valid)."""
    start = torch.zeros(1, dtype=torch.int64, device=device) if kv_start is None else kv_start.to(torch.int64)
    stop = torch.full_like(start, kv_len) if kv_lens is None else kv_lens.to(torch.int64)
    return start, stop


def query_key_range(
    q_len: int,
    kv_len: int,
    *,
    causal: bool,
    kv_start: Tensor | None,
    kv_lens: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Range of keys each query sees, int64 `[B or 1, Sq]` twice: first key, end (end <= first: sees none)."""
    start, stop = key_range(kv_len, kv_start, kv_lens, device)
    query = torch.arange(q_len, device=device)
    first = start[:, None].expand(-1, q_len)
    if not causal:
        return first, stop[:, None].expand(-1, q_len)
    last = query[None, :] + (stop - q_len)[:, None] + 1
    return first, torch.minimum(last, stop[:, None])


class _Edges(NamedTuple):
    """Where the keys that query blocks see begin and end, and where the key blocks do, int64.

    Attributes:
        first: first valid key `[B, 1, 1]`.
        end: end of the keys that a query block sees `[B, rows, 1]`; end <= first: it sees none.
        query_begin, query_end: the query blocks `[rows]`.
        key_begin, key_end: the key blocks `[Nk]`.
        offset: `kv_lens - q_len`, `[B]`.
    """

    first: Tensor
    end: Tensor
    query_begin: Tensor
    query_end: Tensor
    key_begin: Tensor
    key_end: Tensor
    offset: Tensor

    def valid(self) -> Tensor:
        """The blocks that hold a visible pair, bool `[B, rows, Nk]`.

        Each comparison gives bool at once. A maximum or minimum of the edges would be int64 in that shape.
        """
        return (self.key_begin < self.end) & (self.first < self.end) & (self.first < self.key_end)


def _block_edges(
    batch: int,
    q_len: int,
    kv_len: int,
    block_size: int,
    causal: bool,
    kv_start: Tensor | None,
    kv_lens: Tensor | None,
    rows: tuple[int, int] | None,
    device: torch.device,
) -> _Edges:
    start, stop = key_range(kv_len, kv_start, kv_lens, device)
    start, stop = start.expand(batch), stop.expand(batch)
    offset = stop - q_len
    begin_row, end_row = (0, num_blocks(q_len, block_size)) if rows is None else rows
    query_begin = torch.arange(begin_row, end_row, device=device) * block_size
    query_end = (query_begin + block_size).clamp(max=q_len)
    end = stop[:, None, None].expand(-1, end_row - begin_row, 1)
    if causal:
        end = torch.minimum(end, (query_end[None, :] + offset[:, None])[:, :, None])
    key_begin = torch.arange(num_blocks(kv_len, block_size), device=device) * block_size
    return _Edges(start[:, None, None], end, query_begin, query_end, key_begin, key_begin + block_size, offset)


def valid_blocks(
    batch: int,
    q_len: int,
    kv_len: int,
    *,
    block_size: int,
    causal: bool = False,
    kv_start: Tensor | None = None,
    kv_lens: Tensor | None = None,
    device: torch.device,
) -> Tensor:
    """Blocks that hold at least one visible (query, key) pair.

    Args:
        batch, q_len, kv_len: sizes of the attention call.
        block_size: tokens a block.
        causal: query i of batch item b sees keys up to `i + kv_lens[b] - q_len`.
        kv_start, kv_lens: int32 `[B]` range of valid keys, or None for all.
        device: where the mask is made.

    Returns:
        bool `[B, 1, Nq, Nk]`.
    """
    return _block_edges(batch, q_len, kv_len, block_size, causal, kv_start, kv_lens, None, device).valid()[:, None]


def count_valid_blocks(
    batch: int,
    q_len: int,
    kv_len: int,
    *,
    block_size: int,
    causal: bool = False,
    kv_start: Tensor | None = None,
    kv_lens: Tensor | None = None,
    device: torch.device,
) -> Tensor:
    """The number of `valid_blocks` over the batch, int64 0-d, without the matrix of them."""
    edges = _block_edges(batch, q_len, kv_len, block_size, causal, kv_start, kv_lens, None, device)
    blocks = (edges.end + block_size - 1) // block_size - edges.first // block_size
    return torch.where(edges.first < edges.end, blocks, 0).sum()


def valid_and_forced_blocks(
    batch: int,
    q_len: int,
    kv_len: int,
    *,
    block_size: int,
    causal: bool = False,
    kv_start: Tensor | None = None,
    kv_lens: Tensor | None = None,
    dense_tokens: tuple[int, int] | None = None,
    dense_last: int = 0,
    rows: tuple[int, int] | None = None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """`valid_blocks`, and those of them that every selection keeps.

    Causal: the first valid block of the row, every block that overlaps the query block's own positions, and all
    valid blocks of the query blocks that hold one of the `dense_last` last queries. With
    `dense_tokens = (start, stop)`: every key block that touches the range, and all valid blocks of the query blocks
    that touch it.

    Args:
        rows: make the masks of the query blocks `rows[0]` to `rows[1] - 1` alone; None makes those of all.

    Returns:
        bool `[B, 1, Nq, Nk]` twice, or `[B, 1, rows[1] - rows[0], Nk]`.
    """
    edges = _block_edges(batch, q_len, kv_len, block_size, causal, kv_start, kv_lens, rows, device)
    first, key_begin, key_end = edges.first, edges.key_begin, edges.key_end
    valid = edges.valid()
    forced = torch.zeros_like(valid)
    if causal:
        holds_first = (key_begin <= first) & (first < key_end)
        own_begin, own_end = (
            (edge[None, :] + edges.offset[:, None])[:, :, None] for edge in (edges.query_begin, edges.query_end)
        )
        forced = holds_first | ((key_begin < own_end) & (key_end > own_begin))
        if dense_last:
            forced = forced | (edges.query_begin + block_size > q_len - dense_last)[:, None]
    if dense_tokens is not None and dense_tokens[0] < dense_tokens[1]:
        dense_start, dense_stop = dense_tokens
        key_dense = (key_begin < dense_stop) & (key_end > dense_start)
        query_dense = (edges.query_begin < dense_stop) & (edges.query_begin + block_size > dense_start)
        forced = forced | key_dense | query_dense[:, None]
    return valid[:, None], (forced & valid)[:, None]


def mask_to_lists(block_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Kept-block lists of a block mask, without a sort.

    Args:
        block_mask: bool `[B, H, Nq, Nk]`.

    Returns:
        indices int32 `[B, H, Nq, Nk]`, ascending, 0 past the count; counts int32 `[B, H, Nq]`.
    """
    num_key_blocks = block_mask.shape[-1]
    position = block_mask.cumsum(-1, dtype=torch.int64) - 1
    # Blocks that are not kept go to a spare last column, which is cut off.
    position = torch.where(block_mask, position, num_key_blocks)
    column = torch.arange(num_key_blocks, dtype=torch.int32, device=block_mask.device).expand(block_mask.shape)
    indices = torch.zeros(
        *block_mask.shape[:-1], num_key_blocks + 1, dtype=torch.int32, device=block_mask.device
    ).scatter(-1, position, column)
    return indices[..., :num_key_blocks].contiguous(), block_mask.sum(-1, dtype=torch.int32)


def lists_to_mask(indices: Tensor, counts: Tensor) -> Tensor:
    """The inverse of `mask_to_lists`: bool `[B, H, Nq, Nk]`."""
    num_key_blocks = indices.shape[-1]
    kept = torch.arange(num_key_blocks, device=indices.device) < counts[..., None]
    position = torch.where(kept, indices.to(torch.int64), num_key_blocks)
    mask = torch.zeros(*indices.shape[:-1], num_key_blocks + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter(-1, position, True)[..., :num_key_blocks]
