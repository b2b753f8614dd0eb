"""XAttention for video diffusion: training-free block-sparse attention (ICML 2025, arXiv 2503.16428).

Importing this package imports nothing else. Each name is loaded when it is first asked for: the functions load torch,
and `XAttnProcessor` loads diffusers too. So the version and the settings can be read where torch is not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .config import XAttnConfig
    from .integrations.diffusers import XAttnProcessor
    from .ops.stages import block_sparse_attention, score_blocks, select_blocks
    from .ops.xattention import CallStats, xattention

__all__ = [
    "CallStats",
    "XAttnConfig",
    "XAttnProcessor",
    "__version__",
    "block_sparse_attention",
    "score_blocks",
    "select_blocks",
    "xattention",
]

_MODULES = {
    "CallStats": ".ops.xattention",
    "XAttnConfig": ".config",
    "XAttnProcessor": ".integrations.diffusers",
    "block_sparse_attention": ".ops.stages",
    "score_blocks": ".ops.stages",
    "select_blocks": ".ops.stages",
    "xattention": ".ops.xattention",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name], __name__), name)
    # Kept, so that the next access is an ordinary one.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
