"""Needle prompts have one right answer, which a careful reader finds; the program answers, resumes and says why not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.language_families import LAYERS, save_language_model
from xattn_video_eval.benchmarks.needle.command import main
from xattn_video_eval.benchmarks.needle.items import TASKS, Item, make_item, score
from xattn_video_pipelines.qa.answers import first_token_divergence


def words(text: str) -> int:
    return len(text.split())


def read(item: Item) -> set[str]:
    """What a careful reader answers, from the prompt alone."""
    text, question = item.prompt.rsplit("Question: ", 1)
    if item.task != "tracking":
        town = re.match(r"What is the code of (\w+)\?", question)
        assert town
        return set(re.findall(rf"The code of {town[1]} is (\d+)\.", text))
    number = re.match(r"Which names stand for (\d+)\?", question)
    assert number
    names: dict[str, str] = {}
    for name, same, value in re.findall(r"Let (\w+) be (?:the same as (\w+)|(\d+))\.", text):
        # A link may only name what was said before it.
        names[name] = value or names[same]
    return {name for name, value in names.items() if value == number[1]}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [200, 3000])
def test_a_careful_reader_finds_the_answers_and_no_others(task: str, length: int) -> None:
    for depth in (0, 30, 100):
        item = make_item(task, length, depth, 0, words)
        assert read(item) == set(item.answers)
        assert length - 20 <= words(item.prompt) <= length
        assert len(item.answers) == (4 if task == "tracking" else 1)


def test_the_needle_stands_where_its_depth_says() -> None:
    for depth in (0, 25, 50, 100):
        item = make_item("single", 4000, depth, 0, words)
        place = words(item.prompt.split("The code of")[0]) / words(item.prompt)
        assert place == pytest.approx(depth / 100, abs=0.02)


def test_items_follow_from_their_numbers_and_samples_differ() -> None:
    assert make_item("multikey", 500, 50, 1, words) == make_item("multikey", 500, 50, 1, words)
    several = {make_item("multikey", 500, 50, sample, words).answers for sample in range(20)}
    assert len(several) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("riddle", 500, 50), "task must be one of single, multikey, tracking, got 'riddle'"),
        (("single", 500, 101), "depth must be from 0 to 100 percent, got 101"),
        (("multikey", 50, 50), "a prompt of 50 tokens is too short for task multikey"),
    ],
)
def test_items_that_cannot_be_are_refused(arguments: tuple[str, int, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_item(*arguments, 0, words)


def test_replies_are_right_in_so_far_as_they_hold_the_whole_words() -> None:
    assert score(("1234567",), "The code is 1234567.") == 1
    assert score(("1234567",), "12345678") == 0
    assert score(("ABCDE", "FGHIJ"), "ABCDE and KLMNO") == 0.5


def test_divergence_is_zero_for_equal_distributions_and_has_its_closed_form() -> None:
    logits = torch.tensor([1.0, 2.0, float("-inf")])
    assert first_token_divergence(logits, logits + 3) == {"kl": 0.0, "logit_error": pytest.approx(0, abs=1e-9)}
    told = first_token_divergence(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 2.0]).log_softmax(0))
    # p = 1/2, 1/2 against q = 1 / (1 + e^2), e^2 / (1 + e^2).
    expected = -0.5 * (torch.tensor([0.0, 2.0]).log_softmax(0).sum() + 2 * torch.log(torch.tensor(2.0)))
    assert told == {"kl": pytest.approx(float(expected)), "logit_error": pytest.approx(1.0)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("model"))


def arguments(model: Path, out: Path, *more: str) -> list[str]:
    given = ["--model", model, "--out", out, "--lengths", 220, "--depths", 0, 100, "--samples", 1, "--threshold", 0.5]
    return [str(part) for part in (*given, "--block-size", 16, "--min-tokens", 0, "--device", "cpu", *more)]


def test_a_run_answers_dense_and_sparse_and_goes_on_where_it_was_killed(
    model: Path, tmp_path: Path, capfd: Any
) -> None:
    out = tmp_path / "out"
    assert main(arguments(model, out)) == 0
    path = out / "answers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    label = "xattn-s8-t0.50-w0-b16-m0"
    assert [row["label"] for row in rows] == ["dense"] * 6 + [label] * 6
    assert [row["key"] for row in rows[:6]] == [f"{task}-220-{depth}-0" for task in TASKS for depth in (0, 100)]
    for row in rows:
        assert 200 < row["prompt_tokens"] <= 220
        assert row["prefill_seconds"] > 0
        assert row["decode_seconds"] > 0
    assert all(row["sparse_density"] is None for row in rows[:6])
    assert all(0 < row["sparse_density"] < 0.9 for row in rows[6:])
    assert all(row["dense_calls"].keys() == {"decode"} for row in rows[6:])
    # Of this answer alone: at most 48 tokens, the first of them from prefill.
    assert all(0 < row["dense_calls"]["decode"] <= 47 * LAYERS for row in rows[6:])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["configurations"][label]["items"] == 6
    assert (out / "needle.png").read_bytes().startswith(b"\x89PNG")
    printed = capfd.readouterr().out
    assert printed.split()[:2] == ["task", "tokens"]
    assert printed.splitlines()[-1] == f"picture: {out / 'needle.png'}"

    # Killed in the middle of the eighth line.
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7]) + lines[7][:30])
    assert main(arguments(model, out, "--json")) == 0
    assert json.loads(capfd.readouterr().out) == json.loads((out / "summary.json").read_text())
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.read_bytes().splitlines(keepends=True)[:7] == lines[:7]
    assert [(row["key"], row["label"], row["reply"]) for row in again] == [
        (row["key"], row["label"], row["reply"]) for row in rows
    ]


def test_bad_input_is_one_line(model: Path, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "answers.jsonl").write_text('{"label": "dense"}\n')
    (tmp_path / "empty").mkdir()
    for more, message in (
        (("--threshold", "0"), "threshold must be in (0, 1], got 0.0"),
        (("--samples", "0"), "--samples must be 1 or more, got 0"),
        (("--lengths", "40"), "a prompt of 40 tokens is too short for task"),
        (("--depths", "120"), "depth must be from 0 to 100"),
        (("--out", str(tmp_path / "other")), "answers.jsonl:1: not an answer of this program"),
        (("--model", str(tmp_path / "empty")), f"--model {tmp_path / 'empty'}: "),
        (("--device", "cuda:99"), "--device cuda:99: "),
    ):
        assert main(arguments(model, tmp_path / "out", *more)) == 2
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("needle: error: ")
        assert message in error


def test_answers_of_another_model_are_not_mixed_in(model: Path, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "out"
    few = ("--tasks", "single", "--attention", "dense")
    assert main(arguments(model, out, *few)) == 0
    assert main(arguments(model, out, *few, "--no-chat")) == 2
    assert "has answers with chat True; use another --out" in capfd.readouterr().err
    # Those of other weights under the same name are asked again.
    path = out / "answers.jsonl"
    first, *others = (json.loads(line) for line in path.read_text().splitlines())
    rows = [{**first, "weights": "others"}, *others]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(arguments(model, out, *few)) == 0
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["key"] for row in again] == [*(row["key"] for row in rows), first["key"]]
    assert again[-1]["weights"] == first["weights"]
