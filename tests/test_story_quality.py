"""The evaluation of sparse prefill on stories: its videos and questions, its row, and that it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.test_stories import answered
from xattn_video_eval.studies import story_quality
from xattn_video_eval.studies.story_quality import main, table, write_stories
from xattn_video_pipelines.common.demo_data import WATCHER_FPS
from xattn_video_pipelines.common.environment import emulates_bfloat16
from xattn_video_pipelines.demo import stories, watcher, world
from xattn_video_pipelines.demo.judge import judge
from xattn_video_pipelines.qa.frames import sample_video
from xattn_video_pipelines.qa.questions import read_questions
from xattn_video_pipelines.video.io import read_video


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained one: its answers are wrong, but they are answers."""
    folder = tmp_path_factory.mktemp("watcher") / "model"
    watcher.save_watcher(watcher.build_watcher(seed=0), folder)
    return folder


def command(out: Path, model: Path, *more: str) -> list[str]:
    asked = ["--out", str(out), "--model", str(model), "--scenes", "2", "--stories", "2", "--threshold", "0.5"]
    return [*asked, "--device", "cpu", *more]


def test_the_videos_show_held_out_scenes_that_the_answers_follow_from(tmp_path: Path) -> None:
    questions = read_questions(write_stories(tmp_path, scenes=2, count=2))
    assert [question.id.split("-")[-1] for question in questions] == [*stories.KINDS] * 2
    for question in questions:
        seen = [judge(clip) for clip in np.split(read_video(question.video), 2)]
        scenes = tuple(world.Scene(one.colour, one.shape, one.motion, one.background, one.size) for one in seen)
        assert all(map(world.is_held_out, scenes))
        assert answered(stories.Story(scenes, 0), question.question) == question.answer
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.mp4")}
    assert read_questions(write_stories(tmp_path, scenes=2, count=2)) == questions
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.mp4")} == written


def test_a_video_is_shown_as_in_training(tmp_path: Path) -> None:
    write_stories(tmp_path, scenes=3, count=1)
    frames = sample_video(tmp_path / "story-003-000.mp4", fps=WATCHER_FPS, max_frames=24, max_pixels=10**6).frames
    story = stories.draw_story(np.random.default_rng([3, 0, 3]), 3, "held-out")
    assert frames.shape == (3 * stories.SCENE_FRAMES // watcher.EVERY, 128, 128, 3)
    every = story.render().astype(int)
    nearest = np.array([np.abs(every - frame).mean((1, 2, 3)).argmin() for frame in frames])
    moving = np.repeat([scene.motion != "still" for scene in story.scenes], stories.SCENE_FRAMES // watcher.EVERY)
    assert moving.any()
    # One of the offsets that training draws from, from the first frame to the last.
    (offset,) = set((nearest - watcher.EVERY * np.arange(len(frames)))[moving])
    assert 0 <= offset < watcher.EVERY


def test_a_row_compares_dense_and_sparse_answers_and_a_run_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(story_quality, "LEDGER", tmp_path / "rows.jsonl")
    assert main(command(tmp_path / "out", model, "--record")) == 0
    (row,) = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == [row]
    assert (row["scenes"], row["questions"], row["stories"]) == (2, 10, 2)
    assert 2 * 256 < row["prompt_tokens"] < 2 * 256 + 20
    assert 0 < row["sparse_density"] < 0.95
    assert row["kl"] > 0
    assert (row["config"]["stride"], row["config"]["threshold"]) == (16, 0.5)
    # The weights are in bfloat16.
    assert row["dtype"] == ("float32" if emulates_bfloat16(torch.device("cpu")) else "bfloat16")
    assert row["device"]

    # As if dense had said the right colours, and sparse the shape of the second story.
    (path,) = (tmp_path / "out").glob("answers-002-*/answers.jsonl")
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    for answer in answers:
        right = "-colour" if answer["attention"] == "dense" else "001-shape"
        answer["reply"] = answer["answer"] if answer["id"].endswith(right) else "nothing"
    path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    assert main(command(tmp_path / "out", model)) == 0
    (again,) = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert again["right"] == {"dense": 0.2, "sparse": 0.1}
    assert again["right_by_kind"] == {
        "colour": [1.0, 0.0], "shape": [0.0, 0.5], "motion": [0, 0], "background": [0, 0], "order": [0, 0],
    }  # fmt: skip
    assert again["difference"] == pytest.approx({"difference": -0.1, "low": -0.2, "high": 0.0})
    assert again["prefill_seconds"] == row["prefill_seconds"]

    # A length more keeps the answers that are there.
    assert main(command(tmp_path / "out", model, "--scenes", "2", "3", "--stories", "2")) == 0
    both = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert [one["scenes"] for one in both] == [2, 3]
    assert both[0]["right"] == again["right"]

    # Another sparse prefill beside dense; a question is shorter than 16 tokens.
    assert main(command(tmp_path / "out", model, "--dense-last", "16")) == 0
    (exact,) = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (exact["config"]["dense_last"], row["config"]["dense_last"]) == (16, 0)
    assert exact["sparse_density"] > row["sparse_density"]
    assert exact["kl"] < row["kl"]


def test_the_table_is_in_percent_and_points() -> None:
    row = {
        "scenes": 4, "prompt_tokens": 1034.0, "right": {"dense": 0.95, "sparse": 0.9},
        "difference": {"difference": -0.05, "low": -0.1, "high": 0.0}, "sparse_density": 0.5, "agreement": 0.93,
        "prefill_seconds": [0.25, 0.2],
    }  # fmt: skip
    words = table([row]).splitlines()[1].split()
    assert words == ["4", "1,034", "95%", "90%", "-5.0", "[-10.0,", "+0.0]", "0.500", "93%", "0.25", "->", "0.20"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scenes", "4", "1"], "--scenes must be 2 or more, got 1"),
        (["--stories", "0"], "--stories must be 1 or more, got 0"),
        (["--threshold", "2"], "threshold must be in (0, 1], got 2.0"),
    ],
)
def test_bad_input_is_told_before_any_story(options: list[str], message: str, tmp_path: Path, capfd: Any) -> None:
    assert main(["--out", str(tmp_path / "out"), "--model", "none", *options]) == 2
    assert capfd.readouterr().err.splitlines() == [f"story_quality: error: {message}"]
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path, capfd: Any) -> None:
    assert main(command(tmp_path / "out", tmp_path / "none")) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert str(tmp_path / "none") in errors[0]
