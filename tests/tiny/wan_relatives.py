"""Tiny pipelines of SkyReels-V2, ChronoEdit, Helios and AnyFlow, which are built on Wan; text is in cross-attention."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.tiny.common import Family, newer_classes
from tests.tiny.wan_family import (
    FRAMES,
    IMAGE_BRANCH,
    TOKENS,
    WAN,
    WITH_IMAGE,
    image_branch_inputs,
    prompts,
    size,
    text_inputs,
    tiny_transformer,
)

# after tests.tiny.common, which repairs a torchvision that does not fit this torch
from diffusers import (  # isort: skip
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
)

HeliosPipeline, HeliosPyramidPipeline, HeliosScheduler, HeliosTransformer3DModel = newer_classes(
    "HeliosPipeline", "HeliosPyramidPipeline", "HeliosScheduler", "HeliosTransformer3DModel"
)
AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler = newer_classes(
    "AnyFlowPipeline", "AnyFlowTransformer3DModel", "FlowMapEulerDiscreteScheduler"
)

SKYREELS = {**WAN, "transformer": partial(tiny_transformer, SkyReelsV2Transformer3DModel)}
CHRONOEDIT_TRANSFORMER = partial(tiny_transformer, ChronoEditTransformer3DModel, in_channels=36, **IMAGE_BRANCH)
HELIOS_TRANSFORMER = partial(tiny_transformer, HeliosTransformer3DModel, rope_dim=(12, 10, 10))
ANYFLOW = {
    **WAN,
    "transformer": partial(tiny_transformer, AnyFlowTransformer3DModel),
    "scheduler": partial(FlowMapEulerDiscreteScheduler, shift=5.0),
}


def forcing_inputs(items: tuple[int, ...]) -> dict[str, Any]:
    return {**text_inputs(items), "prompt": None}


def chronoedit_inputs(items: tuple[int, ...]) -> dict[str, Any]:
    """An image is edited by way of a video, of which the last steps keep the first and the last frame."""
    return {**image_branch_inputs(items), "enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 6}


def helios(**schedule: Any) -> dict[str, Any]:
    scheduler = partial(HeliosScheduler, **schedule, use_dynamic_shifting=True)
    return {**WAN, "transformer": HELIOS_TRANSFORMER, "scheduler": scheduler}


def helios_inputs(items: tuple[int, ...]) -> dict[str, Any]:
    return {
        **prompts(items),
        **size(),
        "num_latent_frames_per_chunk": 5,
        "history_sizes": [16, 2, 1],
        "guidance_scale": 4.0,
    }


def two_chunks(items: tuple[int, ...]) -> dict[str, Any]:
    """The second chunk has the first in its history."""
    return {**helios_inputs(items), "num_frames": 2 * FRAMES, "num_inference_steps": 7}


def pyramid_inputs(items: tuple[int, ...]) -> dict[str, Any]:
    # half of the latent size must be even too
    return {**helios_inputs(items), "height": 128, "width": 160, "pyramid_num_inference_steps_list": [4, 4]}


WAN_RELATIVES = (
    Family("skyreels-v2-t2v", SkyReelsV2Pipeline, SKYREELS, text_inputs, tokens=(TOKENS,)),
    Family(
        "skyreels-v2-df",
        SkyReelsV2DiffusionForcingPipeline,
        SKYREELS,
        forcing_inputs,
        tokens=(TOKENS,),
        notes="one timestep a frame; synchronous, so without a mask",
    ),
    Family(
        "chronoedit",
        ChronoEditPipeline,
        {**WITH_IMAGE, "transformer": CHRONOEDIT_TRANSFORMER},
        chronoedit_inputs,
        tokens=(TOKENS, 2 * 7 * 9),
        text="cross-attention, with an image branch",
        notes="two of the frames go on alone after 6 of 8 steps",
    ),
    Family(
        "helios",
        HeliosPipeline,
        helios(stages=1, stage_range=[0, 1]),
        two_chunks,
        tokens=(TOKENS + 126 + 20 + 24,),
        steps=7,
        generations=2,
        notes="chunks; short, middle and long history before the video",
    ),
    Family(
        "helios-pyramid",
        HeliosPyramidPipeline,
        # gamma is below 1/3, where the covariance of its noise is positive definite without luck in the rounding
        helios(stages=2, stage_range=[0, 0.5, 1], gamma=0.3),
        pyramid_inputs,
        # a quarter of the video's 5 x 8 x 10 tokens, then all; with history
        tokens=(100 + 160 + 20 + 24, 400 + 160 + 20 + 24),
        batches=False,
        notes="two resolutions; the pipeline does not tell its timestep",
    ),
    Family(
        "anyflow",
        AnyFlowPipeline,
        ANYFLOW,
        text_inputs,
        tokens=(TOKENS,),
        forwards_per_step=1,
        notes="a flow map: one call has the timestep it starts from and the one it goes to",
    ),
)
