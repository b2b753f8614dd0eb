"""What the tables of `xattn_video_eval.studies.selection_quality` hold, measured on one set of queries and keys.

All averages are over query blocks, each counted once, of all heads and samples. No block is forced where the scorers
are judged: their ranking stands alone. The selection rules and thresholds are the project's own `select_blocks`, forced
blocks included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xattn_video import score_blocks, select_blocks
from xattn_video.ops.key_mask import KeyMask
from xattn_video.ops.reference import select, select_top
from xattn_video_eval.studies.block_scorers import EXACT, SCORERS, exact_block_mass
from xattn_video_eval.studies.ranking import recalled_mass, roc_auc, spearman

# A smaller difference in recalled mass counts as none.
SAME_RECALL = 0.001
# Steps that halve the range of shares until no share of fewer than a million blocks is missed.
_BISECTIONS = 20


@dataclass(eq=False)
class Problem:
    """Queries and keys `[B, H, S, D]` of one kind, and where their attention really goes.

    Attributes:
        mass: exact block mass `[B, H, N, N]`.
        valid: bool of the same shape, the blocks that hold a visible pair.
    """

    query: Tensor
    key: Tensor
    block_size: int
    causal: bool
    mass: Tensor
    valid: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, *, block_size: int, causal: bool) -> Problem:
        mass = exact_block_mass(query, key, block_size=block_size, causal=causal)
        length = query.shape[2]
        valid = KeyMask(causal).valid_blocks(1, length, length, block_size=block_size, device=query.device)
        return cls(query, key, block_size, causal, mass, valid.expand(mass.shape))

    def oracle_keeps(self, threshold: float) -> Tensor:
        """The fewest blocks of each row that hold `threshold` of its exact mass, none forced."""
        return select(self.mass, self.valid, torch.zeros_like(self.valid), threshold=threshold)

    def keeps(self, scores: Tensor, **rule: Any) -> Tensor:
        """What the project keeps by these scores."""
        length = self.query.shape[2]
        sizes: dict[str, Any] = {
            "q_len": length,
            "kv_len": length,
            "block_size": self.block_size,
            "causal": self.causal,
        }
        return select_blocks(scores, **sizes, **rule)

    def density(self, kept: Tensor) -> float:
        """Kept blocks / valid blocks."""
        return kept.sum().item() / self.valid.sum().item()

    def recall(self, kept: Tensor) -> float:
        """Exact mass that the kept blocks hold, the mean over query blocks."""
        return recalled_mass(self.mass, kept, self.valid).mean().item()

    def antidiagonal(self, stride: int) -> Tensor:
        return score_blocks(self.query, self.key, stride=stride, block_size=self.block_size, causal=self.causal)


def measure_scorers(
    problem: Problem,
    strides: Sequence[int],
    threshold: float,
    seed: int,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Each scorer at each stride against the exact block mass.

    Args:
        threshold: blocks that the oracle keeps at it are the positives of the AUC, and their number in a row is how
            many each scorer may keep there.
        seed: of the random pattern.
        progress: told what is being measured.

    Returns:
        a dict a scorer and stride (the oracle once, without a stride): `spearman`, `auc`, `recall` (mass recalled at
        the oracle's density; the first two None where no row has one), `by_head` with the same for each head, `cost` in
        multiply-adds relative to the whole query-key product and its `formula`.
    """
    positive = problem.oracle_keeps(threshold)
    count = positive.sum(-1, keepdim=True)
    unforced = torch.zeros_like(problem.valid)
    rows = []
    for name, scorer in SCORERS.items():
        for stride in strides if name != EXACT else strides[:1]:
            progress(f"{name}, stride {stride}")
            scores = scorer.score(
                problem.query,
                problem.key,
                stride=stride,
                block_size=problem.block_size,
                causal=problem.causal,
                seed=seed,
            )
            kept = select_top(scores.double(), problem.valid, unforced, count=count)
            values = {
                "spearman": spearman(scores, problem.mass, problem.valid),
                "auc": roc_auc(scores, positive, problem.valid),
                "recall": recalled_mass(problem.mass, kept, problem.valid),
            }
            rows.append(
                {
                    "scorer": name,
                    "stride": None if name == EXACT else stride,
                    "cost": scorer.cost(stride),
                    "formula": scorer.formula,
                    **{metric: _mean(value) for metric, value in values.items()},
                    "by_head": {metric: [_mean(value[:, head]) for head in range(value.shape[1])]
                                for metric, value in values.items()},
                }
            )  # fmt: skip
    return rows


def as_good_for_less(scorers: list[dict[str, Any]], stride: int) -> list[dict[str, Any]]:
    """What recalls as much mass as the antidiagonal of this stride (or `SAME_RECALL` less) and costs no more.

    Args:
        scorers: as `measure_scorers` gives them.

    Returns:
        `scorer`, `stride`, `cost` and `recall` of the cheapest of each scorer, the cheapest scorer first.
    """
    (own,) = (row for row in scorers if (row["scorer"], row["stride"]) == ("antidiagonal", stride))
    cheapest: dict[str, dict[str, Any]] = {}
    for row in sorted(scorers, key=lambda row: row["cost"]):
        if row is not own and row["cost"] <= own["cost"] and row["recall"] >= own["recall"] - SAME_RECALL:
            cheapest.setdefault(row["scorer"], {field: row[field] for field in ("scorer", "stride", "cost", "recall")})
    return list(cheapest.values())


def _mean(values: Tensor) -> float | None:
    """The mean of what is defined, None where nothing is."""
    mean = values.nanmean().item()
    return None if mean != mean else mean


def measure_rules(problem: Problem, stride: int, thresholds: Sequence[float]) -> list[dict[str, Any]]:
    """Mass recalled by threshold, top-k and top-ratio on the antidiagonal's scores, at one mean density.

    The density is the threshold's. One k, or one ratio, serves all rows and heads; where no single one has that
    density, its two neighbours are mixed in the shares that have it.

    Returns:
        a dict a threshold: `threshold`, `density`, `recall` by rule, and `top_k` (mixed in the same shares, so mostly
        not whole) and `top_ratio` (at which the kept blocks step across the density).
    """
    scores = problem.antidiagonal(stride)
    rows = []
    for threshold in thresholds:
        kept = problem.keeps(scores, threshold=threshold)
        density = problem.density(kept)
        k, by_k = _at_density(problem, density, _bisect_counts(problem, scores, density))
        ratio, by_ratio = _at_density(problem, density, _bisect_ratios(problem, scores, density))
        recall = {"threshold": problem.recall(kept), "top_k": by_k, "top_ratio": by_ratio}
        rows.append({"threshold": threshold, "density": density, "recall": recall, "top_k": k, "top_ratio": ratio})
    return rows


def _at_density(
    problem: Problem, density: float, neighbours: tuple[tuple[float, Tensor], tuple[float, Tensor]]
) -> tuple[float, float]:
    """The number of the rule and the mass recalled, both interpolated between the neighbours to the density."""
    (low, low_kept), (high, high_kept) = neighbours
    low_density, high_density = problem.density(low_kept), problem.density(high_kept)
    share = 0.0 if high_density == low_density else (density - low_density) / (high_density - low_density)
    low_recall, high_recall = problem.recall(low_kept), problem.recall(high_kept)
    return low + (high - low) * share, low_recall + (high_recall - low_recall) * share


def _bisect_counts(
    problem: Problem, scores: Tensor, density: float
) -> tuple[tuple[float, Tensor], tuple[float, Tensor]]:
    """The largest k whose density is at most the wanted one, and the next."""
    low, high = 1, scores.shape[-1]

    def keeps(k: int) -> Tensor:
        return problem.keeps(scores, selection="top_k", top_k=k)

    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if problem.density(keeps(middle)) <= density else (low, middle)
    return (low, keeps(low)), (high, keeps(high))


def _bisect_ratios(
    problem: Problem, scores: Tensor, density: float
) -> tuple[tuple[float, Tensor], tuple[float, Tensor]]:
    """Two ratios with nothing between them, the density of the first at most the wanted one."""
    low, high = 2.0**-_BISECTIONS, 1.0

    def keeps(ratio: float) -> Tensor:
        return problem.keeps(scores, selection="top_ratio", top_ratio=ratio)

    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if problem.density(keeps(middle)) <= density else (low, middle)
    return (low, keeps(low)), (high, keeps(high))


def measure_thresholds(problem: Problem, stride: int, thresholds: Sequence[float]) -> list[dict[str, Any]]:
    """Density and mass recalled of the antidiagonal by threshold, and the density that the oracle needs.

    Returns:
        a dict a threshold: `threshold`, `density`, `recall`, `oracle_density` (the same rule on the exact mass).
    """
    scores = problem.antidiagonal(stride)
    rows = []
    for threshold in thresholds:
        kept = problem.keeps(scores, threshold=threshold)
        rows.append(
            {
                "threshold": threshold,
                "density": problem.density(kept),
                "recall": problem.recall(kept),
                "oracle_density": problem.density(problem.keeps(problem.mass, threshold=threshold)),
            }
        )
    return rows
