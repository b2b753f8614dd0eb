"""`xattn-video status`: what a run has made, what failed, what is left, and how long that takes."""

from __future__ import annotations

from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Annotated, Any

from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.batch import Key, read_failures, read_plan
from xattn_video_pipelines.common.errors import UserError, one_line
from xattn_video_pipelines.common.settings import Json, Option, Settings
from xattn_video_pipelines.common.tables import aligned, duration
from xattn_video_pipelines.common.terminal import say
from xattn_video_pipelines.qa import ANSWERS
from xattn_video_pipelines.video import read_manifest, video_name

EXAMPLE = """\
example:
  xattn-video status out
  xattn-video status out --json
"""


@dataclass(frozen=True)
class StatusSettings(Settings):
    """Which run: the folder that `generate`, `sweep` or `qa` was given as `--out`."""

    folder: Annotated[Path, Option("the --out folder of generate, sweep or qa", metavar="DIR")]


def command(settings: StatusSettings, *, json: Json = False) -> int:
    """`xattn-video status`: print the counts, and the failures that are still open; 0. Raises UserError."""
    document = status(settings)
    say(dumps(document) if json else _text(document))
    return 0


def status(settings: StatusSettings) -> dict[str, Any]:
    """How far the runs into a folder are. Nothing is written, and runs that go on are not disturbed.

    Returns:
        `done`, `failed` and `left` are counts of videos, and of answers where questions were asked. `failed` are those
        whose last try failed and that were not made since. `seconds_to_go` is the time that those that are left take
        one after the other, by the mean of those of the same attention that are done (of all, where it has none). It
        is None where nothing is done yet; loading and writing are not in it. `configurations` has the same by
        attention, and `failures` the failures that are open.

    Raises:
        UserError: the folder has no plan, or a file in it is damaged.
    """
    folder = settings.folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    plan, failures = read_plan(folder), read_failures(folder)
    seconds = _seconds_of_videos(folder, plan["videos"]) | _seconds_of_answers(folder, plan["answers"])
    # The failure of a question is one of all its answers.
    failed = {
        key: failures.get(key) or failures.get((None, *key[1:]))
        for key in (*plan["videos"], *plan["answers"])
        if key not in seconds
    }
    labels = dict.fromkeys(key[0] for key in (*plan["videos"], *plan["answers"]))
    configurations: dict[str, dict[str, Any]] = {}
    for label in labels:
        own = [key for key in (*plan["videos"], *plan["answers"]) if key[0] == label]
        times = [seconds[key] for key in own if key in seconds]
        broken = sum(failed.get(key) is not None for key in own)
        left = len(own) - len(times) - broken
        mean = _mean(times) or _mean(list(seconds.values()))
        to_go = 0.0 if not left else None if mean is None else left * mean
        configurations[str(label)] = {"done": len(times), "failed": broken, "left": left, "seconds_to_go": to_go}
    counts = {name: sum(row[name] for row in configurations.values()) for name in ("done", "failed", "left")}
    rest = [row["seconds_to_go"] for row in configurations.values()]
    open_failures = {id(row): row for row in failed.values() if row is not None}.values()
    names = ("attention", "id", "seed", "name", "kind", "message", "time")
    return {
        **counts,
        "seconds_to_go": None if None in rest else sum(rest),
        "configurations": configurations,
        "failures": [{name: row.get(name) for name in names} for row in open_failures],
    }


def _seconds_of_videos(folder: Path, planned: dict[Key, None]) -> dict[Key, float]:
    """The time of each video that is finished."""
    made: dict[Key, float] = {}
    for label in dict.fromkeys(str(key[0]) for key in planned):
        for key, record in read_manifest(folder / label).items():
            if (label, *key) in planned and (folder / label / f"{video_name(key)}.mp4").is_file():
                made[label, *key] = _number(record.get("seconds"))
    return made


def _seconds_of_answers(folder: Path, planned: dict[Key, None]) -> dict[Key, float]:
    """The time of each answer that is there."""
    made: dict[Key, float] = {}
    for _, row in jsonl.read(folder / ANSWERS) if planned else ():
        key = (row.get("attention"), row.get("id"), None)
        if key in planned:
            made[key] = _number(row.get("prefill_seconds")) + _number(row.get("decode_seconds"))
    return made


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e9 else 0.0


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _text(document: dict[str, Any]) -> str:
    lines = [("", "done", "failed", "left", "time to go")]
    rows = {**document["configurations"], "all": document}
    if len(rows) == 2:
        del rows["all"]
    for label, row in rows.items():
        counts = (str(row[name]) for name in ("done", "failed", "left"))
        lines.append((label, *counts, duration(row["seconds_to_go"])))
    text = [aligned(lines, left=1, rules=(len(lines) - 1,) if len(rows) > 2 else ())]
    text += [one_line(f"failed: {row['name']}: {row['kind']}: {row['message']}") for row in document["failures"]]
    return "\n".join(text)
