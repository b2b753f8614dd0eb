"""What this package wants to reach on a GPU, and what the bench's rows say of it: `xattn-video bench --goals`.

A goal is met, missed, or only said: where it stands beside a published figure, or does not apply as the row came out.
The figures are for bf16 on an H100 or H200. 9.5x and 13.5x are the paper's speed-ups over FlashInfer at stride 16
(131,072 and 262,144 tokens; its density there is not published).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from xattn_video_pipelines.common.tables import aligned

# Effective TFLOP/s of attention over the kept blocks at the size of HunyuanVideo: the goal, and what passes.
HOPPER_TFLOPS = (550, 500)
PLAIN_TFLOPS = (430, 430)
# Scores and selection over the fastest dense kernel, by stride.
SELECTION_SHARE = {8: 0.08, 16: 0.04}
# The addition of an int4 residual over the fastest dense kernel.
ADDITION_SHARE = 0.02
# Speed-up of the whole call over the ideal one: the goal, and what passes.
OF_IDEAL = (0.75, 0.70)
# Peak memory beyond inputs and output, however many tokens.
EXTRA_MIB = 256
PAPER_SPEEDUP = {131072: 9.5, 262144: 13.5}
LARGE_TOKENS, LARGEST_DENSITY = 75_000, 0.5


@dataclass(frozen=True)
class Verdict:
    """One goal in one row: what was reached, what passes, what is hoped for, and if it passed (None: only said).

    `density` is None where nothing was timed.
    """

    shape: str
    stride: int
    density: float | None
    goal: str
    reached: str
    passes: str
    met: bool | None


def verdicts(rows: list[dict[str, Any]]) -> list[Verdict]:
    """Every goal that applies to a row of `bench --goals`, row by row."""
    return [
        Verdict(row["name"], row["stride"], row["density"], *said)
        for row in rows
        for rule in (_attend, _selection, _addition, _whole_call, _memory, _beside_the_paper, _never_slower)
        for said in rule(row)
    ]


def failed_gate(shape: str, stride: int, reason: str) -> Verdict:
    """What is said of a case in which something is wrong."""
    return Verdict(shape, stride, None, "every result is right", reason, "float64 agrees", False)


def format_verdicts(found: list[Verdict]) -> str:
    """A line a verdict."""
    lines: list[tuple[str, ...]] = [("shape", "S", "density", "goal", "reached", "passes", "")]
    words = {True: "met", False: "missed", None: ""}
    lines += [
        (
            one.shape,
            str(one.stride),
            "-" if one.density is None else f"{one.density:.3f}",
            one.goal,
            one.reached,
            one.passes,
            words[one.met],
        )
        for one in found
    ]
    return aligned(lines)


Said = Iterator[tuple[str, str, str, bool | None]]


def _attend(row: dict[str, Any]) -> Said:
    """The attention kernels over the kept blocks, each by itself. One that cannot run here is said with its reason."""
    if not row["name"].startswith("hunyuan-video") or row["stride"] != 8:
        return
    for kernel, (hoped, passes) in {"attend-hopper": HOPPER_TFLOPS, "attend-plain": PLAIN_TFLOPS}.items():
        goal, limit = f"{kernel}, effective TFLOP/s, hoped for {hoped}", f">= {passes}"
        if kernel in row["tflops"]:
            rate = row["tflops"][kernel]
            yield goal, f"{rate:.0f}", limit, rate >= passes
        else:
            yield goal, f"not timed: {row['not_timed'][kernel]}", limit, None


def _selection(row: dict[str, Any]) -> Said:
    if row["tokens"] < LARGE_TOKENS or row["causal"]:
        return
    passes = SELECTION_SHARE[row["stride"]]
    best = row["best_ms"]
    share = (best["score"] + best["select"]) / best[row["dense_kernel"]]
    yield f"score + select over {row['dense_kernel']}", f"{share:.1%}", f"<= {passes:.1%}", share <= passes


def _addition(row: dict[str, Any]) -> Said:
    """Not said of a row whose residual is wrong: it has no time."""
    if row["tokens"] < LARGE_TOKENS or row["causal"] or "add" not in row["best_ms"]:
        return
    share = row["best_ms"]["add"] / row["best_ms"][row["dense_kernel"]]
    yield (
        f"addition of a residual over {row['dense_kernel']}",
        f"{share:.1%}",
        f"<= {ADDITION_SHARE:.1%}",
        share <= ADDITION_SHARE,
    )


def _whole_call(row: dict[str, Any]) -> Said:
    if row["tokens"] < LARGE_TOKENS or row["causal"]:
        return
    hoped, passes = OF_IDEAL
    speeds = f"{row['speedup']:.2f}x of {row['ideal_speedup']:.2f}x"
    yield (
        f"whole call over {row['dense_kernel']}, of the ideal, hoped for {hoped:.2f}",
        f"{row['reached']:.2f} ({speeds})",
        f">= {passes:.2f}",
        row["reached"] >= passes,
    )


def _memory(row: dict[str, Any]) -> Said:
    """Beyond inputs and output, which is as large as the query."""
    if row["tokens"] < LARGE_TOKENS:
        return
    output = row["heads"] * row["tokens"] * row["head_dim"] * (4 if row["dtype"] == "fp32" else 2)
    extra = (row["peak_extra_mb"]["total"] * 1e6 - output) / 2**20
    yield "peak memory beyond inputs and output, MiB", f"{extra:.0f}", f"< {EXTRA_MIB}", extra < EXTRA_MIB


def _beside_the_paper(row: dict[str, Any]) -> Said:
    if row["causal"] and row["tokens"] in PAPER_SPEEDUP:
        paper = f"the paper's {PAPER_SPEEDUP[row['tokens']]}x"
        yield f"whole call over {row['dense_kernel']}", f"{row['speedup']:.2f}x", f"beside {paper}", None


def _never_slower(row: dict[str, Any]) -> Said:
    """At half of the blocks or fewer, from 8,192 tokens on; a device that misses it wants a larger `min_tokens`."""
    if row["causal"]:
        return
    speedup = row["speedup"]
    met = speedup >= 1 if row["density"] <= LARGEST_DENSITY else None
    yield f"whole call over {row['dense_kernel']}, not slower", f"{speedup:.2f}x", ">= 1x", met
