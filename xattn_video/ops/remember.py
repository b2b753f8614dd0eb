"""Calls that remember: a choice of blocks that is kept, and what attention over it misses (ALGORITHM.md, section 9).

A refresh attends over the kept blocks and over all others. The two merge to dense attention, and their difference is
the residual, which later calls add to attention over the kept blocks alone. Both read each key block once together, so
a refresh costs as much as dense attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import XAttnConfig
from .backends import Backend
from .block_lists import lists_to_mask
from .residual import Packed
from .sparse import Call, Outcome, Part, attend_lists, choose, in_parts

# Two masks of bool, the lists of the other blocks, and what the masks are made with.
_REFRESH_PAIR_BYTES = 24
_KEPT_PAIR_BYTES = 16


class Memory(NamedTuple):
    """What a call left for later calls of the same shape.

    Attributes:
        blocks: the kept blocks, eight to a byte: uint8 `[B, Hq, Nq, ceil(Nk / 8)]`.
        residual: what attention over them missed, or None where only the choice of blocks is kept.
    """

    blocks: Tensor
    residual: Packed | None


def attend_choosing(backend: Backend, call: Call, config: XAttnConfig) -> tuple[Outcome, Memory]:
    """Sparse attention as `attend_sparse`, and the blocks that it chose."""
    chosen: list[Tensor] = []

    def attend(part: Part) -> tuple[Tensor, Tensor]:
        lists = choose(backend, part, config)
        chosen.append(pack_bits(lists_to_mask(*lists)))
        output, _ = attend_lists(backend, part, config, lists)
        return output, lists[1]

    outcome = in_parts(backend, call, config, attend, more_pair_bytes=_KEPT_PAIR_BYTES)
    return outcome, Memory(_joined(chosen), None)


def attend_kept(
    backend: Backend,
    call: Call,
    config: XAttnConfig,
    memory: Memory,
    *,
    before: Memory | None = None,
    factor: float = 0.0,
) -> Outcome:
    """Attention over the kept blocks, plus the residual where there is one.

    Args:
        memory: of a call of the same shape.
        before: the memory of an earlier refresh, to extrapolate from, or None.
        factor: steps since the refresh of `memory`, over the steps between the two refreshes.
    """
    size = config.block_size
    columns = -(-call.key.shape[2] // size)

    def attend(part: Part) -> tuple[Tensor, Tensor]:
        mask = unpack_bits(memory.blocks[:, :, _rows(part.tokens, size)], columns)
        lists = backend.mask_to_lists(mask)
        output, _ = attend_lists(backend, part, config, lists)
        if memory.residual is not None:
            earlier = None if before is None or before.residual is None else _cut(before.residual, part.tokens)
            output = backend.add_residual(output, _cut(memory.residual, part.tokens), earlier, factor)
        return output, lists[1]

    return in_parts(backend, call, config, attend, more_pair_bytes=_KEPT_PAIR_BYTES)


def refresh(backend: Backend, call: Call, config: XAttnConfig, blocks: Tensor | None = None) -> tuple[Outcome, Memory]:
    """Dense attention, computed so that it leaves a residual; not for causal calls.

    Args:
        blocks: the blocks that are kept, as `Memory` has them; None chooses them.

    Returns:
        the outcome, whose counts are of the kept blocks, and the memory for later calls.
    """
    size = config.block_size
    columns = -(-call.key.shape[2] // size)
    chosen: list[Tensor] = []
    residuals: list[Packed] = []

    def attend(part: Part) -> tuple[Tensor, Tensor]:
        if blocks is None:
            lists = choose(backend, part, config)
            mask = lists_to_mask(*lists)
            chosen.append(pack_bits(mask))
        else:
            mask = unpack_bits(blocks[:, :, _rows(part.tokens, size)], columns)
            lists = backend.mask_to_lists(mask)
        others = backend.mask_to_lists(part.valid & ~mask)
        del mask
        output, lse = attend_lists(backend, part, config, lists)
        other, other_lse = attend_lists(backend, part, config, others)
        output, packed = backend.merge(output, lse, other, other_lse, config.residual)
        residuals.append(packed)
        return output, lists[1]

    outcome = in_parts(backend, call, config, attend, more_pair_bytes=_REFRESH_PAIR_BYTES)
    return outcome, Memory(_joined(chosen) if blocks is None else blocks, _joined_residuals(residuals))


def pack_bits(mask: Tensor) -> Tensor:
    """Bool `[..., n]` as uint8 `[..., ceil(n / 8)]`, the first of eight in the lowest bit."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = 2 ** torch.arange(8, device=mask.device)
    packed: Tensor = (padded * weights).sum(-1)
    return packed.to(torch.uint8)


def unpack_bits(packed: Tensor, length: int) -> Tensor:
    """The inverse of `pack_bits`: bool `[..., length]`."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(-2)[..., :length].to(torch.bool)


def packed_bytes(shape: Sequence[int], value_bytes: int, kind: str) -> int:
    """Bytes of the residual of an output.

    Args:
        shape: of the output, `[B, H, S, D]`.
        value_bytes: bytes of one of its numbers.
        kind: as `XAttnConfig.residual`, but not `off`.
    """
    *tokens, head_dim = shape
    row = {"full": head_dim * value_bytes, "fp8": head_dim + 4, "int4": (head_dim + 1) // 2 + 4}
    return math.prod(tokens) * row[kind]


def _cut(packed: Packed, tokens: slice) -> Packed:
    # the kernels take whole tensors; of a call that is not cut these are no copies
    scale = None if packed.scale is None else packed.scale[:, :, tokens].contiguous()
    return Packed(packed.values[:, :, tokens].contiguous(), scale)


def _joined_residuals(parts: list[Packed]) -> Packed:
    scales = [part.scale for part in parts if part.scale is not None]
    return Packed(_joined([part.values for part in parts]), _joined(scales) if scales else None)


def _rows(tokens: slice, size: int) -> slice:
    """The query blocks of a range of tokens that begins with a block."""
    return slice(tokens.start // size, -(-tokens.stop // size))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
