"""The attention calls that the bench times: their shapes, and the queries, keys and values put into them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xattn_video.testing import causal_text_like_qkv, video_like_qkv
from xattn_video_eval.bench.settings import BenchSettings
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.settings import option_name, short_dtype

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One attention shape: the video in latent tokens, then text; or a causal sequence of `tokens`.

    `inputs` is what fills it: `video` and `text` are generated, `demo` is the demo model's tensors of that name.
    `stride` and `locality` are those of the run where they are None.
    """

    name: str
    frames: int
    height: int
    width: int
    text_tokens: int
    heads: int
    head_dim: int
    dtype: str
    causal: bool = False
    inputs: str = "video"
    stride: int | None = None
    locality: float | None = None

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width + self.text_tokens


# The sizes at which these models are published.
GPU_CASES = (
    Case("wan-1.3b-480p", 21, 30, 52, 0, 12, 128, "bf16"),
    Case("wan-14b-720p", 21, 45, 80, 0, 40, 128, "bf16"),
    Case("hunyuan-video-720p", 33, 45, 80, 256, 24, 128, "bf16"),
)
GPU_FULL_TOKENS = (8192, 32768, 131072, 262144)
CPU_FULL_TOKENS = (7168, 8192, 16384)
# Generated heads that differ from each other; more are copies of these in turn, as generating on a CPU takes long.
DISTINCT_HEADS = 6


def chosen_cases(settings: BenchSettings, device: torch.device) -> list[Case]:
    """What the settings ask for; without any, the device's own shapes. Raises `UserError` for what does not go."""
    if settings.goals:
        return goal_cases(settings, device)
    inputs = settings.inputs or ("text" if settings.causal else "video")
    causal = settings.causal or inputs == "text"
    if inputs == "demo":
        return _demo_cases(settings)
    chosen = (settings.tokens, settings.head_dim, settings.dtype) != ((), (), ()) or settings.heads is not None
    gpu = device.type == "cuda"
    if gpu and not chosen and not causal:
        cases = list(GPU_CASES)
        if settings.full:
            cases += [_sized(tokens, 24, 128, "bf16", True, "text") for tokens in GPU_FULL_TOKENS]
        return cases
    full_tokens = GPU_FULL_TOKENS if gpu else CPU_FULL_TOKENS
    tokens = settings.tokens or (full_tokens if settings.full else full_tokens[:1])
    head_dims = settings.head_dim or ((64, 128) if settings.full else (64,))
    usual = ("bf16",) if gpu else ("fp32", "bf16") if settings.full else ("fp32",)
    dtypes = tuple(map(short_dtype, settings.dtype)) or usual
    heads = 4 if settings.heads is None else settings.heads
    for name, values, least in (("--tokens", tokens, 128), ("--heads", [heads], 1), ("--head-dim", head_dims, 8)):
        for value in values:
            if value < least:
                raise UserError(f"{name} must be {least} or more, got {value}")
    return [_sized(n, heads, dim, dtype, causal, inputs) for n in tokens for dim in head_dims for dtype in dtypes]


def goal_cases(settings: BenchSettings, device: torch.device) -> list[Case]:
    """The calls that `bench_goals.py` has something to say about, the most telling first.

    The video ones are at a density of 0.35 or 0.5. Cases that differ in their stride alone follow each other.
    """
    for name in ("tokens", "heads", "head_dim", "dtype", "inputs", "causal", "full"):
        if getattr(settings, name):
            raise UserError(f"{option_name(name)} does not go with --goals, which has shapes of its own")
    if device.type != "cuda":
        raise UserError("--goals is about GPUs; torch finds none here, or --device names another device")
    wan, hunyuan = GPU_CASES[1:]
    large = [replace(case, stride=stride, locality=0.45) for case in (hunyuan, wan) for stride in (8, 16)]
    short = [_sized(tokens, 24, 128, "bf16", False, "video") for tokens in (8192, 16384, 32768)]
    causal = [_sized(tokens, 24, 128, "bf16", True, "text") for tokens in (131072, 262144)]
    return [
        *large,
        *(replace(case, stride=8, locality=0.33) for case in short),
        *(replace(case, stride=16, locality=0.9) for case in causal),
    ]


def _sized(tokens: int, heads: int, head_dim: int, dtype: str, causal: bool, inputs: str) -> Case:
    """A video of about 1,024 tokens a frame; what does not fill its last row is text."""
    frames = max(1, round(tokens / 1024))
    width = min(32, tokens // frames)
    height = tokens // frames // width
    name = f"{'causal' if causal else 'video'}-{tokens}"
    return Case(name, frames, height, width, tokens - frames * height * width, heads, head_dim, dtype, causal, inputs)


def _demo_cases(settings: BenchSettings) -> list[Case]:
    for name in ("tokens", "heads", "head_dim", "causal"):
        if getattr(settings, name):
            raise UserError(
                f"{option_name(name)} does not go with --inputs demo, whose tensors have a shape of their own"
            )
    from xattn_video_eval.bench.demo_tensors import load_demo_qkv

    try:
        entries = load_demo_qkv()
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--inputs demo: {error}") from error
    return [
        Case(f"demo-{entry.name}", *entry.grid, 0, 1, entry.query.shape[3], dtype, inputs="demo")
        for entry in entries
        for dtype in tuple(map(short_dtype, settings.dtype)) or ("bf16",)
    ]


def make_inputs(case: Case, locality: float | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `[1, heads, tokens, head_dim]`, made on the device; `locality` is for generated ones."""
    dtype, made = DTYPES[case.dtype], min(case.heads, DISTINCT_HEADS)
    if case.inputs == "demo":
        from xattn_video_eval.bench.demo_tensors import load_demo_qkv

        (entry,) = (entry for entry in load_demo_qkv() if f"demo-{entry.name}" == case.name)
        parts = (entry.query, entry.key, entry.value)
    elif locality is None:
        raise ValueError(f"locality must be a number for inputs {case.inputs!r}, got None")
    elif case.inputs == "text":
        parts = causal_text_like_qkv(1, made, case.tokens, case.head_dim, locality=locality, dtype=dtype, device=device)
    else:
        video = (case.frames, case.height, case.width)
        parts = video_like_qkv(
            1, made, *video, case.head_dim, locality=locality, dtype=dtype, text_tokens=case.text_tokens, device=device
        )
    query, key, value = (_repeated(part.to(device, dtype), case.heads) for part in parts)
    return query, key, value


def _repeated(part: Tensor, heads: int) -> Tensor:
    """So many heads, in memory of their own, of those that are there."""
    there = part.shape[1]
    return part if heads <= there else part[:, torch.arange(heads, device=part.device) % there]
