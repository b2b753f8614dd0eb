"""xattention(): score, select and attend in one call, or dense attention with the reason why."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .autocast import autocasts, cast_as_autocast
from .backends import Backend, auto_name, resolve
from .blocks import key_range, query_key_range, valid_blocks
from .call_blocks import call_blocks, head_thresholds
from .checks import (
    check_dense_tokens,
    check_key_bounds,
    check_query_key,
    check_threshold,
    check_value,
    default_scale,
)
from .config import XAttnConfig
from .selection import select_valid

# A block mask, bool [B, H, Nq, Nk]; or lists of kept blocks, int32 of that shape, and their counts, int32 [B, H, Nq].
Kept: TypeAlias = Tensor | tuple[Tensor, Tensor]


class CallStats(NamedTuple):
    """What one call did. The counts stay on the device: reading them makes the host wait.

    Attributes:
        kept: kept blocks over batch and heads, int64 0-d.
        valid: valid blocks over batch and heads, int64 0-d; equal to kept for a dense call.
        dense_reason: why the call was dense, or None if it was sparse.
    """

    kept: Tensor
    valid: Tensor
    dense_reason: str | None

    @property
    def density(self) -> float:
        """Kept blocks / valid blocks, 1.0 for a call without a valid block. Waits for the device."""
        valid = int(self.valid)
        return int(self.kept) / valid if valid else 1.0


_SETTINGS = frozenset(field.name for field in dataclasses.fields(XAttnConfig))


def xattention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: XAttnConfig | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    kv_start: Tensor | None = None,
    kv_lens: Tensor | None = None,
    dense_tokens: tuple[int, int] | None = None,
    return_stats: bool = False,
    **config_overrides: Any,
) -> Tensor | tuple[Tensor, CallStats]:
    """Block-sparse attention with XAttention's choice of blocks.

    Goes dense, and says so in the statistics, for the reasons that `dense_reason` names.

    Args:
        query: `[B, Hq, Sq, D]`, floating point.
        key, value: `[B, Hkv, Sk, D]`; `Hq % Hkv == 0`. Under `torch.autocast` all three are cast to its dtype.
        config: settings; None is the defaults. Of its fields, `warmup_steps` and `dense_layers` belong to the
            model integrations and are not looked at here.
        causal: query i of item b sees keys up to `i + kv_lens[b] - Sq`.
        scale: factor on the products; None is `1 / sqrt(D)`.
        kv_start, kv_lens: integer `[B]`, the range of valid keys; None is 0 and Sk.
        dense_tokens: token range of a joint sequence that stays exact (text), or None.
        return_stats: also return `CallStats`.
        **config_overrides: settings that replace those of config; `threshold` may also be a tensor, 0-d or `[Hq]`.

    Returns:
        output `[B, Hq, Sq, D]` in query's dtype, or `(output, CallStats)`.

    Raises:
        ValueError: shapes or settings that do not go together, or a named backend that cannot run here.
        TypeError: an override that is no setting.

    Example:
        >>> query = key = value = torch.randn(1, 4, 4096, 64)
        >>> output, stats = xattention(query, key, value, threshold=0.9, return_stats=True)
        >>> output.shape, 0 < stats.density <= 1
        (torch.Size([1, 4, 4096, 64]), True)
    """
    if autocasts(query.device):
        # as PyTorch's own attention does; and what the stages compute in float32 stays so
        query, key, value = cast_as_autocast(query), cast_as_autocast(key), cast_as_autocast(value)
        with torch.autocast(query.device.type, enabled=False):
            return xattention(
                query,
                key,
                value,
                config,
                causal=causal,
                scale=scale,
                kv_start=kv_start,
                kv_lens=kv_lens,
                dense_tokens=dense_tokens,
                return_stats=return_stats,
                **config_overrides,
            )
    config, threshold = _settings(config, config_overrides)
    check_query_key(query, key)
    check_value(key, value)
    batch, heads, q_len, head_dim = query.shape
    kv_len, device = key.shape[2], query.device
    kv_start, kv_lens = check_key_bounds(kv_start, kv_lens, batch, kv_len, device)
    check_dense_tokens(dense_tokens, q_len, kv_len)
    if isinstance(threshold, tuple):
        threshold = head_thresholds(query, threshold)
    check_threshold(threshold, heads)
    masking: dict[str, Any] = {"causal": causal, "kv_start": kv_start, "kv_lens": kv_lens}

    reason = dense_reason(query, key, config, causal=causal, value=value)
    geometry: dict[str, Any] = {"block_size": config.block_size, **masking}
    if reason is not None:
        output = dense_attention(query, key, value, scale=scale, **masking)
        if not return_stats:
            return output
        valid = valid_blocks(batch, q_len, kv_len, device=device, **geometry)
        return output, CallStats(valid.sum() * heads, valid.sum() * heads, reason)

    backend = resolve(config.backend, device, query.dtype)
    factor = default_scale(scale, head_dim)
    exact = None if dense_tokens is None else tuple(dense_tokens)
    blocks = call_blocks(query, kv_len, dense_tokens=exact, dense_last=config.dense_last, **geometry)
    scores = backend.antidiagonal_scores(query, key, stride=config.stride, scale=factor, **geometry)
    kept = select_kept(backend, scores, blocks.valid, blocks.forced, config, threshold)
    output = attend_kept(backend, query, key, value, kept, scale=factor, **geometry)
    if not return_stats:
        return output
    # the counts of the lists, or the flags of the mask
    kept_blocks = kept if isinstance(kept, Tensor) else kept[1]
    return output, CallStats(kept_blocks.sum(), blocks.total * heads, None)


def select_kept(
    backend: Backend,
    scores: Tensor,
    valid: Tensor,
    forced: Tensor,
    config: XAttnConfig,
    threshold: float | Tensor,
) -> Kept:
    """The selection of `xattention`: lists of kept blocks where the backend takes them, else the block mask.

    scores `[B, H, Nq, Nk]` of the backend; valid and forced bool `[B, 1, Nq, Nk]`.
    """
    if backend.lists is not None and config.selection == "threshold":
        return backend.lists.select(scores, valid, forced, threshold=threshold)
    rule: dict[str, Any] = {"threshold": threshold, "top_k": config.top_k, "top_ratio": config.top_ratio}
    return select_valid(scores, valid, forced, select=backend.select, **rule)


def attend_kept(backend: Backend, query: Tensor, key: Tensor, value: Tensor, kept: Kept, **settings: Any) -> Tensor:
    """The attention of `xattention` over what `select_kept` kept; the settings are those of the backend's."""
    if isinstance(kept, Tensor):
        return backend.block_sparse_forward(query, key, value, kept, **settings)[0]
    assert backend.lists is not None
    return backend.lists.block_sparse_forward(query, key, value, *kept, **settings)[0]


def dense_reason(
    query: Tensor, key: Tensor, config: XAttnConfig, *, causal: bool = False, value: Tensor | None = None
) -> str | None:
    """Why `xattention` would compute this call densely, or None.

    `autograd`: an input requires grad (the kernels have no backward pass). `min_tokens`: the key length is below
    `config.min_tokens`. `decode`: causal with fewer queries than a block. `no_backend`: `auto` on a device that
    has neither Triton nor the CPU path.
    """
    inputs = (query, key) if value is None else (query, key, value)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return "autograd"
    if key.shape[2] < config.min_tokens:
        return "min_tokens"
    if causal and query.shape[2] < config.block_size:
        return "decode"
    if config.backend == "auto" and auto_name(query.device, query.dtype) is None:
        return "no_backend"
    return None


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    kv_start: Tensor | None = None,
    kv_lens: Tensor | None = None,
) -> Tensor:
    """PyTorch's dense attention with the masking rules of `xattention`.

    Shapes are those of `xattention`. A query that sees no key gets 0. Builds a `[B, 1, Sq, Sk]` mask where the
    range of valid keys or causal attention with `Sq != Sk` needs one, and for a range copies of key and value
    without what padding holds.
    """
    if scale is not None and scale <= 0:
        # some kernels of PyTorch mask before they scale, and would turn the mask round or meet 0 * -inf
        query, scale = query * scale, 1.0
    gqa = query.shape[1] != key.shape[1]
    q_len, kv_len = query.shape[2], key.shape[2]
    if kv_start is None and kv_lens is None and (not causal or q_len == kv_len):
        return scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=gqa)
    first, end = query_key_range(q_len, kv_len, causal=causal, kv_start=kv_start, kv_lens=kv_lens, device=query.device)
    position = torch.arange(kv_len, device=query.device)
    if kv_start is not None or kv_lens is not None:
        # padding may hold anything, and a masked NaN is still one
        start, stop = key_range(kv_len, kv_start, kv_lens, query.device)
        padding = (position < start[:, None]) | (position >= stop[:, None])
        key, value = (part.masked_fill(padding[:, None, :, None], 0) for part in (key, value))
    visible = (position >= first[:, None, :, None]) & (position < end[:, None, :, None])
    output = scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale, enable_gqa=gqa)
    return output.masked_fill((first >= end)[:, None, :, None], 0)


def _settings(
    config: XAttnConfig | None, overrides: dict[str, Any]
) -> tuple[XAttnConfig, float | tuple[float, ...] | Tensor]:
    """The configuration with its overrides, and the threshold apart, which may be a tensor."""
    config = XAttnConfig() if config is None else config
    threshold = overrides.pop("threshold", None)
    if overrides:
        unknown = sorted(set(overrides) - _SETTINGS)
        if unknown:
            raise TypeError(f"xattention() got settings it does not know: {', '.join(unknown)}")
        config = config.replace(**overrides)
    if threshold is None:
        return config, config.threshold
    if isinstance(threshold, Tensor):
        return config, threshold
    return config, config.replace(threshold=threshold).threshold
