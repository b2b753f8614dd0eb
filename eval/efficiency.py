"""Time sparse attention against dense on this machine, after a correctness gate: `xattn-video bench`.

    gate: a small problem in float64; of the timed one threshold 1 against SDPA, and every kernel on rows in float64
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
from eval.bench_tables import format_stages, format_table
from eval.dense_kernels import Problem, dense_candidates, judge, sparse_candidates
from eval.ledger import RESULTS, append_rows, provenance
from eval.timing import peak_extra_mb, seconds_of
from pipelines.environment import device_name
from pipelines.errors import UserError
from xattn_video import XAttnConfig, block_sparse_attention, score_blocks, select_blocks, xattention
from xattn_video.attention import Kept, attend_kept, dense_attention, select_kept
from xattn_video.backends import resolve
from xattn_video.blocks import lists_to_mask
from xattn_video.call_blocks import call_blocks
from xattn_video.synthetic import causal_text_like_qkv

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
        failures += _gate_small(device, DTYPES[dtype], config, causal)
    for case in cases:
        if failures:
            break
        try:
            measured, failures = _run_case(case, args, config, device)
        except torch.OutOfMemoryError:
            too_large.append(case.name)
            print(f"{case.name}: left out, {source['device']} has too little memory for it", file=sys.stderr)
            continue
        if failures:
            break
        own, locality = _own_settings(case, config, args)
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
    case: Case, args: argparse.Namespace, config: XAttnConfig, device: torch.device
) -> tuple[dict[str, Any], list[str]]:
    """What was measured of a case, or what is wrong."""
    print(f"{case.name}: making inputs", file=sys.stderr)
    own, locality = _own_settings(case, config, args)
    query, key, value = make_inputs(case, args.locality if locality is None else locality, device)
    failures = _gate_timed(case, query, key, value, own)
    return ({}, failures) if failures else _measure(case, query, key, value, own, args.rounds, args.goals)


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
    """Norm of the difference over the truth's norm; head after head, since copies in float64 of all are too large."""
    heads = zip(output.flatten(0, 1), truth.flatten(0, 1), strict=True)
    norms = torch.tensor([(float((a.double() - b.double()).norm()), float(b.double().norm())) for a, b in heads])
    return float(norms[:, 0].norm() / norms[:, 1].norm())


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
    density = block_mask.sum().item() / (call_blocks(query, length, **rules).total.item() * case.heads)
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
        "rounds": rounds,
    }, []


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
