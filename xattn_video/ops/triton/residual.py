"""Residual memory by two kernels (`ops.residual` is the reference): merge with packing, and addition with unpacking.

Both are bound by memory alone, so each reads every input once and writes every result once. A program takes some tokens
of one head, and holds their dimensions in two halves, because a byte of an int4 residual holds one value of each half.
Conversion to and from fp8 is integer arithmetic: GPUs before sm_89 have no instruction for it, and the others need none
where memory is the limit.
"""

# Triton gives the parameters of jit functions their types, one launch at a time
# mypy: allow-untyped-defs

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..residual import FP8_MOST, INT4_MOST, INT4_ZERO, SMALLEST_SCALE, Packed, empty_packed
from .launch import COMPILE_OPTIONS, SUPPORTED_DTYPES, device_guard, rows_by_heads, unit_inner_stride

# What a kernel is not compiled again for, because it changes from video to video: sizes, and strides, whose common
# divisor tells it how wide a load may be.
_SIZES = ("heads", "length", *(f"stride_{name}{axis}" for name in "ocd" for axis in "bhs"))
_ADD_SIZES = tuple(name for name in _SIZES if not name.startswith("stride_c"))
# Strides are passed in units of 8 elements where they can be: 16 bytes of a 16-bit type, the widest load.
_STRIDE_UNIT = 8
# Bytes of an output's half that a program holds: 32 for each thread of four warps. With twice as many, float32 spills.
_TILE_BYTES = 4096

_INT4_MOST, _INT4_ZERO, _FP8_MOST = tl.constexpr(INT4_MOST), tl.constexpr(INT4_ZERO), tl.constexpr(FP8_MOST)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
# The exponent of a float8_e4m3fn has a bias of 7, that of a float32 one of 127. Scaled by 2^-120, the upper bits of a
# float32 are those of the float8, also below its smallest normal number.
_TO_FP8, _FROM_FP8 = tl.constexpr(2.0**-120), tl.constexpr(2.0**120)


@triton.jit
def _largest(values):
    """The largest magnitude of each row; bit patterns order NaN above all numbers, so a NaN is not lost."""
    return tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def _to_fp8(values):
    """The bytes of numbers of magnitude 448 at most, rounded to the nearest and ties to even."""
    bits = (values * _TO_FP8).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rounded = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    return (rounded | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _from_fp8(stored):
    bits = stored.to(tl.int32)
    return (((bits & 0x7F) << 20) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True) * _FROM_FP8


@triton.jit
def _store_packed(values_ptr, scale_ptr, places, in_rows, low, high, low_mask, high_mask, HEAD_DIM, BLOCK_D, KIND):
    """Store both halves of the residual of some rows; `places` numbers the rows of all heads."""
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    columns = tl.arange(0, BLOCK_D)[None, :]
    if KIND == "full":
        at = values_ptr + places[:, None] * HEAD_DIM + columns
        tl.store(at, low.to(values_ptr.dtype.element_ty), mask=low_mask)
        tl.store(at + HALF, high.to(values_ptr.dtype.element_ty), mask=high_mask)
    else:
        most: tl.constexpr = _INT4_MOST if KIND == "int4" else _FP8_MOST
        largest = tl.maximum(_largest(low).to(tl.int32, bitcast=True), _largest(high).to(tl.int32, bitcast=True))
        scale = largest.to(tl.float32, bitcast=True) / most
        scale = tl.where(scale < _SMALLEST_SCALE, 0.0, scale)
        tl.store(scale_ptr + places, scale, mask=in_rows)
        # A row of zeros stores zeros. So does a row with a NaN or an infinite value, whose scale then makes it NaN.
        usable = ((scale > 0.0) & (scale < float("inf")))[:, None]
        inverse = (1.0 / tl.where(scale > 0.0, scale, 1.0))[:, None]
        low = tl.where(usable, low * inverse, 0.0)
        high = tl.where(usable, high * inverse, 0.0)
        if KIND == "fp8":
            at = values_ptr + places[:, None] * HEAD_DIM + columns
            tl.store(at, _to_fp8(low), mask=low_mask)
            tl.store(at + HALF, _to_fp8(high), mask=high_mask)
        else:
            # Cutting off after adding one half rounds, as the sum is above 0.
            low_bits = (low + (_INT4_ZERO + 0.5)).to(tl.int32)
            high_bits = (high + (_INT4_ZERO + 0.5)).to(tl.int32)
            at = values_ptr + places[:, None] * HALF + columns
            tl.store(at, (low_bits | (high_bits << 4)).to(tl.uint8), mask=low_mask)


@triton.jit
def _load_packed(values_ptr, scale_ptr, places, in_rows, low_mask, high_mask, HEAD_DIM, BLOCK_D, KIND):
    """Both halves of the residual of some rows, float32."""
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    columns = tl.arange(0, BLOCK_D)[None, :]
    if KIND == "int4":
        stored = tl.load(values_ptr + places[:, None] * HALF + columns, mask=low_mask, other=0).to(tl.int32)
        low = ((stored & 15) - _INT4_ZERO).to(tl.float32)
        high = ((stored >> 4) - _INT4_ZERO).to(tl.float32)
    else:
        at = values_ptr + places[:, None] * HEAD_DIM + columns
        low_stored = tl.load(at, mask=low_mask, other=0)
        high_stored = tl.load(at + HALF, mask=high_mask, other=0)
        if KIND == "fp8":
            low = _from_fp8(low_stored)
            high = _from_fp8(high_stored)
        else:
            low = low_stored.to(tl.float32)
            high = high_stored.to(tl.float32)
    if KIND != "full":
        scale = tl.load(scale_ptr + places, mask=in_rows, other=0.0)[:, None]
        low *= scale
        high *= scale
    return low, high


@triton.jit
def _merge_half(output_ptr, other_ptr, dense_ptr, mask, own_weight, weight, nothing):
    """Store dense attention of one half and return its residual, float32."""
    kept = tl.load(output_ptr, mask=mask, other=0.0).to(tl.float32)
    rest = tl.load(other_ptr, mask=mask, other=0.0).to(tl.float32)
    # The two weights apart, so that values near the largest number do not overflow as their difference would.
    dense = own_weight * kept + weight * rest
    tl.store(dense_ptr, dense.to(dense_ptr.dtype.element_ty), mask=mask)
    return tl.where(nothing, 0.0, weight * (rest - kept))


@triton.jit(do_not_specialize=_SIZES)
def _residual_merge_kernel(
    output_ptr,
    lse_ptr,
    other_ptr,
    other_lse_ptr,
    dense_ptr,
    values_ptr,
    scale_ptr,
    stride_ob,
    stride_oh,
    stride_os,
    stride_cb,
    stride_ch,
    stride_cs,
    stride_db,
    stride_dh,
    stride_ds,
    heads,
    length,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    in_rows = rows < length
    places = tl.program_id(1).to(tl.int64) * length + rows
    columns = tl.arange(0, BLOCK_D)[None, :]
    low_mask = in_rows[:, None] & (columns < HALF)
    high_mask = in_rows[:, None] & (columns < HEAD_DIM - HALF)

    own_lse = tl.load(lse_ptr + places, mask=in_rows, other=0.0).to(tl.float32)
    other_lse = tl.load(other_lse_ptr + places, mask=in_rows, other=0.0).to(tl.float32)
    # Equal infinities have no difference: both parts are then empty, and both outputs are 0.
    gap = tl.where(own_lse == other_lse, 0.0, other_lse - own_lse)[:, None]
    own_weight, weight, nothing = tl.sigmoid(-gap), tl.sigmoid(gap), gap == float("-inf")

    output_ptr += (batch * stride_ob + head * stride_oh + rows[:, None] * stride_os) * STRIDE_UNIT + columns
    other_ptr += (batch * stride_cb + head * stride_ch + rows[:, None] * stride_cs) * STRIDE_UNIT + columns
    dense_ptr += (batch * stride_db + head * stride_dh + rows[:, None] * stride_ds) * STRIDE_UNIT + columns
    low = _merge_half(output_ptr, other_ptr, dense_ptr, low_mask, own_weight, weight, nothing)
    output_ptr, other_ptr, dense_ptr = output_ptr + HALF, other_ptr + HALF, dense_ptr + HALF
    high = _merge_half(output_ptr, other_ptr, dense_ptr, high_mask, own_weight, weight, nothing)
    _store_packed(values_ptr, scale_ptr, places, in_rows, low, high, low_mask, high_mask, HEAD_DIM, BLOCK_D, KIND)


@triton.jit(do_not_specialize=_ADD_SIZES)
def _residual_add_kernel(
    output_ptr,
    values_ptr,
    scale_ptr,
    before_values_ptr,
    before_scale_ptr,
    factor_ptr,
    sum_ptr,
    stride_ob,
    stride_oh,
    stride_os,
    stride_db,
    stride_dh,
    stride_ds,
    heads,
    length,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    in_rows = rows < length
    places = tl.program_id(1).to(tl.int64) * length + rows
    columns = tl.arange(0, BLOCK_D)[None, :]
    low_mask = in_rows[:, None] & (columns < HALF)
    high_mask = in_rows[:, None] & (columns < HEAD_DIM - HALF)

    low, high = _load_packed(values_ptr, scale_ptr, places, in_rows, low_mask, high_mask, HEAD_DIM, BLOCK_D, KIND)
    if before_values_ptr is not None:
        before_low, before_high = _load_packed(
            before_values_ptr, before_scale_ptr, places, in_rows, low_mask, high_mask, HEAD_DIM, BLOCK_D, KIND
        )
        factor = tl.load(factor_ptr)
        low += factor * (low - before_low)
        high += factor * (high - before_high)
    output_ptr += (batch * stride_ob + head * stride_oh + rows[:, None] * stride_os) * STRIDE_UNIT + columns
    sum_ptr += (batch * stride_db + head * stride_dh + rows[:, None] * stride_ds) * STRIDE_UNIT + columns
    low += tl.load(output_ptr, mask=low_mask, other=0.0).to(tl.float32)
    high += tl.load(output_ptr + HALF, mask=high_mask, other=0.0).to(tl.float32)
    tl.store(sum_ptr, low.to(sum_ptr.dtype.element_ty), mask=low_mask)
    tl.store(sum_ptr + HALF, high.to(sum_ptr.dtype.element_ty), mask=high_mask)


def _options(dtype: torch.dtype, head_dim: int, kind: str) -> dict[str, Any]:
    block_d = max(triton.next_power_of_2((head_dim + 1) // 2), 16)
    tile = {"BLOCK_S": max(_TILE_BYTES // (block_d * dtype.itemsize), 1), "BLOCK_D": block_d, "num_warps": 4}
    return {"HEAD_DIM": head_dim, "KIND": kind, **tile, **COMPILE_OPTIONS}


def _kind_of(values: torch.Tensor) -> str:
    return {torch.uint8: "int4", torch.float8_e4m3fn: "fp8"}.get(values.dtype, "full")


def _bytes(values: torch.Tensor) -> torch.Tensor:
    """An fp8 residual as bytes, which every version of Triton and every GPU reads; others as they are."""
    return values.view(torch.uint8) if values.dtype == torch.float8_e4m3fn else values


def _strides(names: str, *tensors: torch.Tensor) -> dict[str, int]:
    """The strides of each tensor but the last, under the kernel's names, and the unit that they are in."""
    pairs = zip(names, tensors, strict=True)
    strides = {f"stride_{name}{axis}": tensor.stride(at) for name, tensor in pairs for at, axis in enumerate("bhs")}
    unit = math.gcd(_STRIDE_UNIT, *strides.values())
    return {**{name: stride // unit for name, stride in strides.items()}, "STRIDE_UNIT": unit}


def _grid_and_sizes(output: torch.Tensor, kind: str) -> tuple[tuple[int, int], dict[str, Any]]:
    batch, heads, length, head_dim = output.shape
    options = _options(output.dtype, head_dim, kind)
    grid = rows_by_heads(triton.cdiv(length, options["BLOCK_S"]), batch, heads)
    return grid, {"heads": heads, "length": length, **options}


def merge_arguments(
    output: torch.Tensor,
    lse: torch.Tensor,
    other: torch.Tensor,
    other_lse: torch.Tensor,
    dense: torch.Tensor,
    packed: Packed,
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and arguments of `_residual_merge_kernel`, which fills `dense` and `packed`.

    Last dimensions have stride 1; log-sum-exps and the packed residual are contiguous.
    """
    grid, sizes = _grid_and_sizes(output, _kind_of(packed.values))
    tensors = {
        "output_ptr": output,
        "lse_ptr": lse,
        "other_ptr": other,
        "other_lse_ptr": other_lse,
        "dense_ptr": dense,
        "values_ptr": _bytes(packed.values),
        "scale_ptr": packed.scale,
    }
    return grid, {**tensors, **_strides("ocd", output, other, dense), **sizes}


def add_arguments(
    output: torch.Tensor, packed: Packed, before: Packed | None, factor: torch.Tensor | None, total: torch.Tensor
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and arguments of `_residual_add_kernel`, which fills `total`. Layouts as for `merge_arguments`.

    `factor` is float32, 0-d, and goes with `before`.
    """
    grid, sizes = _grid_and_sizes(output, _kind_of(packed.values))
    tensors = {
        "output_ptr": output,
        "values_ptr": _bytes(packed.values),
        "scale_ptr": packed.scale,
        "before_values_ptr": None if before is None else _bytes(before.values),
        "before_scale_ptr": None if before is None else before.scale,
        "factor_ptr": factor,
        "sum_ptr": total,
    }
    return grid, {**tensors, **_strides("od", output, total), **sizes}


def _check(output: torch.Tensor) -> None:
    if output.dtype not in SUPPORTED_DTYPES:
        names = ", ".join(str(dtype) for dtype in SUPPORTED_DTYPES)
        raise ValueError(f"output must be one of {names} for the triton backend, got {output.dtype}")


def _empty(output: torch.Tensor) -> torch.Tensor:
    """Memory for a result in output's layout, with a dense last dimension."""
    return torch.empty_like(unit_inner_stride(output))


def _merge_results(output: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for dense attention, values and scales; an operator has no optional result, so full has no scales."""
    values, scale = empty_packed(output, kind)
    return _empty(output), values, output.new_empty(0, dtype=torch.float32) if scale is None else scale


@torch.library.custom_op("xattn_video::triton_residual_merge", mutates_args=())
def _merge(
    output: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dense, values, scale = _merge_results(output, kind)
    if output.numel():
        packed = Packed(values, None if kind == "full" else scale)
        parts = unit_inner_stride(output), lse.contiguous(), unit_inner_stride(other), other_lse.contiguous()
        grid, arguments = merge_arguments(*parts, dense, packed)
        with device_guard(output):
            _residual_merge_kernel[grid](**arguments)
    return dense, values, scale


@_merge.register_fake
def _(output, lse, other, other_lse, kind):
    return _merge_results(output, kind)


@torch.library.custom_op("xattn_video::triton_residual_add", mutates_args=())
def _add(
    output: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor | None,
    before_values: torch.Tensor | None,
    before_scale: torch.Tensor | None,
    factor: torch.Tensor | None,
) -> torch.Tensor:
    total = _empty(output)
    if output.numel():
        packed = Packed(values, scale)
        before = None if before_values is None else Packed(before_values, before_scale)
        grid, arguments = add_arguments(unit_inner_stride(output), packed, before, factor, total)
        with device_guard(output):
            _residual_add_kernel[grid](**arguments)
    return total


@_add.register_fake
def _(output, values, scale, before_values, before_scale, factor):
    return _empty(output)


def merge(
    output: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor, kind: str
) -> tuple[torch.Tensor, Packed]:
    """`ops.residual.merge` by one kernel, which reads both outputs once.

    Raises:
        ValueError: unknown kind, or a dtype other than float32, float16 and bfloat16.
    """
    _check(output)
    dense, values, scale = _merge(output, lse, other, other_lse, kind)
    return dense, Packed(values, None if kind == "full" else scale)


def add(
    output: torch.Tensor, packed: Packed, before: Packed | None = None, factor: float | torch.Tensor = 0.0
) -> torch.Tensor:
    """`ops.residual.add` by one kernel, of the residuals that `merge` made.

    A new factor neither compiles the kernel again nor makes the host wait.

    Raises:
        ValueError: a dtype other than float32, float16 and bfloat16.
    """
    _check(output)
    if before is None:
        alone: torch.Tensor = _add(output, *packed, None, None, None)
        return alone
    if not isinstance(factor, torch.Tensor):
        # filled on the device: a copy of a number there would make the host wait
        factor = torch.full((), factor, dtype=torch.float32, device=output.device)
    total: torch.Tensor = _add(output, *packed, *before, factor.float())
    return total
