"""What each threshold would cost and give in each head, measured on the attention calls of a real run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xattn_video import block_sparse_attention, score_blocks, select_blocks
from xattn_video.ops import Call, dense_attention


class Measurement:
    """Density and error of every head at every threshold, as means over the calls of its layer.

    It goes as `on_call` to `XAttnProcessor` or `use_xattention`. A call is scored once; each threshold then selects and
    attends. Error is the norm of (sparse - dense output) over all tokens, divided by that of the dense output.

    Args:
        grid: the thresholds, falling.
        stride, block_size, dense_last: as of `XAttnConfig`.

    Attributes:
        on: whether calls are measured now.
        calls: measured calls for each layer, in the order of the layers' first calls.
    """

    def __init__(self, grid: Sequence[float], *, stride: int, block_size: int, dense_last: int = 0) -> None:
        self.grid = tuple(grid)
        self.on = True
        self.calls: dict[str, int] = {}
        self._stride = stride
        self._block_size = block_size
        self._dense_last = dense_last
        # float64 [2, heads, thresholds] for each layer: sums of densities and errors.
        self._sums: dict[str, Tensor] = {}

    def __call__(self, layer: str, call: Call) -> None:
        """Measure one call, where measuring is on."""
        if not self.on:
            return
        with torch.no_grad():
            found = self._measure(call)
        self._sums[layer] = self._sums.get(layer, 0) + found
        self.calls[layer] = self.calls.get(layer, 0) + 1

    def means(self, layer: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean density and mean error of a layer, float64 `[heads, thresholds]` each."""
        density, error = (self._sums[layer] / self.calls[layer]).numpy()
        return density, error

    def _measure(self, call: Call) -> Tensor:
        """float64 `[2, heads, thresholds]` on the CPU."""
        query, key, value, mask, scale = call[:5]
        causal: dict[str, Any] = {"causal": mask.causal, "kv_start": mask.kv_start, "kv_lens": mask.kv_lens}
        lengths = {"q_len": query.shape[2], "kv_len": key.shape[2]}
        scores = score_blocks(
            query, key, stride=self._stride, block_size=self._block_size, scale=scale, **causal
        )  # [B, H, Nq, Nk]
        rule: dict[str, Any] = {"block_size": self._block_size, "dense_tokens": call.dense_tokens, **lengths, **causal}
        if mask.causal:
            rule["dense_last"] = self._dense_last
        dense = dense_attention(query, key, value, mask, scale=scale)
        valid = select_blocks(scores, threshold=1.0, **rule).sum((0, 2, 3))
        columns = []
        for threshold in self.grid:
            kept = select_blocks(scores, threshold=threshold, **rule)
            sparse = block_sparse_attention(query, key, value, kept, block_size=self._block_size, scale=scale, **causal)
            assert isinstance(sparse, Tensor)
            columns.append(torch.stack([kept.sum((0, 2, 3)) / valid, _relative_error(sparse, dense)]))
        return torch.stack(columns, dim=-1).double().cpu()


def _relative_error(sparse: Tensor, dense: Tensor) -> Tensor:
    """Norm of the difference over that of the dense output for each head, float32 `[H]`."""
    errors = []
    # A head at a time: copies in float32 of all heads would take gigabytes in a large model.
    for head in range(dense.shape[1]):
        wanted = dense[:, head].float()
        error = torch.linalg.vector_norm(sparse[:, head].float() - wanted)
        # A head whose output is zero has no error in the dense blocks, and no scale to measure one by.
        errors.append(error / torch.linalg.vector_norm(wanted).clamp_min(torch.finfo(torch.float32).tiny))
    return torch.stack(errors)
