"""Tiny pipelines of the models that compute attention by themselves: nothing can be attached to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tests.tiny.common import assemble

# after tests.tiny.common, which repairs a torchvision that does not fit this torch
from diffusers import (  # isort: skip
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

HEADS: dict[str, int] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
JOINT = {"in_channels": 4, "out_channels": 4, "text_embed_dim": 8}
CROSS = {"cross_attention_dim": 32, "caption_channels": 8}


@dataclass(frozen=True, eq=False)
class NotDispatching:
    """A pipeline whose transformer computes attention by itself, out of the wrapper's reach."""

    pipeline: Callable[..., DiffusionPipeline]
    cls: Callable[..., nn.Module]
    config: Mapping[str, Any]

    @property
    def transformer(self) -> str:
        return self.cls.__name__

    def build(self) -> DiffusionPipeline:
        parts = {"transformer": self.cls(**HEADS, **self.config), "scheduler": FlowMatchEulerDiscreteScheduler()}
        return assemble(self.pipeline, parts)


NOT_DISPATCHING: tuple[NotDispatching, ...] = (
    NotDispatching(CogVideoXPipeline, CogVideoXTransformer3DModel, JOINT),
    NotDispatching(MochiPipeline, MochiTransformer3DModel, {"pooled_projection_dim": 16, "text_embed_dim": 8}),
    NotDispatching(AllegroPipeline, AllegroTransformer3DModel, CROSS),
    NotDispatching(
        LattePipeline,
        LatteTransformer3DModel,
        {
            **CROSS,
            "in_channels": 4,
            "out_channels": 8,
            "sample_size": 8,
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
        },
    ),
    # its own pipeline class has the same components but needs OpenCV
    NotDispatching(CogVideoXPipeline, ConsisIDTransformer3DModel, JOINT),
    NotDispatching(EasyAnimatePipeline, EasyAnimateTransformer3DModel, {**JOINT, "patch_size": 2, "mmdit_layers": 1}),
)
