"""The settings of `xattn-video tune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.settings import Dtype, Option, Settings

Kernel = Literal["antidiagonal_scores", "block_sparse", "attention_hopper"]


@dataclass(frozen=True, kw_only=True)
class TuneSettings(Settings):
    """Which kernels are measured, for which entries of the launch table, and on how large a problem."""

    kernel: Annotated[tuple[Kernel, ...], Option("kernels to measure")] = (
        "antidiagonal_scores", "block_sparse", "attention_hopper",
    )  # fmt: skip
    head_dim: Annotated[tuple[int, ...], Option("head dimensions")] = (128,)
    dtype: Annotated[tuple[Dtype, ...], Option("data types")] = ("bfloat16",)
    tokens: Annotated[int, Option("length of the timed problem")] = 32768
    heads: Annotated[int, Option("heads of the timed problem")] = 8
    rounds: Annotated[int, Option("timed launches of each configuration")] = 10

    def check(self) -> None:
        from xattn_video.ops.checks import MAX_HEAD_DIM

        for value in self.head_dim:
            if not 8 <= value <= MAX_HEAD_DIM:
                raise UserError(f"--head-dim must be 8 or more and {MAX_HEAD_DIM} or less, got {value}")
        self.check_at_least(2048, "tokens")
        self.check_at_least(1, "heads", "rounds")
