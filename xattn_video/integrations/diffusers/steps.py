"""Which denoising step is this, and which layers stay dense in it."""

from __future__ import annotations

import logging
import weakref
from math import isnan
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)

# No model of diffusers runs more often in one step: LTX-2 runs four times with all its kinds of guidance.
MOST_FORWARDS = 6


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
    """A pipeline, what it and its scheduler showed last, and the step that it is in.

    Its scheduler is looked at and not hooked: a pipeline may get another one at any time, and some pipelines copy
    theirs (a hook would be copied along).
    """

    def __init__(self, pipeline: Any) -> None:
        self.link = WeakLink(pipeline)
        self.step = -1
        # `_current_timestep`: what it is now, and what it was in the last step.
        # A timestep that an interrupted run left behind is no news.
        self.seen = getattr(pipeline, "_current_timestep", None)
        self.last: Any = None
        # whether it follows the steps of this generation; it does not in a loop outside of the pipeline's own
        self.shows = True
        # `scheduler.timesteps`, which set_timesteps replaces, and `scheduler.step_index`, which step() moves
        self.schedule: Any = None
        self.index: int | None = None
        # the timestep that the model was called with at the start of this step
        self.argument: Any = None

    def look(self, *, interrupted: bool = False) -> str | None:
        """What happened since the last look: `"begin"` (a generation began), `"step"` (the next step), or None.

        Args:
            interrupted: whether another pipeline ran since this one's last step. It counts only where no scheduler
                shows the generations.
        """
        pipeline = self.link()
        current = getattr(pipeline, "_current_timestep", None)
        scheduler = getattr(pipeline, "scheduler", None)
        schedule, index = getattr(scheduler, "timesteps", None), getattr(scheduler, "step_index", None)
        shown = current is not None and not _same(current, self.seen)
        begun = schedule is not None and schedule is not self.schedule
        # the last step moves the index behind the schedule: what the model does then is not part of the run
        moved = index is not None and index != self.index and schedule is not None and index < len(schedule)
        if begun:
            self.shows = shown
            event: str | None = "step" if _is_next_stage(scheduler, schedule, self.schedule) else "begin"
        elif shown:
            self.shows = True
            # a scheduler that counts has shown where the generation began
            again = index is None and (interrupted or self._starts_again(current))
            event = "begin" if again else "step"
        else:
            event = "step" if moved and not self.shows else None
        self.seen, self.schedule, self.index = current, schedule, index
        self.last = current if shown else self.last
        if event is not None:
            self.step = 0 if event == "begin" else self.step + 1
        return event

    def total(self) -> int | None:
        """Steps of the generation: the pipeline's own number, which leaves out those that it skips, or its schedule's.

        None where there is no schedule, or one for each of several stages.
        """
        pipeline = self.link()
        if self.schedule is None or _has_stages(getattr(pipeline, "scheduler", None)):
            return None
        total = len(self.schedule)
        own = getattr(pipeline, "_num_timesteps", None)
        # the number of an earlier run may still be there, in a loop outside of the pipeline's own for instance
        return own if self.shows and isinstance(own, int) and 0 < own <= total else total

    def counts(self) -> bool:
        """Whether the steps of this generation can be seen, and not only its begin."""
        return self.shows or hasattr(getattr(self.link(), "scheduler", None), "step_index")

    def belongs(self, argument: Any) -> bool:
        """Whether a forward with this timestep argument can be part of the step seen last.

        The pipeline may have stopped there, while another one that shares its model runs.
        """
        if argument is None or (_schedule(argument) is not None and _schedule(argument) == _schedule(self.seen)):
            return True
        return argument is self.argument or _largest(argument) == _largest(self.argument)

    def _starts_again(self, current: Any) -> bool:
        value, before = _largest(current), _largest(self.last)
        return value > before or _other_schedule(current, self.last, same_value=value == before)


class StepTracker:
    """Counts the denoising steps of a generation, from the first one that is really run.

    What tells a step, in order:

    1. the `step_index` that a pipeline gives to `cache_context`;
    2. the user, with `step`, until a bound pipeline begins another generation;
    3. what a pipeline shows that this tracker is bound to. `scheduler.set_timesteps` begins a generation. Another
       object in `_current_timestep` (another value, for a plain number) is another step, since schedulers may repeat
       a value. In a loop that does not set it, a step ends with `scheduler.step`. Only where the scheduler counts no
       steps (its `step_index` stays None), a rise of the timestep or another schedule begins a generation too;
    4. the largest value of the `timestep` that the model is called with, which reads one number from the device each
       forward. Another value is another step. A rise begins a generation; two rises without a fall between them are
       taken for an inversion, whose timesteps rise, and there a fall begins one. After `start_generation` neither
       does. Timesteps that jump back and forth or stand still are dense for longer than asked, and one warning says
       so. A generation that begins below the last timestep of the one before cannot be seen to begin.

    A change from one of these to another starts a new generation too, except for a pipeline that goes on where it
    was (something called the model between its steps, a preview for instance). The pipelines are held weakly.

    A step is an evaluation of the model: a scheduler of second order (Heun) has two of them in each of its own.
    """

    def __init__(self) -> None:
        self._watches: list[_Watch] = []
        # what told the last step
        self._source: Any = None
        # What the user said: the step, and whether a generation begins with the next forward.
        self._given: int | None = None
        self._starts = False
        # the last step that a pipeline counted itself, and its count
        self._counted, self._index = -1, float("inf")
        # the generation whose steps are found from timesteps, and whether the user said where it begins
        self._run = _Inference()
        self._told = False
        self._warned = False
        self._steps_told: int | None = None
        self._last_step = -1
        # the pipelines that moved on last
        self._moved: set[_Watch] = set()
        # number of the generation that the last forward belonged to
        self.video = 0

    def bind(self, pipeline: Any) -> None:
        """Watch the pipeline and its scheduler from now on."""
        self._watches = [watch for watch in self._watches if watch.link() not in (None, pipeline)]
        self._watches.append(_Watch(pipeline))

    def start_generation(self, steps: int | None = None) -> None:
        """A generation begins with the next forward, whose step is 0; `steps`: how many it will have, if known."""
        # what happened before is known to the user: only a generation that begins later ends what is said here
        self._look()
        self._given, self._starts, self._told = None, True, True
        self._steps_told = steps

    def step(self, index: int) -> None:
        """All forwards from now on are in this step, until the next call, or until a pipeline begins a generation.

        Raises:
            TypeError, ValueError: index is no int, or it is negative.
        """
        if not isinstance(index, int):
            raise TypeError(f"step must be an int, got {type(index).__name__}")
        if index < 0:
            raise ValueError(f"step must be 0 or more, got {index}")
        # as in start_generation, which still holds where it was called just before
        self._look()
        self._given = index

    def observe(self, timestep: Any = None, step_index: int | None = None) -> int:
        """Called at the start of every forward: the index of its step, 0 for the first one of a generation.

        Args:
            timestep: what the model is called with: a tensor (any shape), a number, or None if the model takes none
                (every forward then counts as a step).
            step_index: the pipeline's own count, where it gives one.
        """
        events = self._look()
        source, moved = self._source, {watch for watch, event in events.items() if event is not None}
        begins = self._starts or "begin" in events.values()
        step = self._find(timestep, events) if step_index is None else self._count(step_index, begins=begins)
        self._starts = False
        # A preview between two steps is no part of the video, nor is what follows it of the preview's.
        elsewhere = self._source != source or (moved and self._moved.isdisjoint(moved))
        if begins or elsewhere or step < self._last_step:
            self.video += 1
        self._last_step, self._moved = step, moved or self._moved
        return step

    @property
    def total(self) -> int | None:
        """All steps of the generation that the last forward belonged to; None where nothing tells it."""
        if self._told or self._source == "user":
            return self._steps_told
        watch = self._source if isinstance(self._source, _Watch) else None
        if watch is None and self._source == "step_index" and len(self._watches) == 1:
            watch = self._watches[0]
        return None if watch is None else watch.total()

    def _look(self) -> dict[_Watch, str | None]:
        """What happened in each pipeline. All of them look, so that none takes another's run for its own later."""
        source = self._source
        events = {
            watch: watch.look(interrupted=isinstance(source, _Watch) and source is not watch) for watch in self._watches
        }
        if "begin" in events.values():
            self._given, self._told, self._steps_told = None, False, None
        return events

    def _find(self, timestep: Any, events: dict[_Watch, str | None]) -> int:
        source = self._source
        if self._given is not None:
            self._source = "user"
            return self._given
        if self._starts:
            for watch in events:
                watch.step = 0
        for watch, event in events.items():
            if event is not None:
                watch.argument = timestep
                if not watch.counts():
                    # it shows where the generation begins, and the timesteps tell its steps
                    self._starts = self._starts or event == "begin"
                    continue
                self._source = watch
                return watch.step
        if isinstance(source, _Watch) and source in events and source.belongs(timestep):
            return source.step
        if self._starts or (source != "timestep" and not self._told):
            self._run = _Inference()
        self._source = "timestep"
        doubt = self._run.advance(_largest(timestep), told=self._told)
        if doubt:
            self._warn(doubt)
        return self._run.step

    def _count(self, index: int, *, begins: bool) -> int:
        """A forward of a pipeline that counts its steps, apart from all other calls of the model."""
        if index < self._index or begins:
            self._counted = 0
        elif index > self._index:
            self._counted += 1
        self._index = index
        self._source = "step_index"
        return self._counted

    def _warn(self, doubt: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "XAttnProcessor cannot tell the denoising step: %s. More or fewer steps than warmup_steps may be "
                "dense; attach it to the pipeline, or call processor.start_generation() before a loop of your own and "
                "processor.step(i) in each of its steps",
                doubt,
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> StepTracker:
        copied = StepTracker()
        memo[id(self)] = copied
        targets = [memo.get(id(watch.link())) for watch in self._watches]
        copied._watches = [_Watch(target) for target in targets if target is not None]
        return copied


class _Inference:
    """The steps of a generation, found from nothing but the timesteps that the model is called with."""

    def __init__(self) -> None:
        self.step = -1
        self._value = self._first = float("nan")
        # after a rise: the step that it is in if the timesteps of this generation rise
        self._rising: int | None = None
        # forwards with the present value
        self._forwards = 0

    def advance(self, value: float, *, told: bool) -> str | None:
        """The next forward's timestep: finds `step`, and returns why this may be wrong or None.

        Args:
            value: the timestep, NaN where there is none.
            told: whether the user says where a generation begins.
        """
        doubt = None
        before, self._value = self._value, value
        self._forwards = self._forwards + 1 if value == before else 1
        if value == before:
            if self._forwards > MOST_FORWARDS:
                doubt = f"{self._forwards} forwards in a row had the timestep {value:g}"
        elif self.step < 0:
            self.step, self._first = 0, value
        elif told:
            self.step += 1
        elif value > before and self._rising is not None:
            self._rising += 1
            self.step = self._rising
        elif value > before:
            if value < self._first:
                doubt = f"the timestep rose from {before:g} to {value:g}, below the first one, {self._first:g}"
            # where the timestep fell before, an inversion can have begun with this forward or the one before it
            self._rising = 1 if self.step == 0 else 0
            self.step, self._first = 0, value
        elif self._rising is not None and self.step > 0:
            self.step, self._first, self._rising = 0, value, None
        else:
            self.step, self._rising = self.step + 1, None
        return "the model takes no timestep, so every forward counts as a step" if isnan(value) else doubt


def _same(one: Any, other: Any) -> bool:
    """Identity for tensors, which schedules may hold twice with one value; equality for plain numbers."""
    return one is other or (type(one) in (int, float) and type(other) in (int, float) and one == other)


def _schedule(timestep: Any) -> int | None:
    """What a timestep was cut from: the address of its storage, None where it is no tensor."""
    return timestep.untyped_storage().data_ptr() if isinstance(timestep, Tensor) else None


def _is_next_stage(scheduler: Any, schedule: Any, before: Any) -> bool:
    """Whether a generation goes on with this schedule: Helios has one for each stage, and each starts lower."""
    if before is None or not _has_stages(scheduler):
        return False
    return float(schedule[0]) < float(before[0])


def _has_stages(scheduler: Any) -> bool:
    return len(getattr(scheduler, "timesteps_per_stage", ())) > 1


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
