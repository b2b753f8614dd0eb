"""The video self-attention of a diffusers transformer: where the table of models knows it, and where it does not.

A class that is not listed gets the generic rule of `find_self_attention`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ...model_table import MODELS, REFUSED, ModelSpec
from .families.cosmos import CosmosSelfAttention
from .families.hunyuan15 import HunyuanVideo15JointAttention

# Processors whose attention call cannot be pointed elsewhere, or who build what must not be built:
# class name -> a small processor that does the same work and dispatches.
REPLACEMENTS: dict[str, Callable[[], Any]] = {
    "CosmosAttnProcessor2_0": CosmosSelfAttention,
    "HunyuanVideo15AttnProcessor2_0": HunyuanVideo15JointAttention,
}

_UNKNOWN = ModelSpec("", (), text="unknown", frames=None)


def spec_of(model: nn.Module) -> ModelSpec:
    """The entry of the model's class or of the class it derives from."""
    return next((MODELS[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in MODELS), _UNKNOWN)


def dispatches(processor: Any) -> bool:
    """Whether the processor's attention goes through diffusers' dispatch (or through a replacement that does)."""
    return hasattr(processor, "_attention_backend") or type(processor).__name__ in REPLACEMENTS


def find_self_attention(model: nn.Module) -> dict[str, Any]:
    """The model's video self-attention modules by path, in forward order.

    For a class that is not listed: every module whose processor dispatches its attention, that is no cross-attention
    by its flag or name, and that has one beside it in its block. Where no cross-attention takes the text in, it may be
    in the sequence itself, at places that nobody knows. Such modules stay as they are, dense. So do all modules of a
    class that makes sound too.

    Raises:
        ValueError: there is none, or one has a processor that does not dispatch or cannot be served; the message names
            the class.
    """
    refused = next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in REFUSED), None)
    if refused is not None:
        raise ValueError(f"{refused} cannot be made sparse by XAttnProcessor: {REFUSED[refused]}")
    attention: dict[str, Any] = {path: module for path, module in model.named_modules() if hasattr(module, "processor")}
    patterns = spec_of(model).self_attention
    if patterns:
        found = {
            path: module for pattern in patterns for path, module in attention.items() if fnmatchcase(path, pattern)
        }
    else:
        found = _video_alone(model, attention)
    name = type(model).__name__
    for path, module in found.items():
        if not dispatches(module.processor):
            raise ValueError(
                f"{name}: the processor of {path}, {type(module.processor).__name__}, does not use diffusers' "
                "attention dispatch, so XAttnProcessor cannot make it sparse"
            )
        if isinstance(module.processor, nn.Module):
            raise ValueError(f"{name}: the processor of {path} has weights of its own, which a wrapper would hide")
    if not found:
        raise ValueError(
            f"{name} has no self-attention that uses diffusers' attention dispatch, so XAttnProcessor cannot make it "
            f"sparse; models that it knows: {', '.join(sorted(MODELS))}"
        )
    return found


def _video_alone(model: nn.Module, attention: dict[str, Any]) -> dict[str, Any]:
    """The self-attention of a class that is not listed whose sequence is the video alone; see `find_self_attention`.

    Raises:
        ValueError: there is self-attention, but none of which that is known.
    """
    name = type(model).__name__
    found = {
        path: module
        for path, module in attention.items()
        if dispatches(module.processor) and not _is_cross_attention(path, module)
    }
    arguments = inspect.signature(type(model).forward).parameters
    sound = next((argument for argument in arguments if "audio" in argument), None)
    if found and sound is not None:
        raise ValueError(
            f"{name} is not known to XAttnProcessor and also makes or takes sound (its argument {sound}), which may be "
            f"in one sequence with the video; models that it knows: {', '.join(sorted(MODELS))}"
        )
    blocks = {_block(path) for path, module in attention.items() if _is_cross_attention(path, module)}
    alone = {path: module for path, module in found.items() if _block(path) in blocks}
    if found and not alone:
        raise ValueError(
            f"{name} is not known to XAttnProcessor, and its self-attention ({next(iter(found))}) may hold text: no "
            f"cross-attention beside it takes the text in; models that it knows: {', '.join(sorted(MODELS))}"
        )
    return alone


def _block(path: str) -> str:
    """The path of the module that holds the one at this path."""
    return path.rpartition(".")[0]


def _is_cross_attention(path: str, module: nn.Module) -> bool:
    name = path.rsplit(".", 1)[-1]
    return bool(getattr(module, "is_cross_attention", False)) or "cross" in name or name == "attn2"
