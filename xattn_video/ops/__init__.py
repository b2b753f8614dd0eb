"""The method: score blocks, select blocks, attend to the selected ones. Pure functions over tensors.

What other rooms use is named here. `xattention` is a module here; the function of that name is imported from
`xattn_video`, as users do.
"""

from .backends import Backend, auto_name, unavailable_reason
from .call_blocks import exact_type
from .checks import MAX_HEAD_DIM, checked_call, without_autocast
from .dense import dense_attention, find_backend
from .heads import HeadErrors, candidates, head_errors, spend
from .key_mask import KeyMask, num_blocks
from .remember import Memory, attend_choosing, attend_kept, packed_bytes, refresh
from .sparse import Call, Outcome, attend_sparse
from .stages import block_sparse_attention, score_blocks, select_blocks

__all__ = [
    "MAX_HEAD_DIM",
    "Backend",
    "Call",
    "HeadErrors",
    "KeyMask",
    "Memory",
    "Outcome",
    "attend_choosing",
    "attend_kept",
    "attend_sparse",
    "auto_name",
    "block_sparse_attention",
    "candidates",
    "checked_call",
    "dense_attention",
    "exact_type",
    "find_backend",
    "head_errors",
    "num_blocks",
    "packed_bytes",
    "refresh",
    "score_blocks",
    "select_blocks",
    "spend",
    "unavailable_reason",
    "without_autocast",
]
