"""A sparse call that gives NaN or inf: its forward is done again densely, counted, warned of once, and forgotten."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny.common import quiet
from tests.tiny.wan_family import T2V, TEXT_DIM, tiny_transformer
from xattn_video import XAttnProcessor
from xattn_video.ops import Call

# after tests.tiny, which repairs a torchvision that does not fit this torch
from diffusers import FirstBlockCacheConfig  # isort: skip

SETTINGS: dict[str, Any] = {"stride": 4, "block_size": 32, "min_tokens": 64, "threshold": 0.5, "warmup_steps": 2}
LAYERS = 2


class Spoiler:
    """Puts a value into the values of the sparse calls of some layers, as a defect of a kernel would into its output.

    Attributes:
        value: what is put there; None leaves the calls as they are.
        spoiled: how many calls it was put into.
    """

    def __init__(self, layers: str = "") -> None:
        self.layers = layers
        self.value: float | None = None
        self.spoiled = 0

    def __call__(self, layer: str, call: Call) -> None:
        if self.value is not None and self.layers in layer:
            # of one head: a single token may be in no block that is kept
            call.value[:, 0] = self.value
            self.spoiled += 1


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return tiny_transformer()


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 16, 5, 14, 18, generator=generator), torch.randn(1, 20, TEXT_DIM, generator=generator)


def forward(model: Any, step: int, latents: Tensor | None = None) -> Tensor:
    own, text = inputs()
    with torch.no_grad():
        return model(own if latents is None else latents, torch.tensor([900.0 - step]), text).sample


def warnings_of(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if "NaN or inf" in record.getMessage()]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_step_is_done_again_with_dense_attention(model, caplog, value):
    dense = [forward(model, step) for step in range(6)]
    spoil = Spoiler("blocks.0.")
    processor = XAttnProcessor(**SETTINGS, on_call=spoil)
    model.set_attn_processor(processor)
    processor.start_generation(steps=6)
    got = []
    for step in range(6):
        processor.step(step)
        spoil.value = value if step in (3, 5) else None
        got.append(forward(model, step))
    assert spoil.spoiled == 2
    assert [torch.equal(one, other) for one, other in zip(got, dense, strict=True)] == [
        True, True, False, True, False, True,
    ]  # fmt: skip
    summary = processor.stats.summary()
    # The sparse calls that were made in vain are counted too.
    assert summary["dense_calls"] == {"warmup": 2 * LAYERS, "not_finite": 2 * LAYERS}
    assert summary["sparse_calls"] == 4 * LAYERS
    assert warnings_of(caplog) == [
        "sparse attention of step 3 gave NaN or inf; such steps are done again with dense attention"
    ]


@pytest.mark.parametrize("settings", [{"residual": "int4"}, {"residual": "full", "extrapolate": True}])
def test_what_was_remembered_is_forgotten(model, settings):
    refreshes = {}
    for spoiled in (False, True):
        spoil = Spoiler("blocks.1.")
        processor = XAttnProcessor(**SETTINGS, **settings, refresh_every=6, on_call=spoil)
        model.set_attn_processor(processor)
        processor.start_generation(steps=10)
        each = []
        for step in range(6):
            processor.step(step)
            spoil.value = float("nan") if spoiled and step == 3 else None
            before = processor.stats.summary()["dense_calls"].get("refresh", 0)
            output = forward(model, step)
            assert output.isfinite().all()
            each.append(processor.stats.summary()["dense_calls"].get("refresh", 0) - before)
            assert (processor.stats.residual.held == 0) == (step == 0 or (spoiled and step == 3))
        refreshes[spoiled] = each
    assert refreshes[False][4] == 0
    assert refreshes[True][:4] == refreshes[False][:4]
    assert refreshes[True][4] == LAYERS


def test_masks_that_were_kept_are_chosen_again(model):
    spoil = Spoiler()
    processor = XAttnProcessor(**SETTINGS, keep_masks=8, on_call=spoil)
    model.set_attn_processor(processor)
    processor.start_generation(steps=10)
    for step in range(5):
        processor.step(step)
        spoil.value = float("nan") if step == 3 else None
        assert forward(model, step).isfinite().all()
    # A mask that is kept would have step 2 in its slot.
    (wrapper, *_) = [module.processor for name, module in model.named_modules() if name.endswith("attn1")]
    (slot,) = wrapper.memory._slots.values()
    assert slot.step == 4


def test_where_dense_attention_gives_nan_too_it_is_tried_once_a_video(model, caplog):
    spoilt = inputs()[0].index_fill(2, torch.tensor([1]), float("nan"))
    processor = XAttnProcessor(**SETTINGS)
    model.set_attn_processor(processor)
    for video, latents in enumerate((spoilt, None, spoilt)):
        processor.stats.reset()
        processor.start_generation(steps=5)
        for step in range(5):
            processor.step(step)
            assert bool(forward(model, step, latents).isfinite().all()) == (latents is None)
        again = {} if latents is None else {"not_finite": LAYERS}
        assert processor.stats.summary()["dense_calls"] == {"warmup": 2 * LAYERS, **again}, video
    assert warnings_of(caplog) == [
        "sparse attention of step 2 gave NaN or inf, and so does dense attention: the cause is elsewhere"
    ]


def test_videos_of_one_step_do_not_see_the_last_ones_nan(model):
    spoilt = inputs()[0].index_fill(2, torch.tensor([1]), float("nan"))
    processor = XAttnProcessor(**{**SETTINGS, "warmup_steps": 0})
    model.set_attn_processor(processor)
    for latents in (spoilt, None):
        processor.start_generation(steps=1)
        for branch in range(2):
            forward(model, branch, latents)
            processor.step(0)
    # The second forward of the first video is not looked at.
    assert processor.stats.summary()["dense_calls"] == {"not_finite": LAYERS}


class Reads(TorchDispatchMode):
    """Counts how often the host reads a number of a tensor, for which it would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", [2, 6])
def test_the_host_reads_one_number_a_sparse_forward(layers):
    torch.manual_seed(0)
    model = tiny_transformer(num_layers=layers)
    # the reference implementation reads nothing; the other one for CPUs has its own loops
    processor = XAttnProcessor(**{**SETTINGS, "backend": "reference"})
    model.set_attn_processor(processor)
    processor.start_generation(steps=4)
    counts = []
    for step in range(4):
        processor.step(step)
        with Reads() as reads:
            forward(model, step)
        counts.append(reads.count)
    model.set_attn_processor(None)
    with Reads() as reads:
        forward(model, 0)
    assert [count - reads.count for count in counts] == [0, 0, 1, 1]


@pytest.mark.parametrize("compiled", ["blocks", "whole"])
@pytest.mark.parametrize("residual", ["off", "int4"])
def test_compiled_models_are_watched_too(model, compiled, residual):
    torch._dynamo.reset()
    processor = XAttnProcessor(**SETTINGS, residual=residual)
    model.set_attn_processor(processor)
    processor.start_generation(steps=4)
    if compiled == "blocks":
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
    called = model if compiled == "blocks" else torch.compile(model, backend="eager")
    spoilt = inputs()[0].index_fill(2, torch.tensor([1]), float("nan"))
    for step in range(4):
        processor.step(step)
        assert bool(forward(called, step, None if step < 3 else spoilt).isfinite().all()) == (step < 3)
        assert processor.stats.summary()["dense_calls"].get("not_finite", 0) == (LAYERS if step == 3 else 0)
    torch._dynamo.reset()


def test_hooks_of_others_see_the_output_that_holds(model):
    seen: list[Tensor] = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.sample))
    spoil = Spoiler()
    processor = XAttnProcessor(**{**SETTINGS, "warmup_steps": 0}, on_call=spoil)
    model.set_attn_processor(processor)
    spoil.value = float("nan")
    output = forward(model, 0)
    assert len(seen) == 1
    assert seen[0] is output
    assert output.isfinite().all()


def test_a_cached_model_is_not_run_again(model, caplog):
    """The cache holds what the first run left: a second run would take it for a step of its own."""
    spoil = Spoiler()
    processor = XAttnProcessor(**{**SETTINGS, "warmup_steps": 0}, on_call=spoil)
    model.set_attn_processor(processor)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    spoil.value = float("nan")
    with model.cache_context("cond"):
        assert forward(model, 0).isnan().any()
    assert processor.stats.summary()["dense_calls"] == {}
    assert warnings_of(caplog) == [
        "sparse attention of step 0 gave NaN or inf; the cache of the model has it, so that it cannot be done again"
    ]


def test_a_forward_that_raises_ends_as_before(model):
    def fail(*_: Any) -> None:
        raise ValueError("of a module")

    spoil = Spoiler()
    processor = XAttnProcessor(**{**SETTINGS, "warmup_steps": 0}, on_call=spoil)
    model.set_attn_processor(processor)
    spoil.value = float("nan")
    handle = model.proj_out.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="of a module"):
        forward(model, 0)
    handle.remove()
    spoil.value = None
    assert forward(model, 0).isfinite().all()


@pytest.mark.parametrize("residual", ["off", "int4"])
def test_a_pipeline_with_guidance_goes_on(residual, caplog):
    pipe = quiet(T2V.build(0))
    spoil = Spoiler("blocks.0.")
    steps = 0

    def note(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        nonlocal steps
        steps = step + 1
        return {}

    def once(layer: str, call: Call) -> None:
        # the second of the two forwards of step 3
        spoil.value = float("nan") if steps == 3 and calls(layer) == 2 else None
        spoil(layer, call)

    made: dict[tuple[str, int], int] = {}

    def calls(layer: str) -> int:
        made[layer, steps] = made.get((layer, steps), 0) + 1
        return made[layer, steps]

    processor = XAttnProcessor(**SETTINGS, residual=residual, on_call=once)
    pipe.set_attn_processor(processor)
    frames = T2V.call(pipe, (0,), num_inference_steps=6, guidance_scale=5.0, callback_on_step_end=note)
    assert torch.as_tensor(frames).isfinite().all()
    assert spoil.spoiled == 1
    assert processor.stats.summary()["dense_calls"]["not_finite"] == LAYERS
    assert len(warnings_of(caplog)) == 1


@pytest.fixture(autouse=True)
def _listen(caplog: pytest.LogCaptureFixture) -> Callable[[], None] | None:
    caplog.set_level(logging.WARNING, "xattn_video")
    return None
