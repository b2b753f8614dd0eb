"""Time sparse attention against dense on this machine, after a correctness gate: `xattn-video bench`.

    gate: a small problem in float64; of the timed one threshold 1 against SDPA, scores, choice and every kernel on
    rows in float64
      ->  rounds of (every dense kernel, score, select, attend, whole call), interleaved; beside them a refresh of the
      residual memory (attention over kept blocks and over the others, and their merge) and the addition of a residual
      ->  a row a shape: times, density, speed-up beside the ideal one `1 / (density + 1 / (2 * stride))`

A case with a wrong result has no times but its reason, the others go on, and the exit code is 1 at the end. Ratios are
taken inside one run. Effective TFLOP/s count the operations that the result needs, whatever a kernel does: dense
`4 * heads * tokens^2 * head_dim` (half of it if causal), score `1 / (2 * stride)` of that, attend `density` of it,
total the sum of both; selection and addition multiply nothing. `--record` appends the rows to the ledger of the
project, `--out` to one in a folder of the user's, and `--plot` draws them.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn_video import XAttnConfig, xattention
from xattn_video.ops.backends import resolve
from xattn_video.ops.block_lists import lists_to_mask
from xattn_video.ops.call_blocks import call_blocks
from xattn_video.ops.key_mask import KeyMask
from xattn_video.ops.residual import Packed
from xattn_video.ops.sparse import select_lists
from xattn_video_eval.bench import goals as bench_goals
from xattn_video_eval.bench import plots as bench_plots
from xattn_video_eval.bench.cases import DTYPES, Case, chosen_cases, make_inputs
from xattn_video_eval.bench.dense_kernels import (
    Judged,
    Problem,
    attention_candidates,
    dense_candidates,
    judge,
    reason_of,
    sparse_candidates,
)
from xattn_video_eval.bench.gates import gate_choice, gate_residual, gate_small, gate_timed
from xattn_video_eval.bench.goals import Verdict
from xattn_video_eval.bench.settings import LEDGER_NAME, BenchSettings
from xattn_video_eval.bench.tables import format_stages, format_table
from xattn_video_eval.bench.timing import peak_extra_mb, seconds_of
from xattn_video_eval.results import RESULTS, append_rows, provenance
from xattn_video_pipelines.common.environment import device_name
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import make_writable
from xattn_video_pipelines.common.run_file import note_run
from xattn_video_pipelines.common.terminal import say

LEDGER = RESULTS / LEDGER_NAME
# `--goals` leaves out a dense kernel that takes this many times as long as the fastest.
TOO_SLOW = 2.0
# The kind of residual whose refresh and addition are timed: the default one.
RESIDUAL = "int4"
# Stages that multiply no matrices.
NO_PRODUCTS = ("select", "add")


def bench(settings: BenchSettings) -> dict[str, Any]:
    """Measure, and print the tables.

    Returns:
        JSON values: `ok`, a line in `failures` for each wrong result, and a row in `rows` for each case that was timed;
        without `settings.model` also the names of the cases that were `too_large`, and with `settings.goals` what is
        said of each goal.

    Raises:
        UserError: settings that do not go together or do not fit the device.
    """
    if settings.model is not None:
        from xattn_video_eval.bench.first_token import time_first_token

        return time_first_token(settings)
    config = settings.config
    device = _device(settings.device)
    if settings.plot is not None:
        bench_plots.check(settings.plot)
    if settings.out is not None:
        make_writable(settings.out)
        note_run(settings.out)
    cases = chosen_cases(settings, device)
    source = {"device": device_name(device), **provenance("triton")}
    print(f"{source['device']}, torch {torch.__version__}, {config.label()}, locality {settings.locality}")
    rows: list[dict[str, Any]] = []
    goals: list[Verdict] = []
    failures: list[str] = []
    too_large: list[str] = []
    small = functools.cache(partial(gate_small, device))
    for shape, group in itertools.groupby(cases, lambda case: replace(case, stride=None)):
        locality = _locality(shape, settings)
        prepare = functools.cache(partial(_prepare, shape, locality, settings.goals, device))
        for case in group:
            own = config if case.stride is None else replace(config, stride=case.stride)
            try:
                measured, wrong = _attempt(case, own, small, prepare, settings)
            except torch.OutOfMemoryError:
                too_large.append(case.name)
                print(f"{case.name}: left out, {source['device']} has too little memory for it", file=sys.stderr)
                continue
            setting = {"config": own.to_dict(), "stride": own.stride, "locality": locality}
            row = asdict(case) | {"tokens": case.tokens} | (measured or {}) | setting | source
            found: list[Verdict] = []
            if settings.goals:
                found = [bench_goals.failed_gate(case.name, own.stride, reason) for reason in wrong]
                found += bench_goals.verdicts([row] if measured else [])
            if measured:
                rows.append(row)
                if settings.record:
                    append_rows(LEDGER, [row])
            if settings.out is not None:
                said = {"failures": wrong, "goals": [asdict(verdict) for verdict in found]}
                append_rows(settings.out / LEDGER.name, [row | said])
            failures += [f"{case.name}: {reason}" for reason in wrong]
            goals += found
    if rows:
        print(format_table(rows))
        print(format_stages(rows))
    if goals:
        print(bench_goals.format_verdicts(goals))
    for failure in failures:
        print(f"wrong, and not timed: {failure}")
    if settings.plot is not None and rows:
        for path in bench_plots.write(rows, settings.plot):
            print(f"wrote {path}")
    ok = bool(rows) and not failures
    report = {"ok": ok, "failures": failures, "too_large": too_large, "rows": rows}
    return report | ({"goals": [asdict(goal) for goal in goals]} if settings.goals else {})


def _attempt(
    case: Case,
    config: XAttnConfig,
    small: Callable[[torch.dtype, XAttnConfig, bool], list[str]],
    prepare: Callable[[], Prepared],
    settings: BenchSettings,
) -> tuple[dict[str, Any] | None, list[str]]:
    """`_measure` after the small gate. What a kernel or its compiler raises is wrong with this case alone."""
    try:
        wrong = small(DTYPES[case.dtype], config, case.causal)
        return (None, wrong) if wrong else _measure(case, prepare(), config, settings.rounds, settings.goals)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        traceback.print_exc()
        return None, [reason_of(error)]


class Prepared(NamedTuple):
    """What cases that differ in stride alone share: inputs `[1, H, S, D]`, and the dense kernels that are right."""

    query: Tensor
    key: Tensor
    value: Tensor
    dense: Judged


def _prepare(shape: Case, locality: float | None, goals: bool, device: torch.device) -> Prepared:
    """Make the inputs of a shape and judge the dense kernels on them.

    With `goals` none that torch has to compile first, and none that cannot be the fastest.
    """
    say(f"{shape.name}: making inputs", sys.stderr, progress=True)
    query, key, value = make_inputs(shape, locality, device)
    whole = Problem(query, key, value, shape.causal)
    candidates = dense_candidates(whole)
    if goals:
        candidates.pop("flex", None)
    dense = judge(candidates, whole)
    return Prepared(query, key, value, _fast_ones(dense, device) if goals else dense)


def _fast_ones(dense: Judged, device: torch.device) -> Judged:
    """The kernels that may turn out to be the fastest; the others with how far off they are."""
    seconds = {name: min(seconds_of(kernel, device) for _ in range(2)) for name, kernel in dense.kernels.items()}
    slow = {
        name: f"takes {time / min(seconds.values()):.1f} times as long as the fastest dense kernel"
        for name, time in seconds.items()
        if time > TOO_SLOW * min(seconds.values())
    }
    fast = {name: kernel for name, kernel in dense.kernels.items() if name not in slow}
    return Judged(fast, dense.refused | slow)


def _locality(case: Case, settings: BenchSettings) -> float | None:
    """How local a case's inputs are: as it says, or else the run; tensors that were saved have no locality."""
    if case.inputs == "demo":
        return None
    return settings.locality if case.locality is None else case.locality


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
    case: Case, prepared: Prepared, config: XAttnConfig, rounds: int, goals: bool
) -> tuple[dict[str, Any] | None, list[str]]:
    """Judge everything on the timed problem, and time what is right.

    With `goals` no kernels of others that take a block mask, and the memory of the whole call alone.

    Returns:
        Times in milliseconds (median and best of the rounds), density, speed-ups; None where a stage of the call is
        wrong. And what is wrong, a line each.
    """
    query, key, value, dense = prepared
    length, device = case.tokens, query.device
    wrong = gate_timed(case, query, key, value, config)
    if wrong:
        return None, wrong
    mask = KeyMask(case.causal)
    masking: dict[str, Any] = {"block_size": config.block_size, "scale": case.head_dim**-0.5, **mask.keywords}
    backend = resolve(config.backend, device, query.dtype)
    score = partial(backend.antidiagonal_scores, query, key, stride=config.stride, **masking)
    scores = score()

    # as in the whole call, where all layers share them
    rules: dict[str, Any] = {"block_size": config.block_size, "dense_tokens": None, "dense_last": 0}

    def select() -> tuple[Tensor, Tensor]:
        blocks = call_blocks(query, length, mask, **rules)
        rule: dict[str, Any] = {"threshold": config.threshold, "top_k": config.top_k, "top_ratio": config.top_ratio}
        return select_lists(backend, scores, blocks.valid, blocks.forced, **rule)

    lists = select()
    block_mask = lists_to_mask(*lists)
    blocks = call_blocks(query, length, mask, **rules)
    wrong = gate_choice(case, query, key, scores, block_mask, blocks, config)
    if wrong:
        return None, wrong
    density = block_mask.sum().item() / (blocks.total.item() * case.heads)

    sparse = Problem(query, key, value, case.causal, block_mask, config.block_size)
    named = attention_candidates(sparse)

    def attend() -> Tensor:
        return backend.block_sparse_forward(query, key, value, *lists, **masking)[0]

    own = judge({"attend": attend, **named.kernels}, sparse)
    other = judge({} if goals else sparse_candidates(sparse), sparse)
    wrong = [f"{name}: {reason}" for name, reason in own.refused.items()]
    if not dense.kernels:
        wrong += [f"no dense kernel to compare with; {name}: {why}" for name, why in dense.refused.items()]
    if "attend" in own.refused or not dense.kernels:
        return None, wrong

    rest = backend.mask_to_lists(blocks.valid & ~block_mask)

    def refresh() -> tuple[Tensor, Packed]:
        parts = [backend.block_sparse_forward(query, key, value, *part, **masking) for part in (lists, rest)]
        return backend.merge(*parts[0], *parts[1], RESIDUAL)

    output, (refreshed, packed) = attend(), refresh()
    add = partial(backend.add_residual, output, packed)
    wrong_residual = gate_residual(case, query, key, value, (output, refreshed, add()), packed)
    wrong += wrong_residual
    residual: dict[str, Callable[[], object]] = {} if wrong_residual else {"refresh": refresh, "add": add}
    del refreshed
    call = partial(xattention, query, key, value, config, causal=case.causal)
    stages: dict[str, Callable[[], object]] = {
        **dense.kernels,
        **other.kernels,
        "score": score,
        "select": select,
        **own.kernels,
        **residual,
        "total": call,
    }
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    for function in stages.values():
        function()
    for done in range(rounds):
        say(f"{case.name} {case.dtype} D {case.head_dim}: round {done + 1} of {rounds}", sys.stderr, progress=True)
        for name, function in stages.items():
            seconds[name].append(seconds_of(function, device))
    weighed = {"total": call} if goals else stages
    peak = {name: peak_extra_mb(function, device) for name, function in weighed.items()}
    return summarize(case, config, density, seconds, tuple(dense.kernels)) | {
        "not_timed": dense.refused | named.refused | own.refused | other.refused,
        "peak_extra_mb": peak if device.type == "cuda" else None,
        "launch_configs": _launch_configs(query) if device.type == "cuda" else None,
        "rounds": rounds,
    }, wrong


def _launch_configs(query: Tensor) -> dict[str, Any]:
    """What the kernels were launched with: a user's table, which `tune` writes, comes before the package's."""
    from xattn_video.ops.triton.launch_tables import find_config, find_optional_config

    entry = (query.dtype, query.shape[3], query.device)
    found: dict[str, Any] = {kernel: find_config(kernel, *entry) for kernel in ("antidiagonal_scores", "block_sparse")}
    found["attention_hopper"] = find_optional_config("attention_hopper", *entry)
    return {kernel: dict(config) for kernel, config in found.items() if config is not None}


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
    shares = dict.fromkeys(seconds, density) | dict.fromkeys(dense, 1.0)
    shares |= {"score": estimate, "refresh": 1.0, "total": density + estimate}
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
        "tflops": {name: shares[name] * flop / time / 1e9 for name, time in best.items() if name not in NO_PRODUCTS},
    }
