"""What others say of a run's videos: the judge of the demo's world, and the user's own scores; and the verdicts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from xattn_video_eval.report.data import DENSE, Compared, Run
from xattn_video_pipelines.common.errors import UserError, one_line
from xattn_video_pipelines.common.files import read_input, read_own
from xattn_video_pipelines.common.schema import complaint, parse_json
from xattn_video_pipelines.common.verdict import verdict
from xattn_video_pipelines.demo import JUDGED_JSON, attention_speedup, loaded, read_timing
from xattn_video_pipelines.video import MANIFEST, Key, Record, busy, video_name

_MOST_BYTES = 2**30
_KEYS = ("id", "seed", "folder")


class _JudgedRow(TypedDict):
    id: str
    seed: int
    asked: dict[str, str]
    saw: str
    wrong: list[str]


class _Judged(TypedDict):
    videos: list[_JudgedRow]


class _ScoreRow(TypedDict):
    id: str
    seed: NotRequired[int]
    folder: str


@dataclass(frozen=True)
class Scores:
    """By folder and video: what the judge said (`judged`) and the user's numbers (`own`), which `names` names."""

    judged: dict[str, dict[Key, Record]]
    own: dict[str, dict[Key, dict[str, float]]]
    names: tuple[str, ...]

    def right(self, label: str, keys: Iterable[Key]) -> tuple[int, int] | None:
        """How many of these videos are as asked, of how many that ask for something; None where nobody judged."""
        rows = [row for key in keys if (row := self.judged.get(label, {}).get(key)) and row["asked"]]
        # A prompt need not name the size.
        return (sum(not set(row["wrong"]) - {"size"} for row in rows), len(rows)) if rows else None

    def mean(self, label: str, name: str) -> float | None:
        """The mean of one of the user's scores over the videos of a folder that have it."""
        values = [row[name] for row in self.own.get(label, {}).values() if name in row]
        return sum(values) / len(values) if values else None

    def said(self, label: str, key: Key) -> list[str]:
        """What the judge and the user say of one video, in words."""
        lines = []
        if (row := self.judged.get(label, {}).get(key)) is not None:
            wrong = f" (wrong: {', '.join(row['wrong'])})" if row["wrong"] else ""
            lines.append(f"the judge saw {row['saw']}{wrong}")
        return lines + [f"{name} {value:g}" for name, value in self.own.get(label, {}).get(key, {}).items()]


def read_scores(run: Run, own: Path | None) -> Scores:
    """The judged.json of every folder that is not older than its videos, and the user's file, if there is one.

    Raises:
        UserError: the user's file cannot be read, or a line of it is not of this run.
    """
    folders = {DENSE: (run.dense_folder, run.dense)} | {one.label: (one.folder, one.records) for one in run.compared}
    judged = {label: _judged(folder, records) for label, (folder, records) in folders.items()}
    scores: dict[str, dict[Key, dict[str, float]]] = {}
    names: dict[str, None] = {}
    if own is not None:
        for place, row in _lines(own):
            if row["folder"] not in folders:
                got = one_line(repr(row["folder"]), 60)
                raise UserError(f"--scores {place}: folder must be one of {', '.join(folders)}, got {got}")
            keys = [key for key in folders[row["folder"]][1] if key == (row["id"], row.get("seed", key[1]))]
            if not keys:
                raise UserError(f"--scores {place}: {row['folder']} has no video {_asked_for(row)}")
            values = {name: value for name, value in row.items() if name not in _KEYS}
            if (wrong := complaint(values, dict[str, float])) is not None:
                raise UserError(f"--scores {place}: {wrong}")
            names |= dict.fromkeys(values)
            for key in keys:
                scores.setdefault(row["folder"], {}).setdefault(key, {}).update(values)
    return Scores(judged, scores, tuple(names))


def verdicts(run: Run, scores: Scores) -> list[tuple[str, str]]:
    """A line of words about each sparse folder, with the folder's name."""
    return [(one.label, _verdict(run, one, scores)) for one in run.sparse]


def _verdict(run: Run, one: Compared, scores: Scores) -> str:
    keys, summary, timing = list(one.rows), one.summary, read_timing(run.folder)
    right = scores.right(one.label, keys)
    pairs = [(f"{DENSE}/{video_name(key)}", f"{one.label}/{video_name(key)}") for key in keys]
    attention = attention_speedup(timing, pairs)
    return verdict(
        right=right,
        dense_right=right and scores.right(DENSE, keys),
        # Likeness is no quality: it speaks where nobody has judged.
        psnr=summary["psnr"] if right is None else None,
        density=summary["density"],
        attention=attention,
        whole=summary["speedup"],
        # The demo noted the load before its own videos alone.
        doubt=(None if attention is None else loaded(timing["runs"]))
        or busy(side[key] for side in (run.dense, one.records) for key in keys),
    )


def _judged(folder: Path, records: dict[Key, Record]) -> dict[Key, Record]:
    path = folder / JUDGED_JSON
    try:
        if os.lstat(path).st_mtime_ns < os.stat(folder / MANIFEST).st_mtime_ns:
            return {}
        value: Any = parse_json(read_own(path, _MOST_BYTES))
    except (OSError, ValueError):
        return {}
    if complaint(value, _Judged) is not None:
        return {}
    rows = {(row["id"], row["seed"]): row for row in value["videos"]}
    return {key: row for key, row in rows.items() if key in records}


def _lines(path: Path) -> Iterator[tuple[str, Record]]:
    """The rows of the user's file with their places. It is no log: its last line counts without a line end too."""
    try:
        text = read_input(path).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--scores {path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        raise UserError(f"--scores {path}: not UTF-8") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            wrong = complaint(row, _ScoreRow)
        except ValueError as error:
            wrong = str(error)
        if wrong is not None:
            example = '{"id": "0001", "folder": "dense", "mine": 4}'
            raise UserError(f"--scores {path}:{number}: not a line such as {example} ({wrong})")
        yield f"{path}:{number}", row


def _asked_for(row: Record) -> str:
    return one_line(repr(row["id"]), 60) + (f" with seed {row['seed']}" if "seed" in row else "")
