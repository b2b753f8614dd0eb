"""How certain a mean over videos is."""

from __future__ import annotations

from collections.abc import Sequence

RESAMPLES = 10_000


def mean_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean: percentile bootstrap over the values, the same for the same seed.

    Raises:
        ValueError: there is no value.
    """
    import numpy as np

    if not values:
        raise ValueError(f"values must hold at least one value, got {len(values)}")
    numbers = np.array(values, np.float64)
    draws = np.random.default_rng(seed).integers(len(numbers), size=(RESAMPLES, len(numbers)))
    low, high = np.percentile(numbers[draws].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)
