"""The tables of `selection_quality` as text: ours, and XAttention's published numbers beside them."""

from __future__ import annotations

from typing import Any

from xattn_video_eval.report import load_paper_tables
from xattn_video_eval.studies.block_scorers import EXACT, SCORERS
from xattn_video_eval.studies.selection_measures import SAME_RECALL
from xattn_video_pipelines.common.tables import aligned

Row = dict[str, Any]


def format_legend() -> str:
    """What each scorer is and costs, and how everything is measured."""
    lines = [f"  {scorer.name:<15} {scorer.formula:<6} {scorer.definition}" for scorer in SCORERS.values()]
    return "\n".join(
        [
            "scorers: the logit of a tile of stride S, then a softmax over tiles and the sum over each block;",
            "cost: multiply-adds relative to the whole query-key product, which is half of dense attention",
            *lines,
            "measures, each the mean over query blocks, valid blocks only:",
            "  Spearman: rank correlation of scores and exact block mass",
            "  AUC: the blocks that the exact mass needs for the threshold are the positives; no block is forced",
            "  recall: exact mass in the best-scored blocks, as many a row as there are positives",
        ]
    )


def format_input(row: Row) -> str:
    """All tables of one input, a row of the ledger."""
    paper = load_paper_tables()
    tables = {name: table["values"] for name, table in paper["tables"].items()}
    stride, threshold = row["stride"], row["threshold"]
    parts = [
        f"== {row['inputs']}: {row['samples']} x {row['heads']} heads, {row['tokens']} tokens, head_dim "
        f"{row['head_dim']}{', causal' if row['causal'] else ''}, blocks of {row['block_size']}; "
        f"theirs: {paper['paper']} ({paper['label']})",
        f"block importance at stride {stride}, positives at threshold {threshold:g} (theirs: stride not given)",
        _importance(row["scorers"], stride, tables["block_importance_4k"]),
        f"mass recalled at equal density by stride, positives at threshold {threshold:g} "
        "(theirs: RULER accuracy and measured overhead; 1/2S: ours, counted)",
        _strides(row["scorers"], tables["stride_ruler_llama31_8b"]),
        f"antidiagonal of stride {stride}: mass recalled by three rules at one mean density (theirs: threshold best, "
        f"then top-k; top-k set to {_their_top_k(tables['selection_rules'])})",
        _rules(row["rules"]),
        f"antidiagonal of stride {stride} by threshold (theirs: stride 4, accuracy on RULER)",
        _thresholds(row["thresholds"], tables["threshold_llama31_8b_stride4"]),
        "density at threshold 0.9, theirs: "
        + ", ".join(
            f"{model} {value / 100:.3f}" for model, value in tables["density_percent_at_threshold_0.9"].items()
        ),
        _as_good(row["as_good_for_less"], stride),
        *_orders(row["orders"]),
    ]
    return "\n".join(parts)


def _as_good(found: list[Row], stride: int) -> str:
    texts = [f"{row['scorer']} of stride {row['stride']} ({row['recall']:.4f} at {row['cost']:.4f})" for row in found]
    return (
        f"recalls as much as the antidiagonal of stride {stride} (within {SAME_RECALL:g}) at no more cost: "
        f"{', '.join(texts) or 'nothing'}"
    )


def _orders(orders: list[Row]) -> list[str]:
    held = [compared["ours"] for compared in orders if compared["holds"]]
    return [
        f"their order in ours, {len(held)} of {len(orders)} times",
        f"  ordering holds: {'; '.join(held) or 'nowhere'}",
        *(
            f"  does not hold: {compared['ours']}: {'; '.join(compared['broken'])}"
            for compared in orders
            if not compared["holds"]
        ),
    ]


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _importance(scorers: list[Row], stride: int, theirs: dict[str, dict[str, float]]) -> str:
    lines: list[tuple[str, ...]] = [
        ("scorer", "cost", "Spearman", "theirs", "AUC", "theirs", "recall", "recall of the worst head")
    ]
    for row in scorers:
        if row["stride"] in (stride, None):
            published = theirs.get(row["scorer"], {})
            heads = [value for value in row["by_head"]["recall"] if value is not None]
            lines.append(
                (
                    row["scorer"],
                    f"{row['cost']:.4f}",
                    _number(row["spearman"]),
                    _number(published.get("spearman"), 2),
                    _number(row["auc"]),
                    _number(published.get("auc"), 2),
                    _number(row["recall"]),
                    _number(min(heads, default=None)),
                )
            )
    return aligned(lines)


def _strides(scorers: list[Row], theirs: dict[str, list[float]]) -> str:
    names = [name for name in SCORERS if name != EXACT]
    recall = {(row["scorer"], row["stride"]): row["recall"] for row in scorers}
    accuracy = dict(zip(theirs["stride"], theirs["accuracy"], strict=True))
    overhead = dict(zip(theirs["stride"], theirs["overhead_percent"], strict=True))
    lines: list[tuple[str, ...]] = [("stride", *names, "1/2S", "their overhead", "their accuracy")]
    for stride in sorted({row["stride"] for row in scorers if row["stride"]}):
        lines.append(
            (
                str(stride),
                *(_number(recall[name, stride]) for name in names),
                f"{0.5 / stride:.1%}",
                f"{overhead[stride]:.1f}%" if stride in overhead else "-",
                _number(accuracy.get(stride), 2),
            )
        )
    return aligned(lines)


def _their_top_k(rule: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}: {setting['k_tokens']} tokens, ratio {setting['ratio_percent']}%"
        for name, setting in rule["settings"].items()
    )


def _rules(rules: list[Row]) -> str:
    lines: list[tuple[str, ...]] = [("threshold", "density", "by threshold", "by top-k", "by top-ratio", "k")]
    for row in rules:
        recall = [_number(row["recall"][rule], 4) for rule in ("threshold", "top_k", "top_ratio")]
        density = _number(row["density"])
        lines.append((f"{row['threshold']:g}", density, *recall, f"{row['top_k']:.1f}"))
    return aligned(lines)


def _thresholds(thresholds: list[Row], theirs: dict[str, list[float]]) -> str:
    density = dict(zip(theirs["threshold"], theirs["density_percent"], strict=True))
    accuracy = dict(zip(theirs["threshold"], theirs["accuracy"], strict=True))
    lines: list[tuple[str, ...]] = [
        ("threshold", "density", "recall", "density the oracle needs", "their density", "their accuracy")
    ]
    for row in thresholds:
        threshold = row["threshold"]
        lines.append(
            (
                f"{threshold:g}",
                _number(row["density"]),
                _number(row["recall"], 4),
                _number(row["oracle_density"]),
                _number(density[threshold] / 100) if threshold in density else "-",
                _number(accuracy.get(threshold), 2),
            )
        )
    return aligned(lines)
