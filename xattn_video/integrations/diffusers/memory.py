"""What a layer remembers from step to step: its choice of blocks, and the residual (ALGORITHM.md, section 9)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...config import XAttnConfig
from ...ops import (
    Backend,
    Call,
    HeadErrors,
    Memory,
    Outcome,
    attend_choosing,
    attend_kept,
    attend_sparse,
    candidates,
    dense_attention,
    exact_type,
    head_errors,
    packed_bytes,
    refresh,
    spend,
)
from ...stats import ResidualUse
from .schedule import Schedule, shifted


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
        # of the present video: what each threshold would miss, as its last dense step told, and what was made of it
        self._video: int | None = None
        self.errors: list[HeadErrors] = []
        self.threshold: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerMemory:
        return LayerMemory(self._layer, copy.deepcopy(self._use, memo))

    def clear(self) -> None:
        """Forget blocks and residuals, at once; thresholds stay until the next video."""
        self._slots.clear()
        self._use.give(self)

    def attend(
        self, backend: Backend, call: Call, config: XAttnConfig, schedule: Schedule, moment: Moment
    ) -> tuple[Outcome, str | None]:
        """The output of this call, and why it was dense: `"refresh"`, `"warmup"`, or None where it was not."""
        slot = self._slot(call, moment)
        if config.per_head and moment.step < schedule.warmup:
            assert isinstance(config.threshold, float)
            self.errors.append(head_errors(backend, call, config, candidates(config.threshold)))
            output = dense_attention(call.query, call.key, call.value, call.mask, scale=call.scale)
            nothing = torch.zeros((), dtype=torch.int64, device=output.device)
            return Outcome(output, nothing, nothing), "warmup"
        if self.threshold is not None:
            own = self.threshold
            if config.threshold_ramp:
                own = shifted(own, schedule.threshold_shift(moment.step))
            call = call._replace(threshold=own)
        if config.residual == "off":
            return self._attend_kept_blocks(backend, call, config, slot, schedule, moment.step), None
        if slot.step < schedule.last_refresh(moment.step, self._layer) or slot.latest is None:
            if not self._fits(call, config, moment):
                if moment.step < schedule.warmup:
                    return refresh(backend, call, config)[0], "refresh"
                self._use.without += 1
                return attend_sparse(backend, without_residual(call), config), None
            blocks = None if slot.latest is None else slot.latest.blocks
            if config.extrapolate:
                slot.before, slot.step_before = slot.latest, slot.step
            slot.latest = None
            outcome, slot.latest = refresh(backend, call, config, blocks)
            slot.step = moment.step
            return outcome, "refresh"
        # never further than the last interval
        passed, gap = moment.step - slot.step, slot.step - slot.step_before
        factor = min(passed / gap, 1.0)
        return attend_kept(backend, call, config, slot.latest, before=slot.before, factor=factor), None

    def _attend_kept_blocks(
        self, backend: Backend, call: Call, config: XAttnConfig, slot: _Slot, schedule: Schedule, step: int
    ) -> Outcome:
        """Sparse attention whose choice of blocks is made in every `keep_masks`-th sparse step."""
        if config.keep_masks == 1:
            return attend_sparse(backend, call, config)
        if slot.latest is None or slot.step < step - (step - schedule.warmup) % config.keep_masks:
            outcome, slot.latest = attend_choosing(backend, call, config)
            slot.step = step
            return outcome
        return attend_kept(backend, call, config, slot.latest)

    def _slot(self, call: Call, moment: Moment) -> _Slot:
        """The slot of this branch: a new one where the video, the sizes, the dtype or the device is another."""
        query, key = call.query, call.key
        shape = (query.shape, key.shape, query.dtype, query.device)
        if moment.video != self._video:
            self._video = moment.video
            self.clear()
            self.errors.clear()
            self.threshold = None
        slot = self._slots.get(moment.branch)
        if slot is None or slot.shape != shape:
            slot = self._slots[moment.branch] = _Slot(shape)
        return slot

    def _fits(self, call: Call, config: XAttnConfig, moment: Moment) -> bool:
        """Whether the residuals of this call and of the step's other branches fit into the memory."""
        slots = max(len(self._slots), moment.branches)
        more = slots * call_bytes(call.query, config) - self._use.held_by(self)
        return more <= 0 or self._use.take(self, more, call.query.device, config.residual_mib)


def share_out(memories: Iterable[LayerMemory], config: XAttnConfig) -> None:
    """Give the heads of a model the thresholds that miss least, at the density of one threshold for all of them.

    Layers that nothing was measured of, such as those of a second transformer that only runs later, keep that one. The
    host waits for the device once, to read what was measured.
    """
    measured = [memory for memory in memories if memory.errors]
    if not measured:
        return
    assert isinstance(config.threshold, float)
    thresholds = candidates(config.threshold)
    density, error = (
        torch.cat(
            [torch.stack([getattr(one, name) for one in memory.errors]).mean(0).cpu().double() for memory in measured]
        )
        for name in HeadErrors._fields
    )
    taken = spend(density, error, float(density[:, thresholds.index(config.threshold)].mean()))
    values = torch.tensor(thresholds, dtype=torch.float64, device="cpu")[taken]
    for memory, own in zip(measured, values.split([len(memory.errors[0].error) for memory in measured]), strict=True):
        device = memory.errors[0].error.device
        memory.threshold = own.to(device, exact_type(device))
        memory.errors.clear()


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
