"""Joint attention of HunyuanVideo 1.5 without its `[B, 1, N, N]` mask."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn.functional import pad

from ..layers import ForwardState


class HunyuanVideo15JointAttention:
    """Does what the model's own processor does, with a key mask in place of the mask of all pairs.

    That mask takes 12.5 GB at 720p. Its rows differ for padding tokens of the text only: their output here is
    attention over the valid keys instead of zero, and nothing reads it.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        heads = (attn.heads, -1)
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(2, heads))
        key = attn.norm_k(attn.to_k(hidden_states).unflatten(2, heads))
        value = attn.to_v(hidden_states).unflatten(2, heads)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)

        video_tokens = hidden_states.shape[1]
        if encoder_hidden_states is not None:
            text_query = attn.add_q_proj(encoder_hidden_states).unflatten(2, heads)
            text_key = attn.add_k_proj(encoder_hidden_states).unflatten(2, heads)
            if attn.norm_added_q is not None:
                text_query = attn.norm_added_q(text_query)
            if attn.norm_added_k is not None:
                text_key = attn.norm_added_k(text_key)
            text_value = attn.add_v_proj(encoder_hidden_states).unflatten(2, heads)
            query = torch.cat([query, text_query], dim=1)
            key = torch.cat([key, text_key], dim=1)
            value = torch.cat([value, text_value], dim=1)

        output = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=self._key_mask(attention_mask, query.shape[1]),
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        output = output.flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return output, None
        video, text = output[:, :video_tokens], output[:, video_tokens:]
        video = attn.to_out[1](attn.to_out[0](video))
        return video, attn.to_add_out(text)

    def _key_mask(self, text_mask: Tensor | None, tokens: int) -> Tensor | None:
        """`[B, 1, 1, tokens]` from the mask of the text `[B, T]`: the video before it is all valid."""
        if text_mask is None:
            return None
        state: ForwardState = self._parallel_config.state
        return state.once("key_mask", text_mask, lambda mask: _extend(mask, tokens))


def _extend(text_mask: Tensor, tokens: int) -> Tensor:
    whole = pad(text_mask.bool(), (tokens - text_mask.shape[1], 0), value=True)
    return whole[:, None, None, :]
