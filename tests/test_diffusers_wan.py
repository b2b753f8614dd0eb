"""What users do with a Wan pipeline, with sparse attention attached."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny.common import quiet
from tests.tiny.wan_family import T2V, T2V_5B, T2V_A14B, V2V, size
from xattn_video import XAttnProcessor
from xattn_video.integrations.diffusers import attached_processor

# after tests.tiny, which repairs a torchvision that does not fit this torch
import diffusers  # isort: skip
from diffusers import (  # isort: skip
    DiffusionPipeline,
    FirstBlockCacheConfig,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from diffusers.hooks import apply_group_offloading  # isort: skip

SETTINGS: dict[str, Any] = {"stride": 4, "block_size": 32, "min_tokens": 64, "threshold": 0.5}
LAYERS = 2


@pytest.fixture(scope="module")
def shared_pipe() -> WanPipeline:
    return quiet(T2V.build(0))


@pytest.fixture
def pipe(shared_pipe: WanPipeline) -> Iterator[WanPipeline]:
    yield shared_pipe
    shared_pipe.set_attn_processor(None)


def attach(pipe: DiffusionPipeline, **changes: Any) -> XAttnProcessor:
    processor = XAttnProcessor(**{**SETTINGS, "warmup_steps": 2, **changes})
    pipe.set_attn_processor(processor)
    return processor


def call(pipe: Any, **overrides: Any) -> Tensor:
    """Four steps without guidance: one forward each."""
    return T2V.call(pipe, **{"num_inference_steps": 4, "guidance_scale": 1.0, **overrides})


def steps_of(processor: XAttnProcessor) -> tuple[int, int]:
    """(dense, sparse) forwards so far, all dense ones in warm-up; and start counting again."""
    summary = processor.stats.summary()
    processor.stats.reset()
    assert set(summary["dense_calls"]) <= {"warmup"}
    return sum(summary["dense_calls"].values()) // LAYERS, summary["sparse_calls"] // LAYERS


def test_two_runs_in_a_row_are_the_same(pipe: WanPipeline) -> None:
    processor = attach(pipe)
    first = call(pipe)
    assert steps_of(processor) == (2, 2)
    assert torch.equal(call(pipe), first)
    assert steps_of(processor) == (2, 2)


@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_run_after_an_interrupted_one_warms_up(pipe: WanPipeline, last: int) -> None:
    processor = attach(pipe)
    whole = call(pipe)

    def stop(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        if step == last:
            raise KeyboardInterrupt
        return inputs

    with pytest.raises(KeyboardInterrupt):
        call(pipe, callback_on_step_end=stop)
    processor.stats.reset()
    assert torch.equal(call(pipe), whole)
    assert steps_of(processor) == (2, 2)


def test_a_run_that_fails_inside_the_model_leaves_nothing(pipe: WanPipeline) -> None:
    processor = attach(pipe)
    whole = call(pipe)
    failing = True

    def fail(module: Any, args: Any) -> None:
        if failing:
            raise MemoryError

    handle = pipe.transformer.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        call(pipe)
    handle.remove()
    processor.stats.reset()
    assert torch.equal(call(pipe), whole)
    assert steps_of(processor) == (2, 2)


def test_a_pipeline_interrupted_by_its_own_flag_warms_up_again(pipe: WanPipeline) -> None:
    processor = attach(pipe)

    def stop(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return inputs

    call(pipe, callback_on_step_end=stop)
    assert steps_of(processor) == (1, 0)
    call(pipe)
    assert steps_of(processor) == (2, 2)


def test_video_to_video_counts_from_the_first_step_it_runs() -> None:
    pipe = quiet(V2V.build(0))
    processor = attach(pipe)
    V2V.call(pipe, num_inference_steps=8, strength=0.5, guidance_scale=1.0)
    assert steps_of(processor) == (2, 2)


def test_steps_go_on_counting_in_the_second_transformer() -> None:
    pipe = quiet(T2V_A14B.build(0))
    processor = attach(pipe, warmup_steps=4)
    ran = []
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_hook(lambda *_, name=name: ran.append(name))
    call(pipe, num_inference_steps=8)
    first = ran.count("transformer")
    assert ran == ["transformer"] * first + ["transformer_2"] * (8 - first)
    # the second one takes over while the steps are still dense
    assert 0 < first < 4
    assert steps_of(processor) == (4, 4)


def test_timesteps_by_token_are_counted() -> None:
    pipe = quiet(T2V_5B.build(0))
    processor = attach(pipe)
    call(pipe, **size(2))
    assert steps_of(processor) == (2, 2)
    # and without the pipeline's own timestep
    pipe.set_attn_processor(None)
    processor = XAttnProcessor(**SETTINGS, warmup_steps=2)
    pipe.transformer.set_attn_processor(processor)
    call(pipe, **size(2))
    assert steps_of(processor) == (2, 2)


def test_a_pipeline_made_from_another_keeps_the_processor(pipe: WanPipeline) -> None:
    processor = attach(pipe)
    dense_and_sparse = call(pipe)
    other = quiet(WanVideoToVideoPipeline.from_pipe(pipe))
    assert attached_processor(other.transformer) is processor
    processor.stats.reset()
    V2V.call(other, num_inference_steps=8, strength=0.5, guidance_scale=4.0)
    assert steps_of(processor) == (4, 4)
    assert torch.equal(call(pipe), dense_and_sparse)
    # the second one may be given the same processor, or another
    other.set_attn_processor(processor)
    steps_of(processor)
    V2V.call(other, num_inference_steps=8, strength=0.5, guidance_scale=4.0)
    assert steps_of(processor) == (4, 4)
    replaced = attach(other)
    assert torch.equal(call(pipe), dense_and_sparse)
    assert steps_of(replaced) == (2, 2)


def test_a_copied_pipeline_counts_its_own_steps(pipe: WanPipeline) -> None:
    processor = attach(pipe)
    expected = call(pipe)
    copied = copy.deepcopy(pipe)
    own = attached_processor(copied.transformer)
    assert own is not None
    processor.stats.reset()
    own.stats.reset()
    assert torch.equal(call(copied), expected)
    assert steps_of(own) == (2, 2)
    assert steps_of(processor) == (0, 0)


def test_two_pipelines_in_two_threads(pipe: WanPipeline) -> None:
    others = [quiet(T2V.build(seed)) for seed in (1, 2)]
    processors = [attach(other) for other in others]
    alone = [call(other, guidance_scale=4.0) for other in others]
    for processor in processors:
        processor.stats.reset()

    def three_times(other: Any) -> list[Tensor]:
        return [call(other, guidance_scale=4.0) for _ in range(3)]

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(three_times, others))
    for expected, results in zip(alone, together, strict=True):
        assert all(torch.equal(result, expected) for result in results)
    assert [steps_of(processor) for processor in processors] == [(12, 12), (12, 12)]


def test_saving_writes_a_stock_pipeline(pipe: WanPipeline, tmp_path: Path) -> None:
    dense = call(pipe)
    attach(pipe)
    call(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = quiet(WanPipeline.from_pretrained(tmp_path / "pipe", text_encoder=None, tokenizer=None))
    assert attached_processor(loaded.transformer) is None
    assert loaded.transformer.state_dict().keys() == pipe.transformer.state_dict().keys()
    # mapped from a file, weights lie at other addresses, where a CPU may add in another order
    torch.testing.assert_close(call(loaded), dense, rtol=0, atol=1e-4)
    processor = attach(loaded)
    call(loaded)
    assert steps_of(processor) == (2, 2)


def test_fused_projections(pipe: WanPipeline) -> None:
    processor = attach(pipe)
    expected = call(pipe)
    pipe.transformer.fuse_qkv_projections()
    try:
        assert pipe.transformer.blocks[0].attn1.fused_projections
        processor.stats.reset()
        torch.testing.assert_close(call(pipe), expected, rtol=0, atol=1e-3)
        assert steps_of(processor) == (2, 2)
    finally:
        pipe.transformer.unfuse_qkv_projections()


def test_a_lora_loaded_before_or_after(pipe: WanPipeline) -> None:
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    plain = call(pipe)
    attach(pipe)
    without = call(pipe)
    torch.manual_seed(0)
    pipe.transformer.add_adapter(lora)
    try:
        with_lora = call(pipe)
        assert not torch.allclose(with_lora, without, atol=1e-2)
        attach(pipe, threshold=1.0)
        exact = call(pipe)
        pipe.set_attn_processor(None)
        torch.testing.assert_close(exact, call(pipe), rtol=0, atol=1e-3)
        attach(pipe)
        assert torch.equal(call(pipe), with_lora)
    finally:
        pipe.transformer.delete_adapters("default")
    pipe.set_attn_processor(None)
    assert torch.equal(call(pipe), plain)


def test_weights_that_come_from_the_cpu_layer_by_layer(pipe: WanPipeline) -> None:
    expected_processor = attach(pipe)
    expected = call(pipe)
    assert steps_of(expected_processor) == (2, 2)
    # what enable_sequential_cpu_offload and enable_model_cpu_offload do, which ask for an accelerator
    offloaded = quiet(T2V.build(0))
    processor = attach(offloaded)
    accelerate.cpu_offload(offloaded.transformer, execution_device=torch.device("cpu"))
    accelerate.cpu_offload(offloaded.vae, execution_device=torch.device("cpu"))
    assert offloaded.transformer.blocks[0].attn1.to_q.weight.device.type == "meta"
    assert torch.equal(call(offloaded), expected)
    assert steps_of(processor) == (2, 2)

    whole = quiet(T2V.build(0))
    processor = attach(whole)
    whole.transformer, _ = accelerate.cpu_offload_with_hook(whole.transformer, execution_device=torch.device("cpu"))
    assert torch.equal(call(whole), expected)
    assert steps_of(processor) == (2, 2)


@pytest.mark.skipif(
    not torch.accelerator.is_available() and Version(diffusers.__version__) < Version("0.41"),
    reason="diffusers before 0.41 groups weights only with an accelerator",
)
def test_group_offloading() -> None:
    grouped = quiet(T2V.build(0))
    attach(grouped)
    expected = call(grouped)
    cpu = torch.device("cpu")
    apply_group_offloading(grouped.transformer, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.equal(call(grouped), expected)


def test_weights_stored_in_eight_bits() -> None:
    small = quiet(T2V.build(0))
    small.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    dense = call(small)
    processor = attach(small, threshold=1.0)
    assert small.transformer.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(call(small), dense, rtol=0, atol=1e-3)
    assert steps_of(processor) == (2, 2)


def test_bf16() -> None:
    pipe = quiet(T2V.build(0)).to(torch.bfloat16)
    dense = call(pipe)
    processor = attach(pipe, threshold=1.0)
    exact = call(pipe)
    assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert steps_of(processor) == (2, 2)
    assert float((exact - dense).norm() / dense.norm()) < 0.02


def test_moving_a_pipeline_keeps_it_attached(pipe: WanPipeline) -> None:
    processor = attach(pipe)
    expected = call(pipe)
    steps_of(processor)
    pipe.to("cpu", torch.float64)
    try:
        wide = call(pipe)
    finally:
        pipe.to("cpu", torch.float32)
    assert wide.dtype == torch.float32
    assert steps_of(processor) == (2, 2)
    assert torch.equal(call(pipe), expected)


def test_a_step_cache_skips_calls_and_changes_nothing_else() -> None:
    # diffusers 0.38 to 0.40 fail, dense too, where the cache is enabled after the model's first call
    pipe = quiet(T2V.build(0))
    processor = attach(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    try:
        call(pipe)
        summary = processor.stats.summary()
        # the first block runs in every step, the others where they are not taken from the cache
        by_layer = summary["density_by_layer"]
        assert set(by_layer) == {"transformer.blocks.0.attn1", "transformer.blocks.1.attn1"}
        assert LAYERS * 4 > summary["calls"] >= 4
        assert summary["dense_calls"]["warmup"] >= 2
        assert summary["sparse_calls"] == 2
    finally:
        pipe.transformer.disable_cache()


@pytest.mark.skipif(
    "kwargs" not in inspect.signature(WanTransformer3DModel.cache_context).parameters,
    reason="this release of diffusers tells cache_context no step",
)
def test_an_index_given_to_cache_context_tells_the_step(pipe: WanPipeline) -> None:
    processor = XAttnProcessor(**SETTINGS, warmup_steps=1)
    model = pipe.transformer
    model.set_attn_processor(processor)
    latents, text = torch.randn(1, 16, 5, 14, 18), torch.randn(1, 20, 16)
    with torch.no_grad():
        # a loop of one's own in which every forward has the same timestep
        for index in range(3):
            for name in ("cond", "uncond"):
                with model.cache_context(name, step_index=index):
                    model(latents, torch.tensor([500.0]), text)
    assert steps_of(processor) == (2, 4)
    assert model.cache_context.__func__ is not WanTransformer3DModel.cache_context
    model.set_attn_processor(None)
    assert model.cache_context.__func__ is WanTransformer3DModel.cache_context


class CountReads(TorchDispatchMode):
    """Numbers that the host reads from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_at_most_one_number_is_read_a_forward(pipe: WanPipeline) -> None:
    model = pipe.transformer
    latents, text = torch.randn(1, 16, 5, 14, 18), torch.randn(1, 20, 16)

    def reads(timestep: float) -> int:
        with torch.no_grad(), CountReads() as count:
            model(latents, torch.tensor([timestep]), text)
        return count.reads

    own = reads(900.0)
    model.set_attn_processor(XAttnProcessor(**SETTINGS, warmup_steps=1))
    assert reads(900.0) - own <= 1
    assert reads(900.0) - own <= 1
    model.set_attn_processor(XAttnProcessor(**{**SETTINGS, "min_tokens": 1000}, warmup_steps=0))
    assert reads(800.0) - own <= 1
