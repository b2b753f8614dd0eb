"""Long calls in chunks of query blocks: what a call holds beside its inputs and its output stays under a bound.

Scores, lists and masks have an entry for every pair of a query block and a key block, so they grow with the square of
the length. The rows of query blocks are independent of each other: a few at a time give the same result.

What a backend needs beside them grows with the length itself and is not counted here:

* Triton: the scratch of the scoring kernel, 4.5 bytes for each key block, row of a strip and multiprocessor. With 128
  rows and 132 multiprocessors that is 71 MB at 119,056 tokens and 620 MB at 1,048,576. It is free again before the
  lists are made: as long as it is below half of the default bound (up to 226,000 tokens) it adds nothing to the peak.
* CPU: copies in float32 of one head's keys and values, unless they are float32, contiguous and whole blocks; and
  buffers of about 10 to 25 MB for each thread, whatever the length.
* `reference`, and `flex` on a CPU: every logit of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .key_mask import KeyMask, num_blocks

# Bytes for each pair of blocks and each batch item: which are valid and which are forced.
_MASK_BYTES = 2


def rows_per_chunk(query: Tensor, kv_len: int, *, block_size: int, pair_bytes: int, max_bytes: int) -> int:
    """Query blocks that one chunk of a call takes: all of them where the whole call stays under the bound.

    Args:
        query: `[B, Hq, Sq, D]`; only its sizes and its dtype are read.
        kv_len: key length Sk.
        block_size: tokens per block.
        pair_bytes: bytes that are held for each pair of blocks and each head.
        max_bytes: the bound.

    Returns:
        at least 1, even where one row is larger than the bound; chunks of a call are about equal.
    """
    batch, heads, q_len, head_dim = query.shape
    rows, columns = num_blocks(q_len, block_size), num_blocks(kv_len, block_size)
    row_bytes = batch * columns * (heads * pair_bytes + _MASK_BYTES)
    if rows * row_bytes <= max_bytes:
        return rows
    # A chunk's output is held until it is copied to its place, and so are its log-sum-exps.
    row_bytes += batch * heads * block_size * (head_dim * query.element_size() + 4)
    chunks = num_blocks(rows, max(max_bytes // row_bytes, 1))
    return num_blocks(rows, chunks)


class Part(NamedTuple):
    """A range of query tokens of a call with the keys that they may see: an attention call of its own.

    Attributes:
        query: `[B, Hq, n, D]`.
        key, value: `[B, Hkv, m, D]`.
        mask: which of those m keys each query sees.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: KeyMask

    def cut(self, begin: int, end: int) -> Part | None:
        """The query tokens `[begin, end)` as a call, or None where they can see no key.

        In a causal call the last query sees the last valid key. So that this holds for the part too, its keys end as
        many tokens earlier as its queries do.
        """
        query, key, value, mask = self
        later = query.shape[2] - end
        query = query[:, :, begin:end]
        if not mask.causal or later == 0:
            return self._replace(query=query)
        keys = key.shape[2] - later
        if keys <= 0:
            return None
        return Part(query, key[:, :, :keys], value[:, :, :keys], mask.without_last(later, keys))
