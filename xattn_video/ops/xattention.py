"""xattention(): score, select and attend in one call, or dense attention with the reason why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..config import XAttnConfig
from .autocast import cast_as_autocast, without_autocast
from .backends import SORT_BYTES, Backend, auto_name, resolve
from .call_blocks import call_blocks, head_thresholds
from .checks import check_dense_tokens, check_query_key, check_threshold, check_value, default_scale
from .chunks import Part, rows_per_chunk
from .key_mask import KeyMask, num_blocks
from .stages import select_lists


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
    config, threshold = _settings(config, config_overrides)
    # As PyTorch's own attention does.
    query, key, value = cast_as_autocast(query), cast_as_autocast(key), cast_as_autocast(value)
    check_query_key(query, key)
    check_value(key, value)
    batch, heads, q_len, head_dim = query.shape
    kv_len, device = key.shape[2], query.device
    mask = KeyMask.checked(causal, kv_start, kv_lens, batch=batch, kv_len=kv_len, device=device)
    check_dense_tokens(dense_tokens, q_len, kv_len)
    if isinstance(threshold, tuple):
        threshold = head_thresholds(query, threshold)
    check_threshold(threshold, heads)

    with without_autocast(device):
        reason = dense_reason(query, key, config, causal=causal, value=value)
        if reason is None:
            # A list is taken too, and a key of the cache of blocks must be a tuple.
            exact = None if dense_tokens is None else (dense_tokens[0], dense_tokens[1])
            factor = default_scale(scale, head_dim)
            output, kept, valid = _attend_sparse(Part(query, key, value, mask), config, threshold, exact, factor)
        else:
            output, kept, valid = dense_attention(query, key, value, scale=scale, **mask.keywords), None, None
        if not return_stats:
            return output
        if valid is None:
            valid = mask.count_valid_blocks(batch, q_len, kv_len, block_size=config.block_size, device=device)
        valid = valid * heads
        return output, CallStats(valid if kept is None else kept.sum(), valid, reason)


def _attend_sparse(
    call: Part,
    config: XAttnConfig,
    threshold: float | Tensor,
    dense_tokens: tuple[int, int] | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output of a call, its kept blocks in parts that sum to their number, and its valid blocks where they are known.

    The valid blocks are those of one head, int64 0-d.
    """
    query, kv_len = call.query, call.key.shape[2]
    backend = resolve(config.backend, query.device, query.dtype)
    rules: dict[str, Any] = {
        "block_size": config.block_size,
        "dense_tokens": dense_tokens,
        "dense_last": config.dense_last,
    }
    attend = partial(_attend_part, backend, config, threshold, scale)
    rows = rows_per_chunk(
        query,
        kv_len,
        block_size=config.block_size,
        pair_bytes=backend.pair_bytes if config.selection == "threshold" else SORT_BYTES,
        max_bytes=config.max_extra_mib << 20,
    )
    if rows < num_blocks(query.shape[2], config.block_size):
        return *_attend_in_chunks(call, rows, attend, config, rules), None
    blocks = call_blocks(query, kv_len, call.mask, **rules)
    return *attend(call, call, blocks.valid, blocks.forced), blocks.total


def _attend_part(
    backend: Backend,
    config: XAttnConfig,
    threshold: float | Tensor,
    scale: float,
    scored: Part,
    part: Part,
    valid: Tensor,
    forced: Tensor,
) -> tuple[Tensor, Tensor]:
    """Output of a part, and the counts of its kept blocks, int32 `[B, H, Nq]`.

    `scored` are the part's queries, or those and a few more, which its scores come from; valid and forced bool
    `[B, 1, Nq, Nk]` are the part's. Of the eight parameters the first four are the call's and bound once.
    """
    sizes: dict[str, Any] = {"block_size": config.block_size, "scale": scale}
    scores = backend.antidiagonal_scores(
        scored.query, scored.key, stride=config.stride, **sizes, **scored.mask.keywords
    )
    if scored is not part:
        scores = scores[:, :, : valid.shape[2], : valid.shape[3]]
    rule: dict[str, Any] = {"threshold": threshold, "top_k": config.top_k, "top_ratio": config.top_ratio}
    lists = select_lists(backend, scores, valid, forced, **rule)
    # Not needed while attention runs.
    del scores
    output, _ = backend.block_sparse_forward(part.query, part.key, part.value, *lists, **sizes, **part.mask.keywords)
    return output, lists[1]


def _attend_in_chunks(
    call: Part,
    rows: int,
    attend: Callable[[Part, Part, Tensor, Tensor], tuple[Tensor, Tensor]],
    config: XAttnConfig,
    rules: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Output `[B, Hq, Sq, D]` in query's layout, and the number of kept blocks, int64 0-d; `rows` query blocks at a
    time. `attend` is `_attend_part`, and `rules` are what `valid_and_forced_blocks` takes.
    """
    query, key, _, mask = call
    batch, _, q_len, _ = query.shape
    kv_len, size = key.shape[2], config.block_size
    # The last group of keys that a query group sees may hold keys which are later than that group of queries. The
    # scores of the whole call take them in, so a chunk's last group must not be the last one that is scored.
    cut = mask.causal and (mask.kv_lens is not None or (kv_len - q_len) % config.stride)
    more = config.stride if cut else 0
    output = torch.empty_like(query)
    total = torch.zeros((), dtype=torch.int64, device=query.device)
    for first in range(0, num_blocks(q_len, size), rows):
        begin, end = first * size, min((first + rows) * size, q_len)
        part = call.cut(begin, end)
        if part is None:
            output[:, :, begin:end] = 0
            continue
        scored = call.cut(begin, min(end + more, q_len)) if more else part
        assert scored is not None
        blocks = mask.valid_and_forced_blocks(
            batch, q_len, kv_len, rows=(first, num_blocks(end, size)), device=query.device, **rules
        )
        columns = num_blocks(part.key.shape[2], size)
        output[:, :, begin:end], kept = attend(scored, part, *(flags[..., :columns] for flags in blocks))
        total = total + kept.sum()
    return output, total


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
    mask = KeyMask(causal, kv_start, kv_lens)
    if not mask.bounded and (not causal or q_len == kv_len):
        return scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=gqa)
    if mask.bounded:
        # Padding may hold anything, and NaN stays NaN when it is masked.
        padding = ~mask.valid_keys(kv_len, query.device)[:, None, :, None]
        key, value = key.masked_fill(padding, 0), value.masked_fill(padding, 0)
    visible = mask.visible(q_len, kv_len, query.device)[:, None]
    output = scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale, enable_gqa=gqa)
    first, end = mask.query_range(q_len, kv_len, query.device)
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
