"""The settings of `xattn-video bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from xattn_video.config import not_percent
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.settings import Dtype, Option, Settings, option_name, sparse_config

if TYPE_CHECKING:
    from xattn_video import XAttnConfig

LEDGER_NAME = "efficiency.jsonl"

_PROBLEM = "what is timed"
_SPARSE = "sparse attention"
_RESULTS = "where the results go"


@dataclass(frozen=True, kw_only=True)
class BenchSettings(Settings):
    """Which attention calls are timed, and how often.

    Empty and None leave a value to the device: 7168 tokens, 4 heads of 64 and float32 on a CPU, the sizes of Wan and
    HunyuanVideo on a GPU. With `model` the time to the first token of a language model is measured instead.
    """

    device: Annotated[str, Option("cpu, cuda, or auto (a GPU if there is one)")] = "auto"
    rounds: Annotated[int, Option("interleaved repetitions")] = 5

    tokens: Annotated[tuple[int, ...], Option("sequence lengths; default: 7168 on a CPU", _PROBLEM)] = ()
    model: Annotated[
        str | None,
        Option(
            "the time to the first token of a language model instead (Hub id or local folder), dense and sparse",
            _PROBLEM,
            "NAME",
        ),
    ] = None
    heads: Annotated[int | None, Option("attention heads; default: 4", _PROBLEM)] = None
    head_dim: Annotated[tuple[int, ...], Option("head dimensions; default: 64", _PROBLEM)] = ()
    dtype: Annotated[tuple[Dtype, ...], Option("data types; default: float32 on a CPU", _PROBLEM)] = ()
    inputs: Annotated[
        Literal["video", "demo", "text"] | None,
        Option(
            "what attention is computed on: video-like, the default, tensors that the demo model computed while it "
            "made a video (bfloat16, one head each), or text-like (implies --causal)",
            _PROBLEM,
        ),
    ] = None
    causal: Annotated[bool, Option("causal attention, over text-like inputs by default", _PROBLEM)] = False
    # At 0.78 the default shape keeps about 0.17 of its blocks.
    locality: Annotated[float, Option("how local the inputs are, 0 to 1; sets the density", _PROBLEM)] = 0.78
    full: Annotated[bool, Option("all lengths, head dimensions and types of this device", _PROBLEM)] = False
    goals: Annotated[
        bool, Option("on a GPU: measure what this package wants to reach, and say what it does", _PROBLEM)
    ] = False

    stride: Annotated[int, Option("antidiagonal stride, a power of two", _SPARSE)] = 8
    block_size: Annotated[int, Option("tokens a block, a multiple of the stride", _SPARSE)] = 128
    threshold: Annotated[float, Option("share of the score mass to keep, in (0, 1]", _SPARSE)] = 0.9
    dense_last: Annotated[int, Option("with --model: as of qa, which has 64", _SPARSE, "N")] = 0

    record: Annotated[bool, Option(f"append each row, as it comes, to eval/results/{LEDGER_NAME}", _RESULTS)] = False
    out: Annotated[
        Path | None,
        Option(
            f"append each row, as it comes, to {LEDGER_NAME} in this folder, also one of a case with a wrong result",
            _RESULTS,
            "DIR",
        ),
    ] = None
    plot: Annotated[
        Path | None,
        Option(
            "write speedup.png (over length, beside the ideal) and stages.png (where the time goes) there; "
            "needs matplotlib",
            _RESULTS,
            "DIR",
        ),
    ] = None

    @property
    def config(self) -> XAttnConfig:
        """The settings of sparse attention. Raises UserError for a value that is out of its range."""
        names = ("stride", "block_size", "threshold", "dense_last")
        return sparse_config(**{name: getattr(self, name) for name in names}, min_tokens=0, anchors=0)

    def check(self) -> None:
        self.check_at_least(1, "rounds")
        if not 0 <= self.locality <= 1:
            raise UserError(f"--locality must be from 0 to 1, got {self.locality}{not_percent(self.locality)}")
        if self.dense_last and self.model is None:
            raise UserError("--dense-last goes with --model")
        if self.model is not None:
            # A model says itself what attention is computed on.
            for name in ("goals", "out", "heads", "head_dim", "inputs", "causal", "full", "plot"):
                if getattr(self, name):
                    raise UserError(f"{option_name(name)} does not go with --model")
            if len(self.dtype) > 1:
                raise UserError(f"--dtype takes one type with --model, got {' '.join(self.dtype)}")
        _ = self.config
