"""The held-out prompts of the shapes world that a study makes its videos from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.demo_data import shipped_prompts
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import make_writable, write_texts
from xattn_video_pipelines.video import evenly_spaced


def write_prompts(folder: Path, count: int, every: int = 1) -> tuple[Path, list[dict[str, Any]]]:
    """A prompt file in `folder` with held-out prompts, and its records.

    Args:
        folder: where the file goes.
        count: how many prompts are taken, evenly spaced over all of them.
        every: of those every so many-th is kept, from the first one on: a shorter run of prompts that are in the
            longer one too.

    Raises:
        UserError: there are not so many, or the folder cannot be written.
    """
    records = [record for _, record in jsonl.read(shipped_prompts("shapes-held-out.jsonl"))]
    if not 1 <= count <= len(records):
        raise UserError(f"--videos must be from 1 to {len(records)}, got {count}")
    if every < 1:
        raise UserError(f"--every must be 1 or more, got {every}")
    make_writable(folder)
    file = folder / "prompts.jsonl"
    chosen = evenly_spaced(records, count)[::every]
    write_texts({file: jsonl.text(chosen)})
    return file, chosen
