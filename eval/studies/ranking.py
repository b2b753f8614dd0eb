"""How well one score ranks what another measures: Spearman, ROC AUC and mass recalled, row by row.

All work on the last dimension, look at the valid entries only, and count ties as scipy does: equal values share the
mean of their ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def average_ranks(values: Tensor, valid: Tensor) -> Tensor:
    """Ranks from 1 among the valid entries of each row, ties averaged: float64, 0 where invalid.

    Args:
        values: `[..., N]`, finite.
        valid: bool of the same shape.
    """
    # Invalid entries are sorted behind all others and so change no rank.
    values = values.double().masked_fill(~valid, torch.inf).contiguous()
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values)
    not_above = torch.searchsorted(ordered, values, right=True)
    return torch.where(valid, (below + not_above + 1).double() / 2, 0.0)


def spearman(scores: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Spearman's rank correlation of each row: float64 `[...]`.

    NaN where there is nothing to rank (the truth is the same everywhere, or fewer than two entries are valid); 0 where
    only the scores are the same everywhere, since such scores tell nothing.
    """
    count = valid.sum(-1, keepdim=True)
    centred = [torch.where(valid, average_ranks(values, valid) - (count + 1) / 2, 0.0) for values in (scores, truth)]
    product = (centred[0] * centred[1]).sum(-1)
    norms = [part.square().sum(-1).sqrt() for part in centred]
    correlation = torch.where(norms[0] > 0, product / (norms[0] * norms[1]), 0.0)
    return torch.where(norms[1] > 0, correlation, torch.nan)


def roc_auc(scores: Tensor, positive: Tensor, valid: Tensor) -> Tensor:
    """Chance that a positive entry of the row scores above a negative one, ties counted half: float64 `[...]`.

    NaN where a row has no positive or no negative entry.
    """
    positive = positive & valid
    positives = positive.sum(-1).double()
    negatives = valid.sum(-1) - positives
    rank_sum = torch.where(positive, average_ranks(scores, valid), 0.0).sum(-1)
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def recalled_mass(mass: Tensor, kept: Tensor, valid: Tensor) -> Tensor:
    """Share of each row's valid mass that the kept entries hold: float64 `[...]`."""
    mass = mass.double()
    return (mass * (kept & valid)).sum(-1) / (mass * valid).sum(-1)
