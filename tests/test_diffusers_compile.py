"""Sparse attention inside of torch.compile: as many graphs as dense and sparse calls need, and the same results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.utils import counters

from tests.tiny.wan_family import TEXT_DIM, tiny_transformer
from xattn_video import XAttnProcessor

# after tests.tiny, which repairs a torchvision that does not fit this torch
from diffusers import HunyuanVideoTransformer3DModel  # isort: skip

SETTINGS: dict[str, Any] = {"stride": 4, "block_size": 32, "min_tokens": 64, "warmup_steps": 3}
STEPS = 5


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def latents() -> Tensor:
    return torch.randn(1, 16, 5, 14, 18, generator=torch.Generator().manual_seed(0))


def call_wan(model: Any, timestep: int) -> Tensor:
    text = torch.randn(1, 6, TEXT_DIM, generator=torch.Generator().manual_seed(1))
    return model(latents(), torch.tensor([timestep]), text).sample


def call_hunyuan(model: Any, timestep: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    text, pooled = torch.randn(1, 12, 16, generator=generator), torch.randn(1, 8, generator=generator)
    mask = (torch.arange(12)[None] < 7).long()
    return model(latents(), torch.tensor([timestep]), text, mask, pooled).sample


def all_steps(model: Any, call: Callable[[Any, int], Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [call(model, 1000 - step) for step in range(STEPS)]


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("threshold", [0.5, (0.4, 0.8)], ids=["one", "by_head"])
def test_twelve_blocks_make_two_graphs(threshold: Any) -> None:
    torch.manual_seed(0)
    model = tiny_transformer(num_layers=12)
    processor = XAttnProcessor(threshold=threshold, **SETTINGS)
    model.set_attn_processor(processor)
    eager = all_steps(model, call_wan)
    expected = processor.stats.summary()
    assert expected["sparse_calls"] == 12 * (STEPS - 3)
    assert expected["sparse_density"] < 1

    processor.stats.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    compiled = all_steps(model, call_wan)
    assert graphs() == 2
    for got, want in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert processor.stats.summary() == expected
    # another run compiles nothing new
    all_steps(model, call_wan)
    assert graphs() == 2


def test_a_whole_model_compiles() -> None:
    torch.manual_seed(0)
    model = tiny_transformer()
    processor = XAttnProcessor(threshold=0.5, **SETTINGS)
    model.set_attn_processor(processor)
    eager = all_steps(model, call_wan)
    expected = processor.stats.summary()
    processor.stats.reset()
    compiled = all_steps(torch.compile(model, backend="eager"), call_wan)
    assert graphs() == 2
    for got, want in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert processor.stats.summary() == expected


def test_a_compiled_model_can_be_attached_and_detached() -> None:
    torch.manual_seed(0)
    model = tiny_transformer()
    dense = all_steps(model, call_wan)
    compiled = torch.compile(model, backend="eager")
    processor = XAttnProcessor(threshold=0.5, **SETTINGS)
    compiled.set_attn_processor(processor)
    sparse = all_steps(compiled, call_wan)
    assert processor.stats.summary()["sparse_calls"] == 2 * (STEPS - 3)
    assert not torch.allclose(sparse[-1], dense[-1], atol=1e-3)
    compiled.set_attn_processor(None)
    torch.testing.assert_close(all_steps(compiled, call_wan)[-1], dense[-1], rtol=0, atol=1e-5)


def test_joint_blocks_compile_with_their_text_mask() -> None:
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(8, 12, 12),
        guidance_embeds=False,
    ).eval()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    stock = all_steps(model, call_hunyuan)
    own = graphs()

    torch._dynamo.reset()
    counters.clear()
    processor = XAttnProcessor(threshold=1.0, **SETTINGS)
    model.set_attn_processor(processor)
    for got, want in zip(all_steps(model, call_hunyuan), stock, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert processor.stats.summary()["sparse_calls"] == 3 * (STEPS - 3)
    # each of diffusers' own graphs once dense and once sparse
    assert own < graphs() <= 2 * own
