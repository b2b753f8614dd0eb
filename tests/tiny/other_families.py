"""Tiny pipelines whose text stays outside the video's self-attention: LTX, LTX-2, Cosmos, Kandinsky 5."""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny.common import Family, newer_classes, normal, prefix_mask, sharpen, two_heads

import diffusers  # isort: skip
from diffusers import (  # isort: skip
    AutoencoderKLWan,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    ModelMixin,
    UniPCMultistepScheduler,
)

AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, LTX2Pipeline, LTX2VideoTransformer3DModel = newer_classes(
    "AutoencoderKLLTX2Audio", "AutoencoderKLLTX2Video", "LTX2Pipeline", "LTX2VideoTransformer3DModel"
)
(Cosmos2_5_PredictBasePipeline,) = newer_classes("Cosmos2_5_PredictBasePipeline")

TEXT_LENGTH, TEXT_DIM, POOLED_DIM = 22, 24, 16
VALID_TEXT, VALID_NEGATIVE = (13, 20), (7, 11)
GUIDED = {"guidance_scale": 3.0, "num_inference_steps": 8}


def fill_zeros(module: nn.Module) -> nn.Module:
    """Give weights that start at zero (gates, position tables) values: a closed gate would hide the attention."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.1)
    return module


def prompts(items: tuple[int, ...], dim: int = TEXT_DIM) -> dict[str, Tensor]:
    return {
        "prompt_embeds": normal((TEXT_LENGTH, dim), items, salt=1),
        "negative_prompt_embeds": normal((TEXT_LENGTH, dim), items, salt=3),
    }


# ---- LTX and LTX-2: 3 latent frames of 10 x 13 tokens

LTX_TRANSFORMER: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "cross_attention_dim": 64,
    "num_layers": 2,
    "caption_channels": TEXT_DIM,
}
# latent audio channels x latent mel bins: what one audio token holds
AUDIO_CHANNELS = 16


def ltx_inputs(items: tuple[int, ...]) -> dict[str, Any]:
    masks = {
        "prompt_attention_mask": prefix_mask(VALID_TEXT, items, TEXT_LENGTH),
        "negative_prompt_attention_mask": prefix_mask(VALID_NEGATIVE, items, TEXT_LENGTH),
    }
    return {**prompts(items), **masks, **GUIDED, "height": 320, "width": 416, "num_frames": 17}


def ltx_2_transformer(**changes: Any) -> nn.Module:
    audio = {
        "audio_in_channels": AUDIO_CHANNELS,
        "audio_out_channels": AUDIO_CHANNELS,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 16,
        "audio_cross_attention_dim": 32,
    }
    return two_heads(LTX2VideoTransformer3DModel, **LTX_TRANSFORMER, **audio, **changes)


def ltx_2_connectors() -> nn.Module:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    one = {
        "num_attention_heads": 2,
        "attention_head_dim": TEXT_DIM // 2,
        "num_layers": 1,
        "num_learnable_registers": None,
    }
    both = {f"{name}_connector_{key}": value for name in ("video", "audio") for key, value in one.items()}
    return LTX2TextConnectors(caption_channels=TEXT_DIM, text_proj_in_factor=1, **both)


def ltx_2_vocoder() -> nn.Module:
    from diffusers.pipelines.ltx2 import LTX2Vocoder

    return LTX2Vocoder(
        in_channels=64,
        hidden_channels=32,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1]],
    )


LTX_2_PARTS = {
    "transformer": ltx_2_transformer,
    "connectors": ltx_2_connectors,
    "vae": partial(
        AutoencoderKLLTX2Video,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    ),
    "audio_vae": partial(
        AutoencoderKLLTX2Audio,
        base_channels=AUDIO_CHANNELS,
        ch_mult=(1, 1, 1),
        num_res_blocks=1,
        latent_channels=2,
        mel_bins=32,
    ),
    "vocoder": ltx_2_vocoder,
    "scheduler": FlowMatchEulerDiscreteScheduler,
}


def ltx_2_inputs(items: tuple[int, ...]) -> dict[str, Any]:
    # slow enough for 85 audio tokens: long enough a sequence to be sparse, if it were taken for the video's
    guidance = {"stg_scale": 0.0, "modality_scale": 1.0, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0}
    return {**ltx_inputs(items), **guidance, "frame_rate": 5.0}


# ---- Cosmos: 3 latent frames of 10 x 13 tokens


class AllowAll(ModelMixin):
    """Stands where Cosmos wants its guardrail (a separate, gated download); lets every prompt and video pass."""

    def __init__(self) -> None:
        super().__init__()
        # the pipeline asks each of its models for a device
        self.register_buffer("empty", torch.empty(0))

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def cosmos_transformer(**changes: Any) -> nn.Module:
    settings = {"num_layers": 2, "mlp_ratio": 2.0, "adaln_lora_dim": 8, "max_size": (8, 64, 64)}
    channels = {"in_channels": 4, "out_channels": 4, "text_embed_dim": TEXT_DIM}
    return fill_zeros(two_heads(CosmosTransformer3DModel, **{**settings, **channels, **changes}))


def cosmos_25_transformer() -> nn.Module:
    if "encoder_hidden_states_channels" not in signature(CosmosTransformer3DModel).parameters:
        pytest.skip(f"the Cosmos transformer of diffusers {diffusers.__version__} is that of 1.0 and 2.0")
    return cosmos_transformer(
        # the condition's mask is one channel more
        in_channels=4 + 1,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=32,
        encoder_hidden_states_channels=TEXT_DIM,
        extra_pos_embed_type=None,
    )


COSMOS_PARTS = {
    "transformer": cosmos_transformer,
    "scheduler": partial(
        EDMEulerScheduler,
        sigma_min=0.002,
        sigma_max=80,
        sigma_data=0.5,
        sigma_schedule="karras",
        final_sigmas_type="sigma_min",
    ),
    "safety_checker": AllowAll,
}
COSMOS_25_PARTS = {
    "transformer": cosmos_25_transformer,
    "vae": partial(
        AutoencoderKLWan,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ),
    "scheduler": partial(
        UniPCMultistepScheduler,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        use_karras_sigmas=True,
        sigma_max=200.0,
    ),
    "safety_checker": AllowAll,
}


def cosmos_inputs(items: tuple[int, ...], frames: int = 17, text_dim: int = TEXT_DIM) -> dict[str, Any]:
    return {**prompts(items, text_dim), **GUIDED, "height": 160, "width": 208, "num_frames": frames}


# ---- Kandinsky 5: 5 latent frames of 8 x 10 tokens

# long enough a sequence to be sparse, if it were taken for the video's
KANDINSKY_TEXT = 90


def kandinsky_transformer() -> nn.Module:
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=TEXT_DIM,
        in_text_dim2=POOLED_DIM,
        time_dim=16,
        model_dim=64,
        ff_dim=128,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(8, 12, 12),
    )
    return sharpen(fill_zeros(transformer))


def kandinsky_inputs(items: tuple[int, ...]) -> dict[str, Any]:
    lengths = torch.arange(len(items) + 1, dtype=torch.int32)
    inputs = {**GUIDED, "height": 128, "width": 160, "num_frames": 17}
    for prefix, salt, length in (("", 1, KANDINSKY_TEXT), ("negative_", 3, KANDINSKY_TEXT - 5)):
        inputs |= {
            f"{prefix}prompt_embeds_qwen": normal((length, TEXT_DIM), items, salt=salt),
            f"{prefix}prompt_embeds_clip": normal((POOLED_DIM,), items, salt=salt + 1),
            f"{prefix}prompt_cu_seqlens": lengths * length,
        }
    return inputs


LTX_2 = Family(
    "ltx-2",
    LTX2Pipeline,
    LTX_2_PARTS,
    ltx_2_inputs,
    tokens=(390,),
    forwards_per_step=1,
    # video and audio latents of each item, one after the other in one row
    result=lambda output: torch.cat([output.frames.flatten(1), output.audio.flatten(1)], dim=1),
    notes="audio has its own self-attention and crosses with the video: dense",
)
KANDINSKY_5 = Family(
    "kandinsky-5",
    Kandinsky5T2VPipeline,
    {"transformer": kandinsky_transformer, "scheduler": partial(FlowMatchEulerDiscreteScheduler, shift=5.0)},
    kandinsky_inputs,
    tokens=(400,),
    # its rotary embedding rounds queries and keys to bfloat16
    tolerance=5e-4,
)

OTHER_FAMILIES: tuple[Family, ...] = (
    Family(
        "ltx",
        LTXPipeline,
        {
            "transformer": partial(two_heads, LTXVideoTransformer3DModel, **LTX_TRANSFORMER),
            "scheduler": FlowMatchEulerDiscreteScheduler,
        },
        ltx_inputs,
        tokens=(390,),
        forwards_per_step=1,
    ),
    LTX_2,
    Family("cosmos", CosmosTextToWorldPipeline, COSMOS_PARTS, cosmos_inputs, tokens=(390,)),
    Family(
        "cosmos-2.5",
        Cosmos2_5_PredictBasePipeline,
        COSMOS_25_PARTS,
        partial(cosmos_inputs, frames=9, text_dim=32),
        tokens=(390,),
        notes="a time for each frame",
    ),
    KANDINSKY_5,
)
