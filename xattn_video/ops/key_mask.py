"""Which keys a query sees, and which blocks that makes valid or forced.

A query sees one contiguous range of keys, so everything here follows from two numbers for each query: its first
visible key and the end of its visible keys. All functions are pure torch, never read a value back to the host
and trace under `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


def num_blocks(length: int, block_size: int) -> int:
    """Blocks that cover `length` tokens, the last one possibly partial."""
    return -(-length // block_size)


# Not compared by value: its fields are tensors.
@dataclass(frozen=True, eq=False)
class KeyMask:
    """Which keys each query of an attention call sees.

    Attributes:
        causal: query i of batch item b sees keys up to `i + kv_lens[b] - Sq`.
        kv_start: int32 `[B]`, the first valid key of each batch item; None is 0.
        kv_lens: int32 `[B]`, the end of its valid keys; None is all keys.
    """

    causal: bool = False
    kv_start: Tensor | None = None
    kv_lens: Tensor | None = None

    @property
    def bounded(self) -> bool:
        """Whether some keys may be invalid."""
        return self.kv_start is not None or self.kv_lens is not None

    @property
    def keywords(self) -> dict[str, Any]:
        """The fields by name, for the functions of a backend: operators of torch take only tensors and numbers."""
        return {"causal": self.causal, "kv_start": self.kv_start, "kv_lens": self.kv_lens}

    def valid_range(self, kv_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """First valid key and end of the valid keys of each batch item, int64 `[B]` (`[1]` where all are valid)."""
        start = (
            torch.zeros(1, dtype=torch.int64, device=device) if self.kv_start is None else self.kv_start.to(torch.int64)
        )
        stop = torch.full_like(start, kv_len) if self.kv_lens is None else self.kv_lens.to(torch.int64)
        return start, stop

    def query_range(self, q_len: int, kv_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """First key and end of the keys that each query sees, int64 `[B or 1, Sq]`; end <= first: it sees none."""
        start, stop = self.valid_range(kv_len, device)
        first = start[:, None].expand(-1, q_len)
        if not self.causal:
            return first, stop[:, None].expand(-1, q_len)
        last = torch.arange(q_len, device=device)[None, :] + (stop - q_len)[:, None] + 1
        return first, torch.minimum(last, stop[:, None])

    def valid_keys(self, kv_len: int, device: torch.device) -> Tensor:
        """Which keys are valid for some query, bool `[B or 1, Sk]`."""
        start, stop = self.valid_range(kv_len, device)
        position = torch.arange(kv_len, device=device)
        return (position >= start[:, None]) & (position < stop[:, None])

    def visible(self, q_len: int, kv_len: int, device: torch.device) -> Tensor:
        """Which keys each query sees, bool `[B or 1, Sq, Sk]`."""
        first, end = self.query_range(q_len, kv_len, device)
        position = torch.arange(kv_len, device=device)
        return (position >= first[:, :, None]) & (position < end[:, :, None])

    def valid_blocks(self, batch: int, q_len: int, kv_len: int, *, block_size: int, device: torch.device) -> Tensor:
        """Blocks that hold at least one visible (query, key) pair.

        Args:
            batch, q_len, kv_len: sizes of the attention call.
            block_size: tokens per block.
            device: where the mask is made.

        Returns:
            bool `[B, 1, Nq, Nk]`.
        """
        return self._edges(batch, q_len, kv_len, block_size, None, device).valid()[:, None]

    def count_valid_blocks(
        self, batch: int, q_len: int, kv_len: int, *, block_size: int, device: torch.device
    ) -> Tensor:
        """The number of `valid_blocks` over the batch, int64 0-d, without the matrix of them."""
        edges = self._edges(batch, q_len, kv_len, block_size, None, device)
        blocks = (edges.end + block_size - 1) // block_size - edges.first // block_size
        return torch.where(edges.first < edges.end, blocks, 0).sum()

    def valid_and_forced_blocks(  # noqa: PLR0913 - sizes, and what a user may force
        self,
        batch: int,
        q_len: int,
        kv_len: int,
        *,
        block_size: int,
        dense_tokens: tuple[int, int] | None = None,
        dense_last: int = 0,
        anchors: int = 0,
        frame_tokens: int | None = None,
        rows: tuple[int, int] | None = None,
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """`valid_blocks`, and those of them that every selection keeps.

        Causal: the first valid block of the row, every block that overlaps the query block's own positions, and all
        valid blocks of the query blocks that hold one of the `dense_last` last queries. With
        `dense_tokens = (start, stop)`: every key block that touches the range, and all valid blocks of the query
        blocks that touch it. With `anchors` and one length of queries and keys (or causal): the blocks that overlap
        the query block's own positions, so many blocks on both sides, and with `frame_tokens` the blocks that overlap
        its positions moved by up to so many frames of that many tokens, either way.

        Args:
            rows: make only the masks of the query blocks `rows[0]` to `rows[1] - 1`; None makes those of all.

        Returns:
            bool `[B, 1, Nq, Nk]` twice, or `[B, 1, rows[1] - rows[0], Nk]`.
        """
        edges = self._edges(batch, q_len, kv_len, block_size, rows, device)
        first, key_begin, key_end = edges.first, edges.key_begin, edges.key_end
        valid = edges.valid()
        forced = torch.zeros_like(valid)
        if self.causal:
            holds_first = (key_begin <= first) & (first < key_end)
            own_begin, own_end = (
                (edge[None, :] + edges.offset[:, None])[:, :, None] for edge in (edges.query_begin, edges.query_end)
            )
            forced = holds_first | ((key_begin < own_end) & (key_end > own_begin))
            if dense_last:
                forced = forced | (edges.query_begin + block_size > q_len - dense_last)[:, None]
        if anchors and (self.causal or q_len == kv_len):
            for begin, end in edges.anchors(block_size, anchors, frame_tokens, causal=self.causal):
                forced = forced | ((key_begin < end) & (key_end > begin))
        if dense_tokens is not None and dense_tokens[0] < dense_tokens[1]:
            dense_start, dense_stop = dense_tokens
            key_dense = (key_begin < dense_stop) & (key_end > dense_start)
            query_dense = (edges.query_begin < dense_stop) & (edges.query_begin + block_size > dense_start)
            forced = forced | key_dense | query_dense[:, None]
        return valid[:, None], (forced & valid)[:, None]

    def without_last(self, later: int, kv_len: int) -> KeyMask:
        """The mask of the first `kv_len` keys, for a causal call that lost its last `later` queries and keys."""
        start = None if self.kv_start is None else self.kv_start.clamp(max=kv_len)
        lens = None if self.kv_lens is None else (self.kv_lens - later).clamp(min=0)
        return KeyMask(self.causal, start, lens)

    def _edges(
        self,
        batch: int,
        q_len: int,
        kv_len: int,
        block_size: int,
        rows: tuple[int, int] | None,
        device: torch.device,
    ) -> _Edges:
        start, stop = (bound.expand(batch) for bound in self.valid_range(kv_len, device))
        offset = stop - q_len
        begin_row, end_row = (0, num_blocks(q_len, block_size)) if rows is None else rows
        query_begin = torch.arange(begin_row, end_row, device=device) * block_size
        query_end = (query_begin + block_size).clamp(max=q_len)
        end = stop[:, None, None].expand(-1, end_row - begin_row, 1)
        if self.causal:
            end = torch.minimum(end, (query_end[None, :] + offset[:, None])[:, :, None])
        key_begin = torch.arange(num_blocks(kv_len, block_size), device=device) * block_size
        return _Edges(start[:, None, None], end, query_begin, query_end, key_begin, key_begin + block_size, offset)


# Every query sees every key.
ALL_KEYS = KeyMask()


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

    def anchors(
        self, block_size: int, count: int, frame_tokens: int | None, *, causal: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Ranges of keys `[B or 1, rows, 1]` that are near the query blocks, in the sequence and in the video."""
        shift = self.offset if causal else torch.zeros_like(self.offset[:1])
        begin, end = (
            (edge[None, :] + shift[:, None])[:, :, None] for edge in (self.query_begin, self.query_begin + block_size)
        )
        yield begin - count * block_size, end + count * block_size
        if frame_tokens is not None:
            for frames in range(1, count + 1):
                yield begin - frames * frame_tokens, end - frames * frame_tokens
                yield begin + frames * frame_tokens, end + frames * frame_tokens
