"""The demo's video-understanding model: a small `Qwen2VLForConditionalGeneration` with its processor.

It watches stories of the shapes world and answers questions about them. A token stands for 16 x 16 pixels of two
frames, so a scene that is watched at WATCHER_FPS frames a second has 256 of them.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import xattn_video.integrations.transformers  # noqa: F401  (repairs torchvision before transformers needs it)
from xattn_video_pipelines.common.demo_data import WATCHER_FPS
from xattn_video_pipelines.common.files import edit_json, whole_folder
from xattn_video_pipelines.demo import stories, world

# isort: split
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

# It is shown every fourth frame of the world's.
EVERY = round(world.FPS / WATCHER_FPS)

_PATCH, _MERGE = 8, 2
_OLD = transformers.__version__.startswith("4.")
# transformers 4 calls it otherwise.
_ROTARY = "rope_scaling" if _OLD else "rope_parameters"
_SPECIAL = (
    "<pad>",
    "</s>",
    "<unk>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|video_pad|>",
    "<|image_pad|>",
    "<answer>",
)
# Those of them that a tokenizer has no name for.
_MORE = _SPECIAL[3:]
_IDS = {word: number for number, word in enumerate(_SPECIAL)}
_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}{% if part.type == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)


def build_watcher(seed: int = 0) -> Any:
    """An untrained model in float32; torch's global generator is left as it was."""
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": len(vocabulary()),
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            _ROTARY: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 8, 8]},
            "tie_word_embeddings": True,
            "pad_token_id": _IDS["<pad>"],
            "bos_token_id": None,
            "eos_token_id": _IDS["</s>"],
            # One by the square root of the width: with the usual 0.02 so small a model starts out all but linear.
            "initializer_range": 0.06,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 128,
            "hidden_size": 256,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": _PATCH,
            "spatial_merge_size": _MERGE,
            "temporal_patch_size": 2,
            "initializer_range": 0.08,
        },
        image_token_id=_IDS["<|image_pad|>"],
        video_token_id=_IDS["<|video_pad|>"],
        vision_start_token_id=_IDS["<|vision_start|>"],
        vision_end_token_id=_IDS["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.Qwen2VLForConditionalGeneration(config)


def build_processor() -> Any:
    """What turns a question and the frames of a video into the model's inputs."""
    pixels = {"shortest_edge": 4 * (_PATCH * _MERGE) ** 2, "longest_edge": 1 << 24}
    sizes = {"patch_size": _PATCH, "merge_size": _MERGE, "temporal_patch_size": 2, "size": pixels}
    return transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(**sizes),
        build_tokenizer(),
        # Sizes are the video's own: no share of a budget for all frames.
        transformers.Qwen2VLVideoProcessor(**sizes, cap_pixels_per_frame=False),
        chat_template=_TEMPLATE,
    )


def build_tokenizer() -> Any:
    """A tokenizer with one token a word, case ignored; unknown words are `<unk>`."""
    ids = {word: number for number, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _tokenizer_class()(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(_MORE),
    )


def _tokenizer_class() -> Any:
    """What the processor takes: transformers 4 insists on the class of Qwen2's own tokenizer."""
    return transformers.Qwen2TokenizerFast if _OLD else transformers.PreTrainedTokenizerFast


def vocabulary() -> list[str]:
    """Every token in the order of its id: special ones, then the words of questions and answers."""
    return [*_SPECIAL, *stories.words()]


def save_watcher(model: Any, folder: Path) -> None:
    """Write a bfloat16 copy of the model, and its processor, for `from_pretrained`; whole or not at all."""
    with whole_folder(folder) as partial:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(partial)
        build_processor().save_pretrained(partial)
        # In words that transformers 4 knows, and 5 too.
        both = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": list(_MORE)}
        edit_json(partial / "tokenizer_config.json", **both, extra_special_tokens=None)
        text = json.loads((partial / "config.json").read_text(encoding="utf-8"))["text_config"]
        if (rotary := text.pop("rope_parameters", None)) is not None:
            text |= {"rope_theta": rotary.pop("rope_theta"), "rope_scaling": rotary}
            edit_json(partial / "config.json", text_config=text)
