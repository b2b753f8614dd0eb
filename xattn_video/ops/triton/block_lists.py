"""Lists of kept blocks, which the attention kernel walks: one program writes a row, without a sort."""

# Triton gives the parameters of jit functions their types, one launch at a time
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..block_lists import empty_lists
from .launch import COMPILE_OPTIONS, device_guard, rows_by_heads

# Sizes that a kernel is not compiled again for, because they change from video to video.
ROW_SIZES = ("heads", "Nq", "Nk")


@triton.jit
def store_list(kept, columns, Nk, list_ptr, count_ptr):
    """Write the columns that are kept in order, 0 up to Nk behind them, and how many they are."""
    flags = kept.to(tl.int32)
    count = tl.sum(flags, axis=0)
    tl.store(list_ptr + tl.cumsum(flags, axis=0) - 1, columns, mask=kept)
    tl.store(list_ptr + columns, columns * 0, mask=(columns >= count) & (columns < Nk))
    tl.store(count_ptr, count)


@triton.jit(do_not_specialize=[*ROW_SIZES, "stride_mb", "stride_mh", "stride_mq"])
def _block_lists_kernel(
    mask_ptr,
    indices_ptr,
    counts_ptr,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    heads,
    Nq,
    Nk,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    mask_ptr += batch * stride_mb + head * stride_mh + row * stride_mq
    kept = tl.load(mask_ptr + columns.to(tl.int64) * stride_mk, mask=columns < Nk, other=0) != 0
    place = tl.program_id(1).to(tl.int64) * Nq + row
    store_list(kept, columns, Nk, indices_ptr + place * Nk, counts_ptr + place)


def row_options(key_blocks: int) -> dict[str, Any]:
    """Launch options of a kernel whose programs hold a row of so many key blocks each."""
    block_k = max(triton.next_power_of_2(key_blocks), 16)
    return {"BLOCK_K": block_k, "num_warps": min(max(block_k // 256, 1), 8), **COMPILE_OPTIONS}


@torch.library.custom_op("xattn_video::triton_block_lists", mutates_args=())
def mask_to_lists(block_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.block_lists.mask_to_lists` by one kernel.

    Returns indices int32 [B, H, Nq, Nk], ascending, 0 past the count, and counts int32 [B, H, Nq].
    """
    indices, counts = empty_lists(block_mask)
    batch, heads, query_blocks, key_blocks = block_mask.shape
    if block_mask.numel():
        with device_guard(block_mask):
            _block_lists_kernel[rows_by_heads(query_blocks, batch, heads)](
                block_mask.view(torch.int8),
                indices,
                counts,
                *block_mask.stride(),
                heads,
                query_blocks,
                key_blocks,
                **row_options(key_blocks),
            )
    return indices, counts


@mask_to_lists.register_fake
def _(block_mask):
    return empty_lists(block_mask)
