"""Tiny pipelines of the HunyuanVideo line: text and video share one attention sequence, video first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.tiny.common import Family, generators, normal, seeded, sharpen

from diffusers import (  # isort: skip
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from PIL import Image  # isort: skip
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel  # isort: skip

# 5 latent frames of 8 x 10 tokens: not a multiple of the 32 tokens of a block
SIZE = {"height": 128, "width": 160, "num_frames": 17}
VIDEO = 400
TEXT_LENGTH, TEXT_DIM, POOLED_DIM = 22, 24, 16
# valid tokens of the padded prompts, one a fixed item
VALID_TEXT, VALID_NEGATIVE = (13, 20), (7, 11)
GLYPH_LENGTH, GLYPH_DIM, VALID_GLYPH = 9, 20, (4, 0)
IMAGE_TOKENS, IMAGE_DIM = 16, 32


def prefix_mask(valid: Sequence[int], items: Sequence[int], length: int = TEXT_LENGTH) -> Tensor:
    """Padding mask `[items, length]`, int64: the first `valid[item]` tokens of each item are real."""
    counts = torch.tensor([valid[item] for item in items])
    return (torch.arange(length)[None] < counts[:, None]).long()


def sharpen_joint(transformer: nn.Module) -> nn.Module:
    """`sharpen` for the video's and the text's norms."""
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith(("norm_added_q.weight", "norm_added_k.weight")):
                parameter.mul_(2.0)
    return sharpen(transformer)


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=7.0)


def llama_prompts(items: Sequence[int], *, negative: bool) -> dict[str, Tensor]:
    prompts = {
        "prompt_embeds": normal((TEXT_LENGTH, TEXT_DIM), items, salt=1),
        "prompt_attention_mask": prefix_mask(VALID_TEXT, items),
        "pooled_prompt_embeds": normal((POOLED_DIM,), items, salt=2),
    }
    if negative:
        prompts |= {
            "negative_prompt_embeds": normal((TEXT_LENGTH, TEXT_DIM), items, salt=3),
            "negative_prompt_attention_mask": prefix_mask(VALID_NEGATIVE, items),
            "negative_pooled_prompt_embeds": normal((POOLED_DIM,), items, salt=4),
        }
    return prompts


TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "rope_axes_dim": (8, 12, 12),
    "text_embed_dim": TEXT_DIM,
    "pooled_projection_dim": POOLED_DIM,
}


def tiny_vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )


def build_hunyuan_video(seed: int) -> HunyuanVideoPipeline:
    with seeded(seed):
        transformer = HunyuanVideoTransformer3DModel(in_channels=4, out_channels=4, **TRANSFORMER)
    return HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=sharpen_joint(transformer).eval(),
        vae=None,
        scheduler=scheduler(),
        text_encoder_2=None,
        tokenizer_2=None,
    )


def call_hunyuan_video(pipe: HunyuanVideoPipeline, items: Sequence[int] = (0,), **overrides: Any) -> Tensor:
    arguments = {
        **SIZE,
        **llama_prompts(items, negative=True),
        "true_cfg_scale": 2.0,
        "guidance_scale": 1.0,
        "num_inference_steps": 8,
        "generator": generators(items),
        "output_type": "latent",
    }
    return pipe(**{**arguments, **overrides}).frames


def build_hunyuan_image(seed: int) -> HunyuanVideoImageToVideoPipeline:
    with seeded(seed):
        transformer = HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, image_condition_type="token_replace", **TRANSFORMER
        )
        vae = tiny_vae()
    return HunyuanVideoImageToVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=sharpen_joint(transformer).eval(),
        vae=vae.eval(),
        scheduler=scheduler(),
        text_encoder_2=None,
        tokenizer_2=None,
        image_processor=None,
    )


def picture(items: Sequence[int]) -> Tensor:
    """First frames `[items, 3, height, width]` in [0, 1]."""
    return normal((3, SIZE["height"], SIZE["width"]), items, salt=5).sigmoid()


def call_hunyuan_image(pipe: HunyuanVideoImageToVideoPipeline, items: Sequence[int] = (0,), **overrides: Any) -> Tensor:
    arguments = {
        **SIZE,
        **llama_prompts(items, negative=False),
        "image": picture(items),
        "true_cfg_scale": 1.0,
        "num_inference_steps": 8,
        "generator": generators(items),
        "output_type": "latent",
    }
    return pipe(**{**arguments, **overrides}).frames


def build_framepack(seed: int) -> HunyuanVideoFramepackPipeline:
    with seeded(seed):
        transformer = HunyuanVideoFramepackTransformer3DModel(
            in_channels=4,
            out_channels=4,
            has_image_proj=True,
            image_proj_dim=IMAGE_DIM,
            has_clean_x_embedder=True,
            **TRANSFORMER,
        )
        vae, encoder = tiny_vae(), siglip()
    return HunyuanVideoFramepackPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=sharpen_joint(transformer).eval(),
        vae=vae.eval(),
        scheduler=scheduler(),
        text_encoder_2=None,
        tokenizer_2=None,
        image_encoder=encoder.eval(),
        feature_extractor=siglip_processor(),
    )


def siglip() -> SiglipVisionModel:
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=IMAGE_DIM,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
    )


def siglip_processor() -> SiglipImageProcessor:
    return SiglipImageProcessor(size={"height": 32, "width": 32})


def call_framepack(pipe: HunyuanVideoFramepackPipeline, items: Sequence[int] = (0,), **overrides: Any) -> Tensor:
    arguments = {
        **SIZE,
        **llama_prompts(items, negative=False),
        # two sections of three latent frames
        "latent_window_size": 3,
        "image": picture(items),
        "num_inference_steps": 8,
        "generator": generators(items),
        "output_type": "latent",
    }
    # one tensor a section so far, the last one holds the whole video
    return pipe(**{**arguments, **overrides}).frames[-1]


# clean frames (the picture and the last generated one), history at half and at quarter size, the window
FRAMEPACK_VIDEO = 2 * 80 + 1 * 20 + 4 * 6 + 3 * 80

TRANSFORMER_15: dict[str, Any] = {
    "in_channels": 9,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": TEXT_DIM,
    "text_embed_2_dim": GLYPH_DIM,
    "image_embed_dim": IMAGE_DIM,
    "rope_axes_dim": (8, 12, 12),
    "target_size": 128,
}


def parts_15(seed: int) -> dict[str, Any]:
    with seeded(seed):
        transformer = HunyuanVideo15Transformer3DModel(**TRANSFORMER_15)
        # five stages: the model's 16-fold size reduction
        vae = AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1)
    return {
        "text_encoder": None,
        "tokenizer": None,
        "transformer": sharpen_joint(transformer).eval(),
        "vae": vae.eval(),
        "scheduler": scheduler(),
        "text_encoder_2": None,
        "tokenizer_2": None,
        "guider": ClassifierFreeGuidance(guidance_scale=3.0),
    }


def build_hunyuan_15(seed: int) -> HunyuanVideo15Pipeline:
    pipe = HunyuanVideo15Pipeline(**parts_15(seed))
    # the length of the released vision encoder, fixed in the pipeline: all of it is padding in text-to-video
    pipe.vision_num_semantic_tokens = IMAGE_TOKENS
    return pipe


def build_hunyuan_15_image(seed: int) -> HunyuanVideo15ImageToVideoPipeline:
    with seeded(seed + 1):
        encoder = siglip()
    return HunyuanVideo15ImageToVideoPipeline(
        **parts_15(seed), image_encoder=encoder.eval(), feature_extractor=siglip_processor()
    )


def prompts_15(items: Sequence[int]) -> dict[str, Tensor]:
    prompts = {}
    for prefix, salt, valid in (("", 1, VALID_TEXT), ("negative_", 3, VALID_NEGATIVE)):
        prompts |= {
            f"{prefix}prompt_embeds": normal((TEXT_LENGTH, TEXT_DIM), items, salt=salt),
            f"{prefix}prompt_embeds_mask": prefix_mask(valid, items),
            f"{prefix}prompt_embeds_2": normal((GLYPH_LENGTH, GLYPH_DIM), items, salt=salt + 1),
            f"{prefix}prompt_embeds_mask_2": prefix_mask(VALID_GLYPH, items, GLYPH_LENGTH),
        }
    return prompts


def call_hunyuan_15(pipe: HunyuanVideo15Pipeline, items: Sequence[int] = (0,), **overrides: Any) -> Tensor:
    arguments = {
        **prompts_15(items),
        "height": 128,
        "width": 160,
        "num_frames": 17,
        "num_inference_steps": 8,
        "generator": generators(items),
        "output_type": "latent",
    }
    return pipe(**{**arguments, **overrides}).frames


def call_hunyuan_15_image(
    pipe: HunyuanVideo15ImageToVideoPipeline, items: Sequence[int] = (0,), **overrides: Any
) -> Tensor:
    pixels = (normal((160, 160, 3), (0,), salt=5)[0].sigmoid() * 255).to(torch.uint8)
    arguments = {
        **prompts_15(items),
        # its sides and the model's target size (128) give the video's size: 8 x 8 tokens a frame
        "image": Image.fromarray(pixels.numpy()),
        "num_frames": 21,
        "num_inference_steps": 8,
        "generator": generators(items),
        "output_type": "latent",
    }
    return pipe(**{**arguments, **overrides}).frames


JOINT = "joint, after the video, padded"

HUNYUAN_FAMILIES: tuple[Family, ...] = (
    Family(
        name="hunyuan-video",
        build=build_hunyuan_video,
        call=call_hunyuan_video,
        text=JOINT,
        tokens=(VIDEO + TEXT_LENGTH,),
    ),
    Family(
        name="hunyuan-video-i2v",
        build=build_hunyuan_image,
        call=call_hunyuan_image,
        text=JOINT,
        tokens=(VIDEO + TEXT_LENGTH,),
        forwards_per_step=1,
        notes="the first frame's tokens are the picture's",
    ),
    Family(
        name="hunyuan-video-1.5",
        build=build_hunyuan_15,
        call=call_hunyuan_15,
        text="joint, after the video: picture, glyphs and prompt, valid ones first",
        tokens=(VIDEO + IMAGE_TOKENS + GLYPH_LENGTH + TEXT_LENGTH,),
    ),
    Family(
        name="hunyuan-video-1.5-i2v",
        build=build_hunyuan_15_image,
        call=call_hunyuan_15_image,
        text="joint, after the video: picture, glyphs and prompt, valid ones first",
        tokens=(6 * 64 + IMAGE_TOKENS + GLYPH_LENGTH + TEXT_LENGTH,),
    ),
    Family(
        name="framepack",
        build=build_framepack,
        call=call_framepack,
        text="joint, after history and video: picture, then prompt (cut to its length for one video)",
        tokens=(FRAMEPACK_VIDEO + IMAGE_TOKENS + VALID_TEXT[0],),
        forwards_per_step=1,
        generations=2,
        notes="a video in two sections, each a denoising of its own",
    ),
)
