"""Sparse attention for diffusers. Importing this package gives diffusers' classes `set_attn_processor`.

pipe.set_attn_processor(XAttnProcessor(stride=8, threshold=0.9, warmup_steps=5))   # all its transformers
pipe.transformer.set_attn_processor(XAttnProcessor(XAttnConfig(...)))              # one transformer
pipe.set_attn_processor(None)                                                      # as it was
"""

from ...fronts import shown_names
from ..torchvision_ops import repair_torchvision
from .release import check_release

# A torchvision built for another torch breaks the import of diffusers, so this comes first.
repair_torchvision()
check_release()

from .nothing_sparse import NothingSparse  # noqa: E402
from .processor import XAttnProcessor, attached_processor, install, pipeline_transformers  # noqa: E402
from .schedule import Schedule  # noqa: E402

install()

__all__ = [
    "NothingSparse",
    "Schedule",
    "XAttnProcessor",
    "attached_processor",
    "install",
    "pipeline_transformers",
]

__dir__ = shown_names(__name__)
