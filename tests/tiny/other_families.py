"""Tiny pipelines whose text stays outside the video's self-attention: LTX, LTX-2, Cosmos, Kandinsky 5."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny.common import SHARPNESS, Family, generators, newer_classes, normal, seeded, sharpen
from tests.tiny.hunyuan_families import prefix_mask

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


def fill_zeros(module: nn.Module) -> nn.Module:
    """Give weights that start at zero (gates, position tables) values: a closed gate would hide the attention."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.1)
    return module


def padded_prompts(items: Sequence[int]) -> dict[str, Tensor]:
    return {
        "prompt_embeds": normal((TEXT_LENGTH, TEXT_DIM), items, salt=1),
        "prompt_attention_mask": prefix_mask(VALID_TEXT, items),
        "negative_prompt_embeds": normal((TEXT_LENGTH, TEXT_DIM), items, salt=3),
        "negative_prompt_attention_mask": prefix_mask(VALID_NEGATIVE, items),
    }


def build_ltx(seed: int) -> LTXPipeline:
    with seeded(seed):
        transformer = LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=32,
            cross_attention_dim=64,
            num_layers=2,
            caption_channels=TEXT_DIM,
        )
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=sharpen(transformer).eval(),
    )


# 3 latent frames of 10 x 13 tokens
LTX_SIZE = {"height": 320, "width": 416, "num_frames": 17}


def call_ltx(pipe: LTXPipeline, items: Sequence[int] = (0,), **overrides: Any) -> Tensor:
    arguments = {
        **LTX_SIZE,
        **padded_prompts(items),
        "guidance_scale": 3.0,
        "num_inference_steps": 8,
        "generator": generators(items),
        "output_type": "latent",
    }
    return pipe(**{**arguments, **overrides}).frames


# latent audio channels x latent mel bins: what one audio token holds
AUDIO_CHANNELS = 16


def build_ltx_2(seed: int, **changes: Any) -> LTX2Pipeline:
    with seeded(seed):
        transformer = LTX2VideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=32,
            cross_attention_dim=64,
            audio_in_channels=AUDIO_CHANNELS,
            audio_out_channels=AUDIO_CHANNELS,
            audio_num_attention_heads=2,
            audio_attention_head_dim=16,
            audio_cross_attention_dim=32,
            num_layers=2,
            caption_channels=TEXT_DIM,
            **changes,
        )
        from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

        connectors = LTX2TextConnectors(
            caption_channels=TEXT_DIM,
            text_proj_in_factor=1,
            video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=TEXT_DIM // 2,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=None,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=TEXT_DIM // 2,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=None,
        )
        vae = AutoencoderKLLTX2Video(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        )
        audio_vae = AutoencoderKLLTX2Audio(
            base_channels=AUDIO_CHANNELS, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=2, mel_bins=32
        )
        vocoder = LTX2Vocoder(
            in_channels=64,
            hidden_channels=32,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1]],
        )
    return LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        audio_vae=audio_vae.eval(),
        text_encoder=None,
        tokenizer=None,
        connectors=connectors.eval(),
        transformer=sharpen(transformer).eval(),
        vocoder=vocoder.eval(),
    )


def call_ltx_2(pipe: LTX2Pipeline, items: Sequence[int] = (0,), **overrides: Any) -> Tensor:
    """Video and audio latents of each item, one after the other in one row."""
    arguments = {
        **LTX_SIZE,
        **padded_prompts(items),
        # slow enough for 85 audio tokens: long enough a sequence to be sparse, if it were taken for the video's
        "frame_rate": 5.0,
        "guidance_scale": 3.0,
        "stg_scale": 0.0,
        "modality_scale": 1.0,
        "audio_stg_scale": 0.0,
        "audio_modality_scale": 1.0,
        "num_inference_steps": 8,
        "generator": generators(items),
        "output_type": "latent",
    }
    video, audio = pipe(**{**arguments, **overrides}, return_dict=False)
    return torch.cat([video.flatten(1), audio.flatten(1)], dim=1)


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


def cosmos_transformer(seed: int, **changes: Any) -> CosmosTransformer3DModel:
    with seeded(seed):
        transformer = CosmosTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            num_layers=2,
            mlp_ratio=2.0,
            adaln_lora_dim=8,
            max_size=(8, 64, 64),
            **changes,
        )
        return sharpen(fill_zeros(transformer)).eval()


def build_cosmos(seed: int) -> CosmosTextToWorldPipeline:
    return CosmosTextToWorldPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=cosmos_transformer(seed, in_channels=4, out_channels=4, text_embed_dim=TEXT_DIM),
        vae=None,
        scheduler=EDMEulerScheduler(
            sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min"
        ),
        safety_checker=AllowAll(),
    )


def unmasked_prompts(items: Sequence[int], dim: int = TEXT_DIM) -> dict[str, Tensor]:
    return {
        "prompt_embeds": normal((TEXT_LENGTH, dim), items, salt=1),
        "negative_prompt_embeds": normal((TEXT_LENGTH, dim), items, salt=3),
    }


def call_cosmos(pipe: CosmosTextToWorldPipeline, items: Sequence[int] = (0,), **overrides: Any) -> Tensor:
    arguments = {
        **unmasked_prompts(items),
        # 3 latent frames of 10 x 13 tokens
        "height": 160,
        "width": 208,
        "num_frames": 17,
        "guidance_scale": 3.0,
        "num_inference_steps": 8,
        "generator": generators(items),
        "output_type": "latent",
    }
    return pipe(**{**arguments, **overrides}).frames


def build_cosmos_25(seed: int) -> Cosmos2_5_PredictBasePipeline:
    if "encoder_hidden_states_channels" not in signature(CosmosTransformer3DModel).parameters:
        pytest.skip(f"the Cosmos transformer of diffusers {diffusers.__version__} is that of 1.0 and 2.0")
    with seeded(seed):
        vae = AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
    return Cosmos2_5_PredictBasePipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=cosmos_transformer(
            seed,
            # the condition's mask is one channel more
            in_channels=4 + 1,
            out_channels=4,
            text_embed_dim=TEXT_DIM,
            use_crossattn_projection=True,
            crossattn_proj_in_channels=32,
            encoder_hidden_states_channels=TEXT_DIM,
            extra_pos_embed_type=None,
        ),
        vae=vae.eval(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, use_karras_sigmas=True, sigma_max=200.0
        ),
        safety_checker=AllowAll(),
    )


def call_cosmos_25(pipe: Cosmos2_5_PredictBasePipeline, items: Sequence[int] = (0,), **overrides: Any) -> Tensor:
    arguments = {
        **unmasked_prompts(items, dim=32),
        # 3 latent frames of 10 x 13 tokens
        "height": 160,
        "width": 208,
        "num_frames": 9,
        "guidance_scale": 3.0,
        "num_inference_steps": 8,
        "generator": generators(items),
        "output_type": "latent",
    }
    return pipe(**{**arguments, **overrides}).frames


def build_kandinsky_5(seed: int) -> Kandinsky5T2VPipeline:
    with seeded(seed):
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
        fill_zeros(transformer)
    with torch.no_grad():
        for block in transformer.visual_transformer_blocks:
            block.self_attention.query_norm.weight.mul_(SHARPNESS)
            block.self_attention.key_norm.weight.mul_(SHARPNESS)
    return Kandinsky5T2VPipeline(
        transformer=transformer.eval(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


# long enough a sequence to be sparse, if it were taken for the video's
KANDINSKY_TEXT = 90


def call_kandinsky_5(pipe: Kandinsky5T2VPipeline, items: Sequence[int] = (0,), **overrides: Any) -> Tensor:
    lengths = torch.arange(len(items) + 1, dtype=torch.int32)
    arguments = {
        "prompt_embeds_qwen": normal((KANDINSKY_TEXT, TEXT_DIM), items, salt=1),
        "prompt_embeds_clip": normal((POOLED_DIM,), items, salt=2),
        "prompt_cu_seqlens": lengths * KANDINSKY_TEXT,
        "negative_prompt_embeds_qwen": normal((KANDINSKY_TEXT - 5, TEXT_DIM), items, salt=3),
        "negative_prompt_embeds_clip": normal((POOLED_DIM,), items, salt=4),
        "negative_prompt_cu_seqlens": lengths * (KANDINSKY_TEXT - 5),
        # 5 latent frames of 8 x 10 tokens
        "height": 128,
        "width": 160,
        "num_frames": 17,
        "guidance_scale": 3.0,
        "num_inference_steps": 8,
        "generator": generators(items),
        "output_type": "latent",
    }
    return pipe(**{**arguments, **overrides}).frames


CROSS = "cross-attention"

OTHER_FAMILIES: tuple[Family, ...] = (
    Family("ltx", build_ltx, call_ltx, text=CROSS, tokens=(390,), forwards_per_step=1),
    Family(
        "ltx-2",
        build_ltx_2,
        call_ltx_2,
        text=CROSS,
        tokens=(390,),
        forwards_per_step=1,
        notes="audio has its own self-attention and crosses with the video: dense",
    ),
    Family("cosmos", build_cosmos, call_cosmos, text=CROSS, tokens=(390,)),
    Family("cosmos-2.5", build_cosmos_25, call_cosmos_25, text=CROSS, tokens=(390,), notes="a time for each frame"),
    # its rotary embedding rounds queries and keys to bfloat16
    Family("kandinsky-5", build_kandinsky_5, call_kandinsky_5, text=CROSS, tokens=(400,), tolerance=5e-4),
)
