"""manifest.jsonl: one line a finished video, so that a run can be killed at any moment and started again."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.video.io import lossless_path

NAME = "manifest.jsonl"

Key = tuple[str, int]
Record = jsonl.Row
_COMPLAINT = "not a manifest line; correct or remove it, or use another --out"


def read_manifest(folder: Path) -> dict[Key, Record]:
    """The records of `folder`'s manifest by (id, seed); the later of two lines wins. Missing file: none.

    A last line that a kill cut short is left out; the next `append_record` removes it.

    Raises:
        UserError: another line is no record; the message names file and line.
    """
    records: dict[Key, Record] = {}
    for place, record in jsonl.read(folder / NAME, _COMPLAINT):
        if not (isinstance(record.get("id"), str) and isinstance(record.get("seed"), int)):
            raise UserError(f"{place}: {_COMPLAINT}")
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
    """Add one finished video. Raises UserError if the file cannot be written."""
    jsonl.append(folder / NAME, [record])


def remove_records(folder: Path, keys: Collection[Key]) -> None:
    """Take the given videos, which are to be made again, out of the manifest in one step.

    Raises:
        UserError: the file cannot be written.
    """
    if read_manifest(folder).keys() & set(keys):
        jsonl.keep(folder / NAME, lambda record: (record["id"], record["seed"]) not in keys)


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
