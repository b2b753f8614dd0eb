"""XAttnProcessor: sparse attention for diffusers' video pipelines.

    pipe.set_attn_processor(XAttnProcessor(stride=8, threshold=0.9, warmup_steps=5))   # all its transformers
    pipe.transformer.set_attn_processor(XAttnProcessor(XAttnConfig(...)))              # one transformer
    pipe.set_attn_processor(None)                                                      # as it was

Importing this module gives diffusers those methods (`install`) and the attention backend behind them.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any, Unpack

from diffusers import DiffusionPipeline, ModelMixin, ModularPipeline
from diffusers.models.attention import AttentionMixin
from torch import nn

from ...config import Settings, XAttnConfig, describe_settings, lists_settings
from ...model_table import MODELS
from ...ops import Call
from ...stats import AttentionStats
from .attach import Attachment, attachment_of, check_settings, detach
from .dispatch import NAME, register
from .layers import SparseSelfAttention
from .models import find_self_attention
from .nothing_sparse import Generation
from .steps import StepTracker, WeakLink

logger = logging.getLogger(__name__)

_PIPELINES = (DiffusionPipeline, ModularPipeline)


class XAttnProcessor:
    """Sparse attention for the video self-attention of a diffusers pipeline or transformer.

    Args:
        config: settings, or the name of a preset: `"fast"`, `"balanced"` or `"faithful"`, or of a model, such as
            `"wan2.1-1.3b"` (see `XAttnConfig.preset`). None is the defaults of `XAttnConfig`.
        on_call: `on_call(layer, call)` sees each sparse call before it is computed: the layer's name, as in the
            statistics, and the `xattn_video.ops.Call` with query, key and value `[B, H, S, D]`. `xattn-video calibrate`
            measures with it. Not under `torch.compile`.
        **settings: single settings, which replace those of config. They are listed below.

    Attributes:
        config: the settings.
        stats: what the attention calls did: `stats.summary()` reads it, `stats.reset()` starts over.

    Raises:
        ValueError, TypeError: a setting or the name of a preset is wrong; the message names it.

    Example:
        >>> from diffusers import WanPipeline
        >>> from xattn_video import XAttnProcessor
        >>> pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers").to("cuda")
        >>> processor = XAttnProcessor(stride=8, threshold=0.9, warmup_steps=5)
        >>> pipe.set_attn_processor(processor)
        >>> video = pipe("a cat walks on the grass").frames[0]
        >>> processor.stats.summary()["density"]
    """

    @lists_settings
    def __init__(
        self,
        config: XAttnConfig | str | None = None,
        *,
        on_call: Callable[[str, Call], None] | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        if isinstance(config, str):
            self.config = XAttnConfig.preset(config, **settings)
        elif config is None or isinstance(config, XAttnConfig):
            self.config = (config or XAttnConfig()).replace(**settings)
        else:
            meant = f"; write threshold={config!r}" if isinstance(config, float) else ""
            raise TypeError(f"config must be an XAttnConfig, the name of a preset or None, got {config!r}{meant}")
        self.on_call = on_call
        # whether `set_attention_backend` attached it, and another backend takes it off
        self._by_backend = False
        self.stats = AttentionStats()
        self._tracker = StepTracker()
        self._models: list[WeakLink] = []
        self._said: set[str] = set()
        self._generation = Generation(self.config)
        # The last generation of a loop of your own, whose number of steps nobody told, ends with the processor.
        weakref.finalize(self, self._generation.end, complete=False)

    def __repr__(self) -> str:
        return f"XAttnProcessor({self.config})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises TypeError: every self-attention module needs a processor of its own, which attaching gives it."""
        raise TypeError(
            "an XAttnProcessor is not the processor of one module: attach it with set_attn_processor of the pipeline "
            "or transformer"
        )

    def start_generation(self, steps: int | None = None) -> None:
        """Say that a new video begins: the next forward is in step 0, and `warmup_steps` counts from there.

        For a loop of your own around a transformer. A diffusers pipeline that the processor is attached to
        does not need it, nor does a loop with such a pipeline's scheduler: their steps are seen. After this call every
        change of the timestep is the next step, whether it falls or rises, until `step` says more. Say it before each
        video then: only a pipeline that begins a generation (`scheduler.set_timesteps`) ends what was said here.

        Args:
            steps: how many steps it will have, or None. Settings that are shares of all steps need it.

        Raises:
            TypeError, ValueError: steps is no int, or below 1.

        Example:
            >>> import torch
            >>> from diffusers import WanTransformer3DModel
            >>> from xattn_video import XAttnProcessor
            >>> model = WanTransformer3DModel(
            ...     num_attention_heads=2, attention_head_dim=32, text_dim=16, freq_dim=32, ffn_dim=64, num_layers=2
            ... )
            >>> processor = XAttnProcessor(warmup_steps=2, min_tokens=64)
            >>> model.set_attn_processor(processor)
            >>> latents, text = torch.randn(1, 16, 5, 16, 16), torch.randn(1, 8, 16)
            >>> processor.start_generation()
            >>> for index in range(8):  # a queue of frames: the largest timestep is the same in every step
            ...     processor.step(index)
            ...     with torch.no_grad():
            ...         velocity = model(latents, torch.tensor([999]), text).sample
            ...     latents = latents - velocity / 8
            >>> summary = processor.stats.summary()
            >>> summary["dense_calls"], summary["sparse_calls"]
            ({'warmup': 4}, 12)
        """
        if steps is not None:
            if isinstance(steps, bool) or not isinstance(steps, int):
                raise TypeError(f"steps must be an int or None, got {type(steps).__name__}")
            if steps < 1:
                raise ValueError(f"steps must be 1 or more, got {steps}")
        self._tracker.start_generation(steps)

    def step(self, index: int) -> None:
        """Say which denoising step the next forwards are in, the two of guidance for instance.

        It holds until the next call of `step` or `start_generation`, or until a pipeline that the processor is
        attached to begins a generation. The example is at `start_generation`.

        Args:
            index: steps of this generation before this one: 0 for the first one that is really run.

        Raises:
            TypeError, ValueError: index is no int, or it is negative.
        """
        self._tracker.step(index)

    def attach(self, target: DiffusionPipeline | ModularPipeline | nn.Module) -> None:
        """What `target.set_attn_processor(self)` does; replaces an XAttnProcessor that is attached.

        Raises:
            ValueError: target has no transformer whose attention can be made sparse (the message names its class);
                a setting does not fit it; or this processor serves another pipeline, whose steps it counts.
        """
        if isinstance(target, _PIPELINES):
            models = pipeline_transformers(target)
            self._check_one_pipeline(target, models)
        else:
            model = unwrapped(target)
            models = {self._name_of(model): model}
        # all or none: look for a problem in every model before touching the first one
        found = {name: find_self_attention(model) for name, model in models.items()}
        for name, modules in found.items():
            check_settings(name, models[name], modules, self.config)
        for name, model in models.items():
            if attached_processor(model) is not self:
                self._attach_model(name, model, found[name])
        if isinstance(target, _PIPELINES):
            self._tracker.bind(target)

    def _attach_model(self, name: str, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        detach(model)
        Attachment(self, name, model, modules, config=self.config.for_videos(), stats=self.stats, tracker=self._tracker)
        self._models.append(WeakLink(model))

    def forget(self) -> None:
        """Free what layers remember of the present video (masks, residuals). It is done at the end of each video.

        Where a generation was interrupted, or in a loop of your own whose number of steps was not given, it happens
        when the next one begins, or when the processor is taken off. This does it at once. Sparse steps that follow
        in the same video refresh first.
        """
        for attachment in self._attachments():
            attachment.forget()

    def _forget_idle(self, running: Attachment, video: int, step: int) -> None:
        """Free what is of another video, or of a transformer that has done its part, where this one begins a step.

        Within a video another transformer has done its part where it did not run in the last step, or where this one
        takes its place: then this one did not run in the last step.
        """
        takes_over = running.moment[:2] != (video, step - 1)
        for attachment in self._attachments():
            last = attachment.moment
            done = attachment is not running and last.step < (step if takes_over else step - 1)
            if last.video != video or done:
                attachment.forget()

    def _say_once(self, what: str, text: str | None) -> None:
        """Warn of something, `what` in one word, unless there is nothing to say or it was said before."""
        if text and what not in self._said:
            self._said.add(what)
            logger.warning("%s", text)

    def _attachments(self) -> list[Attachment]:
        found = [attachment_of(model) for model in self._attached_models()]
        return [attachment for attachment in found if attachment is not None]

    def _attached_models(self) -> list[nn.Module]:
        models = [link() for link in self._models]
        return [model for model in models if model is not None and attached_processor(model) is self]

    def _name_of(self, model: nn.Module) -> str:
        others = [other for other in self._attached_models() if other is not model]
        return f"transformer_{len(others) + 1}" if others else "transformer"

    def _check_one_pipeline(self, pipeline: DiffusionPipeline | ModularPipeline, models: dict[str, nn.Module]) -> None:
        own = set(map(id, models.values()))
        other = next((model for model in self._attached_models() if id(model) not in own), None)
        if other is not None:
            raise ValueError(
                "one XAttnProcessor counts the steps of one pipeline, and this one is attached to a "
                f"{type(other).__name__} that this {type(pipeline).__name__} does not have; "
                "make another: XAttnProcessor(processor.config)"
            )


# `help(XAttnProcessor)` says what each setting is for, in the words of `XAttnConfig`.
XAttnProcessor.__doc__ = f"{XAttnProcessor.__doc__}\n{describe_settings()}"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what `torch.compile(model)` returns."""
    return getattr(model, "_orig_mod", model)


def attached_processor(model: nn.Module) -> XAttnProcessor | None:
    """The XAttnProcessor that is attached to this model, for instance to a deep copy."""
    attachment = attachment_of(unwrapped(model))
    return None if attachment is None else attachment.owner


def pipeline_transformers(pipeline: DiffusionPipeline | ModularPipeline) -> dict[str, nn.Module]:
    """The pipeline's transformers by component name: those of a known class, and those named so.

    Raises:
        ValueError: it has none.
    """
    models = {
        name: unwrapped(component)
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module)
    }
    found = {
        name: model
        for name, model in models.items()
        if name.startswith("transformer") or type(model).__name__ in MODELS
    }
    if not found:
        classes = ", ".join(sorted({type(model).__name__ for model in models.values()})) or "no models"
        hint = "; load its components first: pipe.load_components()" if isinstance(pipeline, ModularPipeline) else ""
        raise ValueError(f"{type(pipeline).__name__} has no transformer for XAttnProcessor; it has {classes}{hint}")
    return found


def install() -> None:
    """Teach diffusers' `set_attn_processor` and `set_attention_backend` about XAttnProcessor, once.

    These are the only changes to diffusers' classes.

    The stock method puts one object into every module, text refiners included, and forgets what was there. So
    `AttentionMixin.set_attn_processor` is wrapped: an XAttnProcessor attaches, None detaches, anything else goes to
    the original. `ModelMixin` gets the same for the models that have no such method (FramePack, Cosmos), and
    `DiffusionPipeline` and `ModularPipeline` get one that does it for all their transformers. `set_attention_backend`
    of a model attaches an XAttnProcessor with the default settings where its backend is `"xattention"`, which another
    backend and `reset_attention_backend` take off again.
    """
    register()
    for cls, method_for in (
        (AttentionMixin, _model_method),
        (ModelMixin, _model_method),
        (DiffusionPipeline, _pipeline_method),
        (ModularPipeline, _pipeline_method),
    ):
        own = cls.__dict__.get("set_attn_processor")
        if not hasattr(own, "_xattn_video"):
            method = method_for(cls, own)
            method._xattn_video = True
            cls.set_attn_processor = method
    if not hasattr(ModelMixin.set_attention_backend, "_xattn_video"):
        for name in ("set_attention_backend", "reset_attention_backend"):
            method = _backend_method(getattr(ModelMixin, name))
            method._xattn_video = True
            setattr(ModelMixin, name, method)


def _model_method(cls: Any, original: Callable[..., None] | None) -> Any:
    def set_attn_processor(self: Any, processor: Any) -> None:
        """Set the attention processor of a model.

        Args:
            processor: an `XAttnProcessor` makes its video self-attention sparse, None takes that off again, anything
                else is for diffusers' own method.
        """
        _refuse_class(processor)
        if isinstance(processor, XAttnProcessor):
            processor.attach(self)
        elif processor is None:
            detach(self)
        elif original is not None:
            _set_other(self, processor, functools.partial(original, self))
        elif hasattr(super(cls, self), "set_attn_processor"):
            super(cls, self).set_attn_processor(processor)
        else:
            raise TypeError(
                f"{type(self).__name__}.set_attn_processor takes an XAttnProcessor or None, "
                f"got {type(processor).__name__}"
            )

    return set_attn_processor


def _refuse_class(processor: Any) -> None:
    if isinstance(processor, type) and issubclass(processor, XAttnProcessor):
        name = processor.__name__
        raise TypeError(f"set_attn_processor takes an object, got the class {name}; write {name}() with parentheses")


def _set_other(model: Any, processor: Any, stock: Callable[[Any], None]) -> None:
    """diffusers' own method, for a model that an XAttnProcessor is or was attached to."""
    detach(model)
    if not isinstance(processor, dict):
        stock(processor)
        return
    # `model.attn_processors`, kept while an XAttnProcessor was attached, holds wrappers and is given back
    wrappers = [value for value in processor.values() if isinstance(value, SparseSelfAttention)]
    stock({path: value.original if value in wrappers else value for path, value in processor.items()})
    if wrappers:
        wrappers[0].owner.attach(model)


def _pipeline_method(cls: type, original: Callable[..., None] | None) -> Any:
    def set_attn_processor(self: Any, processor: Any) -> None:
        """Set the attention processor of all the pipeline's transformers.

        Args:
            processor: an `XAttnProcessor` makes their video self-attention sparse, None takes that off again,
                anything else goes to `set_attn_processor` of each transformer.
        """
        _refuse_class(processor)
        if isinstance(processor, XAttnProcessor):
            processor.attach(self)
        elif original is not None and processor is not None:
            original(self, processor)
        else:
            model: Any
            for model in pipeline_transformers(self).values():
                model.set_attn_processor(processor)

    return set_attn_processor


def _backend_method(stock: Callable[..., None]) -> Any:
    @functools.wraps(stock)
    def choose_backend(self: Any, *args: Any, **kwargs: Any) -> None:
        name = next(iter((*args, *kwargs.values())), None)
        ours = isinstance(name, str) and name.lower() == NAME
        own = attached_processor(self)
        if not ours:
            # it raises for a backend that is not there, and then nothing has changed
            stock(self, *args, **kwargs)
            if own is not None and own._by_backend:
                detach(self)
        elif own is None:
            own = XAttnProcessor()
            own._by_backend = True
            own.attach(self)
            logger.warning(
                "set_attention_backend(%r) attached an XAttnProcessor with the default settings; "
                "pipe.set_attn_processor(XAttnProcessor(...)) takes others, and knows the steps of the pipeline",
                NAME,
            )
        elif not own._by_backend:
            raise ValueError(
                f"set_attention_backend chooses the backend of dense calls here, got {NAME!r}, which "
                "set_attn_processor(XAttnProcessor(...)) has attached already"
            )

    return choose_backend
