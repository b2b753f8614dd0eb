"""VBench's prompt list in, its scores out: prompt files, which videos are scored, and bad input."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from xattn_video_eval.benchmarks.vbench.command import full_info, main
from xattn_video_pipelines.demo import world
from xattn_video_pipelines.video.io import write_video
from xattn_video_pipelines.video.manifest import append_record
from xattn_video_pipelines.video.prompts import read_prompts

RED, BLUE = "a red circle moving left", "a blue star"
INFO: list[dict[str, Any]] = [
    {"prompt_en": RED, "dimension": ["temporal_flickering"]},
    {"prompt_en": BLUE, "dimension": ["color"], "auxiliary_info": {"color": "blue"}},
    {"prompt_en": RED, "dimension": ["motion_smoothness"]},
]


@pytest.fixture
def info(tmp_path: Path) -> Path:
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps(INFO), encoding="utf-8")
    return path


def videos(folder: Path, prompts: tuple[str, ...] = (RED, BLUE)) -> Path:
    """Two videos of each prompt, named by id and seed, in a folder as `generate` writes it."""
    folder.mkdir()
    for number, prompt in enumerate(prompts):
        for seed in (1, 0):
            file = folder / f"p{number}-s{seed}.mp4"
            write_video(file, world.render(world.all_scenes()[0], seed, frames=5, height=96, width=96), 8)
            append_record(folder, {"id": f"p{number}", "seed": seed, "file": file.name, "prompt": prompt})
    return folder


def test_the_prompt_file_has_each_prompt_once_with_an_id_of_its_place(tmp_path: Path, info: Path) -> None:
    out = tmp_path / "vbench.jsonl"
    assert main(["prompts", "--info", str(info), "--out", str(out)]) == 0
    prompts = read_prompts(out).prompts
    assert [(prompt.id, prompt.text) for prompt in prompts] == [("vbench-0000", RED), ("vbench-0001", BLUE)]
    assert main(["prompts", "--info", str(info), "--out", str(out), "--dimensions", "color"]) == 0
    assert [prompt.text for prompt in read_prompts(out).prompts] == [BLUE]


def test_videos_are_found_by_their_prompt_in_the_order_of_their_seeds(tmp_path: Path) -> None:
    folder = videos(tmp_path / "dense")
    listed = full_info(folder, INFO)
    assert [entry["video_list"] for entry in listed] == [
        [str((folder / f"p{number}-s{seed}.mp4").resolve()) for seed in (0, 1)] for number in (0, 1, 0)
    ]
    assert listed[1]["auxiliary_info"] == {"color": "blue"}
    assert "video_list" not in INFO[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--info": "missing.json"}, "No such file"),
        ({"--info": "broken.json"}, "not VBench's list"),
        ({"--dimensions": "beauty"}, "does not have beauty; it has color, motion_smoothness, temporal_flickering"),
        ({"--python": "no-python"}, "no such file; it is the Python of an environment with vbench"),
        ({"folder": "empty"}, "no manifest.jsonl in it"),
        ({"folder": "few"}, "1 of 3 prompts have no video here, the first is 'a blue star'"),
    ],
)
def test_bad_input_is_one_line_and_scores_nothing(
    tmp_path: Path, info: Path, capfd: Any, change: dict[str, str], message: str
) -> None:
    (tmp_path / "broken.json").write_text('[{"prompt": 1}]')
    (tmp_path / "empty").mkdir()
    videos(tmp_path / "few", (RED,))
    given = {"--info": info.name, "--python": sys.executable, "--out": "scores", "folder": "few"}
    if "folder" not in change:
        videos(tmp_path / "all")
        given["folder"] = "all"
    given |= change
    folder = given.pop("folder")
    arguments = [part if part == "beauty" else str(tmp_path / part) for part in given.values()]
    options = [part for pair in zip(given, arguments, strict=True) for part in pair]
    assert main(["score", str(tmp_path / folder), *options]) == 2
    error = capfd.readouterr().err.strip()
    assert "\n" not in error
    assert message in error
    assert not (tmp_path / "scores" / "scores.json").exists()


def test_an_environment_without_vbench_says_so(tmp_path: Path, info: Path, capfd: Any) -> None:
    folder, out = videos(tmp_path / "dense"), tmp_path / "scores"
    # -I and -S of that Python could not be given, so its packages are hidden by an empty environment of its own.
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    arguments = ["score", str(folder), "--info", str(info), "--python", str(bare), "--out", str(out), "--device", "cpu"]
    assert main(arguments) == 2
    error = capfd.readouterr().err.splitlines()
    assert "VBench failed on dense with exit code 1; its own message is above" in error[-1]
    assert any("No module named" in line for line in error)
    assert not (out / "scores.json").exists()


def test_scores_of_an_earlier_run_are_not_taken(tmp_path: Path, info: Path, capfd: Any) -> None:
    """A program that ends well and writes nothing has given no scores."""
    folder, out = videos(tmp_path / "dense"), tmp_path / "scores"
    (out / "dense").mkdir(parents=True)
    (out / "dense" / "scores.json").write_text('{"beauty": 9.9, "motion": 9.9}')
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nexit 0\n")
    silent.chmod(0o755)
    assert main(["score", str(folder), "--info", str(info), "--python", str(silent), "--out", str(out)]) == 2
    assert "VBench ended without all scores of dense (FileNotFoundError" in capfd.readouterr().err
    assert not (out / "scores.json").exists()


@pytest.mark.skipif(not os.environ.get("VBENCH_PYTHON"), reason="VBENCH_PYTHON names no environment with vbench")
def test_vbench_itself_scores_the_videos(tmp_path: Path, info: Path, capfd: Any) -> None:
    folders = [videos(tmp_path / name) for name in ("dense", "sparse")]
    arguments = ["score", *map(str, folders), "--info", str(info), "--python", os.environ["VBENCH_PYTHON"]]
    arguments += ["--out", str(tmp_path / "scores"), "--device", "cpu", "--dimensions", "temporal_flickering"]
    assert main(arguments) == 0
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert json.loads(capfd.readouterr().out.splitlines()[-1]) == {"scores": scores}
    assert 0.9 < scores["dense"]["temporal_flickering"] == scores["sparse"]["temporal_flickering"] <= 1
