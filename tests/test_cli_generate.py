"""`xattn-video generate` on a tiny Wan pipeline from disk: what it writes, what it keeps, what a kill costs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.cli_tools import (
    SIZE,
    SPARSE,
    SPARSE_LABEL,
    TINY_TOKENS,
    save_tiny_image_to_video,
    tiny_text_encoder,
    tiny_tokenizer,
)
from xattn_video import XAttnConfig
from xattn_video_pipelines.cli import main
from xattn_video_pipelines.common import files
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import claimed
from xattn_video_pipelines.common.run_file import run_text
from xattn_video_pipelines.video import GenerateSettings, generate, models
from xattn_video_pipelines.video import make as runner
from xattn_video_pipelines.video.io import read_video
from xattn_video_pipelines.video.manifest import NAME as MANIFEST
from xattn_video_pipelines.video.manifest import read_manifest
from xattn_video_pipelines.video.models import KNOWN_MODELS, find_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_image_to_video(tmp_path_factory.mktemp("image-model"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text('a "red" circle\n../up/and/away\n🦊 ' + "x" * 10_000 + "\n", encoding="utf-8")
    return path


def frames(path: Path) -> np.ndarray:
    """The exact frames of a video made with --lossless."""
    return read_video(path.with_suffix(".mkv"))


def test_both_attentions_write_a_folder_each_with_a_manifest(model, prompts, tmp_path, xattn):
    out = tmp_path / "out"
    arguments = ("--model", model, "--prompts", prompts, "--out", out, "--attention", "both", "--seeds", 3, 5)
    done = xattn("generate", *arguments, *SIZE, *SPARSE, "--limit", 2, "--fps", 8)
    assert done.code == 0, done.err
    names = [f"{prompt}-s{seed}.mp4" for prompt in ("0001", "0002") for seed in (3, 5)]
    for label in ("dense", SPARSE_LABEL):
        assert sorted(path.name for path in (out / label).iterdir()) == [*names, MANIFEST]
        records = read_manifest(out / label)
        assert list(records) == [("0001", 3), ("0001", 5), ("0002", 3), ("0002", 5)]
        for (name, seed), record in records.items():
            assert record["file"] == f"{name}-s{seed}.mp4"
            assert read_video(out / label / record["file"]).shape == (9, 64, 64, 3)
            check_record(record, model)
    dense, sparse = (read_manifest(out / label)["0002", 5] for label in ("dense", SPARSE_LABEL))
    assert dense["prompt"] == "../up/and/away"
    assert (dense["attention"], dense["config"], dense["mean_density"]) == ("dense", None, 1.0)
    assert (sparse["attention"], sparse["config"]["block_size"], sparse["config"]["warmup_steps"]) == ("xattn", 16, 1)
    # Two layers, guidance: one warm-up step is 4 dense calls, and statistics start anew for every video.
    assert sparse["dense_reasons"] == {"warmup": 4}
    assert sparse["density_by_step"][0] == 1.0
    assert 0 < sparse["density_by_step"][1] < 1
    assert sparse["mean_density"] == pytest.approx(sum(sparse["density_by_step"]) / 2)
    # Results on stdout, one line a video and a last one; progress and the time left on stderr.
    lines = done.out.splitlines()
    assert len(lines) == 9
    assert lines[0].startswith(str(out / "dense" / "0001-s3.mp4"))
    assert "videos: 8 made, 0 kept" in lines[-1]
    assert "8/8" in done.err
    assert "video" in done.err
    # The run's own file says all that made these videos, and an option wins over it.
    again = xattn("generate", "--config", out / "run.toml", "--quiet")
    assert (again.code, again.out) == (0, f"videos: 0 made, 8 kept, in {lines[-1].split(' in ')[1]}\n")
    assert "finished and kept" not in again.err
    other = xattn("generate", "--config", out / "run.toml", "--seeds", 3, 5, 7, "--dry-run", "--json")
    assert [video["status"] for video in json.loads(other.out)["videos"]].count("to make") == 4


def check_record(record: dict[str, Any], model: Path) -> None:
    expected = {"model": str(model), "height": 64, "width": 64, "num_frames": 9, "fps": 8, "steps": 2}
    expected |= {"tokens": TINY_TOKENS, "dtype": "float32", "device": "cpu", "guidance_scale": 5.0}
    assert {name: record[name] for name in expected} == expected
    assert record["seconds"] > 2 * record["seconds_per_step"] > 0
    assert 0 < record["cpu_share"] <= 1
    assert {"python", "torch", "diffusers", "xattn-video"} <= set(record["versions"])
    assert all(record["versions"].values())
    assert {"commit", "device_name", "finished", "negative_prompt", "image"} <= set(record)


def test_a_video_depends_neither_on_the_ones_before_it_nor_on_the_attention(model, prompts, tmp_path, xattn):
    arguments = ("--model", model, *SIZE, *SPARSE[:4], "--warmup-steps", 2, "--lossless", "--attention", "both")
    many = xattn("generate", *arguments, "--prompts", prompts, "--out", tmp_path / "many")
    assert many.code == 0, many.err
    assert many.out.splitlines()[3].endswith("density 1.00 (dense calls: 8 warmup)")
    alone = tmp_path / "alone.jsonl"
    text = prompts.read_text(encoding="utf-8").splitlines()[2]
    alone.write_text(json.dumps({"prompt": text, "id": "0003"}))
    assert xattn("generate", *arguments, "--prompts", alone, "--out", tmp_path / "one").code == 0
    label = "xattn-s8-t0.90-w2-b16-m0"
    third = frames(tmp_path / "many/dense/0003-s0.mp4")
    assert np.array_equal(third, frames(tmp_path / "one/dense/0003-s0.mp4"))
    # Every step is a warm-up step, so the sparse run differs in nothing if its noise is the same.
    assert np.array_equal(third, frames(tmp_path / f"many/{label}/0003-s0.mp4"))
    assert not np.array_equal(third, frames(tmp_path / "many/dense/0001-s0.mp4"))
    # The mp4 shows the same as the lossless copy.
    assert np.abs(read_video(tmp_path / "many/dense/0003-s0.mp4").astype(int) - third).mean() < 16


def test_finished_videos_are_kept_and_missing_ones_made(model, prompts, tmp_path, xattn):
    out = tmp_path / "out"
    command = ("generate", "--model", model, "--prompts", prompts, "--out", out, "--attention", "dense", *SIZE)
    assert xattn(*command, "--limit", 2).code == 0
    folder = out / "dense"
    first = (folder / "0001-s0.mp4").stat()
    (folder / "0002-s0.mp4").unlink()
    # What a kill leaves: a half-written video, and a line of the manifest cut short.
    (folder / ".0002-s0.partial.mp4").write_bytes(b"half")
    (folder / ".0002-s0.partial.mkv").write_bytes(b"half")
    (folder / ".0001-s0.lock").touch()
    with (folder / MANIFEST).open("ab") as manifest:
        manifest.write(b'{"id": "0003", "se')
    done = xattn(*command, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out.splitlines()[-1])
    assert (result["made"], result["kept"]) == (2, 1)
    assert [video["status"] for video in result["videos"]] == ["kept", "made", "made"]
    assert (folder / "0001-s0.mp4").stat().st_mtime_ns == first.st_mtime_ns
    assert sorted(path.name for path in folder.iterdir()) == [f"000{i}-s0.mp4" for i in (1, 2, 3)] + [MANIFEST]
    assert len(read_manifest(folder)) == 3
    # Nothing to do: the weights are not even looked for.
    weights = list(model.rglob("*.safetensors"))
    for path in weights:
        path.rename(path.with_suffix(".away"))
    try:
        assert xattn(*command).code == 0
        missing = xattn(*command, "--overwrite")
    finally:
        for path in weights:
            path.with_suffix(".away").rename(path)
    assert missing.code == 2
    assert "cannot be loaded" in missing.err
    # What was to be made anew is still there.
    assert len(read_manifest(folder)) == 3


def test_other_settings_are_refused_unless_overwrite(model, prompts, tmp_path, xattn):
    out = tmp_path / "out"
    command = ("generate", "--model", model, "--prompts", prompts, "--out", out, "--attention", "dense", *SIZE)
    assert xattn(*command, "--limit", 2).code == 0
    before = (out / "dense" / MANIFEST).read_bytes()
    refused = xattn(*command, "--steps", 3, "--fps", 9)
    assert refused.code == 2
    assert "0001-s0.mp4 was made with other settings (fps 16, now 9; steps 2, now 3)" in refused.err
    assert "--overwrite" in refused.err
    assert (out / "dense" / MANIFEST).read_bytes() == before
    assert xattn(*command, "--steps", 3, "--limit", 1, "--overwrite").code == 0
    assert {key: record["steps"] for key, record in read_manifest(out / "dense").items()} == {
        ("0001", 0): 3,
        ("0002", 0): 2,
    }
    prompts.write_text("another prompt\n")
    assert "prompt" in xattn(*command, "--steps", 3).err


def test_a_video_from_before_a_setting_existed_had_its_default(model, prompts, tmp_path, xattn):
    command = ("generate", "--model", model, "--prompts", prompts, "--out", tmp_path / "out", "--attention", "xattn")
    command = (*command, "--limit", 1, *SIZE)
    assert xattn(*command).code == 0
    (path,) = (tmp_path / "out").glob(f"*/{MANIFEST}")
    record = json.loads(path.read_text())
    del record["config"]["dense_last"]
    path.write_text(json.dumps(record) + "\n")
    again = xattn(*command)
    assert (again.code, "1 of 1 videos are already finished" in again.err) == (0, True), again.err
    path.write_text(json.dumps({**record, "config": {**record["config"], "dense_last": 3}}) + "\n")
    assert "made with other settings (config" in xattn(*command).err


def test_a_dry_run_tells_all_and_needs_no_weights(model, prompts, tmp_path, xattn):
    configs = tmp_path / "configs"
    for path in model.rglob("*.json"):
        if "tokenizer" not in path.parts:
            (configs / path.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
            (configs / path.relative_to(model)).write_bytes(path.read_bytes())
    out = tmp_path / "out"
    command = ("generate", "--model", configs, "--prompts", prompts, "--out", out, "--attention", "both", "--dry-run")
    done = xattn(*command, *SIZE, "--sample", 2)
    assert done.code == 0, done.err
    for expected in ("64 x 64, 9 frames", f"{TINY_TOKENS} video tokens", "2 steps", "4 of 4 videos to make"):
        assert expected in done.out
    for name in ("dense/0001-s0.mp4", "dense/0003-s0.mp4", "xattn-s8-t0.90-w5/0003-s0.mp4"):
        assert str(out / name) in done.out
    assert "0002" not in done.out
    assert not out.exists()
    as_json = json.loads(xattn(*command, *SIZE, "--json").out.splitlines()[-1])
    assert (as_json["tokens"], as_json["steps"], len(as_json["videos"])) == (TINY_TOKENS, 2, 6)
    # Without sizes: the pipeline's own.
    default = json.loads(xattn(*command, "--json").out.splitlines()[-1])
    assert (default["height"], default["width"], default["num_frames"], default["steps"]) == (480, 832, 81, 50)


def test_seeds_come_from_the_command_line_then_the_prompt_then_zero(model, tmp_path, xattn):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "seed": 9}\n{"prompt": "b"}\n')
    command = ("generate", "--model", model, "--prompts", path, "--dry-run", "--json", *SIZE)
    for extra, expected in (((), [9, 0]), (("--seeds", 4, 2), [4, 2, 4, 2])):
        result = json.loads(xattn(*command, *extra).out.splitlines()[-1])
        assert [video["seed"] for video in result["videos"]] == expected


def test_a_video_that_another_process_is_making_is_left_to_it(model, prompts, tmp_path, xattn):
    out = tmp_path / "out"
    command = ("generate", "--model", model, "--prompts", prompts, "--out", out, "--attention", "dense", *SIZE)
    (out / "dense").mkdir(parents=True)
    with claimed(out / "dense" / "0002-s0"):
        done = xattn(*command)
    assert done.code == 2
    assert done.err.splitlines()[-1].endswith("0002-s0: another process is making it")
    assert list(read_manifest(out / "dense")) == [("0001", 0)]
    assert xattn(*command).code == 0
    assert sorted(path.name for path in (out / "dense").iterdir()) == [f"000{i}-s0.mp4" for i in (1, 2, 3)] + [MANIFEST]


def test_a_claim_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / ".one.lock").mkdir()
    with pytest.raises(UserError, match=r"\.one\.lock: cannot write: Is a directory"), claimed(tmp_path / "one"):
        pass


def test_a_file_system_without_locks_is_noted_and_worked_on(tmp_path, monkeypatch, capsys):
    def unsupported(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    fcntl = pytest.importorskip("fcntl", reason="this system has no fcntl")
    monkeypatch.setattr(fcntl, "flock", unsupported)
    for name in ("one", "two"):
        with claimed(tmp_path / name), files.alone_with(tmp_path / MANIFEST):
            pass
    note = f"{tmp_path}: no locks on this file system ({os.strerror(errno.ENOSYS)}): run one process at a time there"
    assert capsys.readouterr().err.splitlines() == [note]


@pytest.mark.parametrize("same", [True, False])
def test_a_video_that_another_run_has_made_meanwhile_is_not_written_over(
    model, prompts, tmp_path, xattn, monkeypatch, same
):
    out, load = tmp_path / "out", runner.load_pipeline
    other = tmp_path / "other.txt"
    other.write_text(
        prompts.read_text(encoding="utf-8").splitlines()[0] if same else "something else", encoding="utf-8"
    )
    options = ("--out", out, "--attention", "dense", *SIZE, "--limit", 2)
    inner = ["generate", "--model", model, "--prompts", other, *options]
    written: list[int] = []

    def load_later(*arguments, **settings):
        # The plan of the first run is made; the second one makes a video before it.
        monkeypatch.setattr(runner, "load_pipeline", load)
        assert main([str(part) for part in inner]) == 0
        written.append((out / "dense" / "0001-s0.mp4").stat().st_mtime_ns)
        return load(*arguments, **settings)

    monkeypatch.setattr(runner, "load_pipeline", load_later)
    done = xattn("generate", "--model", model, "--prompts", prompts, *options)
    assert (out / "dense" / "0001-s0.mp4").stat().st_mtime_ns == written[0]
    if same:
        assert done.code == 0, done.err
        assert len(read_manifest(out / "dense")) == 2
    else:
        assert done.code == 2
        assert "another run has made another video of this name; use another --out" in done.err
        assert read_manifest(out / "dense")["0001", 0]["prompt"] == "something else"


def test_python_makes_the_videos_that_the_command_line_keeps(model, prompts, tmp_path, xattn, capfd):
    settings = GenerateSettings(
        model=str(model), prompts=prompts, out=tmp_path, attention="both", limit=1,
        height=64, width=64, num_frames=9, steps=2,
    )  # fmt: skip
    records = generate(settings)
    assert [(record["attention"], record["file"]) for record in records] == [
        ("dense", "0001-s0.mp4"), ("xattn", "0001-s0.mp4"),
    ]  # fmt: skip
    # What is for people is the command line's to print.
    assert capfd.readouterr().out == ""
    assert generate(settings) == []
    done = xattn("generate", *settings.arguments(), "--json")
    assert {name: json.loads(done.out)[name] for name in ("made", "kept")} == {"made": 0, "kept": 2}


def test_a_preset_and_what_replaces_its_values_make_one_configuration(model, prompts, tmp_path, xattn):
    command = ("generate", "--model", model, "--prompts", prompts, "--out", tmp_path, "--limit", 1, *SIZE, *SPARSE)
    done = xattn(*command, "--steps", 4, "--preset", "balanced", "--refresh-every", 2, "--no-extrapolate")
    assert done.code == 0, done.err
    changes = {"block_size": 16, "min_tokens": 0, "warmup_steps": 1, "refresh_every": 2, "extrapolate": False}
    config = XAttnConfig.preset("balanced", **changes)
    record = read_manifest(tmp_path / config.label())["0001", 0]
    assert record["config"] == config.to_dict()
    assert record["residual_bytes"] > 0
    assert record["dense_reasons"]["refresh"] > 0
    planned = xattn(*command, "--steps", 8, "--preset", "fast", "--refresh", "1,3", "--dry-run", "--json")
    changes = {"block_size": 16, "min_tokens": 0, "warmup_steps": 1, "refresh": (1, 3)}
    assert XAttnConfig.preset("fast", **changes).label() in planned.out
    written = tmp_path / "run.toml"
    written.write_text(
        run_text("generate", GenerateSettings(model="demo", prompt=("a b",), residual="int4", **changes))
    )
    planned = xattn("generate", "--config", written, "--dry-run", "--json")
    assert XAttnConfig(residual="int4", **changes).label() in planned.out
    refused = xattn(*command, "--preset", "balanced", "--keep-masks", 2)
    assert refused.code == 2
    assert "keep_masks goes without a residual" in refused.err
    assert "--preset" in xattn(*command, "--preset", "language").err.splitlines()[-1]


def test_other_weights_in_the_same_folder_are_another_model(model, prompts, tmp_path, xattn):
    copied = shutil.copytree(model, tmp_path / "model")
    options = ("--prompts", prompts, "--out", tmp_path / "out", "--attention", "dense", *SIZE, "--limit", 1)
    command = ("generate", "--model", copied, *options)
    assert xattn(*command).code == 0
    weights = next((copied / "transformer").glob("*.safetensors"))
    save_file({name: 1.01 * value for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    models.sampled_digest.cache_clear()
    refused = xattn(*command)
    assert refused.code == 2
    assert "was made with other settings (weights " in refused.err


def test_a_copy_that_no_record_names_is_made_anew(model, prompts, tmp_path, xattn):
    command = ("generate", "--model", model, "--prompts", prompts, "--out", tmp_path / "out", "--limit", 1)
    command = (*command, "--attention", "dense", *SIZE)
    assert xattn(*command).code == 0
    # Killed between the copy and its record.
    (tmp_path / "out/dense/0001-s0.mkv").write_bytes(b"of a killed run")
    assert xattn(*command, "--lossless").code == 0
    assert read_manifest(tmp_path / "out/dense")["0001", 0]["lossless_file"] == "0001-s0.mkv"
    assert len(frames(tmp_path / "out/dense/0001-s0.mp4")) == 9


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("WanAnimatePipeline", "WanAnimatePipeline needs pose_video, face_video, which generate cannot serve"),
        ("HunyuanVideo15ImageToVideoPipeline", "takes no height, width, which generate cannot serve"),
        ("SanaVideoPipeline", "takes no num_frames, which generate cannot serve"),
    ],
)
def test_a_pipeline_that_is_called_otherwise_is_refused_before_its_weights(pipeline, message, prompts, tmp_path, xattn):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    done = xattn("generate", "--model", tmp_path / "model", "--prompts", prompts, *SIZE, "--out", tmp_path / "out")
    assert done.code == 2
    assert message in done.err.splitlines()[-1]


def test_a_model_that_works_in_sections_has_its_own_rule_for_frames(tmp_path):
    index = {"_class_name": "HeliosPipeline", "transformer": ["diffusers", "x"], "vae": ["diffusers", "x"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for part, config in (
        ("transformer", {"_class_name": "HeliosTransformer3DModel", "patch_size": [1, 2, 2]}),
        ("vae", {"_class_name": "AutoencoderKLWan"}),
    ):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    assert find_model(str(tmp_path)).geometry is None


def test_damaged_and_impossible_models_are_one_line(model, prompts, tmp_path, xattn):
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = broken / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for name, message in (
        (broken, "the folder cannot be loaded"),
        ("~nobody-of-this-name/x", "no such user"),
        ("x" * 5000, "the name is too long"),
    ):
        done = xattn("generate", "--model", name, "--prompts", prompts, "--out", tmp_path / "out", *SIZE)
        assert done.code == 2
        assert message in done.err.splitlines()[-1]


@pytest.fixture
def image_prompts(tmp_path: Path) -> Path:
    from PIL import Image

    lines = []
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (500, 400), colour).save(tmp_path / f"{name}.png")
        lines.append(json.dumps({"prompt": "a shape", "id": name, "image": f"{name}.png"}))
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_an_image_conditions_an_image_to_video_model(image_model, image_prompts, tmp_path, xattn):
    command = ("generate", "--model", image_model, "--prompts", image_prompts, "--out", tmp_path / "out", *SIZE)
    done = xattn(*command, "--lossless")
    assert done.code == 0, done.err
    folder = tmp_path / "out/xattn-s8-t0.90-w5"
    assert read_manifest(folder)["red", 0]["image"] == "red.png"
    assert read_manifest(folder)["red", 0]["dense_reasons"]
    assert not np.array_equal(frames(folder / "red-s0.mp4"), frames(folder / "blue-s0.mp4"))
    for text, message in (
        ('{"prompt": "no image"}', "p.jsonl:1: "),
        ('{"prompt": "a", "image": "p.jsonl"}', "p.jsonl: cannot be read as an image"),
    ):
        image_prompts.write_text(text)
        refused = xattn(*command)
        assert refused.code == 2
        assert message in refused.err


def test_an_overwriting_run_that_fails_goes_on_where_it_ended(image_model, image_prompts, tmp_path, xattn):
    """The lines of videos about to be made anew go first: nothing old passes for new afterwards."""
    command = ("generate", "--model", image_model, "--prompts", image_prompts, "--out", tmp_path / "out", *SIZE)
    assert xattn(*command).code == 0
    whole = (tmp_path / "blue.png").read_bytes()
    (tmp_path / "blue.png").write_bytes(whole[: len(whole) // 2])
    failed = xattn(*command, "--steps", 3, "--overwrite")
    assert failed.code == 3
    assert "blue.png: damaged image" in failed.err
    folder = tmp_path / "out/xattn-s8-t0.90-w5"
    assert {key[0]: record["steps"] for key, record in read_manifest(folder).items()} == {"red": 3}
    (tmp_path / "blue.png").write_bytes(whole)
    done = xattn(*command, "--steps", 3)
    assert "videos: 1 made, 1 kept" in done.out
    assert {key[0]: record["steps"] for key, record in read_manifest(folder).items()} == {"red": 3, "blue": 3}


def test_a_killed_and_an_interrupted_run_lose_at_most_the_video_in_work(model, tmp_path, xattn):
    """SIGKILL, then Ctrl-C, in processes of their own; a third run makes exactly what is missing."""
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {number}\n" for number in range(40)))
    folder = tmp_path / "out/dense"
    command = ["generate", "--model", str(model), "--prompts", str(path), "--out", str(tmp_path / "out")]
    command += ["--attention", "dense", *SIZE, "--limit"]

    killed, _ = stopped_after(signal.SIGKILL, folder, 2, *command, "40")
    assert killed == -signal.SIGKILL
    kept = finished(folder)
    assert 2 <= len(kept) < 40

    interrupted, error = stopped_after(signal.SIGINT, folder, len(kept) + 2, *command, "40")
    assert interrupted == 130
    assert error.rstrip().splitlines()[-1].startswith("xattn-video: stopped")
    assert "Traceback" not in error
    assert not list(folder.glob(".*"))
    more = finished(folder)
    assert len(kept) + 2 <= len(more) < 40
    assert kept.items() <= more.items()

    done = xattn(*command, len(more) + 2, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out.splitlines()[-1])
    assert (result["made"], result["kept"]) == (2, len(more))
    assert more.items() <= finished(folder).items()
    assert sorted(folder.iterdir()) == sorted([folder / MANIFEST, *finished(folder)])
    for video in finished(folder):
        assert read_video(video).shape == (9, 64, 64, 3)


def finished(folder: Path) -> dict[Path, int]:
    """The videos that the manifest calls finished, with their time of writing."""
    return {
        folder / record["file"]: (folder / record["file"]).stat().st_mtime_ns
        for record in read_manifest(folder).values()
    }


def stopped_after(number: signal.Signals, folder: Path, videos: int, *command: str) -> tuple[int, str]:
    """Run the command in a process of its own, signal it once `videos` are finished; exit code and stderr."""
    # a process started from a shell's background job ignores Ctrl-C unless it is told not to
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listen}; import sys; from xattn_video_pipelines.cli import main; sys.exit(main(sys.argv[1:]))"
    log = folder.parent.with_suffix(f".{number.name}")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *command],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        while process.poll() is None and len(read_manifest(folder)) < videos:
            time.sleep(0.02)
        process.send_signal(number)
        process.wait(timeout=1000)
    return process.returncode, log.read_text()


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_the_defaults_of_known_models_obey_their_own_rules(name):
    known = find_model(name.upper())
    defaults = known.defaults
    known.geometry.check(defaults.height, defaults.width, defaults.num_frames)
    # The demo's small model was trained and judged at 20 steps without guidance.
    assert defaults.steps >= (20 if name == "demo" else 40)
    assert defaults.guidance_scale > 1 or name == "demo"


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        # As published for these models and sizes.
        ("hunyuan-video", (720, 1280, 129), 118_800),
        ("wan2.1-14b", (720, 1280, 81), 75_600),
        ("wan2.1-1.3b", (480, 832, 81), 32_760),
        ("wan2.2-a14b", (720, 1280, 81), 75_600),
        ("wan2.2-5b", (704, 1280, 121), 27_280),
        ("hunyuan-video-1.5", (480, 848, 121), 49_290),
    ],
)
def test_token_counts_of_known_models(name, size, tokens):
    assert KNOWN_MODELS[name].geometry.tokens(*size) == tokens


def test_the_geometry_of_known_wan_models_is_that_of_diffusers_own_configuration(model):
    """Read from a saved pipeline whose VAE has Wan 2.1's default strides."""
    assert find_model(str(model)).geometry == KNOWN_MODELS["wan2.1-1.3b"].geometry


def test_guidance_and_flow_shift_reach_a_pipeline_that_keeps_them_in_components(tmp_path):
    """HunyuanVideo 1.5: guidance is in its guider, the shift in its scheduler; geometry and tiling from its files."""
    import torch

    from tests.tiny.hunyuan_families import HUNYUAN_VIDEO_15
    from xattn_video_pipelines.video import make as runner

    pipe = HUNYUAN_VIDEO_15.build(0)
    for number in ("", "_2"):
        pipe.register_modules(**{f"text_encoder{number}": tiny_text_encoder(), f"tokenizer{number}": tiny_tokenizer()})
    pipe.save_pretrained(tmp_path)
    found = find_model(str(tmp_path))
    assert found.geometry == KNOWN_MODELS["hunyuan-video-1.5"].geometry
    settings = runner.ResolvedSettings(
        height=64, width=64, num_frames=9, fps=8, steps=2, guidance_scale=4.5, guidance_scale_2=None, flow_shift=7.5
    )
    cpu = torch.device("cpu")
    loaded = runner.load_pipeline(found, settings, device=cpu, dtype="bfloat16", offload="none", compile_blocks=False)
    assert loaded.guider.guidance_scale == 4.5
    assert loaded.scheduler.config.shift == 7.5
    assert loaded.vae.use_tiling
    assert loaded.transformer.dtype == torch.bfloat16


def test_wan_keeps_its_vae_in_float32_in_a_half_precision_run(model, prompts, tmp_path, xattn):
    import torch

    from xattn_video_pipelines.video import make as runner

    found = find_model(str(model))
    settings = runner.ResolvedSettings(64, 64, 9, 8, 2, guidance_scale=5.0, guidance_scale_2=None, flow_shift=2.5)
    cpu = torch.device("cpu")
    loaded = runner.load_pipeline(found, settings, device=cpu, dtype="bfloat16", offload="none", compile_blocks=False)
    assert (loaded.transformer.dtype, loaded.vae.dtype) == (torch.bfloat16, torch.float32)
    assert loaded.scheduler.config.flow_shift == 2.5
    done = xattn(
        "generate",
        "--model",
        model,
        "--prompts",
        prompts,
        "--out",
        tmp_path,
        *SIZE,
        "--dtype",
        "bfloat16",
        "--limit",
        1,
    )
    assert done.code == 0, done.err
    assert read_manifest(tmp_path / "xattn-s8-t0.90-w5")["0001", 0]["dtype"] == "bfloat16"
