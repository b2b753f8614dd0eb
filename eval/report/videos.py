"""The videos in a report: the worst cases first, as many as fit, each file once and checked by decoding it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xattn_video_eval.report.data import DENSE, Case, Run
from xattn_video_eval.report.scores import Scores
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.terminal import is_quiet
from xattn_video_pipelines.video import Key, check_exists, video_file, video_info, video_name


@dataclass(frozen=True)
class Embedded:
    """`videos`: data URLs by `<folder>/<id>-s<seed>`; `cases`: those that can be played; `left_out`: the others."""

    videos: dict[str, str]
    cases: list[Case]
    left_out: list[Case]
    bytes: int


def embed(run: Run, cases: Sequence[Case], max_megabytes: float, progress: bool = True) -> Embedded:
    """Read the mp4 files of `cases` in this order until the next one would pass the limit (10^6 bytes, as base64).

    A case that does not fit is left out; a later, smaller one may still fit.

    Raises:
        UserError: a file is missing, damaged, cut off or not the one of its record, or it has another number of frames
            than its dense one.
    """
    from tqdm import tqdm

    folders = {DENSE: (run.dense_folder, run.dense)} | {one.label: (one.folder, one.records) for one in run.compared}
    limit = max_megabytes * 1e6
    videos: dict[str, str] = {}
    frames: dict[str, int] = {}
    digests: dict[str, str | None] = {}
    kept, left_out, total = [], [], 0
    for case in tqdm(cases, desc="videos", unit="case", disable=is_quiet() or not progress):
        paths = {}
        for label in (DENSE, case.label):
            folder, records = folders[label]
            name = f"{label}/{video_name(case.key)}"
            if name not in videos:
                paths[name] = video_file(folder, records[case.key])
                check_exists(paths[name])
                digests[name] = records[case.key].get("sha256")
        size = sum(_encoded_size(path) for path in paths.values())
        if total + size > limit:
            left_out.append(case)
            continue
        for name, path in paths.items():
            # Whole or not at all: a browser would stop at the damage without a word.
            frames[name] = video_info(path).frames
            videos[name] = data_url(path, digests[name])
        counts = frames[f"{DENSE}/{video_name(case.key)}"], frames[case.id]
        if counts[0] != counts[1]:
            raise UserError(f"{case.id}: {counts[1]} frames in the mp4, but {counts[0]} in the dense one")
        total += size
        kept.append(case)
    return Embedded(videos, kept, left_out, total)


def data_url(path: Path, digest: str | None = None) -> str:
    """The file as a `data:` URL. Raises UserError unless its SHA-256 is `digest`, where one is known."""
    data = path.read_bytes()
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise UserError(
            f"{path}: not the file that generate wrote, its SHA-256 is not the manifest's; "
            "remove it and run generate again"
        )
    return "data:video/mp4;base64," + base64.b64encode(data).decode("ascii")


def player_cases(run: Run, embedded: Embedded, scores: Scores) -> list[dict[str, Any]]:
    """What the script needs of each case, JSON-ready: its two videos, what to show, frames and frames a second."""
    folders = {one.label: one.records for one in run.compared}

    def describe(case: Case) -> dict[str, Any]:
        record, row = folders[case.label][case.key], case.row
        return {
            "id": case.id,
            "folder": case.label,
            "name": video_name(case.key),
            "prompt": record.get("prompt") or "",
            "dense": f"{DENSE}/{video_name(case.key)}",
            "frames": row["frames"],
            "fps": record.get("fps") or 16,
            "width": row["width"],
            "height": row["height"],
            "psnr": row["psnr"],
            "ssim": row["ssim"],
            "density": row["density"],
            "dense_said": scores.said(DENSE, case.key),
            "sparse_said": scores.said(case.label, case.key),
        }

    return [describe(case) for case in embedded.cases]


def prompt_of(run: Run, key: Key) -> str:
    """A video's prompt, empty where the manifest has none."""
    return run.dense[key].get("prompt") or ""


def _encoded_size(path: Path) -> int:
    return (path.stat().st_size + 2) // 3 * 4
