"""Ask a video-understanding model about videos, with dense or sparse prefill: the program behind `xattn-video qa`.

questions -> sampled frames -> answers, dense and sparse of one question after the other -> answers.jsonl, a summary
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.environment import device_name
from xattn_video_pipelines.common.errors import UserError, one_line
from xattn_video_pipelines.common.files import make_writable, write_texts
from xattn_video_pipelines.common.tables import aligned
from xattn_video_pipelines.qa.frames import SampledVideo, check_sampling, sample_video
from xattn_video_pipelines.qa.load import (
    DEMO,
    VIDEO_MODEL,
    Row,
    add_attention_options,
    add_machine_options,
    configurations,
    load_model,
    read_answers,
    weights_of,
)
from xattn_video_pipelines.qa.questions import Question, check_answer, check_options, read_questions

MODEL = "Qwen/Qwen2-VL-7B-Instruct"
ANSWERS, SUMMARY = "answers.jsonl", "summary.json"
# The blocks of so many last tokens stay dense: the story study shows what a short question loses otherwise.
QUESTION_TOKENS = 64

EXAMPLE = """\
example:
  xattn-video qa --video cat.mp4 --question "What does the cat do?"
  xattn-video qa --video cat.mp4 --question "Which animal?" --options dog cat --answer cat --attention both
  xattn-video qa --items questions.jsonl --attention both --out answers
  xattn-video qa --model demo --video demo-out/answers/story.mp4 --question "What colour was the second shape?"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `xattn-video qa`."""
    parser.add_argument(
        "--model",
        default=MODEL,
        help=f"Hub id, local folder, or demo, a small one for the demo's videos (default: {MODEL})",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"{ANSWERS} and {SUMMARY} go there; a run goes on")

    group = parser.add_argument_group("what is asked")
    group.add_argument("--video", type=Path, metavar="FILE")
    group.add_argument("--question", metavar="TEXT")
    group.add_argument("--options", nargs="+", metavar="TEXT", help="answers to choose from")
    group.add_argument("--answer", metavar="TEXT", help="the right one")
    group.add_argument(
        "--items", type=Path, metavar="FILE.jsonl", help="many: video, question, and if wanted options, answer and id"
    )

    group = parser.add_argument_group("what the model sees")
    group.add_argument("--fps", type=float, help="frames a second (default: 1; the model demo: 2)")
    group.add_argument("--max-frames", type=int, default=768, metavar="N", help="of a video (768)")
    group.add_argument("--max-pixels", type=int, default=360 * 420, metavar="N", help="of a frame (151200)")

    group = parser.add_argument_group("attention")
    add_attention_options(group, stride=16, default="xattn", dense_last=QUESTION_TOKENS)

    group = parser.add_argument_group("machine")
    group.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of an answer (64)")
    add_machine_options(group)
    group.add_argument("--json", action="store_true", help="the summary as one JSON document on the last line")


def run(args: argparse.Namespace) -> int:
    """`xattn-video qa`: answer everything, print and write it; 0. Raises UserError."""
    args = argparse.Namespace(**{**vars(args), "fps": _fps(args)})
    questions = _questions(args)
    configs = configurations(args)
    check_sampling(**_sampling(args))
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be 1 or more, got {args.max_new_tokens}")
    rows: dict[tuple[str, str], Row] = {}
    if args.out is not None:
        make_writable(args.out)
        earlier = read_answers(args.out / ANSWERS, ("id", "attention"), _signature(args), weights_of(args.model))
        rows = _still_valid(earlier, questions, configs)
    wanted = [(question, label) for question in questions for label in configs]
    if any((question.id, label) not in rows for question, label in wanted):
        _answer_all(args, questions, configs, rows)
    document = summary([rows[question.id, label] for question, label in wanted])
    if args.out is not None:
        write_texts({args.out / SUMMARY: json.dumps(document, indent=2) + "\n"})
    print(json.dumps(document) if args.json else table(document))
    return 0


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Means over the answers of each attention, and where both answered, how far sparse is from dense.

    `accuracy` is over the questions whose answer is known, `agreement` the share of equal replies (with options, of
    equal choices), `kl` and `logit_error` are those of the first token, `answering.first_token_divergence`.
    `not_finite` counts the answers whose first logits were no numbers: nothing said of them means anything.
    """
    configurations = {}
    for label in dict.fromkeys(row["attention"] for row in rows):
        own = [row for row in rows if row["attention"] == label]
        known = [row["right"] for row in own if row["right"] is not None]
        compared = [row for row in own if row["agrees"] is not None]
        configurations[label] = {
            "answers": len(own),
            "accuracy": sum(known) / len(known) if known else None,
            "with_known_answer": len(known),
            **{name: _mean(own, name) for name in ("prompt_tokens", "prefill_seconds", "decode_seconds")},
            "sparse_density": _mean(own, "sparse_density"),
            "agreement": _mean(compared, "agrees"),
            "kl": _mean(compared, "kl"),
            "logit_error": _mean(compared, "logit_error"),
            "not_finite": sum(not row["finite"] for row in own),
        }
    return {"configurations": configurations}


def table(document: dict[str, Any]) -> str:
    """The summary for people: a line a configuration."""
    heads = {
        "answers": "answers", "accuracy": "right", "prompt_tokens": "tokens", "prefill_seconds": "prefill s",
        "decode_seconds": "decode s", "sparse_density": "density", "agreement": "as dense", "kl": "KL of 1st token",
    }  # fmt: skip
    styles = {"answers": "d", "accuracy": ".1%", "prompt_tokens": ",.0f", "agreement": ".1%", "kl": ".2g"}
    lines = [["attention", *heads.values()]]
    for label, values in document["configurations"].items():
        cells = ["-" if values[name] is None else format(values[name], styles.get(name, ".3f")) for name in heads]
        lines.append([label, *cells])
    told = [aligned(lines)]
    for label, values in document["configurations"].items():
        if count := values["not_finite"]:
            told.append(f"{label}: the logits of {count} answers are not finite; try --dtype bfloat16 or float32")
    return "\n".join(told)


def _answer_all(
    args: argparse.Namespace, questions: Sequence[Question], configs: dict[str, Any], rows: dict[tuple[str, str], Row]
) -> None:
    """Answer the questions that lack an answer, each by every configuration, and add them to `rows` and the file."""
    from tqdm.auto import tqdm

    from xattn_video.integrations.transformers import use_xattention
    from xattn_video_pipelines.qa.qwen_positions import mend_positions

    model, processor = load_model(args, VIDEO_MODEL, "AutoProcessor")
    mend_positions(model)
    if getattr(processor, "video_processor", None) is None or not processor.chat_template:
        raise UserError(f"--model {args.model}: its processor takes no video in a chat")
    # --max-frames and --max-pixels say what is seen; some processors would share a budget out among frames besides.
    if hasattr(processor.video_processor, "cap_pixels_per_frame"):
        processor.video_processor.cap_pixels_per_frame = False
    try:
        # Before minutes of decoding: whether the model can be sparse at all, and the settings fit it.
        for config in configs.values():
            if config is not None:
                use_xattention(model, config)
    except ValueError as error:
        raise UserError(f"--model {args.model}: {error}") from None
    left = [question for question in questions if any((question.id, label) not in rows for label in configs)]
    seen: tuple[Path, SampledVideo] | None = None
    for question in tqdm(left, desc="questions", disable=None):
        if seen is None or seen[0] != question.video:
            seen = question.video, sample_video(question.video, **_sampling(args))
        inputs = _inputs(args, processor, question, seen[1], model)
        if question is left[0] and len(configs) > 1:
            # Compilers and caches run once: else that would be the difference between the two.
            for config in configs.values():
                _generate(model, config, question, inputs, 1)
        # All of a question's answers are written together: the comparison of two needs both.
        made = _answer(args, model, processor, question, seen[1], inputs, configs)
        if args.out is not None:
            jsonl.append(args.out / ANSWERS, made)
        for row in made:
            rows[question.id, row["attention"]] = row
            tqdm.write(_line(row), file=sys.stdout if not args.json else sys.stderr)


def _answer(
    args: argparse.Namespace,
    model: Any,
    processor: Any,
    question: Question,
    video: SampledVideo,
    inputs: dict[str, Any],
    configs: dict[str, Any],
) -> list[Row]:
    """One question's answers, a row for each configuration."""
    from xattn_video_pipelines.qa.answers import first_token_divergence

    rows: list[Row] = []
    dense = None
    for label, config in configs.items():
        answer, told = _generate(model, config, question, inputs, args.max_new_tokens)
        reply = processor.tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
        row: Row = {
            "id": question.id, "video": str(question.video), **_asked(question),
            "attention": label, "reply": reply, "answer": question.answer, "right": question.right(reply),
            "frames": len(video.frames), "fps": video.fps, "prompt_tokens": answer.prompt_tokens,
            "prefill_seconds": round(answer.prefill_seconds, 4), "decode_seconds": round(answer.decode_seconds, 4),
            "sparse_density": told.get("sparse_density"), "dense_calls": told.get("dense_calls", {}),
            "agrees": None, "kl": None, "logit_error": None,
            "finite": bool(answer.first_logits.max().isfinite()), **_signature(args),
            "weights": weights_of(args.model),
            "device": device_name(model.device), "model_dtype": str(model.dtype).removeprefix("torch."),
        }  # fmt: skip
        if config is None:
            dense = answer, reply
        elif dense is not None:
            row["agrees"] = question.same(reply, dense[1])
            row |= first_token_divergence(dense[0].first_logits, answer.first_logits)
        rows.append(row)
    return rows


def _generate(
    model: Any, config: Any, question: Question, inputs: dict[str, Any], max_new_tokens: int
) -> tuple[Any, dict[str, Any]]:
    """An answer, dense where config is None, and the summary of its statistics."""
    import torch

    from xattn_video.integrations.transformers import stop_xattention, use_xattention
    from xattn_video_pipelines.qa.answers import generate_answer

    stop_xattention(model)
    stats = None if config is None else use_xattention(model, config)
    try:
        answer = generate_answer(model, inputs, max_new_tokens)
    except torch.OutOfMemoryError:
        raise UserError(
            f"{question.id}: {model.device} is out of memory with {inputs['input_ids'].shape[1]:,} tokens; "
            "try --fps, --max-frames or --max-pixels with less"
        ) from None
    return answer, {} if stats is None else stats.summary()


def _inputs(
    args: argparse.Namespace, processor: Any, question: Question, video: SampledVideo, model: Any
) -> dict[str, Any]:
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question.prompt}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    count = len(video.frames)
    metadata = {
        "fps": video.fps,
        "total_num_frames": count,
        "frames_indices": list(range(count)),
        "duration": count / video.fps,
    }
    try:
        inputs = processor(
            text=[text], videos=[video.frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
        )
    except (ValueError, IndexError, StopIteration) as error:
        reason = one_line(error, 200)
        raise UserError(f"{question.id}: the processor of --model {args.model} refuses it: {reason}") from None
    return {
        name: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for name, value in inputs.items()
    }


def _line(row: Row) -> str:
    mark = {True: "right", False: "wrong", None: ""}[row["right"]]
    density = "" if row["sparse_density"] is None else f"density {row['sparse_density']:.2f}"
    parts = (f"{row['prompt_tokens']:,} tokens", f"prefill {row['prefill_seconds']:.2f} s", density, mark)
    return f"{row['id']}  {row['attention']}: {row['reply']}  ({', '.join(part for part in parts if part)})"


def _questions(args: argparse.Namespace) -> list[Question]:
    if args.items is not None:
        given = [name for name in ("video", "question", "options", "answer") if getattr(args, name) is not None]
        if given:
            raise UserError(f"--items and --{given[0]} exclude each other")
        return read_questions(args.items)
    for name in ("video", "question"):
        if getattr(args, name) is None:
            raise UserError(f"needs --{name}, or a file of questions as --items")
    if not args.video.is_file():
        raise UserError(f"--video {args.video}: no such video file")
    options = check_options("--options", args.options or [])
    return [Question("question", args.video, args.question, options, check_answer("--answer", args.answer, options))]


def _fps(args: argparse.Namespace) -> float:
    if args.fps is not None:
        return args.fps
    if args.model != DEMO:
        return 1.0
    from xattn_video_pipelines.demo.watcher import FPS

    return FPS


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {"fps": args.fps, "max_frames": args.max_frames, "max_pixels": args.max_pixels}


def _signature(args: argparse.Namespace) -> Row:
    """What must be equal for an answer to be taken from an earlier run."""
    return {
        "model": args.model, "asked_fps": args.fps, "max_frames": args.max_frames, "max_pixels": args.max_pixels,
        "max_new_tokens": args.max_new_tokens, "dtype": args.dtype,
    }  # fmt: skip


def _asked(question: Question) -> Row:
    """What must be equal for an answer to a question of this id to be taken from an earlier run; else it is asked."""
    file = question.video.stat()
    return {
        "question": question.question, "options": list(question.options),
        "video_bytes": file.st_size, "video_changed": int(file.st_mtime),
    }  # fmt: skip


def _still_valid(
    rows: dict[tuple[str, str], Row], questions: Sequence[Question], configs: dict[str, Any]
) -> dict[tuple[str, str], Row]:
    """Earlier answers to these very questions, marked anew: the right answer may have been put right since.

    Where dense and sparse are asked for, a sparse answer that was never compared does not count.
    """
    valid = {}
    for question in questions:
        asked = _asked(question)
        for label in configs:
            row = rows.get((question.id, label))
            if row is None or any(row.get(name) != value for name, value in asked.items()):
                continue
            if len(configs) > 1 and configs[label] is not None and row["agrees"] is None:
                continue
            marked = {"answer": question.answer, "right": question.right(row["reply"])}
            valid[question.id, label] = {**row, **marked}
    return valid


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return sum(values) / len(values) if values else None
