"""Thresholds for each head of one video: what every threshold would keep and miss there, and which ones to take."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import XAttnConfig
from .backends import Backend
from .call_blocks import exact_type
from .key_mask import num_blocks
from .sparse import Call, attend_lists, parts_of, rows_per_chunk, score, select_lists

# How far candidates are from the threshold of all heads, as differences of log(t / (1 - t)). 0 is among them.
_STEPS = (-2.4, -1.8, -1.2, -0.6, 0.0, 0.6, 1.2, 1.8, 2.4)
_LOWEST, _HIGHEST = 0.01, 0.999
# A call is measured in so many spans of its query blocks, which together are an eighth of a long call.
_SPANS, _SHARE = 8, 8
_HALVINGS = 60


class HeadErrors(NamedTuple):
    """What each candidate keeps and misses in the heads of one layer. All of it stays on the device.

    Attributes:
        density: kept / valid blocks, `[Hq, C]` in the device's most exact type.
        error: squared error of the output, as a share of the squared output of the whole layer, likewise.
    """

    density: Tensor
    error: Tensor


def candidates(threshold: float) -> list[float]:
    """Thresholds around the one of all heads, which is in the middle."""
    odds = math.log(threshold / (1 - threshold))
    near = (1 / (1 + math.exp(-odds - step)) for step in _STEPS)
    return [min(max(value, _LOWEST), _HIGHEST) if step else threshold for step, value in zip(_STEPS, near, strict=True)]


def head_errors(backend: Backend, call: Call, config: XAttnConfig, thresholds: list[float]) -> HeadErrors:
    """Try each threshold on a sample of a call's query blocks, beside all blocks; for calls that are not causal."""
    heads, device = call.query.shape[1], call.query.device
    dtype = exact_type(device)
    blocks = num_blocks(call.query.shape[2], config.block_size)
    most = rows_per_chunk(
        call.query,
        call.key.shape[2],
        block_size=config.block_size,
        pair_bytes=backend.pair_bytes,
        max_bytes=config.max_extra_mib << 20,
    )
    rows = min(num_blocks(blocks, _SPANS * _SHARE), most)
    starts = sorted({round(index * (blocks - rows) / (_SPANS - 1)) for index in range(_SPANS)})
    kept = torch.zeros(heads, len(thresholds), dtype=dtype, device=device)
    missed = torch.zeros_like(kept)
    valid = torch.zeros((), dtype=dtype, device=device)
    size = torch.zeros_like(valid)
    for part in parts_of(call, config, rows, starts):
        scores = score(backend, part, config)
        every = part.valid.expand(-1, heads, -1, -1).contiguous()
        dense, _ = attend_lists(backend, part, config, backend.mask_to_lists(every))
        valid += part.valid.sum()
        size += _squared(dense).sum()
        for column, threshold in enumerate(thresholds):
            lists = select_lists(backend, scores, part.valid, part.forced, threshold=threshold)
            output, _ = attend_lists(backend, part, config, lists)
            kept[:, column] += lists[1].sum((0, 2))
            missed[:, column] += _squared(output - dense)
    return HeadErrors(kept / valid, missed / size.clamp_min(torch.finfo(dtype).tiny))


def spend(density: Tensor, error: Tensor, budget: float) -> Tensor:
    """The candidate of each head that keeps the sum of the errors small, at a mean density of at most the budget.

    Each head takes what is least in density + price * error, with the highest price that the budget allows: the
    solution by a Lagrange multiplier, which is exact but for the last step of one head.

    Args:
        density, error: float64 `[heads, C]` on the CPU.
        budget: mean density over the heads; at least one candidate of all heads keeps to it.

    Returns:
        int64 `[heads]`.
    """
    error = error.nan_to_num(torch.finfo(error.dtype).max)
    cheapest = density.argmin(1, keepdim=True)
    low, high = -6.0, 18.0  # powers of ten
    best = cheapest
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        taken = (density + 10**middle * error).argmin(1, keepdim=True)
        if density.gather(1, taken).mean() <= budget:
            best, low = taken, middle
        else:
            high = middle
    return best[:, 0]


def _squared(output: Tensor) -> Tensor:
    """Squares of `[B, H, n, D]`, summed for each head: `[H]` in the device's most exact type."""
    return output.float().square().sum((0, 2, 3)).to(exact_type(output.device))
