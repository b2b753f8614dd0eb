"""Public benchmarks by their own tools: a real lm-evaluation-harness where it is installed, and bad input."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.language_families import LAYERS, build, save_language_model, save_video_model
from xattn_video import XAttnConfig
from xattn_video_eval.benchmarks.harness import _sides, main, table
from xattn_video_eval.benchmarks.settings import LmEvalSettings
from xattn_video_pipelines.demo import world
from xattn_video_pipelines.video.io import write_video

import transformers  # isort: skip

# What lm-eval and lmms-eval read alike: JSON, answers in words, and whether they are the very ones.
_DATA = """\
dataset_path: json
dataset_kwargs:
  data_files:
    test: {items}
test_split: test
output_type: generate_until
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
TASK = f"""\
task: recall_words
{_DATA}doc_to_text: "{{{{{{{{question}}}}}}}}"
doc_to_target: "{{{{{{{{answer}}}}}}}}"
generation_kwargs:
  max_gen_toks: 3
  until: ["</s>"]
"""
VIDEO_TASK = f"""\
task: watched_words
{_DATA}doc_to_visual: !function watched.visual
doc_to_text: !function watched.text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 3
  do_sample: false
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_eval_runs_dense_and_sparse_on_a_local_model_and_task(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    items = [{"question": " ".join(f"w{4 + (i * 7 + j * j) % 90}" for j in range(200)), "answer": "w5"} for i in (0, 1)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "recall.yaml").write_text(TASK.format(items=tmp_path / "items.jsonl"))
    arguments = ["lm-eval", "--model", str(save_language_model(tmp_path / "model")), "--tasks", "recall_words"]
    arguments += ["--task-folder", str(tmp_path / "tasks"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*arguments, "--block-size", "16", "--min-tokens", "0", "--threshold", "0.5"]) == 0
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    printed = capfd.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == written
    dense, sparse = written["rows"]
    assert (dense["attention"], sparse["attention"]) == ("dense", "xattn-s8-t0.50-w0-b16-m0")
    assert dense["scores"].keys() == sparse["scores"].keys() >= {"recall_words exact_match"}
    assert dense["sparse_density"] is None
    assert 0 < sparse["sparse_density"] < 0.9
    # Two items, three tokens each, the first of them from prefill.
    assert sparse["dense_calls"] == {"decode": 2 * 2 * LAYERS}


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
def test_lmms_eval_runs_dense_and_sparse_on_a_local_video_model(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    video = tmp_path / "video.mp4"
    write_video(video, world.render(world.training_scenes()[0], 0, frames=32), world.FPS)
    items = [{"video": str(video), "question": f"w{number} w6", "answer": "w7"} for number in (4, 5)]
    (tmp_path / "items.json").write_text(json.dumps(items))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "watched.yaml").write_text(VIDEO_TASK.format(items=tmp_path / "items.json"))
    code = 'def visual(item):\n    return [item["video"]]\n\n\ndef text(item, *_, **__):\n    return item["question"]\n'
    (tasks / "watched.py").write_text(code)
    arguments = ["lmms-eval", "--model", str(save_video_model(tmp_path / "model")), "--tasks", "watched_words"]
    arguments += ["--task-folder", str(tasks), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*arguments, "--block-size", "16", "--min-tokens", "0", "--threshold", "0.5"]) == 0
    dense, sparse = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert dense["scores"].keys() == sparse["scores"].keys() >= {"watched_words exact_match"}
    assert dense["sparse_density"] is None
    assert 0 < sparse["sparse_density"] < 0.9
    assert set(sparse["dense_calls"]) == {"decode"}


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
def test_lmms_eval_does_not_look_for_a_model_that_cannot_be_reached(
    tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["lmms-eval", "--model", "some/model", "--tasks", "a", "--out", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    # The tool itself would give an OSError, after a minute and more of tries.
    assert "--model some/model: not in the local cache, and the Hub cannot be reached (OfflineModeIsEnabled" in error


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 has nothing to repair")
def test_a_video_model_is_asked_with_its_positions_mended() -> None:
    model = build("qwen2-vl")
    seen: list[bool] = []

    def evaluate() -> dict[str, Any]:
        seen.append("get_rope_index" in vars(model.model))
        return {"task": {"exact_match": 0.5}}

    configs = {"dense": None, "sparse": XAttnConfig(min_tokens=0)}
    settings = LmEvalSettings(model="tiny", tasks=("task",), out=Path("out"))
    rows = list(_sides(settings, "lm-eval", model, evaluate, configs))
    assert [row["attention"] for row in rows] == ["dense", "sparse"]
    assert seen == [True, True]


def test_the_table_has_every_number_of_both_sides() -> None:
    rows: list[dict[str, Any]] = [
        {"attention": "dense", "scores": {"a acc": 0.5}, "sparse_density": None, "seconds": 2.0},
        {"attention": "sparse", "scores": {"a acc": 0.25, "b f1": 1.0}, "sparse_density": 0.4, "seconds": 1.0},
    ]
    cells = [line.split() for line in table(rows).splitlines()]
    assert cells[1:3] == [["a", "acc", "0.5000", "0.2500"], ["b", "f1", "-", "1.0000"]]
    assert cells[3][-2:] == ["-", "0.4000"]
    assert cells[4] == ["seconds", "2", "1"]


@pytest.mark.parametrize(
    ("tool", "package"), [("lm-eval", "lm_eval"), ("lmms-eval", "lmms_eval")], ids=["lm-eval", "lmms-eval"]
)
def test_a_tool_that_is_not_installed_is_named(tool: str, package: str, tmp_path: Path, capfd: Any) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{tool} is installed")
    assert main([tool, "--model", "nobody/nothing", "--tasks", "a", "--out", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"harness: error: {tool} is not here")
    assert error.endswith(f"pip install {tool}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold", "2"], "threshold must be in (0, 1], got 2.0"),
        (["--stride", "12"], "stride must be a power of two, got 12"),
        (["--attention", "half"], "invalid choice: 'half'"),
    ],
)
def test_bad_input_is_one_line(options: list[str], message: str, tmp_path: Path, capfd: Any) -> None:
    try:
        code = main(["lm-eval", "--model", "m", "--tasks", "a", "--out", str(tmp_path / "out"), *options])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capfd.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
