"""The demo's last step: its videos in a row, as a story, and a question about each for a model that watches.

The answers are what the prompts asked for: where a video shows something else, a reply that says so counts as wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.files import make_writable, write_texts
from xattn_video_pipelines.demo import stories, world
from xattn_video_pipelines.video import read_manifest, read_video, video_file, write_video

STORY, QUESTIONS = "story.mp4", "questions.jsonl"


def write_story(folder: Path, keys: Sequence[tuple[str, int]], out: Path) -> Path | None:
    """Put videos one after the other into one, and write a question about each.

    Args:
        folder: of the videos, with their manifest.
        keys: prompt ids and seeds, in the order of the story.
        out: where the story and the file of questions go.

    Returns:
        The file of questions, one of another kind from video to video. None where a video has fewer frames than a
        scene, there are more of them than a question has words for, or their prompts say nothing of the shapes world.
    """
    records = read_manifest(folder)
    told = [records[key] for key in keys]
    clips = [read_video(video_file(folder, record))[: stories.SCENE_FRAMES] for record in told]
    if len(clips) > len(stories.ORDINALS) or min(map(len, clips)) < stories.SCENE_FRAMES:
        return None
    lines = []
    for number, record in enumerate(told):
        wanted = world.asked(record.get("prompt") or "")
        kinds = [kind for kind in stories.BY_PLACE if kind in wanted]
        if not kinds:
            return None
        kind = kinds[number % len(kinds)]
        question = stories.ALONE[kind] if len(told) == 1 else stories.BY_PLACE[kind].format(stories.ORDINALS[number])
        line = {"id": f"{number + 1}-{kind}", "video": STORY, "question": question, "answer": wanted[kind]}
        lines.append(line)
    make_writable(out)
    write_video(out / STORY, np.concatenate(clips), world.FPS)
    write_texts({out / QUESTIONS: jsonl.text(lines)})
    return out / QUESTIONS
