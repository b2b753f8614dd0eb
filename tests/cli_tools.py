"""What the command-line tests share: small pipelines saved on disk, and the command run in this process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from xattn_video_pipelines.cli import main

# 3 latent frames of 4 x 4 patches: 48 tokens, three blocks of 16
SIZE = ("--height", "64", "--width", "64", "--num-frames", "9", "--steps", "2")
SPARSE = ("--min-tokens", "0", "--block-size", "16", "--warmup-steps", "1")
SPARSE_LABEL = "xattn-s8-t0.90-w1-b16-m0"
TINY_TOKENS = 48


class Result(NamedTuple):
    """What a command gave: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


def run_command(capfd: pytest.CaptureFixture[str], *arguments: object) -> Result:
    """Run `xattn-video ...` in this process."""
    capfd.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capfd.readouterr()
    return Result(code, captured.out, captured.err)


def save_tiny_wan(folder: Path) -> Path:
    """A whole Wan pipeline with text encoder and tokenizer, in `save_pretrained`'s layout."""
    from tests.tiny.wan_family import T2V

    T2V.build(0, text_encoder=tiny_text_encoder, tokenizer=tiny_tokenizer).save_pretrained(folder)
    return folder


def save_tiny_image_to_video(folder: Path) -> Path:
    """The same for image-to-video."""
    from tests.tiny.wan_family import I2V_5B

    I2V_5B.build(0, text_encoder=tiny_text_encoder, tokenizer=tiny_tokenizer).save_pretrained(folder)
    return folder


def save_tiny_cogvideox(folder: Path) -> Path:
    """A whole pipeline of a model that computes its attention by itself."""
    from tests.tiny.not_dispatching import HEADS

    from diffusers import (  # isort: skip
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    CogVideoXPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(),
        vae=AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
        ),
        transformer=CogVideoXTransformer3DModel(**HEADS, in_channels=4, out_channels=4, text_embed_dim=16),
        scheduler=CogVideoXDDIMScheduler(),
    ).save_pretrained(folder)
    return folder


def tiny_tokenizer() -> Any:
    """Bytes as tokens, with T5's special ones: every prompt has a spelling."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    symbols = ["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def tiny_text_encoder() -> Any:
    """UMT5 with one layer for `tiny_tokenizer`'s 259 tokens."""
    from transformers import UMT5Config, UMT5EncoderModel

    from tests.tiny.wan_family import TEXT_DIM

    config = UMT5Config(vocab_size=259, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return UMT5EncoderModel(config).eval()


def tool(capfd: pytest.CaptureFixture[str]) -> Run:
    """`run_command` with its capture bound."""
    return partial(run_command, capfd)
