"""Antidiagonal block scores (`reference.antidiagonal_scores`) in one pass, without the [Sq/S, Sk/S] matrix in memory.

A program owns a strip of query groups (several query blocks) and walks over the visible key groups once. Each row's sum
over each key block, relative to the row's running maximum, goes to the program's scratch, and so does that maximum, one
a row and tile. At the end the program reads both back, scales, and adds the rows up into blocks. (Rows cannot be added
up earlier, since each has a total of its own; one log-sum-exp instead of sum and maximum takes more instructions.)

One program a processor uses its scratch for strip after strip, so its size does not depend on Sq: processors * BLOCK_R
* 4 B a key block, and 1/8 more for the maxima. With 128 rows and 132 processors: 45 MB at 591 blocks (Wan 14B, 720p),
71 MB at 931 (HunyuanVideo, 720p); the L2 cache of an H100 has 50 MB. What does not stay there is written and read once.
"""

# Triton gives the parameters of jit functions their types, one launch at a time
# mypy: allow-untyped-defs

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..key_mask import num_blocks
from .launch import (
    COMPILE_OPTIONS,
    LOG2E,
    check_supported,
    device_guard,
    is_interpreted,
    launch_config,
    positive_scale,
    processors,
    unit_inner_stride,
)
from .launch_tables import LaunchConfig
from .primitives import dot, finite_max, key_range, load_tile

# strides are passed in units of 8 elements where they can be: 16 bytes of a 16-bit type, the widest load
STRIDE_UNIT = 8
# key blocks that a program reads back from its scratch strip at a time
READ_BLOCKS = 64


@triton.jit
def _groups_seen(query_group, offset, STRIDE: tl.constexpr):
    """Key groups that a query group sees under causal masking: c * S <= offset + r * S + S - 1."""
    return tl.maximum(offset + (query_group + 2) * STRIDE - 1, 0) // STRIDE


@triton.jit(do_not_specialize=["tiles", "batch_heads", "Hq", "Sq", "Sk", "Nq", "Nk"])
def _antidiagonal_scores_kernel(
    q_ptr,
    k_ptr,
    scores_ptr,
    sums_ptr,
    maxima_ptr,
    kv_start_ptr,
    kv_lens_ptr,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    tiles,
    batch_heads,
    Hq,
    heads_per_kv,
    Sq,
    Sk,
    Nq,
    Nk,
    qk_scale,
    dot_steps,
    STRIDE_UNIT: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    READ_TILES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    C_BLOCKS: tl.constexpr = BLOCK_C // GROUPS
    TILE_TOKENS: tl.constexpr = BLOCK_C * STRIDE
    D_STEPS: tl.constexpr = (HEAD_DIM + BLOCK_K - 1) // BLOCK_K
    MASK_D: tl.constexpr = HEAD_DIM % BLOCK_K != 0
    # rows of 40 or 72 elements are aligned too: the product shows it to the compiler
    stride_qs *= STRIDE_UNIT
    stride_ks *= STRIDE_UNIT
    strip_rows = tl.arange(0, BLOCK_R)[:, None]
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_R * tiles
    strip_sums = sums_ptr + first_row * C_BLOCKS + strip_rows.to(tl.int64) * (tiles * C_BLOCKS)  # [BLOCK_R, 1]
    strip_maxima = maxima_ptr + first_row + strip_rows
    columns = tl.arange(0, BLOCK_K)
    tile_groups = tl.arange(0, BLOCK_C)
    strips = (Sq + BLOCK_R * STRIDE - 1) // (BLOCK_R * STRIDE)
    for work in range(tl.program_id(0), strips * batch_heads, tl.num_programs(0)):
        # one head after the other, so that its keys stay in the cache; causal: the longest strips of all heads first
        strip = work % strips
        batch_head = work // strips
        if CAUSAL:
            strip = strips - 1 - work // batch_heads
            batch_head = work % batch_heads
        first_group = strip * BLOCK_R
        batch = batch_head // Hq
        head = batch_head % Hq
        kv_start, kv_stop, kv_length = key_range(kv_start_ptr, kv_lens_ptr, batch, Sk)
        offset = kv_length - Sq
        # a query before the first valid key sees nothing and counts as padding
        first_query = 0
        if CAUSAL:
            first_query = tl.maximum(kv_start - offset, 0)
        kv_head = head // heads_per_kv
        q_head = q_ptr + (batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh) * STRIDE_UNIT
        k_head = k_ptr + (batch.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh) * STRIDE_UNIT

        query_groups = first_group + tl.arange(0, BLOCK_R)
        # the antidiagonal: key token i of its group meets query token S-1-i
        query_tokens = query_groups * STRIDE + (STRIDE - 1)
        q_rows = q_head + query_tokens.to(tl.int64)[:, None] * stride_qs + columns[None, :]  # [BLOCK_R, BLOCK_K]
        # the key groups that a row sees end at row_stop; a row of padding sees none
        stop_group = (kv_stop + STRIDE - 1) // STRIDE
        seen_by_all = kv_stop // STRIDE
        row_stop = tl.zeros([BLOCK_R], dtype=tl.int32) + stop_group
        if CAUSAL:
            row_stop = tl.minimum(row_stop, _groups_seen(query_groups, offset, STRIDE))
            stop_group = tl.minimum(stop_group, _groups_seen(first_group + BLOCK_R - 1, offset, STRIDE))
            seen_by_all = tl.minimum(seen_by_all, _groups_seen(first_group, offset, STRIDE))
        real = (query_groups * STRIDE < Sq) & ((query_groups + 1) * STRIDE > first_query) & (kv_start < kv_stop)
        row_stop = tl.where(real, row_stop, 0)

        # tiles that hold a visible group: [first_tile, stop_tile); of these [first_whole, stop_whole) need no mask
        first_tile = kv_start // TILE_TOKENS
        stop_tile = tl.maximum((stop_group + BLOCK_C - 1) // BLOCK_C, first_tile)
        first_whole = tl.minimum((kv_start + TILE_TOKENS - 1) // TILE_TOKENS, stop_tile)
        stop_whole = tl.maximum(seen_by_all // BLOCK_C, first_whole)
        whole_strip = (first_group * STRIDE >= first_query) & ((first_group + BLOCK_R) * STRIDE <= Sq)
        stop_whole = tl.where(whole_strip, stop_whole, first_whole)

        row_max = tl.full([BLOCK_R], -float("inf"), dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_R], dtype=tl.float32)
        # whole tiles, then the few that the key range or the diagonal cuts, on both sides of them
        for MASKED in tl.static_range(2):
            first = first_tile if MASKED else first_whole
            head_tiles = first_whole - first
            tail_tiles = stop_tile - stop_whole if MASKED else stop_whole - first_whole
            for tile_step in range(head_tiles + tail_tiles):
                tile = first + tile_step
                if MASKED:
                    tile = tl.where(tile < first_whole, tile, tile + stop_whole - first_whole)
                first_key = tile * BLOCK_C
                key_tokens = (first_key + tile_groups) * STRIDE
                k_rows = k_head + key_tokens.to(tl.int64)[None, :] * stride_ks + columns[:, None]  # [BLOCK_K, BLOCK_C]
                logits = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
                # a constant number of steps would be unrolled, at the price of registers
                for step in range(dot_steps):
                    i = step // D_STEPS
                    d = (step % D_STEPS) * BLOCK_K
                    in_head = columns < HEAD_DIM - d
                    real_query = (query_tokens - i >= first_query) & (query_tokens - i < Sq)
                    real_key = (key_tokens + i >= kv_start) & (key_tokens + i < kv_stop)
                    i = i.to(tl.int64)
                    q_tile = q_rows - (i * stride_qs - d)
                    k_tile = k_rows + (i * stride_ks + d)
                    q = load_tile(q_tile, real_query[:, None], in_head[None, :], MASKED, MASK_D)
                    k = load_tile(k_tile, real_key[None, :], in_head[:, None], MASKED, MASK_D)
                    logits = dot(q, k, logits, INTERPRET)
                if MASKED:
                    started = tile_groups >= kv_start // STRIDE - first_key
                    visible = started[None, :] & (tile_groups[None, :] < (row_stop - first_key)[:, None])
                    logits = tl.where(visible, logits, -float("inf"))
                new_max = tl.maximum(row_max, tl.max(logits, axis=1))
                shift = new_max
                if MASKED:
                    shift = finite_max(new_max)
                # one fused multiply-add an element: the maximum is that of the unscaled logits
                probs = tl.exp2(logits * qk_scale - (shift * qk_scale)[:, None])
                sums = tl.sum(tl.reshape(probs, [BLOCK_R, C_BLOCKS, GROUPS]), axis=2)  # [BLOCK_R, C_BLOCKS]
                row_sum = row_sum * tl.exp2((row_max - shift) * qk_scale) + tl.sum(sums, axis=1)
                row_max = new_max
                tl.store(strip_sums + tile * C_BLOCKS + tl.arange(0, C_BLOCKS)[None, :], sums)
                tl.store(strip_maxima + tile * BLOCK_R, row_max[:, None])

        # a thread reads what others wrote to the strip
        tl.debug_barrier()
        # a row without a visible key has sum 0 and keeps mass 0
        inverse = tl.where(row_sum > 0.0, 1.0 / tl.where(row_sum > 0.0, row_sum, 1.0), 0.0)
        shift = finite_max(row_max)
        rows = first_group // GROUPS + tl.arange(0, BLOCK_R // GROUPS)
        score_rows = scores_ptr + (batch_head.to(tl.int64) * Nq + rows.to(tl.int64))[:, None] * Nk
        for first_read in range(0, tiles, READ_TILES):
            read_tiles = first_read + tl.arange(0, READ_TILES)
            blocks = first_read * C_BLOCKS + tl.arange(0, READ_TILES * C_BLOCKS)
            # the tiles that no query of the strip sees were not written
            written = (read_tiles >= first_tile) & (read_tiles < stop_tile)
            in_written = (blocks >= first_tile * C_BLOCKS) & (blocks < stop_tile * C_BLOCKS)
            sums = tl.load(strip_sums + blocks[None, :], mask=in_written[None, :], other=0.0)
            maxima = tl.load(strip_maxima + read_tiles[None, :] * BLOCK_R, mask=written[None, :], other=-float("inf"))
            weights = tl.exp2((maxima - shift[:, None]) * qk_scale) * inverse[:, None]  # [BLOCK_R, READ_TILES]
            mass = tl.reshape(sums, [BLOCK_R, READ_TILES, C_BLOCKS]) * weights[:, :, None]
            mass = tl.reshape(mass, [BLOCK_R // GROUPS, GROUPS, READ_TILES * C_BLOCKS])
            in_scores = (rows < Nq)[:, None] & (blocks < Nk)[None, :]
            tl.store(score_rows + blocks[None, :], tl.sum(mass, axis=1), mask=in_scores)
        # and may not write the next strip before the slowest has read this one
        tl.debug_barrier()


def scores_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    scores: torch.Tensor,
    *,
    stride: int,
    block_size: int,
    causal: bool,
    scale: float,
    kv_start: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
    config: LaunchConfig | None = None,
    programs: int | None = None,
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and keyword arguments of the kernel, launch options and scratch included.

    query and key have a dense last dimension, and scale is above 0; programs is the largest grid, by default one a
    processor of the GPU.
    """
    batch, query_heads, q_len, head_dim = query.shape
    config = config or launch_config("antidiagonal_scores", query.dtype, head_dim, query.device)
    groups = block_size // stride
    # a tile holds whole blocks
    block_r, block_c = max(config["BLOCK_R"], groups), max(config["BLOCK_C"], groups)
    strips = triton.cdiv(q_len, stride * block_r) * batch * query_heads
    grid = (min(strips, programs or processors(query.device)),)
    tiles = triton.cdiv(key.shape[2], stride * block_c)
    sums = torch.empty((grid[0], block_r, tiles * block_c // groups), dtype=torch.float32, device=query.device)
    maxima = torch.empty((grid[0], tiles, block_r), dtype=torch.float32, device=query.device)
    # head_dim 72, 80 or 96: half a step wastes less than a step that is at most half full
    block_k = config["BLOCK_K"]
    if 0 < head_dim % block_k <= block_k // 2:
        block_k //= 2
    names = ("stride_qb", "stride_qh", "stride_qs", "stride_kb", "stride_kh", "stride_ks")
    strides = dict(zip(names, (*query.stride()[:3], *key.stride()[:3]), strict=True))
    unit = math.gcd(STRIDE_UNIT, *strides.values())
    arguments = {
        "q_ptr": query,
        "k_ptr": key,
        "scores_ptr": scores,
        "sums_ptr": sums,
        "maxima_ptr": maxima,
        "kv_start_ptr": kv_start,
        "kv_lens_ptr": kv_lens,
        **{name: value // unit for name, value in strides.items()},
        "tiles": tiles,
        "batch_heads": batch * query_heads,
        "Hq": query_heads,
        "heads_per_kv": query_heads // key.shape[1],
        "Sq": q_len,
        "Sk": key.shape[2],
        "Nq": scores.shape[2],
        "Nk": scores.shape[3],
        "qk_scale": scale / stride * LOG2E,
        "dot_steps": stride * triton.cdiv(head_dim, block_k),
        "STRIDE_UNIT": unit,
        "STRIDE": stride,
        "GROUPS": groups,
        "HEAD_DIM": head_dim,
        "CAUSAL": causal,
        "BLOCK_R": block_r,
        "BLOCK_C": block_c,
        "BLOCK_K": block_k,
        "READ_TILES": max(READ_BLOCKS * groups // block_c, 1),
        "INTERPRET": is_interpreted(_antidiagonal_scores_kernel),
        "num_warps": config["num_warps"],
        "num_stages": config["num_stages"],
        **COMPILE_OPTIONS,
    }
    return grid, arguments


def launch_antidiagonal_scores(
    query: torch.Tensor, key: torch.Tensor, scores: torch.Tensor, *, scale: float, **options: Any
) -> None:
    """Fill scores [B, Hq, Nq, Nk] float32; the options are those of scores_arguments."""
    if scores.numel() == 0:
        return
    query, scale = positive_scale(query, scale)
    query, key = unit_inner_stride(query), unit_inner_stride(key)
    grid, arguments = scores_arguments(query, key, scores, scale=scale, **options)
    with device_guard(query):
        _antidiagonal_scores_kernel[grid](**arguments)


# Eight parameters: torch takes no KeyMask.
@torch.library.custom_op("xattn_video::triton_antidiagonal_scores", mutates_args=())
def antidiagonal_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    kv_start: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
    *,
    causal: bool,
    stride: int,
    block_size: int,
    scale: float,
) -> torch.Tensor:
    """Block scores of XAttention (`reference.antidiagonal_scores`; the paper's section 2.1).

    query [B, Hq, Sq, D], key [B, Hkv, Sk, D] in float32, float16 or bfloat16; kv_start, kv_lens None or int32 [B].
    Returns float32 [B, Hq, Nq, Nk]; a row sums to the number of real query groups in its block.
    Raises ValueError for other dtypes, head_dim above 256, or more than 128 groups in a block.
    """
    check_supported(query.dtype, query.shape[3])
    if block_size // stride > 128:
        raise ValueError(
            f"block_size / stride must be at most 128 for the triton backend, got {block_size} / {stride}; "
            "use backend='reference'"
        )
    scores = _empty_scores(query, key, block_size)
    bounds: dict[str, Any] = {"causal": causal, "kv_start": kv_start, "kv_lens": kv_lens}
    launch_antidiagonal_scores(query, key, scores, stride=stride, block_size=block_size, scale=scale, **bounds)
    return scores


@antidiagonal_scores.register_fake
def _(query, key, *_, block_size, **__):
    return _empty_scores(query, key, block_size)


def _empty_scores(query: torch.Tensor, key: torch.Tensor, block_size: int) -> torch.Tensor:
    shape = (*query.shape[:2], num_blocks(query.shape[2], block_size), num_blocks(key.shape[2], block_size))
    return torch.empty(shape, dtype=torch.float32, device=query.device)
