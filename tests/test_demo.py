"""The demo's whole path, smaller; and that the model it ships is what its card says."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from xattn_video_pipelines.common.demo_data import DEMO_WEIGHTS, shipped_prompts
from xattn_video_pipelines.demo import command, timing, world
from xattn_video_pipelines.demo.judge import judge
from xattn_video_pipelines.demo.settings import DemoSettings
from xattn_video_pipelines.demo.training.vae import reconstruction_psnr
from xattn_video_pipelines.video.io import read_video
from xattn_video_pipelines.video.manifest import read_manifest
from xattn_video_pipelines.video.models import KNOWN_MODELS, find_model, import_diffusers
from xattn_video_pipelines.video.plan import Job
from xattn_video_pipelines.video.prompts import Prompt, read_prompts

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = import_diffusers().WanPipeline.from_pretrained(DEMO_WEIGHTS, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_demo_makes_compares_judges_and_sums_up(tmp_path, xattn):
    command = ("demo", "--out", tmp_path, "--limit", 1, "--steps", 3, "--warmup-steps", 2, "--num-frames", 9, "--json")
    done = xattn(*command)
    assert done.code == 0, done.err
    dense, sparse = (read_manifest(tmp_path / name) for name in ("dense", "xattn-s8-t0.35-w2-a1-n8"))
    assert list(dense) == list(sparse) == [("0001", 0)]
    # Two of three steps are warm-up, the third is sparse: the demo's sequences are long enough.
    assert sparse["0001", 0]["dense_reasons"] == {"warmup": 8}
    assert sparse["0001", 0]["density_by_step"][2] < 1.0
    assert dense["0001", 0]["model"] == "demo"
    # The document is alone on stdout, what is for people on stderr.
    summary = json.loads(done.out)
    assert summary["pairs"] == 1
    assert summary["speedup"] == pytest.approx(dense["0001", 0]["seconds"] / sparse["0001", 0]["seconds"])
    assert summary["density"] == pytest.approx(sparse["0001", 0]["mean_density"])
    assert 15 < summary["psnr"] <= 100
    assert 0.5 < summary["ssim"] <= 1
    video = summary["videos"][0]
    for side in ("dense", "sparse"):
        assert video[side]["asked"] == {"colour": "red", "shape": "circle", "motion": "left", "background": "white"}
        assert f" {video[side]['saw']}" in done.err
    for expected in (
        "$ xattn-video generate --model demo",
        "$ xattn-video compare",
        "$ xattn-video report",
        "the judge saw",
    ):
        assert expected in done.err
    # One line says it all; where the machine was busy, it says that too.
    assert done.err.splitlines()[-1] == f"verdict       {summary['verdict']}"
    assert f"{100 * (1 - summary['density']):.0f} % of blocks skipped" in summary["verdict"]
    assert (summary["busy"] is None) == ("timings are not reliable" not in summary["verdict"])
    assert 0 < summary["speedup_of_attention"] < 100
    assert summary["verdict"].split(";")[0] in (tmp_path / "report.html").read_text(encoding="utf-8")
    both = read_video(tmp_path / "side-by-side.mp4")
    assert both.shape[0] == 9
    assert (
        "it is asked about at most 8 videos, each of at least 32 frames and with a prompt of the shapes world"
        in done.err
    )
    # Run again: nothing is made again, and the summary is the same, times and load of the first run included.
    again = xattn(*command)
    assert "videos: 0 made, 2 kept" in again.err
    assert json.loads(again.out) == summary


@pytest.mark.parametrize(
    "scene",
    [
        world.Scene("red", "circle", "left", "white", "large"),
        world.Scene("blue", "square", "up", "black", "large"),
        world.Scene("green", "triangle", "down", "white", "small"),
    ],
    ids=lambda scene: f"{scene.colour}-{scene.shape}-{scene.motion}",
)
def test_the_model_draws_what_is_asked_in_combinations_it_never_saw(pipe, scene):
    assert world.is_held_out(scene)
    video = pipe(
        world.caption(scene, 0),
        height=128, width=128, num_frames=33, num_inference_steps=10, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0), output_type="np",
    ).frames[0]  # fmt: skip
    right = judge((video * 255).round().astype("uint8")).right(scene)
    assert all(right.values()), right


def test_the_model_is_small_safe_and_as_large_as_promised(pipe):
    files = [path for path in DEMO_WEIGHTS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}
    assert sum(path.stat().st_size for path in files) < 40e6
    config = pipe.transformer.config
    assert config.num_layers >= 4
    assert config.num_attention_heads >= 4
    assert config.attention_head_dim == 64
    for path in DEMO_WEIGHTS.rglob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text(encoding="utf-8")), path


def test_the_transformer_sees_at_least_4096_tokens():
    model = find_model("demo")
    size = model.defaults
    assert find_model(str(DEMO_WEIGHTS)).geometry == model.geometry
    model.geometry.check(size.height, size.width, size.num_frames)
    assert model.geometry.tokens(size.height, size.width, size.num_frames) >= 4096


def test_the_vae_brings_held_out_clips_back(pipe):
    assert reconstruction_psnr(pipe.vae, count=2, seed=3) > 30


def test_dense_and_sparse_videos_are_made_alternately(tmp_path):
    """Every other pair begins with the sparse one, so that no side has the warmer or the busier machine."""
    jobs = [
        Job(kind, None, Prompt(prompt, "a red circle"), 0, tmp_path, {"attention": kind}, None)
        for kind in ("dense", "xattn")
        for prompt in ("1", "2", "3")
    ]
    order = [(job.kind, job.prompt.id) for job in command._alternating(jobs)]
    assert order == [("dense", "1"), ("xattn", "1"), ("xattn", "2"), ("dense", "2"), ("dense", "3"), ("xattn", "3")]


def test_settings_that_are_not_given_are_the_demos_own_or_the_presets():
    own, mine = DemoSettings(), DemoSettings(prompts=Path("mine.txt"), preset="fast")
    assert (own.first, mine.first, DemoSettings(limit=4).first) == (2, None, 4)
    assert own.attention == {"preset": None, "threshold": 0.35, "warmup_steps": 2, "keep_masks": 8}
    assert mine.attention == {"preset": "fast"}
    assert DemoSettings(threshold=0.9).attention == own.attention | {"threshold": 0.9}


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        ({"load": 0.4, "cores": 2}, None),
        ({"load": None, "cores": 2}, None),
        ({"load": 1.6, "cores": 2}, "this machine was busy (load 1.6 on 2 cores before the start)"),
    ],
)
def test_a_busy_machine_is_told_by_its_load(run, reason):
    assert timing.loaded([{"load": 0.0, "cores": 8}, run]) == reason


def test_a_watch_sees_attention(pipe):
    watch = timing.Watch()
    watch.attach(pipe)
    arguments = {"height": 128, "width": 128, "num_frames": 5, "num_inference_steps": 1, "guidance_scale": 1.0}
    started = time.perf_counter()
    pipe("a red circle", **arguments, output_type="latent")
    seconds = time.perf_counter() - started
    attention = watch.take_attention()
    assert 0 < attention < seconds
    assert watch.take_attention() == 0


def test_the_attention_of_pairs_is_compared_only_where_all_of_it_is_known():
    known = {"runs": [], "attention_seconds": {"dense/a": 3.0, "dense/b": 5.0, "x/a": 2.0, "x/b": 2.0}}
    pairs = [("dense/a", "x/a"), ("dense/b", "x/b")]
    assert timing.attention_speedup(known, pairs) == 2.0
    assert timing.attention_speedup(known, [*pairs, ("dense/c", "x/c")]) is None


def test_what_is_not_known_of_times_has_no_column():
    names = ("dense_seconds", "sparse_seconds", "speedup", "speedup_of_steps", "speedup_of_attention")
    summary = {**dict.fromkeys((*names, "density", "psnr", "ssim"), 1.0), "pairs": 1, "right": {}, "busy": None}
    assert all(f" {head}" in command._table(summary) for head in ("dense s", "speed-up", "attention alone"))
    # Videos of two machines.
    table = command._table({**summary, "speedup": None})
    assert "speed-up" not in table
    assert "attention alone" in table
    # Times of a busy machine are not told at all.
    table = command._table({**summary, "busy": "this machine was busy"})
    assert table.splitlines()[2].split() == ["density", "PSNR", "dB", "SSIM"]


def test_missing_weights_are_one_line(tmp_path, xattn, monkeypatch):
    monkeypatch.setitem(KNOWN_MODELS, "demo", replace(KNOWN_MODELS["demo"], source=str(tmp_path / "none")))
    done = xattn("demo", "--out", tmp_path / "out")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("xattn-video: error: --model demo: its weights are missing")


def test_the_prompts_are_held_out():
    for name, count in (("demo.txt", 4), ("shapes-held-out.jsonl", 192)):
        prompts = read_prompts(shipped_prompts(name)).prompts
        assert len(prompts) == count
        for prompt in prompts:
            assert world.is_held_out(world.Scene(**{"size": "large"} | world.asked(prompt.text)))


def test_the_held_out_prompts_are_those_of_the_world():
    prompts = read_prompts(shipped_prompts("shapes-held-out.jsonl")).prompts
    assert [prompt.text for prompt in prompts] == [world.caption(s, n) for n, s in enumerate(world.held_out_scenes())]
    assert [prompt.seed for prompt in prompts] == list(range(192))


def test_an_unwritable_folder_is_one_line(tmp_path, xattn):
    (tmp_path / "file").write_text("")
    done = xattn("demo", "--out", tmp_path / "file")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("xattn-video: error: --out ")
