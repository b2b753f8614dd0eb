"""What a layer remembers from step to step: its choice of blocks, and the residual (ALGORITHM.md, section 9)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ...config import XAttnConfig
from ...ops import Backend, Call, Memory, Outcome, attend_choosing, attend_kept, attend_sparse, packed_bytes, refresh
from ...stats import ResidualUse
from .schedule import Schedule


class Moment(NamedTuple):
    """Where in a video a forward is.

    Attributes:
        video: number of the generation.
        step: denoising step.
        branch: which of the step's forwards it is: the name that the pipeline gives it (guidance), and its number
            among those of that name.
        branches: how many forwards a step has, as far as was seen.
    """

    video: int = 0
    step: int = 0
    branch: tuple[str, int] = ("", 0)
    branches: int = 1


@dataclass
class _Slot:
    """What one branch of a layer remembers of the present video."""

    video: int
    shape: tuple[Any, ...]
    step: int = -1
    latest: Memory | None = None
    step_before: int = -1
    before: Memory | None = None


class LayerMemory:
    """The memory of one layer. A copy of it is empty: it belongs to another model, which makes other videos.

    Args:
        layer: index of the layer among those that can be sparse.
        use: where all layers count what they hold.
    """

    def __init__(self, layer: int, use: ResidualUse) -> None:
        self._layer = layer
        self._use = use
        self._slots: dict[tuple[str, int], _Slot] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerMemory:
        return LayerMemory(self._layer, copy.deepcopy(self._use, memo))

    def clear(self) -> None:
        """Forget everything, at once."""
        self._slots.clear()
        self._use.give(self)

    def attend(
        self, backend: Backend, call: Call, config: XAttnConfig, schedule: Schedule, moment: Moment
    ) -> tuple[Outcome, bool]:
        """The output of this call; whether it was a refresh, which is dense."""
        slot = self._slot(call, moment)
        if config.residual == "off":
            return self._attend_kept_blocks(backend, call, config, slot, schedule, moment.step), False
        if slot.step < schedule.last_refresh(moment.step, self._layer) or slot.latest is None:
            if not self._fits(call, config, moment):
                if moment.step < schedule.warmup:
                    return refresh(backend, call, config)[0], True
                self._use.without += 1
                return attend_sparse(backend, without_residual(call), config), False
            blocks = None if slot.latest is None else slot.latest.blocks
            if config.extrapolate:
                slot.before, slot.step_before = slot.latest, slot.step
            slot.latest = None
            outcome, slot.latest = refresh(backend, call, config, blocks)
            slot.step = moment.step
            return outcome, True
        # never further than the last interval
        passed, gap = moment.step - slot.step, slot.step - slot.step_before
        factor = min(passed / gap, 1.0)
        return attend_kept(backend, call, config, slot.latest, before=slot.before, factor=factor), False

    def _attend_kept_blocks(
        self, backend: Backend, call: Call, config: XAttnConfig, slot: _Slot, schedule: Schedule, step: int
    ) -> Outcome:
        """Sparse attention whose choice of blocks is made in every `keep_masks`-th sparse step."""
        if slot.latest is None or slot.step < step - (step - schedule.warmup) % config.keep_masks:
            outcome, slot.latest = attend_choosing(backend, call, config)
            slot.step = step
            return outcome
        return attend_kept(backend, call, config, slot.latest)

    def _slot(self, call: Call, moment: Moment) -> _Slot:
        """The slot of this branch: a new one where the video, the sizes, the dtype or the device is another."""
        query, key = call.query, call.key
        shape = (query.shape, key.shape, query.dtype, query.device)
        slot = self._slots.get(moment.branch)
        if slot is not None and slot.video != moment.video:
            self.clear()
            slot = None
        if slot is None or slot.shape != shape:
            slot = self._slots[moment.branch] = _Slot(moment.video, shape)
        return slot

    def _fits(self, call: Call, config: XAttnConfig, moment: Moment) -> bool:
        """Whether the residuals of this call and of the step's other branches fit into the memory."""
        slots = max(len(self._slots), moment.branches)
        more = slots * call_bytes(call.query, config) - self._use.held_by(self)
        return more <= 0 or self._use.take(self, more, call.query.device, config.residual_mib)


def without_residual(call: Call) -> Call:
    """A call whose residual does not fit, with the usual threshold at least: thresholds for residuals are lower."""
    least = XAttnConfig.threshold
    assert isinstance(least, float)
    own = call.threshold
    return call._replace(threshold=own.clamp(min=least) if isinstance(own, Tensor) else max(own, least))


def call_bytes(query: Tensor, config: XAttnConfig) -> int:
    """Bytes of memory that the residual of one call of a layer takes, for one branch.

    Args:
        query: `[B, Hq, Sq, D]`.
        config: the settings; extrapolation keeps two.
    """
    return packed_bytes(query.shape, query.element_size(), config.residual) * (2 if config.extrapolate else 1)
