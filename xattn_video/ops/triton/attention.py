"""Block-sparse attention forward (`reference.block_sparse_forward`) over lists of kept key blocks."""

# Triton gives the parameters of jit functions their types, one launch at a time
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .descriptors import describe, load_rows
from .launch import (
    COMPILE_OPTIONS,
    LN2,
    LOG2E,
    device_guard,
    headroom,
    is_interpreted,
    launch_config,
    positive_scale,
    rows_by_heads,
    unit_inner_stride,
)
from .launch_tables import LaunchConfig
from .primitives import dot, drop_from, finite_max, key_range, load_tile, skip_below

# the smallest tile that tl.dot takes
MIN_BLOCK_SIZE = 16


@triton.jit
def _attend_kept_blocks(
    q,
    acc,
    row_max,
    row_sum,
    k_ptr,
    v_ptr,
    list_ptr,
    k_offsets,
    v_offsets,
    stride_ks,
    stride_vs,
    first,
    split,
    resume,
    stop,
    batch,
    kv_head,
    query_positions,
    kv_start,
    kv_stop,
    qk_scale,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADROOM: tl.constexpr,
    TMA: tl.constexpr,
    HEADS_INSIDE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Online softmax over the list entries [first, split) and [resume, stop); MASKED applies the token-level masks.

    With TMA the pointers are tensor descriptors of all keys and values, and the strides and offsets are not looked at.
    """
    SUB_TILES: tl.constexpr = BLOCK_SIZE // BLOCK_N
    MASK_D: tl.constexpr = BLOCK_D != HEAD_DIM
    # see headroom for why float32 has it apart
    SCALED: tl.constexpr = q.dtype == tl.float32
    EXPONENT: tl.constexpr = 0 if SCALED else HEADROOM
    tokens = tl.arange(0, BLOCK_N)
    in_head = tl.arange(0, BLOCK_D) < HEAD_DIM
    head_entries = split - first
    steps = (head_entries + stop - resume) * SUB_TILES
    # An entry is read one step before it is needed: a copy whose address had to be loaded in the same step would be
    # issued too late to run beside the products of the step before.
    next_block = tl.load(list_ptr + tl.where(head_entries > 0, first, resume), mask=steps > 0, other=0)
    for step in range(steps):
        key_token = next_block * BLOCK_SIZE + (step % SUB_TILES) * BLOCK_N
        entry = (step + 1) // SUB_TILES
        entry = tl.where(entry < head_entries, first + entry, resume + entry - head_entries)
        next_block = tl.load(list_ptr + entry, mask=step + 1 < steps, other=0)
        positions = key_token + tokens
        valid = (positions >= kv_start) & (positions < kv_stop)
        if TMA:
            k = load_rows(k_ptr, batch, kv_head, key_token, BLOCK_N, BLOCK_D, HEADS_INSIDE).T
        else:
            k_tile = k_ptr + key_token.to(tl.int64) * stride_ks + k_offsets
            k = load_tile(k_tile, valid[None, :], in_head[:, None], MASKED, MASK_D)  # [BLOCK_D, BLOCK_N]
        logits = dot(q, k, tl.zeros([q.shape[0], BLOCK_N], dtype=tl.float32), INTERPRET)
        if MASKED:
            visible = valid[None, :]
            if CAUSAL:
                visible = visible & (positions[None, :] <= query_positions[:, None])
            logits = tl.where(visible, logits, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(logits, axis=1))
        shift = new_max
        if MASKED:
            shift = finite_max(new_max)
        # One fused multiply-add an element: the maximum is that of the unscaled logits.
        probs = tl.exp2(logits * qk_scale - (shift * qk_scale + EXPONENT)[:, None])  # [BLOCK_M, BLOCK_N]
        if SCALED:
            probs *= 2.0**-HEADROOM
        correction = tl.exp2((row_max - shift) * qk_scale)
        row_sum = row_sum * correction + tl.sum(probs, axis=1)
        acc = acc * correction[:, None]
        if TMA:
            v = load_rows(v_ptr, batch, kv_head, key_token, BLOCK_N, BLOCK_D, HEADS_INSIDE)
            if MASKED:
                # what lies outside the key range may be no number
                v = tl.where(valid[:, None], v, 0.0)
        else:
            v_tile = v_ptr + key_token.to(tl.int64) * stride_vs + v_offsets
            v = load_tile(v_tile, valid[:, None], in_head[None, :], MASKED, MASK_D)  # [BLOCK_N, BLOCK_D]
        if not INTERPRET:
            probs = probs.to(v.dtype)
        acc = dot(probs, v, acc, INTERPRET)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["Hq", "Sq", "Sk", "Nq", "Nk"])
def _block_sparse_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    output_ptr,
    lse_ptr,
    indices_ptr,
    counts_ptr,
    kv_start_ptr,
    kv_lens_ptr,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_ob,
    stride_oh,
    stride_os,
    Hq,
    heads_per_kv,
    Sq,
    Sk,
    Nq,
    Nk,
    qk_scale,
    ln2,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADROOM: tl.constexpr,
    TMA: tl.constexpr,
    HEADS_INSIDE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    MASK_D: tl.constexpr = BLOCK_D != HEAD_DIM
    # the longest rows are at the end, causal ones and those of a joint sequence's text: start them first
    query_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // Hq
    head = tl.program_id(1) % Hq
    kv_head = head // heads_per_kv
    kv_start, kv_stop, kv_length = key_range(kv_start_ptr, kv_lens_ptr, batch, Sk)
    offset = kv_length - Sq
    q_ptr += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    if not TMA:
        k_ptr += batch.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
        v_ptr += batch.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh
    output_ptr += batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh

    first_query = query_tile * BLOCK_M
    row = tl.program_id(1).to(tl.int64) * Nq + first_query // BLOCK_SIZE
    list_ptr = indices_ptr + row * Nk
    count = tl.load(counts_ptr + row)

    # blocks that need no mask: [first_whole, stop_whole)
    whole_key = kv_stop
    if CAUSAL:
        whole_key = tl.minimum(whole_key, tl.maximum(first_query + 1 + offset, 0))
    first_whole = (kv_start + BLOCK_SIZE - 1) // BLOCK_SIZE
    stop_whole = tl.maximum(whole_key // BLOCK_SIZE, first_whole)
    first_entry = count * 0
    if kv_start_ptr is not None:
        first_entry = skip_below(list_ptr, first_entry, count, first_whole)
    stop_entry = drop_from(list_ptr, first_entry, count, stop_whole)

    queries = first_query + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    tokens = tl.arange(0, BLOCK_N).to(tl.int64)
    real_query = (queries < Sq)[:, None]
    in_head = (columns < HEAD_DIM)[None, :]
    q_tile = q_ptr + queries.to(tl.int64)[:, None] * stride_qs + columns[None, :]
    q = load_tile(q_tile, real_query, in_head, True, MASK_D)  # [BLOCK_M, BLOCK_D]
    k_offsets = tokens[None, :] * stride_ks + columns[:, None]
    v_offsets = tokens[:, None] * stride_vs + columns[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    # whole blocks, then the few that the key range or the diagonal cuts, on both sides of them
    for MASKED in tl.static_range(2):
        acc, row_max, row_sum = _attend_kept_blocks(
            q,
            acc,
            row_max,
            row_sum,
            k_ptr,
            v_ptr,
            list_ptr,
            k_offsets,
            v_offsets,
            stride_ks,
            stride_vs,
            0 if MASKED else first_entry,
            first_entry if MASKED else stop_entry,
            stop_entry,
            count if MASKED else stop_entry,
            batch,
            kv_head,
            queries + offset,
            kv_start,
            kv_stop,
            qk_scale,
            MASKED,
            CAUSAL,
            BLOCK_SIZE,
            BLOCK_N,
            BLOCK_D,
            HEAD_DIM,
            HEADROOM,
            TMA,
            HEADS_INSIDE,
            INTERPRET,
        )

    sees_key = row_sum > 0.0
    row_sum = tl.where(sees_key, row_sum, 1.0)
    output = acc / row_sum[:, None]
    output_tile = output_ptr + queries.to(tl.int64)[:, None] * stride_os + columns[None, :]
    tl.store(output_tile, output.to(output_ptr.dtype.element_ty), mask=real_query & in_head)
    total = row_sum * 2.0**HEADROOM
    lse = tl.where(sees_key, (row_max * qk_scale + tl.log2(total)) * ln2, -float("inf"))
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * Sq + queries, lse, mask=queries < Sq)


def block_sparse_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    *,
    block_size: int,
    causal: bool,
    scale: float,
    kv_start: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
    config: LaunchConfig | None = None,
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and keyword arguments of the kernel, launch options included.

    The tensors have a dense last dimension, and scale is above 0.
    """
    batch, query_heads, q_len, head_dim = query.shape
    config = config or launch_config("block_sparse", query.dtype, head_dim, query.device)
    # a tile lies inside one block
    block_m, block_n = min(config["BLOCK_M"], block_size), min(config["BLOCK_N"], block_size)
    block_d = max(triton.next_power_of_2(head_dim), MIN_BLOCK_SIZE)
    grid = rows_by_heads(triton.cdiv(q_len, block_m), batch, query_heads)
    tma = describe(key, value, block_n, block_d) if config.get("TMA") else None
    strides = {
        f"stride_{name}{axis}": tensor.stride(i)
        for name, tensor in (("q", query), ("k", key), ("v", value), ("o", output))
        for i, axis in enumerate("bhs")
    }
    arguments = {
        "q_ptr": query,
        "k_ptr": tma.key if tma else key,
        "v_ptr": tma.value if tma else value,
        "output_ptr": output,
        "lse_ptr": lse,
        "indices_ptr": indices,
        "counts_ptr": counts,
        "kv_start_ptr": kv_start,
        "kv_lens_ptr": kv_lens,
        **strides,
        "Hq": query_heads,
        "heads_per_kv": query_heads // key.shape[1],
        "Sq": q_len,
        "Sk": key.shape[2],
        "Nq": indices.shape[2],
        "Nk": indices.shape[3],
        "qk_scale": scale * LOG2E,
        "ln2": LN2,
        "CAUSAL": causal,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "HEADROOM": headroom(query.dtype),
        "TMA": tma is not None,
        "HEADS_INSIDE": tma is not None and tma.heads_inside,
        "INTERPRET": is_interpreted(_block_sparse_kernel),
        # fewer rows are for fewer warps
        "num_warps": max(config["num_warps"] * block_m // config["BLOCK_M"], min(config["num_warps"], 4)),
        "num_stages": config["num_stages"],
        **COMPILE_OPTIONS,
    }
    return grid, arguments


def launch_block_sparse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    *,
    scale: float,
    **options: Any,
) -> None:
    """Fill output [B, Hq, Sq, D] and lse float32 [B, Hq, Sq]; the options are those of block_sparse_arguments."""
    if output.numel() == 0:
        return
    query, scale = positive_scale(query, scale)
    query, key, value = unit_inner_stride(query), unit_inner_stride(key), unit_inner_stride(value)
    grid, arguments = block_sparse_arguments(query, key, value, output, lse, indices, counts, scale=scale, **options)
    with device_guard(query):
        _block_sparse_kernel[grid](**arguments)
