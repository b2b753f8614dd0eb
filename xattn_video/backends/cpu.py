"""The fast CPU path: strips of group logits for the scores, gathered blocks and flash attention for the rest.

Both stages compute in float32 (float64 for float64 inputs) whatever the input dtype: on CPUs the low-precision
flash kernel is not faster, and scores that round to bfloat16 choose worse blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
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
# Gathered key and value blocks of one attention call: larger batches fall out of the cache.
_GATHER_BYTES = 2 << 20
# Float32 copies of keys and values that are alive at once (at least one head's).
_COPY_BYTES = 256 << 20

# Which partly visible blocks a row keeps; rows of one pattern and count share one attention call.
_KEEPS_STOP, _KEEPS_START, _KEEPS_OWN, _KEEPS_NEXT = 1, 2, 4, 8
_PATTERNS = 16


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


def _head_slabs(kv_heads: int, bytes_per_head: int) -> Iterator[range]:
    """Key heads whose copies are made together."""
    step = max(1, _COPY_BYTES // bytes_per_head)
    for begin in range(0, kv_heads, step):
        yield range(begin, min(begin + step, kv_heads))


def _fill(target: Tensor, tokens: Tensor, begin: int, start: int, stop: int) -> Tensor:
    """Copy tokens `begin, begin + 1, ...` of `[N, D]` to target `[n, D]`, zeros for those outside `[start, stop)`."""
    first = min(max(start - begin, 0), target.shape[0])
    last = max(min(stop - begin, target.shape[0]), first)
    target[:first].zero_()
    target[first:last].copy_(tokens[begin + first : begin + last])
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
    logits = scratch.take("logits", (count, width), dtype)
    torch.mm(queries.view(count, -1), key_groups[:width].t(), out=logits)
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
    output = torch.zeros(batch, heads, padded, head_dim, dtype=query.dtype)
    lse = torch.full((batch, heads, padded), -torch.inf, dtype=dtype)
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


class _Rows(NamedTuple):
    """Rows (query blocks of a head) of one pattern that one attention call computes.

    `rows` are their numbers, `blocks` their kept key blocks one row after the other; `keys` cuts invalid keys off
    both ends of the gathered ones.
    """

    rows: list[int]
    blocks: Tensor
    keys: slice
    mask: Tensor | None


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
    size, dtype, head_dim = geometry.block_size, lse.dtype, query.shape[2]
    row_blocks = output.shape[1] // size
    keys, values = _key_blocks(key, value, size, dtype)
    output_rows, lse_rows = output.view(-1, size, head_dim), lse.view(-1, size)

    def attend(batch: _Rows, scratch: Scratch) -> None:
        rows = len(batch.rows)
        queries = scratch.take("queries", (rows, 1, size, head_dim), dtype)
        for row, target in zip(batch.rows, queries, strict=True):
            head, block = divmod(row, row_blocks)
            _fill(target[0], query[head], block * size, 0, geometry.q_len)
        gathered = [
            torch.index_select(
                source, 0, batch.blocks, out=scratch.take(name, (batch.blocks.shape[0], source.shape[1]), dtype)
            ).view(rows, 1, -1, head_dim)[:, :, batch.keys]
            for name, source in (("keys", keys), ("values", values))
        ]
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, *gathered, attn_mask=batch.mask, scale=geometry.scale
        )
        if batch.mask is not None:
            # The kernel leaves 0 as the log-sum-exp of a query that sees nothing.
            blind = batch.mask.isneginf().all(-1)
            part[:, 0, blind], part_lse[:, 0, blind] = 0, -torch.inf
        for index, row in enumerate(batch.rows):
            output_rows[row].copy_(part[index, 0])
            lse_rows[row].copy_(part_lse[index, 0])

    for_each(attend, _batches(block_mask, key.shape[0], geometry, 2 * keys.shape[1] * dtype.itemsize, dtype))


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


def _batches(
    block_mask: Tensor, kv_heads: int, geometry: _Geometry, block_bytes: int, dtype: torch.dtype
) -> list[_Rows]:
    """Cut the rows of `[H, Nq, Nk]` into attention calls of one pattern each, long rows first."""
    size, key_blocks = geometry.block_size, block_mask.shape[2]
    # Sorted by pattern, rows of equal pattern are neighbours, and so are their kept blocks.
    patterns, order = _row_patterns(block_mask, geometry).sort(descending=True, stable=True)
    row, block = block_mask.flatten(0, 1)[order].nonzero(as_tuple=True)
    block = block + (order // (order.shape[0] // kv_heads) * key_blocks)[row]
    numbers = order.tolist()
    batches = []
    row_begin = block_begin = 0
    for pattern, rows in zip(*(part.tolist() for part in patterns.unique_consecutive(return_counts=True)), strict=True):
        count, flags = divmod(pattern, _PATTERNS)
        if count == 0:
            break
        begin = geometry.start % size if flags & _KEEPS_START else 0
        end = count * size + (geometry.stop % size - size if flags & _KEEPS_STOP else 0)
        mask = _own_mask(count, flags, geometry, dtype)
        step = max(_GATHER_BYTES // (count * block_bytes), 1)
        for done in range(0, rows, step):
            taken = min(step, rows - done)
            batches.append(
                _Rows(
                    numbers[row_begin : row_begin + taken],
                    block[block_begin : block_begin + taken * count],
                    slice(begin, end),
                    None if mask is None else mask[:, begin:end],
                )
            )
            row_begin += taken
            block_begin += taken * count
    return batches


def _row_patterns(block_mask: Tensor, geometry: _Geometry) -> Tensor:
    """How many blocks each row keeps and which partly visible ones: `[H, Nq, Nk]` -> count * 16 + flags, `[H * Nq]`."""
    size = geometry.block_size
    pattern = block_mask.sum(-1) * _PATTERNS
    if geometry.stop % size:
        pattern += block_mask[:, :, geometry.stop // size] * _KEEPS_STOP
    if geometry.start % size:
        pattern += block_mask[:, :, geometry.start // size] * _KEEPS_START
    if geometry.offset is not None:
        row = torch.arange(block_mask.shape[1])
        for shift, flag in ((0, _KEEPS_OWN), (1, _KEEPS_NEXT)):
            own = row + geometry.offset // size + shift
            exists = (own >= 0) & (own < block_mask.shape[2])
            keeps = block_mask[:, row, own.clamp(0, block_mask.shape[2] - 1)] & exists
            pattern += keeps * flag
    return pattern.flatten()


def _own_mask(count: int, flags: int, geometry: _Geometry, dtype: torch.dtype) -> Tensor | None:
    """Additive causal mask `[P, count * P]` for rows whose last blocks overlap their own positions, or None."""
    if geometry.offset is None or not flags & (_KEEPS_OWN | _KEEPS_NEXT):
        return None
    size = geometry.block_size
    position = torch.arange(size)
    # Query i of the block sees its own key block up to `i + ahead`, and what is left of that in the next block.
    ahead = position[:, None] - position[None, :] + geometry.offset % size
    mask = torch.zeros(size, count, size, dtype=dtype)
    last = count - 1
    if flags & _KEEPS_NEXT:
        mask[:, last].masked_fill_(ahead < size, -torch.inf)
        last -= 1
    if flags & _KEEPS_OWN:
        mask[:, last].masked_fill_(ahead < 0, -torch.inf)
    return mask.flatten(1)
