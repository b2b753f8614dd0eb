"""Block selection (`reference.select`) by bisection on the score: no sort, no read by the host.

Scores are not negative, so their bit patterns are ordered like the numbers. 31 halvings find the cut, the least score
for which the blocks above it do not yet hold enough; blocks at the cut itself are taken in index order.
"""

# Triton gives the parameters of jit functions their types, one launch at a time
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..block_lists import empty_lists
from .block_lists import ROW_SIZES, row_options, store_list
from .launch import device_guard, rows_by_heads


@triton.jit
def _mass_ahead(bits, mass, cut, forced_mass):
    """What the forced blocks and those that score above the cut hold together."""
    return forced_mass + tl.sum(tl.where(bits > cut, mass, 0.0), axis=0)


@triton.jit(do_not_specialize=[*ROW_SIZES, *(f"stride_{name}{axis}" for name in "svf" for axis in "bhq")])
def _block_selection_kernel(
    scores_ptr,
    valid_ptr,
    forced_ptr,
    threshold_ptr,
    indices_ptr,
    counts_ptr,
    stride_sb,
    stride_sh,
    stride_sq,
    stride_sk,
    stride_vb,
    stride_vh,
    stride_vq,
    stride_vk,
    stride_fb,
    stride_fh,
    stride_fq,
    stride_fk,
    heads,
    Nq,
    Nk,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row64 = row.to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    in_row = columns < Nk
    columns64 = columns.to(tl.int64)
    scores_ptr += batch * stride_sb + head * stride_sh + row64 * stride_sq
    valid_ptr += batch * stride_vb + head * stride_vh + row64 * stride_vq
    forced_ptr += batch * stride_fb + head * stride_fh + row64 * stride_fq
    scores = tl.load(scores_ptr + columns64 * stride_sk, mask=in_row, other=0.0)
    valid = tl.load(valid_ptr + columns64 * stride_vk, mask=in_row, other=0) != 0
    forced = tl.load(forced_ptr + columns64 * stride_fk, mask=in_row, other=0) != 0
    threshold = tl.load(threshold_ptr + head)

    # sums in float64, as the reference takes them; forced blocks come first
    mass = tl.where(valid, scores, 0.0).to(tl.float64)
    forced_mass = tl.sum(tl.where(forced, mass, 0.0), axis=0)
    candidate = valid & (forced == 0)
    mass = tl.where(candidate, mass, 0.0)
    # blocks that cannot be chosen get a pattern below every score
    bits = tl.where(candidate, scores.to(tl.int32, bitcast=True), -1)
    wanted = threshold * (forced_mass + tl.sum(mass, axis=0))

    # invariant: above `high` there is not enough yet, above `low` there is (or low is -1)
    low = tl.min(bits * 0, axis=0) - 1
    high = tl.max(bits, axis=0)
    while high - low > 1:
        # the patterns of two scores of 2 or more do not add up in 32 bits
        middle = low + (high - low) // 2
        enough = _mass_ahead(bits, mass, middle, forced_mass) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    ahead = _mass_ahead(bits, mass, high, forced_mass)
    at_cut = bits == high
    earlier = tl.cumsum(at_cut.to(tl.int32), axis=0) - 1
    cut_mass = tl.max(tl.where(at_cut, mass, 0.0), axis=0)
    taken = (bits > high) | (at_cut & (ahead + earlier.to(tl.float64) * cut_mass < wanted))
    # a row without mass keeps its first block: the first forced one, or else the first valid one
    first_valid = tl.min(tl.where(valid, columns, BLOCK_K), axis=0)
    alone = tl.where(tl.max(forced.to(tl.int32), axis=0) == 0, first_valid, BLOCK_K)
    alone = tl.where(wanted > 0.0, BLOCK_K, alone)
    kept = forced | (taken & candidate) | (columns == alone)
    # a mass that is infinite or no number keeps all, as the reference does
    kept = tl.where((threshold >= 1.0) | (wanted - wanted != 0.0), valid, kept)
    kept = kept & valid
    place = tl.program_id(1).to(tl.int64) * Nq + row64
    store_list(kept, columns, Nk, indices_ptr + place * Nk, counts_ptr + place)


def launch_block_selection(
    scores: torch.Tensor,
    valid: torch.Tensor,
    forced: torch.Tensor,
    threshold: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Fill the lists of kept blocks: indices int32 [B, H, Nq, Nk], counts int32 [B, H, Nq].

    scores float32 [B, H, Nq, Nk]; valid and forced bool, broadcastable to it; threshold float64 [H].
    """
    if scores.numel() == 0:
        return
    batch, heads, query_blocks, key_blocks = scores.shape
    # bytes, which every version of Triton reads; an expanded dimension has stride 0
    valid, forced = (flags.expand(scores.shape).view(torch.int8) for flags in (valid, forced))
    strides = (*scores.stride(), *valid.stride(), *forced.stride())
    with device_guard(scores):
        _block_selection_kernel[rows_by_heads(query_blocks, batch, heads)](
            scores,
            valid,
            forced,
            threshold,
            indices,
            counts,
            *strides,
            heads,
            query_blocks,
            key_blocks,
            **row_options(key_blocks),
        )


@torch.library.custom_op("xattn_video::triton_block_selection", mutates_args=())
def _block_selection(
    scores: torch.Tensor, valid: torch.Tensor, forced: torch.Tensor, threshold: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    indices, counts = empty_lists(scores)
    launch_block_selection(scores, valid, forced, threshold, indices, counts)
    return indices, counts


@_block_selection.register_fake
def _(scores, valid, forced, threshold):
    return empty_lists(scores)


def select(
    scores: torch.Tensor, valid: torch.Tensor, forced: torch.Tensor, *, threshold: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest set of valid blocks that holds `threshold` of each row's mass (the paper's section 2.2), as lists.

    scores [B, H, Nq, Nk], not negative, taken as float32; valid and forced bool, broadcastable to it, forced a
    subset of valid; threshold a number, or a tensor [H] or 0-d. Returns the set that reference.select gives: indices
    int32 [B, H, Nq, Nk], ascending, 0 past the count, and counts int32 [B, H, Nq].
    """
    heads, device = scores.shape[1], scores.device
    if isinstance(threshold, torch.Tensor):
        shares = threshold.to(device=device, dtype=torch.float64).expand(heads).contiguous()
    else:
        shares = torch.full((heads,), threshold, dtype=torch.float64, device=device)
    lists: tuple[torch.Tensor, torch.Tensor] = _block_selection(scores.float(), valid, forced, shares)
    return lists
