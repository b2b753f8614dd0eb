"""`xattn-video judge`: what prompts ask for, right and wrong videos told apart, totals, bad input in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli_tools import Run
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.demo.judge import Verdict
from xattn_video_pipelines.demo.judging import judge_folder, saw
from xattn_video_pipelines.demo.world import Scene, all_scenes, asked, caption, render
from xattn_video_pipelines.video.io import lossless_path, write_video
from xattn_video_pipelines.video.manifest import append_record

RED = Scene("red", "circle", "left", "white", "large")
BLUE = Scene("blue", "square", "up", "black", "small")
STILL = Scene("green", "star", "still", "grey", "small")


def words(scene: Scene) -> dict[str, str]:
    return {name: getattr(scene, name) for name in ("colour", "shape", "motion", "background", "size")}


def add(folder: Path, id: str, scene: Scene, prompt: str, *, seed: int = 0, copy: Scene | None = None) -> Path:
    """One finished video of `scene`, as generate leaves it, with a lossless copy that may show another scene."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{id}-s{seed}.mp4"
    write_video(path, render(scene, seed, frames=17), 8)
    if copy is not None:
        write_video(lossless_path(path), render(copy, seed, frames=17), 8, lossless=True)
    record: dict[str, Any] = {"id": id, "seed": seed, "file": path.name, "prompt": prompt}
    append_record(folder, record | {"lossless_file": None if copy is None else lossless_path(path).name})
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos: one right, one wrong in shape and motion, one wrong in size, one of few words, one of none."""
    folder = tmp_path_factory.mktemp("judging") / "dense"
    add(folder, "right", RED, "a large red circle moving left on a white background")
    add(folder, "wrong", BLUE, "On a BLACK background, a blue star going down")
    add(folder, "size", STILL, "a big green star that does not move, a gray background", seed=3)
    add(folder, "few", STILL, "something green", seed=3)
    add(folder, "none", RED, "a cat on a sofa")
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "dense"))


@pytest.mark.parametrize("seed", [0, 1, 2, 40, 41, 1234])
def test_every_caption_gives_its_scene_back(seed: int) -> None:
    with_size = 0
    for number, scene in enumerate(all_scenes()):
        text = caption(scene, seed + number)
        wanted = asked(text)
        names_size = any(word in text.split() for word in ("small", "little", "large", "big"))
        assert wanted == {name: word for name, word in words(scene).items() if name != "size" or names_size}, text
        with_size += names_size
    assert 0.55 * 960 < with_size < 0.8 * 960


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("", {}),
        ("a cat on a sofa, brightly coloured, upright, whiteish, squared, inred", {}),
        ("A RED_Circle;Moving-Left on WHITE!", {k: v for k, v in words(RED).items() if k != "size"}),
        ("a red and a blue circle", {"shape": "circle"}),
        ("a red, red circle", {"colour": "red", "shape": "circle"}),
        ("a small little star", {"shape": "star", "size": "small"}),
        ("a small big star", {"shape": "star"}),
        ("a gray background that is grey", {"background": "grey"}),
        ("a black square on grey", {"shape": "square"}),
        ("a star standing there", {"shape": "star", "motion": "still"}),
        ("it does not\n move", {"motion": "still"}),
        ("it moves left and right", {}),
        ("it stands still, then goes up", {}),
    ],
)
def test_what_other_prompts_ask(prompt: str, wanted: dict[str, str]) -> None:
    assert asked(prompt) == wanted


def test_right_and_wrong_videos_are_told_apart(finished: Path) -> None:
    rows = {row["id"]: row for row in judge_folder(finished, progress=False)["videos"]}
    assert list(rows) == ["right", "wrong", "size", "few", "none"]
    assert rows["right"]["asked"] == words(RED)
    assert rows["right"]["wrong"] == []
    assert rows["right"]["saw"] == "red circle moving left on white"
    assert rows["wrong"]["wrong"] == ["shape", "motion"]
    assert rows["wrong"]["saw"] == "blue square moving up on black"
    assert {name: rows["wrong"]["seen"][name] for name in words(BLUE)} == words(BLUE)
    assert rows["size"]["wrong"] == ["size"]
    assert rows["size"]["saw"] == "green star standing still on grey"
    assert (rows["few"]["asked"], rows["few"]["wrong"]) == ({"colour": "green"}, [])
    assert (rows["none"]["asked"], rows["none"]["wrong"]) == ({}, [])
    assert rows["none"]["saw"] == "red circle moving left on white"


def test_totals_count_only_what_was_asked_for(finished: Path) -> None:
    totals = judge_folder(finished, progress=False)["totals"]
    assert (totals["videos"], totals["counted"]) == (5, 4)
    assert {name: (total["right"], total["asked"]) for name, total in totals["right"].items()} == {
        "colour": (4, 4),
        "shape": (2, 3),
        "motion": (2, 3),
        "background": (3, 3),
        # A wrong size is told, but is no part of "all".
        "all": (3, 4),
        "size": (1, 2),
    }
    assert totals["right"]["shape"]["share"] == pytest.approx(2 / 3)
    assert totals["right"]["all"]["share"] == 0.75


def test_the_keys_choose_the_videos(finished: Path) -> None:
    document = judge_folder(finished, keys=[("none", 0), ("size", 3)], progress=False)
    assert [(row["id"], row["seed"]) for row in document["videos"]] == [("size", 3), ("none", 0)]
    assert document["totals"]["counted"] == 1
    assert judge_folder(finished, keys=[("none", 0)], progress=False)["totals"]["right"]["all"] == {
        "right": 0,
        "asked": 0,
        "share": None,
    }
    with pytest.raises(UserError, match=r"manifest\.jsonl: no video size-s0 in it"):
        judge_folder(finished, keys=[("size", 0)], progress=False)


def test_the_lossless_copy_is_judged_if_the_manifest_names_it(tmp_path: Path) -> None:
    add(tmp_path / "a", "copied", RED, caption(RED, 0), copy=BLUE)
    add(tmp_path / "a", "plain", RED, caption(RED, 0))
    # A copy that another run left behind.
    shutil.copy(tmp_path / "a/copied-s0.mkv", tmp_path / "a/plain-s0.mkv")
    copied, plain = judge_folder(tmp_path / "a", progress=False)["videos"]
    assert (copied["file"], copied["saw"]) == ("copied-s0.mkv", "blue square moving up on black")
    assert (plain["file"], plain["saw"]) == ("plain-s0.mp4", "red circle moving left on white")


def test_what_is_not_seen_is_a_question_mark() -> None:
    assert saw(Verdict(None, None, None, None, None, 0.0, 0.0)) == "? ? ? on ?"
    assert saw(Verdict("red", None, "down", "grey", None, 1.0, 0.5)) == "red ? moving down on grey"


def test_the_command_prints_a_table_and_writes_what_the_function_gives(folder: Path, xattn: Run) -> None:
    result = xattn("judge", folder, folder)
    assert result.code == 0
    # No bar where stderr is no terminal.
    assert result.err == ""
    document = json.loads((folder / "judged.json").read_text(encoding="utf-8"))
    assert document == judge_folder(folder, progress=False)
    # The folder that is given twice is judged once. The document is alone on stdout.
    assert json.loads(xattn("judge", folder, folder, "--json").out) == [document]
    lines = {line.split()[0]: line for line in result.out.splitlines() if line}
    assert re.split(" {2,}", lines["right-s0"]) == [
        "right-s0",
        "a large red circle moving left on a white background",
        "red circle moving left on white",
        "as asked",
    ]
    assert lines["wrong-s0"].endswith("shape (asked: star), motion (asked: down)")
    assert lines["size-s3"].endswith("size (asked: large)")
    assert lines["none-s0"].endswith("not counted")
    assert f"right in {folder}: colour 100.0% (4/4), shape 66.7% (2/3), motion 66.7% (2/3), " in result.out
    assert "background 100.0% (3/3), all 75.0% (3/4), size 50.0% (1/2)\n" in result.out
    assert "not counted: 1 of 5, whose prompts name nothing of the shapes world" in result.out


def test_a_folder_of_other_prompts_is_shown_without_shares(tmp_path: Path, xattn: Run) -> None:
    add(tmp_path / "cats", "cat", RED, "a cat " * 30)
    result = xattn("judge", tmp_path / "cats")
    assert result.code == 0
    assert "red circle moving left on white  not counted" in result.out
    assert "cats: nothing was asked for\n" in result.out
    assert max(map(len, result.out.splitlines()[:3])) < 150


def missing_folder(video: Path) -> None:
    shutil.rmtree(video.parent)


def missing_manifest(video: Path) -> None:
    (video.parent / "manifest.jsonl").unlink()


def empty_manifest(video: Path) -> None:
    (video.parent / "manifest.jsonl").write_text("")


def broken_manifest(video: Path) -> None:
    with (video.parent / "manifest.jsonl").open("a") as file:
        file.write("{broken\n")


def missing_video(video: Path) -> None:
    video.unlink()


def no_file(video: Path) -> None:
    append_record(video.parent, {"id": "right", "seed": 0, "prompt": "a red circle"})


def damaged_video(video: Path) -> None:
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])


def tiny_video(video: Path) -> None:
    write_video(video, np.zeros((3, 16, 64, 3), np.uint8), 8)


def in_the_way(video: Path) -> None:
    (video.parent / "judged.json").mkdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing_folder, "dense: no such folder"),
        (missing_manifest, "dense: no manifest.jsonl in it; give a folder that `xattn-video generate` wrote"),
        (empty_manifest, "manifest.jsonl: no finished video in it"),
        (broken_manifest, "manifest.jsonl:6: not a manifest line"),
        (missing_video, "right-s0.mp4: listed in the manifest, but missing; run generate again"),
        (no_file, "manifest.jsonl: right-s0 names no file"),
        (damaged_video, "right-s0.mp4: damaged or not a video"),
        (tiny_video, "right-s0.mp4: video must have frames of at least 32 x 32 pixels, got 3 of 64 x 16"),
        (in_the_way, "judged.json: cannot write: "),
    ],
)
def test_bad_input_is_one_line(folder: Path, xattn: Run, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder / "right-s0.mp4")
    result = xattn("judge", folder)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("xattn-video: error: ")
    assert result.err.count("\n") == 1
    assert message in result.err
    assert not (folder / "judged.json").is_file()
    assert not list(folder.glob(".*.partial*"))


def test_a_bad_second_folder_is_refused_before_the_first_is_judged(folder: Path, tmp_path: Path, xattn: Run) -> None:
    before = sorted(os.listdir(folder))
    result = xattn("judge", folder, tmp_path / "nowhere")
    assert (result.code, result.out) == (2, "")
    assert sorted(os.listdir(folder)) == before


def test_a_failing_run_keeps_the_last_runs_file(folder: Path, xattn: Run) -> None:
    (folder / "judged.json").write_text("the last run's")
    (folder / "none-s0.mp4").write_bytes(b"not a video")
    assert xattn("judge", folder).code == 2
    assert (folder / "judged.json").read_text() == "the last run's"
    assert not list(folder.glob(".*"))
