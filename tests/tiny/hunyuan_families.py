"""Tiny pipelines of the HunyuanVideo line: text and video share one attention sequence, video first."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.tiny.common import Family, assemble, normal, prefix_mask, two_heads

from diffusers import (  # isort: skip
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    DiffusionPipeline,
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
# clean frames (the picture and the last generated one), history at half and at quarter size, the window
FRAMEPACK_VIDEO = 2 * 80 + 1 * 20 + 4 * 6 + 3 * 80


def tiny_transformer(cls: Any = HunyuanVideoTransformer3DModel, **changes: Any) -> Any:
    layers = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
    settings = {"in_channels": 4, "out_channels": 4, "mlp_ratio": 2.0, "rope_axes_dim": (8, 12, 12)}
    text = {"text_embed_dim": TEXT_DIM, "pooled_projection_dim": POOLED_DIM}
    return two_heads(cls, **{**layers, **settings, **text, **changes})


def siglip() -> SiglipVisionModel:
    sizes = {"hidden_size": IMAGE_DIM, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
    return SiglipVisionModel(SiglipVisionConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))


SCHEDULER = {"scheduler": partial(FlowMatchEulerDiscreteScheduler, shift=7.0)}
VAE = {
    "vae": partial(
        AutoencoderKLHunyuanVideo,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
}
SIGLIP = {
    "image_encoder": siglip,
    "feature_extractor": partial(SiglipImageProcessor, size={"height": 32, "width": 32}),
}
HUNYUAN_15 = {
    **SCHEDULER,
    "transformer": partial(
        two_heads,
        HunyuanVideo15Transformer3DModel,
        in_channels=9,
        out_channels=4,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        text_embed_2_dim=GLYPH_DIM,
        image_embed_dim=IMAGE_DIM,
        rope_axes_dim=(8, 12, 12),
        target_size=128,
    ),
    # five stages: the model's 16-fold size reduction
    "vae": partial(
        AutoencoderKLHunyuanVideo15, latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
    ),
    "guider": partial(ClassifierFreeGuidance, guidance_scale=3.0),
}


def hunyuan_15(**parts: Any) -> DiffusionPipeline:
    pipe = assemble(HunyuanVideo15Pipeline, parts)
    # the length of the released vision encoder, fixed in the pipeline: all of it is padding in text-to-video
    pipe.vision_num_semantic_tokens = IMAGE_TOKENS
    return pipe


def prompts(items: tuple[int, ...], prefix: str = "") -> dict[str, Tensor]:
    salt, valid = (3, VALID_NEGATIVE) if prefix else (1, VALID_TEXT)
    return {
        f"{prefix}prompt_embeds": normal((TEXT_LENGTH, TEXT_DIM), items, salt=salt),
        f"{prefix}prompt_attention_mask": prefix_mask(valid, items, TEXT_LENGTH),
        f"{prefix}pooled_prompt_embeds": normal((POOLED_DIM,), items, salt=salt + 1),
    }


def text_inputs(items: tuple[int, ...]) -> dict[str, Any]:
    guidance = {"true_cfg_scale": 2.0, "guidance_scale": 1.0}
    return {**SIZE, **prompts(items), **prompts(items, "negative_"), **guidance, "num_inference_steps": 8}


def image_inputs(items: tuple[int, ...]) -> dict[str, Any]:
    # first frames [items, 3, height, width] in [0, 1]
    pictures = normal((3, SIZE["height"], SIZE["width"]), items, salt=5).sigmoid()
    return {**SIZE, **prompts(items), "image": pictures, "num_inference_steps": 8}


def prompts_15(items: tuple[int, ...]) -> dict[str, Any]:
    inputs: dict[str, Any] = {"num_inference_steps": 8}
    for prefix, salt, valid in (("", 1, VALID_TEXT), ("negative_", 3, VALID_NEGATIVE)):
        inputs |= {
            f"{prefix}prompt_embeds": normal((TEXT_LENGTH, TEXT_DIM), items, salt=salt),
            f"{prefix}prompt_embeds_mask": prefix_mask(valid, items, TEXT_LENGTH),
            f"{prefix}prompt_embeds_2": normal((GLYPH_LENGTH, GLYPH_DIM), items, salt=salt + 1),
            f"{prefix}prompt_embeds_mask_2": prefix_mask(VALID_GLYPH, items, GLYPH_LENGTH),
        }
    return inputs


def image_inputs_15(items: tuple[int, ...]) -> dict[str, Any]:
    # its sides and the model's target size (128) give the video's size: 8 x 8 tokens a frame
    pixels = (normal((160, 160, 3), (0,), salt=5)[0].sigmoid() * 255).to(torch.uint8)
    return {**prompts_15(items), "image": Image.fromarray(pixels.numpy()), "num_frames": 21}


JOINT = "joint, after the video, padded"
JOINT_15 = "joint, after the video: picture, glyphs and prompt, valid ones first"

HUNYUAN_VIDEO = Family(
    "hunyuan-video",
    HunyuanVideoPipeline,
    {**SCHEDULER, "transformer": tiny_transformer},
    text_inputs,
    tokens=(VIDEO + TEXT_LENGTH,),
    text=JOINT,
)
HUNYUAN_VIDEO_15 = Family(
    "hunyuan-video-1.5",
    hunyuan_15,
    HUNYUAN_15,
    lambda items: {**SIZE, **prompts_15(items)},
    tokens=(VIDEO + IMAGE_TOKENS + GLYPH_LENGTH + TEXT_LENGTH,),
    text=JOINT_15,
)

HUNYUAN_FAMILIES: tuple[Family, ...] = (
    HUNYUAN_VIDEO,
    Family(
        "hunyuan-video-i2v",
        HunyuanVideoImageToVideoPipeline,
        {**SCHEDULER, **VAE, "transformer": partial(tiny_transformer, image_condition_type="token_replace")},
        lambda items: {**image_inputs(items), "true_cfg_scale": 1.0},
        tokens=(VIDEO + TEXT_LENGTH,),
        text=JOINT,
        forwards_per_step=1,
        notes="the first frame's tokens are the picture's",
    ),
    HUNYUAN_VIDEO_15,
    Family(
        "hunyuan-video-1.5-i2v",
        HunyuanVideo15ImageToVideoPipeline,
        {**HUNYUAN_15, **SIGLIP},
        image_inputs_15,
        tokens=(6 * 64 + IMAGE_TOKENS + GLYPH_LENGTH + TEXT_LENGTH,),
        text=JOINT_15,
    ),
    Family(
        "framepack",
        HunyuanVideoFramepackPipeline,
        {
            **SCHEDULER,
            **VAE,
            **SIGLIP,
            "transformer": partial(
                tiny_transformer,
                HunyuanVideoFramepackTransformer3DModel,
                has_image_proj=True,
                image_proj_dim=IMAGE_DIM,
                has_clean_x_embedder=True,
            ),
        },
        # two sections of three latent frames
        lambda items: {**image_inputs(items), "latent_window_size": 3},
        tokens=(FRAMEPACK_VIDEO + IMAGE_TOKENS + VALID_TEXT[0],),
        text="joint, after history and video: picture, then prompt (cut to its length for one video)",
        forwards_per_step=1,
        generations=2,
        # one tensor a section so far, the last one holds the whole video
        result=lambda output: output.frames[-1],
        notes="a video in two sections, each a denoising of its own",
    ),
)
