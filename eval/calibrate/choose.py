"""Which threshold each head gets: the least total density under a bound on the mean error, by dynamic programming.

The paper leaves the objective open. This one is a multiple-choice knapsack: each head takes one of the measured
thresholds, its error is what that costs, and the sum of all errors is bounded.
"""

from __future__ import annotations

import numpy as np

# The paper's M. The errors are counted in cells, and with many heads there are at least so many cells for each.
CELLS = 1000
_CELLS_PER_HEAD = 20
_ROUNDING = 1e-9


def choose(density: np.ndarray, error: np.ndarray, budget: float) -> np.ndarray:
    """One threshold for each head.

    Errors are rounded up to whole cells, so that the real mean error never exceeds the budget; at most a twentieth of
    the budget is lost by that. Where one threshold for all heads is better than what is found on the cells, it is
    taken. So the result is never denser than one threshold with the same error, and a larger budget never gives more
    density.

    Args:
        density, error: float `[heads, thresholds]`, as they were measured, thresholds falling.
        budget: the largest mean error over the heads.

    Returns:
        the index of the threshold of each head, int64 `[heads]`.

    Raises:
        ValueError: even the thresholds with the least error exceed the budget.
    """
    heads, count = error.shape
    least = error.min(axis=1)
    # A budget that was read off a table of mean errors is met, in whatever order they were added up.
    budget = budget * (1 + _ROUNDING)
    if budget < least.mean():
        raise ValueError(f"budget must be {least.mean():.4g} or more, the least mean error measured, got {budget:g}")
    chosen = _on_cells(density, _cells_of(error - least[:, None], budget * heads - least.sum(), heads))
    rows = np.arange(heads)
    for flat in range(count):
        same = density[:, flat].sum() < density[rows, chosen].sum()
        if same and error[:, flat].mean() <= budget:
            chosen = np.full(heads, flat)
    return chosen


def _cells_of(over: np.ndarray, spare: float, heads: int) -> np.ndarray:
    """The errors above each head's least one, in cells of which there are as many as the spare error fills.

    Returns:
        int64 `[heads, thresholds]`; what costs more than there is has one cell more than there are.
    """
    cells = max(CELLS, _CELLS_PER_HEAD * heads)
    if spare <= 0:
        return np.where(over > 0, cells + 1, 0)
    return np.minimum(np.ceil(over / spare * cells), cells + 1).astype(np.int64)


def _on_cells(density: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """The exact optimum over whole cells: index of the threshold of each head, int64 `[heads]`."""
    heads, count = cost.shape
    cells = max(CELLS, _CELLS_PER_HEAD * heads)
    # least[c]: total density of the heads so far with c cells.
    least = np.zeros(cells + 1)
    taken = np.empty((heads, cells + 1), dtype=np.uint8)
    for head in range(heads):
        options = np.full((count, cells + 1), np.inf)
        for index, price in enumerate(cost[head]):
            if price <= cells:
                options[index, price:] = density[head, index] + least[: cells + 1 - price]
        taken[head] = options.argmin(axis=0)
        least = options.min(axis=0)
    chosen = np.empty(heads, dtype=np.int64)
    left = cells
    for head in reversed(range(heads)):
        chosen[head] = taken[head, left]
        left -= cost[head, chosen[head]]
    return chosen
