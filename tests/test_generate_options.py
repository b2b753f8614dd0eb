"""`xattn-video generate` without a file of prompts: a prompt in quotes, a picture, adapters, quantised weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli_tools import Run, tool
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.video import GenerateSettings, make_plan

ROOT = Path(__file__).resolve().parent.parent
FOX = "a red fox runs through fresh snow"
# The first 8 digits of its SHA-256, as `printf %s "..." | sha256sum` prints them.
FOX_ID = "prompt-c3b6b801"


@pytest.fixture
def xattn(capfd: pytest.CaptureFixture[str]) -> Run:
    return tool(capfd)


@pytest.mark.parametrize("words", [(FOX, "another one"), ("--prompt", FOX, "another one")])
def test_a_prompt_needs_no_file_and_its_id_comes_from_its_digest(words, tmp_path, xattn):
    done = xattn("generate", *words, "--model", "demo", "--out", tmp_path / "out", "--dry-run", "--json")
    assert done.code == 0, done.err
    first, second = json.loads(done.out)["videos"]
    assert first["id"] == FOX_ID
    assert Path(first["file"]).name == f"{FOX_ID}-s0.mp4"
    assert second["id"] != FOX_ID


def test_a_prompt_file_takes_the_negative_prompt_where_it_has_none(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "negative_prompt": "own"}\n')
    plan = make_plan(GenerateSettings(model="demo", prompts=path, out=tmp_path / "out", negative_prompt="blur"))
    assert [job.prompt.negative_prompt for job in plan.jobs] == ["blur", "own"]
    assert [job.identity["negative_prompt"] for job in plan.jobs] == ["blur", "own"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "needs a prompt in quotes.* got neither"),
        ({"prompt": ("a b",), "prompts": Path("p.txt")}, "needs a prompt in quotes.* got both"),
        ({"prompt": ("a", "red", "fox")}, 'a prompt of several words stands in quotes: "a red fox"'),
        ({"prompt": (f"{ROOT}/prompts/demo.txt",)}, "demo.txt is a file; give it as --prompts .*demo.txt"),
        ({"prompt": (" ",)}, "prompt 1 is empty"),
        ({"prompt": ("a b", "a b")}, "prompt 2 is the same as prompt 1: 'a b'"),
        ({"prompt": ("a \udcff",)}, "prompt 1 is not UTF-8"),
        ({"prompt": ("a b",), "image": Path("no.png")}, "--image no.png: no such file"),
        ({"prompt": ("a b",), "image": ROOT / "README.md"}, "prompt 1: has an image, but demo .* from text alone"),
    ],
)
def test_what_is_no_prompt_is_said_in_one_line(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(GenerateSettings(model="demo", out=tmp_path / "out", **given))
