"""Attention on a CPU: for each query block, the kept keys are gathered and two matrix products do the rest.

Invalid keys are cut off the gathered ones rather than masked, so whatever stands in padding is never read; masks are
built only for causal blocks that overlap the query block's own positions. A row that keeps many blocks is done in
pieces, each with a softmax of its own, so that what a thread holds does not grow with the length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..key_mask import num_blocks
from .tensors import Geometry, fill, head_slabs, product
from .workers import Scratch, for_each

# Logits of one piece of a row: 4 MB in float32.
_PIECE_ELEMENTS = 1 << 20
# Which partly visible blocks a row keeps.
_KEEPS_STOP, _KEEPS_START, _KEEPS_OWN, _KEEPS_NEXT = 1, 2, 4, 8


def attend_item(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: tuple[Tensor, Tensor],
    output: Tensor,
    lse: Tensor,
    geometry: Geometry,
) -> None:
    """Fill output `[Hq, Sq, D]` and lse `[Hq, Sq]` of one batch item.

    Args:
        query: `[Hq, Sq, D]`; key and value: `[Hkv, Sk, D]`.
        lists: valid blocks in ascending order, int32 `[Hq, Nq, Nk]`, and their counts, int32 `[Hq, Nq]`.
    """
    group = query.shape[0] // key.shape[0]
    for slab in head_slabs(key.shape[0], 2 * key[0].numel() * lse.dtype.itemsize):
        kv = slice(slab.start, slab.stop)
        part = slice(slab.start * group, slab.stop * group)
        own = lists[0][part], lists[1][part]
        _attend_heads(query[part], key[kv], value[kv], own, output[part], lse[part], geometry)


class _Row(NamedTuple):
    """One query block of one head: the key blocks that it keeps, int32 `[n]`, and its `_KEEPS_` flags."""

    head: int
    block: int
    kept: Tensor
    flags: int


def _attend_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: tuple[Tensor, Tensor],
    output: Tensor,
    lse: Tensor,
    geometry: Geometry,
) -> None:
    """Fill output `[H, Sq, D]` and lse `[H, Sq]` for query `[H, Sq, D]`, key and value `[Hkv, Sk, D]`."""
    keys, values = _key_blocks(key, value, geometry.block_size, lse.dtype)
    group, key_blocks = query.shape[0] // key.shape[0], lists[0].shape[2]

    def attend(row: _Row, scratch: Scratch) -> None:
        begin = row.block * geometry.block_size
        tokens = slice(begin, begin + geometry.block_size)
        # Numbered over all key heads.
        numbered = row._replace(kept=row.kept + row.head // group * key_blocks)
        targets = output[row.head, tokens], lse[row.head, tokens]
        _attend_row(query[row.head], keys, values, targets, numbered, geometry, scratch)

    for_each(attend, _rows(*lists, geometry))


def _attend_row(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    targets: tuple[Tensor, Tensor],
    row: _Row,
    geometry: Geometry,
    scratch: Scratch,
) -> None:
    """Fill `targets`, output `[n, D]` and lse `[n]` of one query block; `n` is P, or less for the last one.

    keys and values are rows of whole blocks, of which the row keeps those numbered `row.kept`.
    """
    (output, lse), kept = targets, row.kept
    size, count = geometry.block_size, kept.shape[0]
    if count == 0:
        output.zero_()
        lse.fill_(-torch.inf)
        return
    queries = scratch.take("queries", (size, query.shape[1]), lse.dtype)
    fill(queries, query, row.block * size, 0, geometry.q_len).mul_(geometry.scale)
    # The first piece is the short one: the two blocks that overlap the query's own positions belong to one piece.
    step = max(_PIECE_ELEMENTS // size**2, 2)
    end = (count - 1) % step + 1
    flags = row.flags if end == count else row.flags & _KEEPS_START
    part, total = _attend_piece(queries, keys, values, kept[:end], flags, geometry, scratch)
    for begin in range(end, count, step):
        flags = row.flags & ~_KEEPS_START if begin + step == count else 0
        piece = kept[begin : begin + step]
        more, more_total = _attend_piece(queries, keys, values, piece, flags, geometry, scratch)
        both = torch.logaddexp(total, more_total)
        # A query that saw no key in either piece keeps an output of 0.
        shift = both.masked_fill(both.isneginf(), 0)
        part.mul_((total - shift).exp_()[:, None]).add_(more.mul_((more_total - shift).exp_()[:, None]))
        total = both
    output.copy_(part[: output.shape[0]])
    lse.copy_(total[: lse.shape[0]])


def _attend_piece(
    queries: Tensor, keys: Tensor, values: Tensor, kept: Tensor, flags: int, geometry: Geometry, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Output `[P, D]` and log-sum-exp `[P]` of scaled queries `[P, D]` over the blocks `kept`.

    `flags` are the `_KEEPS_` flags of these blocks.
    """
    size, dtype, head_dim, count = geometry.block_size, queries.dtype, queries.shape[1], kept.shape[0]
    # Where the gathered keys begin and end to be valid.
    begin = geometry.start % size if flags & _KEEPS_START else 0
    end = count * size + (geometry.stop % size - size if flags & _KEEPS_STOP else 0)
    valid = slice(begin, end)
    shape = (count, keys.shape[1])
    chosen = torch.index_select(keys, 0, kept, out=scratch.take("keys", shape, dtype))
    logits = product(queries, chosen.view(-1, head_dim)[valid])
    _hide_later_keys(logits, valid, count, flags, geometry)
    top = logits.amax(-1)
    prob = torch.softmax(logits, dim=-1, out=scratch.take("prob", logits.shape, dtype))
    # The largest probability is exp(0) over the sum.
    total = torch.sub(top, prob.amax(-1).log_())
    if flags & (_KEEPS_OWN | _KEEPS_NEXT):
        # A query that sees none of these keys.
        blind = top.isneginf()
        prob[blind], total[blind] = 0, -torch.inf
    chosen = torch.index_select(values, 0, kept, out=scratch.take("values", shape, dtype))
    return product(prob, chosen.view(-1, head_dim)[valid].t()), total


def _key_blocks(key: Tensor, value: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both `[H, N, D]` as rows of whole blocks, `[H * ceil(N/P), P * D]`, zeros after the last token."""
    heads, length, head_dim = key.shape
    if key.dtype == dtype and length % size == 0 and key.is_contiguous() and value.is_contiguous():
        return key.view(-1, size * head_dim), value.view(-1, size * head_dim)
    copies = torch.empty(2, heads, num_blocks(length, size) * size, head_dim, dtype=dtype)

    def copy(task: tuple[int, int], _: Scratch) -> None:
        which, head = task
        fill(copies[which, head], (key, value)[which][head], 0, 0, length)

    for_each(copy, [(which, head) for which in range(2) for head in range(heads)])
    keys, values = copies.view(2, -1, size * head_dim)
    return keys, values


def _rows(indices: Tensor, counts: Tensor, geometry: Geometry) -> list[_Row]:
    """The rows of lists `[H, Nq, Nk]`, those that keep most first."""
    query_blocks = indices.shape[1]
    flags, lists = _row_flags(indices, counts, geometry).tolist(), indices.flatten(0, 1)
    order, lengths = counts.flatten().argsort(descending=True).tolist(), counts.flatten().tolist()
    return [_Row(i // query_blocks, i % query_blocks, lists[i, : lengths[i]], flags[i]) for i in order]


def _row_flags(indices: Tensor, counts: Tensor, geometry: Geometry) -> Tensor:
    """Which partly visible blocks the rows of lists `[H, Nq, Nk]` keep, `[H * Nq]`.

    They stand at the ends of a row: the first valid block, and the last one or two.
    """
    size = geometry.block_size

    def holds(place: Tensor, block: int | Tensor) -> Tensor:
        entry = indices.gather(-1, place.clamp(min=0).to(torch.int64)[..., None])[..., 0]
        return (place >= 0) & (counts > 0) & (entry == block)

    first, last = torch.zeros_like(counts), counts - 1
    flags = torch.zeros(counts.shape, dtype=torch.int64)
    if geometry.stop % size:
        flags += holds(last, geometry.stop // size) * _KEEPS_STOP
    if geometry.start % size:
        flags += holds(first, geometry.start // size) * _KEEPS_START
    if geometry.offset is not None:
        own = torch.arange(indices.shape[1]) + geometry.offset // size
        flags += (holds(last, own) | holds(last - 1, own)) * _KEEPS_OWN
        flags += holds(last, own + 1) * _KEEPS_NEXT
    return flags.flatten()


def _hide_later_keys(logits: Tensor, keys: slice, count: int, flags: int, geometry: Geometry) -> None:
    """Set to -inf what a causal query block does not see of its last kept blocks; logits are of gathered `keys`."""
    if geometry.offset is None:
        return
    size = geometry.block_size
    # Query i of the block sees its own key block up to key `i + offset % size`; the next one begins at key `size`.
    seen = torch.arange(size)[:, None] + geometry.offset % size
    last = count - 1
    for flag, shift in ((_KEEPS_NEXT, size), (_KEEPS_OWN, 0)):
        if flags & flag:
            left, right = max(last * size, keys.start), min((last + 1) * size, keys.stop)
            later = torch.arange(left, right) - last * size + shift > seen
            logits[:, left - keys.start : right - keys.start].masked_fill_(later, -torch.inf)
            last -= 1
