"""Time sparse attention against dense on this machine, after a correctness gate: `python -m eval.efficiency`.

    gate: small problem against float64, threshold 1 against SDPA on the timed one
      ->  rounds of (every dense kernel, score, select, attend, whole call), interleaved
      ->  a row a shape: times, density, speed-up beside the ideal one `1 / (density + 1 / (2 * stride))`

Ratios are taken inside one run. The last line of stdout is JSON; `--record` also appends it to a ledger.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipelines.environment import device_name, source_commit, versions
from pipelines.errors import UserError
from xattn_video import XAttnConfig, block_sparse_attention, score_blocks, select_blocks, xattention
from xattn_video.attention import dense_attention
from xattn_video.blocks import valid_blocks
from xattn_video.synthetic import causal_text_like_qkv, video_like_qkv

LEDGER = Path(__file__).resolve().parent / "results" / "efficiency.jsonl"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The inputs at which the default shape keeps about 0.17 of its blocks.
DEFAULT_LOCALITY = 0.78

EXAMPLE = """\
example:
  xattn-video bench
  xattn-video bench --tokens 8192 16384 --head-dim 128 --dtype bf16
  xattn-video bench --full --record
"""


@dataclass(frozen=True)
class Case:
    """One attention shape: the video in latent tokens, then text; or a causal sequence of `tokens`."""

    name: str
    frames: int
    height: int
    width: int
    text_tokens: int
    heads: int
    head_dim: int
    dtype: str
    causal: bool = False

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width + self.text_tokens


# ALGORITHM section 6.
GPU_CASES = (
    Case("wan-1.3b-480p", 21, 30, 52, 0, 12, 128, "bf16"),
    Case("wan-14b-720p", 21, 45, 80, 0, 40, 128, "bf16"),
    Case("hunyuan-video-720p", 33, 45, 80, 256, 24, 128, "bf16"),
)
GPU_FULL_TOKENS = (8192, 32768, 131072, 262144)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `xattn-video bench`."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (a GPU if there is one)")
    parser.add_argument("--tokens", type=int, nargs="+", help="sequence lengths (default: 7168 on a CPU)")
    parser.add_argument("--heads", type=int, help="attention heads (default 4)")
    parser.add_argument("--head-dim", type=int, nargs="+", help="head dimensions (default 64)")
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), help="data types (default: fp32 on a CPU)")
    parser.add_argument("--causal", action="store_true", help="causal attention over text-like inputs")
    parser.add_argument("--stride", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument(
        "--locality",
        type=float,
        default=DEFAULT_LOCALITY,
        help=f"how local the inputs are, 0 to 1; sets the density (default {DEFAULT_LOCALITY})",
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved repetitions (default 5)")
    parser.add_argument("--full", action="store_true", help="all lengths, head dimensions and types of this device")
    parser.add_argument("--record", action="store_true", help=f"append the rows to eval/results/{LEDGER.name}")


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns 0, or 1 where the correctness gate fails."""
    device = _device(args.device)
    if args.rounds < 1:
        raise UserError(f"--rounds must be 1 or more, got {args.rounds}")
    if not 0 <= args.locality <= 1:
        raise UserError(f"--locality must be from 0 to 1, got {args.locality}")
    try:
        config = XAttnConfig(stride=args.stride, block_size=args.block_size, threshold=args.threshold, min_tokens=0)
    except ValueError as error:
        raise UserError(str(error)) from error
    cases = _cases(args, device)
    source = {
        "device": device_name(device),
        "versions": versions(("xattn-video", "torch", "triton")),
        "commit": source_commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    print(f"{source['device']}, torch {torch.__version__}, {config.label()}, locality {args.locality}")
    rows, failures = [], []
    for dtype in dict.fromkeys(case.dtype for case in cases):
        failures += _gate_small(device, DTYPES[dtype], config, args.causal)
    for case in cases:
        if failures:
            break
        print(f"{case.name}: making inputs", file=sys.stderr)
        query, key, value = _inputs(case, args.locality, device)
        failures += _gate_timed(case, query, key, value, config)
        if not failures:
            rows.append(asdict(case) | {"tokens": case.tokens} | _measure(case, query, key, value, config, args.rounds))
            rows[-1] |= {"config": config.to_dict(), "locality": args.locality} | source
        del query, key, value
    if rows:
        print(_table(rows))
    for failure in failures:
        print(f"wrong result, nothing timed from here on: {failure}")
    if args.record and rows and not failures:
        LEDGER.parent.mkdir(parents=True, exist_ok=True)
        with LEDGER.open("a", encoding="utf-8") as ledger:
            ledger.writelines(json.dumps(row) + "\n" for row in rows)
    print(json.dumps({"ok": not failures, "failures": failures, "rows": rows}))
    return 1 if failures else 0


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    return torch.device(name)


def _cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """What the arguments ask for; without any, the device's own shapes."""
    chosen = (args.tokens, args.heads, args.head_dim, args.dtype)
    gpu = device.type == "cuda"
    if gpu and all(value is None for value in chosen) and not args.causal:
        cases = list(GPU_CASES)
        if args.full:
            cases += [_sized(tokens, 24, 128, "bf16", True) for tokens in GPU_FULL_TOKENS]
        return cases
    full_tokens = GPU_FULL_TOKENS if gpu else (7168, 8192, 16384)
    tokens = args.tokens or (full_tokens if args.full else full_tokens[:1])
    head_dims = args.head_dim or ((64, 128) if args.full else (64,))
    dtypes = args.dtype or (("bf16",) if gpu else ("fp32", "bf16") if args.full else ("fp32",))
    heads = 4 if args.heads is None else args.heads
    for name, values, least in (("--tokens", tokens, 128), ("--heads", [heads], 1), ("--head-dim", head_dims, 8)):
        for value in values:
            if value < least:
                raise UserError(f"{name} must be {least} or more, got {value}")
    return [_sized(n, heads, dim, dtype, args.causal) for n in tokens for dim in head_dims for dtype in dtypes]


def _sized(tokens: int, heads: int, head_dim: int, dtype: str, causal: bool) -> Case:
    """A video of about 1,024 tokens a frame; what does not fill its last row is text."""
    frames = max(1, round(tokens / 1024))
    width = min(32, tokens // frames)
    height = tokens // frames // width
    name = f"{'causal' if causal else 'video'}-{tokens}"
    return Case(name, frames, height, width, tokens - frames * height * width, heads, head_dim, dtype, causal)


def _inputs(case: Case, locality: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    dtype = DTYPES[case.dtype]
    if case.causal:
        parts = causal_text_like_qkv(1, case.heads, case.tokens, case.head_dim, locality=locality, dtype=dtype)
    else:
        video = (case.frames, case.height, case.width)
        parts = video_like_qkv(
            1, case.heads, *video, case.head_dim, locality=locality, dtype=dtype, text_tokens=case.text_tokens
        )
    query, key, value = (part.to(device) for part in parts)
    return query, key, value


# --- correctness --------------------------------------------------------------------------------------------


def _gate_small(device: torch.device, dtype: torch.dtype, config: XAttnConfig, causal: bool) -> list[str]:
    """Scores and sparse output of odd lengths against the float64 reference."""
    length, ulp = 5 * config.block_size + 37, torch.finfo(dtype).eps
    parts = causal_text_like_qkv(1, 4, length, 64, dtype=dtype, kv_heads=2)
    query, key, value = (part.to(device) for part in parts)
    exact = [part.double() for part in (query, key, value)]
    settings: dict[str, Any] = {"block_size": config.block_size, "causal": causal}
    scores = score_blocks(query, key, stride=config.stride, **settings)
    wanted = score_blocks(exact[0], exact[1], stride=config.stride, backend="reference", **settings)
    block_mask = select_blocks(wanted, threshold=config.threshold, q_len=length, kv_len=length, **settings)
    output = block_sparse_attention(query, key, value, block_mask, **settings)
    truth = block_sparse_attention(*exact, block_mask, backend="reference", **settings)
    eager = _eager(query, key, value, block_mask, config.block_size, causal)
    failures = []
    if _error(scores, wanted) > 1e-3:
        failures.append(f"scores in {dtype} are off by {_error(scores, wanted):.2e}")
    allowed = _error(eager, truth) + 2 * ulp
    if not _error(output, truth) <= allowed:
        failures.append(f"sparse output in {dtype} is off by {_error(output, truth):.2e}, allowed {allowed:.2e}")
    return failures


def _eager(query: Tensor, key: Tensor, value: Tensor, block_mask: Tensor, block_size: int, causal: bool) -> Tensor:
    """Masked attention by three plain operations in the inputs' own dtype: the error a user would have anyway."""
    length = query.shape[2]
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    mask = block_mask.repeat_interleave(block_size, 2)[:, :, :length]
    mask = mask.repeat_interleave(block_size, 3)[:, :, :, :length]
    if causal:
        mask = mask.tril()
    logits = (query @ key.transpose(-1, -2)) * query.shape[3] ** -0.5
    return torch.softmax(logits.masked_fill(~mask, -torch.inf), dim=-1) @ value


def _gate_timed(case: Case, query: Tensor, key: Tensor, value: Tensor, config: XAttnConfig) -> list[str]:
    """With threshold 1 the timed problem must give what dense attention gives."""
    dense = dense_attention(query, key, value, causal=case.causal)
    output = xattention(query, key, value, config, causal=case.causal, threshold=1.0)
    assert isinstance(output, Tensor)
    # Both round their output, and both sum in another order.
    allowed = max(4 * torch.finfo(query.dtype).eps, 2e-6)
    error = _error(output, dense)
    return [] if error <= allowed else [f"{case.name}: threshold 1 is off SDPA by {error:.2e}, allowed {allowed:.2e}"]


def _error(output: Tensor, truth: Tensor) -> float:
    return ((output.double() - truth.double()).norm() / truth.double().norm()).item()


# --- timing -------------------------------------------------------------------------------------------------


def _dense_kernels(case: Case, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], Any]]:
    """Every dense kernel that takes this call here, by name."""
    attend = partial(dense_attention, query, key, value, causal=case.causal)
    if query.device.type == "cpu":
        return {"sdpa": attend}

    def limited(backend: SDPBackend) -> Any:
        with sdpa_kernel([backend]):
            return attend()

    kernels = {}
    for name in ("flash", "cudnn", "efficient"):
        kernel = partial(limited, SDPBackend[f"{name.upper()}_ATTENTION"])
        try:
            kernel()
        except RuntimeError as error:
            print(f"sdpa-{name} does not run here: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            kernels[f"sdpa-{name}"] = kernel
    return kernels or {"sdpa": attend}


def _measure(case: Case, query: Tensor, key: Tensor, value: Tensor, config: XAttnConfig, rounds: int) -> dict[str, Any]:
    """Times in milliseconds (median and best of the rounds), density and speed-ups."""
    length, device = case.tokens, query.device
    settings: dict[str, Any] = {"block_size": config.block_size, "causal": case.causal}
    score = partial(score_blocks, query, key, stride=config.stride, **settings)
    scores = score()
    select = partial(select_blocks, scores, threshold=config.threshold, q_len=length, kv_len=length, **settings)
    block_mask = select()
    attend = partial(block_sparse_attention, query, key, value, block_mask, **settings)
    call = partial(xattention, query, key, value, config, causal=case.causal)
    dense = _dense_kernels(case, query, key, value)
    valid = valid_blocks(1, length, length, device=device, **settings)
    density = block_mask.sum().item() / (valid.sum().item() * case.heads)

    stages = {**dense, "score": score, "select": select, "attend": attend, "total": call}
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    for function in stages.values():
        function()
    for done in range(rounds):
        print(f"{case.name} {case.dtype} D {case.head_dim}: round {done + 1} of {rounds}", file=sys.stderr)
        for name, function in stages.items():
            seconds[name].append(_seconds(function, device))

    median = {name: statistics.median(times) * 1e3 for name, times in seconds.items()}
    best = {name: min(times) * 1e3 for name, times in seconds.items()}
    fastest = min(dense, key=lambda name: best[name])
    ideal = 1 / (density + 1 / (2 * config.stride))
    flop = 4 * length * length * case.head_dim * case.heads / (2 if case.causal else 1)
    return {
        "density": density,
        "dense_kernel": fastest,
        "median_ms": median,
        "best_ms": best,
        "speedup": best[fastest] / best["total"],
        "speedup_of_medians": median[fastest] / median["total"],
        "ideal_speedup": ideal,
        "dense_tflops": flop / best[fastest] / 1e9,
        "attend_tflops": density * flop / best["attend"] / 1e9,
        "peak_extra_mb": _peak_extra_mb(call, device),
        "rounds": rounds,
    }


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    _wait_for(device)
    begin = time.perf_counter()
    function()
    _wait_for(device)
    return time.perf_counter() - begin


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_extra_mb(function: Callable[[], Any], device: torch.device) -> float | None:
    """Memory beyond what is there already, the output included; None on a CPU, where nobody counts it."""
    if device.type != "cuda":
        return None
    _wait_for(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    _wait_for(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def _table(rows: list[dict[str, Any]]) -> str:
    """Best times, one line a row."""
    header = (
        "shape", "heads", "D", "dtype", "density", "dense ms", "score", "select", "attend", "total",
        "speed-up", "of medians", "ideal", "reached",
    )  # fmt: skip
    lines = [header]
    for row in rows:
        best = row["best_ms"]
        times = [best[row["dense_kernel"]], *(best[name] for name in ("score", "select", "attend", "total"))]
        lines.append(
            (
                row["name"],
                str(row["heads"]),
                str(row["head_dim"]),
                row["dtype"],
                f"{row['density']:.3f}",
                *(f"{value:.1f}" for value in times),
                f"{row['speedup']:.2f}x",
                f"{row['speedup_of_medians']:.2f}x",
                f"{row['ideal_speedup']:.2f}x",
                f"{row['speedup'] / row['ideal_speedup']:.2f}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main() -> int:
    """`python -m eval.efficiency`."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.efficiency",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
