"""Register `xattention` with diffusers' attention dispatch.

The backend gets its layer through the one argument that processors hand on untouched, `parallel_config`: the
inner processor of a wrapped module holds its wrapper there. So a call carries all it needs, without any state
shared by threads or pipelines.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from .layers import SparseSelfAttention
from .release import unsupported

logger = logging.getLogger(__name__)

NAME = "xattention"


def xattention_backend(  # noqa: PLR0913 - diffusers' signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """diffusers' calling convention: query, key, value and output are `[B, S, H, D]`.

    Called without a wrapper (`set_attention_backend("xattention")` on a model that has none) it is dense.
    """
    arguments: dict[str, Any] = {
        "attn_mask": attn_mask,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }
    if isinstance(_parallel_config, SparseSelfAttention):
        return _parallel_config.attend(query, key, value, **arguments)
    if not torch.compiler.is_compiling():
        _warn_once()
    output: Tensor = dispatch_attention_fn(
        query, key, value, **arguments, backend=AttentionBackendName.NATIVE, parallel_config=_parallel_config
    )
    return output


@functools.cache
def _warn_once() -> None:
    logger.warning(
        "the attention backend %r is dense in a call that no XAttnProcessor is attached to: "
        "use pipe.set_attn_processor(XAttnProcessor(...))",
        NAME,
    )


def register() -> AttentionBackendName:
    """Add `xattention` to diffusers' backends, once, and return its member.

    diffusers has no call for this: its backends are members of an enum, which Python does not let grow. A member
    is injected, as other extensions of diffusers do.

    Raises:
        UnsupportedDiffusers: this release of diffusers does not let a member be added.
    """
    existing = AttentionBackendName.__members__.get(NAME.upper())
    if existing is not None:
        return existing
    try:
        member = str.__new__(AttentionBackendName, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        setattr(AttentionBackendName, NAME.upper(), member)
        AttentionBackendName._member_map_[NAME.upper()] = member
        AttentionBackendName._member_names_.append(NAME.upper())
        AttentionBackendName._value2member_map_[NAME] = member
        attention_dispatch._AttentionBackendRegistry.register(member)(xattention_backend)
    except (AttributeError, TypeError) as error:
        raise unsupported(f"it does not take the attention backend {NAME!r} ({error})") from error
    return member
