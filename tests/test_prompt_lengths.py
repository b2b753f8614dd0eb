"""What is longer than the model reads is said, once for each prompt or question, with the numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli_tools import SIZE, run_command, save_tiny_wan
from tests.language_families import save_video_model
from xattn_video_pipelines.video.io import write_video


def test_a_prompt_that_is_cut_is_told_of_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_wan(tmp_path / "model")
    lines: list[dict[str, Any]] = [
        # a token a letter, and the end
        {"id": "fits", "prompt": 511 * "a"},
        {"id": "long", "prompt": 512 * "a", "negative_prompt": 600 * "b"},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ("generate", "--model", model, "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "out", *SIZE)
    done = run_command(capfd, *asked, "--device", "cpu", "--attention", "dense", "--seeds", 0, 1, "--steps", 1)
    assert done.code == 0
    assert [line.split(", and")[0] for line in done.err.splitlines() if line.startswith("warning: ")] == [
        "warning: long: its prompt has 513 tokens",
        "warning: long: its negative prompt has 601 tokens",
    ]
    assert done.err.count("reads the first 512; the rest has no effect") == 2


def test_a_question_beyond_the_positions_of_the_model_is_told_of_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = save_video_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 80
    (model / "config.json").write_text(json.dumps(config))
    write_video(tmp_path / "short.mp4", np.zeros((2, 64, 64, 3), np.uint8), 8)
    shutil.copy(tmp_path / "short.mp4", tmp_path / "again.mp4")
    write_video(tmp_path / "long.mp4", np.zeros((8, 64, 64, 3), np.uint8), 8)
    lines = [{"id": name, "video": f"{name}.mp4", "question": "w5"} for name in ("short", "long", "again")]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ("qa", "--model", model, "--items", tmp_path / "items.jsonl", "--attention", "both", "--fps", 8)
    done = run_command(capfd, *asked, "--device", "cpu", "--max-new-tokens", 1)
    assert done.code == 0
    (warning,) = (line for line in done.err.splitlines() if "warning: " in line)
    assert "warning: long: " in warning
    assert "tokens, and the model was made for 80; " in warning
