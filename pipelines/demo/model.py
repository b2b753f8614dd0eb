"""The demo's model: a whole Wan pipeline, small enough for a CPU, with seeded random weights.

Every part is the real class that Wan 2.1 uses (transformer, causal 3-D VAE, UMT5 encoder, fast tokenizer), made
from a configuration; nothing is downloaded. At the demo's size its transformer sees 4,352 tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.models import import_diffusers

# The VAE halves time once and space twice, the transformer's patch halves space again:
# 33 frames of 128 x 128 pixels are 17 x 16 x 16 tokens.
HEIGHT, WIDTH, NUM_FRAMES, FPS = 128, 128, 33, 8
LATENT_CHANNELS = 8
TEXT_DIM = 64
MAX_TEXT_TOKENS = 512

# Random weights attend to all tokens alike, and nothing could be left out; scaled norms give attention its peaks,
# as training does. At 5 about half of the blocks hold 0.9 of the mass.
SHARPNESS = 5.0

# A tokenizer learns its merges from these words; other text falls back to bytes, so any prompt has tokens.
_WORDS = (
    "a an the and on in of with from to red green blue yellow white black orange purple pink brown grey cyan "
    "circle square triangle star ring cross moving turning growing shrinking left right up down background slowly "
    "quickly large small two three bouncing"
)


def build_pipeline(seed: int = 0) -> Any:
    """A `WanPipeline` with random weights from `seed`, about a million parameters, float32 on the CPU.

    torch's global generator is left as it was.
    """
    import torch

    diffusers = import_diffusers()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            text_dim=TEXT_DIM,
            freq_dim=64,
            ffn_dim=256,
            num_layers=4,
        )
        _sharpen(transformer)
        vae = diffusers.AutoencoderKLWan(
            base_dim=8,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * LATENT_CHANNELS,
            latents_std=[1.0] * LATENT_CHANNELS,
            scale_factor_temporal=2,
            scale_factor_spatial=4,
        )
        tokenizer = build_tokenizer()
        text_encoder = _text_encoder(len(tokenizer))
    return diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer.eval(),
    )


def build_tokenizer() -> Any:
    """A byte-level BPE tokenizer with T5's special tokens; the same on every machine."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pad, end, unknown = "<pad>", "</s>", "<unk>"
    tokenizer = Tokenizer(models.BPE(unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[pad, end, unknown],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_WORDS.split(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=end,
        unk_token=unknown,
        model_max_length=MAX_TEXT_TOKENS,
    )


def save_model(folder: Path, seed: int = 0) -> int:
    """Build the pipeline and write it with `save_pretrained`; gives its number of parameters."""
    pipe = build_pipeline(seed)
    pipe.save_pretrained(folder)
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder)
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def _sharpen(transformer: Any) -> None:
    """Scale the query and key norms of self-attention by `SHARPNESS`."""
    for name, parameter in transformer.named_parameters():
        if name.endswith(("attn1.norm_q.weight", "attn1.norm_k.weight")):
            parameter.data.mul_(SHARPNESS)


def _text_encoder(vocabulary: int) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=TEXT_DIM,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
