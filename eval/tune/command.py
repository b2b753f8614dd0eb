"""Measure launch configurations of the Triton kernels on this GPU and keep the best: `xattn-video tune`.

    candidates, the package's own first  ->  compiled, many at a time  ->  each on small problems against float64
      ->  each timed on a large one
      ->  the fastest, if it gains something, into the user's table of this device class, which launches read first

The attention kernel for Hopper is also timed beside the plain one. How fast it is then, in percent of the plain one's
speed, goes into its entry: a launch takes it where that is above 100.

What does not compile, needs more shared memory than there is, or is wrong is left out and counted with its reason.
"""

from __future__ import annotations

import collections
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

import torch

from xattn_video.ops.triton import launch_tables
from xattn_video.ops.triton.launch_tables import LaunchConfig, Table
from xattn_video_eval.bench import DTYPES
from xattn_video_eval.results import provenance
from xattn_video_eval.tune.candidates import candidates
from xattn_video_eval.tune.compile import compile_ahead, workers
from xattn_video_eval.tune.problems import ATTEND, HOPPER, KERNELS, SCORES, Runner, large_runner, small_runner
from xattn_video_eval.tune.settings import Kernel, TuneSettings
from xattn_video_pipelines.common.environment import device_name
from xattn_video_pipelines.common.errors import UserError, one_line
from xattn_video_pipelines.common.settings import short_dtype
from xattn_video_pipelines.common.terminal import say

# A gain below this is noise: the package's own configuration stays.
LEAST_GAIN = 1.02
# A sample lasts at least this long, or has this many launches.
LEAST_SECONDS, MOST_LAUNCHES = 0.005, 50
# What the entry of a kernel that stands in for the plain one has beside its configuration.
SPEED = "percent_of_plain"


@dataclass(frozen=True)
class Trial:
    """One configuration: its milliseconds, or why it was not timed."""

    config: LaunchConfig
    milliseconds: float | None
    reason: str | None = None


# --- pure: which of the trials wins ---------------------------------------------------------------------------


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
            trials.append(Trial(config, None, one_line(f"{type(error).__name__}: {error}", 200)))
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


def beside_plain(trials: list[Trial], plain_ms: float) -> list[Trial]:
    """Trials of a kernel that stands in for the plain one, with their speed in percent of the plain one's.

    Rounded down: with 100 or less the plain kernel stays.
    """
    return [
        trial
        if trial.milliseconds is None
        else replace(trial, config={**trial.config, SPEED: int(100 * plain_ms / trial.milliseconds)})
        for trial in trials
    ]


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


def checker(runners: Iterable[Runner]) -> Callable[[LaunchConfig], str | None]:
    """A check of a configuration on these problems against float64."""
    judged = []
    for runner in runners:
        truth = runner.reference()
        # Scores are float32 throughout; an output is rounded to its dtype, and the probabilities are too.
        exact = runner.kernel == SCORES or runner.query.dtype == torch.float32
        judged.append((runner, truth, 1e-4 if exact else 2 * torch.finfo(runner.query.dtype).eps))

    def check(config: LaunchConfig) -> str | None:
        # one program for all strips of scores, too: it uses its scratch again
        launches = [(*parts, programs) for parts in judged for programs in (None, 1)]
        for runner, truth, allowed, programs in launches:
            if programs and runner.kernel != SCORES:
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


# --- the program -----------------------------------------------------------------------------------------------


def tune(settings: TuneSettings) -> dict[str, Any]:
    """Measure, print a line for each entry as it comes, and write the user's table of this GPU.

    Returns:
        JSON values: `ok`, the `path` of the table, `failures`, what was `left_out` and why, and `rows`.

    Raises:
        UserError: torch sees no GPU, or the user's table cannot be read.
    """
    if not torch.cuda.is_available():
        raise UserError("tune measures on a GPU, and torch sees none here")
    device = torch.device("cuda", torch.cuda.current_device())
    name = launch_tables.device_class(device)
    path = launch_tables.user_folder() / f"{name}.json"
    try:
        before = launch_tables.read_table(path) or {}
    except ValueError as error:
        raise UserError(str(error)) from error
    print(f"{device_name(device)}, {name}, torch {torch.__version__}")
    # The 16-bit types share an entry: the first that is asked for is measured.
    wanted: dict[tuple[Kernel, str, int], str] = {}
    # The plain attention kernel first, which the one for Hopper is measured beside.
    kernels = [kernel for kernel in KERNELS if kernel in settings.kernel]
    dtypes = map(short_dtype, settings.dtype)
    for kernel, head_dim, dtype in itertools.product(kernels, settings.head_dim, dtypes):
        wanted.setdefault((kernel, launch_tables.width(DTYPES[dtype]), head_dim), dtype)
    about = {"device": device_name(device), **provenance("triton")}
    rows, failures, left_out, written = [], [], {}, False
    with workers() as pool:
        for entry, dtype in wanted.items():
            kernel, _, head_dim = entry
            label = f"{kernel} {dtype} D {head_dim}"
            reason = refusal(kernel, DTYPES[dtype], head_dim, device)
            if reason is not None:
                left_out[label] = reason
                print(f"{label}: left out: {reason}")
                continue
            trials = _tune(kernel, DTYPES[dtype], head_dim, settings, device, pool)
            try:
                best = choose(trials)
            except ValueError as error:
                failures.append(f"{label}: {error}")
                print(failures[-1])
                continue
            rows.append({"kernel": kernel, "dtype": dtype, "head_dim": head_dim} | summarize(trials, best))
            print(f"{label}: {format_row(rows[-1])}")
            # The package's own needs no entry, but where the entry also says how fast it is here.
            needed = best is not trials[0] or SPEED in best.config
            # each as it comes: what follows may be interrupted
            after = updated(before, {entry: best.config if needed else None})
            if after != before:
                launch_tables.write_table(path, after, about)
                before, written = after, True
    print(f"wrote {path}" if written else f"nothing to change in {path}")
    return {"ok": not failures, "path": str(path), "failures": failures, "left_out": left_out, "rows": rows}


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
    if SPEED in row["best"]["config"]:
        tail = f"{row['best']['config'][SPEED]} % of the plain kernel's speed; {tail}"
    if row["gain"] == 1:
        return f"{row['own']['ms']:.3f} ms, the package's own stays; {tail}"
    chosen = " ".join(f"{name}={value}" for name, value in row["best"]["config"].items())
    return f"{row['own']['ms']:.3f} -> {row['best']['ms']:.3f} ms, {row['gain']:.2f}x, with {chosen}; {tail}"


def refusal(kernel: str, dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
    """Why a kernel is not for this device, type and head dimension, or None."""
    if kernel != HOPPER:
        return None
    from xattn_video.ops.triton.attention_choice import hopper_device_refusal

    table = launch_tables.packaged_table(launch_tables.device_class(device))
    reason = hopper_device_refusal(device)
    if reason is None and str(head_dim) not in table[kernel].get(launch_tables.width(dtype), {}):
        return f"the package has no configuration of it for {dtype} and head_dim {head_dim}"
    return reason


def _tune(
    kernel: str,
    dtype: torch.dtype,
    head_dim: int,
    settings: TuneSettings,
    device: torch.device,
    pool: Executor,
) -> list[Trial]:
    """All trials of one kernel on this GPU."""
    from triton.runtime import driver

    name, bits = launch_tables.device_class(device), launch_tables.width(dtype)
    packaged = launch_tables.packaged_table(name)
    own = launch_tables.lookup(packaged, kernel, bits, head_dim)
    configs = candidates(kernel, bits, head_dim, {key: value for key, value in own.items() if key != SPEED}, name)
    small = [small_runner(kernel, dtype, head_dim, causal, device) for causal in (False, True)]
    large = large_runner(kernel, dtype, head_dim, settings.tokens, settings.heads, device)
    compile_ahead(pool, [*small, large], configs, driver.active.get_current_target())
    check, measure, numbers = checker(small), timer(large, settings.rounds), iter(range(1, len(configs) + 1))

    def announced(config: LaunchConfig) -> str | None:
        say(f"{kernel} {dtype} D {head_dim}: {next(numbers)} of {len(configs)}", sys.stderr, progress=True)
        return check(config)

    trials = run_trials(configs, announced, measure)
    if kernel != HOPPER:
        return trials
    plain = launch_tables.find_config(ATTEND, dtype, head_dim, device)
    return beside_plain(trials, timer(replace(large, kernel=ATTEND), settings.rounds)(plain))
