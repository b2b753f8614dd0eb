"""The wrapper that stands in for one self-attention module's processor."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from ...config import XAttnConfig
from ...model_table import ModelSpec
from ...ops import Backend, KeyMask, attend_sparse, checked_call, exact_type, find_backend, without_autocast
from ...stats import LayerCounts
from .memory import LayerMemory, Moment
from .schedule import Schedule, shifted

Value = TypeVar("Value")


class ForwardState:
    """What all layers of a model share during one forward."""

    def __init__(self) -> None:
        # why this whole forward is dense, or None
        self.reason: str | None = None
        self.moment = Moment()
        self.schedule: Schedule | None = None
        # latent frames of the video that the model is called with, or None where it is no grid of them
        self.frames: int | None = None
        # range of the tokens of a packed sequence that stay exact, or None
        self.exact: tuple[int, int] | None = None
        # whether a call was sparse, or a refresh
        self.sparse = False
        # whether a call was sparse and no refresh; else why the last one was dense that no setting asks for by name
        self.skipped = False
        self.dense: str | None = None
        # keys of a dense call, where that can be told
        self.tokens: int | None = None
        self._known: dict[tuple[str, int], tuple[Tensor, Any]] = {}

    def begin(
        self,
        schedule: Schedule,
        moment: Moment,
        reason: str | None,
        frames: int | None,
        exact: tuple[int, int] | None,
    ) -> None:
        """A forward starts."""
        self.schedule, self.moment, self.reason, self.frames, self.exact = schedule, moment, reason, frames, exact
        self.sparse = self.skipped = False
        self.dense = self.tokens = None
        self._known.clear()

    def end(self) -> None:
        """The forward is over: let go of its tensors."""
        self._known.clear()

    def once(self, what: str, tensor: Tensor, compute: Callable[[Tensor], Value]) -> Value:
        """`compute(tensor)`, done once a forward for a tensor that every layer gets."""
        if torch.compiler.is_compiling():
            # a compiled block sees each tensor once and must not leave anything behind
            return compute(tensor)
        entry = self._known.get((what, id(tensor)))
        if entry is None:
            # holding the tensor keeps its id from being used again
            entry = self._known[what, id(tensor)] = (tensor, compute(tensor))
        value: Value = entry[1]
        return value


@dataclass(frozen=True, eq=False)
class Shared:
    """What the wrappers of one model have in common.

    Attributes:
        owner: the XAttnProcessor that they are part of.
        config: its settings.
        spec: the row of the model's class in the table of models.
        backend: diffusers' name for sparse attention.
        state: what the layers share during one forward.
    """

    owner: Any
    config: XAttnConfig
    spec: ModelSpec
    backend: Any
    state: ForwardState


class SparseSelfAttention:
    """Stands in for the processor of one self-attention module.

    The processor that was there (`original`) is not touched. A shallow copy of it (`inner`) still does the
    projections, norms, rotary embedding and output; only its attention call comes to `attend`. `_attention_backend`
    and `_parallel_config` are the original's: the backend of dense calls, and the context parallelism of all.
    """

    def __init__(
        self,
        original: Any,
        *,
        inner: Any,
        shared: Shared,
        counts: LayerCounts,
        dense_layer: bool,
        memory: LayerMemory | None,
    ) -> None:
        self.original = original
        self.owner = shared.owner
        self.inner = copy.copy(original) if inner is None else inner
        self.inner._attention_backend = shared.backend
        self.inner._parallel_config = self
        self.config = config = shared.config
        self.counts = counts
        self.state = shared.state
        self.text = shared.spec.text
        self.trusted_mask = shared.spec.mask == "prefix"
        self.dense_layer = dense_layer
        self.text_tokens = 0
        # where the original has no such attribute
        self._unset: dict[str, Any] = {}
        self.memory = memory
        # One tensor for all calls, where the threshold differs per head or from step to step. It is made on the CPU,
        # whatever the default device is, since a model may be attached under torch.device("meta").
        shares = config.layer_threshold(counts.name)
        changes = isinstance(shares, tuple) or config.threshold_ramp
        self.threshold = torch.tensor(shares, dtype=torch.float64, device="cpu") if changes else None
        self._middle = self.threshold
        # By this number an operator inside of a compiled block finds the layer. It is a tensor, because torch.compile
        # would make a graph for each layer of a number in Python.
        self.number = torch.zeros((), dtype=torch.int64, device="cpu")
        self.on_call = shared.owner.on_call
        check_parallel(self._parallel_config)

    def begin_forward(self, device: torch.device, shift: float) -> None:
        """A forward starts, on this device, whose threshold is moved by so much."""
        # from the host; a layer of a model that is split over GPUs has a device of its own
        if self.threshold is not None and self.threshold.device.type != device.type:
            self.place(device)
        if self.config.threshold_ramp:
            assert self.threshold is not None
            assert self._middle is not None
            self._middle = self._middle.to(self.threshold.device, self.threshold.dtype)
            with torch.inference_mode(False), torch.no_grad():
                self.threshold = shifted(self._middle, shift)
        if self.memory is not None and _LAYERS.get(int(self.number)) is not self:
            # also a copy of a layer, which came with the number of its original
            self.number.fill_(next(_NUMBERS))
            _LAYERS[int(self.number)] = self

    def place(self, device: torch.device) -> None:
        """Have the thresholds of the heads on this device."""
        if self.threshold is not None and self.threshold.device != device:
            with torch.inference_mode(False):
                self.threshold = self.threshold.to(device, exact_type(device))

    @property
    def _attention_backend(self) -> Any:
        return self._get("_attention_backend")

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self._set("_attention_backend", backend)

    @property
    def _parallel_config(self) -> Any:
        return self._get("_parallel_config")

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        check_parallel(config)
        self._set("_parallel_config", config)

    def _get(self, name: str) -> Any:
        return getattr(self.original, name) if hasattr(self.original, name) else self._unset.get(name)

    def _set(self, name: str, value: Any) -> None:
        if hasattr(self.original, name):
            setattr(self.original, name, value)
        else:
            self._unset[name] = value

    def attend(  # noqa: PLR0913 - diffusers' signature
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        """The attention call of the inner processor: query, key, value and output are `[B, S, H, D]`."""
        reason = "dense_layer" if self.dense_layer else self.state.reason
        mask = KeyMask(is_causal)
        if reason is None:
            reason, kv_lens = self._read_call(query, key, attn_mask, dropout_p)
            mask = KeyMask(is_causal, kv_lens=kv_lens)
        parallel = self._parallel_config
        # each rank of a parallel call holds its share of the tokens here
        ranks = sequence_ranks(parallel)
        backend = reason or find_backend(
            self.config, query, key, value, q_len=query.shape[1] * ranks, kv_len=key.shape[1] * ranks, causal=is_causal
        )
        if self.counts.values.device != query.device:
            self.counts.place(query.device)
        if isinstance(backend, str):
            self.counts.add_dense(backend)
            if not self.dense_layer:
                self.state.dense = backend
                if not torch.compiler.is_compiling():
                    self.state.tokens = key.shape[1] * ranks
            dense: Tensor = dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
                backend=self._attention_backend,
                parallel_config=parallel,
            )
            return dense
        # a layer of a model that is split over GPUs
        self.place(query.device)
        attend = partial(self._attend_here, backend, mask=mask, scale=scale)
        if parallel is not None:
            return self._attend_parallel(attend, query, key, value, mask)
        return attend(query, key, value, threshold=self.threshold)

    def _attend_here(
        self,
        backend: Backend,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: KeyMask,
        scale: float | None,
        threshold: Tensor | None,
    ) -> Tensor:
        if self.memory is None or mask.causal or not torch.compiler.is_compiling():
            return self._attend_sparse(backend, query, key, value, mask, scale, threshold, self.text_tokens)
        # What a layer remembers is no part of a graph, or each step would make another one. The number of text tokens
        # is handed on: what a graph writes to the layer is there only after it has run.
        output: Tensor = _attend_remembering(
            query, key, value, mask.kv_lens, threshold, self.number, scale=scale, text_tokens=self.text_tokens
        )
        return output

    def _attend_sparse(  # noqa: PLR0913 - a call and what is known of it
        self,
        backend: Backend,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: KeyMask,
        scale: float | None,
        threshold: Tensor | None,
        text_tokens: int,
    ) -> Tensor:
        tokens = query.shape[1]
        call = checked_call(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            mask,
            threshold=self.config.call_threshold if threshold is None else threshold,
            scale=scale,
            dense_tokens=(tokens - text_tokens, tokens) if text_tokens else self.state.exact,
            frame_tokens=self._frame_tokens(tokens - text_tokens) if self.config.anchors else None,
        )
        if self.on_call is not None:
            self.on_call(self.counts.name, call)
        reason = None
        with without_autocast(query.device):
            if self.memory is None or mask.causal:
                output, kept, valid = attend_sparse(backend, call, self.config)
            else:
                schedule = self.state.schedule
                assert schedule is not None
                (output, kept, valid), reason = self.memory.attend(
                    backend, call, self.config, schedule, self.state.moment
                )
        if reason is not None:
            self.counts.add_dense(reason)
            self.state.dense = reason
        else:
            self.counts.add_sparse(kept.sum(), valid * query.shape[2])
            self.state.skipped = True
        self.counts.note_not_finite(output)
        self.state.sparse = True
        return output.transpose(1, 2)

    def _frame_tokens(self, video: int) -> int | None:
        """Tokens of one latent frame of the video's; None where they are no grid of whole frames."""
        frames = self.state.frames
        return video // frames if frames and video % frames == 0 else None

    def _attend_parallel(
        self, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, mask: KeyMask
    ) -> Tensor:
        """Ulysses: each rank trades its share of the tokens for all tokens of its share of the heads, and back."""
        if self.text_tokens or mask.bounded:
            raise ValueError("context parallelism with text in a joint sequence is not supported by XAttnProcessor")
        if self.config.per_head:
            raise ValueError(
                "per_head compares all heads of a layer, and under context parallelism a rank has its share"
            )
        parallel = self._parallel_config
        threshold = self.threshold
        # one for each head, or with a ramp perhaps one for all of them
        if threshold is not None and threshold.ndim:
            threshold = threshold.chunk(sequence_ranks(parallel))[
                parallel.context_parallel_config._ulysses_mesh.get_local_rank()
            ]

        def forward_op(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return attend(query, key, value, threshold=threshold)

        output: Tensor = attention_dispatch._templated_context_parallel_attention(
            query, key, value, forward_op=forward_op, backward_op=None, _parallel_config=parallel
        )
        return output

    def _read_call(
        self, query: Tensor, key: Tensor, mask: Tensor | None, dropout_p: float
    ) -> tuple[str | None, Tensor | None]:
        """(why this call must be dense or None, its key lengths `[B]` or None)."""
        if query.shape[1] != key.shape[1]:
            return "cross_attention", None
        if self.text == "unknown" and self.text_tokens:
            return "joint_text", None
        if dropout_p:
            return "dropout", None
        if mask is None:
            return None, None
        lengths = key_lengths(mask, key.shape[1], self.trusted_mask, self.state)
        if lengths is None:
            return "mask", None
        return None, lengths if len(lengths) == len(query) else lengths.repeat(len(query))


# Layers by number, for compiled blocks, which find theirs by it.
_LAYERS: weakref.WeakValueDictionary[int, SparseSelfAttention] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count(1)


# A captured graph would replay the step that it was captured in. The first releases of torch have no such tag.
_NOT_CAPTURED: dict[str, Any] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)


@torch.library.custom_op("xattn_video::attend_remembering", mutates_args=(), **_NOT_CAPTURED)
def _attend_remembering(  # noqa: PLR0913 - torch takes no Call
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_lens: Tensor | None,
    threshold: Tensor | None,
    number: Tensor,
    *,
    scale: float | None,
    text_tokens: int,
) -> Tensor:
    """The sparse call of the layer with that number, for compiled blocks: `[B, S, H, D]`."""
    layer = _LAYERS[int(number)]
    tokens = query.shape[1]
    backend = find_backend(layer.config, query, key, value, q_len=tokens, kv_len=tokens)
    assert not isinstance(backend, str)
    mask = KeyMask(kv_lens=kv_lens)
    return layer._attend_sparse(backend, query, key, value, mask, scale, threshold, text_tokens).contiguous()


@_attend_remembering.register_fake
def _(query: Tensor, *_: Any, **__: Any) -> Tensor:
    return query.new_empty(query.shape)


def check_parallel(config: Any) -> None:
    """Raise `ValueError` for context parallelism that block-sparse attention cannot run under."""
    context = getattr(config, "context_parallel_config", None)
    if context is not None and context.ring_degree > 1:
        raise ValueError(
            "XAttnProcessor runs under Ulysses context parallelism (ulysses_degree), which gives a rank whole heads; "
            f"ring attention cuts the keys up, got ring_degree {context.ring_degree}"
        )


def sequence_ranks(config: Any) -> int:
    """Number of ranks that share the tokens of one sequence."""
    context = getattr(config, "context_parallel_config", None)
    return 1 if context is None else context.ulysses_degree


def sequence_group(config: Any) -> Any:
    """The process group of the ranks that share the tokens of one sequence; None where a rank has all of them."""
    context = getattr(config, "context_parallel_config", None)
    return None if context is None or context.ulysses_degree == 1 else context._ulysses_mesh.get_group()


def key_lengths(mask: Any, kv_len: int, trusted: bool, state: ForwardState) -> Tensor | None:
    """Number of valid keys, int32 `[1]` or `[B]`, of a bool key mask whose valid keys come first; None for others.

    A mask of a class that is not trusted to be like that is looked at, which reads one number from the device a
    forward. Inside a compiled block it cannot be looked at and counts as another kind.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return None
    rows = mask.shape[0]
    if mask.shape not in ((rows, kv_len), (rows, 1, 1, kv_len)):
        return None
    if not trusted and (torch.compiler.is_compiling() or not state.once("is_prefix", mask, _is_prefix)):
        return None
    return state.once("lengths", mask, lambda mask: mask.reshape(rows, kv_len).sum(-1, dtype=torch.int32))


def _is_prefix(mask: Tensor) -> bool:
    return bool((mask[..., 1:] <= mask[..., :-1]).all())


def wrap(original: Any, **settings: Any) -> SparseSelfAttention:
    """A `SparseSelfAttention` for this processor, callable with the processor's own signature."""
    return _wrapper_class(original.__class__)(original, **settings)


@functools.cache
def _wrapper_class(inner: type) -> type[SparseSelfAttention]:
    # Attention.forward drops every keyword that is not in the signature of processor.__call__
    names = list(inspect.signature(inner.__call__).parameters)
    text_index = names.index("encoder_hidden_states") - 2 if "encoder_hidden_states" in names else None

    @functools.wraps(inner.__call__)
    def call(self: SparseSelfAttention, attn: Any, *args: Any, **kwargs: Any) -> Any:
        if self.text != "cross" and text_index is not None:
            text = args[text_index] if len(args) > text_index else kwargs.get("encoder_hidden_states")
            # `attend` reads it in the same call: the dispatch between the two hands only `parallel_config` on. A copy
            # of `inner` for each call could carry the number there instead. It takes 4 us a call, and threads could
            # still not share a model, whose forwards are counted as steps of one generation.
            self.text_tokens = 0 if text is None else text.shape[1]
        return self.inner(attn, *args, **kwargs)

    members = {"__call__": call, "__doc__": SparseSelfAttention.__doc__}
    return type(f"XAttn{inner.__name__}", (SparseSelfAttention,), members)
