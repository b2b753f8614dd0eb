"""The demo's text side: a word tokenizer for the captions and a small frozen UMT5 encoder.

The encoder is not trained. Its word vectors are orthogonal, so that no two words look alike, and its layers are
weak, so that a word keeps its vector whatever stands beside it: the transformer reads words, not their order.
"""

from __future__ import annotations

from typing import Any

from xattn_video_pipelines.demo import world
from xattn_video_pipelines.video import import_diffusers

# At least the vocabulary, so that its vectors can be orthogonal.
TEXT_DIM = 64
# What WanPipeline pads a prompt to.
MAX_TEXT_TOKENS = 512

_OTHER_WORDS = (
    "a an the on and that of in small little large big moving moves going standing stands still does not move "
    "background ,"
)
# How strongly a layer of the encoder adds to the word vectors.
_LAYER_GAIN = 0.1


def vocabulary() -> list[str]:
    """Every token in the order of its id: three special ones, then the captions' words."""
    words = [*world.COLOURS, *world.SHAPES, *world.MOTIONS, *world.BACKGROUNDS, *_OTHER_WORDS.split()]
    return ["<pad>", "</s>", "<unk>", *dict.fromkeys(words)]


def build_tokenizer() -> Any:
    """A tokenizer with one token a word, case ignored; unknown words are `<unk>`; `</s>` ends a text."""
    import_diffusers()
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", ids["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_TEXT_TOKENS,
    )


def build_text_encoder(seed: int = 0) -> Any:
    """A `UMT5EncoderModel` of two layers, made from `seed`; torch's global generator is left as it was."""
    import torch

    import_diffusers()
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(vocabulary()),
                d_model=TEXT_DIM,
                d_kv=16,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
            )
        )
        with torch.no_grad():
            # Rows of length sqrt(TEXT_DIM): the encoder's last norm divides by the mean square.
            torch.nn.init.orthogonal_(encoder.shared.weight, gain=TEXT_DIM**0.5)
            for name, weight in encoder.named_parameters():
                if name.endswith(("SelfAttention.o.weight", "DenseReluDense.wo.weight")):
                    weight.mul_(_LAYER_GAIN)
    return encoder.eval().requires_grad_(False)


def encode(tokenizer: Any, text_encoder: Any, texts: list[str]) -> Any:
    """What WanPipeline feeds its transformer, without most of the padding: float32 `[texts, longest + 1, TEXT_DIM]`.

    Padding is zeros, and each text is followed by at least one row of it. `MAX_TEXT_TOKENS` says how many rows of
    padding the pipeline itself would add.
    """
    import torch

    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    states = states * tokens.attention_mask[..., None]
    return torch.nn.functional.pad(states, (0, 0, 0, 1))
