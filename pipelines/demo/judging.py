"""`xattn-video judge`: what the judge saw in each video of a folder, beside what its prompt asks for."""

from __future__ import annotations

from collections.abc import Collection
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import make_writable, write_texts
from xattn_video_pipelines.common.program import for_people
from xattn_video_pipelines.common.settings import Json
from xattn_video_pipelines.common.tables import aligned
from xattn_video_pipelines.common.terminal import is_quiet, say
from xattn_video_pipelines.demo.settings import JUDGED_JSON, JudgeSettings
from xattn_video_pipelines.demo.world import asked
from xattn_video_pipelines.video import (
    MANIFEST,
    Key,
    Record,
    check_exists,
    finished_videos,
    lossless_copy,
    read_video,
    video_file,
    video_name,
)

if TYPE_CHECKING:
    from xattn_video_pipelines.demo.judge import Verdict

# A prompt need not name the size, so it is told but is no part of "all".
_IN_ALL = ("colour", "shape", "motion", "background")
_LONGEST_PROMPT = 64

EXAMPLE = """\
example:
  xattn-video judge demo-out/dense demo-out/xattn-s8-t0.35-w2-a1-n8
"""


def command(settings: JudgeSettings, *, json: Json = False) -> int:
    """`xattn-video judge`: a table and a file for each folder; returns the exit code. Raises UserError."""
    documents = judge_folders(settings)
    people = for_people(json)
    for document in documents:
        say(_table(document), people)
        say(f"wrote {Path(document['folder']) / JUDGED_JSON}\n", people)
    if json:
        print(dumps(documents, allow_nan=False))
    return 0


def judge_folders(settings: JudgeSettings) -> list[dict[str, Any]]:
    """Judge the videos of each folder once and write judged.json there; what the files hold. Raises UserError."""
    folders = list(dict.fromkeys(settings.folders))
    # All of them before the first video is decoded.
    for folder in folders:
        _videos(folder, None)
        make_writable(folder)
    documents = []
    for folder in folders:
        document = judge_folder(folder)
        write_texts({folder / JUDGED_JSON: dumps(document, indent=2, allow_nan=False) + "\n"})
        documents.append(document)
    return documents


def judge_folder(folder: Path, *, keys: Collection[Key] | None = None, progress: bool = True) -> dict[str, Any]:
    """Judge the videos of a folder, from their lossless copies where there are any.

    Args:
        folder: what `xattn-video generate` wrote.
        keys: the (id, seed) of the videos that are wanted; None takes all of the manifest.
        progress: show a bar on stderr, if that is a terminal.

    Returns:
        What judged.json holds, JSON-ready: `folder`, `totals` and `videos`.

        `totals` has the numbers of `videos` and of those that are `counted` (their prompt asks for something), and
        under `right`, for each attribute and for `all`, how many are `right` of how many were `asked` for it, and
        the `share` (None if none was asked). A video is right on `all` if colour, shape, motion and background are
        right as far as its prompt asks for them.

        A row of `videos` has `id`, `seed`, `prompt`, `file`, `asked` (attribute to word), `seen` (the verdict's
        fields), `saw` (the same in words) and `wrong` (the attributes that are asked for and not seen).

    Raises:
        UserError: the folder or its manifest is missing or empty, a video is missing, damaged or too small, or a
            key is not in the manifest.
    """
    from tqdm import tqdm

    videos = _videos(folder, keys)
    # disable=None: no bar where stderr is a file.
    bar = tqdm(videos, desc="judge", unit="video", leave=False, disable=None if progress and not is_quiet() else True)
    rows = [_row(record, file) for record, file in bar]
    return {"folder": str(folder), "totals": totals(rows), "videos": rows}


def saw(verdict: Verdict) -> str:
    """A verdict in words: "red circle moving left on white", with "?" for what is nothing of this world."""
    motion = {None: "?", "still": "standing still"}.get(verdict.motion, f"moving {verdict.motion}")
    return f"{verdict.colour or '?'} {verdict.shape or '?'} {motion} on {verdict.background or '?'}"


def _row(record: Record, file: Path) -> Record:
    from xattn_video_pipelines.demo.judge import judge

    try:
        verdict = judge(read_video(file))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    prompt = str(record.get("prompt") or "")
    wanted = asked(prompt)
    return {
        "id": record["id"],
        "seed": record["seed"],
        "prompt": prompt,
        "file": file.name,
        "asked": wanted,
        "seen": verdict.to_dict(),
        "saw": saw(verdict),
        "wrong": [name for name, word in wanted.items() if getattr(verdict, name) != word],
    }


def totals(rows: list[Record]) -> dict[str, Any]:
    """What `judge_folder` gives under this name, of these rows alone."""
    right = {}
    for names in (*((name,) for name in _IN_ALL), _IN_ALL, ("size",)):
        of = [row for row in rows if not row["asked"].keys().isdisjoint(names)]
        count = sum(set(names).isdisjoint(row["wrong"]) for row in of)
        title = "all" if names == _IN_ALL else names[0]
        right[title] = {"right": count, "asked": len(of), "share": count / len(of) if of else None}
    return {"videos": len(rows), "counted": sum(bool(row["asked"]) for row in rows), "right": right}


def _table(document: dict[str, Any]) -> str:
    """As printed: a row a video, the shares, and how many were not counted."""
    lines = [("video", "prompt", "the judge saw", "result")]
    for row in document["videos"]:
        wrong = ", ".join(f"{name} (asked: {row['asked'][name]})" for name in row["wrong"])
        if not row["asked"]:
            wrong = "not counted"
        lines.append((video_name((row["id"], row["seed"])), _shortened(row["prompt"]), row["saw"], wrong or "as asked"))
    counts = document["totals"]
    shares = [
        f"{name} {total['share']:.1%} ({total['right']}/{total['asked']})"
        for name, total in counts["right"].items()
        if total["asked"]
    ]
    end = [f"right in {document['folder']}: {', '.join(shares) or 'nothing was asked for'}"]
    if others := counts["videos"] - counts["counted"]:
        end.append(f"not counted: {others} of {counts['videos']}, whose prompts name nothing of the shapes world")
    return "\n".join([aligned(lines, left=len(lines[0]), rules=(1, len(lines))), *end])


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_PROMPT else text[: _LONGEST_PROMPT - 3] + "..."


def _videos(folder: Path, keys: Collection[Key] | None) -> list[tuple[Record, Path]]:
    """The records and the files to judge, in the manifest's order; every file is there."""
    records = finished_videos(folder)
    for key in keys or ():
        if key not in records:
            raise UserError(f"{folder / MANIFEST}: no video {video_name(key)} in it")
    return [(record, _file(folder, record)) for key, record in records.items() if keys is None or key in keys]


def _file(folder: Path, record: Record) -> Path:
    file = lossless_copy(folder, record) or video_file(folder, record)
    check_exists(file)
    return file
