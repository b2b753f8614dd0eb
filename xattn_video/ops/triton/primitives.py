"""Device functions shared by the kernels. Shape tags: # [BLOCK_M, BLOCK_N]."""

# Triton gives the parameters of jit functions their types, one launch at a time
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, INTERPRET: tl.constexpr):
    """acc + a @ b with float32 accumulation; float32 operands are multiplied in float32, not in TF32."""
    # the interpreter multiplies the bit patterns of bf16, and NumPy's fp16 product is slow
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_tile(pointers, row_mask, column_mask, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """Load a two-dimensional tile; masked elements read as zero. The masks broadcast against the pointers."""
    if MASK_ROWS and MASK_COLUMNS:
        tile = tl.load(pointers, mask=row_mask & column_mask, other=0.0)
    elif MASK_ROWS:
        tile = tl.load(pointers, mask=row_mask, other=0.0)
    elif MASK_COLUMNS:
        tile = tl.load(pointers, mask=column_mask, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def key_range(kv_start_ptr, kv_lens_ptr, batch, Sk):
    """The valid keys [start, stop) of a batch item, and its length as the causal offset counts it."""
    start = 0
    length = Sk
    if kv_start_ptr is not None:
        start = tl.load(kv_start_ptr + batch)
    if kv_lens_ptr is not None:
        length = tl.load(kv_lens_ptr + batch)
    return start, tl.minimum(length, Sk), length


@triton.jit
def finite_max(row_max):
    """Row maxima with -inf (a row that has seen no key yet) replaced by 0, so that exp2(x - max) is 0 and not NaN."""
    return tl.where(row_max == -float("inf"), 0.0, row_max)


@triton.jit
def skip_below(list_ptr, first, stop, value):
    """Position of the first entry >= value of an ascending list's [first, stop); stop if there is none.

    One entry after the other: a key range or the diagonal cuts one block or two, so this takes two or three loads. A
    binary search takes ten, each of which waits for the one before.
    """
    while tl.load(list_ptr + first, mask=first < stop, other=value) < value:
        first += 1
    return first


@triton.jit
def drop_from(list_ptr, first, stop, value):
    """`skip_below` from the other end: the position behind the last entry < value; first if there is none."""
    while tl.load(list_ptr + stop - 1, mask=first < stop, other=value - 1) >= value:
        stop -= 1
    return stop
