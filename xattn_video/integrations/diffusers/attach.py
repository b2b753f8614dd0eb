"""Put wrappers into a model, watch its forwards, and take both out again."""

from __future__ import annotations

import inspect
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...config import XAttnConfig
from ...stats import AttentionStats
from ...thresholds import HeadThresholds
from ..dense_layers import dense_layers
from .dispatch import register
from .layers import ForwardState, Shared, SparseSelfAttention, sequence_group, wrap
from .memory import LayerMemory, Moment, share_out
from .models import REPLACEMENTS, spec_of
from .packed import Packed, read_packed
from .schedule import Schedule
from .steps import MOST_FORWARDS, StepTracker, WeakLink

_ATTRIBUTE = "_xattn_video"


# Said once, where a residual does not fit.
_NO_ROOM = (
    "the memory has no room for the residual of every layer; the others choose blocks in each step, at a threshold of "
    f"{XAttnConfig.threshold} at least. extrapolate=False takes half of the memory, residual='int4' a quarter of 'full'"
)


class Attachment:
    """One model's wrappers, and what happens around its forward.

    It hangs on the model as an attribute and as forward hooks, so that a `deepcopy` of the model has its own.
    The model itself is held weakly: a cycle would keep its weights alive until the garbage collector runs.
    """

    def __init__(
        self,
        owner: Any,
        name: str,
        model: Any,
        modules: dict[str, Any],
        *,
        config: XAttnConfig,
        stats: AttentionStats,
        tracker: StepTracker,
    ) -> None:
        self.owner = owner
        self._config = config
        self._tracker = tracker
        self._state = ForwardState()
        self._model = WeakLink(model)
        self._step_index: int | None = None
        # the name that the pipeline gives the present forward, and how often each name came in this step
        self._branch = ""
        self._forwards: dict[str, int] = {}
        self._branches = 1
        # the thread that runs the model, by number: an object of it could not be copied along with the model
        self._running: int | None = None
        self._parameters = list(inspect.signature(type(model).forward).parameters)[1:]
        # of a packed sequence: the last `token_tags`, and what they and the timesteps of the rows told
        self._packed: tuple[Tensor, Packed] | None = None
        self._remembers = config.residual != "off" or config.keep_masks > 1 or config.per_head
        self._schedule = Schedule(config, None)
        # the video in which dense attention gives NaN or inf too
        self._not_finite: int | None = None
        # For the time of a forward: when it began, on what, and whether the host had waited for the device before that.
        self._times, self._residual = stats.times, stats.residual
        self._began, self._on_cpu, self._waited = 0.0, True, True

        paths = list(modules)
        dense = dense_layers(paths, config.dense_layers)
        self._counts = stats.add_model([f"{name}.{path}" for path in paths])
        shared = Shared(owner, config, spec_of(model), register(), self._state)
        self._wrappers: dict[str, SparseSelfAttention] = {}
        for index, (path, module) in enumerate(modules.items()):
            original = module.processor
            replacement = REPLACEMENTS.get(type(original).__name__)
            self._wrappers[path] = wrap(
                original,
                inner=replacement() if replacement else None,
                shared=shared,
                counts=self._counts.layers[index],
                dense_layer=index in dense,
                memory=LayerMemory(index, stats.residual) if self._remembers else None,
            )
        for path, module in modules.items():
            module.set_processor(self._wrappers[path])
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True),
            # first, so that the hooks of others see the output that holds
            model.register_forward_hook(self._after_forward, always_call=True, with_kwargs=True, prepend=True),
        ]
        setattr(model, _ATTRIBUTE, self)
        if hasattr(type(model), "cache_context"):
            # an attribute of this one model, over the method of its class
            model.cache_context = self._cache_context

    def remove(self) -> None:
        """Give every module its own processor back and forget the model."""
        model = self._model()
        for handle in self._handles:
            handle.remove()
        model.__dict__.pop("cache_context", None)
        delattr(model, _ATTRIBUTE)
        for path, wrapper in self._wrappers.items():
            module: Any = model.get_submodule(path)
            # someone may have put another processor there since
            if module.processor is wrapper:
                module.set_processor(wrapper.original)
        self.forget()
        self.owner._generation.end(complete=False)

    @property
    def moment(self) -> Moment:
        """Where in a video the model's last forward was."""
        return self._state.moment

    def forget(self) -> None:
        """Let go of what the layers remember of a video."""
        for wrapper in self._wrappers.values():
            if wrapper.memory is not None:
                wrapper.memory.clear()

    # not part of the graph where the whole model is compiled: the step is found in Python
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no types
    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        thread = threading.get_ident()
        if self._running is not None and self._running != thread and _is_inside(self._running, model):
            raise RuntimeError(
                f"two threads run one {type(model).__name__} at the same time; with an XAttnProcessor attached, give "
                "each thread a model of its own (copy.deepcopy keeps the processor)"
            )
        self._running = thread
        given: dict[str, Any] = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        timestep = given.get("timestep")
        packed = self._read_packed(given) if spec_of(model).text == "packed" else None
        if packed is not None:
            # the step's is that of the video: references keep theirs
            timestep = given["timestep"][given["timestep_indices"][packed.last]]
        step = self._tracker.observe(timestep, self._step_index)
        moment = self._moment(step)
        schedule = self._schedule
        if schedule.total != self._tracker.total:
            schedule = self._schedule = Schedule(self._config, self._tracker.total)
            if schedule.all_dense is None:
                self.owner._say_once("schedule", schedule.doubt())
        self.owner._generation.begin_forward(moment.video, schedule)
        reason = schedule.dense_reason(step)
        looks = self._config.residual != "off" or self._config.per_head
        if looks and step == schedule.warmup - 1 and schedule.sparse_steps != 0:
            # the last step of the warm-up is the first refresh, or measures the heads, where sparse steps follow
            reason = None
        elif self._config.per_head and step >= schedule.warmup:
            share_out((wrapper.memory for wrapper in self._wrappers.values() if wrapper.memory), self._config)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        exact = None
        if packed is not None:
            reason, exact = reason or packed.reason, packed.exact
        self._state.begin(schedule, moment, reason, _latent_frames(model, tensors, kwargs), exact)
        self._counts.begin_forward(step, device)
        shift = schedule.threshold_shift(step)
        for wrapper in self._wrappers.values():
            wrapper.begin_forward(device, shift)
        self._on_cpu = device.type == "cpu"
        self._began = time.perf_counter()

    def _read_packed(self, given: dict[str, Any]) -> Packed:
        """The rows of a packed sequence, read once for all the forwards that are given the same tags."""
        tags = given["token_tags"]
        if self._packed is None or self._packed[0] is not tags:
            self._packed = tags, read_packed(tags, given["timestep_indices"])
        return self._packed[1]

    def _moment(self, step: int) -> Moment:
        """Where in a video the forward that starts is."""
        video, before = self._tracker.video, self._state.moment
        if (video, step) != (before.video, before.step):
            if self._remembers:
                self.owner._forget_idle(self, video, step)
            self._branches = max(sum(self._forwards.values()), 1)
            self._forwards.clear()
        number = self._forwards.get(self._branch, 0)
        if self._remembers and number == MOST_FORWARDS:
            # these are no forwards of guidance: the step cannot be told, and their memory would grow without end
            self.forget()
            self._forwards.clear()
            number = 0
        self._forwards[self._branch] = number + 1
        return Moment(video, step, (self._branch, number), max(self._branches, sum(self._forwards.values())))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no types
    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output of the forward, or None where it stays as it is."""
        again, state = None, self._state
        skipped, reason, tokens = state.skipped, state.dense, state.tokens
        kind = "sparse" if skipped else "refresh" if state.sparse else "dense"
        try:
            # there is no output where the forward has raised an exception
            if output is not None and self._has_not_finite():
                again = self._densely(model, args, kwargs)
        finally:
            self._running = None
            state.end()
        if output is not None:
            if again is None and not (kind == "refresh" and self._config.per_head):
                self._time(kind)
            if self._residual.without:
                self.owner._say_once("residual", _NO_ROOM)
            self.owner._generation.end_forward(state.moment.step, sparse=skipped, reason=reason, tokens=tokens)
        last = state.moment.step + 1 == self._schedule.total
        if last and sum(self._forwards.values()) >= self._branches:
            # nothing comes after the last forward of the last step
            self.owner._generation.end(complete=True)
            if self._remembers:
                self.owner.forget()
        return again

    def _time(self, kind: str) -> None:
        """Note how long the forward took, where the host knows it: `_has_not_finite` waits for forwards that skip."""
        waits = self._on_cpu or (kind != "dense" and self._not_finite != self._state.moment.video)
        if waits and self._waited:
            self._times.add(kind, time.perf_counter() - self._began)
        self._waited = waits

    def _has_not_finite(self) -> bool:
        """Whether a sparse call of this forward gave NaN or inf: reads one number from the device, if any was made.

        A step cannot be done again later than this: then the pipeline has used the output.
        """
        video = self._state.moment.video
        if not self._state.sparse or self._not_finite == video:
            return False
        if self._not_finite is not None:
            # of a video in which nobody looked
            self._counts.forget_not_finite()
            self._not_finite = None
        found = self._counts.not_finite()
        group = sequence_group(next(iter(self._wrappers.values()))._parallel_config)
        if group is not None:
            # each rank has seen its own heads, and all of them must do the same
            torch.distributed.all_reduce(found, group=group)
        return bool(found.item())

    def _densely(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of this forward with dense attention alone; None where it cannot be done again."""
        self._counts.forget_not_finite()
        # a mask or a residual of this forward may be what is wrong, or may hold the NaN
        self.forget()
        state = self._state
        text = f"sparse attention of step {state.moment.step} gave NaN or inf"
        if getattr(model, "is_cache_enabled", False):
            text = f"{text}; the cache of the model has it, so that it cannot be done again"
            self.owner._say_once("not_finite", text)
            return None
        assert state.schedule is not None
        state.begin(state.schedule, state.moment, "not_finite", state.frames, state.exact)
        # not `model(...)`: to the hooks around it this is still the same forward
        output = model.forward(*args, **kwargs)
        first = output if isinstance(output, Tensor) else output[0]
        if bool(first.isfinite().all()):
            self.owner._say_once("not_finite", f"{text}; such steps are done again with dense attention")
        else:
            self._not_finite = state.moment.video
            self.owner._say_once("not_finite", f"{text}, and so does dense attention: the cause is elsewhere")
        return output

    @contextmanager
    def _cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """Stands in for the model's `cache_context`: notes the step that the pipeline is in."""
        model = self._model()
        self._step_index, self._branch = where.get("step_index"), name
        try:
            with type(model).cache_context(model, name, **where):
                yield
        finally:
            self._step_index, self._branch = None, ""


def _latent_frames(model: nn.Module, tensors: list[Tensor], kwargs: dict[str, Any]) -> int | None:
    """Latent frames after the model's patches; None where they are not known or tokens are not in their order."""
    where = spec_of(model).frames
    if isinstance(where, str):
        number = kwargs.get(where)
        return number if isinstance(number, int) else None
    if where is None or not tensors or tensors[0].ndim != 5:
        return None
    settings: Any = getattr(model, "config", {})
    patch = settings.get("patch_size_t") or settings.get("patch_size", 1)
    frames: int = -(-tensors[0].shape[where] // (patch[0] if isinstance(patch, (list, tuple)) else patch))
    return frames


def _is_inside(thread: int, model: nn.Module) -> bool:
    """Whether a thread is in a forward of the model.

    After KeyboardInterrupt torch runs no forward hook, so the note that a forward is running may be wrong. Only the
    frames of that thread tell. A forward of its own around the model's could note the end in any case, but offloading
    replaces `model.forward` too, and then the one could not be taken off without the other. The frames are read only
    where a forward starts in another thread than the last one that has not ended, which takes 7 us inside of a layer.
    """
    frame = sys._current_frames().get(thread)
    while frame is not None:
        # Compiled or not, a call of the model goes through a method of its own.
        if frame.f_locals.get("self") is model:
            return True
        frame = frame.f_back
    return False


def check_settings(name: str, model: nn.Module, modules: dict[str, Any], config: XAttnConfig) -> None:
    """Raise `ValueError` for settings that do not fit the model of that name with these self-attention modules."""
    dense_layers(list(modules), config.dense_layers)
    if isinstance(config.threshold, HeadThresholds):
        by_layer = {f"{name}.{path}": getattr(module, "heads", None) for path, module in modules.items()}
        config.threshold.check_model(type(model).__name__, by_layer, part=f"{name}.")
    for path, module in modules.items():
        heads = getattr(module, "heads", None)
        if isinstance(config.threshold, tuple) and heads not in (None, len(config.threshold)):
            raise ValueError(
                f"threshold of {name}.{path} must have one value for each of {heads} heads, got {len(config.threshold)}"
            )


def attachment_of(model: nn.Module) -> Attachment | None:
    """What is attached to this model."""
    return getattr(model, _ATTRIBUTE, None)


def detach(model: nn.Module) -> None:
    """Restore the model's own processors; does nothing where none is attached."""
    attachment = attachment_of(model)
    if attachment is not None:
        attachment.remove()
