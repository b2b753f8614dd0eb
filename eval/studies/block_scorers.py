"""Ways to guess which blocks of an attention matrix matter, and the exact answer that they are judged by.

Every guess makes one logit out of each `stride x stride` tile of the attention matrix, takes a softmax over the tiles
that a row of tiles sees, and sums it over each block; they differ in what the logit is made of. With stride 1 a tile
is one element, so all of them are the exact mass times the rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from xattn_video import score_blocks
from xattn_video.config import check_geometry
from xattn_video.ops.checks import default_scale
from xattn_video.ops.key_mask import num_blocks
from xattn_video.ops.reference import compute_dtype

# Logits held at once: 64 MB of float32.
CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Scorer:
    """One way to score blocks.

    Attributes:
        definition: what the logit of a tile is, in one line; `mean` over i of what lies on the line i -> p(i).
        power: the cost is `1 / stride ** power` of the multiply-adds of the whole query-key product.
        score: `(query, key, *, stride, block_size, causal, seed, backend) -> [B, Hq, Nq, Nk]`.
    """

    name: str
    definition: str
    power: int
    score: Callable[..., Tensor]

    def cost(self, stride: int) -> float:
        """Multiply-adds relative to the whole query-key product, `Sq * Sk * D` a head."""
        return 1 / float(stride**self.power)

    @property
    def formula(self) -> str:
        """The cost as text."""
        return {0: "1", 1: "1/S", 2: "1/S^2"}[self.power]


def exact_block_mass(query: Tensor, key: Tensor, *, block_size: int, causal: bool) -> Tensor:
    """Share of the softmax that each block holds: the mean over its query rows of the probability in its columns.

    Computed in chunks of rows, so that memory does not grow with the square of the length.

    Args:
        query: `[B, Hq, S, D]`, floating point.
        key: `[B, Hkv, S, D]`, `Hq % Hkv == 0`.
        block_size: tokens a block.
        causal: query i sees the keys up to i.

    Returns:
        `[B, Hq, N, N]`, float64 for float64 inputs, else float32; a row sums to 1.
    """
    _check(query, key, 1, block_size)
    sums = _softmax_sums(query, key, stride=1, block_size=block_size, causal=causal)
    rows = torch.full((sums.shape[2], 1), block_size, dtype=sums.dtype)
    rows[-1] = query.shape[2] - (sums.shape[2] - 1) * block_size
    return sums / rows.to(sums.device)


def tile_permutation(stride: int, seed: int) -> Tensor:
    """The random pattern: which query of a group meets key i, int64 `[stride]`, each exactly once."""
    return torch.randperm(stride, generator=torch.Generator().manual_seed(seed))


def _check(query: Tensor, key: Tensor, stride: int, block_size: int) -> None:
    check_geometry(stride, block_size)
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"query and key must have one length, got {query.shape[2]} and {key.shape[2]}")


def _antidiagonal(query: Tensor, key: Tensor, *, seed: int, **settings: Any) -> Tensor:
    return score_blocks(query, key, **settings)


def _along(query: Tensor, key: Tensor, order: Tensor, settings: dict[str, Any]) -> Tensor:
    """Score along the line `query order[i] meets key i` of each tile.

    The project's own scores pair query S-1-i with key i. So the queries of a group are put where that pairs the
    wanted ones, after the last group is filled up with zeros, as scoring would.
    """
    length, stride = query.shape[2], settings["stride"]
    filled = num_blocks(length, stride) * stride
    query, key = (pad(tokens, (0, 0, 0, filled - length)) for tokens in (query, key))
    query = query.unflatten(2, (-1, stride))[:, :, :, order.to(query.device).flip(0)].flatten(2, 3)
    return score_blocks(query, key, **settings)


def _diagonal(query: Tensor, key: Tensor, *, seed: int, **settings: Any) -> Tensor:
    _check(query, key, settings["stride"], settings["block_size"])
    return _along(query, key, torch.arange(settings["stride"]), settings)


def _random_in_tile(query: Tensor, key: Tensor, *, seed: int, **settings: Any) -> Tensor:
    _check(query, key, settings["stride"], settings["block_size"])
    return _along(query, key, tile_permutation(settings["stride"], seed), settings)


def _pooled(pool: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    def score(
        query: Tensor, key: Tensor, *, stride: int, block_size: int, causal: bool, seed: int, backend: str = "auto"
    ) -> Tensor:
        _check(query, key, stride, block_size)
        dtype = compute_dtype(query)
        queries, keys = (_pool_groups(tokens.to(dtype), stride, pool) for tokens in (query, key))
        return _softmax_sums(queries, keys, stride=stride, block_size=block_size, causal=causal)

    return score


def _exact(
    query: Tensor, key: Tensor, *, stride: int, block_size: int, causal: bool, seed: int, backend: str = "auto"
) -> Tensor:
    return exact_block_mass(query, key, block_size=block_size, causal=causal)


def _pool_groups(tokens: Tensor, stride: int, pool: Callable[[Tensor, int], Tensor]) -> Tensor:
    """One vector a group `[B, H, ceil(N/S), D]`, from the tokens that are there: the last group may hold fewer."""
    whole = tokens.shape[2] // stride * stride
    parts = [pool(tokens[:, :, :whole].unflatten(2, (-1, stride)), 3)]
    if whole < tokens.shape[2]:
        parts.append(pool(tokens[:, :, whole:], 2)[:, :, None])
    return torch.cat(parts, dim=2)


def _softmax_sums(query: Tensor, key: Tensor, *, stride: int, block_size: int, causal: bool) -> Tensor:
    """Softmax over key groups of the products of group vectors `[B, H, groups, D]`, summed over blocks.

    Group r of queries sees group c of keys unless `causal` and c > r. One query group in a row of the result counts
    as 1. A head and a few blocks of rows at a time.
    """
    dtype, ratio = compute_dtype(query), block_size // stride
    scale = default_scale(None, query.shape[3])
    batch, heads, count = query.shape[:3]
    repeats = heads // key.shape[1]
    blocks = num_blocks(count, ratio)
    chunk = max(1, CHUNK_ELEMENTS // (ratio * count)) * ratio
    column = torch.arange(count, device=query.device)
    sums = torch.zeros(batch, heads, blocks, blocks, dtype=dtype, device=query.device)
    for item in range(batch):
        for head in range(heads):
            columns = key[item, head // repeats].to(dtype).T * scale
            for begin in range(0, count, chunk):
                logits = query[item, head, begin : begin + chunk].to(dtype) @ columns
                if causal:
                    logits = logits.masked_fill(column > column[begin : begin + chunk, None], -torch.inf)
                prob = torch.softmax(logits, dim=-1)
                prob = pad(prob, (0, blocks * ratio - count, 0, -prob.shape[0] % ratio))
                tiles = prob.view(-1, ratio, blocks, ratio).sum((1, 3))
                sums[item, head, begin // ratio : begin // ratio + tiles.shape[0]] = tiles
    return sums


EXACT = "exact"
SCORERS = {
    scorer.name: scorer
    for scorer in (
        Scorer("antidiagonal", "mean of q[S-1-i].k[i] over the tile's antidiagonal (this project)", 1, _antidiagonal),
        Scorer("diagonal", "mean of q[i].k[i] over the tile's diagonal", 1, _diagonal),
        Scorer("random_in_tile", "mean of q[p(i)].k[i], p one random permutation for all tiles", 1, _random_in_tile),
        Scorer("mean_pooling", "product of the group's mean query and mean key", 2, _pooled(torch.mean)),
        Scorer("sum_pooling", "product of the group's summed query and summed key", 2, _pooled(torch.sum)),
        Scorer("max_pooling", "product of the group's largest query and key in each dimension", 2, _pooled(torch.amax)),
        Scorer(EXACT, "the exact mass itself, whatever the stride: the oracle", 0, _exact),
    )
}
