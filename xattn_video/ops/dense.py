"""Calls that are dense: when and why, and PyTorch's attention under the same masking."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..config import XAttnConfig
from .backends import Backend, auto_name, resolve
from .key_mask import ALL_KEYS, KeyMask


def find_backend(
    config: XAttnConfig, *tensors: Tensor, q_len: int, kv_len: int, causal: bool = False, training: bool = False
) -> Backend | str:
    """The backend that computes a call sparsely, or the reason why the call is dense.

    `autograd`: an input requires grad (the kernels have no backward pass). `min_tokens`: the key length is below
    `config.min_tokens`. `decode`: causal with fewer queries than a block. `no_backend`: `auto` on a device that
    has neither Triton nor the CPU path. `training`: the model is in training mode, where gradient checkpointing may
    run a forward without gradients that it will run again with them.

    Args:
        tensors: query, key and value in any layout.
        q_len, kv_len: tokens of the whole call, of which a rank of a parallel call may hold a part.

    Raises:
        ValueError: a named backend that cannot run here.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "autograd"
    if kv_len < config.min_tokens:
        return "min_tokens"
    if causal and q_len < config.block_size:
        return "decode"
    device, dtype = tensors[0].device, tensors[0].dtype
    if config.backend == "auto" and auto_name(device, dtype) is None:
        return "no_backend"
    if training:
        return "training"
    return resolve(config.backend, device, dtype)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: KeyMask = ALL_KEYS,
    *,
    scale: float | None = None,
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
    if not mask.bounded and (not mask.causal or q_len == kv_len):
        return scaled_dot_product_attention(query, key, value, is_causal=mask.causal, scale=scale, enable_gqa=gqa)
    if mask.bounded:
        # Padding may hold anything, and NaN stays NaN when it is masked.
        padding = ~mask.valid_keys(kv_len, query.device)[:, None, :, None]
        key, value = key.masked_fill(padding, 0), value.masked_fill(padding, 0)
    visible = mask.visible(q_len, kv_len, query.device)[:, None]
    output = scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale, enable_gqa=gqa)
    first, end = mask.query_range(q_len, kv_len, query.device)
    return output.masked_fill((first >= end)[:, None, :, None], 0)
