"""The attention function that transformers calls, and how a model is given it and loses it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ...config import XAttnConfig
from ...ops import MAX_HEAD_DIM, Call, KeyMask, attend_sparse, checked_call, find_backend, without_autocast
from ...stats import AttentionStats, LayerCounts
from ...thresholds import HeadThresholds
from ..dense_layers import dense_layers
from .masks import dense_mask, is_range, range_mask, without_plain

NAME = "xattention"
# What `use_xattention` sets. Another model that was built from the same configuration object then has this name too,
# but nobody asked for it there: modules without settings of their own are dense under it.
_SET = "xattention_set"
_ATTRIBUTE = "_xattn_video"

_UNSUITABLE = (
    "{} has no causal text attention that can be set; "
    "xattention is for decoder models of transformers such as Qwen2-VL, Qwen3 or Llama"
)

LayerThresholds = Mapping[int, "float | Sequence[float]"]
OnCall = Callable[[str, Call], None]


@dataclass
class _Layer:
    """What one attention module was set to."""

    config: XAttnConfig
    dense: bool = False
    counts: LayerCounts | None = None
    on_call: OnCall | None = None


@dataclass
class _Attached:
    """What a model was set to, and what its text part did before."""

    stats: AttentionStats
    before: str


# Of a model that was only loaded with attn_implementation="xattention".
_DEFAULT = _Layer(XAttnConfig.preset("language"))


def use_xattention(
    model: PreTrainedModel,
    config: XAttnConfig | None = None,
    *,
    layer_thresholds: LayerThresholds | None = None,
    on_call: OnCall | None = None,
    **overrides: Any,
) -> AttentionStats:
    """Make the prefill of a model's text part sparse; a second call replaces the settings of the first.

    Args:
        model: a causal model of transformers, with or without a vision tower, which stays as it is.
        config: settings; None is the preset `qwen2-vl` for a model with a vision tower and `language` for others.
            What is about steps of a video has no effect: `warmup_steps`, `warmup`, `last_steps`, `threshold_ramp`,
            `keep_masks`, `per_head` and the residual.
        layer_thresholds: thresholds of single layers by index (negative ones count from the end): a number, or one
            for each query head. They come before those of a file in `config.threshold`.
        on_call: `on_call(layer, call)` sees each sparse call before it is computed: the layer's module path, and the
            `xattn_video.ops.Call` with query, key and value `[B, H, S, D]`. `xattn-video calibrate` measures with it.
        **overrides: settings that replace those of config.

    Returns:
        The model's statistics; all counts are under step 0. `sparse_density` is that of prefill, `density` counts
        every decoded token as a dense call.

    Raises:
        ValueError: the model has no causal self-attention that can be set, one with what the kernels do not know
            (attention sinks, a soft cap on the logits, values of another size than keys), or a setting does not fit it.
        TypeError: an override that is no setting.
    """
    modules = causal_layers(model)
    text = model.config.get_text_config(decoder=True)
    for path, module in modules.items():
        if why := _unknown_to_kernels(module):
            raise ValueError(f"{path} of {type(model).__name__} has {why}, which xattention does not know")
    if config is None:
        config = XAttnConfig.preset("language" if text is model.config else "qwen2-vl")
    config = config.replace(**overrides)
    if isinstance(config.threshold, HeadThresholds):
        config.threshold.check_model(type(model).__name__, {path: _heads(module) for path, module in modules.items()})
    layers = _layers(modules, config, layer_thresholds or {})
    stats = AttentionStats()
    counts = stats.add_model(list(modules))
    before = attached.before if (attached := getattr(model, _ATTRIBUTE, None)) else text._attn_implementation
    _set_text_attention(model, _SET)
    if any(getattr(module.config, "_attn_implementation", None) != _SET for module in modules.values()):
        _set_text_attention(model, before)
        raise ValueError(_UNSUITABLE.format(type(model).__name__))
    for module, layer, counted in zip(modules.values(), layers, counts.layers, strict=True):
        layer.counts, layer.on_call = counted, on_call
        setattr(module, _ATTRIBUTE, layer)
    setattr(model, _ATTRIBUTE, _Attached(stats, before))
    return stats


def stop_xattention(model: PreTrainedModel) -> None:
    """Give the model's text part the attention back that it had; does nothing where `use_xattention` was not used."""
    attached = model.__dict__.pop(_ATTRIBUTE, None)
    if attached is not None:
        _set_text_attention(model, attached.before)
        for module in causal_layers(model).values():
            module.__dict__.pop(_ATTRIBUTE, None)


def attention_stats(model: PreTrainedModel) -> AttentionStats | None:
    """The statistics of a model that `use_xattention` was used on, for instance of a deep copy; else None."""
    attached = getattr(model, _ATTRIBUTE, None)
    return None if attached is None else attached.stats


def causal_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The model's causal self-attention modules by their path, in the order of their layers.

    Raises:
        ValueError: it has none.
    """
    modules = {
        path: module
        for path, module in model.named_modules()
        if getattr(module, "is_causal", False)
        and isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(module, "config")
    }
    if not modules:
        raise ValueError(_UNSUITABLE.format(type(model).__name__))
    return dict(sorted(modules.items(), key=lambda item: item[1].layer_idx))


def xattention_forward(  # noqa: PLR0913 - transformers' signature
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function behind the name `xattention`, as transformers' attention interface asks for it.

    Args:
        query: `[B, Hq, Sq, D]`.
        key, value: `[B, Hkv, Sk, D]`, with the cache.
        attention_mask: what `range_mask` gave.

    Returns:
        output `[B, Sq, Hq, D]`, and None for the attention weights.

    Raises:
        ValueError: the model has attention sinks, a soft cap on its logits or an index of keys of its own, which the
            kernels do not know.
    """
    for name in ("softcap", "s_aux", "sinks", "indices", "block_indices"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} needs {name}, which xattention does not have; use eager attention"
            )
    attention_mask = without_plain(attention_mask, query.shape[2])
    layer = getattr(module, _ATTRIBUTE, _DEFAULT)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    keys = _visible_keys(query, key, attention_mask)
    seen_key, seen_value = key[:, :, :keys], value[:, :, :keys]
    sizes = {"q_len": query.shape[2], "kv_len": seen_key.shape[2]}
    backend = _reason(layer, query, attention_mask, causal, dropout, kwargs) or find_backend(
        layer.config, query, seen_key, seen_value, **sizes, causal=True, training=module.training
    )
    if layer.counts is not None:
        layer.counts.place(query.device)
    if not isinstance(backend, str):
        start = attention_mask[:, 0, 0, 0] if attention_mask is not None else None
        mask = KeyMask(causal=True, kv_start=start)
        call = checked_call(query, seen_key, seen_value, mask, threshold=layer.config.call_threshold, scale=scaling)
        if layer.on_call is not None and layer.counts is not None:
            layer.on_call(layer.counts.name, call)
        with without_autocast(query.device):
            output, kept, valid = attend_sparse(backend, call, layer.config)
        if layer.counts is not None:
            layer.counts.add_sparse(kept.sum(), valid * query.shape[1])
        return output.transpose(1, 2).contiguous(), None
    if layer.counts is not None:
        layer.counts.add_dense(backend)
    return _dense(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def _dense(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' SDPA, with the masks of `range_mask`."""
    if is_range(attention_mask):
        attention_mask = dense_mask(attention_mask, query.shape[2], key.shape[2])
    dense: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return dense


def _unknown_to_kernels(module: nn.Module) -> str | None:
    """What the attention of a module has that the kernels do not compute, or None."""
    config: Any = module.config
    if any(getattr(module, name, None) is not None for name in ("sinks", "sink_proj")):
        return "attention sinks"
    # its choice of keys reaches eager and SDPA attention as a mask, and no other
    if getattr(module, "indexer", None) is not None:
        return "an index of its own that chooses keys"
    if (getattr(module, "head_dim", None) or 0) > MAX_HEAD_DIM:
        return f"heads of {module.head_dim} dimensions (above {MAX_HEAD_DIM})"
    if getattr(module, "attn_logit_softcapping", getattr(config, "attn_logit_softcapping", None)) is not None:
        return "a soft cap on its logits"
    value_dim = getattr(module, "v_head_dim", None)
    if value_dim is not None and value_dim != getattr(module, "qk_head_dim", value_dim):
        return f"values of {value_dim} dimensions and keys of {module.qk_head_dim}"
    return None


def _visible_keys(query: Tensor, key: Tensor, attention_mask: Tensor | None) -> int:
    """The keys that are filled: a static cache has more."""
    if attention_mask is None:
        return query.shape[2] if query.shape[2] > 1 else key.shape[2]
    return attention_mask.shape[-1] if is_range(attention_mask) else key.shape[2]


def _reason(
    layer: _Layer,
    query: Tensor,
    attention_mask: Tensor | None,
    causal: bool,
    dropout: float,
    kwargs: Mapping[str, Any],
) -> str | None:
    """Why a call is dense by what the model asks for; what `find_backend` sees comes after it."""
    if query.shape[2] == 1:
        return "decode"
    if not causal:
        return "not_causal"
    if attention_mask is not None and not is_range(attention_mask):
        return "mask" if kwargs.get("sliding_window") is None else "sliding_window"
    if kwargs.get("position_bias") is not None or kwargs.get("cache") is not None:
        return "mask"
    if dropout > 0:
        return "dropout"
    return "dense_layer" if layer.dense else None


def _layers(modules: Mapping[str, nn.Module], config: XAttnConfig, thresholds: LayerThresholds) -> list[_Layer]:
    """The settings of each module, checked against its number of heads."""
    for index in thresholds:
        if not isinstance(index, int) or isinstance(index, bool):
            raise ValueError(f"layer_thresholds must be by the number of a layer, got {index!r}")
        if not -len(modules) <= index < len(modules):
            raise ValueError(f"layer_thresholds must be of layers below {len(modules)}, got {index}")
    dense = dense_layers(list(modules), config.dense_layers)
    layers = []
    for index, (path, module) in enumerate(modules.items()):
        threshold = thresholds.get(index, thresholds.get(index - len(modules)))
        if threshold is None:
            threshold = config.layer_threshold(path)
        own = config.replace(threshold=tuple(threshold) if isinstance(threshold, Sequence) else threshold)
        heads = _heads(module)
        if isinstance(own.threshold, tuple) and heads is not None and len(own.threshold) != heads:
            raise ValueError(
                f"threshold of {path} must have one value for each of {heads} heads, got {len(own.threshold)}"
            )
        layers.append(_Layer(own, dense=index in dense))
    return layers


def _heads(module: nn.Module) -> int | None:
    """The number of query heads of an attention module, where its configuration tells it."""
    return getattr(getattr(module, "config", None), "num_attention_heads", None)


def _set_text_attention(model: PreTrainedModel, name: str) -> None:
    """Set the attention of the text part alone."""
    text = model.config.get_text_config(decoder=True)
    part = next((key for key in model.config.sub_configs if getattr(model.config, key, None) is text), None)
    if part is None and text is not model.config:
        # Its name would go to all the towers beside the text.
        inner = [
            path
            for path, module in model.named_modules()
            if path and isinstance(module, PreTrainedModel) and text in vars(module.config).values()
        ]
        raise ValueError(
            f"{type(model).__name__} has its text model deeper inside; use xattention on that part"
            + (f", model.{inner[0]}" if inner else "")
        )
    model.set_attn_implementation(name if part is None else {part: name})


def _forward_if_set(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`xattention_forward`, dense for a module that `use_xattention` was not used on."""
    if hasattr(module, _ATTRIBUTE):
        return xattention_forward(module, query, key, value, attention_mask, **kwargs)
    return _dense(module, query, key, value, attention_mask, **kwargs)


for _name, _function in ((NAME, xattention_forward), (_SET, _forward_if_set)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, range_mask)
