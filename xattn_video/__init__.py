"""XAttention for video diffusion: training-free block-sparse attention (ICML 2025, arXiv 2503.16428).

Importing this package imports torch alone. `XAttnProcessor` loads diffusers when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import XAttnConfig
from .ops.scoring import score_blocks
from .ops.selection import select_blocks
from .ops.sparse import block_sparse_attention
from .ops.xattention import CallStats, xattention
from .version import __version__

if TYPE_CHECKING:
    from .integrations.diffusers import XAttnProcessor

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


def __getattr__(name: str) -> Any:
    if name == "XAttnProcessor":
        from .integrations.diffusers import XAttnProcessor

        return XAttnProcessor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
