"""Which goals of `bench_goals.py` the rows of a first look reach, and what went wrong: one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from xattn_video_eval.bench import EXTRA_MIB, HOPPER_TFLOPS, OF_IDEAL, PLAIN_TFLOPS, SELECTION_SHARE
from xattn_video_eval.first_gpu.times import DENSE_KERNELS

Rows = list[dict[str, Any]]
# As much of a reason as one line has room for.
REASON = 80


@dataclass(frozen=True)
class Reached:
    """One goal: what it is about, the figure in words, and how far it came.

    `how` is `reached`; `passed` between what passes and what is hoped for; `missed`; or `not measured`.
    """

    goal: str
    figure: str
    how: str

    def __str__(self) -> str:
        return f"{self.goal}: {self.how}" if self.how == "not measured" else f"{self.goal} {self.figure}: {self.how}"


def judge(rows: Rows) -> list[Reached]:
    """Every goal, whether it was measured or not. Only right results count, and of variants the shipped one."""
    right = [row for row in rows if not {"wrong", "failed", "skipped"} & set(row)]
    return [
        _attention("Hopper kernel", "attention_hopper", HOPPER_TFLOPS, right),
        _attention("plain kernel", "block_sparse", PLAIN_TFLOPS, right),
        *(_selection(stride, share, right) for stride, share in SELECTION_SHARE.items()),
        _whole_call(right),
        _memory(right),
    ]


def summary(rows: Rows) -> str:
    """The last line: every goal, then wrong results and steps that failed."""
    goals = " | ".join(str(one) for one in judge(rows))
    wrong = sum("wrong" in row for row in rows)
    failed = sum("failed" in row for row in rows)
    ended = [f"{row['step']} ({row['reason'][:REASON]})" for row in rows if row.get("end") == "failed"]
    return f"{goals} | wrong results: {wrong}, kernels that failed: {failed}, steps that failed: {_list(ended)}"


def all_well(rows: Rows) -> bool:
    """Whether every step ended and no result is wrong; goals that were missed do not count."""
    return not any("wrong" in row or "failed" in row or row.get("end") == "failed" for row in rows)


def _list(words: list[str]) -> str:
    return ", ".join(words) or "none"


def _attention(name: str, kernel: str, goal: tuple[int, int], rows: Rows) -> Reached:
    hoped, passes = goal
    timed = [row for row in rows if row.get("kernel") == kernel and "tflops" in row and row["density"] < 1]
    label = f"{name} >= {hoped} TFLOP/s"
    shipped = [row for row in timed if row["shipped"]]
    if not shipped:
        return Reached(label, "", "not measured")
    rate = shipped[0]["tflops"]
    best = max(timed, key=lambda row: row["tflops"])
    note = "" if best["shipped"] else f" (best {best['tflops']:.0f}, {best['name']})"
    return Reached(label, f"{rate:.0f}{note}", _how(rate >= hoped, rate >= passes))


def _selection(stride: int, most: float, rows: Rows) -> Reached:
    label = f"scores + selection, stride {stride}, <= {most:.0%} of dense"
    own = [row for row in rows if row["step"] == "scores" and row.get("stride") == stride and "ms" in row]
    scores, select = _first(own, lambda row: row.get("shipped")), _first(own, lambda row: row["name"] == "select")
    dense = _fastest_dense(rows)
    if scores is None or select is None or dense is None:
        return Reached(label, "", "not measured")
    share = (scores["ms"] + select["ms"]) / dense
    return Reached(label, f"{share:.1%}", _how(share <= most, share <= most))


def _whole_call(rows: Rows) -> Reached:
    """By the fastest backend, at stride 8; the ideal counts the kept blocks and the products of the scores."""
    hoped, passes = OF_IDEAL
    label = f"whole call >= {hoped:.2f} of the ideal speed-up"
    calls, dense = [row for row in _whole_calls(rows) if row["stride"] == 8], _fastest_dense(rows)
    if not calls or dense is None:
        return Reached(label, "", "not measured")
    call = min(calls, key=lambda row: row["ms"])
    speedup, ideal = dense / call["ms"], 1 / (call["density"] + 1 / (2 * call["stride"]))
    figure = f"{speedup / ideal:.2f} ({speedup:.2f}x of {ideal:.2f}x, {call['backend']})"
    return Reached(label, figure, _how(speedup >= hoped * ideal, speedup >= passes * ideal))


def _memory(rows: Rows) -> Reached:
    label = f"extra memory < {EXTRA_MIB} MiB"
    extra = [row["extra_mib"] for row in _whole_calls(rows) if row["extra_mib"] is not None]
    if not extra:
        return Reached(label, "", "not measured")
    return Reached(label, f"{max(extra):.0f}", _how(max(extra) < EXTRA_MIB, max(extra) < EXTRA_MIB))


def _whole_calls(rows: Rows) -> Iterator[dict[str, Any]]:
    return (row for row in rows if row["step"] == "whole" and "ms" in row)


def _fastest_dense(rows: Rows) -> float | None:
    """Milliseconds."""
    return min((row["ms"] for row in rows if row["step"] == "dense" and row.get("name") in DENSE_KERNELS), default=None)


def _first(rows: Rows, wanted: Callable[[dict[str, Any]], Any]) -> dict[str, Any] | None:
    return next((row for row in rows if wanted(row)), None)


def _how(hoped: bool, passes: bool) -> str:
    return "reached" if hoped else "passed" if passes else "missed"
