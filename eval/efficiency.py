"""Time sparse attention against dense on this machine, after a correctness gate: `xattn-video bench`.

    gate: a small problem in float64; of the timed one threshold 1 against SDPA, scores, choice and every kernel on
    rows in float64
      ->  rounds of (every dense kernel, score, select, attend, whole call), interleaved
      ->  a row a shape: times, density, speed-up beside the ideal one `1 / (density + 1 / (2 * stride))`

Ratios are taken inside one run. Effective TFLOP/s count the operations that the result needs, whatever a kernel does:
dense `4 * heads * tokens^2 * head_dim` (half of it if causal), score `1 / (2 * stride)` of that, attend `density` of
it, total the sum of both; selection multiplies nothing. The last line of stdout is JSON; `--record` also appends it to
a ledger, and `--plot` draws it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval import bench_goals, bench_plots
from eval.bench_cases import DTYPES, INPUTS, Case, chosen_cases, make_inputs
from eval.bench_gates import gate_choice, gate_small, gate_timed
from eval.bench_tables import format_stages, format_table
from eval.dense_kernels import Problem, dense_candidates, judge, sparse_candidates
from eval.ledger import RESULTS, append_rows, provenance
from eval.timing import peak_extra_mb, seconds_of
from pipelines.environment import device_name
from pipelines.errors import UserError
from xattn_video import XAttnConfig, xattention
from xattn_video.attention import Kept, attend_kept, select_kept
from xattn_video.backends import resolve
from xattn_video.blocks import lists_to_mask
from xattn_video.call_blocks import call_blocks

LEDGER = RESULTS / "efficiency.jsonl"
# The inputs at which the default shape keeps about 0.17 of its blocks.
DEFAULT_LOCALITY = 0.78

EXAMPLE = """\
example:
  xattn-video bench
  xattn-video bench --tokens 8192 16384 --head-dim 128 --dtype bf16
  xattn-video bench --inputs demo
  xattn-video bench --full --record --plot plots
  xattn-video bench --device cuda --goals --rounds 3
  xattn-video bench --model Qwen/Qwen3-8B --tokens 16384 65536

a row is timed only if its results are right; a kernel that is missing, raises or is wrong is listed with the reason.
effective TFLOP/s: dense 4*heads*tokens^2*head_dim operations (half if causal), score 1/(2*stride) of it,
attend density of it, total the sum of both.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `xattn-video bench`."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (a GPU if there is one)")
    parser.add_argument("--tokens", type=int, nargs="+", help="sequence lengths (default: 7168 on a CPU)")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="the time to the first token of a language model instead (Hub id or local folder), dense and sparse",
    )
    parser.add_argument("--heads", type=int, help="attention heads (default 4)")
    parser.add_argument("--head-dim", type=int, nargs="+", help="head dimensions (default 64)")
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), help="data types (default: fp32 on a CPU)")
    parser.add_argument(
        "--inputs",
        choices=INPUTS,
        help="what attention is computed on: video-like (default), tensors that the demo model computed while it made "
        "a video (bf16, one head each), or text-like (implies --causal)",
    )
    parser.add_argument("--causal", action="store_true", help="causal attention, over text-like inputs by default")
    parser.add_argument("--stride", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument(
        "--dense-last", type=int, default=0, metavar="N", help="with --model: as of qa, which has 64 (default 0)"
    )
    parser.add_argument(
        "--locality",
        type=float,
        default=DEFAULT_LOCALITY,
        help=f"how local the inputs are, 0 to 1; sets the density (default {DEFAULT_LOCALITY})",
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved repetitions (default 5)")
    parser.add_argument("--full", action="store_true", help="all lengths, head dimensions and types of this device")
    parser.add_argument(
        "--goals", action="store_true", help="on a GPU: measure what this package wants to reach, and say what it does"
    )
    parser.add_argument(
        "--record", action="store_true", help=f"append each row, as it comes, to eval/results/{LEDGER.name}"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="DIR",
        help="write speedup.png (over length, beside the ideal) and stages.png (where the time goes) there; "
        "needs matplotlib",
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns 0, or 1 where the correctness gate fails."""
    if args.rounds < 1:
        raise UserError(f"--rounds must be 1 or more, got {args.rounds}")
    if not 0 <= args.locality <= 1:
        raise UserError(f"--locality must be from 0 to 1, got {args.locality}")
    if args.dense_last and args.model is None:
        raise UserError("--dense-last goes with --model")
    if args.goals and args.model is not None:
        raise UserError("--goals does not go with --model")
    given = {name: getattr(args, name) for name in ("stride", "block_size", "threshold", "dense_last")}
    try:
        config = XAttnConfig(**given, min_tokens=0)
    except ValueError as error:
        raise UserError(str(error)) from error
    if args.model is not None:
        from eval import first_token

        return first_token.run(args, config)
    device = _device(args.device)
    if args.plot is not None:
        bench_plots.check(args.plot)
    cases = chosen_cases(args, device)
    source = {"device": device_name(device), **provenance("triton")}
    print(f"{source['device']}, torch {torch.__version__}, {config.label()}, locality {args.locality}")
    rows, failures, too_large = [], [], []
    for dtype, causal in dict.fromkeys((case.dtype, case.causal) for case in cases):
        failures += gate_small(device, DTYPES[dtype], config, causal)
    for case in cases:
        if failures:
            break
        own, locality = _own_settings(case, config, args)
        try:
            measured, failures = _run_case(case, own, locality, args, device)
        except torch.OutOfMemoryError:
            too_large.append(case.name)
            print(f"{case.name}: left out, {source['device']} has too little memory for it", file=sys.stderr)
            continue
        if failures:
            break
        setting = {"config": own.to_dict(), "stride": own.stride, "locality": locality}
        rows.append(asdict(case) | {"tokens": case.tokens} | measured | setting | source)
        if args.record:
            append_rows(LEDGER, rows[-1:])
    if rows:
        print(format_table(rows))
        print(format_stages(rows))
    goals = bench_goals.verdicts(rows) if args.goals else []
    if goals:
        print(bench_goals.format_verdicts(goals))
    for failure in failures:
        print(f"wrong result, nothing timed from here on: {failure}")
    if args.plot is not None and rows and not failures:
        for path in bench_plots.write(rows, args.plot):
            print(f"wrote {path}")
    ok = bool(rows) and not failures
    report = {"ok": ok, "failures": failures, "too_large": too_large, "rows": rows}
    print(json.dumps(report | ({"goals": [asdict(goal) for goal in goals]} if args.goals else {})))
    return 0 if ok else 1


def _run_case(
    case: Case, config: XAttnConfig, locality: float | None, args: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Any], list[str]]:
    """What was measured of a case, or what is wrong."""
    print(f"{case.name}: making inputs", file=sys.stderr)
    query, key, value = make_inputs(case, locality, device)
    failures = gate_timed(case, query, key, value, config)
    return ({}, failures) if failures else _measure(case, query, key, value, config, args.rounds, args.goals)


def _own_settings(case: Case, config: XAttnConfig, args: argparse.Namespace) -> tuple[XAttnConfig, float | None]:
    """Configuration and locality of a case: its own, or else the run's; tensors that were saved have no locality."""
    own = config if case.stride is None else replace(config, stride=case.stride)
    if case.inputs == "demo":
        return own, None
    return own, args.locality if case.locality is None else case.locality


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    return torch.device(name)


# --- timing -------------------------------------------------------------------------------------------------


def _measure(
    case: Case, query: Tensor, key: Tensor, value: Tensor, config: XAttnConfig, rounds: int, goals: bool
) -> tuple[dict[str, Any], list[str]]:
    """Times in milliseconds (median and best of the rounds), density, speed-ups; or what is wrong.

    With `goals` also the attention kernel over all blocks, and nothing that torch has to compile first.
    """
    length, device = case.tokens, query.device
    geometry: dict[str, Any] = {"block_size": config.block_size, "causal": case.causal}
    masking: dict[str, Any] = {**geometry, "scale": case.head_dim**-0.5, "kv_start": None, "kv_lens": None}
    backend = resolve(config.backend, device, query.dtype)
    score = partial(backend.antidiagonal_scores, query, key, stride=config.stride, **masking)
    scores = score()

    # as in the whole call, where all layers share them
    rules: dict[str, Any] = {**geometry, "kv_start": None, "kv_lens": None, "dense_tokens": None, "dense_last": 0}

    def select(threshold: float = config.threshold) -> Kept:
        blocks = call_blocks(query, length, **rules)
        return select_kept(backend, scores, blocks.valid, blocks.forced, config, threshold)

    kept = select()
    block_mask = kept if isinstance(kept, Tensor) else lists_to_mask(*kept)
    blocks = call_blocks(query, length, **rules)
    failures = gate_choice(case, query, key, scores, block_mask, blocks.valid, blocks.forced, config)
    if failures:
        return {}, failures
    density = block_mask.sum().item() / (blocks.total.item() * case.heads)
    whole = Problem(query, key, value, case.causal)
    sparse = Problem(query, key, value, case.causal, block_mask, config.block_size)

    attend = partial(attend_kept, backend, query, key, value, **masking)
    own = judge({"attend": partial(attend, kept)}, sparse)
    every = judge({"attend-all": partial(attend, select(threshold=1.0))} if goals else {}, whole)
    dense = judge({name: call for name, call in dense_candidates(whole).items() if not goals or name != "flex"}, whole)
    other = judge({} if goals else sparse_candidates(sparse), sparse)
    failures = [f"{case.name}: {name}: {reason}" for name, reason in (own.refused | every.refused).items()]
    if not dense.kernels:
        failures += [
            f"{case.name}: no dense kernel to compare with; {name}: {why}" for name, why in dense.refused.items()
        ]
    if failures:
        return {}, failures

    call = partial(xattention, query, key, value, config, causal=case.causal)
    stages = {**dense.kernels, **other.kernels, "score": score, "select": select, **own.kernels, "total": call}
    stages |= every.kernels
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    for function in stages.values():
        function()
    for done in range(rounds):
        print(f"{case.name} {case.dtype} D {case.head_dim}: round {done + 1} of {rounds}", file=sys.stderr)
        for name, function in stages.items():
            seconds[name].append(seconds_of(function, device))
    peak = {name: peak_extra_mb(function, device) for name, function in stages.items()}
    return summarize(case, config, density, seconds, tuple(dense.kernels)) | {
        "not_timed": dense.refused | other.refused,
        "peak_extra_mb": peak if device.type == "cuda" else None,
        "launch_configs": _launch_configs(query) if device.type == "cuda" else None,
        "rounds": rounds,
    }, []


def _launch_configs(query: Tensor) -> dict[str, Any]:
    """What the kernels were launched with: a user's table, which `tune` writes, comes before the package's."""
    from xattn_video.kernels.launch_tables import find_config

    kernels = ("antidiagonal_scores", "block_sparse")
    return {kernel: dict(find_config(kernel, query.dtype, query.shape[3], query.device)) for kernel in kernels}


def summarize(
    case: Case, config: XAttnConfig, density: float, seconds: dict[str, list[float]], dense: tuple[str, ...]
) -> dict[str, Any]:
    """What follows from the times of each round.

    Args:
        density: kept blocks / valid blocks.
        seconds: of each kernel and stage (`score`, `select`, `attend`, `total`), one a round.
        dense: which of them are dense kernels.
    """
    median = {name: statistics.median(times) * 1e3 for name, times in seconds.items()}
    best = {name: min(times) * 1e3 for name, times in seconds.items()}
    fastest = min(dense, key=lambda name: best[name])
    estimate = 1 / (2 * config.stride)
    ideal = 1 / (density + estimate)
    speedup = best[fastest] / best["total"]
    shares = dict.fromkeys(seconds, density) | dict.fromkeys((*dense, "attend-all"), 1.0)
    shares |= {"score": estimate, "total": density + estimate}
    flop = 4 * case.tokens**2 * case.head_dim * case.heads / (2 if case.causal else 1)
    return {
        "density": density,
        "dense_kernel": fastest,
        "median_ms": median,
        "best_ms": best,
        "speedup": speedup,
        "speedup_of_medians": median[fastest] / median["total"],
        "ideal_speedup": ideal,
        "reached": speedup / ideal,
        "tflops": {name: shares[name] * flop / time / 1e9 for name, time in best.items() if name != "select"},
    }
