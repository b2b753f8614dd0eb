"""What this package wants to reach on a GPU, and what the bench's rows say of it: `xattn-video bench --goals`.

A goal is met, missed, or (where it stands beside a published figure) only said. The figures are of an H100 and bf16:
317 TFLOP/s is the highest published of a block-sparse kernel for it that we found, 9.5x and 13.5x are the paper's
speed-ups over FlashInfer at stride 16 (131,072 and 262,144 tokens; its density there is not published).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from eval.bench_tables import aligned

ATTEND_TFLOPS, PUBLISHED_TFLOPS = 450, 317
# of this same kernel's rate with all blocks kept
OF_ALL_KEPT = 0.95
# score and select over the fastest dense kernel, by stride: the goal, and what passes
SELECTION_SHARE = {8: (0.08, 0.10), 16: (0.05, 0.065)}
OF_IDEAL = 0.70
EXTRA_MB = 400
PAPER_SPEEDUP = {131072: 9.5, 262144: 13.5}
LARGE_TOKENS, LARGEST_DENSITY = 75_000, 0.5


@dataclass(frozen=True)
class Verdict:
    """One goal in one row: what was reached, what passes, what is hoped for, and if it passed (None: only said)."""

    shape: str
    stride: int
    density: float
    goal: str
    reached: str
    passes: str
    met: bool | None


def verdicts(rows: list[dict[str, Any]]) -> list[Verdict]:
    """Every goal that applies to a row of `bench --goals`, row by row."""
    return [
        Verdict(row["name"], row["stride"], row["density"], *said)
        for row in rows
        for rule in (_attend, _selection, _whole_call, _memory, _beside_the_paper, _never_slower)
        for said in rule(row)
    ]


def format_verdicts(found: list[Verdict]) -> str:
    """A line a verdict."""
    lines: list[tuple[str, ...]] = [("shape", "S", "density", "goal", "reached", "passes", "")]
    words = {True: "met", False: "missed", None: ""}
    lines += [
        (one.shape, str(one.stride), f"{one.density:.3f}", one.goal, one.reached, one.passes, words[one.met])
        for one in found
    ]
    return aligned(lines)


Said = Iterator[tuple[str, str, str, bool | None]]


def _attend(row: dict[str, Any]) -> Said:
    """The attention over kept blocks keeps the pace of the same kernel without sparsity."""
    if not row["name"].startswith("hunyuan-video") or row["stride"] != 8:
        return
    rate, dense_rate = row["tflops"]["attend"], row["tflops"]["attend-all"]
    yield (
        f"attend, effective TFLOP/s, hoped for {ATTEND_TFLOPS}",
        f"{rate:.0f}",
        f"above {PUBLISHED_TFLOPS}",
        rate > PUBLISHED_TFLOPS,
    )
    yield (
        "attend over attend with all blocks",
        f"{rate / dense_rate:.3f}",
        f">= {OF_ALL_KEPT}",
        rate >= OF_ALL_KEPT * dense_rate,
    )


def _selection(row: dict[str, Any]) -> Said:
    if row["tokens"] < LARGE_TOKENS or row["causal"]:
        return
    hoped, passes = SELECTION_SHARE[row["stride"]]
    best = row["best_ms"]
    share = (best["score"] + best["select"]) / best[row["dense_kernel"]]
    yield (
        f"score + select over {row['dense_kernel']}, hoped for {hoped:.1%}",
        f"{share:.1%}",
        f"<= {passes:.1%}",
        share <= passes,
    )


def _whole_call(row: dict[str, Any]) -> Said:
    if row["tokens"] < LARGE_TOKENS or row["causal"]:
        return
    speeds = f"{row['speedup']:.2f}x of {row['ideal_speedup']:.2f}x"
    yield (
        f"whole call over {row['dense_kernel']}, of the ideal",
        f"{row['reached']:.2f} ({speeds})",
        f">= {OF_IDEAL:.2f}",
        row["reached"] >= OF_IDEAL,
    )


def _memory(row: dict[str, Any]) -> Said:
    """Beyond inputs and output, which is as large as the query."""
    if not row["name"].startswith("hunyuan-video"):
        return
    output = row["heads"] * row["tokens"] * row["head_dim"] * (4 if row["dtype"] == "fp32" else 2) / 1e6
    extra = row["peak_extra_mb"]["total"] - output
    yield "peak memory beyond inputs and output, MB", f"{extra:.0f}", f"< {EXTRA_MB}", extra < EXTRA_MB


def _beside_the_paper(row: dict[str, Any]) -> Said:
    if row["causal"] and row["tokens"] in PAPER_SPEEDUP:
        paper = f"the paper's {PAPER_SPEEDUP[row['tokens']]}x"
        yield f"whole call over {row['dense_kernel']}", f"{row['speedup']:.2f}x", f"beside {paper}", None


def _never_slower(row: dict[str, Any]) -> Said:
    """At most half of the blocks, from 8,192 tokens on; a device that misses it wants a larger `min_tokens`."""
    if not row["causal"] and row["density"] <= LARGEST_DENSITY:
        speedup = row["speedup"]
        yield f"whole call over {row['dense_kernel']}, not slower", f"{speedup:.2f}x", ">= 1x", speedup >= 1
