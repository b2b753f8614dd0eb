"""What all programs share: whatever goes wrong outside of them is one line and exit code 2."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest

from xattn_video.extras import install_command
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.program import (
    EXIT_CODES,
    Parser,
    add_command,
    guarded,
    program,
    run_app,
    run_program,
)
from xattn_video_pipelines.common.run_file import note_run
from xattn_video_pipelines.common.settings import Dtype, Json, Option, Settings
from xattn_video_pipelines.common.terminal import say

ROOT = Path(__file__).parent.parent
PRINTING = """
import argparse, sys
from xattn_video_pipelines.common.program import Parser, run_program
sys.exit(run_program(Parser(prog="shout"), lambda arguments: print("h\\xf6r \\ud800 zu") or 0, []))
"""


def shout(**options: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-c", PRINTING],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        timeout=1000,
        env={**environment, "PYTHONIOENCODING": "ascii"},
        **options,
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "closed/one"), "closed/one: Permission denied"),
        (OSError(errno.EIO, "Input/output error", "disk"), "disk: Input/output error"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300), f"{'a' * 60}...: the name is too long"),
    ],
)
def test_what_the_system_refuses_is_one_line(error, line, capsys):
    def run(arguments):
        raise error

    assert run_program(Parser(prog="tool"), run, []) == 2
    assert capsys.readouterr().err == f"tool: error: {line}\n"


def test_text_that_the_terminal_lacks_is_escaped():
    done = shout(stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "h\\xf6r \\ud800 zu\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_an_output_that_is_full_is_one_line():
    with open("/dev/full", "w") as full:
        done = shout(stdout=full)
    assert (done.returncode, done.stderr) == (2, "shout: error: No space left on device\n")


def test_a_reader_that_has_left_is_no_error():
    ours, theirs = os.pipe()
    os.close(ours)
    done = shout(stdout=theirs)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, "")


@dataclass(frozen=True, kw_only=True)
class Painting(Settings):
    """Settings of each kind that a program has."""

    folders: Annotated[tuple[Path, ...], Option("what to paint", metavar="DIR")] = field(kw_only=False)
    sizes: Annotated[tuple[int, ...], Option("inches", group="canvas")] = (8, 16)
    depth: Annotated[float | None, Option("inches", group="canvas")] = None
    tools: Annotated[tuple[Literal["brush", "knife"], ...], Option("to paint with")] = ()
    style: Annotated[Literal["oil", "ink"], Option("of the paint")] = "oil"
    frame: Annotated[bool, Option("leave the frame out")] = True
    sign: Annotated[bool | None, Option("the painter's name in the corner")] = None
    titles: Annotated[tuple[str, ...], Option("a name each")] = ()
    dtype: Annotated[Dtype, Option("of the pixels")] = "float32"
    guests: Annotated[bool, Option("let others in", command_line_only=True)] = False
    out: Annotated[Path, Option("where the paintings go", metavar="DIR")] = Path("out")

    def check(self) -> None:
        self.check_at_least(1, "sizes")
        self.check_from_zero("depth")


def paint(settings: Painting, *, json: Json = False) -> int:
    print(settings, json)
    return 3


def painting(*arguments: str) -> int:
    def run() -> int:
        app = program("tool", "Paint.", "example:\n  tool paint a b")
        add_command(app, paint, "paint", "paint folders", "example:\n  tool paint " + 20 * "a/long/name/ ")
        return run_app(app, ["paint", *arguments])

    return guarded("tool", run)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a"], Painting((Path("a"),))),
        (["a", "b", "--sizes", "4", "2"], Painting((Path("a"), Path("b")), sizes=(4, 2))),
        (["--no-frame", "--depth=1.5", "a"], Painting((Path("a"),), frame=False, depth=1.5)),
        (["a", "--sizes", "4", "2", "--sizes", "3", "1"], Painting((Path("a"),), sizes=(3, 1))),
        (["a", "--tools", "knife", "brush"], Painting((Path("a"),), tools=("knife", "brush"))),
        (["--style", "oil", "--style", "ink", "a"], Painting((Path("a"),), style="ink")),
        (["a", "--sizes", "4,2", "1"], Painting((Path("a"),), sizes=(4, 2, 1))),
        (["a", "--tools", "knife, brush"], Painting((Path("a"),), tools=("knife", "brush"))),
        (["a", "--titles", "sea, calm", "sky"], Painting((Path("a"),), titles=("sea, calm", "sky"))),
        (["a", "--titles", "sea", "--titles", "sky"], Painting((Path("a"),), titles=("sea", "sky"))),
        (["a", "--dtype", "bf16", "--no-sign"], Painting((Path("a"),), dtype="bfloat16", sign=False)),
    ],
)
def test_options_make_the_settings_that_python_makes(arguments, expected, capsys):
    for json in (False, True):
        assert painting(*arguments, *["--json"] * json) == 3
        assert capsys.readouterr().out == f"{expected} {json}\n"
    assert painting(*expected.arguments()) == 3
    assert capsys.readouterr().out == f"{expected} False\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: DIR... (see: tool paint --help)"),
        (["a", "--sizes"], "argument --sizes: expected at least one argument (see: tool paint --help)"),
        (["a", "--depth"], "argument --depth: expected one argument (see: tool paint --help)"),
        (["a", "--depth", "deep"], "argument --depth: invalid float value: 'deep' (see: tool paint --help)"),
        (["a", "--sizes", "8.5"], "argument --sizes: invalid int value: '8.5' (see: tool paint --help)"),
        (["a", "--out="], "argument --out: invalid Path value: '' (see: tool paint --help)"),
        (["a", "--sizes", "1", "x"], "argument --sizes: invalid int value: 'x' (see: tool paint --help)"),
        (
            ["a", "--style", "wax"],
            "argument --style: invalid choice: 'wax' (choose from 'oil', 'ink') (see: tool paint --help)",
        ),
        (
            ["a", "--tools", "knife", "fork"],
            "argument --tools: invalid choice: 'fork' (choose from 'brush', 'knife') (see: tool paint --help)",
        ),
        (["a", "--stlye", "ink"], "unrecognized arguments: --stlye; did you mean --style? (see: tool paint --help)"),
        (
            ["a", "--style", "inc"],
            "argument --style: invalid choice: 'inc' (choose from 'oil', 'ink'); did you mean ink? "
            "(see: tool paint --help)",
        ),
        (["a", "--frame"], "unrecognized arguments: --frame; did you mean --no-frame? (see: tool paint --help)"),
        (["a", "--sizes", "4", "0"], "--sizes must be 1 or more, got 0"),
        (["a", "--depth", "-1"], "--depth must be a number from 0, got -1.0"),
    ],
)
def test_what_is_wrong_with_a_command_line_is_one_line(arguments, message, capsys):
    assert painting(*arguments) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"tool: error: {message}\n")


def test_python_gets_the_same_checks():
    with pytest.raises(UserError, match="--style must be one of oil, ink, got 'wax'"):
        Painting((Path("a"),), style="wax")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--tools must be one of brush, knife, got 'fork'"):
        Painting((Path("a"),), tools=("brush", "fork"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--depth must be a number from 0, got inf"):
        Painting((Path("a"),), depth=float("inf"))


def test_python_takes_the_short_names_of_types_too():
    assert Painting((Path("a"),), dtype="fp16").dtype == "float16"  # type: ignore[arg-type]


FROM_FILE = """
[paint]
folders = ["a", "b"]
sizes = [4, 2]
titles = "sea"
depth = 1.5
frame = false
sign = true
guests = false
"""


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        ([], {}),
        (["c", "--sizes", "9"], {"folders": (Path("c"),), "sizes": (9,)}),
        (["--depth", "3", "--no-sign", "--no-frame=false"], {"depth": 3.0, "sign": False, "frame": True}),
    ],
)
def test_a_file_gives_settings_and_options_win(more, changed, tmp_path, capsys):
    path = tmp_path / "mine.toml"
    path.write_text(FROM_FILE)
    expected = Painting((Path("a"), Path("b")), sizes=(4, 2), titles=("sea",), depth=1.5, frame=False, sign=True)
    assert painting("--config", str(path), *more) == 3
    assert capsys.readouterr().out == f"{replace(expected, **changed)} False\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--config {path}: no such file"),
        (
            "[paint",
            "--config {path}: not a TOML file: Expected ']' at the end of a table declaration (at end of document)",
        ),
        ("[shout]\n[print]", "--config {path}: needs a table [paint], has [shout], [print]"),
        ("paint = 3", "--config {path}: needs a table [paint], has [paint]"),
        ("[paint]\nstlye = 'ink'", "--config {path}: paint has no setting 'stlye'; did you mean style?"),
        ("[paint]\njson = true", "--config {path}: paint has no setting 'json'"),
        ("[paint]\nconfig = 'b'", "--config {path}: paint has no setting 'config'"),
        ("[paint]\nguests = true", "--config {path}: guests must be given on the command line, not in a file"),
        (
            "[paint]\ndepth = 2026-01-01",
            "--config {path}: depth must be a number of 64 bits, a text without NUL, true, false or a list of these",
        ),
        (
            '[paint]\nfolders = ["a", "b\\u0000c"]',
            "--config {path}: folders must be a number of 64 bits, a text without NUL, true, false or a list of these",
        ),
        (
            f"[paint]\nsizes = [0x{6000 * 'f'}]",
            "--config {path}: sizes must be a number of 64 bits, a text without NUL, true, false or a list of these",
        ),
        (f"[paint]\nstyle = '{9000 * 'x'}'", f"argument --style: invalid choice: '{1900 * 'x'}"),
        ("[paint]\nstyle = ['ink']", "--config {path}: style must be one value, and not true or false, got ['ink']"),
        ("[paint]\nframe = 'no'", "--config {path}: frame must be true or false, got 'no'"),
        ("[paint]\ndepth = true", "--config {path}: depth must be one value, and not true or false, got True"),
        ("[paint]\ndepth = 'deep'", "argument --depth: invalid float value: 'deep' in {path} (see: tool paint --help)"),
        ("[paint]\nsizes = [0]", "--sizes must be 1 or more, got 0"),
        ("[paint]\nsizes = " + 20_000 * "[", "--config {path}: not a TOML file: "),
        ("[paint]\na" + 100_000 * ".a" + " = 1", "--config {path}: must have at most 2,000 dots, got 100,000"),
        (300_000 * " ", "--config {path}: must have at most 262,144 bytes, got 300,000"),
    ],
)
def test_what_is_wrong_with_a_file_of_settings_is_one_line(text, message, tmp_path, capsys):
    path = tmp_path / "mine.toml"
    if text is not None:
        path.write_text(text)
    assert painting("a", "--config", str(path)) == 2
    captured = capsys.readouterr()
    message = message.format(path=path)
    assert captured.out == ""
    assert captured.err.startswith(f"tool: error: {message}")
    assert captured.err.count("\n") == 1
    assert len(captured.err) < 2100


def test_a_run_is_repeated_by_the_file_that_it_wrote(tmp_path, monkeypatch, capsys):
    """Names with quotes, line ends and signs of other scripts come back as they were."""
    out = tmp_path / 'a "strange"\n\x7f\\ 夢'
    out.mkdir()
    settings = Painting(
        (out,),
        sizes=(3,),
        depth=1e-5,
        tools=("knife",),
        frame=False,
        sign=False,
        titles=("sea, calm",),
        guests=True,
        out=out,
    )
    seen = []

    def work(settings: Painting) -> int:
        note_run(settings.out)
        # A command that this one calls writes nothing.
        note_run(settings.out / "deeper")
        seen.append(settings)
        return 0

    monkeypatch.setitem(paint.__globals__, "paint", work)
    assert painting(*settings.arguments()) == 0
    assert sorted(path.name for path in out.iterdir()) == ["run.toml"]
    assert painting("--config", str(out / "run.toml")) == 0
    assert seen == [settings, replace(settings, guests=False)]


def test_python_writes_no_file_of_settings(tmp_path):
    note_run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_quiet_leaves_progress_out_and_verbose_says_more(monkeypatch, capsys):
    def work(settings: Painting) -> int:
        say("half done", sys.stderr, progress=True)
        say("done")
        raise UserError("no paint")

    monkeypatch.setitem(paint.__globals__, "paint", work)
    for options, expected in ((["--quiet"], []), ([], ["half done"]), (["-v"], ["half done"])):
        assert painting("a", *options) == 2
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert captured.out == "done\n"
        assert [line for line in lines if line == "half done"] == expected
        assert lines[-1] == "tool: error: no paint"
        assert ('folders = ["a"]' in lines) == ("Traceback (most recent call last):" in lines) == (options == ["-v"])


def test_help_shows_texts_defaults_groups_and_an_example_in_one_line(capsys):
    assert painting("--help") == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: tool paint [OPTIONS] DIR...\n\npaint folders\n")
    words = " ".join(text.split())
    for expected in ("--no-frame leave the frame out", "inches [default: 8 16]", "[choices: oil, ink] [default: oil]"):
        assert expected in words
    assert text.index("canvas") < text.index("--sizes")
    assert "None" not in text
    assert EXIT_CODES in text
    assert f"  tool paint {20 * 'a/long/name/ '}".rstrip() in text


def test_a_missing_library_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cyclopts", None)
    assert painting("a") == 2
    assert capsys.readouterr().err.endswith(f"cyclopts is not installed; {install_command('cli')}\n")
