"""Tiny pipelines of Wan 2.1 and 2.2, VACE and Animate; text is in cross-attention everywhere."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from tests.tiny.common import Family, normal, two_heads

# after tests.tiny.common, which repairs a torchvision that does not fit this torch
from diffusers import (  # isort: skip
    AutoencoderKLWan,
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
    settings = {"patch_size": (1, 2, 2), "in_channels": 16, "out_channels": 16, "text_dim": TEXT_DIM, "freq_dim": 32}
    return two_heads(cls, **{**settings, "ffn_dim": 64, "num_layers": LAYERS, **changes}).eval()


tiny_vae = partial(AutoencoderKLWan, base_dim=2, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
flow_scheduler = partial(
    UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
)
WAN = {"transformer": tiny_transformer, "vae": tiny_vae, "scheduler": flow_scheduler}

# 48 channels, 16 pixels a side, residual, patched
WAN_5B = {
    **WAN,
    "transformer": partial(tiny_transformer, in_channels=48, out_channels=48),
    "vae": partial(
        AutoencoderKLWan,
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
    ),
    "expand_timesteps": True,
}


def image_encoder() -> CLIPVisionModel:
    """16 patches and a class token."""
    sizes = {"hidden_size": IMAGE_DIM, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, num_hidden_layers=2, num_attention_heads=2))


SIDE = {"height": 32, "width": 32}
IMAGE_BRANCH = {"image_dim": IMAGE_DIM, "added_kv_proj_dim": 64}
WITH_IMAGE = {
    **WAN,
    "transformer": partial(tiny_transformer, in_channels=36, **IMAGE_BRANCH),
    "image_encoder": image_encoder,
    "image_processor": partial(CLIPImageProcessor, size=SIDE, crop_size=SIDE),
}
# Wan 2.2's image is in the latents alone
IMAGE_IN_LATENTS = partial(tiny_transformer, in_channels=36)

ANIMATE_TRANSFORMER = partial(
    tiny_transformer,
    WanAnimateTransformer3DModel,
    in_channels=36,
    **IMAGE_BRANCH,
    motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
    motion_encoder_size=16,
    motion_style_dim=8,
    motion_dim=4,
    motion_encoder_dim=16,
    face_encoder_hidden_dim=16,
    face_encoder_num_heads=2,
    inject_face_latents_blocks=LAYERS,
)


def prompts(items: tuple[int, ...], text_tokens: int = 80) -> dict[str, Tensor]:
    return {
        "prompt_embeds": normal((text_tokens, TEXT_DIM), items),
        "negative_prompt_embeds": normal((text_tokens, TEXT_DIM), items, salt=1),
    }


def size(scale: int = 1) -> dict[str, int]:
    return {"height": scale * HEIGHT, "width": scale * WIDTH, "num_frames": FRAMES}


def frame(height: int = HEIGHT, width: int = WIDTH, shift: int = 0) -> Image.Image:
    """A gradient with a moving square: cheap, and different in every frame."""
    rows, columns = np.mgrid[0:height, 0:width]
    square = (abs(rows - height // 2) < height // 4) & (abs(columns - width // 3 - 4 * shift) < width // 6)
    channels = [rows * 255 // height, columns * 255 // width, square * 255]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def clip(frames: int = FRAMES) -> list[Image.Image]:
    return [frame(shift=shift) for shift in range(frames)]


def text_inputs(items: tuple[int, ...], scale: int = 1, text_tokens: int = 80) -> dict[str, Any]:
    return {**prompts(items, text_tokens), **size(scale), "num_inference_steps": 8, "guidance_scale": 4.0}


def image_branch_inputs(items: tuple[int, ...]) -> dict[str, Any]:
    # Wan's processor takes the last 512 context tokens for text and the ones before them for the image
    return {**text_inputs(items, text_tokens=512), "image": frame()}


def image_inputs(items: tuple[int, ...], scale: int = 1) -> dict[str, Any]:
    return {**text_inputs(items, scale), "image": frame(scale * HEIGHT, scale * WIDTH)}


def video_inputs(items: tuple[int, ...]) -> dict[str, Any]:
    inputs = {**text_inputs(items), "video": [clip()] * len(items), "num_inference_steps": 16, "strength": 0.5}
    del inputs["num_frames"]
    return inputs


def vace_inputs(items: tuple[int, ...]) -> dict[str, Any]:
    mask = [Image.new("L", (WIDTH, HEIGHT), 255 * (shift > 4)) for shift in range(FRAMES)]
    return {**text_inputs(items), "video": clip(), "mask": mask}


def animate_inputs(items: tuple[int, ...]) -> dict[str, Any]:
    """Two segments of 5 frames that share one."""
    return {
        **prompts(items, text_tokens=512),
        "image": frame(),
        "pose_video": clip(9),
        "face_video": [frame(16, 16, shift) for shift in range(9)],
        "height": HEIGHT,
        "width": WIDTH,
        "segment_frame_length": 5,
        "prev_segment_conditioning_frames": 1,
        "num_inference_steps": 7,
        "guidance_scale": 1.0,
    }


T2V = Family("wan2.1-t2v", WanPipeline, WAN, text_inputs, tokens=(TOKENS,))
T2V_A14B = Family(
    "wan2.2-a14b-t2v",
    WanPipeline,
    {**WAN, "transformer_2": tiny_transformer, "boundary_ratio": 0.875},
    text_inputs,
    transformers=("transformer", "transformer_2"),
    tokens=(TOKENS,),
    notes="two transformers; the second takes over during the dense steps",
)
T2V_5B = Family(
    "wan2.2-5b-t2v",
    WanPipeline,
    WAN_5B,
    partial(text_inputs, scale=2),
    tokens=(TOKENS,),
    notes="one timestep a token",
)
I2V_5B = Family(
    "wan2.2-5b-i2v",
    WanImageToVideoPipeline,
    WAN_5B,
    partial(image_inputs, scale=2),
    tokens=(TOKENS,),
    notes="one timestep a token, 0 in the first frame",
)
V2V = Family(
    "wan2.1-v2v",
    WanVideoToVideoPipeline,
    WAN,
    video_inputs,
    tokens=(TOKENS,),
    notes="strength 0.5: the last 8 of 16 steps",
)

WAN_FAMILIES = (
    T2V,
    Family(
        "wan2.1-i2v",
        WanImageToVideoPipeline,
        WITH_IMAGE,
        image_branch_inputs,
        tokens=(TOKENS,),
        text="cross-attention, with an image branch",
    ),
    T2V_A14B,
    Family(
        "wan2.2-a14b-i2v",
        WanImageToVideoPipeline,
        {**WAN, "transformer": IMAGE_IN_LATENTS, "transformer_2": IMAGE_IN_LATENTS, "boundary_ratio": 0.9},
        image_inputs,
        transformers=("transformer", "transformer_2"),
        tokens=(TOKENS,),
        notes="two transformers; the second takes over during the dense steps",
    ),
    T2V_5B,
    I2V_5B,
    V2V,
    Family(
        "wan-vace",
        WanVACEPipeline,
        {
            **WAN,
            "transformer": partial(tiny_transformer, WanVACETransformer3DModel, vace_layers=[0], vace_in_channels=96),
        },
        vace_inputs,
        tokens=(TOKENS,),
        layers=LAYERS + 1,
        batches=False,
        notes="one control layer beside the two of the video",
    ),
    Family(
        "wan-animate",
        WanAnimatePipeline,
        {**WITH_IMAGE, "transformer": ANIMATE_TRANSFORMER},
        animate_inputs,
        tokens=(3 * 7 * 9,),
        text="cross-attention, with an image branch and a face adapter",
        forwards_per_step=1,
        steps=7,
        generations=2,
        notes="segments; a reference frame before the video",
    ),
)
