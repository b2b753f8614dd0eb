"""The kernels of the first look behind one form: their functions, arguments and launchers, by launch-table name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn_video.ops.key_mask import num_blocks
from xattn_video.ops.triton import attention as block_sparse
from xattn_video.ops.triton import attention_hopper
from xattn_video.ops.triton import scores as antidiagonal_scores
from xattn_video_eval.bench import DTYPES
from xattn_video_eval.first_gpu.plan import Call, Variant

BLOCK_SIZE = 128
# The interpreter cannot run a kernel that is written in Gluon.
GPU_ONLY = {"attention_hopper": "a Gluon kernel, which only a GPU of sm_90 runs; here the step compile compiled it"}


class AttentionKernel(NamedTuple):
    """An attention kernel: what Triton compiles, what makes its grid and arguments, and what launches it."""

    function: Any
    arguments: Callable[..., tuple[tuple[int, int], dict[str, Any]]]
    launch: Callable[..., None]


ATTENTION = {
    "attention_hopper": AttentionKernel(
        attention_hopper._attend_hopper_kernel, attention_hopper.hopper_arguments, attention_hopper.launch_hopper
    ),
    "block_sparse": AttentionKernel(
        block_sparse._block_sparse_kernel, block_sparse.block_sparse_arguments, block_sparse.launch_block_sparse
    ),
}


def settings(call: Call, kv_lens: Tensor | None = None) -> dict[str, Any]:
    """The keyword arguments that launchers and references share; kv_lens int32 [B], on the device of the call."""
    return {
        "block_size": BLOCK_SIZE,
        "causal": call.causal,
        "scale": call.head_dim**-0.5,
        "kv_start": None,
        "kv_lens": kv_lens,
    }


def arguments_without_memory(variant: Variant, call: Call, stride: int | None) -> tuple[Any, dict[str, Any]]:
    """The kernel and what its launcher would pass for a call, in tensors that hold no memory.

    The kernel of the scores takes a `stride`; an attention kernel takes None.
    """
    blocks, dtype = num_blocks(call.tokens, BLOCK_SIZE), DTYPES[call.dtype]
    query, key = (
        _meta(call.batch, call.tokens, heads, call.head_dim, dtype=dtype).transpose(1, 2) for heads in call.heads
    )
    kv_lens = None if call.kv_lens is None else _meta(call.batch, dtype=torch.int32)
    options = {**settings(call, kv_lens), "config": variant.config}
    lists = (call.batch, call.heads[0], blocks)
    if stride is not None:
        scores = _meta(*lists, blocks, dtype=torch.float32)
        _, arguments = antidiagonal_scores.scores_arguments(query, key, scores, stride=stride, **options)
        return antidiagonal_scores._antidiagonal_scores_kernel, arguments
    kernel = ATTENTION[variant.kernel]
    lse = _meta(*query.shape[:3], dtype=torch.float32)
    indices, counts = _meta(*lists, blocks, dtype=torch.int32), _meta(*lists, dtype=torch.int32)
    _, arguments = kernel.arguments(query, key, key, query, lse, indices, counts, **options)
    return kernel.function, arguments


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
