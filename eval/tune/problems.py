"""The problems on which `tune` launches its kernels: small ones that float64 can judge, and a large one to be timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn_video import score_blocks, select_blocks
from xattn_video.ops import reference
from xattn_video.ops.block_lists import mask_to_lists
from xattn_video.ops.key_mask import KeyMask, num_blocks
from xattn_video.ops.triton.launch_tables import LaunchConfig
from xattn_video.testing import causal_text_like_qkv
from xattn_video_eval.bench import DTYPES, Case, make_inputs

SCORES, ATTEND, HOPPER = KERNELS = ("antidiagonal_scores", "block_sparse", "attention_hopper")
BLOCK_SIZE, STRIDE = 128, 8


class Shape(NamedTuple):
    """All that the compiler sees of a problem: tensors `[1, heads, tokens, head_dim]`, one head of keys for each."""

    kernel: str
    dtype: torch.dtype
    heads: int
    tokens: int
    head_dim: int
    causal: bool

    def runner(self) -> Runner:
        """A problem of that shape that holds no memory: to compile for, not to launch."""
        query = torch.empty(1, self.heads, self.tokens, self.head_dim, dtype=self.dtype, device="meta")
        blocks = num_blocks(self.tokens, BLOCK_SIZE)
        block_mask = torch.empty(1, self.heads, blocks, blocks, dtype=torch.bool, device="meta")
        return Runner(self.kernel, query, query, query, block_mask, self.causal)


@dataclass(eq=False)
class Runner:
    """Launches one kernel on one problem: query, key, value `[1, H, S, D]` and, to attend, a block mask."""

    kernel: str
    query: Tensor
    key: Tensor
    value: Tensor
    block_mask: Tensor
    causal: bool

    def __post_init__(self) -> None:
        self._lists = mask_to_lists(self.block_mask)
        self._lse = torch.empty(self.query.shape[:3], device=self.query.device)
        self._options: dict[str, Any] = {
            "block_size": BLOCK_SIZE,
            "causal": self.causal,
            "scale": self.query.shape[3] ** -0.5,
            "kv_start": None,
            "kv_lens": None,
        }

    @property
    def shape(self) -> Shape:
        """Of this problem."""
        _, heads, tokens, head_dim = self.query.shape
        return Shape(self.kernel, self.query.dtype, heads, tokens, head_dim, self.causal)

    def empty(self) -> Tensor:
        """What a launch fills, full of NaN: scores, or the attention output."""
        if self.kernel == SCORES:
            return torch.full(self.block_mask.shape, torch.nan, device=self.query.device)
        return torch.full_like(self.query, torch.nan)

    def launch(self, config: LaunchConfig, output: Tensor, programs: int | None = None) -> None:
        """Fill what `empty` gave by one launch with that configuration; `programs` is for the scores."""
        if self.kernel == SCORES:
            from xattn_video.ops.triton.scores import launch_antidiagonal_scores

            options = {**self._options, "config": config, "stride": STRIDE, "programs": programs}
            launch_antidiagonal_scores(self.query, self.key, output, **options)
            return
        if self.kernel == HOPPER:
            from xattn_video.ops.triton.attention_hopper import launch_hopper as launch
        else:
            from xattn_video.ops.triton.attention import launch_block_sparse as launch
        inputs = (self.query, self.key, self.value)
        launch(*inputs, output, self._lse, *self._lists, **self._options, config=config)

    def kernel_and_arguments(self, config: LaunchConfig) -> tuple[Any, dict[str, Any]]:
        """The kernel and what `launch` gives it."""
        options = {**self._options, "config": config}
        if self.kernel == SCORES:
            from xattn_video.ops.triton import scores as antidiagonal_scores

            _, arguments = antidiagonal_scores.scores_arguments(
                self.query, self.key, self.empty(), stride=STRIDE, **options
            )
            return antidiagonal_scores._antidiagonal_scores_kernel, arguments
        tensors = (self.query, self.key, self.value, self.empty(), self._lse, *self._lists)
        if self.kernel == HOPPER:
            from xattn_video.ops.triton import attention_hopper

            return attention_hopper._attend_hopper_kernel, attention_hopper.hopper_arguments(*tensors, **options)[1]
        from xattn_video.ops.triton import attention as block_sparse

        return block_sparse._block_sparse_kernel, block_sparse.block_sparse_arguments(*tensors, **options)[1]

    def reference(self) -> Tensor:
        """The same in float64."""
        exact = self.query.double(), self.key.double(), self.value.double()
        if self.kernel == SCORES:
            return reference.antidiagonal_scores(*exact[:2], stride=STRIDE, **self._options)
        return reference.block_sparse_forward(*exact, self.block_mask, **self._options)[0]


def small_runner(kernel: str, dtype: torch.dtype, head_dim: int, causal: bool, device: torch.device) -> Runner:
    """A problem of odd lengths that float64 can judge: with tiles that no mask cuts, several in a row."""
    # two of the widest tiles of stride groups, or a few blocks
    length = 2 * 256 * STRIDE + 37 if kernel == SCORES else 6 * BLOCK_SIZE + 37
    parts = causal_text_like_qkv(1, 2, length, head_dim, dtype=dtype)
    blocks = num_blocks(length, BLOCK_SIZE)
    block_mask = torch.rand(1, 2, blocks, blocks, generator=torch.Generator().manual_seed(0)) < 0.6
    block_mask |= torch.eye(blocks, dtype=torch.bool)
    if kernel == HOPPER:
        # its lists hold no block that nothing can see
        block_mask &= KeyMask(causal).valid_blocks(1, length, length, block_size=BLOCK_SIZE, device=block_mask.device)
    query, key, value, block_mask = (part.to(device) for part in (*parts, block_mask))
    return Runner(kernel, query, key, value, block_mask, causal)


def large_runner(
    kernel: str, dtype: torch.dtype, head_dim: int, tokens: int, heads: int, device: torch.device
) -> Runner:
    """A video-like problem with the blocks that XAttention keeps of it."""
    names = {value: name for name, value in DTYPES.items()}
    case = Case("tune", max(1, tokens // 1024), 32, 32, 0, heads, head_dim, names[dtype])
    query, key, value = make_inputs(case, 0.7, device)
    block_mask = select_blocks(score_blocks(query, key), threshold=0.9, q_len=case.tokens, kv_len=case.tokens)
    return Runner(kernel, query, key, value, block_mask, causal=False)
