"""The transformer's attention while it is trained: the same maths as Wan's processor, about twice as fast on a CPU.

Two things differ in how it is done. Plain bfloat16 matrix products replace the fused kernel, which has no fast
bfloat16 path on many CPUs. And a prompt's padding, hundreds of equal keys in WanPipeline, is one key or a few whose
logits are raised by the logarithm of how many each stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Up to this many keys the probabilities are kept for the backward pass, above they are computed again.
_KEPT = 2048
_ROWS = 256


class TrainingAttention:
    """An attention processor for `WanTransformer3DModel` without image conditioning.

    Set `text_bias`, from `padding_bias`, before each forward pass, and `rotary` where the tokens have other places
    than the model would give them: a pair of cosines and sines, as `WanTransformer3DModel.rope` returns it.
    """

    def __init__(self) -> None:
        self.text_bias: torch.Tensor | None = None
        self.rotary: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = _normed(attn.norm_q, attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = _normed(attn.norm_k, attn.to_k(context)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(context).unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            cosines, sines = self.rotary or rotary_emb
            turn = torch.complex(cosines[..., 0::2].float(), sines[..., 1::2].float())
            query, key = _rotate(query, turn), _rotate(key, turn)
        # [batch, tokens, heads, dim] to [batch, heads, tokens, dim], in the dtype that the projections give
        query, key, value = (x.to(value.dtype).transpose(1, 2).contiguous() for x in (query, key, value))
        query = query * query.shape[-1] ** -0.5
        if encoder_hidden_states is not None:
            logits = query @ key.transpose(-1, -2)
            if self.text_bias is not None:
                logits = logits + self.text_bias.to(logits.dtype)
            output = torch.softmax(logits, dim=-1).to(value.dtype) @ value
        elif key.shape[2] <= _KEPT:
            # One item at a time: its scores stay in the cache.
            items = [torch.softmax(q @ k.transpose(-1, -2), -1) @ v for q, k, v in zip(query, key, value, strict=True)]
            output = torch.stack(items)
        else:
            # torch gives this method no types
            apply: Callable[..., torch.Tensor] = _RowAttention.apply
            output = apply(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)).unflatten(0, query.shape[:2])
        output = output.transpose(1, 2).flatten(2).type_as(hidden_states)
        projected: torch.Tensor = attn.to_out[1](attn.to_out[0](output))
        return projected


def padding_bias(text: torch.Tensor, length: int) -> torch.Tensor:
    """The logits' bias that makes `text` `[batch, rows, dim]` act as if padded with zeros to `length` rows.

    Each item ends with at least one row of zeros. Gives float32 `[batch, 1, 1, rows]`.
    """
    padding = (text == 0).all(-1)
    count = padding.sum(1, keepdim=True)
    rows = text.shape[1]
    bias = torch.log((length - rows + count) / count)
    return torch.where(padding, bias, torch.zeros_like(bias))[:, None, None]


class _RowAttention(torch.autograd.Function):
    """Softmax attention of scaled queries `[items, tokens, dim]`, some rows at a time, recomputed backwards."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        keys = key.transpose(1, 2)
        return torch.cat(
            [torch.bmm(torch.softmax(torch.bmm(rows, keys), -1), value) for rows in query.split(_ROWS, dim=1)], dim=1
        )

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value = ctx.saved_tensors
        keys, values = key.transpose(1, 2), value.transpose(1, 2)
        query_gradient = []
        # Summed over many rows: in float32.
        key_gradient = torch.zeros_like(key, dtype=torch.float32)
        value_gradient = torch.zeros_like(key_gradient)
        for rows, upper in zip(query.split(_ROWS, 1), gradient.contiguous().split(_ROWS, 1), strict=True):
            probability = torch.softmax(torch.bmm(rows, keys), -1)
            value_gradient += torch.bmm(probability.transpose(1, 2), upper)
            slope = torch.bmm(upper, values)
            slope = probability * (slope - (probability * slope).sum(-1, keepdim=True))
            query_gradient.append(torch.bmm(slope, key))
            key_gradient += torch.bmm(slope.transpose(1, 2), rows)
        return torch.cat(query_gradient, 1), key_gradient.to(key.dtype), value_gradient.to(value.dtype)


def _normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    # The weight in the input's dtype: under autocast the module itself would mix two and take a slow path.
    return torch.nn.functional.rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.eps)


def _rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2)
