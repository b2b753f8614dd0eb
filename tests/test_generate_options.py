"""`xattn-video generate` without a file of prompts: a prompt in quotes, a picture, adapters, quantised weights."""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.cli_tools import SIZE, SPARSE, SPARSE_LABEL
from tests.tiny.wan_family import T2V_A14B
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.video import GenerateSettings, make_plan, read_manifest, read_video
from xattn_video_pipelines.video.adaptation import Adaptation, Lora
from xattn_video_pipelines.video.manifest import append_record
from xattn_video_pipelines.video.prompts import Prompt, completed

ROOT = Path(__file__).resolve().parent.parent
FOX = "a red fox runs through fresh snow"
# The first 8 digits of its SHA-256, as `printf %s "..." | sha256sum` prints them.
FOX_ID = "prompt-c3b6b801"


@pytest.mark.parametrize("words", [(FOX, "another one"), ("--prompt", FOX, "another one")])
def test_a_prompt_needs_no_file_and_its_id_comes_from_its_digest(words, tmp_path, xattn):
    done = xattn("generate", *words, "--model", "demo", "--out", tmp_path / "out", "--dry-run", "--json")
    assert done.code == 0, done.err
    first, second = json.loads(done.out)["videos"]
    assert first["id"] == FOX_ID
    assert Path(first["file"]).name == f"{FOX_ID}-s0.mp4"
    assert second["id"] != FOX_ID


def test_a_run_with_nothing_left_to_make_does_not_import_diffusers(tmp_path, xattn, monkeypatch):
    command = ("generate", FOX, "--model", "demo", "--out", tmp_path)
    (job,) = make_plan(GenerateSettings(model="demo", prompt=(FOX,), out=tmp_path)).jobs
    # An import of either fails now.
    for name in ("diffusers", "xattn_video.integrations.diffusers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="diffusers"):
        xattn(*command)
    job.folder.mkdir()
    job.path.write_bytes(b"a video")
    append_record(job.folder, {"id": FOX_ID, "seed": 0, "file": job.path.name, "bytes": 7, **job.identity})
    done = xattn(*command)
    assert done.code == 0, done.err
    assert "0 made, 1 kept" in done.out


def test_a_prompt_file_takes_the_negative_prompt_where_it_has_none(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "negative_prompt": "own"}\n')
    plan = make_plan(GenerateSettings(model="demo", prompts=path, out=tmp_path / "out", negative_prompt="blur"))
    assert [job.prompt.negative_prompt for job in plan.jobs] == ["blur", "own"]
    assert [job.identity["negative_prompt"] for job in plan.jobs] == ["blur", "own"]


def test_an_image_is_for_the_prompts_that_have_none(tmp_path):
    for name in ("own.png", "other.png"):
        (tmp_path / name).write_bytes(b"")
    own, none = Prompt("1", "a", image=tmp_path / "own.png"), Prompt("2", "b")
    given = completed([own, none], tmp_path / "other.png", None)
    assert [prompt.image and prompt.image.name for prompt in given] == ["own.png", "other.png"]
    assert completed([own, none], None, None) == [own, none]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "needs a prompt in quotes.* got neither"),
        ({"prompt": ("a b",), "prompts": Path("p.txt")}, "needs a prompt in quotes.* got both"),
        ({"prompt": ("a", "red", "fox")}, 'put a prompt of several words in quotes: "a red fox"'),
        ({"prompt": (f"{ROOT}/prompts/demo.txt",)}, "demo.txt is a file; give it as --prompts .*demo.txt"),
        ({"prompt": (" ",)}, "prompt 1 is empty"),
        ({"prompt": ("a b", "a b")}, "prompt 2 is the same as prompt 1: 'a b'"),
        ({"prompt": ("a \udcff",)}, "prompt 1 is not UTF-8"),
        ({"prompt": ("a b",), "image": Path("no.png")}, "--image no.png: no such file"),
        ({"prompt": ("a b",), "image": ROOT / "README.md"}, "prompt 1: has an image, but demo .* from text alone"),
    ],
)
def test_what_is_no_prompt_is_said_in_one_line(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(GenerateSettings(model="demo", out=tmp_path / "out", **given))


def save_lora(path: Path, rank: int = 2, dimension: int = 64, layer: str = "blocks.0.attn1.to_q") -> Path:
    """A LoRA of one layer, in the form that diffusers writes."""
    torch.manual_seed(0)
    weights = {
        f"transformer.{layer}.lora_A.weight": torch.randn(rank, dimension),
        f"transformer.{layer}.lora_B.weight": torch.randn(dimension, rank),
    }
    save_file(weights, path)
    return path


def test_a_lora_changes_the_video_and_belongs_to_its_identity(model, tmp_path, xattn):
    lora = save_lora(tmp_path / "style.safetensors")
    command = (
        "generate",
        FOX,
        "--model",
        model,
        "--out",
        tmp_path / "out",
        "--attention",
        "dense",
        *SIZE,
        "--steps",
        1,
    )
    seen = []
    for words in ((), ("--lora", f"{lora}:0"), ("--lora", f"{lora}:1.5")):
        done = xattn(*command, "--lossless", "--overwrite", *words)
        assert done.code == 0, done.err
        seen.append(read_video(tmp_path / f"out/dense/{FOX_ID}-s0.mkv"))
    plain, weightless, weighed = seen
    assert np.array_equal(plain, weightless)
    assert not np.array_equal(plain, weighed)
    record = read_manifest(tmp_path / "out/dense")[FOX_ID, 0]
    assert record["lora"] == {sha256(lora.read_bytes()).hexdigest()[:16]: 1.5}
    assert record["lora_files"] == ["style.safetensors"]
    # The name of the file tells nothing; its bytes and the weight do.
    renamed = lora.rename(tmp_path / "other.safetensors")
    assert "1 kept" in xattn(*command, "--lora", f"{renamed}:1.5").out
    for words in ((), ("--lora", f"{renamed}:1")):
        refused = xattn(*command, *words)
        assert (refused.code, "made with other settings (lora" in refused.err) == (2, True), refused.err


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"dimension": 24}, "does not fit this model: "),
        ({"layer": "layers.7.taste"}, "does not fit this model: "),
    ],
)
def test_a_lora_of_another_model_is_refused(lora, message, model, tmp_path, xattn):
    path = save_lora(tmp_path / "x.safetensors", **lora)
    done = xattn("generate", FOX, "--model", model, "--out", tmp_path / "out", *SIZE, "--lora", path)
    assert done.code == 2
    assert f"--lora {path}: {message}" in done.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("x.pt",), "--lora must be a .safetensors file, .* got x.pt"),
        (("x.bin:0.5",), "--lora must be a .safetensors file, .* got x.bin:0.5"),
        (("no.safetensors:0.5",), "no.safetensors: no such file"),
        (("PATH:much",), "x.safetensors: its weight must be a number, such as 0.8, got 'much'"),
        (("PATH:nan",), "x.safetensors: its weight must be a number, such as 0.8, got 'nan'"),
        (("PATH", "PATH:0.5"), "x.safetensors: is the same as .*x.safetensors; give a LoRA once"),
        (("damaged.safetensors",), "damaged.safetensors: cannot be read: "),
    ],
)
def test_a_lora_that_is_none_is_refused_before_the_model_is_loaded(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save_lora(tmp_path / "x.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(path.read_bytes()[:20])
    given = tuple(word.replace("PATH", str(path)) for word in words)
    with pytest.raises(UserError, match=message):
        make_plan(GenerateSettings(model="demo", prompt=("a b",), out=tmp_path / "out", lora=given))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"high": 0.5}, {"low": 1.0}, ({"high": 0.5}, {"low": 1.0})),
        ({}, {"low": 2.0, "high": 1.0}, ({}, {"low": 2.0, "high": 1.0})),
        ({"high": 1.5}, {}, ({"high": 1.5}, {"high": 1.5})),
    ],
)
def test_each_lora_is_added_to_the_transformers_that_it_is_for(first, second, expected, tmp_path):
    # By its rank a LoRA is known again in the loaded pipeline. A layer's scaling is the weight that was given, because
    # these files name no alpha.
    ranks = {"high": 2, "low": 3}
    paths = {name: save_lora(tmp_path / f"{name}.safetensors", rank) for name, rank in ranks.items()}
    loras = [
        tuple(Lora(paths[name], weight, option) for name, weight in given.items())
        for given, option in ((first, "--lora"), (second, "--lora-2"))
    ]
    pipe = T2V_A14B.build(0)
    Adaptation(*loras).apply(pipe)
    found = []
    for transformer in (pipe.transformer, pipe.transformer_2):
        layer = transformer.blocks[0].attn1.to_q
        there = getattr(layer, "lora_A", {})
        found.append({there[name].out_features: layer.scaling[name] for name in there if name in layer.active_adapters})
    assert found == [{ranks[name]: weight for name, weight in given.items()} for given in expected]


def test_a_second_lora_needs_a_second_transformer_and_belongs_to_the_identity(tmp_path):
    path = save_lora(tmp_path / "low.safetensors")
    given = {"prompt": ("a b",), "out": tmp_path / "out", "lora_2": (f"{path}:0.5",)}
    with pytest.raises(UserError, match=r"--lora-2: demo \(WanPipeline\) has no second transformer; give it as --lora"):
        make_plan(GenerateSettings(model="demo", **given))
    (job,) = make_plan(GenerateSettings(model="wan2.2-a14b", **given)).jobs
    assert job.identity["lora"] is None
    assert job.identity["lora_2"] == {sha256(path.read_bytes()).hexdigest()[:16]: 0.5}
    assert job.identity["lora_2_files"] == ["low.safetensors"]


def test_quantised_weights_are_another_video_and_say_what_they_need(tmp_path, monkeypatch):
    settings = {"model": "demo", "prompt": ("a b",), "out": tmp_path / "out", "device": "cpu"}
    installed = metadata.version
    missing = {"torchao", "bitsandbytes"}

    def version(package: str) -> str:
        if package in missing:
            raise metadata.PackageNotFoundError(package)
        return "1" if package in ("torchao", "bitsandbytes") else installed(package)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(UserError, match=r"--quantize torchao needs torchao, .* pip install torchao$"):
        make_plan(GenerateSettings(**settings, quantize="torchao"))
    missing.clear()
    assert make_plan(GenerateSettings(**settings, quantize="torchao")).jobs[0].identity["quantize"] == "torchao"
    with pytest.raises(UserError, match="--quantize bitsandbytes_4bit needs a GPU; torchao and quanto run on a CPU"):
        make_plan(GenerateSettings(**settings, quantize="bitsandbytes_4bit"))
    with pytest.raises(UserError, match=r"--quantize must be one of bitsandbytes_4bit, .* got 'gguf'"):
        make_plan(GenerateSettings(**settings, quantize="gguf"))


@pytest.mark.parametrize(("name", "package"), [("torchao", "torchao"), ("quanto", "optimum-quanto")])
def test_sparse_attention_runs_on_quantised_weights(name, package, model, tmp_path, xattn):
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    done = xattn("generate", FOX, "--model", model, "--out", tmp_path, *SIZE, *SPARSE, "--quantize", name)
    assert done.code == 0, done.err
    record = read_manifest(tmp_path / SPARSE_LABEL)[FOX_ID, 0]
    assert record["quantize"] == name
    assert 0 < record["density_by_step"][-1] < 1
