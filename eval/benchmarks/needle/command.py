"""Does a language model still find what stands in a long prompt when its prefill is sparse?

    items of each task, length and depth  ->  answers, dense and sparse  ->  accuracy over length and depth

Answers are appended to answers.jsonl one by one, so a run that was killed goes on. needle.png is the accuracy as heat
maps, dense beside sparse. `eval/benchmarks/needle/items.py` says what is asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from json import dumps
from pathlib import Path
from typing import Any

from xattn_video import XAttnConfig
from xattn_video_eval.benchmarks.needle.items import Item, make_item, score
from xattn_video_eval.benchmarks.needle.settings import NeedleSettings
from xattn_video_eval.results import provenance
from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.environment import device_name
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import make_writable, write_texts
from xattn_video_pipelines.common.program import for_people, run_alone
from xattn_video_pipelines.common.run_file import note_run
from xattn_video_pipelines.common.settings import Json
from xattn_video_pipelines.common.tables import aligned
from xattn_video_pipelines.common.terminal import is_quiet, say
from xattn_video_pipelines.qa import (
    load_model,
    read_answers,
    weights_of,
)

EXAMPLE = """\
example:
  xattn-video needle --model Qwen/Qwen3-8B --lengths 8192 16384 32768 65536 --out needle
  xattn-video needle --model Qwen/Qwen3-8B --tasks tracking --stride 16 --threshold 0.95 --out tracking
"""

ANSWERS, SUMMARY, PICTURE = "answers.jsonl", "summary.json", "needle.png"
_NEW_TOKENS = 48


def main(arguments: list[str] | None = None) -> int:
    """`python -m xattn_video_eval.benchmarks.needle`: 0, or 2 with one line for bad input."""
    return run_alone(command, "xattn_video_eval.benchmarks.needle", __doc__ or "", EXAMPLE, arguments)


def command(settings: NeedleSettings, *, json: Json = False) -> int:
    """`xattn-video needle`: tables and pictures; 0. Raises UserError."""
    with contextlib.redirect_stdout(for_people(json)):
        summary = needle(settings)
    if json:
        print(dumps(summary))
    return 0


def needle(settings: NeedleSettings) -> dict[str, Any]:
    """Answer what is not yet answered, print the table, and write the summary and the picture to `settings.out`.

    Returns:
        What summary.json holds: accuracy, density and time of prefill of each configuration.

    Raises:
        UserError: the model cannot be loaded, made sparse or asked, or `out` holds answers of other settings.
    """
    configs = settings.configurations
    make_writable(settings.out)
    note_run(settings.out)
    model, tokenizer = load_model(
        settings.model, "AutoModelForCausalLM", "AutoTokenizer", device=settings.device, dtype=settings.dtype
    )
    rows = read_answers(settings.out / ANSWERS, ("label", "key"), _signature(settings), weights_of(settings.model))
    items = list(_items(settings, tokenizer))
    for label, config in configs.items():
        _answer_all(settings, model, tokenizer, items, label, config, rows)
    wanted = [rows[label, item.key] for label in configs for item in items]
    summary = {
        "model": settings.model,
        "configurations": {label: _means(rows, label, items) for label in configs},
        "device_name": device_name(model.device),
        **provenance("transformers"),
    }
    write_texts({settings.out / SUMMARY: dumps(summary, indent=2) + "\n"})
    say(table(wanted))
    if _draw(wanted, settings.out / PICTURE):
        say(f"picture: {settings.out / PICTURE}")
    return summary


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy in percent by task and length, a column a configuration, with density and time of prefill."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    lines = [["task", "tokens", *(f"{name} {what}" for name in labels for what in ("right", "density", "prefill s"))]]
    for task, length in dict.fromkeys((row["task"], row["length"]) for row in rows):
        line = [task, f"{length:,}"]
        for label in labels:
            of = [r for r in rows if (r["label"], r["task"], r["length"]) == (label, task, length)]
            line.append(f"{100 * _mean(of, 'score'):.0f} %")
            line.append("-" if of[0]["sparse_density"] is None else f"{_mean(of, 'sparse_density'):.3f}")
            line.append(f"{_mean(of, 'prefill_seconds'):.2f}")
        lines.append(line)
    return aligned(lines)


def _answer_all(
    settings: NeedleSettings,
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    label: str,
    config: XAttnConfig | None,
    rows: dict[tuple[str, str], dict[str, Any]],
) -> None:
    """Answer the items that `rows` lacks for this configuration, adding each to it and to the file."""
    import torch
    from tqdm.auto import tqdm

    from xattn_video.integrations.transformers import stop_xattention, use_xattention
    from xattn_video_pipelines.qa import Answer, generate_answer

    left = [item for item in items if (label, item.key) not in rows]
    try:
        stats = None if config is None or not left else use_xattention(model, config)
    except ValueError as error:
        raise UserError(f"--model {settings.model}: {error}") from None

    def ask(item: Item, most_tokens: int) -> Answer:
        inputs = _inputs(settings, tokenizer, item, model.device)
        try:
            return generate_answer(model, inputs, most_tokens)
        except torch.OutOfMemoryError:
            tokens = inputs["input_ids"].shape[1]
            raise UserError(f"{item.key}: {model.device} is out of memory with {tokens:,} tokens") from None

    if left:
        # what is compiled or made at the first call is no part of any prefill
        ask(min(left, key=lambda item: item.length), 1)
    for item in tqdm(left, desc=label, disable=True if is_quiet() else None):
        if stats is not None:
            stats.reset()
        answer = ask(item, _NEW_TOKENS)
        summary = None if stats is None else stats.summary()
        reply = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        row = {
            "label": label, "key": item.key, "task": item.task, "length": item.length, "depth": item.depth,
            "sample": item.sample, "answers": item.answers, "reply": reply, "score": score(item.answers, reply),
            "prompt_tokens": answer.prompt_tokens, "prefill_seconds": round(answer.prefill_seconds, 4),
            "decode_seconds": round(answer.decode_seconds, 4),
            "sparse_density": None if summary is None else summary["sparse_density"],
            "dense_calls": {} if summary is None else summary["dense_calls"], **_signature(settings),
            "weights": weights_of(settings.model),
        }  # fmt: skip
        jsonl.append(settings.out / ANSWERS, [row])
        rows[label, item.key] = row
    stop_xattention(model)


def _items(settings: NeedleSettings, tokenizer: Any) -> Iterator[Item]:
    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    try:
        for task in settings.tasks:
            for length in settings.lengths:
                for depth in settings.depths:
                    for sample in range(settings.samples):
                        yield make_item(task, length, depth, sample, count)
    except ValueError as error:
        raise UserError(str(error)) from None


def _inputs(settings: NeedleSettings, tokenizer: Any, item: Item, device: Any) -> dict[str, Any]:
    if tokenizer.chat_template and settings.chat:
        messages = [{"role": "user", "content": item.prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt", enable_thinking=False
        )
    else:
        inputs = tokenizer(item.prompt, return_tensors="pt", return_token_type_ids=False)
    return {name: value.to(device) for name, value in inputs.items()}


def _signature(settings: NeedleSettings) -> dict[str, Any]:
    """What must be equal for an answer to be taken from an earlier run."""
    return {"model": settings.model, "chat": settings.chat, "dtype": settings.dtype}


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return float(sum(row[name] for row in rows) / len(rows))


def _means(rows: dict[tuple[str, str], dict[str, Any]], label: str, items: Sequence[Item]) -> dict[str, Any]:
    own = [rows[label, item.key] for item in items]
    tasks = list(dict.fromkeys(item.task for item in items))
    sparse = [row for row in own if row["sparse_density"] is not None]
    return {
        "items": len(own),
        "score": _mean(own, "score"),
        "score_by_task": {task: _mean([row for row in own if row["task"] == task], "score") for task in tasks},
        "sparse_density": _mean(sparse, "sparse_density") if sparse else None,
        "prefill_seconds": _mean(own, "prefill_seconds"),
    }


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Heat maps of accuracy, a row a task and a column a configuration; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    labels, tasks, lengths, depths = (
        list(dict.fromkeys(row[name] for row in rows)) for name in ("label", "task", "length", "depth")
    )
    figure = Figure(figsize=(1.6 + 3.2 * len(labels), 0.8 + 2.4 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), len(labels), squeeze=False)
    for line, task in zip(axes, tasks, strict=True):
        for ax, label in zip(line, labels, strict=True):
            cells = [
                [
                    _mean(
                        [r for r in rows if (r["label"], r["task"], r["length"], r["depth"]) == (label, task, n, d)],
                        "score",
                    )
                    for n in lengths
                ]
                for d in depths
            ]
            image = ax.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            ax.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            ax.set_yticks(range(len(depths)), [f"{depth:g} %" for depth in depths])
            ax.set(title=f"{task}, {label}", xlabel="prompt tokens", ylabel="depth of the needle")
            for y, values in enumerate(cells):
                for x, value in enumerate(values):
                    ax.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color="w" if value < 0.6 else "k")
    figure.colorbar(image, ax=axes, label="share of answers that are right")
    figure.savefig(path, dpi=110)
    return True
