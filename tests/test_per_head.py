"""`per_head`: thresholds for each layer and head, found in the last dense step of a video."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.tiny.common import quiet
from tests.tiny.wan_family import T2V, T2V_A14B, tiny_transformer
from xattn_video import XAttnConfig, XAttnProcessor
from xattn_video.ops import spend

# after tests.tiny, which repairs a torchvision that does not fit this torch
from diffusers import WanPipeline  # isort: skip

SETTINGS: dict[str, Any] = {"stride": 4, "block_size": 32, "min_tokens": 64, "threshold": 0.6, "warmup_steps": 2}
STEPS = 6
FIRST = "transformer.blocks.0.attn1"


def uneven(pipe: Any) -> Any:
    """One head of the first layer weighs far more in the output than all others."""
    with torch.no_grad():
        pipe.transformer.blocks[0].attn1.to_v.weight[:32] *= 8
    return quiet(pipe)


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    return uneven(T2V.build(0))


def attach(target: Any, **changes: Any) -> XAttnProcessor:
    processor = XAttnProcessor(**{**SETTINGS, **changes})
    target.set_attn_processor(processor)
    return processor


def call(pipe: Any, items: tuple[int, ...] = (0,), **overrides: Any) -> Tensor:
    return T2V.call(pipe, items, **{"num_inference_steps": STEPS, "guidance_scale": 1.0, **overrides})


def test_heads_that_weigh_more_keep_more_at_the_same_density(pipe: WanPipeline) -> None:
    pipe.set_attn_processor(None)
    dense = call(pipe)
    found = {}
    for per_head in (False, True):
        processor = attach(pipe, per_head=per_head)
        found[per_head] = (call(pipe) - dense).norm(), processor.stats.summary()
    (plain_error, plain), (error, summary) = found[False], found[True]
    assert error < 0.9 * plain_error
    assert summary["sparse_density"] == pytest.approx(plain["sparse_density"], abs=0.03)
    assert summary["density_by_layer"][FIRST] > plain["density_by_layer"][FIRST] + 0.03
    # the step that measures is one of the warm-up
    assert summary["dense_calls"] == plain["dense_calls"] == {"warmup": 4}


@pytest.mark.parametrize(
    "given",
    [{"threshold_ramp": 0.4}, {"keep_masks": 2}, {"max_extra_mib": 1}],
    ids=["ramp", "kept masks", "chunks"],
)
def test_it_goes_with_the_settings_beside_it(pipe: WanPipeline, given: dict[str, Any]) -> None:
    plain = attach(pipe, **given)
    without = call(pipe)
    processor = attach(pipe, per_head=True, **given)
    assert not torch.equal(call(pipe), without)
    steps, usual = (one.stats.summary()["density_by_step"] for one in (processor, plain))
    assert steps[1] == usual[1] == 1
    assert steps[STEPS - 1] == pytest.approx(usual[STEPS - 1], abs=0.05)


def test_each_video_is_measured_for_itself(pipe: WanPipeline) -> None:
    processor = attach(pipe, per_head=True)
    first, second = call(pipe), call(pipe, (1,))
    processor = attach(pipe, per_head=True)
    assert torch.equal(call(pipe, (1,)), second)
    assert torch.equal(call(pipe), first)
    # what `forget` frees are blocks and residuals

    def forget(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        processor.forget()
        return {}

    assert torch.equal(call(pipe, callback_on_step_end=forget), first)
    assert processor.stats.times.medians().keys() <= {"dense", "sparse"}
    # both forwards of guidance have a say
    attach(pipe, per_head=True)
    guided = call(pipe, guidance_scale=4.0)
    assert guided.isfinite().all()
    processor = attach(pipe, per_head=True)
    call(pipe, guidance_scale=4.0)
    assert processor.stats.summary()["dense_calls"] == {"warmup": 8}


def test_a_copy_of_a_pipeline_in_the_middle_of_a_video_measures_its_own(pipe: WanPipeline) -> None:
    attach(pipe, per_head=True)
    copies = []

    def copied(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == STEPS // 2:
            copies.append(copy.deepcopy(pipe))
        return {}

    video = call(pipe, callback_on_step_end=copied)
    assert torch.equal(call(copies[0]), video)


def test_a_transformer_without_dense_steps_keeps_the_one_threshold() -> None:
    pipe = uneven(T2V_A14B.build(0))
    densities = []
    for per_head in (False, True):
        processor = attach(pipe, per_head=per_head, warmup_steps=1)
        T2V_A14B.call(pipe)
        densities.append(processor.stats.summary()["density_by_layer"])
    assert densities[1][FIRST] > densities[0][FIRST] + 0.03
    later = [layer for layer in densities[0] if layer.startswith("transformer_2.")]
    assert len(later) == 2
    for layer in later:
        assert densities[1][layer] == pytest.approx(densities[0][layer], abs=0.02)


def test_a_compiled_block_measures_too_and_makes_no_graph_for_it() -> None:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = tiny_transformer(num_layers=3)
    latents, text = torch.randn(1, 16, 5, 14, 18), torch.randn(1, 7, model.config.text_dim)

    def run() -> list[Tensor]:
        processor.start_generation()
        found = []
        for index in range(4):
            processor.step(index)
            with torch.no_grad():
                found.append(model(latents * (1 + 0.1 * index), torch.tensor([900 - index]), text).sample)
        return found

    processor = attach(model, per_head=True)
    eager = run()
    processor = attach(model, per_head=True)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    try:
        compiled = run()
        # dense steps; the step that measures and all sparse ones
        assert counters["stats"]["unique_graphs"] == 2
    finally:
        torch._dynamo.reset()
    for got, want in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_the_budget_is_kept_and_spent_where_errors_are_large() -> None:
    density = torch.tensor([[0.2, 0.5, 0.9]] * 3, dtype=torch.float64)
    error = torch.tensor([[0.9, 0.5, 0.0], [0.01, 0.005, 0.0], [0.01, 0.005, 0.0]], dtype=torch.float64)
    taken = spend(density, error, 0.5)
    assert taken.tolist() == [2, 0, 0]
    # What gives NaN at some threshold takes another one.
    error[1, 0] = torch.nan
    assert spend(density, error, 0.54).tolist() == [2, 1, 0]
    assert spend(density, torch.zeros_like(error), 0.5).tolist() == [0, 0, 0]


@pytest.mark.parametrize("threshold", [1e-4, 0.9999])
def test_a_threshold_near_its_limits_is_shared_out_too(pipe: WanPipeline, threshold: float) -> None:
    processor = attach(pipe, per_head=True, threshold=threshold)
    assert call(pipe).isfinite().all()
    assert 0 < processor.stats.summary()["sparse_density"] <= 1


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"per_head": 1}, "per_head must be True or False, got 1"),
        ({"per_head": True, "warmup_steps": 0}, "per_head needs a dense step to measure in, got warmup_steps 0"),
        ({"per_head": True, "residual": "int4"}, "per_head goes without a residual, got residual 'int4'"),
        ({"per_head": True, "threshold": (0.5, 0.6)}, "per_head goes with one threshold below 1"),
        ({"per_head": True, "threshold": 1.0}, "per_head goes with one threshold below 1"),
        ({"per_head": True, "selection": "top_k", "top_k": 3}, "per_head goes with one threshold .* selection 'top_k'"),
    ],
)
def test_settings_that_it_cannot_go_with_are_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        XAttnConfig(**given)
