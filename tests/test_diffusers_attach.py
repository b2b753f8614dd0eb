"""Attaching and detaching an XAttnProcessor: what is put into a model, what stays, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import os
import pickle
import pydoc
import re
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny.other_families import kandinsky_transformer
from tests.tiny.wan_family import T2V, T2V_A14B, TEXT_DIM, V2V, flow_scheduler, tiny_transformer
from xattn_video import XAttnConfig, XAttnProcessor
from xattn_video.integrations import diffusers as integration
from xattn_video.integrations import torchvision_ops
from xattn_video.integrations.diffusers import attached_processor
from xattn_video.integrations.diffusers import dispatch as diffusers_backend
from xattn_video.integrations.diffusers.layers import SparseSelfAttention
from xattn_video.integrations.diffusers.models import MODELS, REFUSED, find_self_attention

# after tests.tiny, which repairs a torchvision that does not fit this torch
from diffusers import (  # isort: skip
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTXVideoTransformer3DModel,
    ModularPipeline,
    WanTransformer3DModel,
)
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep  # isort: skip
from diffusers.models.attention import AttentionMixin  # isort: skip
from diffusers.models.attention_dispatch import (  # isort: skip
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor  # isort: skip

ROOT = Path(__file__).parent.parent
SETTINGS: dict[str, Any] = {"stride": 4, "block_size": 32, "min_tokens": 64, "threshold": 0.5, "warmup_steps": 0}
TOKENS = 5 * 7 * 9


@pytest.fixture(scope="module")
def shared_model() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return tiny_transformer()


@pytest.fixture
def model(shared_model: WanTransformer3DModel) -> Any:
    before = processors(shared_model)
    yield shared_model
    shared_model.set_attn_processor(None)
    # a test must leave the model as it found it, whatever it set
    for path, processor in before.items():
        shared_model.get_submodule(path).set_processor(processor)
        vars(processor).clear()


def processors(model: nn.Module) -> dict[str, Any]:
    return {path: module.processor for path, module in model.named_modules() if hasattr(module, "processor")}


def forward(model: Any, timestep: float = 900.0, **changes: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, 16, 5, 14, 18, generator=generator),
        "timestep": torch.tensor([timestep]),
        "encoder_hidden_states": torch.randn(1, 20, TEXT_DIM, generator=generator),
    }
    with torch.no_grad():
        return model(**{**inputs, **changes}).sample


def is_wrapped(processor: Any) -> bool:
    return isinstance(processor, SparseSelfAttention)


def test_self_attention_is_wrapped_and_cross_attention_is_not(model: Any) -> None:
    before = processors(model)
    dense = forward(model)
    model.set_attn_processor(XAttnProcessor(**SETTINGS))
    after = processors(model)
    assert {path for path in after if is_wrapped(after[path])} == {"blocks.0.attn1", "blocks.1.attn1"}
    assert all(after[path] is before[path] for path in after if "attn2" in path)
    assert not torch.allclose(forward(model), dense, atol=1e-3)
    model.set_attn_processor(None)
    assert all(processors(model)[path] is before[path] for path in before)
    assert torch.equal(forward(model), dense)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert "cache_context" not in vars(model)


def test_none_on_a_model_that_has_nothing_attached_does_nothing(model: Any) -> None:
    before = processors(model)
    model.set_attn_processor(None)
    assert all(processors(model)[path] is before[path] for path in before)


def test_attaching_twice_replaces_the_configuration(model: Any) -> None:
    before = processors(model)
    dense = forward(model)
    first, second = XAttnProcessor(**SETTINGS), XAttnProcessor(**{**SETTINGS, "threshold": 1.0})
    model.set_attn_processor(first)
    model.set_attn_processor(second)
    wrapper = model.blocks[0].attn1.processor
    assert is_wrapped(wrapper)
    assert wrapper.original is before["blocks.0.attn1"]
    assert attached_processor(model) is second
    torch.testing.assert_close(forward(model), dense, rtol=0, atol=1e-4)
    assert first.stats.summary()["calls"] == 0
    assert second.stats.summary()["calls"] == 2
    # the same one again keeps its wrappers and its statistics
    model.set_attn_processor(second)
    assert model.blocks[0].attn1.processor is wrapper
    assert len(model._forward_pre_hooks) == 1
    model.set_attn_processor(None)
    assert all(processors(model)[path] is before[path] for path in before)


def test_the_wrapper_has_its_processors_signature(model: Any) -> None:
    stock = model.blocks[0].attn1.processor
    model.set_attn_processor(XAttnProcessor(**SETTINGS))
    wrapper = model.blocks[0].attn1.processor
    assert inspect.signature(wrapper.__call__) == inspect.signature(stock.__call__)
    assert "WanAttnProcessor" in type(wrapper).__name__


def test_diffusers_own_processors_still_go_to_diffusers(model: Any) -> None:
    model.set_attn_processor(XAttnProcessor(**SETTINGS))
    own = WanAttnProcessor()
    model.set_attn_processor(own)
    assert all(processor is own for processor in processors(model).values())
    assert attached_processor(model) is None
    # one object in every module is copied for each of them
    model.set_attn_processor(XAttnProcessor(**SETTINGS))
    sparse = forward(model)
    model.set_attn_processor(None)
    assert all(processor is own for processor in processors(model).values())
    assert own._parallel_config is None
    assert not torch.equal(forward(model), sparse)


def test_attn_processors_can_be_kept_and_set_again(model: Any) -> None:
    before = processors(model)
    dense = forward(model)
    processor = XAttnProcessor(**SETTINGS)
    model.set_attn_processor(processor)
    sparse = forward(model)
    kept = model.attn_processors
    model.set_attn_processor(WanAttnProcessor())
    assert torch.equal(forward(model), dense)
    model.set_attn_processor(dict(kept))
    assert torch.equal(forward(model), sparse)
    assert attached_processor(model) is processor
    model.set_attn_processor(None)
    assert all(processors(model)[path] is before[path] for path in before)


def test_a_pipelines_transformers_share_one_processor() -> None:
    pipe = T2V_A14B.build(0)
    processor = XAttnProcessor(**SETTINGS)
    pipe.set_attn_processor(processor)
    assert attached_processor(pipe.transformer) is attached_processor(pipe.transformer_2) is processor
    layers = {"transformer.blocks.0.attn1", "transformer_2.blocks.1.attn1"}
    pipe.set_progress_bar_config(disable=True)
    T2V.call(pipe, num_inference_steps=4)
    assert layers <= set(processor.stats.summary()["density_by_layer"])
    pipe.set_attn_processor(None)
    assert not any(is_wrapped(processor) for processor in processors(pipe.transformer_2).values())


def test_one_processor_serves_one_pipeline(model: Any) -> None:
    first, second = T2V.build(0), V2V.build(0)
    processor = XAttnProcessor(**SETTINGS)
    first.set_attn_processor(processor)
    with pytest.raises(ValueError, match=r"one pipeline.*XAttnProcessor\(processor\.config\)"):
        second.set_attn_processor(processor)
    assert attached_processor(second.transformer) is None
    # once it is off the first one it may go to another
    first.set_attn_processor(None)
    second.set_attn_processor(processor)
    assert attached_processor(second.transformer) is processor


def test_one_processor_on_two_transformers_set_one_by_one() -> None:
    pipe = T2V_A14B.build(0)
    processor = XAttnProcessor(**SETTINGS)
    pipe.transformer.set_attn_processor(processor)
    pipe.transformer_2.set_attn_processor(processor)
    forward(pipe.transformer)
    forward(pipe.transformer_2, 500.0)
    summary = processor.stats.summary()
    assert set(summary["density_by_step"]) == {0, 1}
    assert set(summary["density_by_layer"]) == {
        f"{name}.blocks.{index}.attn1" for name in ("transformer", "transformer_2") for index in (0, 1)
    }


def test_a_pipeline_without_transformer_is_refused_by_name() -> None:
    class Empty(DiffusionPipeline):
        def __init__(self, vae: Any) -> None:
            super().__init__()
            self.register_modules(vae=vae)

    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    with pytest.raises(ValueError, match=r"Empty.*AutoencoderKLWan"):
        Empty(vae).set_attn_processor(XAttnProcessor())


@pytest.mark.parametrize(("setting", "words"), [({"dense_layers": ("no*",)}, "no"), ({"threshold": (0.5,) * 7}, "7")])
def test_settings_that_do_not_fit_leave_what_is_attached(model: Any, setting: dict[str, Any], words: str) -> None:
    """A caller that goes on after the error goes on with what it had, and not densely."""
    before = XAttnProcessor(**SETTINGS)
    model.set_attn_processor(before)
    refused = XAttnProcessor(**{**SETTINGS, **setting})
    with pytest.raises(ValueError, match=words):
        model.set_attn_processor(refused)
    assert attached_processor(model) is before
    assert refused.stats.summary()["calls"] == 0


def test_settings_that_fit_one_of_two_models_are_attached_to_neither() -> None:
    pipe = T2V_A14B.build(0)
    pipe.transformer_2.blocks = pipe.transformer_2.blocks[:1]
    with pytest.raises(ValueError, match="dense_layers"):
        pipe.set_attn_processor(XAttnProcessor(**SETTINGS, dense_layers=(1,)))
    assert attached_processor(pipe.transformer) is attached_processor(pipe.transformer_2) is None


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_models_whose_calls_cannot_be_served_are_refused(name: str) -> None:
    derived = type("Own", (type(name, (nn.Module,), {}),), {})
    with pytest.raises(ValueError, match=f"{name} cannot be made sparse by XAttnProcessor: .+"):
        find_self_attention(derived())


def test_a_model_that_cannot_be_attached_leaves_the_others_alone() -> None:
    pipe = T2V_A14B.build(0)
    for block in pipe.transformer_2.blocks:
        block.attn1.processor = object()
    with pytest.raises(ValueError, match=r"WanTransformer3DModel.*blocks\.0\.attn1"):
        pipe.set_attn_processor(XAttnProcessor())
    assert attached_processor(pipe.transformer) is None
    assert not any(is_wrapped(processor) for processor in processors(pipe.transformer).values())


def test_a_dense_layer_that_does_not_exist_leaves_the_model_alone(model: Any) -> None:
    before = processors(model)
    with pytest.raises(ValueError, match="dense_layers"):
        model.set_attn_processor(XAttnProcessor(dense_layers=(7,)))
    assert all(processors(model)[path] is before[path] for path in before)
    assert attached_processor(model) is None
    assert torch.isfinite(forward(model)).all()


def test_dense_layers_stay_dense_and_are_counted(model: Any) -> None:
    processor = XAttnProcessor(**SETTINGS, dense_layers=("blocks.1.*",))
    model.set_attn_processor(processor)
    forward(model)
    summary = processor.stats.summary()
    assert summary["dense_calls"] == {"dense_layer": 1}
    assert summary["sparse_calls"] == 1
    assert summary["density_by_layer"]["transformer.blocks.1.attn1"] == 1.0
    assert summary["density_by_layer"]["transformer.blocks.0.attn1"] < 1


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="config must be an XAttnConfig"):
        XAttnProcessor({"stride": 8})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got 0\.9; write threshold=0\.9"):
        XAttnProcessor(0.9)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threshold"):
        XAttnProcessor(threshold=1.5)
    assert XAttnProcessor(XAttnConfig(stride=16), threshold=0.8).config == XAttnConfig(stride=16, threshold=0.8)


def test_the_class_in_place_of_an_object_is_refused(model: Any) -> None:
    before = processors(model)
    for target in (model, T2V.build(0)):
        with pytest.raises(TypeError, match=r"write XAttnProcessor\(\) with parentheses"):
            target.set_attn_processor(XAttnProcessor)
    assert all(processors(model)[path] is before[path] for path in before)


def test_a_preset_by_its_name() -> None:
    assert XAttnProcessor("balanced").config == XAttnConfig.preset("balanced")
    changed = XAttnProcessor("wan2.1-1.3b", threshold=0.8)
    assert changed.config == XAttnConfig.preset("wan", threshold=0.8)
    with pytest.raises(ValueError, match=r"balanced, .*faithful, fast, .*got quick"):
        XAttnProcessor("quick")
    with pytest.raises(TypeError, match=r"treshold \(did you mean threshold\?\)"):
        XAttnProcessor(treshold=0.9)


def test_the_settings_are_in_signature_and_help() -> None:
    parameters = inspect.signature(XAttnProcessor).parameters
    text = pydoc.plain(pydoc.render_doc(XAttnProcessor))
    for field in dataclasses.fields(XAttnConfig):
        assert (parameters[field.name].annotation, parameters[field.name].default) == (field.type, field.default)
        assert re.search(rf"^ \|  +(\w+, )*{field.name}(, \w+)*: ", text, re.MULTILINE), field.name
    # and nothing that only the package itself calls
    methods, data = {"attach", "forget", "start_generation", "step"}, {"config", "on_call", "stats"}
    assert {name for name in dir(XAttnProcessor()) if not name.startswith("_")} == methods | data


def test_an_xattnprocessor_is_not_the_processor_of_one_module(model: Any) -> None:
    model.blocks[0].attn1.set_processor(XAttnProcessor())
    with pytest.raises(TypeError, match="set_attn_processor of the pipeline"):
        forward(model)


# ---- why a call is dense


def test_short_sequences_and_gradients_are_dense_and_counted(model: Any) -> None:
    dense = forward(model)
    processor = XAttnProcessor(**{**SETTINGS, "min_tokens": TOKENS + 1})
    model.set_attn_processor(processor)
    assert torch.equal(forward(model), dense)
    assert processor.stats.summary()["dense_calls"] == {"min_tokens": 2}

    processor = XAttnProcessor(**{**SETTINGS, "min_tokens": TOKENS})
    model.set_attn_processor(processor)
    hidden = torch.randn(1, 16, 5, 14, 18, requires_grad=True)
    output = model(hidden, torch.tensor([900.0]), torch.randn(1, 20, TEXT_DIM)).sample
    output.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
    forward(model)
    summary = processor.stats.summary()
    assert summary["dense_calls"] == {"autograd": 2}
    assert summary["sparse_calls"] == 2


def test_training_the_values_alone_is_counted_as_dense(model: Any) -> None:
    processor = XAttnProcessor(**SETTINGS)
    model.set_attn_processor(processor)
    model.requires_grad_(False)
    for block in model.blocks:
        block.attn1.to_v.requires_grad_(True)
    model(torch.randn(1, 16, 5, 14, 18), torch.tensor([900.0]), torch.randn(1, 20, TEXT_DIM))
    assert processor.stats.summary()["dense_calls"] == {"autograd": 2}


def test_statistics_add_up_and_start_over(model: Any) -> None:
    processor = XAttnProcessor(**{**SETTINGS, "warmup_steps": 2})
    model.set_attn_processor(processor)
    for timestep in (900.0, 800.0, 700.0, 600.0):
        for _ in range(2):
            forward(model, timestep)
    summary = processor.stats.summary()
    assert summary["calls"] == 4 * 2 * 2 == summary["sparse_calls"] + sum(summary["dense_calls"].values())
    assert summary["dense_calls"] == {"warmup": 8}
    assert 0 < summary["sparse_density"] < 1
    assert summary["density"] == pytest.approx((8 + 8 * summary["sparse_density"]) / 16)
    assert list(summary["density_by_step"]) == [0, 1, 2, 3]
    assert list(summary["density_by_step"].values())[:2] == [1.0, 1.0]
    assert sum(summary["density_by_step"].values()) / 4 == pytest.approx(summary["density"])
    assert sum(summary["density_by_layer"].values()) / 2 == pytest.approx(summary["density"])
    both = summary["density_by_layer_and_step"]
    assert both.keys() == summary["density_by_layer"].keys()
    for layer, density in summary["density_by_layer"].items():
        assert list(both[layer]) == [0, 1, 2, 3]
        assert sum(both[layer].values()) / 4 == pytest.approx(density)
    for step, density in summary["density_by_step"].items():
        assert sum(steps[step] for steps in both.values()) / 2 == pytest.approx(density)
    # reading changes nothing, resetting forgets everything
    assert processor.stats.summary() == summary
    processor.stats.reset()
    empty = processor.stats.summary()
    assert (empty["calls"], empty["dense_calls"], empty["sparse_density"]) == (0, {}, None)
    assert empty["density_by_step"] == empty["density_by_layer"] == empty["density_by_layer_and_step"] == {}


def test_forwards_are_timed_by_what_they_do(model: Any) -> None:
    settings = {**SETTINGS, "warmup_steps": 2, "residual": "int4", "refresh": (0,)}
    processor = XAttnProcessor(**settings)
    model.set_attn_processor(processor)
    processor.start_generation(steps=5)
    kinds = []
    for step in range(5):
        processor.step(step)
        before = time.perf_counter()
        forward(model)
        most = time.perf_counter() - before
        kinds.append(processor.stats.times.medians())
        processor.stats.times.reset()
        assert all(0 < seconds < most for seconds in kinds[-1].values())
    assert [list(medians) for medians in kinds] == [["dense"], ["refresh"], ["refresh"], ["sparse"], ["sparse"]]


def test_statistics_outlive_inference_mode(model: Any) -> None:
    processor = XAttnProcessor(**SETTINGS)
    with torch.inference_mode():
        model.set_attn_processor(processor)
        forward(model, 900.0)
    forward(model, 800.0)
    assert processor.stats.summary()["sparse_calls"] == 4
    with torch.inference_mode():
        processor.stats.reset()
        forward(model, 900.0)
    forward(model, 800.0)
    assert processor.stats.summary()["sparse_calls"] == 4


def test_thresholds_by_head(model: Any) -> None:
    densities = []
    for threshold in (0.3, (0.3, 0.9), 0.9):
        processor = XAttnProcessor(**{**SETTINGS, "threshold": threshold})
        model.set_attn_processor(processor)
        forward(model)
        densities.append(processor.stats.summary()["density"])
    assert densities[0] < densities[1] < densities[2]


# ---- the attention backend


def test_a_threshold_for_another_number_of_heads_is_refused_when_attached(model: Any) -> None:
    heads = model.blocks[0].attn1.heads
    before = processors(model)
    with pytest.raises(ValueError, match=f"one value for each of {heads} heads, got {heads + 1}"):
        model.set_attn_processor(XAttnProcessor(**{**SETTINGS, "threshold": (0.5,) * (heads + 1)}))
    assert processors(model) == before


@pytest.fixture
def active_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    # setting a backend on a model also sets a default for the whole process
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)


def test_diffusers_takes_the_backend() -> None:
    member = diffusers_backend.register()
    assert member is AttentionBackendName("xattention") is AttentionBackendName["XATTENTION"]
    assert isinstance(member, AttentionBackendName)
    assert member.value == member == "xattention"
    assert list(AttentionBackendName).count(member) == 1
    assert member in _AttentionBackendRegistry.list_backends()
    assert copy.deepcopy(member) is member is pickle.loads(pickle.dumps(member))
    # everything that the dispatch may pass is a parameter of the backend, so that nothing is dropped
    parameters = set(inspect.signature(dispatch_attention_fn).parameters) - {"attention_kwargs", "backend"}
    parameters = parameters - {"parallel_config"} | {"_parallel_config"}
    assert set(inspect.signature(diffusers_backend.xattention_backend).parameters) == parameters


def test_installing_again_changes_nothing() -> None:
    methods = [cls.__dict__["set_attn_processor"] for cls in (AttentionMixin, ModularPipeline, DiffusionPipeline)]
    integration.install()
    assert [
        cls.__dict__["set_attn_processor"] for cls in (AttentionMixin, ModularPipeline, DiffusionPipeline)
    ] == methods


@pytest.mark.usefixtures("active_backend")
def test_set_attention_backend_is_for_dense_steps(model: Any) -> None:
    model.set_attn_processor(XAttnProcessor(**{**SETTINGS, "warmup_steps": 1}))
    wrapper = model.blocks[0].attn1.processor
    assert wrapper._attention_backend is None
    model.set_attention_backend("_native_math")
    assert wrapper._attention_backend == AttentionBackendName._NATIVE_MATH
    assert wrapper.inner._attention_backend == "xattention"
    math = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]
    calls = []

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(query.shape[1])
        return math(query, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, counted)
        forward(model, 900.0)
        # self- and cross-attention of two layers
        assert len(calls) == 4
        calls.clear()
        forward(model, 800.0)
        assert len(calls) == 2
    model.set_attn_processor(None)
    # it was set on the model, not on the wrapper
    assert model.blocks[0].attn1.processor._attention_backend == AttentionBackendName._NATIVE_MATH


@pytest.mark.usefixtures("active_backend")
def test_the_backend_alone_is_dense_and_says_so_once(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    dense = forward(model)
    diffusers_backend._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="xattn_video"), attention_backend("xattention"):
        outputs = [forward(model), forward(model)]
    assert all(torch.equal(output, dense) for output in outputs)
    messages = [record.getMessage() for record in caplog.records if "XAttnProcessor" in record.getMessage()]
    assert len(messages) == 1
    # an attached model dispatches its dense calls to that default too
    model.set_attn_processor(XAttnProcessor(**{**SETTINGS, "warmup_steps": 1}))
    with attention_backend("xattention"):
        assert torch.equal(forward(model), dense)


@pytest.mark.usefixtures("active_backend")
def test_sparse_attention_is_not_a_backend_for_dense_steps() -> None:
    # the attention of the text, which stays dense, comes before that of the video
    model: Any = kandinsky_transformer()
    before = processors(model)
    model.set_attn_processor(XAttnProcessor(**SETTINGS))
    with pytest.raises(ValueError, match="set_attn_processor"):
        model.set_attention_backend("xattention")
    assert attached_processor(model) is not None
    assert {processor._attention_backend for processor in before.values()} == {None}


@pytest.mark.usefixtures("active_backend")
def test_the_backend_by_its_name_attaches_the_defaults(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    before = processors(model)
    active = _AttentionBackendRegistry._active_backend
    with caplog.at_level(logging.WARNING, logger="xattn_video"):
        model.set_attention_backend("xattention")
        model.set_attention_backend("XAttention")
    own = attached_processor(model)
    assert own is not None
    assert own.config == XAttnConfig()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "pipe.set_attn_processor(XAttnProcessor(...))" in caplog.text
    # models that have no processor do not get this backend
    assert _AttentionBackendRegistry._active_backend is active
    forward(model)
    assert own.stats.summary()["dense_calls"] == {"warmup": 2}
    # a name that does not exist changes nothing
    with pytest.raises(ValueError, match="must be one of"):
        model.set_attention_backend("bogus")
    assert attached_processor(model) is own
    # another backend takes it off again, and so does none
    model.set_attention_backend("native")
    assert attached_processor(model) is None
    assert all(processors(model)[path] is before[path] for path in before)
    model.set_attention_backend(backend="xattention")
    assert attached_processor(model) is not None
    model.reset_attention_backend()
    assert attached_processor(model) is None
    with pytest.raises(ValueError, match="has no self-attention"):
        AutoencoderKLWan(base_dim=2, z_dim=16, dim_mult=[1], num_res_blocks=1).set_attention_backend("xattention")


# ---- modular pipelines


def modular_pipeline() -> Any:
    """The denoising of a modular Wan pipeline, without its components."""
    return WanCoreDenoiseStep().init_pipeline()


def test_a_modular_pipeline_takes_the_processor(model: Any) -> None:
    pipe = modular_pipeline()
    with pytest.raises(ValueError, match=r"load its components first: pipe.load_components\(\)"):
        pipe.set_attn_processor(XAttnProcessor(**SETTINGS))
    pipe.update_components(transformer=model, scheduler=flow_scheduler())
    # a share of all steps, whose number the pipeline's scheduler tells
    processor = XAttnProcessor(**{**SETTINGS, "warmup_steps": 4, "warmup": 0.5})
    pipe.set_attn_processor(processor)
    text = torch.randn(2, 1, 6, TEXT_DIM, generator=torch.Generator().manual_seed(0))

    def generate() -> Tensor:
        return pipe(
            prompt_embeds=text[0], negative_prompt_embeds=text[1], num_inference_steps=4, height=112, width=144,
            num_frames=17, generator=torch.Generator().manual_seed(0), output="latents",
        )  # fmt: skip

    sparse = generate()
    summary = processor.stats.summary()
    # two layers, two prompts, two steps of each kind; a second video has its own warm-up
    assert (summary["dense_calls"], summary["sparse_calls"]) == ({"warmup": 8}, 8)
    assert torch.equal(generate(), sparse)
    assert processor.stats.summary()["dense_calls"] == {"warmup": 16}
    pipe.set_attn_processor(None)
    assert attached_processor(model) is None
    assert not torch.allclose(generate(), sparse, atol=1e-3)


# ---- classes that are not in the table


class UnlistedTransformer(WanTransformer3DModel):
    """A listed class's child counts as that class; see `unlisted` for one that does not."""


def unlisted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(MODELS, "WanTransformer3DModel")


def test_a_child_of_a_listed_class_is_attached_like_it() -> None:
    model = tiny_transformer(UnlistedTransformer)
    model.set_attn_processor(XAttnProcessor(**SETTINGS))
    assert {path for path, processor in processors(model).items() if is_wrapped(processor)} == {
        "blocks.0.attn1",
        "blocks.1.attn1",
    }


def test_an_unlisted_class_gets_the_generic_rule(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    unlisted(monkeypatch)
    processor = XAttnProcessor(**SETTINGS)
    model.set_attn_processor(processor)
    assert {path for path, own in processors(model).items() if is_wrapped(own)} == {"blocks.0.attn1", "blocks.1.attn1"}
    forward(model)
    assert processor.stats.summary()["sparse_calls"] == 2


def call_attention(model: Any, mask: Tensor | None, text: Tensor | None = None) -> Tensor:
    """One attention module, as a model of another class might call it, inside a forward."""
    attention = model.blocks[0].attn1
    hidden = torch.randn(2, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return attention(hidden, text, mask, None)


def test_masks_of_unlisted_classes_are_looked_at(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    unlisted(monkeypatch)
    prefix = torch.arange(96) < torch.tensor([[96], [70]])
    holes = prefix.clone()
    holes[1, 3] = False
    masks = {
        "prefix": prefix[:, None, None],
        "holes": holes[:, None, None],
        "square": prefix[:, None, None].expand(2, 1, 96, 96),
        "added": torch.zeros(2, 1, 1, 96),
    }
    dense = {name: call_attention(model, mask) for name, mask in masks.items()}
    for name, mask in masks.items():
        processor = XAttnProcessor(**{**SETTINGS, "threshold": 1.0})
        model.set_attn_processor(processor)
        torch.testing.assert_close(call_attention(model, mask), dense[name], rtol=0, atol=1e-5)
        summary = processor.stats.summary()
        assert summary["dense_calls"] == ({} if name == "prefix" else {"mask": 1})


def test_text_in_an_unlisted_joint_sequence_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(MODELS, "LTXVideoTransformer3DModel")
    model = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=32,
        cross_attention_dim=64,
        num_layers=1,
        caption_channels=16,
    )
    processor = XAttnProcessor(**SETTINGS)
    model.set_attn_processor(processor)
    attention = model.transformer_blocks[0].attn1
    with torch.no_grad():
        # as many keys as queries, but they come from somewhere else; then other keys altogether
        attention(torch.randn(2, 96, 64), torch.randn(2, 96, 64))
        attention(torch.randn(2, 96, 64), torch.randn(2, 10, 64))
    assert processor.stats.summary()["dense_calls"] == {"joint_text": 1, "cross_attention": 1}


# ---- copies, processes, threads


def test_a_deep_copy_is_attached_on_its_own(model: Any) -> None:
    processor = XAttnProcessor(**SETTINGS)
    model.set_attn_processor(processor)
    sparse = forward(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    try:
        assert torch.equal(forward(copied), sparse)
    finally:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.div_(2)
    own = attached_processor(copied)
    assert own is not None
    assert own is not processor
    assert processor.stats.summary()["calls"] == 2
    assert own.stats.summary()["calls"] == 4
    copied.set_attn_processor(None)
    assert is_wrapped(model.blocks[0].attn1.processor)
    assert isinstance(copied.blocks[0].attn1.processor, WanAttnProcessor)
    assert not copied._forward_pre_hooks
    assert not copied._forward_hooks
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    assert torch.equal(forward(model), sparse)


def test_a_model_is_freed_without_the_garbage_collector() -> None:
    import gc
    import weakref

    model = tiny_transformer()
    processor = XAttnProcessor(**SETTINGS)
    model.set_attn_processor(processor)
    forward(model)
    link = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert link() is None
    finally:
        gc.enable()
    assert processor.stats.summary()["calls"] == 2


def test_two_threads_in_one_model_are_refused(model: Any) -> None:
    model.set_attn_processor(XAttnProcessor(**SETTINGS))
    threads: list[threading.Thread] = []
    errors: list[BaseException] = []

    def second() -> None:
        try:
            forward(model)
        except RuntimeError as error:
            errors.append(error)

    def meanwhile(module: nn.Module, args: Any) -> None:
        if not threads:
            threads.append(threading.Thread(target=second))
            threads[0].start()
            threads[0].join()

    handle = model.blocks[0].register_forward_pre_hook(meanwhile)
    try:
        forward(model)
    finally:
        handle.remove()
    assert len(errors) == 1
    assert "two threads" in str(errors[0])
    # and it is not stuck: the next forward works, also after one that failed
    forward(model)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        forward(model, encoder_hidden_states=torch.randn(1, 20, TEXT_DIM + 1))
    errors.clear()
    afterwards = threading.Thread(target=second)
    afterwards.start()
    afterwards.join()
    assert not errors


def test_a_forward_that_ctrl_c_ended_does_not_lock_other_threads_out(model: Any) -> None:
    model.set_attn_processor(XAttnProcessor(**SETTINGS))

    def interrupt(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.blocks[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        forward(model)
    handle.remove()
    outputs: list[Tensor] = []
    worker = threading.Thread(target=lambda: outputs.append(forward(model)))
    # nor keep the model from being copied: a thread cannot be
    outputs.append(forward(copy.deepcopy(model)))
    worker.start()
    worker.join()
    assert torch.equal(*outputs)


def test_ulysses_context_parallelism_gives_what_one_process_gives(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("context_parallel_child.py")), str(tmp_path / "store")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    children = [
        subprocess.Popen(
            [*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    outputs = [child.communicate(timeout=1000)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], "\n".join(outputs)


def test_ring_context_parallelism_is_refused(model: Any) -> None:
    from diffusers import ContextParallelConfig
    from diffusers.models._modeling_parallel import ParallelConfig

    model.set_attn_processor(XAttnProcessor(**SETTINGS))
    wrapper = model.blocks[0].attn1.processor
    assert wrapper._parallel_config is None
    ring = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2))
    with pytest.raises(ValueError, match="ring_degree 2"):
        wrapper._parallel_config = ring
    ulysses = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=2))
    wrapper._parallel_config = ulysses
    model.set_attn_processor(None)
    # as enable_parallelism would have left it
    assert model.blocks[0].attn1.processor._parallel_config is ulysses
    model.blocks[0].attn1.processor._parallel_config = None


# ---- torchvision


def in_a_fresh_process(program: str, *path: Path, **changes: str) -> str:
    folders = os.pathsep.join(map(str, (*path, ROOT)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": folders, **changes}
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_torchvision_of_another_torch_is_mended_once() -> None:
    program = """
import torch
try:
    import torchvision
    healthy = True
except RuntimeError:
    healthy = False
from xattn_video.integrations.torchvision_ops import repair_torchvision
first, second = repair_torchvision(), repair_torchvision()
assert (first is None) == healthy, first
assert second is None
import torchvision.transforms
"""
    if torchvision_ops.importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    in_a_fresh_process(program, TORCH_DEVICE_BACKEND_AUTOLOAD="0")


def test_diffusers_can_be_imported_before_this_package(tmp_path: Path) -> None:
    """As in the README, also beside a torchvision of another torch: torch itself has it repaired."""
    fit = ROOT / "pipelines/demo/torchvision_fit"
    project = tomllib.loads((fit / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (line,) = (f"{name} = {call}" for name, call in project["entry-points"]["torch.backends"].items())
    installed = tmp_path / "xattn_video_torchvision_fit-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n", encoding="utf-8"
    )
    (installed / "entry_points.txt").write_text(f"[torch.backends]\n{line}\n", encoding="utf-8")
    program = """
import sys
import torch
assert "xattn_video.integrations.torchvision_ops" in sys.modules
assert not {"torchvision", "diffusers", "xattn_video.integrations.diffusers"} & sys.modules.keys()
from diffusers import WanPipeline
from xattn_video import XAttnProcessor
assert "set_attn_processor" in dir(WanPipeline)
"""
    in_a_fresh_process(program, tmp_path, fit)
    # Without the package, or with one of before, torch is imported all the same.
    in_a_fresh_process(
        "import sys; sys.modules['xattn_video.integrations.torchvision_ops'] = None; import torch", tmp_path, fit
    )


def test_a_scheduler_of_another_kind_changes_nothing(model: Any) -> None:
    pipe = T2V.build(0, scheduler=FlowMatchEulerDiscreteScheduler)
    pipe.set_progress_bar_config(disable=True)
    processor = XAttnProcessor(**{**SETTINGS, "warmup_steps": 2})
    pipe.set_attn_processor(processor)
    T2V.call(pipe, num_inference_steps=3)
    assert processor.stats.summary()["dense_calls"] == {"warmup": 2 * 2 * 2}
