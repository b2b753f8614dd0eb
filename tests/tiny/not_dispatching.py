"""Tiny pipelines of the models that compute attention by themselves: nothing can be attached to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

# repairs a torchvision that does not fit this torch, so that diffusers can be imported
import xattn_video.integrations.diffusers  # noqa: F401  # isort: skip

from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    ConsisIDTransformer3DModel,
    DiffusionPipeline,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
)


@dataclass(frozen=True)
class NotDispatching:
    """A pipeline whose transformer computes attention by itself, out of the wrapper's reach."""

    transformer: str
    build: Callable[[], DiffusionPipeline]


def without_encoders(pipeline: type[DiffusionPipeline], transformer: nn.Module) -> DiffusionPipeline:
    return pipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


HEADS: dict[str, int] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}

NOT_DISPATCHING: tuple[NotDispatching, ...] = (
    NotDispatching(
        "CogVideoXTransformer3DModel",
        lambda: without_encoders(
            CogVideoXPipeline, CogVideoXTransformer3DModel(**HEADS, in_channels=4, out_channels=4, text_embed_dim=8)
        ),
    ),
    NotDispatching(
        "MochiTransformer3DModel",
        lambda: without_encoders(
            MochiPipeline, MochiTransformer3DModel(**HEADS, pooled_projection_dim=16, text_embed_dim=8)
        ),
    ),
    NotDispatching(
        "AllegroTransformer3DModel",
        lambda: without_encoders(
            AllegroPipeline, AllegroTransformer3DModel(**HEADS, cross_attention_dim=32, caption_channels=8)
        ),
    ),
    NotDispatching(
        "LatteTransformer3DModel",
        lambda: without_encoders(
            LattePipeline,
            LatteTransformer3DModel(
                **HEADS,
                in_channels=4,
                out_channels=8,
                cross_attention_dim=32,
                sample_size=8,
                patch_size=2,
                num_embeds_ada_norm=1000,
                norm_type="ada_norm_single",
                norm_elementwise_affine=False,
                caption_channels=8,
            ),
        ),
    ),
    NotDispatching(
        "ConsisIDTransformer3DModel",
        lambda: without_encoders(
            # its own pipeline class has the same components but needs OpenCV
            CogVideoXPipeline,
            ConsisIDTransformer3DModel(**HEADS, in_channels=4, out_channels=4, text_embed_dim=8),
        ),
    ),
    NotDispatching(
        "EasyAnimateTransformer3DModel",
        lambda: without_encoders(
            EasyAnimatePipeline,
            EasyAnimateTransformer3DModel(
                **HEADS, in_channels=4, out_channels=4, patch_size=2, mmdit_layers=1, text_embed_dim=8
            ),
        ),
    ),
)
