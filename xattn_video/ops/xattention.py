"""xattention(): score, select and attend in one call, or dense attention with the reason why."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, NamedTuple

from torch import Tensor

from ..config import XAttnConfig, lists_settings, name_nearest
from .checks import checked_call, without_autocast
from .dense import dense_attention, find_backend
from .key_mask import KeyMask
from .sparse import attend_sparse


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

# Arguments of torch's scaled_dot_product_attention -> what to give here instead.
_OF_SDPA = {
    "is_causal": "here it is causal",
    "attn_mask": "here kv_start and kv_lens bound the valid keys of each item, and there is no other mask",
    "dropout_p": "there is no dropout",
    "enable_gqa": "leave it out: the shapes of query and key tell it",
}


@lists_settings
def xattention(  # noqa: PLR0913 - public, its parameters are settings
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
    frame_tokens: int | None = None,
    return_stats: bool = False,
    **config_overrides: Any,
) -> Tensor | tuple[Tensor, CallStats]:
    """Block-sparse attention with XAttention's choice of blocks.

    A call is dense, and `CallStats.dense_reason` says why, where an input requires a gradient (`autograd`), there are
    fewer keys than `min_tokens`, a causal call has fewer queries than a block (`decode`), or the device has no fast
    implementation (`no_backend`).

    Args:
        query: `[B, Hq, Sq, D]`, floating point.
        key, value: `[B, Hkv, Sk, D]`; `Hq % Hkv == 0`. Under `torch.autocast` all three are cast to its dtype.
        config: settings; None is the defaults. What it says of steps and layers (`warmup_steps`, `residual`,
            `dense_layers` and their like) belongs to the model integrations and is not looked at here.
        causal: query i of item b sees keys up to `i + kv_lens[b] - Sq`.
        scale: factor on the products, finite; None is `1 / sqrt(D)`.
        kv_start, kv_lens: integer `[B]`, the range of valid keys; None is 0 and Sk.
        dense_tokens: token range of a joint sequence that stays exact (text), or None.
        frame_tokens: tokens of one latent frame, for `anchors` in a video whose tokens are whole frames one after the
            other, or None.
        return_stats: also return `CallStats`.
        **config_overrides: settings that replace those of config; `threshold` may also be a tensor, 0-d or `[Hq]`.

    Returns:
        output `[B, Hq, Sq, D]` in query's dtype, or `(output, CallStats)`.

    Raises:
        ValueError: shapes or settings that do not go together, or a named backend that cannot run here.
        TypeError: an override that is no setting, or a query, key or value that is no tensor.

    Example:
        >>> query = key = value = torch.randn(1, 4, 4096, 64)
        >>> output, stats = xattention(query, key, value, threshold=0.9, return_stats=True)
        >>> output.shape, 0 < stats.density <= 1
        (torch.Size([1, 4, 4096, 64]), True)
    """
    config, threshold = _settings(config, config_overrides)
    mask = KeyMask(causal, kv_start, kv_lens)
    call = checked_call(
        query, key, value, mask,
        threshold=threshold, scale=scale, dense_tokens=dense_tokens, frame_tokens=frame_tokens,
    )  # fmt: skip
    query, key, value, mask = call[:4]
    batch, heads, q_len, _ = query.shape
    kv_len, device = key.shape[2], query.device
    with without_autocast(device):
        backend = find_backend(config, query, key, value, q_len=q_len, kv_len=kv_len, causal=causal)
        if not isinstance(backend, str):
            output, kept, valid = attend_sparse(backend, call, config)
            return (output, CallStats(kept.sum(), valid * heads, None)) if return_stats else output
        output = dense_attention(query, key, value, mask, scale=scale)
        if not return_stats:
            return output
        valid = mask.count_valid_blocks(batch, q_len, kv_len, block_size=config.block_size, device=device) * heads
        return output, CallStats(valid, valid, backend)


def _settings(
    config: XAttnConfig | None, overrides: dict[str, Any]
) -> tuple[XAttnConfig, float | tuple[float, ...] | Tensor]:
    """The configuration with its overrides, and the threshold apart, which may be a tensor."""
    config = XAttnConfig() if config is None else config
    threshold = overrides.pop("threshold", None)
    if overrides:
        unknown = sorted(set(overrides) - _SETTINGS)
        if unknown:
            told = [f"{name} ({_OF_SDPA[name]})" for name in unknown if name in _OF_SDPA]
            others = name_nearest(set(unknown) - _OF_SDPA.keys(), inspect.signature(xattention).parameters)
            raise TypeError(f"xattention() got settings it does not know: {', '.join([*others, *told])}")
        config = config.replace(**overrides)
    if threshold is None:
        return config, config.call_threshold
    if isinstance(threshold, Tensor):
        return config, threshold
    return config, config.replace(threshold=threshold).call_threshold
