"""Block-sparse attention as an operator of torch, over a block mask or over lists of kept blocks."""

# Triton gives the parameters of jit functions their types, one launch at a time
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch

from .attention import MIN_BLOCK_SIZE, launch_block_sparse
from .attention_choice import HOPPER, choose_kernel
from .block_lists import mask_to_lists
from .launch import check_supported, unit_inner_stride


@torch.library.custom_op("xattn_video::triton_block_sparse", mutates_args=())
def _block_sparse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    kv_start: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
    force: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    output, lse = _empty_outputs(query)
    rules: dict[str, Any] = {"block_size": block_size, "causal": causal, "kv_start": kv_start, "kv_lens": kv_lens}
    if choose_kernel(query, key, value, force=force, **rules) == HOPPER:
        # needs a newer Triton than the others
        from .attention_hopper import launch_hopper as launch
    else:
        launch = launch_block_sparse
    launch(query, key, value, output, lse, indices, counts, scale=scale, **rules)
    return output, lse


@_block_sparse.register_fake
def _(query, key, value, indices, counts, block_size, causal, scale, kv_start, kv_lens, force):
    return _empty_outputs(query)


def _empty_outputs(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # the query's own layout: diffusers' [B, S, H, D] goes back out without a copy
    output = torch.empty_like(unit_inner_stride(query))
    return output, torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)


def block_sparse_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_mask: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`block_sparse_forward_lists` over a block mask, bool [B, Hq, Nq, Nk]; the options are the same."""
    return block_sparse_forward_lists(query, key, value, *mask_to_lists(block_mask), **options)


def block_sparse_forward_lists(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    *,
    block_size: int,
    causal: bool,
    scale: float,
    kv_start: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
    force: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact softmax attention over the kept blocks (`reference.block_sparse_forward`).

    query [B, Hq, Sq, D], key and value [B, Hkv, Sk, D] in one of float32, float16, bfloat16; indices int32
    [B, Hq, Nq, Nk], ascending as far as counts int32 [B, Hq, Nq] says, both contiguous; kv_start, kv_lens None or int32
    [B]. Returns the output [B, Hq, Sq, D] in the query's dtype and the natural log-sum-exp float32 [B, Hq, Sq]; a query
    that sees no key gets 0 and -inf. Each listed block holds a key that its row's queries see. `force` is
    `choose_kernel`'s.
    Raises ValueError for other dtypes, head_dim above 256 or block_size below 16, or a forced kernel that cannot do it.
    """
    check_supported(query.dtype, query.shape[3])
    if block_size < MIN_BLOCK_SIZE:
        raise ValueError(
            f"block_size must be at least {MIN_BLOCK_SIZE} for the triton backend, got {block_size}; "
            "use backend='reference'"
        )
    return _block_sparse(query, key, value, indices, counts, block_size, causal, scale, kv_start, kv_lens, force)
