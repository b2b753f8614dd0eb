"""The demo's questions: its videos in a row, and a question about each that its prompt answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.test_stories import answered
from xattn_video_pipelines.demo import asking, stories, world
from xattn_video_pipelines.demo.judge import judge
from xattn_video_pipelines.qa.questions import read_questions
from xattn_video_pipelines.video.io import read_video, write_video
from xattn_video_pipelines.video.manifest import append_record

SCENES = (
    world.Scene("red", "circle", "left", "white", "large"),
    world.Scene("blue", "square", "up", "black", "small"),
    world.Scene("green", "star", "still", "grey", "large"),
)


def add(folder: Path, scene: world.Scene, id: str, *, frames: int = 33, prompt: str | None = None) -> tuple[str, int]:
    """A finished video, as generate leaves it."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{id}-s0.mp4"
    write_video(file, world.render(scene, 0, frames=frames), world.FPS)
    prompt = world.caption(scene, 0) if prompt is None else prompt
    append_record(folder, {"id": id, "seed": 0, "file": file.name, "prompt": prompt})
    return id, 0


def test_a_story_shows_the_videos_in_order_and_each_is_asked_about(tmp_path: Path) -> None:
    keys = [add(tmp_path / "dense", scene, str(number)) for number, scene in enumerate(SCENES)]
    file = asking.write_story(tmp_path / "dense", keys[::-1], tmp_path / "answers")
    assert file is not None
    questions = read_questions(file)
    told = stories.Story(SCENES[::-1], 0)
    assert [question.id.split("-")[1] for question in questions] == ["colour", "shape", "motion"]
    assert [question.answer for question in questions] == ["green", "square", "left"]
    assert [answered(told, question.question) for question in questions] == [one.answer for one in questions]
    frames = read_video(tmp_path / "answers" / "story.mp4")
    assert len(frames) == 3 * stories.SCENE_FRAMES
    for clip, scene in zip(np.split(frames, 3), told.scenes, strict=True):
        assert all(judge(clip).right(scene).values())


def test_one_video_has_no_place(tmp_path: Path) -> None:
    file = asking.write_story(tmp_path, [add(tmp_path, SCENES[0], "a")], tmp_path)
    assert file is not None
    assert json.loads(file.read_text())["question"] == "What colour is the shape?"


@pytest.mark.parametrize("why", ["short", "many", "other prompts"])
def test_what_cannot_be_asked_about_is_left(why: str, tmp_path: Path) -> None:
    key = add(
        tmp_path / "dense",
        SCENES[0],
        "a",
        frames=31 if why == "short" else 33,
        prompt="a cat on a sofa" if why == "other prompts" else None,
    )
    keys = [key] * (len(stories.ORDINALS) + 1 if why == "many" else 1)
    assert asking.write_story(tmp_path / "dense", keys, tmp_path / "answers") is None
    assert not (tmp_path / "answers").exists()
