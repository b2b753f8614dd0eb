"""XAttention for video diffusion: training-free block-sparse attention (ICML 2025, arXiv 2503.16428).

    XAttnProcessor          makes a diffusers pipeline sparse: pipe.set_attn_processor(XAttnProcessor())
    XAttnConfig             its settings, and presets of them; HeadThresholds are those of a calibration file
    supported()             the models that are known, and what is sparse in each
    xattention()            one attention call over tensors; CallStats says what it did
    score_blocks(), select_blocks(), block_sparse_attention()
                            its three stages

For the language models of transformers see `help("xattn_video.integrations.transformers")`.

Importing this package imports nothing else. Each name is loaded when it is first asked for: the functions load torch,
and `XAttnProcessor` loads diffusers too. So the version and the settings can be read where torch is not installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .fronts import lazy
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .config import XAttnConfig as XAttnConfig
    from .integrations.diffusers import XAttnProcessor as XAttnProcessor
    from .model_table import supported as supported
    from .ops import block_sparse_attention as block_sparse_attention
    from .ops import score_blocks as score_blocks
    from .ops import select_blocks as select_blocks
    from .ops.xattention import CallStats as CallStats
    from .ops.xattention import xattention as xattention
    from .thresholds import HeadThresholds as HeadThresholds
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__,
        {
            "config": ["XAttnConfig"],
            "integrations.diffusers": ["XAttnProcessor"],
            "model_table": ["supported"],
            "ops": ["block_sparse_attention", "score_blocks", "select_blocks"],
            "ops.xattention": ["CallStats", "xattention"],
            "thresholds": ["HeadThresholds"],
        },
    )
    __all__ += ["__version__"]
