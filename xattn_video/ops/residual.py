"""Residual memory in plain PyTorch: what sparse attention missed, kept in few bits and added at later steps.

A refresh attends over the kept blocks and over their complement, merges the two to exactly dense attention, and keeps
the difference between dense and sparse attention. That difference changes slowly from one denoising step to the next.
This module runs on any device, and the kernels in `ops.triton.residual` are judged by it. Float64 tensors are computed
in float64, all others in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import config
from .reference import compute_dtype

# How a residual is kept: the settings of `XAttnConfig.residual` but `off`.
RESIDUALS = config.RESIDUALS[1:]

# The largest stored value of each packed kind. An int4 is stored with INT4_ZERO added, in the range 1 to 15.
INT4_MOST, INT4_ZERO = 7, 8
FP8_MOST = 448
# 2^-126, the smallest normal float32.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class Packed(NamedTuple):
    """A residual in the form in which it is kept between steps.

    Attributes:
        values: int4: uint8 `[B, H, S, ceil(D/2)]`, where the low four bits hold dimensions 0 to ceil(D/2) - 1 and the
            high four bits the rest, each with 8 added; for an odd D the last high bits stand for no dimension.
            fp8: float8_e4m3fn `[B, H, S, D]`. full: `[B, H, S, D]` in the attention's dtype.
        scale: float32 `[B, H, S]`, the factor on the values of each token and head; None for full.
    """

    values: Tensor
    scale: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)


def check_kind(kind: str) -> None:
    """Raise ValueError for a kind that is not in `RESIDUALS`."""
    if kind not in RESIDUALS:
        raise ValueError(f"kind must be one of {', '.join(RESIDUALS)}, got {kind!r}")


def empty_packed(like: Tensor, kind: str) -> Packed:
    """Memory for the residual of an output `[B, H, S, D]`, not yet written. Raises ValueError for an unknown kind."""
    check_kind(kind)
    shape = like.shape
    if kind == "full":
        return Packed(like.new_empty(shape), None)
    scale = like.new_empty(shape[:-1], dtype=torch.float32)
    if kind == "fp8":
        return Packed(like.new_empty(shape, dtype=torch.float8_e4m3fn), scale)
    return Packed(like.new_empty((*shape[:-1], (shape[-1] + 1) // 2), dtype=torch.uint8), scale)


def merge(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, kind: str) -> tuple[Tensor, Packed]:
    """Join attention over the kept blocks and over their complement: dense attention and the residual.

    With the outputs A and C and the log-sum-exps a and c of the two parts, dense attention is D = A + R with
    R = sigmoid(c - a) * (C - A).

    Args:
        output, other: `[B, H, S, D]`, attention over the kept blocks and over their complement.
        lse, other_lse: `[B, H, S]`, float32 or float64; -inf where a row sees no key of that part, whose output is 0.
        kind: how R is kept, one of `RESIDUALS`.

    Returns:
        D `[B, H, S, D]` in output's dtype, and R, packed from values that are not yet rounded to that dtype. A row
        whose complement is empty has R = 0. A NaN in an input shows in D. A row of R with a NaN or an infinite value
        unpacks to NaN, except for full, which keeps each value.

    Raises:
        ValueError: unknown kind.
    """
    dtype = compute_dtype(output)
    kept, rest = output.to(dtype), other.to(dtype)
    # Equal infinities have no difference: both parts are then empty, and both outputs are 0.
    gap = torch.where(lse == other_lse, 0, other_lse - lse).to(dtype).unsqueeze(-1)
    weight = torch.sigmoid(gap)
    # The two weights apart, so that values near the largest number do not overflow as their difference would.
    dense = torch.sigmoid(-gap) * kept + weight * rest
    residual = torch.where(gap == -torch.inf, 0, weight * (rest - kept))
    return dense.to(output.dtype), pack(residual, kind, output.dtype)


def pack(residual: Tensor, kind: str, dtype: torch.dtype) -> Packed:
    """Store `[B, H, S, D]` in the form of that kind; `dtype` is that of a full one. Raises ValueError as `merge`."""
    check_kind(kind)
    if kind == "full":
        return Packed(residual.to(dtype), None)
    scale = (residual.abs().amax(-1) / (INT4_MOST if kind == "int4" else FP8_MOST)).float()
    # A scale with fewer bits than a normal number is too coarse: such a row is as good as zero.
    scale = torch.where(scale < SMALLEST_SCALE, 0, scale)
    factor = scale.to(residual.dtype).unsqueeze(-1)
    usable = (factor > 0) & (factor < torch.inf)
    # A row of zeros stores zeros. So does a row with a NaN or an infinite value, whose scale then makes it NaN.
    scaled = torch.where(usable, residual / factor, 0)
    if kind == "fp8":
        return Packed(scaled.float().to(torch.float8_e4m3fn), scale)
    numbers = (scaled.round() + INT4_ZERO).to(torch.uint8)
    half = (residual.shape[-1] + 1) // 2
    low, high = numbers[..., :half], numbers[..., half:]
    high = torch.nn.functional.pad(high, (0, half - high.shape[-1]), value=INT4_ZERO)
    return Packed(low | (high << 4), scale)


def unpack(packed: Packed, head_dim: int, dtype: torch.dtype) -> Tensor:
    """The residual `[B, H, S, D]` in that dtype.

    Args:
        packed: of any kind.
        head_dim: D, which the bytes of an int4 alone do not tell.
        dtype: of the result; computed in float32, or in float64 for float64.
    """
    values, scale = packed
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    if values.dtype == torch.uint8:
        values = torch.cat((values & 15, values >> 4), dim=-1)[..., :head_dim].to(computed) - INT4_ZERO
    values = values.to(computed)
    return (values if scale is None else values * scale.to(computed).unsqueeze(-1)).to(dtype)


def add(output: Tensor, packed: Packed, before: Packed | None = None, factor: float | Tensor = 0.0) -> Tensor:
    """Sparse attention with the residual of the last refresh, continued along the change since the one before it.

    Args:
        output: `[B, H, S, D]`, attention over the kept blocks.
        packed: R, the residual of the last refresh.
        before: R', the residual of the refresh before that one, or None.
        factor: how far the change R - R' is continued: steps since the last refresh over steps between the two. A
            number, or a 0-d tensor on output's device, which a compiled caller takes so as not to be compiled again.

    Returns:
        output + R, and + factor * (R - R') where `before` is given: summed in float32 (float64 for float64) and
        rounded once to output's dtype.
    """
    dtype, head_dim = compute_dtype(output), output.shape[-1]
    residual = unpack(packed, head_dim, dtype)
    if before is not None:
        residual = residual + factor * (residual - unpack(before, head_dim, dtype))
    return (output.to(dtype) + residual).to(output.dtype)
