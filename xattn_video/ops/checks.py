"""What the public functions do with their arguments first: cast them as autocast asks, and check them.

The checks look at shapes and dtypes, and at values only on a CPU. Nothing behind them checks again.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from ..config import not_percent
from .call_blocks import head_thresholds
from .key_mask import KeyMask
from .sparse import Call

MAX_HEAD_DIM = 256


def checked_call(  # noqa: PLR0913 - the parameters of an attention call
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: KeyMask,
    *,
    threshold: float | tuple[float, ...] | Tensor,
    scale: float | None = None,
    dense_tokens: tuple[int, int] | None = None,
    frame_tokens: int | None = None,
) -> Call:
    """The arguments of `xattention`, checked, cast as autocast asks and in the form that the stages take.

    Raises:
        TypeError: query, key or value is no tensor.
        ValueError: shapes, dtypes or values that do not go together.
    """
    check_tensors(query=query, key=key, value=value)
    # As PyTorch's own attention does.
    query, key, value = _cast_as_autocast(query), _cast_as_autocast(key), _cast_as_autocast(value)
    check_query_key(query, key)
    check_value(key, value)
    _, heads, q_len, head_dim = query.shape
    mask = checked_mask(mask, key)
    check_dense_tokens(dense_tokens, q_len, key.shape[2])
    if isinstance(threshold, tuple):
        threshold = head_thresholds(query, threshold)
    check_threshold(threshold, heads)
    # A list is taken too, and a key of the cache of blocks must be a tuple.
    exact = None if dense_tokens is None else (dense_tokens[0], dense_tokens[1])
    if frame_tokens is not None and frame_tokens < 1:
        raise ValueError(f"frame_tokens must be 1 or more, got {frame_tokens}")
    return Call(query, key, value, mask, default_scale(scale, head_dim), threshold, exact, frame_tokens)


def checked_mask(mask: KeyMask, key: Tensor, kv_len: int | None = None) -> KeyMask:
    """The mask with bounds that are contiguous int32 on key's device.

    Args:
        mask: with the bounds that a user gave.
        key: `[B, Hkv, Sk, D]`, or another tensor of that batch size and device.
        kv_len: None is Sk.

    Raises:
        ValueError: a wrong shape or dtype, and on a CPU a value out of range.
    """
    if not mask.bounded:
        return mask
    batch, length = key.shape[0], key.shape[2] if kv_len is None else kv_len
    start = _checked_bound("kv_start", mask.kv_start, batch, length, key.device)
    return KeyMask(mask.causal, start, _checked_bound("kv_lens", mask.kv_lens, batch, length, key.device))


def check_tensors(**tensors: Tensor) -> None:
    """Raise `TypeError` for what is no tensor, and `ValueError` for a sparse one or another unusual layout."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got layout {tensor.layout}")


def check_query_key(query: Tensor, key: Tensor) -> None:
    """Raise `ValueError` or `TypeError` unless query `[B, Hq, Sq, D]` and key `[B, Hkv, Sk, D]` go together."""
    check_tensors(query=query, key=key)
    for name, tensor in (("query", query), ("key", key)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [batch, heads, tokens, head_dim], got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating point tensor, got {tensor.dtype}")
        if 0 in tensor.shape:
            raise ValueError(f"{name} must not be empty, got shape {tuple(tensor.shape)}")
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"query and key must have one batch size, got {query.shape[0]} and {key.shape[0]}")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must have one head_dim, got {query.shape[3]} and {key.shape[3]}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads, got {query.shape[1]} and {key.shape[1]} heads")
    if query.dtype != key.dtype:
        raise ValueError(f"query and key must have one dtype, got {query.dtype} and {key.dtype}")
    if query.device != key.device:
        raise ValueError(f"query and key must be on one device, got {query.device} and {key.device}")
    if query.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be {MAX_HEAD_DIM} or less, got {query.shape[3]}")


def check_value(key: Tensor, value: Tensor) -> None:
    """Raise `ValueError` or `TypeError` unless value is a tensor that matches key in shape, dtype and device."""
    check_tensors(value=value)
    if value.shape != key.shape:
        raise ValueError(f"value must have key's shape {tuple(key.shape)}, got {tuple(value.shape)}")
    if value.dtype != key.dtype or value.device != key.device:
        raise ValueError(
            f"value must have key's dtype and device ({key.dtype}, {key.device}), got ({value.dtype}, {value.device})"
        )


def check_block_mask(block_mask: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise `ValueError` unless it is bool on that device and can be expanded to that shape over batch and heads."""
    if block_mask.dtype != torch.bool:
        raise ValueError(f"block_mask must be bool, got {block_mask.dtype}")
    fits = block_mask.ndim == 4 and block_mask.shape[2:] == shape[2:]
    if not fits or any(have not in (1, want) for have, want in zip(block_mask.shape[:2], shape[:2], strict=True)):
        raise ValueError(f"block_mask must have shape {shape}, got {tuple(block_mask.shape)}")
    if block_mask.device != device:
        raise ValueError(f"block_mask must be on query's device {device}, got {block_mask.device}")


def check_dense_tokens(dense_tokens: tuple[int, int] | None, q_len: int, kv_len: int) -> None:
    """Raise `ValueError` unless the range lies inside a joint sequence of queries and keys."""
    if dense_tokens is None:
        return
    if q_len != kv_len:
        raise ValueError(f"dense_tokens needs joint attention (one length), got {q_len} queries and {kv_len} keys")
    start, stop = dense_tokens
    if not 0 <= start <= stop <= kv_len:
        raise ValueError(f"dense_tokens must be (start, stop) inside 0..{kv_len}, got {tuple(dense_tokens)}")


def check_dense_last(dense_last: int, causal: bool) -> None:
    """Raise `ValueError` unless it is a number of queries, and 0 where attention is not causal."""
    if isinstance(dense_last, bool) or not isinstance(dense_last, int) or dense_last < 0:
        raise ValueError(f"dense_last must be an integer of 0 or more, got {dense_last}")
    if dense_last and not causal:
        raise ValueError(f"dense_last goes with causal attention, got dense_last {dense_last} and causal False")


def check_threshold(threshold: float | Tensor, heads: int) -> None:
    """Raise `ValueError` unless threshold is a number in (0, 1] or a tensor 0-d or `[heads]`."""
    if not isinstance(threshold, Tensor):
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {threshold}{not_percent(threshold)}")
        return
    if threshold.ndim > 1 or (threshold.ndim == 1 and threshold.shape[0] not in (1, heads)):
        raise ValueError(f"threshold must be a number or have shape ({heads},), got shape {tuple(threshold.shape)}")
    # Reading values of a device tensor would make the host wait for it.
    readable = threshold.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not bool(((threshold > 0) & (threshold <= 1)).all()):
        raise ValueError(f"threshold must be in (0, 1], got {threshold.tolist()}")


def default_scale(scale: float | None, head_dim: int) -> float:
    """`scale`, or `1 / sqrt(head_dim)` where it is None. Raises `ValueError` for NaN and infinity."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    scale = float(scale)
    if not torch.compiler.is_compiling() and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return scale


def _checked_bound(name: str, bound: Tensor | None, batch: int, kv_len: int, device: torch.device) -> Tensor | None:
    if bound is None:
        return None
    if not isinstance(bound, Tensor) or bound.is_floating_point() or bound.dtype == torch.bool:
        raise ValueError(f"{name} must be an integer tensor [batch], got {bound!r}")
    if bound.shape != (batch,):
        raise ValueError(f"{name} must have shape ({batch},), got {tuple(bound.shape)}")
    # Reading values of a device tensor would make the host wait for it.
    readable = bound.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and (int(bound.min()) < 0 or int(bound.max()) > kv_len):
        raise ValueError(f"{name} must lie between 0 and the key length {kv_len}, got {bound.tolist()}")
    # The kernels read one item after the other.
    return bound.to(device=device, dtype=torch.int32).contiguous()


def _autocasts(device: torch.device) -> bool:
    """Whether autocast is on for this kind of device."""
    # the common ones by name: torch.compile of torch 2.8 cannot look into is_autocast_available
    available = device.type in ("cpu", "cuda", "xpu") or torch.amp.is_autocast_available(device.type)
    return available and torch.is_autocast_enabled(device.type)


def _cast_as_autocast(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that autocast asks for, where it is on; float64 and integers stay."""
    if tensor.dtype == torch.float64 or not tensor.is_floating_point() or not _autocasts(tensor.device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What is computed inside keeps its dtypes: scores in float32 stay so."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device) else contextlib.nullcontext()
