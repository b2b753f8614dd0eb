"""What the first look compiles, checks and times: launch configurations, and the attention calls they are tried on."""

from __future__ import annotations

from dataclasses import dataclass

from xattn_video.ops.triton.launch_tables import LaunchConfig, lookup, packaged_table
from xattn_video_eval.bench import GPU_CASES

TARGET = "sm_90"
ATTENTION_KERNELS = ("attention_hopper", "block_sparse")

# What is tried beside the configuration that the package ships for sm_90, bf16 and head_dim 128.
_TRIED: dict[str, list[dict[str, int]]] = {
    "attention_hopper": [{"num_stages": 2}, {"num_stages": 3}],
    "block_sparse": [
        {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3, "TMA": 1},
        {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2, "TMA": 1},
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 4, "TMA": 1},
        {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3, "TMA": 1},
        {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2, "TMA": 1},
    ],
    "antidiagonal_scores": [
        {"BLOCK_R": 128, "BLOCK_C": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
        {"BLOCK_R": 128, "BLOCK_C": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
        {"BLOCK_R": 128, "BLOCK_C": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
        {"BLOCK_R": 128, "BLOCK_C": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
        {"BLOCK_R": 128, "BLOCK_C": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3},
    ],
}


@dataclass(frozen=True)
class Variant:
    """A kernel, by its name in the launch tables, with one configuration; `shipped` is the package's own."""

    kernel: str
    config: LaunchConfig
    shipped: bool

    @property
    def name(self) -> str:
        """Such as `128x128 w8 s3 TMA`: tile, warps, stages, switches."""
        tile = "x".join(str(value) for name, value in self.config.items() if name.startswith("BLOCK_"))
        warps = f"w{self.config['num_warps']}" if "num_warps" in self.config else ""
        switches = ["TMA"] if self.config.get("TMA") else []
        return " ".join(part for part in (tile, warps, f"s{self.config['num_stages']}", *switches) if part)


def variants(kernel: str, rehearse: bool) -> list[Variant]:
    """The shipped configuration first, then what is tried beside it; a rehearsal takes only the first."""
    shipped = Variant(kernel, lookup(packaged_table(TARGET), kernel, "16-bit", 128), True)
    tried = [Variant(kernel, config, False) for config in _TRIED[kernel]]
    return [shipped, *([] if rehearse else [one for one in tried if one.name != shipped.name])]


def strides(rehearse: bool) -> tuple[int, ...]:
    """The strides at which scores and whole calls are timed."""
    return (8,) if rehearse else (8, 16)


@dataclass(frozen=True)
class Call:
    """One attention call: query heads and key heads, tokens, and per batch item the valid keys (None: all)."""

    heads: tuple[int, int]
    tokens: int
    head_dim: int = 128
    dtype: str = "bf16"
    causal: bool = False
    kv_lens: tuple[int, ...] | None = None

    @property
    def batch(self) -> int:
        return 1 if self.kv_lens is None else len(self.kv_lens)

    def __str__(self) -> str:
        """Such as `2x4/2x1000 D 64 fp16`: batch, query heads, key heads, tokens."""
        parts = [f"{self.batch}x{self.heads[0]}/{self.heads[1]}x{self.tokens}", f"D {self.head_dim}", self.dtype]
        parts += ["causal"] if self.causal else []
        return " ".join(parts + ([f"kv_lens {list(self.kv_lens)}"] if self.kv_lens else []))


(_HUNYUAN,) = (case for case in GPU_CASES if case.name == "hunyuan-video-720p")
TIMED = Call((_HUNYUAN.heads, _HUNYUAN.heads), _HUNYUAN.tokens, _HUNYUAN.head_dim, _HUNYUAN.dtype)
# Two blocks of 128, of which the last is cut: what Triton's interpreter does in a second.
TIMED_IN_REHEARSAL = Call((1, 1), 200)
# Lengths of the same kind of call as the timed one: every variant is checked on them.
_ALIKE = (Call((2, 2), 700), Call((1, 1), 640), Call((2, 2), 16_500))
# Other kinds, for which each variant would have to be compiled again: only the shipped one is checked on them.
_OTHER = (
    Call((3, 1), 4100),
    Call((4, 2), 1000, head_dim=64, dtype="fp16", kv_lens=(1000, 900)),
    Call((2, 2), 2085, causal=True),
)
_REHEARSED = Call((2, 1), 150, head_dim=64, dtype="fp16", kv_lens=(150, 140))


def checks(rehearse: bool) -> list[tuple[Call, Variant]]:
    """Calls on which attention is compared with float64, each with every variant that is tried on it.

    The plain kernel is the control: only its shipped variant is checked.
    """
    hopper, plain = (variants(kernel, rehearse) for kernel in ATTENTION_KERNELS)
    if rehearse:
        return [(_REHEARSED, variant) for variant in (*hopper, *plain)]
    alike = [(call, variant) for call in _ALIKE for variant in (*hopper, plain[0])]
    return alike + [(call, variant) for call in _OTHER for variant in (hopper[0], plain[0])]
