"""The demo's whole path, smaller; and that its model is what the demo says."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from pipelines.demo import model
from pipelines.demo.command import demo_prompts
from pipelines.manifest import read_manifest
from pipelines.models import find_model
from pipelines.prompts import read_prompts
from tests.cli_tools import Run, tool

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def xattn(capfd: pytest.CaptureFixture[str]) -> Run:
    return tool(capfd)


def test_the_demo_makes_compares_and_sums_up(tmp_path, xattn):
    command = ("demo", "--out", tmp_path, "--limit", 1, "--steps", 3, "--num-frames", 9, "--json")
    done = xattn(*command)
    assert done.code == 0, done.err
    dense, sparse = (read_manifest(tmp_path / name) for name in ("dense", "xattn-s8-t0.90-w2"))
    assert list(dense) == list(sparse) == [("0001", 0)]
    # Two of three steps are warm-up, the third is sparse: the demo's sequences are long enough.
    assert sparse["0001", 0]["dense_reasons"] == {"warmup": 16}
    assert sparse["0001", 0]["density_by_step"][2] < 0.9
    summary = json.loads(done.out.splitlines()[-1])
    assert summary["pairs"] == 1
    assert summary["speedup"] == pytest.approx(dense["0001", 0]["seconds"] / sparse["0001", 0]["seconds"])
    assert summary["density"] == pytest.approx(sparse["0001", 0]["mean_density"])
    assert 20 < summary["psnr"] <= 100
    assert 0.5 < summary["ssim"] <= 1
    for expected in ("random initialisation", "$ xattn-video generate", "$ xattn-video compare", "speed-up"):
        assert expected in done.out
    # Run again: nothing is made anew, and the summary is the same.
    again = xattn(*command)
    assert "videos: 0 made, 2 kept" in again.out
    assert json.loads(again.out.splitlines()[-1]) == summary


def test_the_transformer_sees_at_least_4096_tokens(tmp_path):
    model.save_model(tmp_path)
    geometry = find_model(str(tmp_path)).geometry
    geometry.check(model.HEIGHT, model.WIDTH, model.NUM_FRAMES)
    assert geometry.tokens(model.HEIGHT, model.WIDTH, model.NUM_FRAMES) >= 4096


def test_the_demo_has_prompts_in_a_checkout_and_in_the_wheel():
    assert len(read_prompts(demo_prompts()).prompts) >= 3
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    included = build["targets"]["wheel"]["force-include"]
    assert included["prompts/demo.txt"] == "pipelines/demo/demo.txt"


def test_an_unwritable_folder_is_one_line(tmp_path, xattn):
    (tmp_path / "file").write_text("")
    done = xattn("demo", "--out", tmp_path / "file")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("xattn-video: error: --out: cannot write to")
