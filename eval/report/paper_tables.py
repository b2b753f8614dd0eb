"""XAttention's published numbers, and whether their order is ours.

Their models, inputs and often their measure are others than ours, so only orders are compared: wherever they put one
entry above another, is ours above too?
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

PAPER_TABLES = Path(__file__).resolve().parent / "paper_tables.json"

Name = TypeVar("Name")


def load_paper_tables() -> dict[str, Any]:
    """`paper`, `label` and `tables`: name -> `paper_table` (its number, None for a table that is not in the paper),
    `source`, `measure`, `values`."""
    tables: dict[str, Any] = json.loads(PAPER_TABLES.read_text(encoding="utf-8"))
    return tables


def broken_order(theirs: Mapping[Name, float], ours: Mapping[Name, float | None]) -> list[str]:
    """Where our order is not theirs: a text for each two neighbours of theirs that ours does not put in that order.

    Only entries that both have are compared; entries that they put level may stand either way.
    """
    shared = {name: (value, own) for name, value in theirs.items() if (own := ours.get(name)) is not None}
    broken = []
    for upper, (high, upper_own) in shared.items():
        for lower, (low, lower_own) in shared.items():
            neighbours = high > low and not any(low < value < high for value, _ in shared.values())
            if neighbours and upper_own <= lower_own:
                broken.append(f"{upper} ({upper_own:.4f}) is not above {lower} ({lower_own:.4f})")
    return broken


def compare_orders(
    scorers: list[dict[str, Any]],
    rules: list[dict[str, Any]],
    thresholds: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Every order of theirs that can be looked for in our tables (`xattn_video_eval.studies.selection_measures`).

    Returns:
        a dict a comparison: `table` (a name in the data), `ours` (what of ours is compared), `holds`, `broken` (texts).
    """
    tables = {name: table["values"] for name, table in load_paper_tables()["tables"].items()}
    compared = []

    def compare(table: str, what: str, theirs: Mapping[Name, float], ours: Mapping[Name, float | None]) -> None:
        # One entry has no order.
        if sum(ours.get(name) is not None for name in theirs) > 1:
            broken = broken_order(theirs, ours)
            compared.append({"table": table, "ours": what, "holds": not broken, "broken": broken})

    importance = tables["block_importance_4k"]
    for stride in sorted({row["stride"] for row in scorers if row["stride"]}):
        # With stride 1 all scorers are one.
        for metric in ("spearman", "auc") if stride > 1 else ():
            ours = {row["scorer"]: row[metric] for row in scorers if row["stride"] == stride}
            theirs = {name: values[metric] for name, values in importance.items()}
            compare("block_importance_4k", f"{metric} at stride {stride}", theirs, ours)

    strides = tables["stride_ruler_llama31_8b"]
    theirs_by_stride = dict(zip(strides["stride"], strides["accuracy"], strict=True))
    recall_by_stride = {row["stride"]: row["recall"] for row in scorers if row["scorer"] == "antidiagonal"}
    compare("stride_ruler_llama31_8b", "mass recalled, their accuracy, by stride", theirs_by_stride, recall_by_stride)

    best_first = tables["selection_rules"]["best_first"]
    ranks = {rule: float(-place) for place, rule in enumerate(best_first)}
    for row in rules:
        what = f"mass recalled at density {row['density']:.3f} (threshold {row['threshold']:g})"
        compare("selection_rules", what, ranks, row["recall"])

    published = tables["threshold_llama31_8b_stride4"]
    for metric, measure, what in (
        ("density", "density_percent", "density by threshold"),
        ("recall", "accuracy", "mass recalled, their accuracy, by threshold"),
    ):
        theirs_by_threshold = dict(zip(published["threshold"], published[measure], strict=True))
        ours_by_threshold = {row["threshold"]: row[metric] for row in thresholds}
        compare("threshold_llama31_8b_stride4", what, theirs_by_threshold, ours_by_threshold)
    return compared
