"""XAttnProcessor on HunyuanVideo, HunyuanVideo 1.5, FramePack, LTX, LTX-2, Cosmos and Kandinsky 5."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.family_checks import CHECKS, SETTINGS, attached, check_id, processors, relative_error, run, subject
from tests.tiny.common import Family, normal, prefix_mask
from tests.tiny.hunyuan_families import (
    FRAMEPACK_VIDEO,
    HUNYUAN_FAMILIES,
    IMAGE_TOKENS,
    TEXT_LENGTH,
    VALID_GLYPH,
    VALID_NEGATIVE,
    VALID_TEXT,
    VIDEO,
)
from tests.tiny.not_dispatching import NOT_DISPATCHING, NotDispatching
from tests.tiny.other_families import KANDINSKY_5, LTX_2, OTHER_FAMILIES, ltx_2_transformer
from xattn_video import XAttnConfig, XAttnProcessor
from xattn_video.integrations.diffusers import layers as diffusers_layers
from xattn_video.ops import attend_sparse

# after tests.tiny, which repairs a torchvision that does not fit this torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler  # isort: skip
from diffusers.models.attention_dispatch import _AttentionBackendRegistry  # isort: skip

FAMILIES = (*HUNYUAN_FAMILIES, *OTHER_FAMILIES)


@pytest.mark.parametrize("check", CHECKS, ids=check_id)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_family(family: Family, check: Callable[[Family], None]) -> None:
    check(family)


@pytest.mark.parametrize("name", ["hunyuan-video", "hunyuan-video-1.5", "cosmos"])
def test_models_whose_norms_leave_bf16_run_under_autocast(name: str) -> None:
    """Float32 weights under autocast: queries and keys come in float32 from their norms, and values in bfloat16."""
    family = by_name(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pipe = family.build(0)
        stock = run(family, pipe, num_inference_steps=3).result
        with attached(pipe, threshold=1.0, warmup_steps=1) as processor:
            sparse = run(family, pipe, num_inference_steps=3).result
    assert processor.stats.summary()["sparse_calls"] > 0
    assert relative_error(sparse, stock) < 0.05


def by_name(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def all_processors(pipe: DiffusionPipeline) -> dict[str, object]:
    modules = pipe.transformer.named_modules()
    return {name: module.processor for name, module in modules if hasattr(module, "processor")}


@pytest.mark.parametrize("model", NOT_DISPATCHING, ids=lambda model: model.transformer)
def test_a_model_that_computes_its_own_attention_is_refused_by_name(model: NotDispatching) -> None:
    pipe = model.build()
    before = all_processors(pipe)
    with pytest.raises(ValueError, match=model.transformer):
        pipe.set_attn_processor(XAttnProcessor())
    after = all_processors(pipe)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


class LargestBool(TorchDispatchMode):
    """Bytes of the largest bool storage that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype == torch.bool:
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("name", ["hunyuan-video-1.5", "hunyuan-video-1.5-i2v"])
def test_hunyuan_15_builds_no_square_mask(name: str) -> None:
    family = by_name(name)
    pipe, square = subject(family).pipe, family.tokens[0] ** 2
    with LargestBool() as stock:
        family.call(pipe, num_inference_steps=1)
    assert stock.bytes >= square, "diffusers no longer builds it: the processor of our own can go"
    # two sparse steps, and a sparse one after a dense one
    for warmup_steps in (0, 1):
        with attached(pipe, threshold=0.5, warmup_steps=warmup_steps), LargestBool() as ours:
            family.call(pipe, num_inference_steps=2)
        assert ours.bytes < square / 16


@pytest.mark.parametrize("name", ["hunyuan-video", "hunyuan-video-i2v", "hunyuan-video-1.5", "framepack"])
def test_what_stands_in_the_padding_does_not_show(name: str) -> None:
    family = by_name(name)
    pipe = subject(family).pipe
    text = normal((22, 24), (0, 1), salt=1)
    spoilt = torch.where(prefix_mask(VALID_TEXT, (0, 1), TEXT_LENGTH).bool()[..., None], text, text.flip(1) * 5)
    with attached(pipe, threshold=0.5, warmup_steps=0):
        clean, padded, other = (
            family.call(pipe, items=(0, 1), prompt_embeds=embeds, num_inference_steps=1)
            for embeds in (text, spoilt, text.flip(1))
        )
    assert relative_error(padded, clean) < 1e-5
    assert relative_error(other, clean) > 1e-3


# the valid tokens of what stands before the prompt, for each item: the picture and the glyphs
BEFORE_PROMPT = {
    "hunyuan-video": (0, 0),
    "hunyuan-video-i2v": (0, 0),
    "hunyuan-video-1.5": VALID_GLYPH,
    "framepack": (IMAGE_TOKENS, IMAGE_TOKENS),
}


@pytest.mark.parametrize("name", list(BEFORE_PROMPT))
def test_text_of_a_joint_sequence_is_exact_and_its_padding_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = by_name(name)
    video = FRAMEPACK_VIDEO if name == "framepack" else VIDEO
    seen: set[tuple[tuple[int, int], tuple[int, ...]]] = set()

    def spy(backend: Any, call: Any, config: XAttnConfig) -> Any:
        assert call.dense_tokens[1] == call.query.shape[2]
        seen.add((call.dense_tokens, tuple(call.mask.kv_lens.tolist())))
        return attend_sparse(backend, call, config)

    monkeypatch.setattr(diffusers_layers, "attend_sparse", spy)
    with attached(subject(family).pipe, threshold=0.5, warmup_steps=0):
        family.call(subject(family).pipe, items=(0, 1), num_inference_steps=1)
    text = {text for text, _ in seen}
    assert {start for start, _ in text} == {video}
    valid = [VALID_TEXT, VALID_NEGATIVE][: family.forwards_per_step]
    expected = {
        tuple(video + before + own for before, own in zip(BEFORE_PROMPT[name], prompt, strict=True)) for prompt in valid
    }
    assert {lengths for _, lengths in seen} == expected


def test_steps_are_counted_where_bf16_timesteps_collide() -> None:
    family = by_name("hunyuan-video-1.5")
    pipe = family.build(0).to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    # so steep a schedule that the first seven timesteps are all 1000 in bf16, as the model gets them
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=4000.0)
    seen: list[float] = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    with attached(pipe, threshold=0.5, warmup_steps=5) as processor:
        family.call(pipe)
    assert len(set(seen)) < 5
    summary = processor.stats.summary()
    assert summary["dense_calls"] == {"warmup": 5 * family.forwards_per_step * family.layers}
    assert summary["sparse_calls"] == 3 * family.forwards_per_step * family.layers


def test_ltx_2_guidance_that_skips_a_layer() -> None:
    # LTX-2.3's further guidance runs: without one layer's attention, and without the audio
    guidance = {
        "stg_scale": 1.0,
        "spatio_temporal_guidance_blocks": [1],
        "audio_stg_scale": 1.0,
        "modality_scale": 3.0,
        "audio_modality_scale": 3.0,
        "num_inference_steps": 3,
    }
    pipe = LTX_2.build(0, transformer=partial(ltx_2_transformer, perturbed_attn=True))
    pipe.set_progress_bar_config(disable=True)
    dense = LTX_2.call(pipe, **guidance)
    with attached(pipe, threshold=1.0, warmup_steps=1) as processor:
        sparse = LTX_2.call(pipe, **guidance)
    assert relative_error(sparse, dense) < 1e-4
    summary = processor.stats.summary()
    # two layers in each of three forwards, less the one skipped
    assert summary["dense_calls"] == {"warmup": 1 * 5}
    assert summary["sparse_calls"] == 2 * 5


def test_ltx_2_weights_between_tokens_stay_dense() -> None:
    pipe = LTX_2.build(0)
    pipe.set_progress_bar_config(disable=True)
    tokens = by_name("ltx-2").tokens[0]
    # the video attends half as strongly to its first hundred tokens, as with a reference video
    weights = torch.ones(1, tokens, tokens)
    weights[:, :, :100] = 0.5
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda **kwargs: forward(**kwargs, video_self_attention_mask=weights)
    one_forward = {"guidance_scale": 1.0, "audio_guidance_scale": 1.0, "num_inference_steps": 3}
    dense = LTX_2.call(pipe, **one_forward)
    with attached(pipe, threshold=0.5, warmup_steps=0) as processor:
        masked = LTX_2.call(pipe, **one_forward)
    assert torch.equal(masked, dense)
    summary = processor.stats.summary()
    assert summary["dense_calls"] == {"mask": 3 * 2}
    assert summary["sparse_calls"] == 0


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_kandinsky_5_with_its_own_sparse_attention_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # setting a backend on a model also sets a default for the whole process
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    pipe = KANDINSKY_5.build(0)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.register_to_config(
        attention_type="nabla", attention_P=0.8, attention_wT=3, attention_wH=3, attention_wW=3, attention_add_sta=True
    )
    pipe.transformer.set_attention_backend("flex")
    # its blocks are 8 x 8 tokens of a frame
    settings = {"height": 128, "width": 128, "num_inference_steps": 1, "guidance_scale": 1.0}
    own = KANDINSKY_5.call(pipe, **settings)
    with attached(pipe, threshold=0.5, warmup_steps=0) as processor:
        wrapped = KANDINSKY_5.call(pipe, **settings)
    assert torch.equal(wrapped, own)
    assert processor.stats.summary()["dense_calls"] == {"mask": 2}


def test_cosmos_leaves_the_process_wide_default_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # its processors name no backend: they use the default of the process
    default = _AttentionBackendRegistry._active_backend

    def spy(*args: Any) -> Any:
        assert _AttentionBackendRegistry._active_backend == default
        return attend_sparse(*args)

    monkeypatch.setattr(diffusers_layers, "attend_sparse", spy)
    family = by_name("cosmos")
    sparse_pipe, dense_pipe = family.build(0), family.build(0)
    for pipe in (sparse_pipe, dense_pipe):
        pipe.set_progress_bar_config(disable=True)
    few = {"num_inference_steps": 4}
    dense = family.call(dense_pipe, **few)
    with attached(sparse_pipe, threshold=0.5, warmup_steps=0):
        sparse = family.call(sparse_pipe, **few)
        with ThreadPoolExecutor(2) as pool:
            jobs = [
                pool.submit(lambda pipe: [family.call(pipe, **few) for _ in range(2)], pipe)
                for pipe in (sparse_pipe, dense_pipe)
            ]
            sparse_again, dense_again = [job.result() for job in jobs]
    assert _AttentionBackendRegistry._active_backend == default
    assert relative_error(sparse, dense) > 1e-3
    assert all(torch.equal(result, sparse) for result in sparse_again)
    assert all(torch.equal(result, dense) for result in dense_again)


@pytest.mark.parametrize("name", ["cosmos", "framepack", "hunyuan-video-1.5"])
def test_a_transformer_alone(name: str) -> None:
    # the classes of Cosmos and FramePack have no set_attn_processor of diffusers
    family = by_name(name)
    pipe, stock, dense = (subject(family).pipe, subject(family).stock, subject(family).dense)
    processor = XAttnProcessor(XAttnConfig(**{**SETTINGS, "threshold": 0.5, "warmup_steps": 5}))
    pipe.transformer.set_attn_processor(processor)
    sparse = run(family, pipe)
    pipe.transformer.set_attn_processor(None)
    first = 5 * family.forwards_per_step
    assert all(torch.equal(sparse.forwards[index], dense.forwards[index]) for index in range(first))
    assert relative_error(sparse.forwards[first], dense.forwards[first]) > 1e-3
    assert all(processors(family, pipe)[path] is processor for path, processor in stock.items())
