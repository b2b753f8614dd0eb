"""What a step of a video does: dense, a refresh of the residual, or sparse, and with which threshold."""

from __future__ import annotations

import math

from torch import Tensor

from ...config import XAttnConfig

# Largest gap between two refreshes, as a share of all steps; and how many steps there are where nobody knows.
GAP_SHARE = 0.2
USUAL_STEPS = 20
# Gaps grow over the first refreshes to their full size.
_GROWTH = (0.25, 0.5, 0.75)
# Below so many steps a gap has no room to grow: most of a video of few steps would be refreshes.
_GROWING = 3
_LOWEST_THRESHOLD, _HIGHEST_THRESHOLD = 0.01, 0.999


class Schedule:
    """The steps of one video: a pure function of the settings and of the number of steps.

    Args:
        config: the settings.
        total: all steps of the video, or None where nobody knows.

    Attributes:
        total: as given.
        warmup: first steps that are dense.
        end: the first of the last steps that are dense; None where there are none or `total` is not known.
    """

    def __init__(self, config: XAttnConfig, total: int | None) -> None:
        self._config = config
        self.total = total
        self.warmup = config.warmup_steps
        if config.warmup is not None and total is not None:
            self.warmup = min(config.warmup_steps, max(math.ceil(config.warmup * total), 1))
        self.end = None if total is None or not config.last_steps else max(total - config.last_steps, self.warmup)
        self._refreshes: list[int] = []

    @property
    def sparse_steps(self) -> int | None:
        """How many steps are sparse or refresh, None where the number of steps is not known."""
        if self.total is None:
            return None
        return max((self.total if self.end is None else self.end) - self.warmup, 0)

    def doubt(self) -> str | None:
        """What is likely not meant by these settings for a video of so few steps, or None."""
        if self.total is None or self._config.warmup is not None or 2 * self.warmup <= self.total:
            return None
        return (
            f"{min(self.warmup, self.total)} of {self.total} steps are dense; with few steps, warmup=0.25 keeps "
            "the warm-up to a quarter of them"
        )

    @property
    def all_dense(self) -> str | None:
        """What leaves no step sparse, and what changes it; None where a step is sparse or nobody knows."""
        if self.sparse_steps != 0:
            return None
        config, most = self._config, f"{self.total} of {self.total} steps are dense"
        if self.total is not None and self.warmup < self.total:
            return f"{most}, by warmup_steps={config.warmup_steps} and last_steps={config.last_steps}; set smaller ones"
        cause = f"warmup_steps={config.warmup_steps}" + (
            "" if config.warmup is None else f" and warmup={config.warmup}"
        )
        # at least one step of a warm-up stays dense
        remedy = "warmup=0.25 keeps the warm-up to a quarter of them" if self.total != 1 else "set warmup_steps=0"
        return f"{most}, by {cause}; {remedy}"

    def dense_reason(self, step: int) -> str | None:
        """Why every call of this step is dense, or None."""
        if step < self.warmup:
            return "warmup"
        return "last_steps" if self.end is not None and step >= self.end else None

    def last_refresh(self, step: int, layer: int) -> int:
        """The latest step, at most `step`, in which this layer refreshes; -1 if there is none yet.

        Args:
            step: a step of the video.
            layer: index of the layer among those that can be sparse. With a fixed gap the layers take turns, so that
                every step has about as much to do.
        """
        config, first = self._config, self.warmup - 1
        if step < first:
            return -1
        if config.refresh_rule == "fixed":
            gap = self._largest_gap()
            latest = step - (step - first + layer) % gap
            return latest if latest > first else first
        sparse = step - self.warmup
        return max((self.warmup + at for at in self._sparse_refreshes(sparse) if at <= sparse), default=first)

    def threshold_shift(self, step: int) -> float:
        """What is added to the threshold in this step (ALGORITHM.md, section 9: `ramp * (1/2 - f)`)."""
        sparse = self.sparse_steps
        if not self._config.threshold_ramp or sparse is None:
            return 0.0
        share = min(max((step - self.warmup) / max(sparse - 1, 1), 0.0), 1.0)
        return self._config.threshold_ramp * (0.5 - share)

    def _sparse_refreshes(self, until: int) -> list[int]:
        """Sparse steps that refresh, in rising order, at least up to `until`."""
        rule = self._config.refresh_rule
        if isinstance(rule, tuple):
            return list(rule)
        known = self._refreshes
        gap = self._largest_gap()
        if not known:
            # the last step of the warm-up was the first refresh
            known.append(0 if gap >= _GROWING else gap - 1)
        while known[-1] <= until:
            grown = _GROWTH[len(known) - 1] if gap >= _GROWING and len(known) <= len(_GROWTH) else 1.0
            known.append(known[-1] + max(round(gap * grown), 1))
        return known

    def _largest_gap(self) -> int:
        every = self._config.refresh_every or GAP_SHARE
        return max(round(every * (self.total or USUAL_STEPS)), 2) if every < 1 else int(every)


def shifted(threshold: Tensor, shift: float) -> Tensor:
    """Thresholds that are moved by `shift`, within what `XAttnConfig.threshold_ramp` allows."""
    return (threshold + shift).clamp(_LOWEST_THRESHOLD, _HIGHEST_THRESHOLD)
