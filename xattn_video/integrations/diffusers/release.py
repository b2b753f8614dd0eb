"""Check that diffusers is installed, in a release whose attention dispatch this package can extend."""

from __future__ import annotations

import inspect
from typing import Any

from ...extras import require

# What `register` and the processors use of diffusers' module `attention_dispatch`, which has no promise to stay.
_NAMES = (
    "AttentionBackendName.NATIVE",
    "AttentionBackendName.__members__",
    "_AttentionBackendRegistry.register",
    "_AttentionBackendRegistry._backends",
    "dispatch_attention_fn",
)
_ARGUMENTS = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "backend", "parallel_config")


class UnsupportedDiffusers(ImportError):
    """The installed diffusers keeps its attention backends in a way that this package does not know."""


def check_release() -> None:
    """Call this before anything else of diffusers is imported, and after torchvision is repaired.

    Raises:
        MissingPackage: diffusers is not installed.
        UnsupportedDiffusers: a name of its attention dispatch is gone; the message names it and the release.
    """
    require("XAttnProcessor", "diffusers")
    try:
        from diffusers.models import attention_dispatch
    except ImportError as error:
        raise unsupported(str(error)) from error
    for name in _NAMES:
        holder: Any = attention_dispatch
        for part in name.split("."):
            holder = getattr(holder, part, None)
        if holder is None:
            raise unsupported(f"its attention dispatch has no {name}")
    parameters = inspect.signature(attention_dispatch.dispatch_attention_fn).parameters
    for argument in _ARGUMENTS:
        if argument not in parameters:
            raise unsupported(f"dispatch_attention_fn takes no {argument}")


def unsupported(what: str) -> UnsupportedDiffusers:
    """The error for a release of diffusers that does not fit: `what` says what is missing in it."""
    import diffusers

    return UnsupportedDiffusers(
        f"XAttnProcessor cannot attach to diffusers {diffusers.__version__}: {what}; "
        "diffusers 0.38 to 0.42 are known to work: pip install 'diffusers>=0.38,<0.43'"
    )
