"""The noise floor's attention: dense as ever, its keys summed in reverse order.

Softmax attention does not depend on the order of its keys; floating-point sums do. So a video made this way differs
from the dense one by rounding alone, carried through all denoising steps, and no sparse video can be told apart from
dense more closely than that. Same kernel, same dtype, any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from xattn_video_pipelines.common.errors import UserError


class _ReversedKeys(TorchFunctionMode):
    """While active, torch's attention inside of the watched models takes its keys and values in reverse order."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        self.calls = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is scaled_dot_product_attention and self.depth:
            return self._attend(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        # A causal call has no mask that could be reversed with the keys; video models have none.
        if not is_causal:
            self.calls += 1
            key, value = key.flip(-2), value.flip(-2)
            attn_mask = attn_mask if attn_mask is None or attn_mask.shape[-1] == 1 else attn_mask.flip(-1)
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)


@contextmanager
def reversed_keys(transformers: list[torch.nn.Module]) -> Iterator[None]:
    """While it is open, attention inside of `transformers` sums in reverse order; they themselves are not changed.

    Raises:
        UserError: on leaving, if no attention call came by: the models do not use torch's attention function.
    """
    mode = _ReversedKeys()

    def enter(*_: object) -> None:
        mode.depth += 1

    def leave(*_: object) -> None:
        mode.depth -= 1

    handles = []
    for model in transformers:
        handles += [model.register_forward_pre_hook(enter), model.register_forward_hook(leave, always_call=True)]
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()
    if mode.calls == 0:
        raise UserError(
            "--attention dense-alt: this model's attention does not go through torch's scaled_dot_product_attention "
            "(is DIFFUSERS_ATTN_BACKEND set?)"
        )
