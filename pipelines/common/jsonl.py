"""Logs of results, one JSON object a line: a process may be killed at any moment, and several may write at once."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import alone_with, open_own, reason_of, write_texts

Row = dict[str, Any]


def text(rows: Iterable[Row]) -> str:
    """The rows as lines, to be written in UTF-8 with errors="backslashreplace".

    That error handler writes half of a surrogate pair, which is no UTF-8, as JSON's own escape of it.
    """
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path: Path, complaint: str = "not a JSON object") -> Iterator[tuple[str, Row]]:
    """The rows of a log, each with its place as messages name it, such as `manifest.jsonl:3`.

    A last line without its end is one that a kill cut short, or that another process is writing: it is left out.
    A missing file has no rows.

    Raises:
        UserError: the file cannot be read, or a whole line is no JSON object: place and `complaint`.
    """
    for number, line in enumerate(_whole_lines(path), start=1):
        if line.strip():
            yield f"{path}:{number}", _parse(line, f"{path}:{number}: {complaint}")


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a log in one write, and wait until they are on the disk.

    A kill can only cut the rows that are being added, never earlier ones. A last line that an earlier kill cut short
    is cut away first.

    Raises:
        UserError: the file cannot be written.
    """
    data = text(rows).encode(errors="backslashreplace")
    try:
        # Without a lock, a line that another process is writing would look like one that a kill cut short.
        with alone_with(path):
            descriptor = open_own(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            with os.fdopen(descriptor, "ab+", buffering=0) as file:
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        file.seek(0)
                        file.truncate(file.read().rfind(b"\n") + 1)
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot write: {reason_of(error)}") from None


def repair(path: Path) -> None:
    """Cut away a last line that a kill cut short, as `append` does. Raises UserError if that cannot be done."""
    if path.exists():
        append(path, [])


def keep(path: Path, wanted: Callable[[Row], bool]) -> None:
    """Remove the other rows from a log, in one step. Raises UserError as `read` and `append` do."""
    try:
        # A row that another process adds between reading and writing would be lost.
        with alone_with(path):
            write_texts({path: text(row for _, row in read(path) if wanted(row))})
    except OSError as error:
        raise UserError(f"{path}: cannot write: {reason_of(error)}") from None


class Follower:
    """Reads the rows that are added to a log from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def new(self) -> list[Row]:
        """The rows that were added since the last call; a line that is not complete yet waits."""
        lines = _whole_lines(self._path, self._offset)
        self._offset += sum(len(line) + 1 for line in lines)
        return [_parse(line, f"{self._path}: not a JSON object") for line in lines if line.strip()]


def _whole_lines(path: Path, offset: int = 0) -> list[bytes]:
    """The lines from `offset` bytes on that have an end. Only a line feed ends a line."""
    try:
        with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
            file.seek(offset)
            return file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot read: {reason_of(error)}") from None


def _parse(line: bytes, complaint: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise UserError(complaint)
    return row
