"""Which implementation runs where, and why not. An implementation is imported when it is first used."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import BACKENDS
from . import residual
from .block_lists import mask_to_lists
from .residual import Packed

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# By its distribution: the module's name, flash_attn, belongs to older packages too.
_HAS_FA4 = any(importlib.metadata.distributions(name="flash-attn-4"))


# What a selection that sorts holds for each pair of blocks and each head: scores, and 40 bytes in `reference.select`.
SORT_BYTES = 48


class Backend(NamedTuple):
    """The device-specific parts of XAttention's three stages.

    Attributes:
        name: as in `BACKENDS`.
        antidiagonal_scores: (query, key, stride, block_size, scale, causal, kv_start, kv_lens) -> scores.
        select: (scores, valid, forced, threshold) -> lists of kept blocks: indices int32 `[B, H, Nq, Nk]`, ascending,
            and counts int32 `[B, H, Nq]`.
        block_sparse_forward: (query, key, value, indices, counts, block_size, scale, causal, kv_start, kv_lens) ->
            output and log-sum-exp. The lists hold only valid blocks.
        mask_to_lists: bool `[B, H, Nq, Nk]` -> lists.
        pair_bytes: the most that the stages hold at once for each pair of blocks and each head, with a threshold.
        merge: as `residual.merge`: (output, lse, other, other_lse, kind) -> dense attention and the packed residual.
        add_residual: as `residual.add`: (output, packed, before, factor) -> output with the residual.
    """

    name: str
    antidiagonal_scores: Callable[..., Tensor]
    select: Callable[..., tuple[Tensor, Tensor]]
    block_sparse_forward: Callable[..., tuple[Tensor, Tensor]]
    mask_to_lists: Callable[[Tensor], tuple[Tensor, Tensor]] = mask_to_lists
    pair_bytes: int = SORT_BYTES
    merge: Callable[..., tuple[Tensor, Packed]] = residual.merge
    add_residual: Callable[..., Tensor] = residual.add


def unavailable_reason(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the named backend cannot run tensors of this device and dtype, or None if it can."""
    if name == "reference":
        return None
    if name == "cpu":
        return None if device.type == "cpu" else f"it runs on a CPU, not on {device.type}"
    if name == "triton":
        return _triton_unavailable_reason(device, dtype)
    if name == "triton-hopper":
        return _triton_unavailable_reason(device, dtype) or _hopper_unavailable_reason(device)
    if name == "flex":
        return _flex_unavailable_reason(device, dtype)
    if name == "fa4":
        return _fa4_unavailable_reason(device, dtype)
    raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")


def _triton_unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (interpreted and device.type == "cpu"):
        return f"it needs an NVIDIA or AMD GPU, not {device.type}"
    if not _HAS_TRITON:
        return "the package triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"it takes float32, float16 and bfloat16, not {dtype}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs an NVIDIA GPU of compute capability 8.0 or newer"
    return None


def _hopper_unavailable_reason(device: torch.device) -> str | None:
    # Not by dtype: scores, which this backend selects from, are float32.
    from .triton.attention_choice import hopper_device_refusal

    return hopper_device_refusal(device)


def _flex_unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return f"it runs on a CPU and on an NVIDIA or AMD GPU, not on {device.type}"
    # Compiled by Triton, and scores and selection are the Triton backend's.
    return None if device.type == "cpu" else _triton_unavailable_reason(device, dtype)


def _fa4_unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it needs an NVIDIA GPU, not {'AMD' if device.type == 'cuda' else device.type}"
    if not _HAS_FA4:
        return "the package flash-attn-4 is not installed; pip install 'xattn-video[fa4]'"
    # Scores and selection are the Triton backend's.
    return fa4_capability_reason(torch.cuda.get_device_capability(device)) or _triton_unavailable_reason(device, dtype)


def fa4_capability_reason(capability: tuple[int, int]) -> str | None:
    """Why flash-attn-4 does no block-sparse attention on a GPU of that compute capability, or None if it does."""
    if capability[0] in (9, 10):
        return None
    return (
        f"it needs an NVIDIA GPU of compute capability 9.x or 10.x, not {capability[0]}.{capability[1]}, where "
        "flash-attn-4 ignores or refuses lists of blocks"
    )


def auto_name(device: torch.device, dtype: torch.dtype) -> str | None:
    """The backend that `auto` stands for, or None where there is only dense attention."""
    name = {"cuda": "triton", "cpu": "cpu"}.get(device.type)
    return name if name and unavailable_reason(name, device, dtype) is None else None


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of that name, loaded.

    Raises:
        ValueError: no such backend, or it cannot run these tensors; the message says why and what can.
    """
    if name == "auto":
        chosen = auto_name(device, dtype)
        if chosen is None:
            raise ValueError(
                f"no fast backend runs {dtype} on {device.type}; backend='reference' does, for short sequences"
            )
        return _load(chosen, device)
    reason = unavailable_reason(name, device, dtype)
    if reason is not None:
        usable = [other for other in BACKENDS if other != "auto" and unavailable_reason(other, device, dtype) is None]
        raise ValueError(f"backend {name!r} cannot run here: {reason}; usable: {', '.join(usable)}")
    return _load(name, device)


# Not functools.cache, which torch.compile warns about.
_LOADED: dict[tuple[str, str], Backend] = {}


def _load(name: str, device: torch.device) -> Backend:
    key = (name, device.type)
    if key not in _LOADED:
        _LOADED[key] = _import(name, device)
    return _LOADED[key]


def _import(name: str, device: torch.device) -> Backend:
    from . import reference

    if name == "reference":
        stages = reference.antidiagonal_scores, reference.select_lists, reference.block_sparse_forward_lists
        return Backend(name, *stages)
    if name == "cpu":
        from .cpu import backend as cpu

        # Scores and lists are 8 bytes; the rest is room for copies of keys and for what each thread holds.
        return Backend(name, cpu.antidiagonal_scores, cpu.select, cpu.block_sparse_forward, pair_bytes=16)
    if name == "flex":
        from . import flex

        own = _import("cpu" if device.type == "cpu" else "triton", device)
        return own._replace(name=name, block_sparse_forward=flex.block_sparse_forward, pair_bytes=SORT_BYTES)
    if name == "fa4":
        from . import fa4

        return _import("triton", device)._replace(name=name, block_sparse_forward=fa4.block_sparse_forward)
    from .triton.attention_forward import block_sparse_forward
    from .triton.block_lists import mask_to_lists
    from .triton.residual import add, merge
    from .triton.scores import antidiagonal_scores
    from .triton.selection import select

    attend: Callable[..., tuple[Tensor, Tensor]] = block_sparse_forward
    if name == "triton-hopper":
        from .triton.attention_choice import HOPPER

        attend = partial(block_sparse_forward, force=HOPPER)
    # Scores and lists are 8 bytes.
    return Backend(name, antidiagonal_scores, select, attend, mask_to_lists, 8, merge, add)
