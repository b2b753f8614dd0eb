"""README and docs: links lead somewhere, commands and options exist, the README stays short."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from packaging.version import Version

from tests.cli_tools import run_command

ROOT = Path(__file__).resolve().parent.parent
FILES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "pipelines" / "demo" / "data").glob("*/README.md")),
)
# Rows of a table of old and new names tell what was, so only their last column is held to what is.
OLD_NAMES = "## Renamed"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_readme_is_read_to_the_end() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200


# ---- links


def anchors(text: str) -> set[str]:
    """The names that headings have in a page's links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(file: Path, text: str) -> list[str]:
    """The relative links of a page that lead nowhere."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        if not target.exists() or (
            anchor and anchor not in anchors(target.read_text(encoding="utf-8") if path else text)
        ):
            broken.append(link)
    return broken


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_relative_links_exist(file: Path) -> None:
    assert broken_links(file, file.read_text(encoding="utf-8")) == []


def test_broken_links_are_found() -> None:
    text = "# One heading\n[a](docs/usage.md) [b](docs/nothing.md) [c](#one-heading) [d](#another) [e](https://x.org/y)"
    assert broken_links(ROOT / "README.md", text) == ["docs/nothing.md", "#another"]
    assert broken_links(ROOT / "README.md", "![picture](eval/results/none.png)") == ["eval/results/none.png"]


def test_files_that_are_named_exist() -> None:
    folders = "|".join(
        ("xattn_video", "pipelines", "eval", "tests", "examples", "docs", "prompts", r"\.github", r"\.ci")
    )
    named = set()
    for file in FILES:
        if file.name != "CHANGELOG.md":
            # The walks tell of the code as it was, too.
            text = file.read_text(encoding="utf-8").partition("## Walk of query")[0]
            named |= set(re.findall(rf"`((?:{folders})/[\w./-]+)`", text))
    assert len(named) > 30
    assert {path for path in named if not (ROOT / path).exists()} == set()


# ---- commands


class Command(NamedTuple):
    """What a page says to run: the program, its subcommands and its options."""

    words: tuple[str, ...]
    options: tuple[str, ...]


def code_of(text: str) -> Iterator[str]:
    """Inline code and the lines of indented and fenced blocks; a table of old names by its last column alone."""
    before, _, after = text.partition(OLD_NAMES)
    after = re.sub(r"^\|.*\|([^|]*)\|$", r"\1", after, flags=re.MULTILINE)
    text = before + after
    text = re.sub(r"\\\n\s*", " ", text)
    yield from re.findall(r"^(?: {4,}|\t)(.+)$", text, re.MULTILINE)
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from block.splitlines()
    # Inline code may go over the end of a line.
    yield from (" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text))


def commands(text: str) -> Iterator[Command]:
    """Every `xattn-video ...` and `python -m ...` of a page."""
    for line in code_of(text):
        found = re.match(r"(?:\S*xattn-video|python3? -m (\S+))(?: (.*))?$", line.strip())
        if found is None:
            continue
        words = shlex.split(found[2] or "", comments=True)
        options = tuple(word.split("=")[0] for word in words if word.startswith("--"))
        plain = [word for word in words if re.fullmatch(r"[a-z][a-z-]+", word)]
        yield Command((found[1] or "xattn-video", *plain[:1]), options)


def pages_with_commands() -> list[Path]:
    return [file for file in FILES if any(commands(file.read_text(encoding="utf-8")))]


def test_the_pages_of_commands_are_seen() -> None:
    assert {file.name for file in pages_with_commands()} >= {"README.md", "usage.md", "quality.md", "understanding.md"}
    text = (
        '    xattn-video qa --video cat.mp4 --question "What --is it?"\nThe `python -m a.b\n--rehearse`, `--json` and '
        "`xattn-video doctor --json`.\n\n## Renamed\n\n| old | new |\n| `python -m old` | `python -m new` |\n"
    )
    assert list(commands(text)) == [
        Command(("xattn-video", "qa"), ("--video", "--question")),
        Command(("a.b",), ("--rehearse",)),
        Command(("xattn-video", "doctor"), ("--json",)),
        Command(("new",), ()),
    ]


@cache
def help_of(words: tuple[str, ...]) -> str:
    """What `--help` of a program prints, run as `python -m` runs it."""
    program = "xattn_video_pipelines.cli" if words[0] == "xattn-video" else words[0]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), warnings.catch_warnings():
        # Wide enough that no option is broken over two lines.
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", [program, *words[1:], "--help"])
        # Another test has imported the module already: here it is run again as the main one.
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(SystemExit) as stop:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    assert stop.value.code in (0, None), words
    return printed.getvalue()


def there(module: str) -> bool:
    """Whether a module can be imported from this checkout."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def missing(command: Command) -> list[str]:
    """The options of a command that its own help does not have."""
    program, *subcommands = command.words
    if program != "xattn-video" and not there(program):
        return [f"no module {program}"]
    if not command.options and program != "xattn-video":
        return []
    if subcommands and program != "xattn-video":
        # Most modules have no subcommands: a plain word is an argument of theirs.
        whole = help_of((program,))
        subcommands = subcommands if re.search(rf"^ +{subcommands[0]}\b", whole, re.MULTILINE) else []
    text = help_of((program, *subcommands))
    return [option for option in command.options if not re.search(rf"{option}(?![\w-])", text)]


@pytest.mark.parametrize("file", pages_with_commands(), ids=name_of)
def test_commands_and_options_exist(file: Path) -> None:
    wrong = {
        " ".join(command.words): absent
        for command in commands(file.read_text(encoding="utf-8"))
        if command.words[0].startswith(("xattn", "pipelines", "eval")) and (absent := missing(command))
    }
    assert wrong == {}


def test_wrong_commands_are_found(capfd: pytest.CaptureFixture[str]) -> None:
    assert missing(Command(("xattn-video", "generate"), ("--threshold", "--tau"))) == ["--tau"]
    # The start of an option is not the option.
    assert missing(Command(("xattn-video", "generate"), ("--block",))) == ["--block"]
    assert missing(Command(("xattn_video_eval.nothing",), ())) == ["no module xattn_video_eval.nothing"]
    assert missing(Command(("eval.needle",), ())) == ["no module eval.needle"]
    assert run_command(capfd, "paint", "--help").code == 2


def test_options_that_stand_alone_are_of_the_command_of_their_section() -> None:
    """In usage.md a heading names a command, and the options below it are that command's."""
    text = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    checked = 0
    for heading, section in re.findall(r"^## ([a-z]+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL):
        if heading == "make":
            continue
        options = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", " ".join(re.findall(r"`(--[^`]+)`", section))))
        assert missing(Command(("xattn-video", heading), tuple(sorted(options)))) == [], heading
        checked += len(options)
    assert checked > 30


def test_every_command_has_a_place_in_usage() -> None:
    from xattn_video_pipelines.cli import COMMANDS

    text = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `xattn-video ([a-z-]+)` \|", text, re.MULTILINE)) == set(COMMANDS)


def test_the_table_of_models_is_that_of_the_code() -> None:
    """Of the code: what `supported()` shows."""
    from xattn_video import supported
    from xattn_video.model_table import LANGUAGE_MODELS, MODELS, REFUSED

    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    assert {name for _, name, _, _ in rows} == set(MODELS)
    shown = {row[1]: row for row in supported().rows}
    assert shown.keys() == {*MODELS, *REFUSED, "decoder models of transformers"}
    where = {"cross": "cross-attention", "end": "joint, after", "packed": "packed in one sequence"}
    for models, name, place, modules in rows:
        told = set(re.findall(r"`([^`]+\*\.[^`]+)`", modules))
        # One row refers to the one above it.
        assert told == set(shown[name][2].split(", ")) or "the same as" in modules, name
        assert models == shown[name][0]
        assert place.startswith(where[MODELS[name].text]), name
    (language,) = re.findall(r"tiny models of ([^.]+(?:\.\d[^.]+)*)\.", " ".join(text.split()))
    assert tuple(re.split(r", | and ", language)) == LANGUAGE_MODELS
    refused = text.partition("AnyFlow FAR")[2].partition("\n* ")[0]
    assert len(REFUSED) == 3
    assert "Cosmos 3" in refused
    assert "Wan-Animate 2" in refused


def test_the_table_of_reasons_is_that_of_the_code() -> None:
    from xattn_video.stats import REASONS

    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    section = text.partition("## What happened")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(REASONS)


def test_the_table_of_settings_is_that_of_the_code() -> None:
    from xattn_video import XAttnConfig
    from xattn_video.config import BACKENDS

    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    section = text.partition("## Settings")[2].partition("\n## ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.MULTILINE))
    # The two numbers that go with other selections are in the row of `selection`.
    settings = {field.name: field.default for field in dataclasses.fields(XAttnConfig)}
    assert told.keys() == settings.keys() - {"top_k", "top_ratio"}
    assert {name: ast.literal_eval(default) for name, default in told.items()} == {
        name: settings[name] for name in told
    }
    section = text.partition("## Backends")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", section, re.MULTILINE)) == set(BACKENDS)


@pytest.mark.parametrize("card", FILES[-2:], ids=name_of)
def test_a_card_names_its_own_folder(card: Path) -> None:
    text = card.read_text(encoding="utf-8")
    folders = re.findall(r'from_pretrained\("(\S+)"\)', text)
    assert all((ROOT / folder).samefile(card.parent) for folder in folders)
    assert len(folders) == (card.parent.name == "weights")


def test_the_new_names_of_what_was_renamed_are_there() -> None:
    renamed = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition(OLD_NAMES)[2]
    names = re.findall(r"^\| .*`[\w.]+` \| `([\w.]+)` \|$", renamed, re.MULTILINE)
    assert len(names) > 50
    assert [name for name in names if not there(name)] == []


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    told = {
        target
        for file in FILES
        for code in code_of(file.read_text(encoding="utf-8"))
        for target in re.findall(r"^make ([a-z-]+)", code.strip())
    }
    assert len(told) >= 10
    assert told <= targets


# ---- what CI runs


def test_ci_tests_the_oldest_releases_that_are_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    matrix = json.loads((ROOT / ".github" / "matrix.json").read_text(encoding="utf-8"))
    allowed = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    for name in ("diffusers", "transformers"):
        (lowest,) = {part[1] for line in allowed if (part := re.match(rf"{name}>=([\d.]+)", line))}
        (tested,) = re.findall(rf"^LOWEST_{name.upper()} := ([\d.]+)$", makefile, re.MULTILINE)
        assert Version(tested).release[:2] == Version(lowest).release[:2], name
    runs = [entry["run"] for entry in matrix if entry["required"]]
    assert {"make test-lowest", "bash .ci/run"} <= set(runs)
    assert project["requires-python"] == f">={min(entry['python'] for entry in matrix)}"


def test_workflows_are_whole() -> None:
    for file in (ROOT / ".github").rglob("*.yml"):
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
        if file.parent.name == "workflows":
            # YAML 1.1 reads the key `on` as True.
            assert {"name", True, "jobs", "permissions"} <= document.keys(), file
            for job in document["jobs"].values():
                assert 0 < job["timeout-minutes"] <= 60, file
                assert all(("run" in step) != ("uses" in step) for step in job["steps"]), file
        else:
            assert {"name", "description", "body"} <= document.keys(), file
