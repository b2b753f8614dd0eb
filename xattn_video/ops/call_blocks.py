"""Cache of valid and forced blocks for calls with equal shapes and settings, and of the thresholds of heads.

All layers and steps of a video share them. Both caches were measured (torch 2.13, one CPU core) before they stayed:

* With the blocks kept, a sparse Triton call runs 4 operators on the device; without, 31, for masks of every layer that
  are the same. On a CPU, making the blocks of 4,096 tokens takes 97 us (151 us if causal) and finding them 10 us.
* A copy of thresholds takes 5 us on a CPU. To a GPU the host waits for it, and a graph cannot capture it. Who gives a
  tensor as `threshold` needs no cache.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .key_mask import KeyMask, num_blocks

# About two lengths at a time (a pipeline with two stages, self-attention and that of a decoder), and some room.
KEPT_CALLS = 8
# Masks of a longer call (185,000 tokens in blocks of 128) are not kept: making them is nothing beside such a call.
KEPT_MASK_BYTES = 4 << 20


class CallBlocks(NamedTuple):
    """Which blocks a call may and must keep. The tensors are shared between calls and not to be written to.

    Attributes:
        valid, forced: bool `[B, 1, Nq, Nk]`.
        total: valid blocks of one head over the batch, int64 0-d.
    """

    valid: Tensor
    forced: Tensor
    total: Tensor


def call_blocks(query: Tensor, kv_len: int, mask: KeyMask, **rules: Any) -> CallBlocks:
    """The blocks of a call with that query `[B, Hq, Sq, D]`; `rules` are what `valid_and_forced_blocks` takes.

    Without bounds they follow from sizes alone and are kept for the next such call of the same stream. Bounds are
    values on the device, which may have changed, so a call with bounds makes its blocks again.
    """
    sizes = (query.shape[0], query.shape[2], kv_len)
    block_size = rules["block_size"]
    mask_bytes = 2 * sizes[0] * num_blocks(sizes[1], block_size) * num_blocks(kv_len, block_size)
    if not mask.bounded and mask_bytes <= KEPT_MASK_BYTES and _may_keep(query):
        stream = torch.cuda.current_stream(query.device).cuda_stream if query.is_cuda else 0
        return _kept_blocks(*sizes, mask.causal, stream, device=query.device, **rules)
    return _make(mask, *sizes, device=query.device, **rules)


def _may_keep(query: Tensor) -> bool:
    """Whether tensors made now hold values that later calls can use."""
    if not _is_plain(query):
        return False
    # What a capture makes has no values yet, and its memory belongs to the graph.
    return not (query.is_cuda and torch.cuda.is_current_stream_capturing())


def _is_plain(query: Tensor) -> bool:
    """Whether what is made now is an ordinary tensor: not one of a compiler, a function transform or a fake mode."""
    if torch.compiler.is_compiling() or type(query) is not Tensor:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    # Other modes, such as one that counts operators, make ordinary tensors.
    keys = torch._C._TorchDispatchModeKey
    return all(torch._C._get_dispatch_mode(key) is None for key in (keys.FAKE, keys.FUNCTIONAL))


@lru_cache(maxsize=KEPT_CALLS)
def _kept_blocks(batch: int, q_len: int, kv_len: int, causal: bool, stream: int, **rules: Any) -> CallBlocks:
    """`stream`: another stream might read before this one has written."""
    with torch.inference_mode(False):
        return _make(KeyMask(causal), batch, q_len, kv_len, **rules)


def _make(mask: KeyMask, *sizes: int, **rules: Any) -> CallBlocks:
    valid, forced = mask.valid_and_forced_blocks(*sizes, **rules)
    return CallBlocks(valid, forced, valid.sum())


def exact_type(device: torch.device) -> torch.dtype:
    """The dtype of shares and sums of them: float64, and float32 on the one device that has no more."""
    return torch.float32 if device.type == "mps" else torch.float64


def head_thresholds(query: Tensor, shares: tuple[float, ...]) -> Tensor:
    """The thresholds of the heads, `[Hq]` in `exact_type` on the query's device, copied there once: the host waits."""
    if not _is_plain(query):
        return torch.tensor(shares, dtype=exact_type(query.device), device=query.device)
    return _kept_thresholds(shares, query.device)


# None is dropped, because a captured graph may hold it.
@cache
def _kept_thresholds(shares: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(shares, dtype=exact_type(device), device=device)
