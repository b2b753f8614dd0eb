"""Time to the first token of a language model, dense and sparse: `xattn-video bench --model NAME`.

    a long prompt for each length -> gate: threshold 1 gives dense logits -> rounds of (dense, sparse), interleaved

What is timed is the whole prefill, every layer and the last token's logits included, so the speed-up is below that of
attention alone; the ideal beside it is attention's, `1 / (density + 1 / (2 * stride))`. The prompts are those of
`xattn_video_eval.benchmarks.needle`: English sentences about nothing. Density depends on what is read.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xattn_video import XAttnConfig
from xattn_video_eval.bench.settings import BenchSettings
from xattn_video_eval.bench.timing import seconds_of
from xattn_video_eval.benchmarks.needle import make_item
from xattn_video_eval.results import RESULTS, append_rows, provenance
from xattn_video_pipelines.common.environment import device_name
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.tables import aligned
from xattn_video_pipelines.common.terminal import say
from xattn_video_pipelines.qa import load_model

LEDGER = RESULTS / "first_token.jsonl"
TOKENS = (4096, 8192, 16384)


def time_first_token(settings: BenchSettings) -> dict[str, Any]:
    """Measure `settings.model` and print a row for each length.

    Returns:
        JSON values: `ok`, `failures` where the gate failed, and `rows`.

    Raises:
        UserError: the model cannot be loaded, or a length is too short.
    """
    assert settings.model is not None
    dtype = settings.dtype[0] if settings.dtype else "auto"
    config = settings.config.replace(warmup_steps=0)
    model, tokenizer = load_model(
        settings.model, "AutoModelForCausalLM", "AutoTokenizer", device=settings.device, dtype=dtype
    )
    prompts = [_prompt(tokenizer, length).to(model.device) for length in settings.tokens or TOKENS]
    failures = _gate(model, min(prompts, key=lambda prompt: prompt.shape[1]), config)
    rows = []
    for prompt in prompts if not failures else []:
        rows.append({"model": settings.model, **_measure(model, prompt, config, settings.rounds)})
    if rows:
        print(table(rows))
    for failure in failures:
        print(f"wrong result, nothing timed: {failure}")
    if settings.record and rows:
        append_rows(LEDGER, rows)
    return {"ok": not failures, "failures": failures, "rows": rows}


def table(rows: list[dict[str, Any]]) -> str:
    """A line a length."""
    lines = [("tokens", "density", "dense s", "sparse s", "speed-up", "of medians", "ideal of attention")]
    for row in rows:
        best = row["best_seconds"]
        lines.append(
            (
                f"{row['tokens']:,}",
                "-" if row["density"] is None else f"{row['density']:.3f}",
                f"{best['dense']:.3f}",
                f"{best['sparse']:.3f}",
                f"{row['speedup']:.2f}x",
                f"{row['speedup_of_medians']:.2f}x",
                "-" if row["ideal_of_attention"] is None else f"{row['ideal_of_attention']:.2f}x",
            )
        )
    return aligned(lines)


def _prompt(tokenizer: Any, length: int) -> Tensor:
    """A text of at most `length` tokens and nearly as many, `[1, tokens]`."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    try:
        text = make_item("single", length, 50.0, 0, count).prompt
    except ValueError as error:
        raise UserError(f"--tokens: {error}") from None
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids
    return ids


def _gate(model: Any, prompt: Tensor, config: XAttnConfig) -> list[str]:
    """With threshold 1 the logits of the last token are those of dense attention."""
    dense = _logits(model, prompt, None)
    exact = _logits(model, prompt, config.replace(threshold=1.0))
    error = float((exact - dense).norm() / dense.norm())
    # Each layer rounds its output once more in another order.
    allowed = 8 * torch.finfo(model.dtype).eps
    return [] if error <= allowed else [f"threshold 1 is off dense logits by {error:.2e}, allowed {allowed:.2e}"]


def _measure(model: Any, prompt: Tensor, config: XAttnConfig, rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"dense": [], "sparse": []}
    summary: dict[str, Any] = {}
    sides = {"dense": None, "sparse": config}
    for done in range(rounds + 1):
        told = "warm-up" if done == 0 else f"round {done} of {rounds}"
        say(f"{prompt.shape[1]:,} tokens: {told}", sys.stderr, progress=True)
        for name, side in sides.items():
            stats = _attach(model, side)
            taken = seconds_of(partial(_forward, model, prompt), model.device)
            if done:
                seconds[name].append(taken)
            if stats is not None:
                summary = stats.summary()
    _attach(model, None)
    best = {name: min(times) for name, times in seconds.items()}
    median = {name: statistics.median(times) for name, times in seconds.items()}
    density = summary["sparse_density"]
    return {
        "tokens": prompt.shape[1],
        "config": config.to_dict(),
        "density": density,
        "dense_calls": summary["dense_calls"],
        "seconds": seconds,
        "best_seconds": best,
        "median_seconds": median,
        "speedup": best["dense"] / best["sparse"],
        "speedup_of_medians": median["dense"] / median["sparse"],
        "ideal_of_attention": None if density is None else 1 / (density + 1 / (2 * config.stride)),
        "rounds": rounds,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device),
        **provenance("transformers", "triton"),
    }


def _attach(model: Any, config: XAttnConfig | None) -> Any:
    """Make the model sparse, or dense again for None; the statistics of a sparse one."""
    from xattn_video.integrations.transformers import stop_xattention, use_xattention

    stop_xattention(model)
    try:
        return None if config is None else use_xattention(model, config)
    except ValueError as error:
        raise UserError(f"--model: {error}") from None


def _logits(model: Any, prompt: Tensor, config: XAttnConfig | None) -> Tensor:
    _attach(model, config)
    logits = _forward(model, prompt).double()
    _attach(model, None)
    return logits


@torch.inference_mode()
def _forward(model: Any, prompt: Tensor) -> Tensor:
    """The logits of the first token to come, `[1, 1, vocabulary]`; the keys and values are kept as for an answer."""
    try:
        logits: Tensor = model(prompt, use_cache=True, logits_to_keep=1).logits
    except torch.OutOfMemoryError:
        raise UserError(f"--tokens: {model.device} is out of memory with {prompt.shape[1]:,} tokens") from None
    return logits
