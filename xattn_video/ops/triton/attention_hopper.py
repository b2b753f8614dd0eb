"""Block-sparse attention forward for Hopper (sm_90), warp-specialised and written in Gluon: needs Triton 3.6 or newer.

A program computes one block of 128 queries of one head. Its warps have three roles:

    producer      loads the query tile, then the key and value tiles of the kept blocks, in the order of the list
    2 consumers   each attends for 64 of the queries: the product of the next key tile and that of the present value
                  tile are issued together, then comes the softmax, while the other consumer's products run

Tiles lie in a ring of stages. Each stage has a `full` barrier (the copy has arrived) and an `empty` barrier (both
consumers have read it). The list is walked from its end, so that the only block that the end of the keys or the causal
diagonal can cut comes first, outside of the loop.

What the kernel takes, and when it runs, is decided in attention_choice.py.
"""

# Gluon gives the parameters of jit functions their types, one launch at a time
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .descriptors import heads_inside
from .launch import (
    COMPILE_OPTIONS,
    LN2,
    LOG2E,
    device_guard,
    headroom,
    positive_scale,
    rows_by_heads,
    unit_inner_stride,
)
from .launch_tables import LaunchConfig, find_optional_config

# Names that Triton changed after 3.6 and 3.7.
_start_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

# Query rows of a consumer: the warpgroup product has 64.
_ROWS = gl.constexpr(64)
# Registers of a consumer's thread: 240 for each of 256 threads leave 24 for the producer's.
_CONSUMER_REGISTERS = 240
# Rows of a value tile that the producer copies at a time where padding must not be read.
_COPIED_ROWS = gl.constexpr(16)


@gluon.jit
def _copy_tile(descriptor, batch, head, token, barrier, tile, HEADS_INSIDE: gl.constexpr):
    """Start to copy a tile of one head's tokens; the barrier is told its bytes as they arrive."""
    if HEADS_INSIDE:
        _start_copy(descriptor, [batch, token, head, 0], barrier, tile)
    else:
        _start_copy(descriptor, [batch, head, token, 0], barrier, tile)


@gluon.jit
def _copy_cut_values(v_ptr, stride_vs, first_key, kv_stop, tile, BLOCK: gl.constexpr, D: gl.constexpr):
    """Copy a value tile with zeros from kv_stop on: what lies there may be NaN, and its probability is only 0."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    columns = gl.arange(0, D, gl.SliceLayout(0, layout))
    for first in gl.static_range(0, BLOCK, _COPIED_ROWS):
        keys = first_key + first + gl.arange(0, _COPIED_ROWS, gl.SliceLayout(1, layout))
        values = v_ptr + keys.to(gl.int64)[:, None] * stride_vs + columns[None, :]
        part = gl.load(values, mask=(keys < kv_stop)[:, None], other=0.0)
        tile.slice(first, _COPIED_ROWS).store(part)
    # the products read through the asynchronous proxy, and only what all threads have written
    fence_async_shared()
    _barrier()


@gluon.jit
def _produce(
    q_desc,
    k_desc,
    v_desc,
    v_ptr,
    stride_vs,
    q_tiles,
    k_tiles,
    v_tiles,
    q_full,
    k_full,
    k_empty,
    v_full,
    v_empty,
    list_ptr,
    count,
    batch,
    head,
    kv_head,
    first_query,
    kv_stop,
    Q_INSIDE: gl.constexpr,
    K_INSIDE: gl.constexpr,
    V_INSIDE: gl.constexpr,
    PADDED: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK: gl.constexpr,
    D: gl.constexpr,
):
    """Fill the tiles of the ring in the order of the list, from its last entry on."""
    TILE_BYTES: gl.constexpr = BLOCK * D * 2
    if count > 0:
        mbarrier.expect(q_full, 2 * _ROWS * D * 2)
        _copy_tile(q_desc, batch, head, first_query, q_full, q_tiles.index(0), Q_INSIDE)
        _copy_tile(q_desc, batch, head, first_query + _ROWS, q_full, q_tiles.index(1), Q_INSIDE)
        block = gl.load(list_ptr + count - 1)
        for step in range(count):
            first_key = block * BLOCK
            # read the next entry now, one step before its copy starts
            block = gl.load(list_ptr + gl.maximum(count - 2 - step, 0))
            stage = step % STAGES
            # the first round finds every stage empty
            phase = ((step // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), TILE_BYTES)
            _copy_tile(k_desc, batch, kv_head, first_key, k_full.index(stage), k_tiles.index(stage), K_INSIDE)
            mbarrier.wait(v_empty.index(stage), phase)
            v_tile = v_tiles.index(stage)
            if PADDED:
                if first_key + BLOCK > kv_stop:
                    _copy_cut_values(v_ptr, stride_vs, first_key, kv_stop, v_tile.reshape([BLOCK, D]), BLOCK, D)
                    mbarrier.arrive(v_full.index(stage), count=1)
                else:
                    mbarrier.expect(v_full.index(stage), TILE_BYTES)
                    _copy_tile(v_desc, batch, kv_head, first_key, v_full.index(stage), v_tile, V_INSIDE)
            else:
                mbarrier.expect(v_full.index(stage), TILE_BYTES)
                _copy_tile(v_desc, batch, kv_head, first_key, v_full.index(stage), v_tile, V_INSIDE)


@gluon.jit
def _consume(
    GROUP: gl.constexpr,
    q_tiles,
    k_tiles,
    v_tiles,
    q_full,
    k_full,
    k_empty,
    v_full,
    v_empty,
    list_ptr,
    count,
    first_query,
    Sq,
    kv_stop,
    offset,
    output_ptr,
    lse_ptr,
    stride_os,
    qk_scale,
    headroom,
    ln2,
    CAUSAL: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK: gl.constexpr,
    D: gl.constexpr,
):
    """Online softmax over the tiles of the ring for 64 queries, and what comes of it."""
    dtype: gl.constexpr = k_tiles.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16]
    )
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    first_row = first_query + GROUP * _ROWS
    q = q_tiles.index(GROUP).reshape([_ROWS, D])
    acc = gl.zeros([_ROWS, D], gl.float32, o_layout)
    no_logits = gl.zeros([_ROWS, BLOCK], gl.float32, s_layout)
    # the largest scaled logit so far, plus headroom; and the sum of the probabilities relative to it
    shift = gl.full([_ROWS], float("-inf"), gl.float32, s_rows)
    row_sum = gl.zeros([_ROWS], gl.float32, s_rows)
    if count > 0:
        mbarrier.wait(q_full, 0)
        mbarrier.wait(k_full.index(0), 0)
        k = k_tiles.index(0).reshape([BLOCK, D]).permute((1, 0))
        s = warpgroup_mma(q, k, no_logits, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(num_outstanding=0, deps=(s,))
        mbarrier.arrive(k_empty.index(0), count=1)
        keys = gl.load(list_ptr + count - 1) * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, s_layout))
        visible = (keys < kv_stop)[None, :]
        if CAUSAL:
            queries = first_row + gl.arange(0, _ROWS, s_rows)
            visible = visible & (keys[None, :] <= (queries + offset)[:, None])
        s = gl.where(visible, s, float("-inf"))
        shift = gl.max(s, 1) * qk_scale + headroom
        p = gl.exp2(s * qk_scale - shift[:, None])
        row_sum = gl.sum(p, 1)
        p = gl.convert_layout(p.to(dtype), p_layout)
        for step in range(1, count):
            stage = step % STAGES
            prior = (step - 1) % STAGES
            mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
            mbarrier.wait(v_full.index(prior), ((step - 1) // STAGES) & 1)
            k = k_tiles.index(stage).reshape([BLOCK, D]).permute((1, 0))
            s_token = warpgroup_mma(q, k, no_logits, use_acc=False, is_async=True)
            v = v_tiles.index(prior).reshape([BLOCK, D])
            acc_token = warpgroup_mma(p, v, acc, is_async=True)
            s = warpgroup_mma_wait(num_outstanding=1, deps=(s_token,))
            mbarrier.arrive(k_empty.index(stage), count=1)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc_token,))
            mbarrier.arrive(v_empty.index(prior), count=1)
            new_shift = gl.maximum(shift, gl.max(s, 1) * qk_scale + headroom)
            p = gl.exp2(s * qk_scale - new_shift[:, None])
            correction = gl.exp2(shift - new_shift)
            row_sum = row_sum * correction + gl.sum(p, 1)
            shift = new_shift
            acc = acc * gl.convert_layout(correction, o_rows)[:, None]
            p = gl.convert_layout(p.to(dtype), p_layout)
        last = (count - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((count - 1) // STAGES) & 1)
        acc = warpgroup_mma(p, v_tiles.index(last).reshape([BLOCK, D]), acc, is_async=False)
        acc = acc * gl.convert_layout(1.0 / row_sum, o_rows)[:, None]
    rows = first_row + gl.arange(0, _ROWS, o_rows)
    columns = gl.arange(0, D, gl.SliceLayout(0, o_layout))
    output = output_ptr + rows.to(gl.int64)[:, None] * stride_os + columns[None, :]
    gl.store(output, acc.to(dtype), mask=(rows < Sq)[:, None])
    lse_rows = first_row + gl.arange(0, _ROWS, s_rows)
    # an empty row has shift -inf and sum 0: log-sum-exp -inf
    gl.store(lse_ptr + lse_rows, (shift + gl.log2(row_sum)) * ln2, mask=lse_rows < Sq)


@gluon.jit
def _allocate_tiles(descriptor, COUNT: gl.constexpr):
    """Shared memory for so many tiles of a descriptor."""
    shape: gl.constexpr = [COUNT] + descriptor.block_shape  # noqa: RUF005
    return gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)


@gluon.jit
def _allocate_barriers(COUNT: gl.constexpr):
    return gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())


@gluon.jit(do_not_specialize=["Hq", "Sq", "Sk", "Nq", "Nk", "offset"])
def _attend_hopper_kernel(
    q_desc,
    k_desc,
    v_desc,
    v_ptr,
    output_ptr,
    lse_ptr,
    indices_ptr,
    counts_ptr,
    kv_lens_ptr,
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
    offset,
    qk_scale,
    headroom,
    ln2,
    CAUSAL: gl.constexpr,
    Q_INSIDE: gl.constexpr,
    K_INSIDE: gl.constexpr,
    V_INSIDE: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK: gl.constexpr,
    D: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    # the longest rows are at the end, causal ones and those of a joint sequence's text: start them first
    query_block = gl.num_programs(0) - 1 - gl.program_id(0)
    batch = gl.program_id(1) // Hq
    head = gl.program_id(1) % Hq
    kv_head = head // heads_per_kv
    kv_stop = Sk
    PADDED: gl.constexpr = kv_lens_ptr is not None
    if PADDED:
        kv_stop = gl.minimum(gl.load(kv_lens_ptr + batch), Sk)
    row = gl.program_id(1).to(gl.int64) * Nq + query_block
    list_ptr = indices_ptr + row * Nk
    count = gl.load(counts_ptr + row)
    first_query = query_block * BLOCK
    v_ptr += batch.to(gl.int64) * stride_vb + kv_head.to(gl.int64) * stride_vh
    output_ptr += batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
    lse_ptr += gl.program_id(1).to(gl.int64) * Sq

    q_tiles = _allocate_tiles(q_desc, 2)
    k_tiles = _allocate_tiles(k_desc, STAGES)
    v_tiles = _allocate_tiles(v_desc, STAGES)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = _allocate_barriers(STAGES)
    k_empty = _allocate_barriers(STAGES)
    v_full = _allocate_barriers(STAGES)
    v_empty = _allocate_barriers(STAGES)
    mbarrier.init(q_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        # one arrival of each consumer
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    # fmt: off
    gl.warp_specialize(
        [
            (_produce, (
                q_desc, k_desc, v_desc, v_ptr, stride_vs,
                q_tiles, k_tiles, v_tiles, q_full, k_full, k_empty, v_full, v_empty,
                list_ptr, count, batch, head, kv_head, first_query, kv_stop,
                Q_INSIDE, K_INSIDE, V_INSIDE, PADDED, STAGES, BLOCK, D,
            )),
            (_consume, (
                gl.constexpr(0), q_tiles, k_tiles, v_tiles, q_full, k_full, k_empty, v_full, v_empty,
                list_ptr, count, first_query, Sq, kv_stop, offset,
                output_ptr, lse_ptr, stride_os, qk_scale, headroom, ln2, CAUSAL, STAGES, BLOCK, D,
            )),
            (_consume, (
                gl.constexpr(1), q_tiles, k_tiles, v_tiles, q_full, k_full, k_empty, v_full, v_empty,
                list_ptr, count, first_query, Sq, kv_stop, offset,
                output_ptr, lse_ptr, stride_os, qk_scale, headroom, ln2, CAUSAL, STAGES, BLOCK, D,
            )),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )
    # fmt: on


def hopper_arguments(
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

    The call is one that `attention_choice.hopper_refusal` has nothing against, and scale is above 0.
    """
    assert kv_start is None
    batch, query_heads, q_len, head_dim = query.shape
    config = config or find_optional_config("attention_hopper", query.dtype, head_dim, query.device)
    assert config is not None
    q_tiles, q_inside = _describe(query, _ROWS.value)
    k_tiles, k_inside = _describe(key, block_size)
    v_tiles, v_inside = _describe(value, block_size)
    strides = {
        f"stride_{name}{axis}": tensor.stride(i)
        for name, tensor in (("v", value), ("o", output))
        for i, axis in enumerate("bhs")
    }
    arguments = {
        "q_desc": q_tiles,
        "k_desc": k_tiles,
        "v_desc": v_tiles,
        "v_ptr": value,
        "output_ptr": output,
        "lse_ptr": lse,
        "indices_ptr": indices,
        "counts_ptr": counts,
        "kv_lens_ptr": kv_lens,
        **strides,
        "Hq": query_heads,
        "heads_per_kv": query_heads // key.shape[1],
        "Sq": q_len,
        "Sk": key.shape[2],
        "Nq": indices.shape[2],
        "Nk": indices.shape[3],
        "offset": key.shape[2] - q_len,
        "qk_scale": scale * LOG2E,
        "headroom": headroom(query.dtype),
        "ln2": LN2,
        "CAUSAL": causal,
        "Q_INSIDE": q_inside,
        "K_INSIDE": k_inside,
        "V_INSIDE": v_inside,
        "STAGES": config["num_stages"],
        "BLOCK": block_size,
        "D": head_dim,
        "REGISTERS": _CONSUMER_REGISTERS,
        "num_warps": 4,
        **COMPILE_OPTIONS,
    }
    return rows_by_heads(triton.cdiv(q_len, block_size), batch, query_heads), arguments


def _describe(tensor: torch.Tensor, rows: int) -> tuple[TensorDescriptor, bool]:
    """A descriptor for tiles of `rows` tokens of a [B, H, S, D] tensor, and whether the heads of a token lie together.

    Its dimensions are in the order of falling strides, [B, S, H, D] or [B, H, S, D].
    """
    inside = heads_inside(tensor)
    ordered = tensor.transpose(1, 2) if inside else tensor
    head_dim = tensor.shape[3]
    tile = [1, rows, 1, head_dim] if inside else [1, 1, rows, head_dim]
    dtype = gl.float16 if tensor.dtype == torch.float16 else gl.bfloat16
    layout = gl.NVMMASharedLayout.get_default_for(tile, dtype)
    return TensorDescriptor(ordered, list(ordered.shape), list(ordered.stride()), tile, layout), inside


def launch_hopper(
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
    """Fill output [B, Hq, Sq, D] and lse float32 [B, Hq, Sq]; the options are those of hopper_arguments.

    Each listed block holds at least one key that the first query of its row sees.
    """
    if output.numel() == 0:
        return
    query, scale = positive_scale(query, scale)
    query, key, value = unit_inner_stride(query), unit_inner_stride(key), unit_inner_stride(value)
    grid, arguments = hopper_arguments(query, key, value, output, lse, indices, counts, scale=scale, **options)
    with device_guard(query):
        _attend_hopper_kernel[grid](**arguments)
