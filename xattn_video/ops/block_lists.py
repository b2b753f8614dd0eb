"""Lists of kept blocks: the form in which a selection travels from the choice of blocks to attention.

Bool masks stay at the public edge: `select_blocks` returns one and `block_sparse_attention` takes one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def empty_lists(like: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the lists of scores or a mask `[B, H, Nq, Nk]`: indices and counts."""
    indices = torch.empty(like.shape, dtype=torch.int32, device=like.device)
    return indices, torch.empty(like.shape[:3], dtype=torch.int32, device=like.device)


def mask_to_lists(block_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Kept-block lists of a block mask, without a sort.

    Args:
        block_mask: bool `[B, H, Nq, Nk]`.

    Returns:
        indices int32 `[B, H, Nq, Nk]`, ascending, 0 past the count; counts int32 `[B, H, Nq]`.
    """
    num_key_blocks = block_mask.shape[-1]
    position = block_mask.cumsum(-1, dtype=torch.int64) - 1
    # Blocks that are not kept go to a spare last column, which is cut off.
    position = torch.where(block_mask, position, num_key_blocks)
    column = torch.arange(num_key_blocks, dtype=torch.int32, device=block_mask.device).expand(block_mask.shape)
    indices = torch.zeros(
        *block_mask.shape[:-1], num_key_blocks + 1, dtype=torch.int32, device=block_mask.device
    ).scatter(-1, position, column)
    return indices[..., :num_key_blocks].contiguous(), block_mask.sum(-1, dtype=torch.int32)


def lists_to_mask(indices: Tensor, counts: Tensor) -> Tensor:
    """The inverse of `mask_to_lists`: bool `[B, H, Nq, Nk]`."""
    num_key_blocks = indices.shape[-1]
    kept = torch.arange(num_key_blocks, device=indices.device) < counts[..., None]
    position = torch.where(kept, indices.to(torch.int64), num_key_blocks)
    mask = torch.zeros(*indices.shape[:-1], num_key_blocks + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter(-1, position, True)[..., :num_key_blocks]
