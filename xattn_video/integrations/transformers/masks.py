"""The attention mask of a causal prefill as a range of keys, so that padding and chunks need no `[B, 1, Sq, Sk]` mask.

transformers makes one mask a forward and gives it to every layer. Where it would say no more than "causal, and the
first `start[b]` keys of item b are padding", `range_mask` says that in B integers. A range is an int32 tensor
`[B, 1, 1, end]` without memory of its own (each row repeats its start), which transformers passes on as it does any
mask of four dimensions; `end` is the number of keys that are in the cache, the forward's own included.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

from ...ops import KeyMask

# Both attributes hang on the range itself, because transformers hands nothing else from the mask function to the
# layers. Without the first one every layer would make the dense mask again: 26 operators, 0.33 ms for one query and
# 4,096 keys on one CPU core, where attention with 8 heads takes 6 ms. Without the second one every layer would have to
# read values of the range, for which the host waits.
_ATTRIBUTE = "_xattn_dense"
# Of a range that only says "causal". What is cut from the range loses it.
_PLAIN = "_xattn_plain"
# The most queries x keys of a mask that is kept for the other layers of a forward.
_KEPT = 1 << 24


def range_mask(
    batch_size: int,
    *args: Any,
    kv_length: int,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a forward, as transformers' mask interface asks for it.

    Args:
        batch_size, args, kwargs: as of transformers' `sdpa_mask`.
        kv_length, kv_offset: keys that the layers will see, and the position of the first.
        attention_mask: `[B, keys]`, 0 or False where padding.
        local_size: the window or chunk of a layer that does not see all keys.
        allow_is_causal_skip: False where the mask is more than causal (packed sequences, blocks of an image).

    Returns:
        None for a plain causal prefill, a range for one that has padding on the left or a cache before it, and
        what `sdpa_mask` gives for everything else: decoding, windows that cut keys off, padding with holes.
    """
    positions = kwargs.get("cache_position")
    queries = kwargs["q_length"] if positions is None else positions.shape[0]
    # A window as wide as all keys cuts nothing off.
    whole = local_size is None or kv_length <= local_size
    if queries > 1 and allow_is_causal_skip and whole and kv_offset == 0 and not torch.compiler.is_compiling():
        before = kwargs.get("q_offset", 0) if positions is None else positions[0]
        end = int(before) + queries
        start, padded = padding_before(attention_mask, batch_size, end)
        if start is not None and end <= kv_length:
            plain = end == queries and not padded
            # where layers share keys (Gemma 4) queries may be cut off later, and only a range still tells where from
            if plain and not getattr(kwargs.get("config"), "num_kv_shared_layers", 0):
                return None
            ranges = start.to(kwargs.get("device", start.device)).view(-1, 1, 1, 1).expand(-1, 1, 1, end)
            setattr(ranges, _PLAIN, plain)
            return ranges
    if local_size is not None:
        kwargs["local_size"] = local_size
    mask: Tensor | None = sdpa_mask(
        batch_size,
        *args,
        kv_length=kv_length,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )
    return mask


def padding_before(attention_mask: Tensor | None, batch: int, end: int) -> tuple[Tensor | None, bool]:
    """How many keys at the left of each item are padding, int32 `[B]`, or None where that does not tell the mask; and
    whether there are any.

    Padding on the right needs no mask beside causality: only queries that are padding themselves see it. Padding
    between tokens does. An item of padding alone has all of its `end` keys there. Reads values: the host waits once.
    """
    if attention_mask is None:
        return torch.zeros(batch, dtype=torch.int32), False
    if attention_mask.ndim != 2 or attention_mask.shape[1] < end:
        return None, True
    token = attention_mask[:, :end].bool()
    # Where padding turns to tokens: at most once, and then nothing but tokens up to the last one.
    rises = token[:, 1:] & ~token[:, :-1]
    several = rises.sum(1) + token[:, 0] > 1
    first = torch.where(token.any(1), token.int().argmax(1), end)
    holes, padded = torch.stack([several.any(), (first > 0).any()]).tolist()
    return None if holes else first.to(torch.int32), padded


def is_range(attention_mask: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a mask is a range: no mask of that shape that transformers makes holds integers."""
    if attention_mask is None or attention_mask.dtype != torch.int32 or attention_mask.ndim != 4:
        return False
    return attention_mask.shape[1] == attention_mask.shape[2] == 1


def without_plain(attention_mask: Tensor | None, queries: int) -> Tensor | None:
    """None for a range that says no more than "causal" to these queries, else the mask itself."""
    if attention_mask is None or not getattr(attention_mask, _PLAIN, False):
        return attention_mask
    return None if attention_mask.shape[-1] == queries else attention_mask


def dense_mask(ranges: Tensor, queries: int, keys: int) -> Tensor:
    """The bool mask `[B, 1, queries, keys]` of a range, for dense attention; keys past its end are masked.

    A small one, such as that of a few queries against a long cache, is kept with the range for the other layers.
    """
    kept: Tensor | None = getattr(ranges, _ATTRIBUTE, None)
    if kept is not None and kept.shape[2:] == (queries, keys):
        return kept
    start, end = ranges[:, 0, 0, 0], ranges.shape[-1]
    lens = torch.full_like(start, end)
    mask = KeyMask(True, start, lens).visible(queries, keys, ranges.device)[:, None]
    if queries * keys <= _KEPT:
        setattr(ranges, _ATTRIBUTE, mask)
    return mask
