"""Tiny pipelines of Wan 2.1 and 2.2, VACE and Animate; text is in cross-attention everywhere."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from tests.tiny.common import Family, generators, normal, seeded, sharpen

# after tests.tiny.common, which mends a torchvision that does not fit this torch
from diffusers import (  # isort: skip
    AutoencoderKLWan,
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel  # isort: skip

LAYERS = 2
TEXT_DIM = 16
IMAGE_DIM = 16
# 5 latent frames of 7 x 9 patches: 315 tokens, which is 9 blocks of 32 and a tail of 27
HEIGHT, WIDTH, FRAMES = 112, 144, 17
TOKENS = 5 * 7 * 9


def tiny_transformer(cls: Any = WanTransformer3DModel, **changes: Any) -> Any:
    settings = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": LAYERS,
    }
    return sharpen(cls(**{**settings, **changes}).eval())


def tiny_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(base_dim=2, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def tiny_vae_22() -> AutoencoderKLWan:
    """The Wan 2.2 5B layout: 48 channels, 16 pixels a side, residual, patched."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=48,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        patch_size=2,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
        scale_factor_spatial=16,
    ).eval()


def flow_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def text_inputs(items: tuple[int, ...], text_tokens: int = 80) -> dict[str, Any]:
    return {
        "prompt_embeds": normal((text_tokens, TEXT_DIM), items),
        "negative_prompt_embeds": normal((text_tokens, TEXT_DIM), items, salt=1),
        "generator": generators(items),
        "output_type": "latent",
    }


def size(scale: int = 1) -> dict[str, int]:
    return {"height": scale * HEIGHT, "width": scale * WIDTH, "num_frames": FRAMES}


def frame(height: int, width: int, shift: int = 0) -> Image.Image:
    """A gradient with a moving square: cheap, and different in every frame."""
    rows, columns = np.mgrid[0:height, 0:width]
    square = (abs(rows - height // 2) < height // 4) & (abs(columns - width // 3 - 4 * shift) < width // 6)
    channels = [rows * 255 // height, columns * 255 // width, square * 255]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def image_encoder() -> dict[str, Any]:
    """CLIP's image encoder and its processor: 16 patches and a class token."""
    side = {"height": 32, "width": 32}
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    return {
        "image_encoder": CLIPVisionModel(config).eval(),
        "image_processor": CLIPImageProcessor(size=side, crop_size=side),
    }


# ---- Wan 2.1 and 2.2, text to video


def build_t2v(seed: int, **changes: Any) -> WanPipeline:
    with seeded(seed):
        parts = {
            "transformer": tiny_transformer(),
            "vae": tiny_vae(),
            "scheduler": flow_scheduler(),
            "text_encoder": None,
            "tokenizer": None,
        }
        return WanPipeline(**{**parts, **{name: make() for name, make in changes.items()}})


def call_t2v(pipe: DiffusionPipeline, items: tuple[int, ...] = (0,), scale: int = 1, **overrides: Any) -> Tensor:
    inputs = {**text_inputs(items), **size(scale), "num_inference_steps": 8, "guidance_scale": 4.0}
    return pipe(**{**inputs, **overrides}).frames


build_t2v_a14b = partial(build_t2v, transformer_2=tiny_transformer, boundary_ratio=lambda: 0.875)

build_t2v_5b = partial(
    build_t2v,
    transformer=partial(tiny_transformer, in_channels=48, out_channels=48),
    vae=tiny_vae_22,
    expand_timesteps=lambda: True,
)


# ---- image to video


def build_i2v(seed: int, **changes: Any) -> WanImageToVideoPipeline:
    image_branch = {"image_dim": IMAGE_DIM, "added_kv_proj_dim": 64}
    with seeded(seed):
        parts = {
            "transformer": tiny_transformer(in_channels=36, **image_branch),
            "vae": tiny_vae(),
            "scheduler": flow_scheduler(),
            "text_encoder": None,
            "tokenizer": None,
            **image_encoder(),
        }
        return WanImageToVideoPipeline(**{**parts, **{name: make() for name, make in changes.items()}})


def call_i2v(pipe: DiffusionPipeline, items: tuple[int, ...] = (0,), **overrides: Any) -> Tensor:
    # Wan's processor takes the last 512 context tokens for text and the ones before them for the image
    inputs = {
        **text_inputs(items, text_tokens=512),
        **size(),
        "image": frame(HEIGHT, WIDTH),
        "num_inference_steps": 8,
        "guidance_scale": 4.0,
    }
    return pipe(**{**inputs, **overrides}).frames


# Wan 2.2's image is in the latents alone
build_i2v_a14b = partial(
    build_i2v,
    transformer=partial(tiny_transformer, in_channels=36),
    transformer_2=partial(tiny_transformer, in_channels=36),
    boundary_ratio=lambda: 0.9,
)

build_i2v_5b = partial(
    build_i2v,
    transformer=partial(tiny_transformer, in_channels=48, out_channels=48),
    vae=tiny_vae_22,
    expand_timesteps=lambda: True,
)


def call_i2v_22(pipe: DiffusionPipeline, items: tuple[int, ...] = (0,), scale: int = 1, **overrides: Any) -> Tensor:
    inputs = {**text_inputs(items), **size(scale), "image": frame(scale * HEIGHT, scale * WIDTH)}
    return pipe(**{**inputs, "num_inference_steps": 8, "guidance_scale": 4.0, **overrides}).frames


# ---- video to video


def build_v2v(seed: int) -> WanVideoToVideoPipeline:
    with seeded(seed):
        return WanVideoToVideoPipeline(
            transformer=tiny_transformer(),
            vae=tiny_vae(),
            scheduler=flow_scheduler(),
            text_encoder=None,
            tokenizer=None,
        )


def call_v2v(pipe: DiffusionPipeline, items: tuple[int, ...] = (0,), **overrides: Any) -> Tensor:
    clip = [frame(HEIGHT, WIDTH, shift) for shift in range(FRAMES)]
    inputs = {
        **text_inputs(items),
        "video": [clip] * len(items),
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": 16,
        "strength": 0.5,
        "guidance_scale": 4.0,
    }
    return pipe(**{**inputs, **overrides}).frames


def build_vace(seed: int) -> WanVACEPipeline:
    with seeded(seed):
        return WanVACEPipeline(
            transformer=tiny_transformer(WanVACETransformer3DModel, vace_layers=[0], vace_in_channels=96),
            vae=tiny_vae(),
            scheduler=flow_scheduler(),
            text_encoder=None,
            tokenizer=None,
        )


def call_vace(pipe: DiffusionPipeline, items: tuple[int, ...] = (0,), **overrides: Any) -> Tensor:
    inputs = {
        **text_inputs(items),
        **size(),
        "generator": generators(items)[0],
        "video": [frame(HEIGHT, WIDTH, shift) for shift in range(FRAMES)],
        "mask": [Image.new("L", (WIDTH, HEIGHT), 255 * (shift > 4)) for shift in range(FRAMES)],
        "num_inference_steps": 8,
        "guidance_scale": 4.0,
    }
    return pipe(**{**inputs, **overrides}).frames


# ---- Wan-Animate: two segments of 5 frames that share one


def build_animate(seed: int) -> WanAnimatePipeline:
    with seeded(seed):
        transformer = tiny_transformer(
            WanAnimateTransformer3DModel,
            in_channels=36,
            image_dim=IMAGE_DIM,
            added_kv_proj_dim=64,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=16,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=LAYERS,
        )
        return WanAnimatePipeline(
            transformer=transformer,
            vae=tiny_vae(),
            scheduler=flow_scheduler(),
            text_encoder=None,
            tokenizer=None,
            **image_encoder(),
        )


def call_animate(pipe: DiffusionPipeline, items: tuple[int, ...] = (0,), **overrides: Any) -> Tensor:
    inputs = {
        **text_inputs(items, text_tokens=512),
        "image": frame(HEIGHT, WIDTH),
        "pose_video": [frame(HEIGHT, WIDTH, shift) for shift in range(9)],
        "face_video": [frame(16, 16, shift) for shift in range(9)],
        "height": HEIGHT,
        "width": WIDTH,
        "segment_frame_length": 5,
        "prev_segment_conditioning_frames": 1,
        "num_inference_steps": 7,
        "guidance_scale": 1.0,
    }
    return pipe(**{**inputs, **overrides}).frames


WAN_FAMILIES = (
    Family("wan2.1-t2v", build_t2v, call_t2v, "cross-attention", tokens=(TOKENS,)),
    Family("wan2.1-i2v", build_i2v, call_i2v, "cross-attention, with an image branch", tokens=(TOKENS,)),
    Family(
        "wan2.2-a14b-t2v",
        build_t2v_a14b,
        call_t2v,
        "cross-attention",
        transformers=("transformer", "transformer_2"),
        tokens=(TOKENS,),
        notes="two transformers; the second takes over during the dense steps",
    ),
    Family(
        "wan2.2-a14b-i2v",
        build_i2v_a14b,
        call_i2v_22,
        "cross-attention",
        transformers=("transformer", "transformer_2"),
        tokens=(TOKENS,),
        notes="two transformers; the second takes over during the dense steps",
    ),
    Family(
        "wan2.2-5b-t2v",
        build_t2v_5b,
        partial(call_t2v, scale=2),
        "cross-attention",
        tokens=(TOKENS,),
        notes="one timestep a token",
    ),
    Family(
        "wan2.2-5b-i2v",
        build_i2v_5b,
        partial(call_i2v_22, scale=2),
        "cross-attention",
        tokens=(TOKENS,),
        notes="one timestep a token, 0 in the first frame",
    ),
    Family(
        "wan2.1-v2v",
        build_v2v,
        call_v2v,
        "cross-attention",
        tokens=(TOKENS,),
        notes="strength 0.5: the last 8 of 16 steps",
    ),
    Family(
        "wan-vace",
        build_vace,
        call_vace,
        "cross-attention",
        tokens=(TOKENS,),
        layers=LAYERS + 1,
        batches=False,
        notes="one control layer beside the two of the video",
    ),
    Family(
        "wan-animate",
        build_animate,
        call_animate,
        "cross-attention, with an image branch and a face adapter",
        tokens=(3 * 7 * 9,),
        forwards_per_step=1,
        steps=7,
        generations=2,
        notes="segments; a reference frame before the video",
    ),
)
