"""The fast CPU path: matrix products over strips of query groups, then over each query block's gathered keys.

Both stages compute in float32 (float64 for float64 inputs) whatever the input dtype: a product of bfloat16 tensors
rounds its result to bfloat16, and such scores choose worse blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..blocks import key_range, num_blocks, valid_blocks
from .cpu_workers import Scratch, for_each

# Logits of one strip of query groups: small enough to stay in a core's second-level cache.
_STRIP_ELEMENTS = 1 << 18
# Strips below this many rows leave the matrix product idle.
_MIN_STRIP_ROWS = 128
# Float32 copies of keys and values that are alive at once (at least one head's).
_COPY_BYTES = 256 << 20

# Which partly visible blocks a row keeps.
_KEEPS_STOP, _KEEPS_START, _KEEPS_OWN, _KEEPS_NEXT = 1, 2, 4, 8


def antidiagonal_scores(
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
    """Mass of each block, as `reference.antidiagonal_scores`: `[B, Hq, Nq, Nk]`, float32 (float64 for float64)."""
    return _cpu_scores(query, key, stride, block_size, causal, scale, kv_start, kv_lens)


def block_sparse_forward(
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
    """Attention over the kept blocks, as `reference.block_sparse_forward`: output and natural log-sum-exp.

    Keys and values outside the valid range are never read, so NaN there reaches nothing.
    """
    return _cpu_attend(query, key, value, block_mask, block_size, causal, scale, kv_start, kv_lens)


class _Geometry(NamedTuple):
    """What one batch item sees: keys `[start, stop)`, and if causal query i those up to `i + offset`."""

    block_size: int
    q_len: int
    start: int
    stop: int
    offset: int | None
    scale: float


def _geometries(
    query: Tensor,
    key: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    kv_start: Tensor | None,
    kv_lens: Tensor | None,
) -> list[_Geometry]:
    """One a batch item."""
    batch, q_len, kv_len = query.shape[0], query.shape[2], key.shape[2]
    starts, stops = (part.expand(batch).tolist() for part in key_range(kv_len, kv_start, kv_lens, query.device))
    return [
        _Geometry(block_size, q_len, start, stop, stop - q_len if causal else None, scale)
        for start, stop in zip(starts, stops, strict=True)
    ]


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.T` for `[M, K]` and `[N, K]`."""
    # oneDNN uses the widest vectors of every x86 CPU, torch.mm's library only those of Intel's.
    if left.dtype == torch.float32 and _has_onednn():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
        return product
    return left @ right.t()


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _head_slabs(kv_heads: int, bytes_per_head: int) -> Iterator[range]:
    """Key heads whose copies are made together."""
    step = max(1, _COPY_BYTES // bytes_per_head)
    for begin in range(0, kv_heads, step):
        yield range(begin, min(begin + step, kv_heads))


def _fill(target: Tensor, tokens: Tensor, begin: int, start: int, stop: int) -> Tensor:
    """Copy tokens `begin, begin + 1, ...` of `[N, D]` to target `[n, D]`, zeros for those outside `[start, stop)`."""
    first = min(max(start - begin, 0), target.shape[0])
    last = max(min(stop - begin, target.shape[0]), first)
    target[first:last].copy_(tokens[begin + first : begin + last])
    if first > 0:
        target[:first].zero_()
    if last < target.shape[0]:
        target[last:].zero_()
    return target


# --- scores -------------------------------------------------------------------------------------------------


@torch.library.custom_op("xattn_video::cpu_scores", mutates_args=(), device_types="cpu")
def _cpu_scores(
    query: Tensor,
    key: Tensor,
    stride: int,
    block_size: int,
    causal: bool,
    scale: float,
    kv_start: Tensor | None,
    kv_lens: Tensor | None,
) -> Tensor:
    heads, head_dim = query.shape[1], query.shape[3]
    kv_heads, kv_len = key.shape[1:3]
    dtype = _compute_dtype(query)
    shape = (*query.shape[:2], num_blocks(query.shape[2], block_size), num_blocks(kv_len, block_size))
    scores = torch.zeros(shape, dtype=dtype)
    for item, geometry in enumerate(_geometries(query, key, block_size, causal, scale, kv_start, kv_lens)):
        if geometry.start >= geometry.stop:
            continue
        for slab in _head_slabs(kv_heads, kv_len * head_dim * dtype.itemsize):
            key_groups: dict[int, Tensor] = {}

            def group_keys(kv_head: int, _: Scratch, item=item, geometry=geometry, out=key_groups) -> None:
                out[kv_head] = _key_groups(key[item, kv_head], geometry, stride, dtype)

            def score(
                task: tuple[int, slice], scratch: Scratch, item=item, geometry=geometry, groups=key_groups
            ) -> None:
                head, rows = task
                keys = groups[head * kv_heads // heads]
                _score_strip(query[item, head], keys, scores[item, head], rows, geometry, stride, scratch)

            for_each(group_keys, slab)
            strips = _strips(geometry, stride, next(iter(key_groups.values())).shape[0])
            query_heads = range(slab.start * heads // kv_heads, slab.stop * heads // kv_heads)
            for_each(score, [(head, rows) for rows in strips for head in query_heads])
    return scores


@_cpu_scores.register_fake
def _(
    query: Tensor,
    key: Tensor,
    stride: int,
    block_size: int,
    causal: bool,
    scale: float,
    kv_start: Tensor | None,
    kv_lens: Tensor | None,
) -> Tensor:
    shape = (*query.shape[:2], num_blocks(query.shape[2], block_size), num_blocks(key.shape[2], block_size))
    return query.new_empty(shape, dtype=_compute_dtype(query))


def _first_query(geometry: _Geometry) -> int:
    """The first query that sees a key."""
    return 0 if geometry.offset is None else max(0, geometry.start - geometry.offset)


def _key_groups(key: Tensor, geometry: _Geometry, stride: int, dtype: torch.dtype) -> Tensor:
    """Scaled groups of reversed keys, `[C, S * D]`, from the one with the first valid key to that with the last.

    Reversing keys instead of queries makes the copy once for all heads that share them.
    """
    first, end = geometry.start // stride, num_blocks(geometry.stop, stride)
    keys = torch.empty((end - first) * stride, key.shape[1], dtype=dtype)
    _fill(keys, key, first * stride, geometry.start, geometry.stop)
    return keys.unflatten(0, (-1, stride)).flip(1).flatten(1).mul_(geometry.scale / stride)


def _strips(geometry: _Geometry, stride: int, columns: int) -> list[slice]:
    """Whole query blocks cut into ranges of query groups, those that see most first."""
    ratio = geometry.block_size // stride
    size = max(_STRIP_ELEMENTS // columns, _MIN_STRIP_ROWS, ratio) // ratio * ratio
    begin = _first_query(geometry) // geometry.block_size * ratio
    end = num_blocks(geometry.q_len, geometry.block_size) * ratio
    return [slice(row, min(row + size, end)) for row in range(begin, end, size)][::-1]


def _score_strip(
    query: Tensor,
    key_groups: Tensor,
    scores: Tensor,
    rows: slice,
    geometry: _Geometry,
    stride: int,
    scratch: Scratch,
) -> None:
    """Write the scores `[Nq, Nk]` of the query groups `rows` of one head."""
    dtype, ratio = scores.dtype, geometry.block_size // stride
    count, first_group = rows.stop - rows.start, geometry.start // stride
    queries = scratch.take("queries", (count * stride, query.shape[1]), dtype)
    _fill(queries, query, rows.start * stride, _first_query(geometry), geometry.q_len)

    width = key_groups.shape[0]
    if geometry.offset is not None:
        width = min(width, (geometry.offset + rows.stop * stride - 1) // stride + 1 - first_group)
    logits = _product(queries.view(count, -1), key_groups[:width])
    if geometry.offset is not None:
        _hide_later_groups(logits, (geometry.offset + rows.start * stride + stride - 1) // stride - first_group)
    prob = torch.softmax(logits, dim=-1, out=scratch.take("prob", (count, width), dtype))
    # Groups without a query that sees a key give no mass.
    prob[: max(_first_query(geometry) // stride - rows.start, 0)] = 0
    prob[max(num_blocks(geometry.q_len, stride) - rows.start, 0) :] = 0

    # Rows first: that sum reads whole cache lines.
    mass = prob.unflatten(0, (-1, ratio)).sum(1)
    lead = first_group % ratio
    mass = pad(mass, (lead, -(lead + width) % ratio)).unflatten(1, (-1, ratio)).sum(2)
    block = first_group // ratio
    scores[rows.start // ratio : rows.stop // ratio, block : block + mass.shape[1]] = mass


def _hide_later_groups(logits: Tensor, last: int) -> None:
    """Set to -inf what row r, which sees columns up to `last + r`, does not see."""
    clear = max(last + 1, 0)
    if clear < logits.shape[1]:
        seen = torch.arange(logits.shape[0])[:, None] + last
        later = torch.arange(clear, logits.shape[1])[None, :] > seen
        logits[:, clear:].masked_fill_(later, -torch.inf)


# --- attention ----------------------------------------------------------------------------------------------


@torch.library.custom_op("xattn_video::cpu_attend", mutates_args=(), device_types="cpu")
def _cpu_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    kv_start: Tensor | None,
    kv_lens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    dtype = _compute_dtype(query)
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
    # Padded to whole blocks, so that each block is written where it belongs.
    padded = num_blocks(q_len, block_size) * block_size
    output = torch.empty(batch, heads, padded, head_dim, dtype=query.dtype)
    lse = torch.empty(batch, heads, padded, dtype=dtype)
    for item, geometry in enumerate(_geometries(query, key, block_size, causal, scale, kv_start, kv_lens)):
        for slab in _head_slabs(kv_heads, 2 * kv_len * head_dim * dtype.itemsize):
            part = slice(slab.start * heads // kv_heads, slab.stop * heads // kv_heads)
            kv = slice(slab.start, slab.stop)
            _attend_heads(
                query[item, part],
                key[item, kv],
                value[item, kv],
                block_mask[item, part],
                output[item, part],
                lse[item, part],
                geometry,
            )
    return output[:, :, :q_len].contiguous(), lse[:, :, :q_len].contiguous()


@_cpu_attend.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    kv_start: Tensor | None,
    kv_lens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return output, query.new_empty(query.shape[:3], dtype=_compute_dtype(query))


class _Row(NamedTuple):
    """One query block of one head: which key blocks it keeps (numbered over all key heads), and its `_KEEPS_` flags."""

    head: int
    block: int
    kept: Tensor
    flags: int


def _attend_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    output: Tensor,
    lse: Tensor,
    geometry: _Geometry,
) -> None:
    """Fill output `[H, Nq * P, D]` and lse `[H, Nq * P]` for query `[H, Sq, D]`, key and value `[Hkv, Sk, D]`."""
    keys, values = _key_blocks(key, value, geometry.block_size, lse.dtype)

    def attend(row: _Row, scratch: Scratch) -> None:
        begin = row.block * geometry.block_size
        tokens = slice(begin, begin + geometry.block_size)
        _attend_row(
            query[row.head], keys, values, output[row.head, tokens], lse[row.head, tokens], row, geometry, scratch
        )

    for_each(attend, _rows(block_mask, key.shape[0], geometry))


def _attend_row(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    lse: Tensor,
    row: _Row,
    geometry: _Geometry,
    scratch: Scratch,
) -> None:
    """Fill output `[P, D]` and lse `[P]` of one query block."""
    size, dtype, head_dim, count = geometry.block_size, lse.dtype, query.shape[1], row.kept.shape[0]
    if count == 0:
        output.zero_()
        lse.fill_(-torch.inf)
        return
    queries = scratch.take("queries", (size, head_dim), dtype)
    _fill(queries, query, row.block * size, 0, geometry.q_len).mul_(geometry.scale)
    # Where the gathered keys begin and end to be valid.
    begin = geometry.start % size if row.flags & _KEEPS_START else 0
    end = count * size + (geometry.stop % size - size if row.flags & _KEEPS_STOP else 0)
    valid = slice(begin, end)
    shape = (count, keys.shape[1])
    chosen = torch.index_select(keys, 0, row.kept, out=scratch.take("keys", shape, dtype))
    logits = _product(queries, chosen.view(-1, head_dim)[valid])
    _hide_later_keys(logits, valid, count, row.flags, geometry)
    top = logits.amax(-1)
    prob = torch.softmax(logits, dim=-1, out=scratch.take("prob", logits.shape, dtype))
    # The largest probability is exp(0) over the sum.
    torch.sub(top, prob.amax(-1).log_(), out=lse)
    if row.flags & (_KEEPS_OWN | _KEEPS_NEXT):
        # A query that sees none of the kept keys.
        blind = top.isneginf()
        prob[blind], lse[blind] = 0, -torch.inf
    chosen = torch.index_select(values, 0, row.kept, out=scratch.take("values", shape, dtype))
    output.copy_(_product(prob, chosen.view(-1, head_dim)[valid].t()))


def _key_blocks(key: Tensor, value: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both `[H, N, D]` as rows of whole blocks, `[H * ceil(N/P), P * D]`, zeros after the last token."""
    heads, length, head_dim = key.shape
    if key.dtype == dtype and length % size == 0 and key.is_contiguous() and value.is_contiguous():
        return key.view(-1, size * head_dim), value.view(-1, size * head_dim)
    copies = torch.empty(2, heads, num_blocks(length, size) * size, head_dim, dtype=dtype)

    def copy(task: tuple[int, int], _: Scratch) -> None:
        which, head = task
        _fill(copies[which, head], (key, value)[which][head], 0, 0, length)

    for_each(copy, [(which, head) for which in range(2) for head in range(heads)])
    keys, values = copies.view(2, -1, size * head_dim)
    return keys, values


def _rows(block_mask: Tensor, kv_heads: int, geometry: _Geometry) -> list[_Row]:
    """The rows of `[H, Nq, Nk]`, those that keep most first."""
    heads, query_blocks, key_blocks = block_mask.shape
    counts = block_mask.sum(-1).flatten()
    row, block = block_mask.flatten(0, 1).nonzero(as_tuple=True)
    block += row // (heads // kv_heads * query_blocks) * key_blocks
    kept, flags = block.split(counts.tolist()), _row_flags(block_mask, geometry).tolist()
    order = counts.argsort(descending=True).tolist()
    return [_Row(*divmod(index, query_blocks), kept[index], flags[index]) for index in order]


def _row_flags(block_mask: Tensor, geometry: _Geometry) -> Tensor:
    """Which partly visible blocks the rows of `[H, Nq, Nk]` keep, `[H * Nq]`."""
    size, key_blocks = geometry.block_size, block_mask.shape[2]
    flags = torch.zeros(block_mask.shape[:2], dtype=torch.int64)
    if geometry.stop % size:
        flags += block_mask[:, :, geometry.stop // size] * _KEEPS_STOP
    if geometry.start % size:
        flags += block_mask[:, :, geometry.start // size] * _KEEPS_START
    if geometry.offset is not None:
        row = torch.arange(block_mask.shape[1])
        for shift, flag in ((0, _KEEPS_OWN), (1, _KEEPS_NEXT)):
            own = row + geometry.offset // size + shift
            exists = (own >= 0) & (own < key_blocks)
            flags += (block_mask[:, row, own.clamp(0, key_blocks - 1)] & exists) * flag
    return flags.flatten()


def _hide_later_keys(logits: Tensor, keys: slice, count: int, flags: int, geometry: _Geometry) -> None:
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
