"""Attention on a CPU: the kept keys of each query block are gathered, and torch's own fused attention takes them.

Two matrix products and a softmax take its place where `is_fused` says so.

Invalid keys are cut off the gathered ones rather than masked, so whatever stands in padding is never read; masks are
built only for causal blocks that overlap the query block's own positions. A row that keeps many blocks is done in
pieces, each with a softmax of its own, so that what a thread holds does not grow with the length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..key_mask import num_blocks
from .tensors import Geometry, fill, head_slabs, is_fused, product
from .workers import Scratch, for_each

# Logits of one piece of a row. Where they are held, they take 4 MB in float32.
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
    size, group = geometry.block_size, query.shape[0] // key.shape[0]
    dtype = query.dtype if is_fused(query.dtype, geometry) else lse.dtype
    keys, values = _key_blocks(key, size, dtype), _key_blocks(value, size, dtype)

    def attend(row: _Row, scratch: Scratch) -> None:
        tokens, kv_head = slice(row.block * size, (row.block + 1) * size), row.head // group
        targets = output[row.head, tokens], lse[row.head, tokens]
        _attend_row(query[row.head, tokens], keys[kv_head], values[kv_head], targets, row, geometry, scratch)

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
    """Fill `targets`, output `[n, D]` and lse `[n]`, for the queries `[n, D]` of one block; `n` is at most P.

    keys and values are rows of whole blocks, `[ceil(N/P), P * D]`.
    """
    (output, lse), kept = targets, row.kept
    count = kept.shape[0]
    if count == 0:
        output.zero_()
        lse.fill_(-torch.inf)
        return
    # The first piece is the short one: the two blocks that overlap the query's own positions belong to one piece.
    step = max(_PIECE_ELEMENTS // geometry.block_size**2, 2)
    end = (count - 1) % step + 1
    flags = row.flags if end == count else row.flags & _KEEPS_START
    part, total = _attend_piece(query, keys, values, kept[:end], flags, geometry, scratch)
    for begin in range(end, count, step):
        flags = row.flags & ~_KEEPS_START if begin + step == count else 0
        piece = kept[begin : begin + step]
        more, more_total = _attend_piece(query, keys, values, piece, flags, geometry, scratch)
        both = torch.logaddexp(total, more_total)
        # A query that saw no key in either piece keeps an output of 0.
        shift = both.masked_fill(both.isneginf(), 0)
        part = part * (total - shift).exp_()[:, None] + more * (more_total - shift).exp_()[:, None]
        total = both
    output.copy_(part)
    lse.copy_(total)


def _attend_piece(
    query: Tensor, keys: Tensor, values: Tensor, kept: Tensor, flags: int, geometry: Geometry, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Output `[n, D]` and log-sum-exp `[n]` of queries `[n, D]` over the blocks `kept`.

    `flags` are the `_KEEPS_` flags of these blocks.
    """
    size, head_dim, count = geometry.block_size, query.shape[1], kept.shape[0]
    # Where the gathered keys begin and end to be valid.
    begin = geometry.start % size if flags & _KEEPS_START else 0
    end = count * size + (geometry.stop % size - size if flags & _KEEPS_STOP else 0)
    valid = slice(begin, end)

    def gathered(name: str, blocks: Tensor) -> Tensor:
        chosen = scratch.take(name, (count, size * head_dim), blocks.dtype)
        return torch.index_select(blocks, 0, kept, out=chosen).view(-1, head_dim)[valid]

    key, value = gathered("keys", keys), gathered("values", values)
    if is_fused(query.dtype, geometry):
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[None, None], key[None, None], value[None, None], scale=geometry.scale
        )
        return output[0, 0], lse[0, 0]
    scaled = scratch.take("queries", query.shape, key.dtype).copy_(query).mul_(geometry.scale)
    logits = product(scaled, key)
    _hide_later_keys(logits, valid, count, flags, geometry)
    top = logits.amax(-1)
    prob = torch.softmax(logits, dim=-1, out=scratch.take("prob", logits.shape, key.dtype))
    # The largest probability is exp(0) over the sum.
    total = torch.sub(top, prob.amax(-1).log_())
    if flags & (_KEEPS_OWN | _KEEPS_NEXT):
        # A query that sees none of these keys.
        blind = top.isneginf()
        prob[blind], total[blind] = 0, -torch.inf
    return product(prob, value.t()), total


def _key_blocks(tokens: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """`[H, N, D]` as rows of whole blocks, `[H, ceil(N/P), P * D]`, zeros after the last token."""
    heads, length, head_dim = tokens.shape
    if tokens.dtype == dtype and length % size == 0 and tokens.is_contiguous():
        return tokens.view(heads, -1, size * head_dim)
    copies = torch.empty(heads, num_blocks(length, size) * size, head_dim, dtype=dtype)

    def copy(head: int, _: Scratch) -> None:
        fill(copies[head], tokens[head], 0, 0, length)

    for_each(copy, range(heads))
    return copies.view(heads, -1, size * head_dim)


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
    seen = torch.arange(logits.shape[0])[:, None] + geometry.offset % size
    last = count - 1
    for flag, shift in ((_KEEPS_NEXT, size), (_KEEPS_OWN, 0)):
        if flags & flag:
            left, right = max(last * size, keys.start), min((last + 1) * size, keys.stop)
            later = torch.arange(left, right) - last * size + shift > seen
            logits[:, left - keys.start : right - keys.start].masked_fill_(later, -torch.inf)
            last -= 1
