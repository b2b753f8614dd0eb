"""Argument checks that the public functions share. They look at shapes and dtypes, and at values only on a CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_HEAD_DIM = 256


def check_query_key(query: Tensor, key: Tensor) -> None:
    """Raise `ValueError` unless query `[B, Hq, Sq, D]` and key `[B, Hkv, Sk, D]` go together."""
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
    """Raise `ValueError` unless value matches key in shape, dtype and device."""
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
            raise ValueError(f"threshold must be in (0, 1], got {threshold}")
        return
    if threshold.ndim > 1 or (threshold.ndim == 1 and threshold.shape[0] not in (1, heads)):
        raise ValueError(f"threshold must be a number or have shape ({heads},), got shape {tuple(threshold.shape)}")
    # Reading values of a device tensor would make the host wait for it.
    readable = threshold.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not bool(((threshold > 0) & (threshold <= 1)).all()):
        raise ValueError(f"threshold must be in (0, 1], got {threshold.tolist()}")


def default_scale(scale: float | None, head_dim: int) -> float:
    """`scale`, or `1 / sqrt(head_dim)` where it is None."""
    return 1.0 / math.sqrt(head_dim) if scale is None else float(scale)
