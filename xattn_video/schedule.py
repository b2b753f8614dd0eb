"""Which denoising step is this, and which layers stay dense in it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor


class WeakLink:
    """A weak reference that survives `deepcopy`: in a copy it points at the copy of what it pointed at.

    Where the target is not copied along, the copied link is dead.
    """

    def __init__(self, target: Any = None) -> None:
        self._reference = None if target is None else weakref.ref(target)

    def __call__(self) -> Any:
        """The target, or None once it is gone."""
        return None if self._reference is None else self._reference()

    def __deepcopy__(self, memo: dict[int, Any]) -> WeakLink:
        return WeakLink(memo.get(id(self())))


class _Watch:
    """A pipeline and what it showed last."""

    def __init__(self, pipeline: Any) -> None:
        self.link = WeakLink(pipeline)
        # a timestep left over from an interrupted run is no news
        self.seen = getattr(pipeline, "_current_timestep", None)
        self.argument: Any = None
        # the step that it was in, and the timestep that this one had
        self.step, self.value = -1, float("inf")

    def belongs(self, argument: Any) -> bool:
        """Whether a forward with this timestep argument can be part of the step seen last.

        The pipeline may have stopped there, while another one that shares its model runs.
        """
        if argument is None or (_schedule(argument) is not None and _schedule(argument) == _schedule(self.seen)):
            return True
        return _largest(argument) == _largest(self.argument)


class StepTracker:
    """Counts the denoising steps of a generation, from the first one that is really run.

    What tells a step, in order:

    1. the `step_index` that a pipeline gives to `cache_context`;
    2. `_current_timestep` of a pipeline that this tracker is bound to. Another object (another value, for a plain
       number) is another step, since schedulers may repeat a value. A rise starts a new generation, and so does
       another schedule (the run before was interrupted, and this one may start lower);
    3. the largest value of the `timestep` that the model is called with. Another value is another step, a rise
       starts a new generation. This reads one number from the device each forward.

    A change from one of these to another starts a new generation too, except for a pipeline that goes on where it
    was (something called the model between its steps, a preview for instance). The pipelines are held weakly.

    A step is an evaluation of the model: a scheduler of second order (Heun) has two of them in each of its own.
    """

    def __init__(self) -> None:
        self._watches: list[_Watch] = []
        self._step = -1
        # what told the last step, and the timestep it had
        self._source: Any = None
        self._value = float("inf")
        # the last step that a pipeline counted itself, and its count
        self._counted, self._index = -1, float("inf")

    def bind(self, pipeline: Any) -> None:
        """Watch the pipeline's `_current_timestep` from now on."""
        self._watches = [watch for watch in self._watches if watch.link() not in (None, pipeline)]
        self._watches.append(_Watch(pipeline))

    def observe(self, timestep: Any = None, step_index: int | None = None) -> int:
        """Called at the start of every forward: the index of its step, 0 for the first one of a generation.

        Args:
            timestep: what the model is called with: a tensor (any shape), a number, or None if the model takes none
                (every forward then counts as a step).
            step_index: the pipeline's own count, where it gives one.
        """
        if step_index is not None:
            return self._count(step_index)
        for watch in self._watches:
            current = getattr(watch.link(), "_current_timestep", None)
            if current is None:
                watch.seen = None
            elif not _same(current, watch.seen):
                again = _other_schedule(current, watch.seen, same_value=_largest(current) == watch.value)
                watch.seen, watch.argument = current, timestep
                return self._follow(watch, _largest(current), restart=again)
            elif self._source is watch and watch.belongs(timestep):
                return self._step
        value = _largest(timestep)
        return self._advance("timestep", value, changed=value != self._value)

    def _follow(self, watch: _Watch, value: float, *, restart: bool) -> int:
        """A new step of a watched pipeline, counted apart from all other calls of the model."""
        # another pipeline that shares the model ran in between: this one was interrupted
        restart = restart or (isinstance(self._source, _Watch) and self._source is not watch)
        watch.step = 0 if restart or value > watch.value else watch.step + 1
        watch.value = value
        self._source, self._value, self._step = watch, value, watch.step
        return self._step

    def _count(self, index: int) -> int:
        """A forward of a pipeline that counts its steps, apart from all other calls of the model."""
        if index < self._index:
            self._counted = 0
        elif index > self._index:
            self._counted += 1
        self._index = index
        self._source, self._value, self._step = "step_index", float(-index), self._counted
        return self._step

    def _advance(self, source: Any, value: float, *, changed: bool) -> int:
        if source != self._source or value > self._value:
            self._step = 0
        elif changed:
            self._step += 1
        self._source, self._value = source, value
        return self._step

    def __deepcopy__(self, memo: dict[int, Any]) -> StepTracker:
        copied = StepTracker()
        memo[id(self)] = copied
        targets = [memo.get(id(watch.link())) for watch in self._watches]
        copied._watches = [_Watch(target) for target in targets if target is not None]
        return copied


def dense_layers(names: Sequence[str], layers: Sequence[int | str]) -> set[int]:
    """Indices of the layers that a configuration keeps dense.

    Args:
        names: module paths of a model's layers in forward order.
        layers: indices into them (negative ones count from the end), or fnmatch patterns on the paths.

    Raises:
        ValueError: an index is out of range, or a pattern matches no layer.
    """
    chosen: set[int] = set()
    for layer in layers:
        if isinstance(layer, str):
            found = {index for index, name in enumerate(names) if fnmatchcase(name, layer)}
            if not found:
                raise ValueError(f"dense_layers must match a layer, got {layer!r}; layers are {_some(names)}")
            chosen |= found
        elif -len(names) <= layer < len(names):
            chosen.add(layer % len(names))
        else:
            raise ValueError(f"dense_layers must be below the number of layers {len(names)}, got {layer}")
    return chosen


def _some(names: Sequence[str]) -> str:
    return ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]])


def _same(one: Any, other: Any) -> bool:
    """Identity for tensors, which schedules may hold twice with one value; equality for plain numbers."""
    return one is other or (type(one) in (int, float) and type(other) in (int, float) and one == other)


def _schedule(timestep: Any) -> int | None:
    """What a timestep was cut from: the address of its storage, None where it is no tensor."""
    return timestep.untyped_storage().data_ptr() if isinstance(timestep, Tensor) else None


def _other_schedule(current: Any, seen: Any, *, same_value: bool) -> bool:
    """Whether `current` belongs to another run's schedule than `seen`, which a run that was interrupted left.

    Timesteps that are cut from a tensor of several tell it by that tensor; one of its own storage can be a later
    step of the same run, and tells it only where it repeats the value.
    """
    if _schedule(current) == _schedule(seen):
        return False
    return same_value or (_is_cut(current) and _is_cut(seen))


def _is_cut(timestep: Any) -> bool:
    """Whether the timestep is a part of a larger tensor."""
    if not isinstance(timestep, Tensor):
        return False
    return timestep.untyped_storage().nbytes() > timestep.numel() * timestep.element_size()


def _largest(timestep: Any) -> float:
    """Timesteps may differ by frame or token: the largest one is the step's. NaN if there is none."""
    if timestep is None:
        return float("nan")
    if isinstance(timestep, Tensor):
        return float(timestep.detach().max())
    if isinstance(timestep, (list, tuple)):
        return max(float(value) for value in timestep)
    return float(timestep)
