"""Sparse prefill for the language models of transformers, text and video.

    from xattn_video.integrations.transformers import stop_xattention, use_xattention    # registers "xattention"
    model = Qwen2VLForConditionalGeneration.from_pretrained(name, attn_implementation={"text_config": "xattention"})

    stats = use_xattention(model, stride=16, threshold=0.9)              # the same, with settings and statistics
    model.generate(**inputs); stats.summary()["sparse_density"]
    stop_xattention(model)                                               # as it was

Prefill is sparse: prompts in one piece or in chunks, padded on either side, with any cache. Decoding is dense, and so
is every call that `AttentionStats.summary()["dense_calls"]` names. Dense calls are transformers' own SDPA. With
transformers 4 a static cache is dense too (`mask`): it then asks for whole masks and reads positions off them.
"""

from ...extras import require
from ...fronts import shown_names
from ..torchvision_ops import repair_torchvision

require("xattn_video.integrations.transformers", "transformers")
# A torchvision built for another torch breaks the import of transformers, so this comes first.
repair_torchvision()

from .attention import (  # noqa: E402
    attention_stats,
    causal_layers,
    stop_xattention,
    use_xattention,
    xattention_forward,
)

__all__ = ["attention_stats", "causal_layers", "stop_xattention", "use_xattention", "xattention_forward"]

__dir__ = shown_names(__name__)
