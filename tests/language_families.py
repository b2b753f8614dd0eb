"""Tiny real models of transformers, one for each family that the integration is tested on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

import xattn_video.integrations.transformers  # noqa: F401  (repairs torchvision before transformers needs it)

import transformers  # isort: skip

VOCABULARY = 96
LAYERS = 2
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Rotary sections of the 6 pairs of a head of 12.
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
# transformers 4 calls it otherwise.
ROTARY = {"rope_scaling" if transformers.__version__.startswith("4.") else "rope_parameters": _SECTIONS}
SPECIAL = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
CHAT = (
    "{% for message in messages %}{% for part in message.content %}{% if part.type == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %} {{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)


def _qwen_vl(name: str, vision: dict[str, Any], **changes: Any) -> Callable[[], Any]:
    def build() -> Any:
        config = getattr(transformers, f"{name}Config")(
            text_config={**TEXT, **ROTARY, **changes}, vision_config={"depth": 1, "patch_size": 4, **vision}, **SPECIAL
        )
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)

    return build


# The vision part that Qwen2.5-VL and Qwen3-VL have in common; Qwen2-VL names its sizes otherwise.
_VISION = {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 48, "num_heads": 2}


def _llava_onevision() -> Any:
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8,
    }  # fmt: skip
    config = transformers.LlavaOnevisionConfig(
        text_config=transformers.Qwen2Config(**TEXT),
        vision_config=transformers.SiglipVisionConfig(**vision),
        image_token_index=90,
        video_token_index=91,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def _internvl() -> Any:
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": [16, 16], "patch_size": [8, 8],
    }  # fmt: skip
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**TEXT), vision_config=vision, image_token_id=90
    )
    return transformers.InternVLForConditionalGeneration(config)


def _plain(name: str, **changes: Any) -> Callable[[], Any]:
    def build() -> Any:
        config = getattr(transformers, f"{name}Config")(**{**TEXT, **changes})
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return build


BUILDERS: dict[str, Callable[[], Any]] = {
    "qwen2-vl": _qwen_vl(
        "Qwen2VL",
        {"embed_dim": 32, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2},
    ),
    "qwen2.5-vl": _qwen_vl(
        "Qwen2_5_VL",
        {**_VISION, "window_size": 16, "fullatt_block_indexes": [0]},
    ),
    "qwen3-vl": _qwen_vl(
        "Qwen3VL",
        {**_VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        head_dim=12,
    ),
    "llava-onevision": _llava_onevision,
    "internvl": _internvl,
    "llama": _plain("Llama"),
    "mistral": _plain("Mistral", sliding_window=None),
    "phi-3": _plain("Phi3"),
    "qwen2.5": _plain("Qwen2"),
    "qwen3": _plain("Qwen3", head_dim=12),
    "gemma": _plain("Gemma", head_dim=12),
}


def build(family: str) -> Any:
    """A model of the family with seeded weights, large enough that its attention is far from uniform."""
    torch.manual_seed(0)
    model = BUILDERS[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "qkv_proj.weight")):
                parameter.mul_(8)
    return model


def save_language_model(folder: Path, family: str = "llama") -> Path:
    """A model of the family with a tokenizer whose tokens are the words w4 to w95; any other word is unknown."""
    build(family).save_pretrained(folder)
    _tokenizer({}).save_pretrained(folder)
    return folder


def save_video_model(folder: Path) -> Path:
    """A Qwen2-VL with its processor, whose merged patches are 8 x 8 pixels of two frames."""
    build("qwen2-vl").save_pretrained(folder)
    patches = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 64 * 64}}
    processor = transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(**patches),
        _tokenizer({"<|image_pad|>": 90, "<|video_pad|>": 91, "<|vision_start|>": 92, "<|vision_end|>": 93}),
        transformers.Qwen2VLVideoProcessor(**patches),
        chat_template=CHAT,
    )
    processor.save_pretrained(folder)
    return folder


def _tokenizer(special: dict[str, int]) -> Any:
    words = {f"w{index}": index for index in range(4, VOCABULARY) if index not in special.values()}
    words |= {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **special}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # transformers 4 insists on the class of Qwen2's own tokenizer.
    old = transformers.__version__.startswith("4.")
    return (transformers.Qwen2TokenizerFast if old else transformers.PreTrainedTokenizerFast)(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=list(special),
    )  # fmt: skip


def prompt(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Random tokens, none of them special, int64 `[batch, tokens]`."""
    return torch.randint(3, 89, (batch, tokens), generator=torch.Generator().manual_seed(seed))
