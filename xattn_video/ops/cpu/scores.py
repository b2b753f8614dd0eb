"""Scores on a CPU: one matrix product a strip of query groups, whose softmax is summed before the next.

A strip of a long call is cut into tiles of key groups, so that what a thread holds does not grow with the length: each
tile is summed under a softmax of its own, and the sums are weighted when the strip's total is known.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..key_mask import num_blocks
from .tensors import Geometry, fill, head_slabs, product
from .workers import Scratch, for_each

# Logits of one strip of query groups: small enough to stay in a core's second-level cache.
_STRIP_ELEMENTS = 1 << 18
# Strips below this many rows leave the matrix product idle.
_MIN_STRIP_ROWS = 128
# Logits of one tile of a strip: 4 MB in float32.
_TILE_ELEMENTS = 1 << 20


def score_item(query: Tensor, key: Tensor, scores: Tensor, geometry: Geometry, stride: int) -> None:
    """Add the scores `[Hq, Nq, Nk]` of one batch item to zeros, for query `[Hq, Sq, D]` and key `[Hkv, Sk, D]`."""
    if geometry.start >= geometry.stop:
        return
    strips = _strips(geometry, stride)
    for slab in head_slabs(key.shape[0], key[0].numel() * scores.dtype.itemsize):
        _score_heads(query, key, scores, slab, strips, geometry, stride)


def _score_heads(
    query: Tensor,
    key: Tensor,
    scores: Tensor,
    kv_heads: range,
    strips: list[slice],
    geometry: Geometry,
    stride: int,
) -> None:
    key_groups: dict[int, Tensor] = {}
    group = query.shape[0] // key.shape[0]

    def prepare(kv_head: int, _: Scratch) -> None:
        key_groups[kv_head] = _key_groups(key[kv_head], geometry, stride, scores.dtype)

    def score(task: tuple[int, slice], scratch: Scratch) -> None:
        head, rows = task
        _score_strip(query[head], key_groups[head // group], scores[head], rows, geometry, stride, scratch)

    for_each(prepare, kv_heads)
    heads = range(kv_heads.start * group, kv_heads.stop * group)
    for_each(score, [(head, rows) for rows in strips for head in heads])


def _first_query(geometry: Geometry) -> int:
    """The first query that sees a key."""
    return 0 if geometry.offset is None else max(0, geometry.start - geometry.offset)


def _key_groups(key: Tensor, geometry: Geometry, stride: int, dtype: torch.dtype) -> Tensor:
    """Groups of keys, `[C, S * D]`, from the one with the first valid key to that with the last.

    They are a copy only where the keys do not have that form: zeros for padding inside a group, and the dtype to
    compute in.
    """
    first, end = geometry.start // stride, num_blocks(geometry.stop, stride)
    whole = geometry.start % stride == 0 and geometry.stop % stride == 0
    if whole and key.dtype == dtype and key.is_contiguous():
        return key[first * stride : end * stride].view(end - first, -1)
    keys = torch.empty((end - first) * stride, key.shape[1], dtype=dtype)
    fill(keys, key, first * stride, geometry.start, geometry.stop)
    return keys.view(end - first, -1)


def _strips(geometry: Geometry, stride: int) -> list[slice]:
    """Whole query blocks cut into ranges of query groups, those that see most first."""
    ratio = geometry.block_size // stride
    columns = num_blocks(geometry.stop, stride) - geometry.start // stride
    size = max(_STRIP_ELEMENTS // columns, _MIN_STRIP_ROWS, ratio) // ratio * ratio
    begin = _first_query(geometry) // geometry.block_size * ratio
    end = num_blocks(geometry.q_len, geometry.block_size) * ratio
    return [slice(row, min(row + size, end)) for row in range(begin, end, size)][::-1]


def _score_strip(
    query: Tensor,
    key_groups: Tensor,
    scores: Tensor,
    rows: slice,
    geometry: Geometry,
    stride: int,
    scratch: Scratch,
) -> None:
    """Write the scores `[Nq, Nk]` of the query groups `rows` of one head."""
    dtype, ratio = scores.dtype, geometry.block_size // stride
    count, first_group = rows.stop - rows.start, geometry.start // stride
    queries = scratch.take("queries", (count * stride, query.shape[1]), dtype)
    fill(queries, query, rows.start * stride, _first_query(geometry), geometry.q_len)
    # Of a group and its antidiagonal, one side is reversed: the queries, which are fewer at a time than the keys.
    reversed_queries = scratch.take("reversed", (count, stride, query.shape[1]), dtype)
    torch.mul(queries.view(reversed_queries.shape).flip(1), geometry.scale / stride, out=reversed_queries)

    width, last = key_groups.shape[0], None
    if geometry.offset is not None:
        width = min(width, (geometry.offset + rows.stop * stride - 1) // stride + 1 - first_group)
        last = (geometry.offset + rows.start * stride + stride - 1) // stride - first_group
    # Groups without a query that sees a key give no mass.
    padding = (
        slice(0, max(_first_query(geometry) // stride - rows.start, 0)),
        slice(max(num_blocks(geometry.q_len, stride) - rows.start, 0), count),
    )
    # Tiles end where blocks do.
    lead = first_group % ratio
    step = max(_TILE_ELEMENTS // count // ratio, 1) * ratio
    tiles = [slice(max(end - step, 0), min(end, width)) for end in range(step - lead, width + step, step)]
    masses, totals = [], torch.empty(count, len(tiles), dtype=dtype)
    for tile, total in zip(tiles, totals.unbind(1), strict=True):
        logits = product(reversed_queries.view(count, -1), key_groups[tile])
        if last is not None:
            _hide_later_groups(logits, last - tile.start)
        prob = torch.softmax(logits, dim=-1, out=scratch.take("prob", logits.shape, dtype))
        if len(tiles) > 1:
            # The largest probability is exp(0) over the sum.
            torch.sub(logits.amax(-1), prob.amax(-1).log_(), out=total)
            blind = max(tile.start - last, 0) if last is not None else 0
            prob[:blind], total[:blind] = 0, -torch.inf
        for part in padding:
            prob[part] = 0
        if len(tiles) == 1:
            # Rows first: that sum reads whole cache lines.
            prob = prob.unflatten(0, (-1, ratio)).sum(1)
        masses.append(_sum_in_blocks(prob, (lead + tile.start) % ratio, ratio))
    if len(tiles) > 1:
        shares = torch.softmax(totals, dim=-1)
        for part in padding:
            shares[part] = 0
        masses = [
            (mass * share[:, None]).unflatten(0, (-1, ratio)).sum(1)
            for mass, share in zip(masses, shares.unbind(1), strict=True)
        ]
    mass = torch.cat(masses, dim=1)
    block = first_group // ratio
    scores[rows.start // ratio : rows.stop // ratio, block : block + mass.shape[1]] = mass


def _sum_in_blocks(prob: Tensor, lead: int, ratio: int) -> Tensor:
    """Sums of each `ratio` columns, the first of which stands `lead` columns after the beginning of its block."""
    tail = -(lead + prob.shape[1]) % ratio
    if lead or tail:
        prob = pad(prob, (lead, tail))
    columns: Tensor = prob.unflatten(1, (-1, ratio))
    return columns.sum(2)


def _hide_later_groups(logits: Tensor, last: int) -> None:
    """Set to -inf what row r, which sees columns up to `last + r`, does not see."""
    clear = max(last + 1, 0)
    if clear < logits.shape[1]:
        seen = torch.arange(logits.shape[0])[:, None] + last
        later = torch.arange(clear, logits.shape[1])[None, :] > seen
        logits[:, clear:].masked_fill_(later, -torch.inf)
