"""`qa`: questions in, answers out, dense and sparse compared; sampled frames; and what is wrong with bad input."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.language_families import LAYERS, build, prompt, save_video_model
from xattn_video import XAttnConfig
from xattn_video_pipelines.cli import main
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.demo import world
from xattn_video_pipelines.qa.answers import first_token_divergence, generate_answer
from xattn_video_pipelines.qa.command import print_answer
from xattn_video_pipelines.qa.frames import sample_video
from xattn_video_pipelines.qa.questions import Question, read_questions
from xattn_video_pipelines.qa.settings import QaSettings
from xattn_video_pipelines.video.io import VideoError, read_video, write_video
from xattn_video_pipelines.video.models import sampled_digest

LABEL = "xattn-s8-t0.50-w0-b16-m0"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a video of 33 frames (4 s at 8 a second) and a file of three questions about it."""
    folder = tmp_path_factory.mktemp("qa")
    save_video_model(folder / "model")
    write_video(folder / "red.mp4", world.render(world.all_scenes()[0], 0), 8)
    items: list[dict[str, Any]] = [
        {"id": "colour", "video": "red.mp4", "question": "w5 w6 w7", "options": ["w8", "w9"], "answer": "w9"},
        {"video": "red.mp4", "question": "w10 w11", "answer": "the w12"},
        {"video": "red.mp4", "question": "w13"},
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def command(made: Path, *more: Any) -> list[str]:
    given = ["qa", "--model", made / "model", "--fps", 8, "--max-new-tokens", 5, "--device", "cpu", "--stride", 8]
    return [
        str(part)
        for part in (*given, "--threshold", 0.5, "--block-size", 16, "--min-tokens", 0, "--dense-last", 0, *more)
    ]


def test_by_default_prefill_is_sparse_as_in_the_paper_and_the_question_dense() -> None:
    ((_, config),) = QaSettings(video=Path("a.mp4"), question="w5").configurations.items()
    assert config == XAttnConfig.preset("qwen2-vl", dense_last=64, anchors=0)


def test_answers_of_other_weights_are_asked_anew(made: Path, tmp_path: Path, capfd: Any) -> None:
    shutil.copytree(made / "model", tmp_path / "model")
    asked = command(made, "--video", made / "red.mp4", "--question", "w5", "--out", tmp_path / "out", "--json")
    asked[asked.index("--model") + 1] = str(tmp_path / "model")
    path = tmp_path / "out" / "answers.jsonl"

    def replies() -> list[str]:
        sampled_digest.cache_clear()
        assert main(asked) == 0
        capfd.readouterr()
        return [json.loads(line)["reply"] for line in path.read_text().splitlines()]

    assert len(replies()) == 1
    path.write_text(json.dumps({**json.loads(path.read_text()), "reply": "of an earlier run"}) + "\n")
    assert replies() == ["of an earlier run"]
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    save_file({name: value + 0.01 for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert replies()[-1] != "of an earlier run"


def test_the_blocks_of_the_question_stay_dense_where_asked(made: Path, tmp_path: Path, capfd: Any) -> None:
    told = {}
    for last in (0, 32):
        asked = ("--video", made / "red.mp4", "--question", "w5", "--out", tmp_path / "out", "--json")
        assert main(command(made, *asked, "--attention", "xattn", "--dense-last", last)) == 0
        told |= json.loads(capfd.readouterr().out.splitlines()[-1])["configurations"]
    assert list(told) == [LABEL, f"{LABEL}-q32"]
    assert told[LABEL]["sparse_density"] < told[f"{LABEL}-q32"]["sparse_density"] < 1


def test_questions_are_answered_dense_and_sparse_and_a_killed_run_goes_on(
    made: Path, tmp_path: Path, capfd: Any
) -> None:
    ask = command(made, "--items", made / "items.jsonl", "--attention", "both", "--out", tmp_path / "out", "--json")
    assert main(ask) == 0
    printed = capfd.readouterr().out
    path = tmp_path / "out" / "answers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["id"], row["attention"]) for row in rows] == [
        (id, label) for id in ("colour", "0002", "0003") for label in ("dense", LABEL)
    ]
    for dense, sparse in zip(rows[::2], rows[1::2], strict=True):
        # 33 frames in pairs, 8 x 8 tokens each, and the words.
        assert dense["prompt_tokens"] == sparse["prompt_tokens"] > 17 * 64
        assert dense["frames"] == 33
        assert dense["sparse_density"] is None
        assert 0 < sparse["sparse_density"] < 0.9
        assert sparse["dense_calls"].keys() <= {"decode"}
        assert sparse["dense_calls"].get("decode", 0) <= 4 * LAYERS
        assert dense["agrees"] is None
        assert sparse["agrees"] in (True, False)
        assert sparse["kl"] > 0
        assert sparse["logit_error"] > 0
        assert min(dense["prefill_seconds"], dense["decode_seconds"]) > 0
    assert [row["right"] for row in rows[4:]] == [None, None]
    document = json.loads(printed)
    assert document == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert document["configurations"][LABEL]["answers"] == 3
    assert document["configurations"][LABEL]["with_known_answer"] == 2

    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:40])
    assert main(ask) == 0
    assert path.read_bytes().splitlines(keepends=True)[:3] == lines[:3]
    again = {(row["id"], row["attention"]): row for row in map(json.loads, path.read_text().splitlines())}
    assert {key: row["reply"] for key, row in again.items()} == {(r["id"], r["attention"]): r["reply"] for r in rows}


def test_a_run_that_is_complete_needs_the_model_no_more(made: Path, tmp_path: Path, capfd: Any) -> None:
    shutil.copytree(made / "model", tmp_path / "model")
    more = ("--video", made / "red.mp4", "--question", "w5", "--out", tmp_path / "out", "--model", tmp_path / "model")
    assert main(command(made, *more)) == 0
    shutil.rmtree(tmp_path / "model")
    assert main(command(made, *more)) == 0
    assert main(command(made, *more, "--attention", "dense")) == 2


def test_with_threshold_1_sparse_says_what_dense_says(made: Path, capfd: Any) -> None:
    ask = command(made, "--video", made / "red.mp4", "--question", "w5", "--attention", "both", "--threshold", 1)
    assert main([*ask, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["configurations"]["xattn-s8-t1.00-w0-b16-m0"]
    assert (found["agreement"], found["sparse_density"]) == (1.0, 1.0)
    assert found["kl"] < 1e-6
    assert found["logit_error"] < 1e-3


def test_for_people_there_is_a_line_an_answer_and_a_table(made: Path, capfd: Any) -> None:
    assert main(command(made, "--video", made / "red.mp4", "--question", "w5", "--options", "w6", "w7")) == 0
    lines = capfd.readouterr().out.splitlines()
    assert re.match(rf"question  {re.escape(LABEL)}: .*tokens, prefill .* s, density 0\.\d\d", lines[0])
    assert lines[1].split()[:3] == ["attention", "answers", "right"]
    assert lines[2].split()[:3] == [LABEL, "1", "-"]


def test_an_answer_tells_its_first_token_from_the_others_and_has_no_end_token(monkeypatch: Any) -> None:
    model, inputs = build("llama"), {"input_ids": prompt(1, 40), "attention_mask": torch.ones(1, 40)}
    now = 0.0

    def wait(_: Any, __: Any, given: dict[str, Any]) -> None:
        nonlocal now
        now += 0.2 if given["input_ids"].shape[1] > 1 else 0.05

    model.register_forward_pre_hook(wait, with_kwargs=True)
    model.generation_config.eos_token_id = None
    # A clock that only the model moves, because the real one also measures what else the machine does.
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    answer = generate_answer(model, inputs, 5)
    assert (len(answer.tokens), answer.prompt_tokens) == (5, 40)
    # 0.2 s for the prompt and 0.05 s for each later token
    assert answer.prefill_seconds == pytest.approx(0.2)
    assert answer.decode_seconds == pytest.approx(4 * 0.05)
    assert int(answer.first_logits.argmax()) == answer.tokens[0]
    model.generation_config.eos_token_id = answer.tokens[0]
    assert generate_answer(model, inputs, 5).tokens == ()


@pytest.mark.parametrize(
    ("fps", "most", "frames", "rate"),
    [(8, 768, 33, 8), (2, 768, 8, 2), (8, 10, 10, 10 / (33 / 8)), (0.01, 768, 2, 2 / (33 / 8))],
)
def test_frames_are_sampled_evenly_within_the_limits(
    made: Path, fps: float, most: int, frames: int, rate: float
) -> None:
    video = sample_video(made / "red.mp4", fps=fps, max_frames=most, max_pixels=10**6)
    assert abs(len(video.frames) - frames) <= 1
    assert len(video.frames) <= most
    assert video.fps == pytest.approx(rate, rel=0.01)
    assert video.frames.shape[1:] == (128, 128, 3)
    # Each is the frame of its time: the shape moves, so another one would differ by more than compression.
    shown = world.render(world.all_scenes()[0], 0)
    for index, frame in enumerate(video.frames):
        errors = np.abs(shown.astype(int) - frame).mean(axis=(1, 2, 3))
        assert abs(int(errors.argmin()) - index * 8 / video.fps) <= 0.5 * 8 / video.fps + 1


@pytest.mark.timeout(60)
@pytest.mark.parametrize("codec", [("-c:v", "libx264", "-crf", "1"), ("-c:v", "ffv1")])
def test_videos_of_ten_bits_are_read_like_those_of_eight(tmp_path: Path, codec: tuple[str, ...]) -> None:
    shown = world.render(world.all_scenes()[0], 0)
    write_video(tmp_path / "eight.mkv", shown, 8, lossless=True)
    ten = tmp_path / "ten.mkv"
    made = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(tmp_path / "eight.mkv"), *codec]
    subprocess.run([*made, "-pix_fmt", "yuv444p10le", str(ten)], check=True, stdin=subprocess.DEVNULL)
    frames = read_video(ten)
    assert frames.dtype == np.uint8
    assert frames.shape == shown.shape
    assert np.abs(frames.astype(int) - shown).mean() < 3


def test_frames_are_not_shown_twice_and_names_may_hold_a_colon(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "12:30.mp4", world.render(world.all_scenes()[0], 0), 8)
    video = sample_video(Path("12:30.mp4"), fps=1000, max_frames=500, max_pixels=10**6)
    assert len(video.frames) == 33
    assert video.fps == pytest.approx(8, rel=0.01)


def test_large_frames_are_made_smaller_in_proportion_and_small_ones_stay(tmp_path: Path) -> None:
    wide = np.repeat(world.render(world.all_scenes()[0], 0, frames=5, height=128, width=128), 2, axis=2)
    write_video(tmp_path / "wide.mp4", wide, 8)
    video = sample_video(tmp_path / "wide.mp4", fps=8, max_frames=8, max_pixels=64 * 128)
    assert video.frames.shape == (5, 64, 128, 3)
    assert sample_video(tmp_path / "wide.mp4", fps=8, max_frames=8, max_pixels=10**7).frames.shape == wide.shape


def test_options_are_chosen_by_letter_or_by_their_text() -> None:
    question = Question("q", Path(), "Which?", ("a cat", "a dog", "an Ant"), "B")
    assert question.prompt.splitlines()[1:3] == ["A. a cat", "B. a dog"]
    assert [question.right(reply) for reply in ("B", "B.", "(B) a dog", "The answer is B", "Dog!", "a dog")] == [
        True
    ] * 6
    assert [question.right(reply) for reply in ("A", "cat", "Both", "", "D")] == [False] * 5
    free = Question("q", Path(), "Which?", answer="the red Circle")
    assert free.right("A red circle.") is True
    assert free.right("a red circle and a square") is False
    assert Question("q", Path(), "Which?").right("anything") is None


@pytest.mark.parametrize(
    ("options", "reply", "letter"),
    [
        ("dog cat", "b", "B"),
        ("dog cat", "(b)", "B"),
        ("dog cat", "b) cat", "B"),
        ("dog cat", "**B**", "B"),
        ("dog cat", "\u9009B", "B"),
        ("dog cat", "It is B, I think", "B"),
        ("dog cat", "The answer is A because it barks", "A"),
        ("dog cat", "A cat is sitting", None),
        ("dog cat", "", None),
        ("dog cat", "?", None),
        ("1 2 3 4 5 6 7 8 9", "I think B", "B"),
        ("yes ?", "A", "A"),
        ("yes ?", "?", "B"),
        ("\U0001f436 \U0001f431", "\U0001f431", "B"),
        ("-5 5", "5", "B"),
        ("C++ C#", "c#", "B"),
        ("dog. dog!", "dog", None),
    ],
)
def test_what_a_reply_chooses(options: str, reply: str, letter: str | None) -> None:
    assert Question("q", Path(), "Which?", tuple(options.split())).chosen(reply) == letter


@pytest.mark.parametrize(
    ("answer", "reply", "right"),
    [
        ("5", "-5", False),
        ("35", "3.5", False),
        ("A", "", False),
        ("dark red", "Dark-red.", True),
        ("\u201cstop\u201d", "Stop!", True),
    ],
)
def test_numbers_and_signs_of_an_answer_count(answer: str, reply: str, right: bool) -> None:
    assert Question("q", Path(), "Which?", answer=answer).right(reply) is right


def test_replies_that_choose_nothing_agree_only_if_they_are_the_same() -> None:
    question = Question("q", Path(), "Which?", ("dog", "cat"))
    assert question.same("B", "cat")
    assert not question.same("B", "a bird")
    assert not question.same("a bird", "a fish")
    assert question.same("a bird", "a bird ")


def test_logits_that_are_no_numbers_are_not_taken_for_equal_ones() -> None:
    one = torch.randn(8, generator=torch.Generator().manual_seed(0))
    nan = one.clone()
    nan[3] = torch.nan
    none = {"kl": None, "logit_error": None}
    assert first_token_divergence(one, nan) == first_token_divergence(nan, one) == none
    assert first_token_divergence(one, torch.full_like(one, torch.nan)) == none
    excluded = one.clone()
    excluded[3] = -torch.inf
    found = first_token_divergence(one, excluded)
    assert found["kl"] is None
    assert found["logit_error"] < 1
    assert first_token_divergence(excluded, excluded) == {"kl": 0.0, "logit_error": 0.0}


def test_a_model_that_computes_no_numbers_is_named_as_one(made: Path, tmp_path: Path, capfd: Any) -> None:
    shutil.copytree(made / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    for name, value in tensors.items():
        if "input_layernorm" in name:
            value.fill_(torch.nan)
    save_file(tensors, weights, metadata={"format": "pt"})
    asked = ("--video", made / "red.mp4", "--question", "w5", "--model", tmp_path / "model", "--attention", "both")
    assert main(command(made, *asked, "--out", tmp_path / "out")) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if "not finite; try --dtype" in line] == ["dense", LABEL]
    told = json.loads((tmp_path / "out" / "summary.json").read_text())["configurations"][LABEL]
    assert (told["not_finite"], told["kl"], told["logit_error"]) == (1, None, None)


def test_a_question_that_the_processor_cannot_take_is_named(made: Path, capfd: Any) -> None:
    image = json.loads((made / "model" / "tokenizer_config.json").read_text()).get("video_token", "<|video_pad|>")
    assert main(command(made, "--video", made / "red.mp4", "--question", f"w5 {image}")) == 2
    assert "question: the processor of --model" in capfd.readouterr().err.splitlines()[-1]


def test_another_question_under_the_same_name_is_asked_anew(made: Path, tmp_path: Path, capfd: Any) -> None:
    shutil.copy(made / "red.mp4", tmp_path / "a.mp4")
    write_video(tmp_path / "b.mp4", world.render(world.all_scenes()[100], 0), 8)

    def ask(*more: Any) -> Any:
        assert main(command(made, "--out", tmp_path / "out", "--attention", "dense", "--json", *more)) == 0
        printed = capfd.readouterr().out
        assert json.loads(printed.splitlines()[-1])["configurations"]["dense"]["answers"] == 1
        rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
        return len(rows), rows[-1], json.loads(printed.splitlines()[-1])["configurations"]["dense"]["accuracy"]

    first = ("--video", tmp_path / "a.mp4", "--question", "w5 w6")
    assert ask(*first)[0] == 1
    assert ask(*first)[0] == 1
    assert ask("--video", tmp_path / "a.mp4", "--question", "w7")[0] == 2
    count, row, _ = ask("--video", tmp_path / "b.mp4", "--question", "w7")
    assert (count, row["video"]) == (3, str(tmp_path / "b.mp4"))
    options = ("--video", tmp_path / "b.mp4", "--question", "w7", "--options", "w8", "w9")
    assert ask(*options)[0] == 4
    # The right answer is no part of what is asked: the reply is marked again.
    write_rows = tmp_path / "out" / "answers.jsonl"
    rows = [json.loads(line) for line in write_rows.read_text().splitlines()]
    rows[-1]["reply"] = "B"
    write_rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ask(*options, "--answer", "w9")[::2] == (4, 1.0)
    assert ask(*options, "--answer", "w8")[::2] == (4, 0.0)


def test_answers_made_one_by_one_are_compared_when_both_are_asked_for(made: Path, tmp_path: Path, capfd: Any) -> None:
    asked = ("--video", made / "red.mp4", "--question", "w5", "--out", tmp_path / "out", "--json", "--attention")
    for attention in ("dense", "xattn", "both"):
        assert main(command(made, *asked, attention)) == 0
    told = json.loads(capfd.readouterr().out.splitlines()[-1])["configurations"][LABEL]
    assert told["agreement"] in (0.0, 1.0)
    assert told["kl"] > 0


def test_signs_that_end_a_line_elsewhere_do_not_in_json_and_a_mark_at_the_start_is_no_text(
    made: Path, tmp_path: Path, capfd: Any
) -> None:
    asked = "w5\u2028w6\u0085 \U0001f431"
    item = {"video": str(made / "red.mp4"), "question": asked}
    (tmp_path / "items.jsonl").write_text(json.dumps(item, ensure_ascii=False) + "\n", encoding="utf-8-sig")
    (question,) = read_questions(tmp_path / "items.jsonl")
    assert question.question == asked
    ask = command(made, "--items", tmp_path / "items.jsonl", "--out", tmp_path / "out")
    assert main(ask) == 0
    path = tmp_path / "out" / "answers.jsonl"
    whole = path.read_bytes()
    assert json.loads(whole)["question"] == asked
    # Killed in the middle of a character of the next answer.
    path.write_bytes(whole + whole[: whole.index("\U0001f431".encode()) + 2])
    assert main(ask) == 0
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a JSON object"),
        ('["red.mp4"]', "not a JSON object"),
        ('{"video": "red.mp4"}', "needs question, a text"),
        ('{"question": "w5"}', "needs video, a text"),
        ('{"video": "blue.mp4", "question": "w5"}', "no such video file"),
        ('{"video": "red.mp4", "question": "w5", "option": []}', "unknown keys option"),
        ('{"video": "red.mp4", "question": "w5", "options": "ab"}', "options must be a list of texts"),
        ('{"video": "red.mp4", "question": "w5", "options": ["a"]}', "two or more different texts"),
        ('{"video": "red.mp4", "question": "w5", "options": ["a", "b"], "answer": "c"}', "one of the options"),
        ('{"video": "red.mp4", "question": "w5", "id": "../x"}', "id must be letters"),
        ('{"video": "red.mp4", "question": "w5", "id": true}', "id must be letters"),
        (r'{"video": "red.mp4", "question": "w5 \ud83d"}', "question holds half of a surrogate pair"),
        (r'{"video": "\udc00.mp4", "question": "w5"}', "video holds half of a surrogate pair"),
        (r'{"video": "red.mp4", "question": "w5", "answer": "\udc00"}', "answer holds half of a surrogate pair"),
        (
            r'{"video": "red.mp4", "question": "w5", "options": ["a", "b\ud83d"]}',
            "options holds half of a surrogate pair",
        ),
        ('{"video": "red.mp4", "question": "w5", "id": "0001"}', "the id '0001' is already taken"),
        (
            json.dumps({"video": "red.mp4", "question": "w", "options": [f"{i}" for i in range(27)]}),
            "27 options, but only 26",
        ),
    ],
)
def test_a_broken_line_is_named(made: Path, line: str, message: str) -> None:
    path = made / "broken.jsonl"
    path.write_text('{"video": "red.mp4", "question": "w5"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=re.escape(f"{path}:3: ")) as error:
        read_questions(path)
    assert message in str(error.value)


def test_question_files_take_what_prompt_files_take(made: Path) -> None:
    path = made / "loose.jsonl"
    lines = (
        '{"video": "red.mp4", "question": "w5", "options": null, "answer": null, "id": 7}',
        r'{"video": "red.mp4", "question": "w5 \ud83d\udc31", "id": null}',
    )
    path.write_text("\n".join(lines))
    first, second = read_questions(path)
    assert (first.id, first.options, first.answer) == ("7", (), None)
    assert (second.id, second.question) == ("0002", "w5 \U0001f431")


def test_unreadable_replies_are_counted_apart_from_wrong_ones(made: Path, tmp_path: Path, capfd: Any) -> None:
    line = {"video": str(made / "red.mp4"), "question": "w5", "options": ["w8", "w9"], "answer": "w9"}
    (tmp_path / "items.jsonl").write_text(3 * (json.dumps(line) + "\n"))
    ask = command(made, "--items", tmp_path / "items.jsonl", "--attention", "dense", "--out", tmp_path / "out")
    assert main(ask) == 0
    path = tmp_path / "out" / "answers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, reply in zip(rows, ("B", "A", "who knows"), strict=True):
        row["reply"] = reply
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capfd.readouterr()
    assert main([*ask, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)["configurations"]["dense"]
    assert (told["accuracy"], told["with_known_answer"], told["unreadable"]) == (pytest.approx(1 / 3), 3, 1)
    assert main(ask) == 0
    table = capfd.readouterr().out.splitlines()
    assert table[0].split()[:4] == ["attention", "answers", "right", "unreadable"]
    assert table[1].split()[:4] == ["dense", "3", "33.3%", "1"]
    for reply, mark in (("B", "right"), ("A", "wrong"), ("who knows", "unreadable")):
        question = Question("q", made / "red.mp4", "w5", ("w8", "w9"), "B")
        marked = {"right": question.right(reply), "unreadable": question.unreadable(reply)}
        print_answer({**rows[0], "reply": reply, **marked})
        assert capfd.readouterr().out.rstrip().endswith(f", {mark})")


def test_videos_that_cannot_be_read_are_named(made: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    write_video(tmp_path / "cut.mkv", world.render(world.all_scenes()[0], 0), 8, lossless=True)
    (tmp_path / "cut.mkv").write_bytes((tmp_path / "cut.mkv").read_bytes()[:-2000])
    for most in (2, 5, 40):
        # Also where the damage is behind the last frame that is taken.
        with pytest.raises(VideoError, match=r"cut\.mkv: damaged or not a video"):
            sample_video(tmp_path / "cut.mkv", fps=8, max_frames=most, max_pixels=10**6)
    for name, message in (("missing.mp4", "no such video"), ("empty.mp4", "0 bytes"), ("text.mp4", "not a video")):
        with pytest.raises(VideoError, match=message):
            sample_video(tmp_path / name, fps=1, max_frames=8, max_pixels=100)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--video", "red.mp4"), "needs --question, or a file of questions as --items"),
        (("--items", "items.jsonl", "--video", "red.mp4"), "--items and --video exclude each other"),
        (("--items", "none.jsonl"), "none.jsonl: No such file"),
        (("--items", "empty.jsonl"), "empty.jsonl: no question in it"),
        (("--video", "none.mp4", "--question", "w5"), "none.mp4: no such video file"),
        (("--video", "empty.jsonl", "--question", "w5"), "the video file is empty (0 bytes)"),
        (
            ("--video", "red.mp4", "--question", "w5", "--fps", "0", "--model", "nowhere"),
            "--fps must be a positive number, got 0.0",
        ),
        (
            ("--video", "red.mp4", "--question", "w5", "--max-frames", "1", "--model", "nowhere"),
            "--max-frames must be 2 or more, got 1",
        ),
        (("--video", "red.mp4", "--question", "w5", "--max-new-tokens", "0"), "--max-new-tokens must be 1 or more"),
        (("--video", "red.mp4", "--question", "w5 \udcff"), "--question holds half of a surrogate pair"),
        (("--video", "red.mp4", "--question", "w5", "--options", "a", "\udcff"), "--options holds half of a surrogate"),
        (
            ("--video", "red.mp4", "--question", "w5", "--dtype", "half8"),
            "argument --dtype: invalid choice: 'half8' (choose from 'auto', 'bfloat16'",
        ),
        (("--video", "red.mp4", "--question", "w5", "--options", *map(str, range(27))), "27 options, but only 26"),
        (("--video", "red.mp4", "--question", "w5", "--model", "nowhere"), "--model "),
        (("--video", "red.mp4", "--question", "w5", "--threshold", "0"), "threshold must be in (0, 1]"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(made: Path, more: tuple[str, ...], message: str, capfd: Any) -> None:
    (made / "empty.jsonl").touch()
    files = (".mp4", ".jsonl", "nowhere")
    assert main(command(made, *(made / part if part.endswith(files) else part for part in more))) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("xattn-video: error: ")
    assert message in error
