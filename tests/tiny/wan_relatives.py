"""Tiny pipelines of SkyReels-V2, ChronoEdit and Helios, which are built on Wan; text is in cross-attention."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from tests.tiny.common import Family, generators, newer_classes, seeded
from tests.tiny.wan_family import (
    FRAMES,
    IMAGE_DIM,
    TOKENS,
    call_i2v,
    call_t2v,
    flow_scheduler,
    image_encoder,
    size,
    text_inputs,
    tiny_transformer,
    tiny_vae,
)

# after tests.tiny.common, which mends a torchvision that does not fit this torch
from diffusers import (  # isort: skip
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    DiffusionPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
)

HeliosPipeline, HeliosPyramidPipeline, HeliosScheduler, HeliosTransformer3DModel = newer_classes(
    "HeliosPipeline", "HeliosPyramidPipeline", "HeliosScheduler", "HeliosTransformer3DModel"
)

# ---- SkyReels-V2


def build_skyreels(seed: int, pipeline: Any = SkyReelsV2Pipeline, **changes: Any) -> DiffusionPipeline:
    with seeded(seed):
        return pipeline(
            transformer=tiny_transformer(SkyReelsV2Transformer3DModel, **changes),
            vae=tiny_vae(),
            scheduler=flow_scheduler(),
            text_encoder=None,
            tokenizer=None,
        )


build_skyreels_forcing = partial(build_skyreels, pipeline=SkyReelsV2DiffusionForcingPipeline)
call_skyreels_forcing = partial(call_t2v, prompt=None)


# ---- ChronoEdit: an image is edited by way of a video, of which the last steps keep the first and the last frame


def build_chronoedit(seed: int) -> DiffusionPipeline:
    with seeded(seed):
        return ChronoEditPipeline(
            transformer=tiny_transformer(
                ChronoEditTransformer3DModel, in_channels=36, image_dim=IMAGE_DIM, added_kv_proj_dim=64
            ),
            vae=tiny_vae(),
            scheduler=flow_scheduler(),
            text_encoder=None,
            tokenizer=None,
            **image_encoder(),
        )


call_chronoedit = partial(call_i2v, enable_temporal_reasoning=True, num_temporal_reasoning_steps=6)


# ---- Helios: two chunks, the second with the first in its history


def build_helios(seed: int, pipeline: Any = HeliosPipeline, **schedule: Any) -> DiffusionPipeline:
    with seeded(seed):
        return pipeline(
            transformer=tiny_transformer(HeliosTransformer3DModel, rope_dim=(12, 10, 10)),
            vae=tiny_vae(),
            scheduler=HeliosScheduler(**{"stages": 1, "stage_range": [0, 1], **schedule}, use_dynamic_shifting=True),
            text_encoder=None,
            tokenizer=None,
        )


def call_helios(pipe: DiffusionPipeline, items: tuple[int, ...] = (0,), **overrides: Any) -> Tensor:
    inputs = {
        **text_inputs(items),
        **size(),
        "num_frames": 2 * FRAMES,
        "num_latent_frames_per_chunk": 5,
        "history_sizes": [16, 2, 1],
        "num_inference_steps": 7,
        "guidance_scale": 4.0,
    }
    return pipe(**{**inputs, **overrides}).frames


# below 1/3, where the covariance of its noise is positive definite without luck in the rounding
build_helios_pyramid = partial(
    build_helios, pipeline=HeliosPyramidPipeline, stages=2, stage_range=[0, 0.5, 1], gamma=0.3
)


def call_helios_pyramid(pipe: DiffusionPipeline, items: tuple[int, ...] = (0,), **overrides: Any) -> Tensor:
    inputs = {
        **text_inputs(items),
        "generator": generators(items)[0],
        # half of the latent size must be even too
        "height": 128,
        "width": 160,
        "num_frames": FRAMES,
        "num_latent_frames_per_chunk": 5,
        "history_sizes": [16, 2, 1],
        "pyramid_num_inference_steps_list": [4, 4],
        "guidance_scale": 4.0,
    }
    # the noise between the stages comes from torch's global generator
    with seeded(items[0]):
        return pipe(**{**inputs, **overrides}).frames


WAN_RELATIVES = (
    Family("skyreels-v2-t2v", build_skyreels, call_t2v, "cross-attention", tokens=(TOKENS,)),
    Family(
        "skyreels-v2-df",
        build_skyreels_forcing,
        call_skyreels_forcing,
        "cross-attention",
        tokens=(TOKENS,),
        notes="one timestep a frame; synchronous, so without a mask",
    ),
    Family(
        "chronoedit",
        build_chronoedit,
        call_chronoedit,
        "cross-attention, with an image branch",
        tokens=(TOKENS, 2 * 7 * 9),
        notes="two of the frames go on alone after 6 of 8 steps",
    ),
    Family(
        "helios",
        build_helios,
        call_helios,
        "cross-attention",
        tokens=(TOKENS + 126 + 20 + 24,),
        steps=7,
        generations=2,
        notes="chunks; short, middle and long history before the video",
    ),
    Family(
        "helios-pyramid",
        build_helios_pyramid,
        call_helios_pyramid,
        "cross-attention",
        # a quarter of the video's 5 x 8 x 10 tokens, then all; with history
        tokens=(100 + 160 + 20 + 24, 400 + 160 + 20 + 24),
        batches=False,
        notes="two resolutions; the pipeline does not tell its timestep",
    ),
)
