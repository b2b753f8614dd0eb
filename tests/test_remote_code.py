"""Code that comes with a model's folder: `qa` neither runs it nor asks, unless `--trust-remote-code` is given."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from tests.cli_tools import Result, run_command
from tests.language_families import save_video_model
from xattn_video_pipelines.video.io import write_video

FILES = (
    "config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
CLASSES = (
    "AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor",
    "AutoVideoProcessor",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that names code of its own everywhere; the code leaves a file `ran`. All questions are answered yes."""
    from transformers import dynamic_module_utils

    # Where transformers copies such code to.
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setattr("sys.stdin", io.StringIO(20 * "y\n"))
    write_video(tmp_path / "a.mp4", np.zeros((2, 64, 64, 3), np.uint8), 8)
    model = save_video_model(tmp_path / "model")
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nfrom transformers import PreTrainedConfig\n"
    code += "class Own(PreTrainedConfig):\n    model_type = 'own'\n"
    (model / "own.py").write_text(code)
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code + "def generate(model, **given): pass\n")
    for name in FILES:
        path = model / name
        described = json.loads(path.read_text()) if path.exists() else {}
        # A tokenizer's is a pair.
        own = {one: ["own.Own", None] if one == "AutoTokenizer" else "own.Own" for one in CLASSES}
        path.write_text(json.dumps({**described, "auto_map": own}))
    return model


def asked(capfd: pytest.CaptureFixture[str], model: Path, *more: str) -> Result:
    video = model.parent / "a.mp4"
    given = ("qa", "--model", model, "--video", video, "--question", "w5", "--device", "cpu", "--max-new-tokens", 1)
    return run_command(capfd, *given, *more)


def of_an_unknown_kind(model: Path) -> None:
    """Of a type that transformers has no class for, so that only the model's own code could read it."""
    config = json.loads((model / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (model / "config.json").write_text(json.dumps({**config, **own}))


def test_a_model_of_a_known_kind_is_loaded_without_its_code(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = asked(capfd, folder)
    assert done.code == 0
    assert "[y/N]" not in done.out + done.err
    assert not (folder.parent / "ran").exists()


def test_a_model_that_needs_its_code_is_refused_in_one_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    of_an_unknown_kind(folder)
    done = asked(capfd, folder)
    assert done.code == 2
    assert "[y/N]" not in done.out + done.err
    (line,) = (line for line in done.err.splitlines() if "error: " in line)
    assert line.endswith(f"--model {folder}: comes with code of its own, which is run by `qa --trust-remote-code` only")
    assert not (folder.parent / "ran").exists()


def test_code_is_run_where_it_is_trusted(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    of_an_unknown_kind(folder)
    done = asked(capfd, folder, "--trust-remote-code")
    assert (folder.parent / "ran").exists()
    # Its code has a configuration alone, and no model.
    assert done.code == 2
    assert "cannot be loaded" in done.err
