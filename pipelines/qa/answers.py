"""Answers of transformers' generative models, with what a user of sparse prefill wants to know of each."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import xattn_video.integrations.transformers  # noqa: F401  (repairs torchvision before transformers needs it)

# isort: split
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Answer:
    """One answer.

    `tokens` are the new ones, without the end of sequence. `prefill_seconds` is the time to the first of them, what
    comes before the language model included; `decode_seconds` that of all others. `first_logits` are those of the
    first token, float32 `[vocabulary]` on the CPU.
    """

    tokens: tuple[int, ...]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    first_logits: Tensor


class _Clock(BaseStreamer):  # type: ignore[misc]  # transformers is not type-checked
    """Notes when a generation began and its first token was there: `generate` hands every token over on the CPU."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first: float | None = None
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen and self.first is None:
            self.first = time.perf_counter()
        # The prompt is handed over before anything is computed.
        self._prompt_seen = True

    def end(self) -> None:
        pass


def generate_answer(model: Any, inputs: dict[str, Any], max_new_tokens: int) -> Answer:
    """Answer one prompt greedily.

    Args:
        model: a generative model of transformers.
        inputs: what its processor or tokenizer gave for one prompt, `input_ids` `[1, tokens]` among it.
        max_new_tokens: the longest answer, at least 1.
    """
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    clock = _Clock()
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            streamer=clock,
            return_dict_in_generate=True,
            output_logits=True,
        )
    finished = time.perf_counter()
    prompt_tokens = inputs["input_ids"].shape[1]
    tokens = output.sequences[0, prompt_tokens:].tolist()
    first = clock.first or finished
    return Answer(
        tuple(token for token in tokens if token not in ends),
        prompt_tokens,
        first - clock.started,
        finished - first,
        output.logits[0][0].float().cpu(),
    )


def first_token_divergence(dense: Tensor, sparse: Tensor) -> dict[str, float | None]:
    """How far the first token of two answers is apart.

    Args:
        dense, sparse: `Answer.first_logits` of the same prompt.

    Returns:
        `kl`: KL divergence of sparse from dense, sum of p_dense * log(p_dense / p_sparse), in nats; `logit_error`:
        largest difference of two logits, after both are shifted to sum to 0, since a shift changes no probability.
        None where it is not a finite number: with a NaN among the logits both, and the divergence where sparse
        excludes (-inf) what dense does not.
    """
    dense, sparse = dense.double(), sparse.double()
    expected, actual = torch.log_softmax(dense, 0), torch.log_softmax(sparse, 0)
    # A token that dense excludes (-inf) adds nothing.
    terms = torch.where(expected.isinf(), 0.0, expected.exp() * (expected - actual))
    finite = dense.isfinite() & sparse.isfinite()
    apart = (dense[finite] - dense[finite].mean()) - (sparse[finite] - sparse[finite].mean())
    broken = bool(dense.isnan().any() or sparse.isnan().any() or not finite.any())
    # Rounding may take the sum below 0; a NaN stays one.
    kl, logit_error = float(terms.sum().clamp_min(0)), float("nan") if broken else float(apart.abs().max())
    return {name: value if math.isfinite(value) else None for name, value in (("kl", kl), ("logit_error", logit_error))}
