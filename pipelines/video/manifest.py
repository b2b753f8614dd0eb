"""manifest.jsonl: one line a finished video, so that a run can be killed at any moment and started again."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import alone_with, write_texts
from xattn_video_pipelines.video.io import lossless_path

NAME = "manifest.jsonl"

Key = tuple[str, int]
Record = dict[str, Any]


def read_manifest(folder: Path) -> dict[Key, Record]:
    """The records of `folder`'s manifest by (id, seed); the later of two lines wins. Missing file: none.

    A last line that a kill cut short is left out (and mended by the next `append_record`).

    Raises:
        UserError: another line is no record; the message names file and line.
    """
    path = folder / NAME
    complete, _ = _split(path)
    records: dict[Key, Record] = {}
    for number, line in enumerate(complete.split(b"\n"), start=1):
        if line.strip():
            record = _parse(line)
            if record is None:
                raise UserError(f"{path}:{number}: not a manifest line; mend or remove it, or use another --out")
            records[record["id"], record["seed"]] = record
    return records


def finished_videos(folder: Path) -> dict[Key, Record]:
    """`read_manifest` of a folder that must hold videos.

    Raises:
        UserError: no such folder, no manifest in it, or none of its videos is finished.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not (folder / NAME).is_file():
        raise UserError(f"{folder}: no {NAME} in it; give a folder that `xattn-video generate` wrote")
    records = read_manifest(folder)
    if not records:
        raise UserError(f"{folder / NAME}: no finished video in it")
    return records


def video_name(key: Key) -> str:
    """How a video is called in tables and messages: `<id>-s<seed>`."""
    return f"{key[0]}-s{key[1]}"


def video_file(folder: Path, record: Record) -> Path:
    """The mp4 file of a record.

    Raises:
        UserError: the record names no file.
    """
    file = record.get("file")
    if not isinstance(file, str):
        raise UserError(f"{folder / NAME}: {video_name((record['id'], record['seed']))} names no file")
    return folder / file


def lossless_copy(folder: Path, record: Record) -> Path | None:
    """The copy that the record names (`lossless_file`, None if made without one), if it is there."""
    name = record.get("lossless_file", lossless_path(video_file(folder, record)).name)
    return folder / name if name and (folder / name).is_file() else None


def check_exists(file: Path) -> None:
    """Raise UserError for a file of the manifest that is gone."""
    if not file.is_file():
        raise UserError(f"{file}: listed in the manifest, but missing; run generate again")


def append_record(folder: Path, record: Record) -> None:
    """Add one finished video and force it to disk. A torn last line is cut away first.

    One write of one line: a kill can only cut this line, never one before it.

    Raises:
        UserError: the file cannot be written.
    """
    path = folder / NAME
    try:
        # a line that another process is writing looks torn
        with alone_with(path):
            complete, torn = _split(path)
            if torn:
                os.truncate(path, len(complete))
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
            line = _line(record)
            with os.fdopen(descriptor, "ab", buffering=0) as file:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror}") from None


def remove_records(folder: Path, keys: Collection[Key]) -> None:
    """Take the given videos out of the manifest (they are to be made anew), replacing the file in one step.

    Raises:
        UserError: the file cannot be written.
    """
    path = folder / NAME
    if not read_manifest(folder).keys() & set(keys):
        return
    try:
        # a line that another process adds in between would be lost
        with alone_with(path):
            left = [json.dumps(record) + "\n" for key, record in read_manifest(folder).items() if key not in keys]
            write_texts({path: "".join(left)})
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror}") from None


def differences(old: Record, new: Record, fields: Collection[str]) -> list[str]:
    """What an existing line says otherwise than this run would: `"steps 20, now 50"` a field."""
    # Through JSON, so that tuples and lists, 5 and 5.0 count as the same.
    new = json.loads(json.dumps(new))
    return [
        f"{name} {_show(old.get(name))}, now {_show(new.get(name))}"
        for name in fields
        if old.get(name) != new.get(name)
    ]


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _line(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _split(path: Path) -> tuple[bytes, bytes]:
    """The file's whole lines, and what follows the last line end."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return b"", b""
    except OSError as error:
        raise UserError(f"{path}: cannot read the manifest: {error.strerror}") from None
    end = data.rfind(b"\n") + 1
    return data[:end], data[end:]


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if isinstance(record, dict) and isinstance(record.get("id"), str) and isinstance(record.get("seed"), int):
        return record
    return None
