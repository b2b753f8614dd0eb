"""Residual memory in pipelines: nearer to dense at the same density, and never of another video, branch or item."""

from __future__ import annotations

import copy
import functools
import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.utils import counters

from tests.tiny.common import quiet
from tests.tiny.hunyuan_families import HUNYUAN_FAMILIES, HUNYUAN_VIDEO
from tests.tiny.other_families import OTHER_FAMILIES
from tests.tiny.wan_family import T2V, T2V_A14B, TEXT_DIM, V2V, tiny_transformer
from xattn_video import XAttnProcessor
from xattn_video.integrations.diffusers import NothingSparse, attached_processor, layers
from xattn_video.integrations.diffusers.memory import LayerMemory
from xattn_video.ops import checked_call
from xattn_video.stats import ResidualUse

# after tests.tiny, which repairs a torchvision that does not fit this torch
from diffusers import FirstBlockCacheConfig, WanPipeline  # isort: skip

SETTINGS: dict[str, Any] = {"stride": 4, "block_size": 32, "min_tokens": 64, "threshold": 0.3, "warmup_steps": 2}
LAYERS = 2
STEPS = 10


@pytest.fixture(scope="module")
def shared_pipe() -> WanPipeline:
    return quiet(T2V.build(0))


@pytest.fixture
def pipe(shared_pipe: WanPipeline) -> Iterator[WanPipeline]:
    yield shared_pipe
    shared_pipe.set_attn_processor(None)


def attach(target: Any, **changes: Any) -> XAttnProcessor:
    processor = XAttnProcessor(**{**SETTINGS, "residual": "int4", **changes})
    target.set_attn_processor(processor)
    return processor


def call(pipe: Any, items: tuple[int, ...] = (0,), **overrides: Any) -> Tensor:
    return T2V.call(pipe, items, **{"num_inference_steps": STEPS, "guidance_scale": 1.0, **overrides})


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def step(model: Any, timestep: int, latents: Tensor, text: Tensor, name: str | None = None) -> Tensor:
    with torch.no_grad():
        if name is None:
            return model(latents, torch.tensor([timestep]), text).sample
        with model.cache_context(name):
            return model(latents, torch.tensor([timestep]), text).sample


def inputs(seed: int, shape: tuple[int, ...] = (1, 16, 5, 14, 18)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape[0], 6, TEXT_DIM, generator=generator)


# ---- what it gives


@pytest.mark.parametrize("changes", [{"refresh_every": 1}, {"threshold": 1.0}], ids=["every_step", "threshold_1"])
@pytest.mark.parametrize("residual", ["int4", "full"])
def test_a_refresh_in_each_step_or_a_threshold_of_one_is_dense(
    pipe: WanPipeline, residual: str, changes: dict[str, Any]
) -> None:
    dense = call(pipe)
    processor = attach(pipe, residual=residual, **changes)
    torch.testing.assert_close(call(pipe), dense, rtol=0, atol=2e-5)
    assert processor.stats.summary()["density"] == 1


def test_sparse_steps_come_nearer_to_dense(pipe: WanPipeline) -> None:
    dense = call(pipe)
    steps: dict[str, Any] = {"refresh": (0, 1, 2, 4)}
    processor = attach(pipe, **steps)
    with_residual = error(call(pipe), dense)
    density = processor.stats.summary()["density"]
    # more blocks than the refreshes cost
    plain = attach(pipe, residual="off", threshold=0.8)
    without = error(call(pipe), dense)
    assert plain.stats.summary()["density"] > density
    assert with_residual < 0.85 * without


def test_residuals_take_the_memory_that_their_kind_says(pipe: WanPipeline) -> None:
    sizes = {}
    for kind in ("int4", "fp8", "full"):
        processor = attach(pipe, residual=kind, refresh=(1,))
        call(pipe, num_inference_steps=4)
        sizes[kind] = processor.stats.summary()["residual_bytes"]
    # of each token and head: half a byte, one byte or four for each of 32 numbers, and a scale
    tokens = 2 * 315 * LAYERS
    assert sizes == {"int4": 20 * tokens, "fp8": 36 * tokens, "full": 128 * tokens}


def test_extrapolation_is_exact_where_the_residual_changes_evenly() -> None:
    """Queries and keys stay, values move along a line: so does what the kept blocks miss."""
    torch.manual_seed(0)
    model = tiny_transformer(num_layers=1)
    start, change = torch.randn(1, 315, 2, 32), 0.2 * torch.randn(1, 315, 2, 32)
    query, key = 2 * torch.randn(1, 315, 2, 32), 2 * torch.randn(1, 315, 2, 32)

    def errors(**changes: Any) -> list[float]:
        processor = attach(model, residual="full", refresh=(2,), warmup_steps=1, **changes)
        found = []
        processor.start_generation(steps=9)
        for number in range(8):
            processor.step(number)
            tensors = [query, key, start + number * change]
            whole = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors))
            with replaced_by(model.blocks[0], tensors) as outputs:
                step(model, 9, *inputs(0))
            found.append(error(outputs[0].transpose(1, 2), whole))
        return found

    # refreshes are steps 0 and 3: 4, 5 and 6 go on along the line, 7 would be farther than the last interval
    moved, still = errors(extrapolate=True), errors()
    assert max(moved[number] for number in (0, 3, 4, 5, 6)) < 1e-5
    assert moved[7] > 1e-3
    assert min(still[number] for number in (4, 5, 6)) > 1e-3


@contextmanager
def replaced_by(block: Any, tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Within it the block's self-attention gets these queries, keys and values; its outputs `[B, S, H, D]`."""
    wrapper, outputs = block.attn1.processor, []
    attend = wrapper.attend

    def with_tensors(*_: Tensor, **settings: Any) -> Tensor:
        outputs.append(attend(*tensors, **settings))
        return outputs[-1]

    wrapper.attend = with_tensors
    try:
        yield outputs
    finally:
        del wrapper.attend


# ---- whose it is


def test_two_runs_in_a_row_are_the_same_and_leave_nothing(pipe: WanPipeline) -> None:
    processor = attach(pipe, extrapolate=True)
    first = call(pipe)
    assert processor.stats.residual.held == 0
    assert torch.equal(call(pipe), first)
    assert processor.stats.residual.held == 0
    summary = processor.stats.summary()
    assert summary["residual_bytes"] > 0
    assert summary["dense_calls"]["refresh"] > 0
    assert summary["calls"] == 2 * STEPS * LAYERS


@pytest.mark.parametrize("last", [0, 1, 2, 5])
def test_a_run_after_an_interrupted_one_does_not_see_its_residual(pipe: WanPipeline, last: int) -> None:
    attach(pipe)
    whole = call(pipe)

    def stop(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        if step == last:
            raise KeyboardInterrupt
        return inputs

    with pytest.raises(KeyboardInterrupt):
        call(pipe, (1,), callback_on_step_end=stop)
    assert torch.equal(call(pipe), whole)


def test_a_run_that_failed_between_two_layers_leaves_nothing(pipe: WanPipeline) -> None:
    attach(pipe)
    whole = call(pipe)
    calls = 0

    def fail(module: Any, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise MemoryError

    handle = pipe.transformer.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        call(pipe, (1,))
    handle.remove()
    assert torch.equal(call(pipe), whole)


def test_another_size_or_batch_has_its_own_residual(pipe: WanPipeline) -> None:
    attach(pipe)
    whole, two = call(pipe), call(pipe, (0, 1))
    assert call(pipe, height=96, width=128).shape != whole.shape
    assert torch.equal(call(pipe), whole)
    for item, alone in enumerate((whole, call(pipe, (1,)))):
        # in another batch size products round otherwise, which may change a block or a rounded residual
        assert error(two[item : item + 1], alone) < 1e-3


def test_a_size_that_changes_within_a_video_refreshes(pipe: WanPipeline) -> None:
    processor = attach(pipe.transformer, warmup_steps=1, refresh=(9,))
    processor.start_generation()
    dense_calls = []
    for number, frames in enumerate((5, 5, 3, 3, 5)):
        processor.step(number)
        step(pipe.transformer, 9, *inputs(0, (1, 16, frames, 14, 18)))
        dense_calls.append(processor.stats.summary()["dense_calls"]["refresh"] // LAYERS)
    assert dense_calls == [1, 1, 2, 2, 3]


def test_the_forwards_of_guidance_have_their_own_residuals(pipe: WanPipeline) -> None:
    """As two named forwards, as two unnamed ones, and as one batch: what each of them gives alone."""
    model = pipe.transformer
    sides = [inputs(0), inputs(1)]

    def run(forwards: list[tuple[Tensor, Tensor, str | None]]) -> list[list[Tensor]]:
        processor = attach(model, warmup_steps=1, refresh=(1,))
        processor.start_generation(steps=5)
        outputs = []
        for index in range(5):
            processor.step(index)
            # both latents change from step to step, and differently
            outputs.append([step(model, 9 - index, x + 0.1 * index * x.flip(2), y, n) for x, y, n in forwards])
        assert processor.stats.residual.held == 0
        return outputs

    alone = [[one[0] for one in run([(*side, None)])] for side in sides]
    for names in (("cond", "uncond"), (None, None), ("same", "same")):
        both = run([(*side, name) for side, name in zip(sides, names, strict=True)])
        for index, (cond, uncond) in enumerate(both):
            assert torch.equal(cond, alone[0][index])
            assert torch.equal(uncond, alone[1][index])
    batch = run([(torch.cat([sides[0][0], sides[1][0]]), torch.cat([sides[0][1], sides[1][1]]), None)])
    for index, (both_items,) in enumerate(batch):
        assert error(both_items, torch.cat([alone[0][index], alone[1][index]])) < 1e-3


def test_guidance_in_a_pipeline(pipe: WanPipeline) -> None:
    dense = call(pipe, guidance_scale=4.0)
    processor = attach(pipe)
    got = call(pipe, guidance_scale=4.0)
    assert error(got, dense) < 0.02
    summary = processor.stats.summary()
    assert summary["calls"] == 2 * STEPS * LAYERS
    assert summary["residual_bytes"] == 2 * 20 * 2 * 315 * LAYERS
    assert processor.stats.residual.held == 0


def test_a_deep_copy_remembers_nothing_of_its_original() -> None:
    torch.manual_seed(0)
    model = tiny_transformer()
    processor = attach(model, warmup_steps=1)
    latents, text = inputs(0)
    step(model, 9, latents, text)
    step(model, 8, latents, text)
    held = processor.stats.residual.held
    assert held > 0
    copied = copy.deepcopy(model)
    own = attached_processor(copied)
    assert own is not None
    assert own.stats.residual.held == 0
    # its next forward has nothing to add and refreshes
    before = own.stats.summary()["dense_calls"].get("refresh", 0)
    step(copied, 7, latents, text)
    assert own.stats.summary()["dense_calls"]["refresh"] == before + LAYERS
    assert processor.stats.residual.held == held
    model.set_attn_processor(None)
    assert processor.stats.residual.held == 0


def remembering_loop(model: Any, processor: XAttnProcessor, steps: range) -> None:
    processor.start_generation(steps=20)
    for index in steps:
        processor.step(index)
        step(model, 9, *inputs(index))


def test_a_new_video_frees_what_an_interrupted_one_left_with_its_first_forward() -> None:
    model = tiny_transformer()
    processor = attach(model, warmup_steps=3)
    remembering_loop(model, processor, range(5))
    assert processor.stats.residual.held > 0
    remembering_loop(model, processor, range(1))
    assert processor.stats.residual.held == 0


def test_a_transformer_that_an_interrupted_video_used_is_freed_too() -> None:
    pipe = quiet(T2V_A14B.build(0, boundary_ratio=0.85))
    processor = attach(pipe)
    held = []

    def look(pipe: Any, index: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        held.append(processor.stats.residual.held)
        if stop and index == STEPS - 2:
            raise KeyboardInterrupt
        return inputs

    stop = True
    with pytest.raises(KeyboardInterrupt):
        T2V_A14B.call(pipe, num_inference_steps=STEPS, callback_on_step_end=look)
    assert held[-1] > 0
    held.clear()
    stop = False
    T2V_A14B.call(pipe, num_inference_steps=STEPS, callback_on_step_end=look)
    # the first of two steps of warm-up is dense, and nothing of the other video is left
    assert held[0] == 0


def test_a_dropped_model_holds_nothing() -> None:
    model = tiny_transformer()
    processor = attach(model, warmup_steps=1)
    remembering_loop(model, processor, range(3))
    assert processor.stats.residual.held > 0
    del model
    gc.collect()
    assert processor.stats.residual.held == 0


def test_steps_that_skip_the_whole_model_do_not_make_it_forget() -> None:
    model = tiny_transformer()
    processor = attach(model, warmup_steps=1, refresh=(1, 9))
    remembering_loop(model, processor, range(0, 20, 3))
    by_step = processor.stats.summary()["density_by_step"]
    # the refreshes of steps 2 and 10 are put off to the next forward
    assert [number for number in by_step if by_step[number] == 1] == [0, 3, 12]


def test_a_video_that_ended_in_its_first_step_leaves_nothing_to_the_next() -> None:
    model = tiny_transformer()
    outputs = []
    for earlier in (1, 2):
        processor = attach(model, warmup_steps=1, refresh=(9,))
        for seeds in ((earlier,), (3, 4)):
            processor.start_generation(steps=10)
            for index, seed in enumerate(seeds):
                processor.step(index)
                output = step(model, 9, *inputs(seed))
        outputs.append(output)
    assert torch.equal(*outputs)


def test_a_loop_that_stands_in_one_step_does_not_take_more_and_more_memory() -> None:
    model = tiny_transformer()
    processor = attach(model, warmup_steps=1)
    for item in range(20):
        step(model, 9, *inputs(item))
    summary = processor.stats.summary()
    assert summary["residual_bytes"] == 6 * 20 * 2 * 315 * LAYERS
    # none of them sees what another one missed
    assert summary["dense_calls"] == {"refresh": 20 * LAYERS}


def test_what_runs_between_two_steps_leaves_nothing_to_the_video(pipe: WanPipeline) -> None:
    """A preview, and a run of another pipeline that fails: two of them, whose residuals differ."""
    attach(pipe, warmup_steps=1, refresh=(15,))
    other = quiet(WanPipeline(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}))
    other.set_attn_processor(attached_processor(pipe.transformer))

    def preview(item: int) -> None:
        step(pipe.transformer, 500, *inputs(item), name="cond")

    def failing_run(item: int) -> None:
        def fail(*_: Any) -> dict[str, Any]:
            raise MemoryError

        with pytest.raises(MemoryError):
            call(other, (item,), callback_on_step_end=fail)

    for between in (preview, failing_run):

        def show(pipe: Any, index: int, timestep: Any, inputs: dict[str, Any], item: int, between: Any) -> Any:
            if index == 4:
                between(item)
            return inputs

        one, two = (
            call(pipe, callback_on_step_end=functools.partial(show, item=item, between=between)) for item in (1, 2)
        )
        assert torch.equal(one, two)


def test_a_loop_of_its_own_after_a_run_has_its_own_number_of_steps(pipe: WanPipeline) -> None:
    processor = attach(pipe, last_steps=1)
    call(pipe, num_inference_steps=4)
    processor.stats.reset()
    latents, text = inputs(0)
    pipe.scheduler.set_timesteps(8)
    for timestep in pipe.scheduler.timesteps:
        velocity = step(pipe.transformer, timestep, latents, text)
        latents = pipe.scheduler.step(velocity, timestep, latents).prev_sample
    assert processor.stats.summary()["dense_calls"]["last_steps"] == LAYERS
    assert processor.stats.residual.held == 0


def test_room_on_a_gpu_counts_earlier_residuals_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 100 MiB, whose run needs 60 MiB beside its residuals of 20 MiB."""
    mib, device = 1 << 20, torch.device("cuda", 0)
    peak = 60 * mib
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100 * mib, 100 * mib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peak)
    use, layer = ResidualUse(), LayerMemory(0, ResidualUse())
    for video in range(4):
        assert use.take(layer, 20 * mib, device, None)
        peak = 80 * mib
        assert not use.take(layer, 20 * mib, device, None)
        use.give(layer)
        use.reset()
        if video == 1:
            # someone starts torch's peak over
            peak = 60 * mib


# ---- with everything else


def test_two_transformers_share_the_schedule_and_free_each_other() -> None:
    pipe = quiet(T2V_A14B.build(0, boundary_ratio=0.85))
    inputs: dict[str, Any] = {"num_inference_steps": STEPS}
    dense = T2V_A14B.call(pipe, **inputs)
    processor = attach(pipe)
    got = T2V_A14B.call(pipe, **inputs)
    summary = processor.stats.summary()
    layers = summary["density_by_layer_and_step"]
    first, second = (set(layers[f"{name}.blocks.0.attn1"]) for name in ("transformer", "transformer_2"))
    assert first | second == set(range(STEPS))
    assert len(first) > 3
    assert len(second) > 3
    # the second one has no residual when it takes over, and refreshes first
    assert layers["transformer_2.blocks.0.attn1"][min(second)] == 1
    assert min(layers["transformer_2.blocks.0.attn1"].values()) < 1
    assert error(got, dense) < 0.05
    # in the step in which the second one takes over, the first one's residuals are free already
    assert summary["residual_bytes"] == 2 * 20 * 2 * 315 * LAYERS
    assert processor.stats.residual.held == 0
    assert torch.equal(T2V_A14B.call(pipe, **inputs), got)


def test_text_in_a_joint_sequence_stays_exact() -> None:
    pipe = quiet(HUNYUAN_VIDEO.build(0))
    inputs: dict[str, Any] = {"num_inference_steps": STEPS}
    dense = HUNYUAN_VIDEO.call(pipe, (0, 1), **inputs)
    errors = {}
    for name, changes in {"plain": {"residual": "off"}, "residual": {}, "each": {"refresh_every": 1}}.items():
        attach(pipe, **changes)
        errors[name] = error(HUNYUAN_VIDEO.call(pipe, (0, 1), **inputs), dense)
    assert errors["each"] < 1e-5
    assert errors["residual"] < 0.7 * errors["plain"]


def test_video_to_video_counts_its_own_steps() -> None:
    pipe = quiet(V2V.build(0))
    processor = attach(pipe, warmup=0.25, warmup_steps=7, last_steps=1)
    V2V.call(pipe, num_inference_steps=16, strength=0.5, guidance_scale=1.0)
    # 8 steps are run: a quarter of them are the warm-up, whose last one is a refresh
    assert processor.stats.summary()["dense_calls"]["warmup"] == LAYERS
    assert processor.stats.summary()["dense_calls"]["last_steps"] == LAYERS
    assert processor.stats.residual.held == 0


def test_a_step_cache_that_skips_a_refresh_only_puts_it_off() -> None:
    pipe = quiet(T2V.build(0))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.16))

    def run(**changes: Any) -> dict[int, float]:
        processor = attach(pipe, warmup_steps=1, **changes)
        call(pipe)
        layers = processor.stats.summary()["density_by_layer_and_step"]
        by_step: dict[int, float] = layers["transformer.blocks.1.attn1"]
        return by_step

    try:
        done = run(residual="off")
        skipped = [number for number in range(1, max(done)) if number not in done]
        assert skipped, "the cache skipped nothing: the test shows nothing"
        # the only refresh after the warm-up is in a step that the second block is skipped in
        by_step = run(refresh=(skipped[0] - 1,))
    finally:
        pipe.transformer.disable_cache()
    assert skipped[0] not in by_step
    later = [number for number in sorted(by_step) if number > skipped[0]]
    assert by_step[later[0]] == 1
    assert all(by_step[number] < 1 for number in later[1:])


def test_a_compiled_block_makes_no_graph_for_a_step() -> None:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = tiny_transformer(num_layers=6)
    settings = {"warmup_steps": 3, "extrapolate": True, "refresh": (1, 3)}
    latents, text = inputs(0)

    def run() -> list[Tensor]:
        return [step(model, 9 - index, latents * (1 + 0.1 * index), text) for index in range(8)]

    processor = attach(model, **settings)
    eager = run()
    expected = processor.stats.summary()
    processor = attach(model, **settings)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    try:
        compiled = run()
        # dense steps and steps with a memory
        assert counters["stats"]["unique_graphs"] == 2
        run()
        assert counters["stats"]["unique_graphs"] == 2
    finally:
        torch._dynamo.reset()
    for got, want in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert processor.stats.summary()["density_by_step"] == expected["density_by_step"]


def test_a_compiled_block_keeps_text_exact_in_its_first_forward() -> None:
    torch._dynamo.reset()
    pipe = quiet(HUNYUAN_VIDEO.build(0))
    blocks = (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks)
    densities = []
    try:
        for compiled in (False, True):
            processor = attach(pipe, warmup_steps=1, refresh=(9,))
            if compiled:
                for block in blocks:
                    block.compile(backend="eager")
            HUNYUAN_VIDEO.call(pipe, num_inference_steps=2)
            densities.append(processor.stats.summary()["density_by_layer_and_step"])
    finally:
        torch._dynamo.reset()
    assert densities[0] == densities[1]


def test_no_cuda_graph_captures_what_a_layer_remembers() -> None:
    assert torch.Tag.cudagraph_unsafe in torch.ops.xattn_video.attend_remembering.default.tags


def test_residuals_that_do_not_fit_are_left_out_and_counted(pipe: WanPipeline) -> None:
    # 256 bytes for each of 315 tokens, and of 2,200
    processor = attach(pipe, residual="full", residual_mib=1)
    call(pipe)
    assert processor.stats.summary()["calls_without_residual"] == 0
    large = {"height": 320, "width": 352}
    call(pipe, **large)
    summary = processor.stats.summary()
    assert summary["residual_bytes"] <= 1 << 20
    # one layer of the two has its residual, the other one is sparse without
    assert 0 < summary["calls_without_residual"] <= STEPS
    assert processor.stats.residual.held == 0


def test_a_layer_without_room_for_its_residual_keeps_what_a_plain_one_keeps(
    pipe: WanPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    """A threshold for residuals would leave nearly everything out."""
    # 256 bytes for each of 4,400 tokens: more than a MiB
    size = {"height": 640, "width": 352, "num_inference_steps": 4}
    processor = attach(pipe, residual="full", residual_mib=1, threshold=0.01, warmup_steps=1)
    video = call(pipe, **size)
    assert processor.stats.summary()["residual_bytes"] == 0
    told = [record.message for record in caplog.records if "no room for the residual" in record.message]
    assert len(told) == 1
    densities = processor.stats.summary()["density_by_step"]
    plain = attach(pipe, residual="off", threshold=0.9, anchors=1, warmup_steps=1)
    torch.testing.assert_close(video, call(pipe, **size), atol=1e-3, rtol=0)
    assert densities == pytest.approx(plain.stats.summary()["density_by_step"], abs=0.01)


# ---- masks that are kept, anchors, and thresholds that fall


def test_kept_masks_are_chosen_in_every_nth_sparse_step(pipe: WanPipeline) -> None:
    processor = attach(pipe, residual="off", keep_masks=3, warmup_steps=1)
    kept = call(pipe)
    by_step = processor.stats.summary()["density_by_step"]
    sparse = [by_step[number] for number in range(1, STEPS)]
    for first in (0, 3, 6):
        assert len(set(sparse[first : first + 3])) == 1
    assert len(set(sparse)) > 1
    attach(pipe, residual="off", keep_masks=1, warmup_steps=1)
    assert not torch.equal(call(pipe), kept)
    # the same blocks give the same bits
    attach(pipe, residual="off", keep_masks=2, warmup_steps=STEPS - 1)
    one = call(pipe)
    attach(pipe, residual="off", warmup_steps=STEPS - 1)
    assert torch.equal(call(pipe), one)


def test_the_threshold_falls_over_the_sparse_steps(pipe: WanPipeline) -> None:
    flat = attach(pipe, residual="off", threshold=0.6)
    call(pipe)
    ramp = attach(pipe, residual="off", threshold=0.6, threshold_ramp=0.6)
    call(pipe)
    flat_steps, steps = (processor.stats.summary()["density_by_step"] for processor in (flat, ramp))
    assert steps[2] > flat_steps[2] + 0.05
    assert steps[STEPS - 1] < flat_steps[STEPS - 1] - 0.05


@pytest.mark.parametrize("given", [{}, {"anchors": 1}], ids=["by default", "asked for"])
def test_anchors_keep_neighbours_in_the_sequence_and_in_the_video(pipe: WanPipeline, given: dict[str, int]) -> None:
    """5 frames of 63 tokens in blocks of 32: a frame is about two blocks."""
    blocks = 10

    def near(row: int, column: int) -> bool:
        begin, end = 32 * row, 32 * row + 32
        moved = [(begin - 32, end + 32), (begin - 63, end - 63), (begin + 63, end + 63)]
        return any(32 * column < stop and 32 * column + 32 > start for start, stop in moved)

    wanted = sum(near(row, column) for row in range(blocks) for column in range(blocks))
    processor = attach(pipe, residual="off", threshold=0.001, **given)
    call(pipe)
    kept = processor.stats.summary()["sparse_density"] * blocks**2
    # a row whose best block is none of them would keep that too: the share of the others holds more than 0.001
    assert kept == pytest.approx(wanted)


# tokens of a latent frame; FramePack's history frames are larger and smaller ones
FRAMES = {"wan2.1-t2v": 63, "hunyuan-video": 80, "kandinsky-5": 80, "ltx": 130, "cosmos": 130, "framepack": None}


@pytest.mark.parametrize("name", FRAMES)
def test_anchors_know_the_frames_of_a_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = next(family for family in (T2V, *HUNYUAN_FAMILIES, *OTHER_FAMILIES) if family.name == name)
    seen = set()

    def spy(*args: Any, **settings: Any) -> Any:
        seen.add(settings["frame_tokens"])
        return checked_call(*args, **settings)

    monkeypatch.setattr(layers, "checked_call", spy)
    pipe = quiet(family.build(0))
    attach(pipe, residual="off", anchors=1, warmup_steps=0)
    family.call(pipe)
    assert seen == {FRAMES[name]}


def test_a_video_without_sparse_steps_refreshes_nothing(pipe: WanPipeline) -> None:
    processor = attach(pipe, warmup_steps=2, last_steps=2)
    call(pipe, num_inference_steps=4)
    summary = processor.stats.summary()
    assert summary["dense_calls"] == {"warmup": 2 * LAYERS, "last_steps": 2 * LAYERS}
    assert summary["residual_bytes"] == 0


def test_a_warm_up_of_most_steps_is_warned_of_once(pipe: WanPipeline, caplog: pytest.LogCaptureFixture) -> None:
    attach(pipe, residual="off", warmup_steps=5)
    for _ in range(2):
        call(pipe, num_inference_steps=8)
    messages = [record.getMessage() for record in caplog.records if "steps are dense" in record.getMessage()]
    assert len(messages) == 1
    assert "5 of 8 steps are dense" in messages[0]
    caplog.clear()
    attach(pipe, residual="off", warmup_steps=5, warmup=0.25)
    call(pipe, num_inference_steps=4)
    assert not [record for record in caplog.records if "steps are dense" in record.getMessage()]


def test_a_warm_up_of_all_steps_is_warned_of_in_each_generation(pipe: WanPipeline) -> None:
    attach(pipe, residual="off", warmup_steps=5)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", NothingSparse)
        for _ in range(2):
            call(pipe, num_inference_steps=4)
    found = [warning for warning in seen if warning.category is NothingSparse]
    said = [str(warning.message) for warning in found]
    assert len(said) == 2
    # each points to the line that calls the pipeline
    assert {Path(one.filename).name for one in found} == {"common.py"}
    assert all("4 of 4 steps are dense" in text and "warmup=0.25" in text for text in said)
