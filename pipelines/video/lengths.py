"""Prompts that are longer than the model reads: what comes after that has no effect, and nothing else says so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from xattn_video_pipelines.video.models import Model
from xattn_video_pipelines.video.prompts import Prompt


def told_of_long_prompts(pipe: Any, model: Model, prompts: Iterable[Prompt]) -> list[str]:
    """A line for each prompt of which the pipeline reads only the first tokens, with the numbers.

    Args:
        pipe: the loaded pipeline. One without a tokenizer is asked nothing.
        model: what it is.
        prompts: each is told of once, also if it is there several times.
    """
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None:
        return []
    parameter = model.parameters.get("max_sequence_length")
    most = getattr(pipe, "tokenizer_max_length", tokenizer.model_max_length) if parameter is None else parameter.default
    lines = []
    for prompt in dict.fromkeys(prompts):
        for name, text in (("prompt", prompt.text), ("negative prompt", prompt.negative_prompt)):
            # Without the tokenizer's own warning, which tells neither the prompt nor what follows.
            tokens = 0 if text is None else len(tokenizer(text, verbose=False).input_ids)
            if tokens > most:
                lines.append(
                    f"warning: {prompt.id}: its {name} has {tokens} tokens, and {model.name} reads the first {most}; "
                    "the rest has no effect"
                )
    return lines
