"""Bad input is one line on stderr and exit code 2; help is fast; other folders named eval do not get in the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli_tools import SIZE, Run, save_tiny_cogvideox
from xattn_video_pipelines.cli import COMMANDS
from xattn_video_pipelines.common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a prompt\n")
    return path


def one_line(xattn: Run, *arguments: object) -> str:
    """The message of a command that must be refused in one line."""
    result = xattn(*arguments)
    assert result.code == 2, (result.out, result.err)
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if "torchvision" not in line]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("xattn-video: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--height", 65), "--height must be a multiple of 16 for this model, got 65; nearest: 64"),
        (("--width", 0), "--width must be 1 or more, got 0"),
        (("--width", 7), "--width must be a multiple of 16 for this model, got 7; nearest: 16"),
        (("--num-frames", 0), "--num-frames must be 1 or more, got 0"),
        (("--num-frames", 8), "--num-frames must be a multiple of 4, plus 1, for this model, got 8; nearest: 9"),
        (("--num-frames", 2), "nearest: 1"),
        (("--steps", 0), "--steps must be 1 or more, got 0"),
        (("--fps", -1), "--fps must be 1 or more, got -1"),
        (("--guidance-scale", "nan"), "--guidance-scale must be a number from 0, got nan"),
        (("--threshold", 0), "threshold must be in (0, 1], got 0"),
        (("--threshold", 1.1), "threshold must be in (0, 1], got 1.1"),
        (("--stride", 64, "--block-size", 32), "stride must divide block_size"),
        (("--stride", 6), "stride must be a power of two, got 6"),
        (("--warmup-steps", -1), "warmup_steps must be 0 or more, got -1"),
        (("--sample", 0), "--sample must be 1 or more, got 0"),
        (("--limit", -3), "--limit must be 1 or more, got -3"),
        (("--seeds", -1), "--seeds must be integers from 0"),
        (("--seeds", 1, 1), "--seeds must differ, got 1 1"),
        (("--device", "cuda:99"), "--device cuda:99"),
        (("--device", "toaster"), "--device must be auto"),
        (("--device", "cpu", "--offload", "model"), "there is none"),
        (("--attention", "none"), "invalid choice: 'none'"),
        (("--height", "tall"), "invalid int value: 'tall'"),
        (("--no-such-option",), "unrecognized arguments"),
    ],
)
def test_options_of_generate(model, prompts, tmp_path, xattn, options, message):
    out = tmp_path / "out"
    command = ("generate", "--model", model, "--prompts", prompts, "--out", out, *SIZE)
    assert message in one_line(xattn, *command, *options)
    assert not list(tmp_path.rglob("*.mp4"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "missing.txt: no such prompt file"),
        ("empty.txt", b"", "empty.txt: no prompts"),
        ("latin.txt", b"ok\ncaf\xe9\n", "latin.txt:2: not UTF-8"),
        ("broken.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "broken.jsonl:2: not a JSON object"),
        ("long.jsonl", b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}\n", "long.jsonl:1: not a JSON object: a number"),
        ("twice.jsonl", b'{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n', "twice.jsonl:2: id 'x'"),
        ("slash.jsonl", b'{"prompt": "a", "id": "../x"}\n', "slash.jsonl:1: `id` must be"),
        ("image.jsonl", b'{"prompt": "a", "image": "image.jsonl"}\n', "image.jsonl:1: has an image, but"),
    ],
)
def test_prompt_files(model, tmp_path, xattn, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in one_line(xattn, "generate", "--model", model, "--prompts", tmp_path / name, *SIZE, "--dry-run")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wan3", "unknown model; known names are wan2.1-1.3b, "),
        ("./nowhere", "no such folder"),
        ("{folder}", "no model_index.json"),
        ("{folder}/custom", "names no diffusers pipeline"),
        ("{folder}/unknown", "'NoSuchPipeline' is not in diffusers"),
        ("{folder}/torn", "cannot be read"),
        ("nobody/nothing", "--model nobody/nothing: not in the local cache, and the Hub cannot be reached"),
    ],
)
def test_models(tmp_path, prompts, xattn, monkeypatch, name, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    indexes = {
        "custom": '{"_class_name": ["code", "Pipeline"]}',
        "unknown": '{"_class_name": "NoSuchPipeline"}',
        "torn": "{",
    }
    for folder, text in indexes.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model_index.json").write_text(text)
    name = name.format(folder=tmp_path)
    assert message in one_line(xattn, "generate", "--model", name, "--prompts", prompts, "--out", tmp_path / "out")


@pytest.mark.parametrize("command", ["generate", "sweep"])
def test_the_json_of_a_dry_run_is_one_document_and_quiet_is_quiet(model, prompts, tmp_path, xattn, command):
    given = (command, "--model", model, "--prompts", prompts, "--out", tmp_path / "out", *SIZE, "--dry-run", "--json")
    loud, quiet = xattn(*given), xattn(*given, "--quiet")
    documents = [json.loads(done.out) for done in (loud, quiet)]
    for document in documents:
        # Others write to the same disk.
        document.get("cost", {}).pop("free_bytes", None)
    assert documents[0] == documents[1]
    assert documents[0]["dry_run"] is True
    # Warnings stay, and of a sweep its forecast goes.
    assert ("configurations" in loud.err, "configurations" in quiet.err) == (command == "sweep", False)


def test_a_known_model_that_is_not_here_is_refused_offline(prompts, tmp_path, xattn, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    # Or a small machine is told that the weights do not fit.
    monkeypatch.setattr("xattn_video_pipelines.video.cost._memory_bytes", lambda device: None)
    command = ("generate", "--model", "wan2.1-1.3b", "--prompts", prompts, "--out", tmp_path / "out")
    assert "--model Wan-AI/Wan2.1-T2V-1.3B-Diffusers: not in the local cache" in one_line(xattn, *command, "--quiet")
    assert not (tmp_path / "out").exists()
    # Nothing but the description is needed to plan a known model's run.
    plan = json.loads(xattn(*command, "--dry-run", "--json").out.splitlines()[-1])
    assert (plan["height"], plan["width"], plan["tokens"], plan["flow_shift"]) == (480, 832, 32_760, 3.0)


def test_without_a_network_transformers_is_told_to_look_into_the_cache(tmp_path, monkeypatch):
    """Or the model is refused at once. transformers alone would try each of its files for half a minute."""
    from xattn_video_pipelines.qa.load import reach

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    look = reach.__wrapped__
    assert look(str(tmp_path)) == {}
    with pytest.raises(UserError, match="--model some/model: not in the local cache, and the Hub cannot be reached"):
        look("some/model")
    cached = tmp_path / "models--some--model"
    for name, text in (("refs/main", "0" * 40), (f"snapshots/{'0' * 40}/config.json", "{}")):
        (cached / name).parent.mkdir(parents=True)
        (cached / name).write_text(text)
    assert look("some/model") == {"local_files_only": True}
    with pytest.raises(UserError, match=r"--model a/b/c: no such folder, and no Hub id \(owner/name\)"):
        look("a/b/c")


def test_an_output_that_cannot_be_written(model, prompts, tmp_path, xattn):
    command = ("generate", "--model", model, "--prompts", prompts, *SIZE, "--out")
    assert "is not a folder" in one_line(xattn, *command, prompts / "deeper")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/dense").write_text("in the way")
    assert "dense is not a folder" in one_line(xattn, *command, tmp_path / "out", "--attention", "dense")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write to")
def test_an_output_without_permission(model, prompts, xattn):
    command = ("generate", "--model", model, "--prompts", prompts, *SIZE, "--attention", "dense", "--out", "/proc/out")
    assert "/proc/out/dense: cannot write here: " in one_line(xattn, *command, "--quiet")


def test_a_model_that_cannot_be_sparse_is_refused_before_its_dense_videos(prompts, tmp_path, xattn):
    save_tiny_cogvideox(tmp_path / "cog")
    command = ("generate", "--model", tmp_path / "cog", "--prompts", prompts, "--out", tmp_path / "out", *SIZE)
    refused = xattn(*command, "--attention", "both")
    assert refused.code == 2
    message = refused.err.splitlines()[-1]
    assert message.startswith("xattn-video: error: --attention xattn: ")
    assert "CogVideoX" in message
    assert not list((tmp_path / "out").rglob("*.mp4"))


def test_sizes_are_checked_where_the_vaes_config_leaves_out_its_factors(model, prompts, tmp_path, xattn):
    """As the configurations of older checkpoints do: the factors are then those of the class."""
    copy = tmp_path / "older"
    shutil.copytree(model, copy)
    path = copy / "vae/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if "scale_factor" not in name}))
    command = ("generate", "--model", copy, "--prompts", prompts, "--out", tmp_path / "out", *SIZE)
    assert "--height must be a multiple of 16" in one_line(xattn, *command, "--height", 100)
    assert "nearest: 5" in one_line(xattn, *command, "--num-frames", 6)
    assert not (tmp_path / "out").exists()


def test_a_broken_manifest(model, prompts, tmp_path, xattn):
    folder = tmp_path / "out/dense"
    folder.mkdir(parents=True)
    (folder / "manifest.jsonl").write_text("not json\n{}\n")
    command = ("generate", "--model", model, "--prompts", prompts, *SIZE, "--out", tmp_path / "out")
    assert "manifest.jsonl:1: not a manifest line" in one_line(xattn, *command, "--attention", "dense")


def test_no_command_and_an_unknown_one(xattn):
    assert "required: COMMAND" in one_line(xattn)
    assert "invalid choice: 'paint'" in one_line(xattn, "paint")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_help_has_an_example(xattn, command):
    result = xattn(*filter(None, (command, "--help")))
    assert result.code == 0
    assert "example" in result.out
    assert f"xattn-video {command}".strip() in result.out.split("example")[-1]


def test_version(xattn):
    from xattn_video import __version__

    assert xattn("--version") == (0, f"xattn-video {__version__}\n", "")


def test_no_help_and_no_wrong_size_loads_torch_or_diffusers():
    """Of all commands but the one study, which is in no wheel."""
    code = (
        "import sys\nfrom xattn_video_pipelines.cli import main\n"
        "for command in sys.argv[1:]:\n"
        "    assert main([*command.split(), '--help']) == 0\n"
        "    assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules), command\n"
        "assert main(['generate', 'fox', '--model', 'demo', '--height', '60']) == 2\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    commands = ["", *COMMANDS.keys() - {"selection-quality"}]
    done = subprocess.run([sys.executable, "-c", code, *commands], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--height must be a multiple of 16" in done.stderr
    assert done.stdout.count("usage: xattn-video") == len(commands)
    assert "[OPTIONS] [PROMPT...]\n" in done.stdout
    assert "DENSE_DIR [SPARSE_DIR]\n" in done.stdout
    assert "[ARGS]" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--help"], 0, "generate"),
        (["--version"], 0, "xattn-video "),
        (["generate", "--help"], 0, "--num-frames"),
        (["doctor"], 1, "broken  torch: not installed, and everything needs it: pip install torch"),
    ],
)
def test_what_helps_to_install_needs_no_torch(arguments, code, expected):
    without_torch = (
        "import sys\nsys.modules['torch'] = None\nfrom xattn_video_pipelines.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", without_torch, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert expected in done.stdout
    assert done.stderr == ""


def test_runs_from_a_folder_with_its_own_eval_and_pipelines(tmp_path):
    """As the installed script does: its own folder is first on the path, not the working directory."""
    for package in ("eval", "pipelines", "xattn_video"):
        (tmp_path / "work" / package).mkdir(parents=True)
        (tmp_path / "work" / package / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    script = tmp_path / "bin" / "xattn-video"
    script.parent.mkdir()
    script.write_text("import sys\nfrom xattn_video_pipelines.cli import main\nsys.exit(main())\n")
    for arguments in (["--help"], ["compare", "--help"]):
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            cwd=tmp_path / "work",
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "usage: xattn-video" in done.stdout
