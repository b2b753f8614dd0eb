"""Prompt files: what is read, how ids are given, and that every error names its line."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.video.prompts import evenly_spaced, read_prompts

NATURAL = Path(__file__).resolve().parent.parent / "prompts" / "natural.txt"


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def test_text_file_has_a_prompt_a_line_without_comments_and_blank_lines(tmp_path):
    path = write(
        tmp_path, "p.txt", "\ufeff# a comment\r\n a cat \r\n\r\n  # indented comment\r\na dog # not a comment\n"
    )
    prompts = read_prompts(path).prompts
    assert [(p.id, p.text, p.line) for p in prompts] == [("0001", "a cat", 2), ("0002", "a dog # not a comment", 5)]
    assert all(p.seed is p.negative_prompt is p.image is None for p in prompts)


@pytest.mark.parametrize(
    "text",
    ["\"quoted\" and 'single'", "../../etc/passwd", "a \\ b / c", "🦊 fox 雪", "x" * 10_000, "line\u2028separator"],
)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_any_text_is_a_prompt_and_never_part_of_the_id(tmp_path, text, suffix):
    line = text if suffix == ".txt" else json.dumps({"prompt": text})
    (prompt,) = read_prompts(write(tmp_path, f"p{suffix}", line)).prompts
    assert (prompt.id, prompt.text) == ("0001", text)


def test_json_lines_carry_every_field(tmp_path):
    write(tmp_path, "first.png", b"")
    record = {"prompt": "p", "id": "Cat_1.a-b", "seed": 7, "negative_prompt": "blur", "image": "first.png"}
    lines = [record, {"prompt": "q", "note": 1}, {"prompt": "r", "id": 12}]
    file = read_prompts(write(tmp_path, "p.jsonl", "\n\n".join(map(json.dumps, lines))))
    first, second, third = file.prompts
    assert (first.id, first.seed, first.negative_prompt, first.image) == (
        "Cat_1.a-b",
        7,
        "blur",
        tmp_path / "first.png",
    )
    assert (second.id, second.line, third.id) == ("0002", 3, "12")
    assert file.ignored_keys == ("note",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "not a JSON object"),
        ('["a"]', "must be a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ('{"id": "x"}', "needs a `prompt`"),
        ('{"prompt": "  "}', "needs a `prompt`"),
        ('{"prompt": 3}', "`prompt` must be a string"),
        ('{"prompt": "\\ud83d"}', "surrogate"),
        ('{"prompt": "a", "seed": "1"}', "`seed` must be an integer"),
        ('{"prompt": "a", "seed": true}', "`seed` must be an integer"),
        ('{"prompt": "a", "seed": -1}', "`seed` must be an integer"),
        ('{"prompt": "a", "seed": 9223372036854775808}', "`seed` must be an integer"),
        ('{"prompt": "a", "id": ""}', "`id` must be"),
        ('{"prompt": "a", "id": ".hidden"}', "`id` must be"),
        ('{"prompt": "a", "id": "a/b"}', "`id` must be"),
        ('{"prompt": "a", "id": "a\\n"}', "`id` must be"),
        ('{"prompt": "a", "id": "' + "x" * 101 + '"}', "`id` must be"),
        ('{"prompt": "a", "image": "nowhere.png"}', "no such image"),
        ('{"prompt": "a", "id": "FIRST"}', "already that of line 1"),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path, line, message):
    path = write(tmp_path, "p.jsonl", '{"prompt": "ok", "id": "first"}\n\n' + line + "\n")
    with pytest.raises(UserError) as raised:
        read_prompts(path)
    text = str(raised.value)
    assert text.startswith(f"{path}:3: ")
    assert message in text
    assert "\n" not in text
    assert len(text) < 400 + len(str(path))


def test_a_given_id_may_not_equal_a_position(tmp_path):
    path = write(tmp_path, "p.jsonl", '{"prompt": "a", "id": "0002"}\n{"prompt": "b"}\n')
    with pytest.raises(UserError, match=r"p\.jsonl:2: id '0002' is already that of line 1"):
        read_prompts(path)


def test_a_byte_that_is_not_utf8_is_named_with_its_line(tmp_path):
    path = write(tmp_path, "p.txt", b"fine\nfine\ncaf\xe9\n")
    with pytest.raises(UserError, match=r"p\.txt:3: not UTF-8 \(byte 0xe9\)"):
        read_prompts(path)


@pytest.mark.parametrize("content", ["", "\n\n", "# only a comment\n"])
def test_a_file_without_prompts_is_an_error(tmp_path, content):
    with pytest.raises(UserError, match="no prompts"):
        read_prompts(write(tmp_path, "p.txt", content))


def test_missing_folder_and_unknown_suffix_are_errors(tmp_path):
    with pytest.raises(UserError, match="no such prompt file"):
        read_prompts(tmp_path / "missing.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="cannot read"):
        read_prompts(tmp_path / "folder.txt")
    with pytest.raises(UserError, match=r"ends in \.txt"):
        read_prompts(write(tmp_path, "p.csv", "a"))


@pytest.mark.parametrize("total", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 99, 100, 1000])
def test_a_sample_is_evenly_spaced_from_the_first_to_the_last(total, count):
    chosen = evenly_spaced(range(total), count)
    assert len(chosen) == min(total, count)
    assert chosen[0] == 0
    gaps = [after - before for before, after in itertools.pairwise(chosen)]
    assert all(gap >= 1 for gap in gaps)
    if len(chosen) > 1:
        assert chosen[-1] == total - 1
        assert max(gaps) - min(gaps) <= 1


def test_the_prompts_for_real_models_are_two_for_each_dimension():
    lines = NATURAL.read_text(encoding="utf-8").splitlines()
    prompts = read_prompts(NATURAL).prompts
    assert len(prompts) == 24
    assert len({prompt.id for prompt in prompts}) == len({prompt.text for prompt in prompts}) == 24
    # After the line about the file: a dimension, then its two prompts.
    assert [line.startswith("# ") for line in lines[1:]] == [True, False, False] * 12
    assert len({line for line in lines if line.startswith("# ")}) == 13
    # Long enough to show something, and short enough for the 77 tokens of CLIP, the shortest text encoder in use.
    assert all(6 <= len(prompt.text.split()) <= 40 for prompt in prompts)
