"""`run.toml`: the settings of a run in a file, written beside what it makes and read by `--config`.

A file has one table per command, and a key for each setting, by its name in Python:

    [generate]
    model = "demo"
    seeds = [0, 1]

It says nothing that options cannot say: its values are read as the values of options are, and a setting that could run
foreign code or replace a file of any name is left to the command line. Paths mean what they mean on the command line:
a relative path starts from the folder where the command runs.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import tomllib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from xattn_video_pipelines.common.environment import own_version
from xattn_video_pipelines.common.errors import UserError, did_you_mean, one_line
from xattn_video_pipelines.common.files import read_input, write_texts
from xattn_video_pipelines.common.settings import Settings, options_of
from xattn_video_pipelines.common.terminal import printable

RUN_FILE = "run.toml"
# A file of settings is short; more than this is something else. The time to parse a key grows with the square of its
# dots.
_MOST_BYTES, _MOST_DOTS = 2**18, 2000

Value = bool | int | float | str | list[bool | int | float | str]

# The command that the user gave, not one that it calls: `demo` calls `generate`, but what repeats the run is `demo`.
_RUN: ContextVar[tuple[str, Settings] | None] = ContextVar("run", default=None)


@contextlib.contextmanager
def running(command: str, settings: Settings) -> Iterator[None]:
    """While a command of the command line runs: what `note_run` writes."""
    token = _RUN.set((command, settings))
    try:
        yield
    finally:
        _RUN.reset(token)


def note_run(folder: Path) -> None:
    """Write run.toml, if `folder` is the `out` of the command that the user gave on the command line.

    Raises:
        UserError: the file cannot be written.
    """
    run = _RUN.get()
    if run is not None and getattr(run[1], "out", None) == folder:
        write_texts({folder / RUN_FILE: run_text(*run, path=folder / RUN_FILE)})


def run_text(command: str, settings: Settings, path: Path = Path(RUN_FILE)) -> str:
    """The settings of a command as TOML. All that have a value are in it, so that a later default changes nothing.

    >>> from xattn_video_pipelines.status import StatusSettings
    >>> print(run_text("status", StatusSettings(Path("out"))).splitlines()[-1])
    folder = "out"
    """
    lines = [
        f"# Written by xattn-video {own_version()}. The same run again, from the same working directory:",
        f"#     xattn-video {command} --config {printable(one_line(shlex.quote(str(path))))}",
        "# An option that is given on the command line wins over its value here.",
        "",
        f"[{command}]",
    ]
    for name, option in options_of(type(settings)).items():
        value = getattr(settings, name)
        if value is not None and value != () and not option.command_line_only:
            lines.append(f"{name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def read_run(path: Path, command: str, settings: type[Settings]) -> dict[str, Value]:
    """The values that a file has for a command, by the names of its settings.

    Args:
        path: the file that the user named.
        command: whose table is read.
        settings: the class of its settings.

    Raises:
        UserError: the file is missing or no TOML, has no table of the command, or a key in the table is no setting of
            the command or has a value of a wrong kind.
    """
    try:
        text = read_input(path, _MOST_BYTES).decode()
        if text.count(".") > _MOST_DOTS:
            raise UserError(f"{path}: must have at most {_MOST_DOTS:,} dots, got {text.count('.'):,}")
        document = tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    except UserError as error:
        raise UserError(f"--config {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: not a TOML file: {one_line(error, 200)}") from None
    table = document.get(command)
    if not isinstance(table, dict):
        there = ", ".join(f"[{name}]" for name in document) or "nothing"
        raise UserError(f"--config {path}: needs a table [{command}], has {one_line(there, 100)}")
    options = options_of(settings)
    for key, value in table.items():
        if key not in options:
            raise UserError(
                f"--config {path}: {command} has no setting {one_line(repr(key), 60)}{did_you_mean(key, options)}"
            )
        # Without them is what holds anyway, and earlier versions wrote so.
        if options[key].command_line_only and value is not False:
            raise UserError(f"--config {path}: {key} must be given on the command line, not in a file")
        if not _is_value(value):
            raise UserError(
                f"--config {path}: {key} must be a number of 64 bits, a text without NUL, true, false or a list of "
                "these"
            )
    return table


def _is_value(value: Any) -> bool:
    return all(map(_is_single, value)) if isinstance(value, list) else _is_single(value)


def _is_single(value: Any) -> bool:
    # TOML has integers of 64 bits. Python reads longer ones too, and in hexadecimal ones that it cannot write.
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    # The command line cannot hold a NUL either, and no name of a file may.
    return isinstance(value, float) or (isinstance(value, str) and "\0" not in value)


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    # JSON's escapes are TOML's, but for the one control character that JSON leaves as it is.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
