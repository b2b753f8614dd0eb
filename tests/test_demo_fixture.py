"""The shipped queries, keys and values of the demo model, and XAttention on them: real structure, no random tensors."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from xattn_video import XAttnConfig, xattention
from xattn_video.ops import dense_attention, reference
from xattn_video.ops.cpu import backend
from xattn_video.ops.key_mask import KeyMask
from xattn_video_eval.bench.demo_tensors import DemoTensors, load_demo_qkv
from xattn_video_pipelines.common.demo_data import DEMO_QKV
from xattn_video_pipelines.video.models import find_model

THRESHOLD, BLOCK = 0.9, 128
ENTRIES = range(4)


@functools.cache
def entry(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in float32."""
    item = load_demo_qkv()[number]
    return item.query.float(), item.key.float(), item.value.float()


@functools.cache
def exact(number: int) -> Tensor:
    return dense_attention(*entry(number))


def error(output: Tensor, number: int) -> float:
    return float((output - exact(number)).norm() / exact(number).norm())


def test_the_file_is_small_and_covers_layers_heads_and_steps() -> None:
    assert DEMO_QKV.stat().st_size <= 8_000_000
    loaded = load_demo_qkv()
    assert len(loaded) == len(ENTRIES)
    assert len({item.layer for item in loaded}) >= 3
    assert len({item.head for item in loaded}) >= 3
    assert len({item.step for item in loaded}) >= 3
    # XAttention never sees the steps that stay dense
    assert min(item.step for item in loaded) >= XAttnConfig().warmup_steps


def test_every_part_is_full_size_finite_and_its_own() -> None:
    def parts(item: DemoTensors) -> tuple[Tensor, ...]:
        return item.query, item.key, item.value

    tensors = [tensor for item in load_demo_qkv() for tensor in parts(item)]
    for tensor in tensors:
        assert tensor.shape == (1, 1, 17 * 16 * 16, 64)
        assert tensor.dtype == torch.bfloat16
        assert tensor.isfinite().all()
        assert tensor.float().std() > 0.01
    assert len({tensor.view(torch.int16).numpy().tobytes() for tensor in tensors}) == len(tensors)


def test_it_was_made_from_the_shipped_model_and_says_how() -> None:
    with safe_open(DEMO_QKV, framework="pt") as file:
        metadata = file.metadata()
    weights = Path(find_model("demo").source) / "transformer" / "diffusion_pytorch_model.safetensors"
    assert metadata["transformer_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert metadata["command"].startswith("python -m pipelines.demo.capture --model demo --out demo_qkv.safetensors")
    assert metadata["grid"] == "17x16x16"


@pytest.mark.parametrize("number", ENTRIES)
def test_sparse_is_close_to_dense_and_leaves_blocks_out(number: int) -> None:
    query, key, value = entry(number)
    output, stats = xattention(query, key, value, threshold=THRESHOLD, return_stats=True)
    assert stats.dense_reason is None
    assert stats.density < 1
    # no larger a share of the output is lost than of the mass
    assert error(output, number) < 1 - THRESHOLD


@pytest.mark.parametrize("number", ENTRIES)
@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_the_chosen_blocks_hold_the_mass_that_was_asked_for(threshold: float, number: int) -> None:
    query, key, _ = entry(number)
    tokens, scale = query.shape[2], query.shape[3] ** -0.5
    geometry = {"block_size": BLOCK, "causal": False}
    scores = backend.antidiagonal_scores(query, key, stride=8, scale=scale, **geometry, kv_start=None, kv_lens=None)
    valid, forced = KeyMask().valid_and_forced_blocks(1, tokens, tokens, block_size=BLOCK, device=query.device)
    chosen = reference.select(scores, valid, forced, threshold=threshold)
    # the share of each query block's real attention that lies in each key block
    mass = torch.softmax(query @ key.transpose(-1, -2) * scale, dim=-1)
    mass = mass.unflatten(3, (-1, BLOCK)).sum(-1).unflatten(2, (-1, BLOCK)).mean(3)
    kept = float((mass * chosen).sum(-1).mean())
    # the scores estimate the mass: what the blocks really hold may fall a little short (by 0.026 at 0.5 in layer 3)
    assert kept > threshold - 0.03
    # nearer to the best blocks there are than to as many blocks by chance
    counts = chosen.sum(-1, keepdim=True)
    chance = float((counts / chosen.shape[-1]).mean())
    best = mass.sort(dim=-1, descending=True).values
    best = float((best * (torch.arange(best.shape[-1]) < counts)).sum(-1).mean())
    assert kept > (chance + best) / 2


@pytest.mark.parametrize("number", ENTRIES)
def test_a_higher_threshold_loses_less(number: int) -> None:
    results = [xattention(*entry(number), threshold=share, return_stats=True) for share in (0.5, 0.7, 0.9, 1.0)]
    losses = [error(output, number) for output, _ in results]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 2 * losses[2]
    assert losses[-1] < 1e-5
    densities = [stats.density for _, stats in results]
    assert densities == sorted(densities)
    assert densities[0] < 0.9 * densities[2]
    assert densities[-1] == 1.0


@pytest.mark.parametrize("number", ENTRIES)
def test_the_cpu_backends_scores_are_the_references(number: int) -> None:
    query, key, _ = entry(number)
    arguments = {
        "stride": 8, "block_size": BLOCK, "causal": False, "scale": query.shape[3] ** -0.5,
        "kv_start": None, "kv_lens": None,
    }  # fmt: skip
    expected = reference.antidiagonal_scores(query, key, **arguments)
    torch.testing.assert_close(backend.antidiagonal_scores(query, key, **arguments), expected, rtol=1e-3, atol=1e-5)
    # as the model gives them: bfloat16 inputs lose nothing more
    short = query.bfloat16(), key.bfloat16()
    torch.testing.assert_close(backend.antidiagonal_scores(*short, **arguments), expected, rtol=1e-3, atol=1e-5)
