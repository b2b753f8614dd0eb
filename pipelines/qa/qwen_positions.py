"""Where text stands after a video: a repair for Qwen2-VL and Qwen2.5-VL in transformers 5.

These models were trained with text that goes on after the largest position of the video before it (Qwen2-VL's paper,
section 2.1, and transformers 4). transformers 5 goes on after the video's height and width and forgets its time, so the
question about a long video stands in the midst of it, and the first generated token far away from both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

# By the `model_type` of their configurations.
_MODELS = ("qwen2_vl", "qwen2_5_vl")


def repair_positions(model: Any) -> bool:
    """Let `model.generate` place text after videos as in training; whether there was something to repair.

    Other models and other releases are left as they are, and so is one that is repaired already.
    """
    inner: Any = getattr(model, "model", None)
    original = getattr(inner, "get_rope_index", None)
    if original is None or getattr(model.config, "model_type", None) not in _MODELS:
        return False
    if "mm_token_type_ids" not in inspect.signature(original).parameters or "get_rope_index" in vars(inner):
        return False
    inner.get_rope_index = _after_videos(original)
    return True


def _after_videos(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def get_rope_index(
        input_ids: Tensor, mm_token_type_ids: Tensor, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        positions, deltas = original(input_ids, mm_token_type_ids, *args, attention_mask=attention_mask, **kwargs)
        positions, deltas = positions.clone(), deltas.clone()
        for item, types in enumerate(mm_token_type_ids):
            real = torch.ones_like(types).bool() if attention_mask is None else attention_mask[item].bool()
            placed = apart(positions[:, item, real], types[real].tolist())
            positions[:, item, real] = placed
            deltas[item] = placed.max() + 1 - int(real.sum())
        return positions, deltas

    return get_rope_index


def apart(positions: Tensor, types: list[int]) -> Tensor:
    """Positions `[3, tokens]` moved on so far that each run of one type begins after all that is before it."""
    placed, start, end, moved = positions.clone(), 0, -1, 0
    for _, run in groupby(types):
        stop = start + len(list(run))
        moved = max(moved, end + 1 - int(positions[:, start:stop].min()))
        placed[:, start:stop] += moved
        start, end = stop, int(placed[:, start:stop].max())
    return placed
