"""Ask a video-understanding model about videos, with dense or sparse prefill: the program behind `xattn-video qa`.

questions -> sampled frames -> answers, dense and sparse of one question after the other -> answers.jsonl, a summary
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from json import dumps
from pathlib import Path
from typing import Any, TextIO, TypedDict

from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.batch import Batch, ItemError, Key, is_out_of_memory, note_plan
from xattn_video_pipelines.common.environment import device_name, versions
from xattn_video_pipelines.common.errors import UserError, one_line
from xattn_video_pipelines.common.files import claimed, make_writable, write_texts
from xattn_video_pipelines.common.program import for_people
from xattn_video_pipelines.common.schema import Count, Seconds, Share
from xattn_video_pipelines.common.settings import Json, option_name
from xattn_video_pipelines.common.tables import aligned
from xattn_video_pipelines.common.terminal import is_quiet, say
from xattn_video_pipelines.qa.frames import SampledVideo, sample_video
from xattn_video_pipelines.qa.load import (
    VIDEO_MODEL,
    Row,
    load_model,
    reach,
    read_answers,
    weights_of,
)
from xattn_video_pipelines.qa.questions import Question, check_answer, check_options, check_text, read_questions
from xattn_video_pipelines.qa.settings import ANSWERS, DEMO, SUMMARY, QaSettings

EXAMPLE = """\
example:
  xattn-video qa --video cat.mp4 --question "What does the cat do?"
  xattn-video qa --video cat.mp4 --question "Which animal?" --options dog cat --answer cat --attention both
  xattn-video qa --items questions.jsonl --attention both --out answers
  xattn-video qa --model demo --video demo-out/answers/story.mp4 --question "What colour was the second shape?"
"""


_PACKAGES = ("xattn-video", "torch", "triton", "transformers")


class _Answer(TypedDict):
    """What is taken from an answer of an earlier run."""

    id: str
    attention: str
    reply: str
    right: bool | None
    agrees: bool | None
    finite: bool
    prompt_tokens: Count
    prefill_seconds: Seconds
    decode_seconds: Seconds
    sparse_density: Share | None
    kl: float | None
    logit_error: float | None


def command(settings: QaSettings, *, json: Json = False) -> int:
    """`xattn-video qa`: answer everything, print and write it; 0, or 3 if a question failed. Raises UserError."""
    document, batch = _answer_questions(settings, partial(print_answer, file=for_people(json)))
    say(dumps(document) if json else summary_table(document))
    for line in batch.told():
        say(line, sys.stderr)
    return batch.code


def answer_questions(settings: QaSettings, on_answer: Callable[[Row], None] | None = None) -> dict[str, Any]:
    """Ask what the settings ask, and write the answers and their summary where there is an `out`.

    Args:
        settings: the questions, the model, and the attention. Answers of an earlier run in `out` are kept.
        on_answer: called with each new answer.

    Returns:
        As of `summary`.

    Raises:
        UserError: a file is missing or damaged, or the model cannot be loaded or made sparse.
        SomeFailed: some questions failed, or `max_hours` was over; raised when all others are answered.
    """
    document, batch = _answer_questions(settings, on_answer)
    batch.check()
    return document


def _answer_questions(settings: QaSettings, on_answer: Callable[[Row], None] | None) -> tuple[dict[str, Any], Batch]:
    """The summary of all answers that there are, and what failed."""
    batch = Batch(settings.out, "questions", versions(_PACKAGES), settings.max_hours)
    questions = _questions(settings)
    if settings.out is None:
        return _summary_of_all(settings, questions, {}, batch, on_answer), batch
    make_writable(settings.out)
    path = settings.out / ANSWERS
    # Of several processes one asks, and the others find its answers.
    with claimed(path, wait=True):
        earlier = read_answers(path, ("id", "attention"), _signature(settings), weights_of(settings.model), _Answer)
        rows = _still_valid(earlier, questions, settings.configurations)
        note_plan(settings.out, "answers", list(settings.configurations), [(asked.id, None) for asked in questions])
        document = _summary_of_all(settings, questions, rows, batch, on_answer)
        write_texts({settings.out / SUMMARY: dumps(document, indent=2) + "\n"})
    return document, batch


def _summary_of_all(
    settings: QaSettings,
    questions: Sequence[Question],
    rows: dict[tuple[str, str], Row],
    batch: Batch,
    on_answer: Callable[[Row], None] | None,
) -> dict[str, Any]:
    """The summary of all answers that there are, after the questions that `rows` lacks were asked."""
    configs = settings.configurations
    wanted = [(question, label) for question in questions for label in configs]
    if any((question.id, label) not in rows for question, label in wanted):
        _answer_all(settings, questions, configs, rows, batch, on_answer)
    document = summary([rows[question.id, label] for question, label in wanted if (question.id, label) in rows])
    document["failures"] = batch.brief()
    return document


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Means over the answers of each attention, and where both answered, how far sparse is from dense.

    `accuracy` is over the questions whose answer is known. `unreadable` counts the replies that say nothing that could
    be right or wrong, such as one that chooses no option; the accuracy has them as not right. `agreement` is the share
    of equal replies (with options, of equal choices). `kl` and `logit_error` are those of the first token,
    `answering.first_token_divergence`.
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
            "unreadable": sum(row["unreadable"] for row in own),
            **{name: _mean(own, name) for name in ("prompt_tokens", "prefill_seconds", "decode_seconds")},
            "sparse_density": _mean(own, "sparse_density"),
            "agreement": _mean(compared, "agrees"),
            "kl": _mean(compared, "kl"),
            "logit_error": _mean(compared, "logit_error"),
            "not_finite": sum(not row["finite"] for row in own),
        }
    return {"configurations": configurations}


def summary_table(document: dict[str, Any]) -> str:
    """The summary for people: a line a configuration."""
    heads = {
        "answers": "answers", "accuracy": "right", "unreadable": "unreadable", "prompt_tokens": "tokens",
        "prefill_seconds": "prefill s", "decode_seconds": "decode s", "sparse_density": "density",
        "agreement": "as dense", "kl": "KL of 1st token",
    }  # fmt: skip
    styles = {"answers": "d", "accuracy": ".1%", "unreadable": "d", "prompt_tokens": ",.0f", "agreement": ".1%"}
    styles["kl"] = ".2g"
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
    settings: QaSettings,
    questions: Sequence[Question],
    configs: dict[str, Any],
    rows: dict[tuple[str, str], Row],
    batch: Batch,
    on_answer: Callable[[Row], None] | None,
) -> None:
    """Answer the questions that lack an answer, each by every configuration, and add them to `rows` and the file."""
    from tqdm.auto import tqdm

    if settings.model != DEMO:
        # Before seconds of imports.
        reach(settings.model)
    from xattn_video.integrations.transformers import use_xattention

    model, processor = load_video_model(settings)
    try:
        # Before minutes of decoding: whether the model can be sparse at all, and the settings fit it.
        for config in configs.values():
            if config is not None:
                use_xattention(model, config)
    except ValueError as error:
        raise UserError(f"--model {settings.model}: {error}") from None
    left = [question for question in questions if any((question.id, label) not in rows for label in configs)]
    left = batch.in_order(left, _key)
    prompts = Prompts(settings, model, processor)
    warm = len(configs) == 1
    for question in tqdm(batch.items(left), total=len(left), desc="questions", disable=True if is_quiet() else None):
        made: list[Row] = []
        # A single question is all that there is: what is wrong with it ends the run.
        with contextlib.nullcontext() if settings.items is None else batch.item(_key(question), question.id):
            video, inputs = prompts.of(question)
            if not warm:
                # Compilers and caches run once: else that would be the difference between the two.
                for config in configs.values():
                    _generate(model, config, question, inputs, 1)
                warm = True
            # All of a question's answers are written together: the comparison of two needs both.
            made = _answer(settings, model, processor, question, video, inputs, configs)
        if settings.out is not None:
            jsonl.append(settings.out / ANSWERS, made)
        for row in made:
            rows[question.id, row["attention"]] = row
            if on_answer:
                on_answer(row)


def load_video_model(settings: QaSettings) -> tuple[Any, Any]:
    """The model that is asked, and its processor.

    Raises:
        UserError: as `load_model`, or the model takes no videos.
    """
    from xattn_video_pipelines.qa.qwen_positions import repair_positions

    model, processor = load_model(
        settings.model, VIDEO_MODEL, "AutoProcessor", device=settings.device, dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
    )  # fmt: skip
    repair_positions(model)
    if getattr(processor, "video_processor", None) is None or not processor.chat_template:
        raise UserError(f"--model {settings.model}: its processor takes no video in a chat")
    # --max-frames and --max-pixels say what is seen; some processors would share a budget out among frames besides.
    if hasattr(processor.video_processor, "cap_pixels_per_frame"):
        processor.video_processor.cap_pixels_per_frame = False
    return model, processor


class Prompts:
    """What a model is called with for each question; the frames of a video are kept for the next question about it."""

    def __init__(self, settings: QaSettings, model: Any, processor: Any) -> None:
        self._settings, self._model, self._processor = settings, model, processor
        self._seen: tuple[Path, SampledVideo] | None = None

    def of(self, question: Question) -> tuple[SampledVideo, dict[str, Any]]:
        """The frames of the question's video, and the arguments of the model.

        Raises:
            UserError: the video is damaged, or the processor refuses it.
        """
        if self._seen is None or self._seen[0] != question.video:
            self._seen = question.video, sample_video(question.video, **_sampling(self._settings))
            if said := self._seen[1].complaint:
                _warn(f"{question.video}: ffmpeg says of it: {said}; the frames that it gives are used")
        video = self._seen[1]
        inputs = _inputs(self._settings, self._processor, question, video, self._model)
        tokens, config = inputs["input_ids"].shape[1], self._model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and tokens > positions:
            _warn(
                f"{question.id}: {tokens:,} tokens, and the model was made for {positions:,}; its answer may be worse "
                "than with --fps, --max-frames or --max-pixels of less"
            )
        return video, inputs


def _warn(line: str) -> None:
    """A warning on stderr that does not tear the bar there."""
    say(f"warning: {line}", sys.stderr)


def prompts_of(
    settings: QaSettings, model: Any, processor: Any, questions: Sequence[Question]
) -> Iterator[dict[str, Any]]:
    """What the model is called with for each question; a bar on stderr tells how far it is. Raises as `Prompts.of`."""
    from tqdm.auto import tqdm

    prompts = Prompts(settings, model, processor)
    for question in tqdm(questions, desc="questions", disable=True if is_quiet() else None):
        yield prompts.of(question)[1]


def _answer(
    settings: QaSettings,
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
        answer, told = _generate(model, config, question, inputs, settings.max_new_tokens)
        reply = processor.tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
        row: Row = {
            "id": question.id, "video": str(question.video), **_asked(question),
            "attention": label, "reply": reply, **_marked(question, reply),
            "frames": len(video.frames), "fps": video.fps, "prompt_tokens": answer.prompt_tokens,
            "prefill_seconds": round(answer.prefill_seconds, 4), "decode_seconds": round(answer.decode_seconds, 4),
            "sparse_density": told.get("sparse_density"), "dense_calls": told.get("dense_calls", {}),
            "agrees": None, "kl": None, "logit_error": None,
            "finite": bool(answer.first_logits.max().isfinite()), **_signature(settings),
            "weights": weights_of(settings.model),
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
    from xattn_video.integrations.transformers import stop_xattention, use_xattention
    from xattn_video_pipelines.qa.answers import generate_answer

    stop_xattention(model)
    stats = None if config is None else use_xattention(model, config)
    try:
        answer = generate_answer(model, inputs, max_new_tokens)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ItemError(
            "out_of_memory",
            f"{question.id}: {model.device} is out of memory with {inputs['input_ids'].shape[1]:,} tokens; "
            "try --fps, --max-frames or --max-pixels with less",
        ) from error
    return answer, {} if stats is None else stats.summary()


def _inputs(
    settings: QaSettings, processor: Any, question: Question, video: SampledVideo, model: Any
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
        raise UserError(f"{question.id}: the processor of --model {settings.model} refuses it: {reason}") from None
    return {
        name: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for name, value in inputs.items()
    }


def print_answer(row: Row, file: TextIO | None = None) -> None:
    """A line about an answer on stdout, or in `file`; it does not tear the bar on stderr."""
    mark = "unreadable" if row["unreadable"] else {True: "right", False: "wrong", None: ""}[row["right"]]
    density = "" if row["sparse_density"] is None else f"density {row['sparse_density']:.2f}"
    parts = (f"{row['prompt_tokens']:,} tokens", f"prefill {row['prefill_seconds']:.2f} s", density, mark)
    line = f"{row['id']}  {row['attention']}: {row['reply']}  ({', '.join(part for part in parts if part)})"
    say(line, file, progress=True)


def _questions(settings: QaSettings) -> list[Question]:
    if settings.items is not None:
        return read_questions(settings.items)
    assert settings.video is not None
    assert settings.question is not None
    video = settings.video
    for name in ("question", "options", "answer"):
        check_text(option_name(name), getattr(settings, name))
    if not video.is_file():
        raise UserError(f"--video {video}: no such video file")
    options = check_options("--options", settings.options)
    answer = check_answer("--answer", settings.answer, options)
    return [Question("question", video, settings.question, options, answer)]


def _key(question: Question) -> Key:
    return None, question.id, None


def _sampling(settings: QaSettings) -> dict[str, Any]:
    return {"fps": settings.frames_per_second, "max_frames": settings.max_frames, "max_pixels": settings.max_pixels}


def _signature(settings: QaSettings) -> Row:
    """What must be equal for an answer to be taken from an earlier run."""
    names = ("model", "max_frames", "max_pixels", "max_new_tokens", "dtype")
    return {"asked_fps": settings.frames_per_second, **{name: getattr(settings, name) for name in names}}


def _asked(question: Question) -> Row:
    """What must be equal for an answer to a question of this id to be taken from an earlier run; else it is asked."""
    file = question.video.stat()
    # Each write changes the last of these, and nobody can set it.
    digest = _digest(question.video, file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns)
    return {"question": question.question, "options": list(question.options), "video_sha256": digest}


@cache
def _digest(path: Path, *_state: int) -> str:
    """The SHA-256 of a video. Size and time cannot tell it from another one that took its place within a moment.

    A copied folder keeps its answers too. Reading a video takes far less time than its answer.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _marked(question: Question, reply: str) -> Row:
    """What a row says of its reply. One that cannot be read is not right, and counted apart from wrong ones."""
    return {"answer": question.answer, "right": question.right(reply), "unreadable": question.unreadable(reply)}


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
            valid[question.id, label] = {**row, **_marked(question, row["reply"])}
    return valid


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return sum(values) / len(values) if values else None
