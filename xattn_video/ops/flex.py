"""The `flex` backend: torch's FlexAttention over the kept blocks. The device's own backend scores and selects.

On a GPU FlexAttention is compiled, once for each dtype, head count and head dimension; the first call waits for that.
On a CPU it runs uncompiled and holds every logit in memory at once: right for a check, not for work.
From torch 2.9 on `return_aux` asks for the log-sum-exp, and lists for a backward pass can be left out.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask

from .block_lists import lists_to_mask, mask_to_lists
from .key_mask import KeyMask, num_blocks
from .reference import compute_dtype, spoil

_HAS_AUX = hasattr(torch_flex, "AuxRequest")
_MIN_GPU_HEAD_DIM = 16
# FlexAttention's own tiles divide this.
_GPU_BLOCK_SIZE = 128


def check_supported(device: torch.device, head_dim: int, block_size: int) -> None:
    """Raise `ValueError` for a head dimension or block size that FlexAttention cannot take on this device."""
    if device.type == "cpu":
        return
    if head_dim < _MIN_GPU_HEAD_DIM:
        raise ValueError(f"head_dim must be at least {_MIN_GPU_HEAD_DIM} for the flex backend on a GPU, got {head_dim}")
    if block_size % _GPU_BLOCK_SIZE:
        raise ValueError(
            f"block_size must be a multiple of {_GPU_BLOCK_SIZE} for the flex backend on a GPU, whose tiles are "
            f"that large, got {block_size}; use backend='triton'"
        )


def make_block_mask(
    block_mask: Tensor,
    q_len: int,
    kv_len: int,
    mask: KeyMask,
    block_size: int,
) -> BlockMask:
    """FlexAttention's mask of the kept blocks, made of their lists; no `[Sq, Sk]` mask is built.

    Args:
        block_mask: bool `[B, H, Nq, Nk]`.
        q_len, kv_len: tokens.
        mask: which keys each query sees.
        block_size: tokens per block.

    Returns:
        a mask whose whole lists name the kept blocks that are visible to the last pair, and whose partial lists name
        those that the key range, the diagonal or the end of the keys cuts: only in these are tokens masked.
    """
    batch = block_mask.shape[0]
    first, end = mask.query_range(q_len, kv_len, block_mask.device)
    begin = torch.arange(num_blocks(kv_len, block_size), device=block_mask.device) * block_size
    # Of the queries of a block the first one sees the fewest keys.
    whole = (first[:, ::block_size, None] <= begin) & (begin + block_size <= end[:, ::block_size, None])
    indices, counts = mask_to_lists(block_mask & ~whole[:, None])
    whole_indices, whole_counts = mask_to_lists(block_mask & whole[:, None])
    first = first.expand(batch, -1).to(torch.int32).contiguous()
    end = end.expand(batch, -1).to(torch.int32).contiguous()

    def visible(item: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # The lists say which blocks are visited; uncompiled FlexAttention visits all, so this says it again.
        kept = block_mask[item, head, query // block_size, key // block_size]
        return kept & (key >= first[item, query]) & (key < end[item, query])

    options: dict[str, Any] = {"compute_q_blocks": False} if _HAS_AUX else {}
    return BlockMask.from_kv_blocks(
        counts,
        indices,
        whole_counts,
        whole_indices,
        BLOCK_SIZE=block_size,
        mask_mod=visible,
        seq_lengths=(q_len, kv_len),
        **options,
    )


@torch.library.custom_op("xattn_video::flex_attend", mutates_args=())
def block_sparse_forward(  # noqa: PLR0913 - torch takes neither a KeyMask nor a pair of lists
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    kv_start: Tensor | None,
    kv_lens: Tensor | None,
    *,
    causal: bool,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks, as `reference.block_sparse_forward`: output and natural log-sum-exp.

    Raises `ValueError` for a head dimension or block size that FlexAttention cannot take.
    """
    check_supported(query.device, query.shape[3], block_size)
    q_len, kv_len = query.shape[2], key.shape[2]
    key_mask = KeyMask(causal, kv_start, kv_lens)
    if key_mask.bounded:
        # A masked probability is 0, and 0 times whatever lies in the padding must be 0 too.
        value = value.masked_fill(~key_mask.valid_keys(kv_len, query.device)[:, None, :, None], 0)
    block_mask = lists_to_mask(indices, counts)
    mask = make_block_mask(block_mask, q_len, kv_len, key_mask, block_size)
    broken = ~value.isfinite() if query.device.type == "cpu" else None
    if broken is not None:
        # On a CPU it computes all blocks, and 0 times what is not finite would be NaN in each row.
        value = value.masked_fill(broken, 0)
    # detached: FlexAttention refuses on a CPU what could ask for a gradient
    query, key, value = ((part if part.stride(-1) == 1 else part.contiguous()).detach() for part in (query, key, value))
    with torch.no_grad():
        output, lse = compiled_attention(query, key, value, block_size, scale)(query, key, value, mask, scale)
    if broken is not None:
        output = spoil(output, broken, block_mask, block_size)
    empty, empty_lse = _empty_outputs(query)
    output = output if output.stride() == empty.stride() else empty.copy_(output)
    return output, lse.to(empty_lse.dtype).contiguous()


@block_sparse_forward.register_fake
def _(query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(query)


def _empty_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    """Output in query's layout, and the log-sum-exp."""
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=compute_dtype(query))


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    wanted: dict[str, Any] = {"return_aux": torch_flex.AuxRequest(lse=True)} if _HAS_AUX else {"return_lse": True}
    output, extra = torch_flex.flex_attention(
        query,
        key,
        value,
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        # Short queries would go to a decoding kernel with block rules of its own.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
        **wanted,
    )
    return output, extra.lse if _HAS_AUX else extra


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """The order of the dimensions in memory, and which are expanded."""
    strides = tensor.stride()
    return tensor.is_contiguous(), tuple(sorted(range(4), key=lambda axis: strides[axis])), *(s == 0 for s in strides)


_COMPILED: dict[tuple[Any, ...], Callable[..., tuple[Tensor, Tensor]]] = {}


def compiled_attention(
    query: Tensor, key: Tensor, value: Tensor, block_size: int, scale: float
) -> Callable[..., tuple[Tensor, Tensor]]:
    """FlexAttention of (query, key, value, its mask, scale), compiled for everything but the sequences' lengths.

    Each has code of its own: torch counts recompilations by code, and past a few it gives up.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    fixed: tuple[Any, ...] = (query.device, query.dtype, *query.shape[:2], key.shape[1], query.shape[3])
    fixed += (block_size, scale, torch.is_inference_mode_enabled())
    # What torch compiles again for, too: layouts, and lengths that are equal, 1, or one block.
    fixed += tuple((_layout(part), part.is_inference()) for part in (query, key, value))
    fixed += (q_len == kv_len, q_len == 1, kv_len == 1, q_len <= block_size, kv_len <= block_size)
    if fixed not in _COMPILED:
        own = types.FunctionType(_attend.__code__.replace(), globals(), "_attend")
        backend = "eager" if query.device.type == "cpu" else "inductor"
        _COMPILED[fixed] = torch.compile(own, backend=backend, fullgraph=True)
    return _COMPILED[fixed]
