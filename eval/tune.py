"""Measure launch configurations of the Triton kernels on this GPU and keep the best: `xattn-video tune`.

    candidates, the package's own first  ->  each on small problems against float64  ->  each timed on a large one
      ->  the fastest, if it gains something, into the user's table of this device class, which launches read first

What does not compile, needs more shared memory than there is, or is wrong is left out and counted with its reason.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.bench_cases import DTYPES
from eval.ledger import provenance
from pipelines.environment import device_name
from pipelines.errors import UserError
from xattn_video.checks import MAX_HEAD_DIM
from xattn_video.kernels import launch_tables
from xattn_video.kernels.launch_tables import LaunchConfig, Table

EXAMPLE = f"""\
example:
  xattn-video tune
  xattn-video tune --head-dim 64 128 --dtype bf16 fp16 --tokens 75600 --heads 8

needs a GPU. The table is <device class>.json (sm_90.json, gfx942.json) in ${launch_tables.FOLDER_VARIABLE}, or
else in xattn-video/launch_configs in the user's cache (~/.cache), written after each kernel and size; one takes 5 to
10 minutes, most of it for the compiler. Its entries come before the package's own for that
class and before default.json; what was not measured stays. Delete the file to have the package's again.
"""

KERNELS = ("antidiagonal_scores", "block_sparse")
# A gain below this is noise: the package's own configuration stays.
LEAST_GAIN = 1.02
# A sample lasts at least this long, or has this many launches.
LEAST_SECONDS, MOST_LAUNCHES = 0.005, 50
# float32 accumulators a thread may hold; with more the compiler spills.
MOST_ACCUMULATORS = 160


@dataclass(frozen=True)
class Trial:
    """One configuration: its milliseconds, or why it was not timed."""

    config: LaunchConfig
    milliseconds: float | None
    reason: str | None = None


# --- pure: which configurations, and which of them wins ------------------------------------------------------


def candidates(
    kernel: str, bits: str, head_dim: int, own: LaunchConfig, *, descriptors: bool = False
) -> list[LaunchConfig]:
    """Configurations worth a try, the package's own first, none twice.

    Args:
        kernel: `antidiagonal_scores` or `block_sparse`.
        bits: `16-bit` or `32-bit`, the width of the inputs.
        head_dim: of the problem; tiles that cannot pay at it are left out.
        own: the package's for this problem. Names that only it has keep its value.
        descriptors: whether the GPU has a copy engine for tiles (sm_90 and newer): each is tried with it too.
    """
    wide = bits == "32-bit"
    stages = (1, 2) if wide else (2, 3, 4)
    if kernel == "antidiagonal_scores":
        sides = (32, 64) if wide else (64, 128)
        columns = sides if wide else (64, 128, 256)
        inner = tuple(size for size in (32, 64, 128) if size == 32 or size < 2 * head_dim)
        axes = {"BLOCK_R": sides, "BLOCK_C": columns, "BLOCK_K": inner[:1] if wide else inner}
    elif kernel == "block_sparse":
        axes = {"BLOCK_M": (32, 64) if wide else (64, 128), "BLOCK_N": (16, 32) if wide else (32, 64, 128)}
    else:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    axes |= {"num_warps": (4, 8), "num_stages": stages}
    found = [dict(own)]
    for values in itertools.product(*axes.values()):
        config = {**own, **dict(zip(axes, values, strict=True))}
        if config not in found and accumulators(kernel, config, head_dim) <= MOST_ACCUMULATORS:
            found.append(config)
    if kernel == "block_sparse" and descriptors:
        found += [{**config, "TMA": 1} for config in found if "TMA" not in config]
    return [*found]


def accumulators(kernel: str, config: LaunchConfig, head_dim: int) -> float:
    """float32 values a thread accumulates: a tile of logits and, where the kernel attends, one of outputs."""
    threads = 32 * config["num_warps"]
    if kernel == "antidiagonal_scores":
        return config["BLOCK_R"] * config["BLOCK_C"] / threads
    padded = 1 << (head_dim - 1).bit_length()
    return config["BLOCK_M"] * (config["BLOCK_N"] + padded) / threads


def run_trials(
    configs: Iterable[LaunchConfig],
    check: Callable[[LaunchConfig], str | None],
    measure: Callable[[LaunchConfig], float],
) -> list[Trial]:
    """Try each configuration: `check` says what is wrong with it, or None, and only then `measure` times it in ms."""
    trials = []
    for config in configs:
        try:
            wrong = check(config)
            trials.append(Trial(config, None if wrong else measure(config), wrong))
        # Whatever compiling or launching raises (out of shared memory or registers, a compiler's error) rules it out.
        except Exception as error:
            trials.append(Trial(config, None, f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]))
    return trials


def choose(trials: list[Trial]) -> Trial:
    """The fastest; the first, which is the package's own, where the gain is too small to be one.

    Raises:
        ValueError: the first was not timed, so that there is nothing to gain upon.
    """
    own = trials[0]
    if own.milliseconds is None:
        raise ValueError(f"the package's own configuration fails here: {own.reason}")
    best = min((trial for trial in trials if trial.milliseconds is not None), key=lambda trial: trial.milliseconds or 0)
    return best if gain(own, best) >= LEAST_GAIN else own


def gain(own: Trial, best: Trial) -> float:
    """How many times faster; both were timed."""
    assert own.milliseconds is not None
    assert best.milliseconds is not None
    return own.milliseconds / best.milliseconds


def updated(table: Table, chosen: Mapping[tuple[str, str, int], LaunchConfig | None]) -> Table:
    """The user's table with what was chosen for each (kernel, width, head_dim); None takes an entry out."""
    merged = launch_tables.merge(table)
    for (kernel, bits, head_dim), config in chosen.items():
        if config is not None:
            merged.setdefault(kernel, {}).setdefault(bits, {})[str(head_dim)] = config
        elif bits in merged.get(kernel, {}):
            merged[kernel][bits].pop(str(head_dim), None)
    return merged


# --- on the device ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Runner:
    """Launches one kernel on one problem: query, key, value `[1, H, S, D]` and, to attend, a block mask."""

    kernel: str
    query: Tensor
    key: Tensor
    value: Tensor
    block_mask: Tensor
    causal: bool
    stride: int = 8
    block_size: int = 128

    def __post_init__(self) -> None:
        from xattn_video.blocks import mask_to_lists

        self._indices, self._counts = mask_to_lists(self.block_mask)
        self._lse = torch.empty(self.query.shape[:3], device=self.query.device)
        self._options = {
            "block_size": self.block_size,
            "causal": self.causal,
            "scale": self.query.shape[3] ** -0.5,
            "kv_start": None,
            "kv_lens": None,
        }

    def empty(self) -> Tensor:
        """What a launch fills, full of NaN: scores, or the attention output."""
        if self.kernel == "antidiagonal_scores":
            return torch.full(self.block_mask.shape, torch.nan, device=self.query.device)
        return torch.full_like(self.query, torch.nan)

    def launch(self, config: LaunchConfig, output: Tensor, programs: int | None = None) -> None:
        """Fill what `empty` gave by one launch with that configuration; `programs` is for the scores."""
        from xattn_video.kernels.antidiagonal_scores import launch_antidiagonal_scores
        from xattn_video.kernels.block_sparse import launch_block_sparse

        options = {**self._options, "config": config}
        if self.kernel == "antidiagonal_scores":
            options |= {"stride": self.stride, "programs": programs}
            launch_antidiagonal_scores(self.query, self.key, output, **options)
            return
        inputs = (self.query, self.key, self.value)
        launch_block_sparse(*inputs, output, self._lse, self._indices, self._counts, **options)

    def reference(self) -> Tensor:
        """The same in float64."""
        from xattn_video import reference

        exact = [part.double() for part in (self.query, self.key, self.value)]
        if self.kernel == "antidiagonal_scores":
            return reference.antidiagonal_scores(*exact[:2], stride=self.stride, **self._options)
        return reference.block_sparse_forward(*exact, self.block_mask, **self._options)[0]


def small_runner(kernel: str, dtype: torch.dtype, head_dim: int, causal: bool, device: torch.device) -> Runner:
    """A problem of odd lengths that float64 can judge: with tiles that no mask cuts, several in a row."""
    from xattn_video.synthetic import causal_text_like_qkv

    # two of the widest tiles of stride groups, or a few blocks
    length = 2 * 256 * 8 + 37 if kernel == "antidiagonal_scores" else 6 * 128 + 37
    parts = causal_text_like_qkv(1, 2, length, head_dim, dtype=dtype)
    blocks = -(-length // 128)
    block_mask = torch.rand(1, 2, blocks, blocks, generator=torch.Generator().manual_seed(0)) < 0.6
    block_mask |= torch.eye(blocks, dtype=torch.bool)
    query, key, value, block_mask = (part.to(device) for part in (*parts, block_mask))
    return Runner(kernel, query, key, value, block_mask, causal)


def checker(runners: Iterable[Runner]) -> Callable[[LaunchConfig], str | None]:
    """A check of a configuration on these problems against float64."""
    judged = []
    for runner in runners:
        truth = runner.reference()
        # Scores are float32 throughout; an output is rounded to its dtype, and the probabilities are too.
        exact = runner.kernel == "antidiagonal_scores" or runner.query.dtype == torch.float32
        judged.append((runner, truth, 1e-4 if exact else 2 * torch.finfo(runner.query.dtype).eps))

    def check(config: LaunchConfig) -> str | None:
        # one program for all strips of scores, too: it uses its scratch again
        launches = [(*parts, programs) for parts in judged for programs in (None, 1)]
        for runner, truth, allowed, programs in launches:
            if programs and runner.kernel != "antidiagonal_scores":
                continue
            output = runner.empty()
            runner.launch(config, output, programs)
            error = ((output.double() - truth).norm() / truth.norm()).item()
            # written so that NaN is wrong too
            if not error <= allowed:
                return f"wrong result: off float64 by {error:.2e}, allowed {allowed:.2e}"
        return None

    return check


def timer(runner: Runner, rounds: int) -> Callable[[LaunchConfig], float]:
    """Median milliseconds of a launch on this problem, compiled before.

    Short ones follow each other without a wait in between, so that what the host needs for a launch does not count.
    """
    output = runner.empty()

    def seconds(config: LaunchConfig, launches: int) -> float:
        torch.cuda.synchronize(runner.query.device)
        begin = time.perf_counter()
        for _ in range(launches):
            runner.launch(config, output)
        torch.cuda.synchronize(runner.query.device)
        return (time.perf_counter() - begin) / launches

    def measure(config: LaunchConfig) -> float:
        runner.launch(config, output)
        launches = max(1, min(MOST_LAUNCHES, int(LEAST_SECONDS / seconds(config, 1))))
        return statistics.median(seconds(config, launches) for _ in range(rounds)) * 1e3

    return measure


def large_runner(
    kernel: str, dtype: torch.dtype, head_dim: int, tokens: int, heads: int, device: torch.device
) -> Runner:
    """A video-like problem with the blocks that XAttention keeps of it."""
    from eval.bench_cases import Case, make_inputs
    from xattn_video import score_blocks, select_blocks

    names = {value: name for name, value in DTYPES.items()}
    case = Case("tune", max(1, tokens // 1024), 32, 32, 0, heads, head_dim, names[dtype])
    query, key, value = make_inputs(case, 0.7, device)
    block_mask = select_blocks(score_blocks(query, key), threshold=0.9, q_len=case.tokens, kv_len=case.tokens)
    return Runner(kernel, query, key, value, block_mask, causal=False)


# --- the program -----------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `xattn-video tune`."""
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS, help="default: all")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128], help="head dimensions (default 128)")
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=["bf16"], help="default: bf16")
    parser.add_argument("--tokens", type=int, default=32768, help="length of the timed problem (default 32768)")
    parser.add_argument("--heads", type=int, default=8, help="heads of the timed problem (default 8)")
    parser.add_argument("--rounds", type=int, default=10, help="timed launches a configuration (default 10)")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write the table; returns 0, or 1 where a configuration of the package fails."""
    if not torch.cuda.is_available():
        raise UserError("tune measures on a GPU, and torch sees none here")
    for name, values, least in (
        ("--head-dim", args.head_dim, 8), ("--tokens", [args.tokens], 2048), ("--heads", [args.heads], 1),
        ("--rounds", [args.rounds], 1),
    ):  # fmt: skip
        for value in values:
            if value < least or (name == "--head-dim" and value > MAX_HEAD_DIM):
                limit = f" and {MAX_HEAD_DIM} or less" if name == "--head-dim" else ""
                raise UserError(f"{name} must be {least} or more{limit}, got {value}")
    device = torch.device("cuda", torch.cuda.current_device())
    name = launch_tables.device_class(device)
    path = launch_tables.user_folder() / f"{name}.json"
    try:
        before = launch_tables.read_table(path) or {}
    except ValueError as error:
        raise UserError(str(error)) from error
    print(f"{device_name(device)}, {name}, torch {torch.__version__}")
    # The 16-bit types share an entry: the first that is asked for is measured.
    wanted: dict[tuple[str, str, int], str] = {}
    for kernel, head_dim, dtype in itertools.product(args.kernel, args.head_dim, args.dtype):
        wanted.setdefault((kernel, launch_tables.width(DTYPES[dtype]), head_dim), dtype)
    about = {"device": device_name(device), **provenance("triton")}
    rows, failures, written = [], [], False
    for entry, dtype in wanted.items():
        kernel, _, head_dim = entry
        label = f"{kernel} {dtype} D {head_dim}"
        trials = _tune(kernel, DTYPES[dtype], head_dim, args.tokens, args.heads, args.rounds, device)
        try:
            best = choose(trials)
        except ValueError as error:
            failures.append(f"{label}: {error}")
            print(failures[-1])
            continue
        rows.append({"kernel": kernel, "dtype": dtype, "head_dim": head_dim} | summarize(trials, best))
        print(f"{label}: {format_row(rows[-1])}")
        # each as it comes: what follows may be interrupted
        after = updated(before, {entry: None if best is trials[0] else best.config})
        if after != before:
            launch_tables.write_table(path, after, about)
            before, written = after, True
    print(f"wrote {path}" if written else f"nothing to change in {path}")
    print(json.dumps({"ok": not failures, "path": str(path), "failures": failures, "rows": rows}))
    return 1 if failures else 0


def summarize(trials: list[Trial], best: Trial) -> dict[str, Any]:
    """What the trials of one kernel showed, as JSON values."""
    reasons = collections.Counter(trial.reason.partition(":")[0] for trial in trials if trial.reason)
    return {
        "own": {"config": dict(trials[0].config), "ms": trials[0].milliseconds},
        "best": {"config": dict(best.config), "ms": best.milliseconds},
        "gain": gain(trials[0], best),
        "tried": len(trials),
        "left_out": dict(reasons),
    }


def format_row(row: dict[str, Any]) -> str:
    """One line: the gain, and how many configurations were left out why."""
    left_out = ", ".join(f"{count} {reason}" for reason, count in row["left_out"].items())
    tail = f"{row['tried']} tried" + (f" ({left_out})" if left_out else "")
    if row["gain"] == 1:
        return f"{row['own']['ms']:.3f} ms, the package's own stays; {tail}"
    chosen = " ".join(f"{name}={value}" for name, value in row["best"]["config"].items())
    return f"{row['own']['ms']:.3f} -> {row['best']['ms']:.3f} ms, {row['gain']:.2f}x, with {chosen}; {tail}"


def _tune(
    kernel: str, dtype: torch.dtype, head_dim: int, tokens: int, heads: int, rounds: int, device: torch.device
) -> list[Trial]:
    """All trials of one kernel on this GPU."""
    from xattn_video.kernels.descriptors import has_copy_engine

    bits = launch_tables.width(dtype)
    packaged = launch_tables.packaged_table(launch_tables.device_class(device))
    own = launch_tables.lookup(packaged, kernel, bits, head_dim)
    configs = candidates(kernel, bits, head_dim, own, descriptors=has_copy_engine(device))
    check = checker([small_runner(kernel, dtype, head_dim, causal, device) for causal in (False, True)])
    measure = timer(large_runner(kernel, dtype, head_dim, tokens, heads, device), rounds)
    numbers = iter(range(1, len(configs) + 1))

    def announced(config: LaunchConfig) -> str | None:
        print(f"{kernel} {dtype} D {head_dim}: {next(numbers)} of {len(configs)}", file=sys.stderr)
        return check(config)

    return run_trials(configs, announced, measure)
