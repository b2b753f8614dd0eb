"""The noise floor: dense attention in another order of summation, which changes rounding and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.cli_tools import SIZE, SPARSE, SPARSE_LABEL, save_tiny_wan, tool
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.video.manifest import read_manifest
from xattn_video_pipelines.video.noise_floor import reversed_keys


class Attention(torch.nn.Module):
    """One call of torch's attention function, as a model makes it."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, **self.arguments)


def tensors(heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 1500, 16, generator=generator) for _ in range(3))
    return [query, key[:, :1].expand(2, heads, 1500, 16), value]


MASK = torch.rand(2, 1, 1500, 1500, generator=torch.Generator().manual_seed(1)) < 0.3
PADDING = (torch.arange(1500) < torch.tensor([1500, 70])[:, None])[:, None, None]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"scale": 0.3}, {"attn_mask": MASK}, {"attn_mask": PADDING}, {"attn_mask": torch.zeros(2, 1, 1500, 1)}],
    ids=["plain", "scale", "mask", "padding", "broadcast"],
)
def test_the_result_differs_by_rounding_alone(arguments):
    model, inputs = Attention(**arguments), tensors()
    expected = model(*inputs)
    with reversed_keys([model]):
        found = model(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found, expected)
    # Closed again, the model is what it was.
    assert torch.equal(model(*inputs), expected)


def test_a_causal_call_stays_causal():
    causal, plain, inputs = Attention(is_causal=True), Attention(), tensors()
    with reversed_keys([causal, plain]):
        plain(*inputs)
        found = causal(*inputs)
    assert torch.equal(found, causal(*inputs))


def test_other_models_are_not_touched():
    watched, other, inputs = Attention(), Attention(), tensors()
    expected = other(*inputs)
    with reversed_keys([watched]):
        watched(*inputs)
        assert torch.equal(other(*inputs), expected)


def test_a_model_that_fails_leaves_nothing_behind():
    model, inputs = Attention(), tensors()
    expected = model(*inputs)
    with pytest.raises(RuntimeError), reversed_keys([model]):
        model(inputs[0][..., :8], *inputs[1:])
    assert torch.equal(model(*inputs), expected)


def test_a_model_without_torchs_attention_is_refused():
    model = torch.nn.Linear(2, 2)
    with (
        pytest.raises(UserError, match="dense-alt: this model's attention does not go through"),
        reversed_keys([model]),
    ):
        model(torch.zeros(1, 2))


def test_the_floor_is_generated_and_compared_like_any_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    xattn = tool(capfd)
    model, prompts, out = save_tiny_wan(tmp_path / "model"), tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a red circle\n", encoding="utf-8")
    arguments = ("--model", model, "--prompts", prompts, "--out", out, "--attention", "all", "--json")
    done = xattn("generate", *arguments, *SIZE, *SPARSE)
    assert done.code == 0, done.err
    labels = ["dense", "dense-alt", SPARSE_LABEL]
    assert [video["attention"] for video in json.loads(done.out.splitlines()[-1])["videos"]] == labels
    kinds = [read_manifest(out / label)["0001", 0]["attention"] for label in labels]
    assert kinds == ["dense", "dense-alt", "xattn"]
    quality = {}
    for label in labels[1:]:
        compared = xattn("compare", out / "dense", out / label, "--no-lpips")
        assert compared.code == 0, compared.err
        summary = json.loads((out / label / "summary.json").read_text(encoding="utf-8"))
        quality[label] = summary["psnr"]
    # The floor's row stands under the sparse videos', and is what comparing the floor itself gives.
    assert summary["floor"]["psnr"] == quality["dense-alt"]
    assert "noise floor (mean)" in compared.out
    without = xattn("compare", out / "dense", out / SPARSE_LABEL, "--no-lpips", "--no-floor")
    assert "noise floor (mean)" not in without.out
    assert "noise floor: not measured" in without.out
    # Rounding is nearer to dense than leaving blocks out.
    assert quality["dense-alt"] > quality[SPARSE_LABEL] + 10
    again = json.loads(xattn("generate", *arguments, *SIZE, *SPARSE).out.splitlines()[-1])
    assert (again["made"], again["kept"]) == (0, 3)


def test_the_floor_of_compiled_blocks_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    xattn = tool(capfd)
    model, prompts = save_tiny_wan(tmp_path / "model"), tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n", encoding="utf-8")
    done = xattn(
        "generate", "--model", model, "--prompts", prompts, "--out", tmp_path / "out", *SIZE,
        "--attention", "dense-alt", "--compile",
    )  # fmt: skip
    assert done.code == 2
    assert done.err.splitlines()[-1] == (
        "xattn-video: error: --attention dense-alt makes dense-alt videos, which do not go with --compile"
    )
    assert not (tmp_path / "out").exists()
