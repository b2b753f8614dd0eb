"""The fast CPU path: big GEMMs for the scores, gathered blocks and batched flash attention for the rest.

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

# Logits of one strip of query groups: small enough to stay in the second-level caches.
_STRIP_ELEMENTS = 1 << 19
# Strips below this many rows leave the matrix product unit idle.
_MIN_STRIP_ROWS = 128
# Gathered key and value blocks of one attention call; larger batches fall out of the cache.
_GATHER_BYTES = 8 << 20
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


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _key_ranges(batch: int, kv_len: int, kv_start: Tensor | None, kv_lens: Tensor | None) -> list[tuple[int, int]]:
    start, stop = key_range(kv_len, kv_start, kv_lens, torch.device("cpu"))
    return list(zip(start.expand(batch).tolist(), stop.expand(batch).tolist(), strict=True))


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
    batch, heads, q_len, _ = query.shape
    kv_heads, kv_len = key.shape[1:3]
    dtype = _compute_dtype(query)
    scores = torch.zeros(batch, heads, num_blocks(q_len, block_size), num_blocks(kv_len, block_size), dtype=dtype)
    for item, (start, stop) in enumerate(_key_ranges(batch, kv_len, kv_start, kv_lens)):
        if start >= stop:
            continue
        offset = stop - q_len
        first_query = max(0, start - offset) if causal else 0
        for kv_head in range(kv_heads):
            # Reversing the keys inside a group instead of the queries makes the copy once for all heads that share it.
            begin = start // stride * stride
            keys = _padded(key[item, kv_head], start, stop, begin, num_blocks(stop, stride) * stride, dtype)
            key_groups = keys.unflatten(0, (-1, stride)).flip(1).flatten(1).mul_(scale / stride)
            for head in range(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads):
                queries = _padded(query[item, head], first_query, q_len, 0, scores.shape[2] * block_size, dtype)
                _score_head(
                    queries.view(-1, key_groups.shape[1]),
                    key_groups,
                    scores[item, head],
                    rows=(first_query // stride, num_blocks(q_len, stride)),
                    first_group=begin // stride,
                    offset=offset if causal else None,
                    stride=stride,
                )
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


def _padded(tokens: Tensor, start: int, stop: int, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Tokens `[begin, end)` of `[N, D]`, contiguous, zeros outside `[start, stop)`; a view where nothing changes."""
    if start <= begin and end <= stop:
        return tokens[begin:end].to(dtype).contiguous()
    padded = torch.zeros(end - begin, tokens.shape[1], dtype=dtype)
    if start < stop:
        padded[max(start - begin, 0) : stop - begin] = tokens[max(start, begin) : stop]
    return padded


def _score_head(
    query_groups: Tensor,
    key_groups: Tensor,
    scores: Tensor,
    *,
    rows: tuple[int, int],
    first_group: int,
    offset: int | None,
    stride: int,
) -> None:
    """Write the block scores `[Nq, Nk]` of one head; `rows` are the query groups that hold a query that sees a key."""
    columns = key_groups.shape[0]
    ratio = query_groups.shape[0] // scores.shape[0]
    strip = max(_STRIP_ELEMENTS // columns, _MIN_STRIP_ROWS, ratio) // ratio * ratio
    logits = torch.empty(strip * columns, dtype=scores.dtype)
    prob = torch.empty_like(logits)
    for begin in range(rows[0] // ratio * ratio, rows[1], strip):
        end = min(begin + strip, num_blocks(rows[1], ratio) * ratio)
        width = columns
        if offset is not None:
            width = min(columns, (offset + end * stride - 1) // stride + 1 - first_group)
        shape = (end - begin, width)
        strip_logits = logits[: shape[0] * width].view(shape)
        strip_prob = prob[: shape[0] * width].view(shape)
        torch.mm(query_groups[begin:end], key_groups[:width].t(), out=strip_logits)
        if offset is not None:
            _hide_later_groups(strip_logits, (offset + begin * stride + stride - 1) // stride - first_group)
        torch.softmax(strip_logits, dim=-1, out=strip_prob)
        # Groups without such a query give no mass.
        strip_prob[: max(rows[0] - begin, 0)] = 0
        strip_prob[max(rows[1] - begin, 0) :] = 0
        # Rows first: that sum reads whole cache lines.
        mass = strip_prob.unflatten(0, (-1, ratio)).sum(1)
        lead = first_group % ratio
        mass = pad(mass, (lead, -(lead + width) % ratio)).unflatten(1, (-1, ratio)).sum(2)
        block = first_group // ratio
        scores[begin // ratio : end // ratio, block : block + mass.shape[1]] = mass


def _hide_later_groups(logits: Tensor, last: int) -> None:
    """Set to -inf what row r, which sees columns up to `last + r`, does not see; hidden rows are zeroed later."""
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
    visible = valid_blocks(
        batch,
        q_len,
        kv_len,
        block_size=block_size,
        causal=causal,
        kv_start=kv_start,
        kv_lens=kv_lens,
        device=query.device,
    )
    block_mask = block_mask & visible
    output = torch.empty(query.shape, dtype=query.dtype)
    lse = torch.empty(query.shape[:3], dtype=dtype)
    group = heads // kv_heads
    step = max(1, _COPY_BYTES // (2 * kv_len * head_dim * dtype.itemsize))
    for item, (start, stop) in enumerate(_key_ranges(batch, kv_len, kv_start, kv_lens)):
        geometry = _Geometry(block_size, start, stop, stop - q_len if causal else None, scale)
        for kv_begin in range(0, kv_heads, step):
            kv = slice(kv_begin, kv_begin + step)
            part = slice(kv.start * group, kv.stop * group)
            inputs = (query[item, part], key[item, kv], value[item, kv])
            _attend_heads(*inputs, block_mask[item, part], output[item, part], lse[item, part], geometry)
    return output, lse


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
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=_compute_dtype(query))


class _Geometry(NamedTuple):
    """What one batch item sees: keys `[start, stop)`, and if causal query i those up to `i + offset`."""

    block_size: int
    start: int
    stop: int
    offset: int | None
    scale: float


class _Batch(NamedTuple):
    """Rows of one pattern that one attention call computes: a range of the sorted rows and of their kept blocks."""

    rows: slice
    blocks: slice
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
    """Fill output `[H, Sq, D]` and lse `[H, Sq]` for query `[H, Sq, D]`, key and value `[Hkv, Sk, D]`."""
    heads, q_len, head_dim = query.shape
    size, dtype = geometry.block_size, lse.dtype
    queries = _blocked(query, size, dtype).view(-1, 1, size, head_dim)
    keys, values = (_blocked(tokens, size, dtype).flatten(1) for tokens in (key, value))

    # One row is one query block of one head. Sorted by pattern, rows of equal pattern are neighbours.
    kept = block_mask.flatten(0, 1)
    patterns = _row_patterns(block_mask, geometry)
    patterns, order = patterns.sort(descending=True)
    row, block = kept[order].nonzero(as_tuple=True)
    # Where the head of a row begins among the key blocks of all heads.
    rows_per_kv_head = kept.shape[0] // key.shape[0]
    block = block + (order // rows_per_kv_head * kept.shape[1])[row]

    queries = queries[order]
    results = torch.zeros_like(queries)
    row_lse = torch.full((queries.shape[0], size), -torch.inf, dtype=dtype)
    scratch = torch.empty(2, 0, keys.shape[1], dtype=dtype)
    for batch in _batches(patterns, geometry, 2 * keys.shape[1] * dtype.itemsize, dtype):
        chosen = block[batch.blocks]
        if scratch.shape[1] < chosen.shape[0]:
            scratch = torch.empty(2, chosen.shape[0], keys.shape[1], dtype=dtype)
        gathered = []
        for source, target in zip((keys, values), scratch, strict=True):
            torch.index_select(source, 0, chosen, out=target[: chosen.shape[0]])
            rows = batch.rows.stop - batch.rows.start
            gathered.append(target[: chosen.shape[0]].view(rows, 1, -1, head_dim)[:, :, batch.keys])
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries[batch.rows], *gathered, attn_mask=batch.mask, scale=geometry.scale
        )
        results[batch.rows] = part
        row_lse[batch.rows] = part_lse[:, 0]
        if batch.mask is not None:
            # The kernel leaves 0 as the log-sum-exp of a query that sees nothing.
            blind = batch.mask.isneginf().all(-1)
            row_lse[batch.rows, blind] = -torch.inf
            results[batch.rows, 0, blind] = 0

    position = torch.empty_like(order)
    position[order] = torch.arange(order.shape[0])
    output.copy_(results[position].view(heads, -1, head_dim)[:, :q_len])
    lse.copy_(row_lse[position].view(heads, -1)[:, :q_len])


def _blocked(tokens: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """`[H, N, D]` as blocks `[H * ceil(N/P), P, D]`, contiguous, zeros after the last token."""
    heads, length, head_dim = tokens.shape
    count = num_blocks(length, block_size)
    if count * block_size == length:
        return tokens.to(dtype).contiguous().view(-1, block_size, head_dim)
    blocks = torch.zeros(heads, count * block_size, head_dim, dtype=dtype)
    blocks[:, :length] = tokens
    return blocks.view(-1, block_size, head_dim)


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


def _batches(patterns: Tensor, geometry: _Geometry, row_bytes: int, dtype: torch.dtype) -> Iterator[_Batch]:
    """Cut the sorted rows into attention calls: one pattern each, as many rows as the scratch holds."""
    size = geometry.block_size
    row_begin = block_begin = 0
    # A row alone is a few parallel tasks; fewer rows than threads would leave threads idle.
    least = -(-torch.get_num_threads() // 4)
    for pattern, rows in zip(*(part.tolist() for part in patterns.unique_consecutive(return_counts=True)), strict=True):
        count, flags = divmod(pattern, _PATTERNS)
        if count == 0:
            return
        begin = geometry.start % size if flags & _KEEPS_START else 0
        end = count * size
        if flags & _KEEPS_STOP:
            end += geometry.stop % size - size
        mask = _own_mask(count, flags, geometry, dtype)
        step = max(_GATHER_BYTES // (count * row_bytes), least)
        for done in range(0, rows, step):
            taken = min(step, rows - done)
            yield _Batch(
                slice(row_begin, row_begin + taken),
                slice(block_begin, block_begin + taken * count),
                slice(begin, end),
                None if mask is None else mask[:, begin:end],
            )
            row_begin += taken
            block_begin += taken * count


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
