"""The small Qwen2-VL that ships: that it is what its card says, and answers what it never saw, dense and sparse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli_tools import Run
from tests.test_asking import SCENES, add
from xattn_video_eval.studies.story_plot import latest
from xattn_video_eval.studies.story_quality import LEDGER, main, table
from xattn_video_pipelines.common.demo_data import DEMO_WATCHER
from xattn_video_pipelines.demo import asking, stories, watcher, world
from xattn_video_pipelines.qa.load import VIDEO_MODEL

import transformers  # isort: skip

CARD = DEMO_WATCHER / "README.md"


def test_it_is_small_and_safe_and_of_standard_classes() -> None:
    files = [path for path in DEMO_WATCHER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}
    assert sum(path.stat().st_size for path in files) <= 30e6
    for path in DEMO_WATCHER.rglob("*.json"):
        told = path.read_text(encoding="utf-8")
        assert "_name_or_path" not in told, path
        assert "auto_map" not in told, path
    model = getattr(transformers, VIDEO_MODEL).from_pretrained(DEMO_WATCHER)
    assert type(model) is transformers.Qwen2VLForConditionalGeneration
    assert type(transformers.AutoProcessor.from_pretrained(DEMO_WATCHER)) is transformers.Qwen2VLProcessor
    # Of the shape that the training code builds, and none of the values that it starts with.
    start = watcher.build_watcher(seed=0).state_dict()
    trained = model.state_dict()
    assert {name: value.shape for name, value in trained.items()} == {n: v.shape for n, v in start.items()}
    matrices = [name for name, value in trained.items() if value.ndim > 1]
    assert all(not torch.equal(trained[name].float(), start[name].to(torch.bfloat16).float()) for name in matrices)


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="the files were written with transformers 5")
def test_its_settings_are_what_training_writes(tmp_path: Path) -> None:
    watcher.save_watcher(watcher.build_watcher(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in DEMO_WATCHER.iterdir()} - {"README.md"}
    for name in ("config.json", "tokenizer_config.json"):
        shipped, written = (json.loads((folder / name).read_text()) for folder in (DEMO_WATCHER, tmp_path))
        for settings in (shipped, written):
            settings.pop("transformers_version", None)
        assert shipped == written


def test_transformers_4_knows_its_settings_too() -> None:
    # 5 reads what 4 wrote, and not the other way round: the demo's model failed in 4 by these two.
    text = json.loads((DEMO_WATCHER / "config.json").read_text())["text_config"]
    assert {"rope_theta", "rope_scaling"} <= text.keys()
    assert "rope_parameters" not in text
    assert "extra_special_tokens" not in json.loads((DEMO_WATCHER / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("file", [CARD, CARD.parents[4] / "docs" / "understanding.md"])
def test_the_cards_show_what_was_measured(file: Path) -> None:
    series = latest(map(json.loads, LEDGER.read_text(encoding="utf-8").splitlines()), "demo")
    rows = {(*prefill, row["scenes"]): row for prefill, several in series.items() for row in several}
    lengths = [4, 8, 16, 32, 64]
    all_of = ((16, 0, lengths), (16, 64, lengths), (16, 8, lengths[:3]), (8, 0, lengths[:3]))
    assert rows.keys() == {(stride, last, scenes) for stride, last, several in all_of for scenes in several}
    shown = {}
    for line in re.findall(r"^\| (?:4|8|16|32|64) \| .*\|$", file.read_text(encoding="utf-8"), re.MULTILINE):
        scenes, tokens, stride, dense_last, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        shown[int(stride), int(dense_last), int(scenes)] = [tokens, *cells]
    assert shown.keys() == rows.keys()
    for key, row in rows.items():
        # As the program prints it; the card leaves out the seconds.
        scenes, tokens, dense, sparse, *change, density, agreed, before, _, after = table([row]).splitlines()[1].split()
        cells = [tokens, dense, sparse, " ".join(change), density, agreed, f"{before} to {after}"]
        assert shown[key] == cells[: len(shown[key])], key
        assert row["config"]["threshold"] == 0.9
        # Of the lengths that it was trained on, at least nine of ten, and with the question dense no fewer.
        if row["scenes"] <= 16:
            assert row["right"]["dense"] >= 0.9
            assert key[1] == 0 or row["difference"]["low"] >= -0.05


def test_held_out_stories_are_answered_dense_and_sparse(tmp_path: Path, capfd: Any) -> None:
    agreed = {}
    for dense_last in (0, 64):
        asked = ["--out", str(tmp_path), "--scenes", "8", "--stories", "4", "--device", "cpu"]
        assert main([*asked, "--dense-last", str(dense_last)]) == 0
        (row,) = json.loads(capfd.readouterr().out.splitlines()[-1])
        assert row["questions"] == 20
        # Chance is below a quarter.
        assert row["right"]["dense"] >= 0.9
        assert row["right"]["sparse"] >= (0.9 if dense_last else 0.5)
        assert row["sparse_density"] < 0.7
        agreed[dense_last] = row["agreement"]
    # A question of ten tokens is one group of 16 rows: blocks chosen for it miss what it asks for.
    assert agreed[64] >= 0.95 > agreed[0]


def test_the_demo_asks_about_its_videos_and_is_answered(tmp_path: Path, xattn: Run) -> None:
    keys = [add(tmp_path / "dense", scene, str(number)) for number, scene in enumerate(SCENES)]
    file = asking.write_story(tmp_path / "dense", keys, tmp_path / "answers")
    done = xattn("qa", "--model", "demo", "--items", file, "--device", "cpu", "--attention", "dense", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out.splitlines()[-1])["configurations"]["dense"]["accuracy"] == 1.0


def test_frames_are_taken_as_often_as_it_was_trained(tmp_path: Path, xattn: Run) -> None:
    scene = world.Scene("red", "circle", "left", "white", "large")
    add(tmp_path, scene, "one", frames=stories.SCENE_FRAMES)
    asked = ("qa", "--model", "demo", "--video", tmp_path / "one-s0.mp4", "--question", "What colour is the shape?")
    done = xattn(*asked, "--device", "cpu", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    row = json.loads((tmp_path / "out" / "answers.jsonl").read_text())
    assert row["reply"] == "red"
    frames = stories.SCENE_FRAMES // watcher.EVERY
    assert 32 * frames < row["prompt_tokens"] < 32 * frames + 20


def test_a_prompt_of_words_alone_is_refused(tmp_path: Path, capfd: Any) -> None:
    from xattn_video_eval.benchmarks.needle import command

    assert command.main(["--model", "demo", "--lengths", "512", "--out", str(tmp_path)]) == 2
    assert "--model demo: it answers questions about videos" in capfd.readouterr().err.splitlines()[-1]


def test_weights_that_are_missing_are_one_line(tmp_path: Path, xattn: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xattn_video_pipelines.qa.load.DEMO_WATCHER", tmp_path / "none")
    add(tmp_path, SCENES[0], "one")
    done = xattn("qa", "--model", "demo", "--video", tmp_path / "one-s0.mp4", "--question", "What shape is it?")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("xattn-video: error: --model demo: its weights are missing")
