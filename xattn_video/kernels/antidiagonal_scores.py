"""Antidiagonal block scores (ALGORITHM.md section 1) without the [Sq/S, Sk/S] matrix in memory.

Every program owns a tile of query groups and walks over the visible key groups twice: the first walk finds each row's
maximum and sum, the second adds the normalised probabilities up into blocks. Twice the GEMM, no memory but the scores.
"""

# Triton gives the parameters of jit functions their types, one launch at a time
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..blocks import num_blocks
from .launch import (
    COMPILE_OPTIONS,
    LOG2E,
    LaunchConfig,
    check_supported,
    device_guard,
    is_interpreted,
    launch_config,
    unit_inner_stride,
)
from .primitives import dot, finite_max, key_range, load_tile


@triton.jit
def _group_logits(
    q_ptr,
    k_ptr,
    stride_qs,
    stride_ks,
    query_groups,
    key_groups,
    first_query,
    Sq,
    kv_start,
    kv_stop,
    offset,
    qk_scale,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Base-2 logits of a tile of query groups against a tile of key groups, -inf where a group is not visible."""
    D_STEPS: tl.constexpr = (HEAD_DIM + BLOCK_K - 1) // BLOCK_K
    MASK_D: tl.constexpr = HEAD_DIM % BLOCK_K != 0
    columns = tl.arange(0, BLOCK_K)
    # the antidiagonal: key token i of its group meets query token S-1-i
    query_tokens = query_groups * STRIDE + (STRIDE - 1)
    key_tokens = key_groups * STRIDE
    q_rows = q_ptr + query_tokens.to(tl.int64)[:, None] * stride_qs + columns[None, :]  # [BLOCK_R, BLOCK_K]
    k_rows = k_ptr + key_tokens.to(tl.int64)[None, :] * stride_ks + columns[:, None]  # [BLOCK_K, BLOCK_C]
    logits = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for step in range(STRIDE * D_STEPS):
        i = step // D_STEPS
        d = (step % D_STEPS) * BLOCK_K
        in_head = columns < HEAD_DIM - d
        valid_query = (query_tokens - i >= first_query) & (query_tokens - i < Sq)
        valid_key = (key_tokens + i >= kv_start) & (key_tokens + i < kv_stop)
        q = load_tile(q_rows - (i.to(tl.int64) * stride_qs - d), valid_query[:, None], in_head[None, :], True, MASK_D)
        k = load_tile(k_rows + (i.to(tl.int64) * stride_ks + d), valid_key[None, :], in_head[:, None], True, MASK_D)
        logits = dot(q, k, logits, INTERPRET)
    # both groups must hold a valid token
    keys_seen = tl.maximum(key_tokens, kv_start) < tl.minimum(key_tokens + STRIDE, kv_stop)
    queries_seen = tl.maximum(query_groups * STRIDE, first_query) < tl.minimum(query_tokens + 1, Sq)
    visible = keys_seen[None, :] & queries_seen[:, None]
    if CAUSAL:
        visible = visible & (key_tokens[None, :] <= (offset + query_tokens)[:, None])
    return tl.where(visible, logits * qk_scale, -float("inf"))


@triton.jit
def _antidiagonal_scores_kernel(
    q_ptr,
    k_ptr,
    scores_ptr,
    kv_start_ptr,
    kv_lens_ptr,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    Hq,
    heads_per_kv,
    Sq,
    Sk,
    Nq,
    Nk,
    qk_scale,
    STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    R_BLOCKS: tl.constexpr = BLOCK_R // GROUPS
    C_BLOCKS: tl.constexpr = BLOCK_C // GROUPS
    first_group = tl.program_id(0) * BLOCK_R
    batch = tl.program_id(1) // Hq
    head = tl.program_id(1) % Hq
    kv_start, kv_stop, kv_length = key_range(kv_start_ptr, kv_lens_ptr, batch, Sk)
    offset = kv_length - Sq
    # a query before the first valid key sees nothing and counts as padding
    first_query = 0
    if CAUSAL:
        first_query = tl.maximum(kv_start - offset, 0)
    q_ptr += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    k_ptr += batch.to(tl.int64) * stride_kb + (head // heads_per_kv).to(tl.int64) * stride_kh

    # tiles of key groups that hold a visible group: [first_tile, stop_tile)
    stop_group = (kv_stop + STRIDE - 1) // STRIDE
    if CAUSAL:
        last_visible = offset + (first_group + BLOCK_R) * STRIDE - 1
        stop_group = tl.minimum(stop_group, tl.maximum(last_visible + STRIDE, 0) // STRIDE)
    first_tile = (kv_start // STRIDE) // BLOCK_C
    stop_tile = tl.maximum((stop_group + BLOCK_C - 1) // BLOCK_C, first_tile)

    query_groups = first_group + tl.arange(0, BLOCK_R)
    row_max = tl.full([BLOCK_R], -float("inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_R], dtype=tl.float32)
    for tile in range(first_tile, stop_tile):
        key_groups = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        logits = _group_logits(
            q_ptr,
            k_ptr,
            stride_qs,
            stride_ks,
            query_groups,
            key_groups,
            first_query,
            Sq,
            kv_start,
            kv_stop,
            offset,
            qk_scale,
            STRIDE,
            HEAD_DIM,
            CAUSAL,
            BLOCK_R,
            BLOCK_C,
            BLOCK_K,
            INTERPRET,
        )
        new_max = tl.maximum(row_max, tl.max(logits, axis=1))
        shift = finite_max(new_max)
        row_sum = row_sum * tl.exp2(row_max - shift) + tl.sum(tl.exp2(logits - shift[:, None]), axis=1)
        row_max = new_max

    shift = finite_max(row_max)
    # a row without a visible key has sum 0 and keeps mass 0
    inverse = tl.where(row_sum > 0.0, 1.0 / tl.where(row_sum > 0.0, row_sum, 1.0), 0.0)
    rows = first_group // GROUPS + tl.arange(0, R_BLOCKS)
    columns = tl.arange(0, C_BLOCKS)
    scores_ptr += tl.program_id(1).to(tl.int64) * Nq * Nk
    row_ptrs = scores_ptr + rows.to(tl.int64)[:, None] * Nk
    for tile in range(first_tile, stop_tile):
        key_groups = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        logits = _group_logits(
            q_ptr,
            k_ptr,
            stride_qs,
            stride_ks,
            query_groups,
            key_groups,
            first_query,
            Sq,
            kv_start,
            kv_stop,
            offset,
            qk_scale,
            STRIDE,
            HEAD_DIM,
            CAUSAL,
            BLOCK_R,
            BLOCK_C,
            BLOCK_K,
            INTERPRET,
        )
        probs = tl.exp2(logits - shift[:, None])
        sums = tl.sum(tl.reshape(probs, [BLOCK_R, C_BLOCKS, GROUPS]), axis=2) * inverse[:, None]
        block_sums = tl.sum(tl.reshape(sums, [R_BLOCKS, GROUPS, C_BLOCKS]), axis=1)  # [R_BLOCKS, C_BLOCKS]
        blocks = tile * C_BLOCKS + columns
        tl.store(row_ptrs + blocks[None, :], block_sums, mask=(rows < Nq)[:, None] & (blocks < Nk)[None, :])

    # the blocks that no query of the tile sees; a skipped tile keeps its index, so [0, first) and [stop, end)
    skipped = first_tile + tl.maximum((Nk + C_BLOCKS - 1) // C_BLOCKS - stop_tile, 0)
    for count in range(skipped):
        tile = tl.where(count < first_tile, count, count - first_tile + stop_tile)
        blocks = tile * C_BLOCKS + columns
        zeros = tl.zeros([R_BLOCKS, C_BLOCKS], dtype=tl.float32)
        tl.store(row_ptrs + blocks[None, :], zeros, mask=(rows < Nq)[:, None] & (blocks < Nk)[None, :])


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
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and keyword arguments of the kernel, launch options included; query and key have a dense last dimension."""
    batch, query_heads, q_len, head_dim = query.shape
    config = config or launch_config("antidiagonal_scores", query.dtype, head_dim, query.device)
    groups = block_size // stride
    # a tile holds whole blocks
    block_r, block_c = max(config["BLOCK_R"], groups), max(config["BLOCK_C"], groups)
    grid = (triton.cdiv(triton.cdiv(q_len, stride), block_r), batch * query_heads)
    arguments = {
        "q_ptr": query,
        "k_ptr": key,
        "scores_ptr": scores,
        "kv_start_ptr": kv_start,
        "kv_lens_ptr": kv_lens,
        "stride_qb": query.stride(0),
        "stride_qh": query.stride(1),
        "stride_qs": query.stride(2),
        "stride_kb": key.stride(0),
        "stride_kh": key.stride(1),
        "stride_ks": key.stride(2),
        "Hq": query_heads,
        "heads_per_kv": query_heads // key.shape[1],
        "Sq": q_len,
        "Sk": key.shape[2],
        "Nq": scores.shape[2],
        "Nk": scores.shape[3],
        "qk_scale": scale / stride * LOG2E,
        "STRIDE": stride,
        "GROUPS": groups,
        "HEAD_DIM": head_dim,
        "CAUSAL": causal,
        "BLOCK_R": block_r,
        "BLOCK_C": block_c,
        "BLOCK_K": config["BLOCK_K"],
        "INTERPRET": is_interpreted(_antidiagonal_scores_kernel),
        "num_warps": config["num_warps"],
        "num_stages": config["num_stages"],
        **COMPILE_OPTIONS,
    }
    return grid, arguments


def launch_antidiagonal_scores(query: torch.Tensor, key: torch.Tensor, scores: torch.Tensor, **options: Any) -> None:
    """Fill scores [B, Hq, Nq, Nk] float32; the options are those of scores_arguments."""
    if scores.numel() == 0:
        return
    grid, arguments = scores_arguments(unit_inner_stride(query), unit_inner_stride(key), scores, **options)
    with device_guard(query):
        _antidiagonal_scores_kernel[grid](**arguments)


@torch.library.custom_op("xattn_video::triton_antidiagonal_scores", mutates_args=())
def _antidiagonal_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    stride: int,
    block_size: int,
    causal: bool,
    scale: float,
    kv_start: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
) -> torch.Tensor:
    scores = _empty_scores(query, key, block_size)
    launch_antidiagonal_scores(
        query,
        key,
        scores,
        stride=stride,
        block_size=block_size,
        causal=causal,
        scale=scale,
        kv_start=kv_start,
        kv_lens=kv_lens,
    )
    return scores


@_antidiagonal_scores.register_fake
def _(query, key, stride, block_size, causal, scale, kv_start, kv_lens):
    return _empty_scores(query, key, block_size)


def _empty_scores(query: torch.Tensor, key: torch.Tensor, block_size: int) -> torch.Tensor:
    shape = (*query.shape[:2], num_blocks(query.shape[2], block_size), num_blocks(key.shape[2], block_size))
    return torch.empty(shape, dtype=torch.float32, device=query.device)


def antidiagonal_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    stride: int,
    block_size: int,
    causal: bool,
    scale: float,
    kv_start: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
) -> torch.Tensor:
    """Block scores of XAttention (ALGORITHM.md section 1; paper section 2.1).

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
    return _antidiagonal_scores(query, key, stride, block_size, causal, scale, kv_start, kv_lens)
