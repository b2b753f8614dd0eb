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
from xattn_video_pipelines.common.schema import complaint as schema_complaint
from xattn_video_pipelines.common.schema import parse_json

Row = dict[str, Any]
# A row tells a video in some ten thousand bytes. Memory has a bound, whatever a file holds.
_LONGEST_LINE = 2**26
_TAIL = 4096


def text(rows: Iterable[Row]) -> str:
    """The rows as lines, to be written in UTF-8 with errors="backslashreplace".

    That error handler writes half of a surrogate pair, which is no UTF-8, as JSON's own escape of it.
    """
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path: Path, complaint: str = "not a JSON object", schema: Any = None) -> Iterator[tuple[str, Row]]:
    """The rows of a log, each with its place as messages name it, such as `manifest.jsonl:3`.

    A last line without its end is one that a kill cut short, or that another process is writing: it is left out.
    A missing file has no rows.

    Args:
        path: of the log; a link is not followed.
        complaint: what is said of a line that is no JSON object.
        schema: what each row must be, as of `schema.complaint`; with one, lines are read as by `schema.parse_json`.

    Raises:
        UserError: the file cannot be read, or a whole line is no such row: place and `complaint`.
    """
    yield from _rows(path, _whole_lines(path), complaint, schema)


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
    """Reads a log once, and then the rows that are added to it.

    Args:
        path: of the log, which need not be there yet.
        from_start: give the rows that are there already first.
        complaint, schema: as of `read`.
    """

    def __init__(
        self, path: Path, *, from_start: bool = False, complaint: str = "not a JSON object", schema: Any = None
    ) -> None:
        self._path, self._complaint, self._schema = path, complaint, schema
        self._offset = path.stat().st_size if path.exists() and not from_start else 0
        self._lines = 0
        # The last bytes that were read: a log that was replaced or edited does not have them at that place.
        self._file: os.stat_result | None = None
        self._tail = b""

    def new(self) -> list[Row]:
        """The rows that were added since the last call; a line that is not complete yet waits."""
        return self.news()[1]

    def news(self) -> tuple[bool, list[Row]]:
        """Whether the log was replaced or edited since the last call, and the new rows, then all of them.

        Raises:
            UserError: as `read`.
        """
        rewritten = self._is_rewritten()
        if rewritten:
            self._offset, self._lines, self._tail, self._file = 0, 0, b"", None
        lines = list(_whole_lines(self._path, self._offset))
        rows = [row for _, row in _rows(self._path, lines, self._complaint, self._schema, self._lines)]
        if lines:
            self._lines += len(lines)
            self._offset += sum(map(len, lines))
            self._tail = lines[-1][-_TAIL:]
            self._file = os.lstat(self._path)
        return rewritten, rows

    def _is_rewritten(self) -> bool:
        if self._file is None:
            return False
        try:
            with os.fdopen(open_own(self._path, os.O_RDONLY), "rb") as file:
                file.seek(self._offset - len(self._tail))
                same = os.path.samestat(os.fstat(file.fileno()), self._file)
                return not same or file.read(len(self._tail)) != self._tail
        except OSError:
            return True


def _rows(
    path: Path, lines: Iterable[bytes], complaint: str, schema: Any, before: int = 0
) -> Iterator[tuple[str, Row]]:
    """The rows of lines, of which `before` lines come first in the file."""
    for number, line in enumerate(lines, start=before + 1):
        if line.strip():
            yield f"{path}:{number}", _parse(line, f"{path}:{number}: {complaint}", schema)


def _whole_lines(path: Path, offset: int = 0) -> Iterator[bytes]:
    """The lines from `offset` bytes on that have an end, with it. Only a line feed ends a line."""
    try:
        with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
            file.seek(offset)
            while (line := file.readline(_LONGEST_LINE)).endswith(b"\n"):
                yield line
        if len(line) == _LONGEST_LINE:
            raise UserError(f"{path}: a line must have less than {_LONGEST_LINE:,} bytes")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot read: {reason_of(error)}") from None


def _parse(line: bytes, complaint: str, schema: Any = None) -> Row:
    try:
        row = json.loads(line) if schema is None else parse_json(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise UserError(complaint)
    if schema is not None and (wrong := schema_complaint(row, schema)) is not None:
        raise UserError(f"{complaint} ({wrong})")
    return row
