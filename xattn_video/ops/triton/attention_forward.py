"""Block-sparse attention as an operator of torch, over lists of kept blocks."""

# Triton gives the parameters of jit functions their types, one launch at a time
# mypy: allow-untyped-defs

from __future__ import annotations

import torch

from ..key_mask import KeyMask
from .attention import MIN_BLOCK_SIZE, launch_block_sparse
from .attention_choice import HOPPER, choose_kernel
from .launch import check_supported, unit_inner_stride


# Eleven parameters: torch takes neither a KeyMask nor a pair of lists, and `force` is bound once.
@torch.library.custom_op("xattn_video::triton_block_sparse", mutates_args=())
def block_sparse_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    kv_start: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
    *,
    causal: bool,
    block_size: int,
    scale: float,
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
    output, lse = _empty_outputs(query)
    mask = KeyMask(causal, kv_start, kv_lens)
    if choose_kernel(query, key, value, mask, block_size=block_size, force=force) == HOPPER:
        # needs a newer Triton than the others
        from .attention_hopper import launch_hopper as launch
    else:
        launch = launch_block_sparse
    launch(query, key, value, output, lse, indices, counts, block_size=block_size, scale=scale, **mask.keywords)
    return output, lse


@block_sparse_forward.register_fake
def _(query, *_, **__):
    return _empty_outputs(query)


def _empty_outputs(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # the query's own layout: diffusers' [B, S, H, D] goes back out without a copy
    output = torch.empty_like(unit_inner_stride(query))
    return output, torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
