"""The attention function `xattention` of transformers: sparse prefill that at threshold 1 is SDPA, dense decoding."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.language_families import BUILDERS, LAYERS, SPECIAL, TEXT, build, prompt
from xattn_video import XAttnConfig, xattention
from xattn_video.integrations.transformers import (
    attention_stats,
    causal_layers,
    stop_xattention,
    use_xattention,
    xattention_forward,
)
from xattn_video.integrations.transformers.masks import dense_mask, is_range, range_mask, without_plain

import transformers  # isort: skip
from transformers.masking_utils import sdpa_mask  # isort: skip

# Blocks that tiny prompts have several of.
SMALL: dict[str, Any] = {"block_size": 16, "min_tokens": 0}
TOKENS = 100
ALL = pytest.mark.parametrize("family", list(BUILDERS))
# It asks for a whole mask where the cache is static, so such a prefill is dense there.
OLD = transformers.__version__.startswith("4.")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def padded(side: str, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three prompts of 100, 61 and 83 tokens as a batch, and its attention mask."""
    tokens, mask = prompt(3, TOKENS, seed), torch.ones(3, TOKENS, dtype=torch.int64)
    for item, length in enumerate((TOKENS, 61, 83)):
        padding = slice(0, TOKENS - length) if side == "left" else slice(length, TOKENS)
        tokens[item, padding], mask[item, padding] = TEXT["pad_token_id"], 0
    return tokens, mask


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def skip_old_chunks(family: str) -> None:
    if OLD and family == "qwen2-vl":
        pytest.skip("transformers 4 cannot take a chunk of a padded prompt for Qwen2-VL, with any attention")


def chunked(model: Any, tokens: Tensor, sizes: tuple[int, ...], mask: Tensor | None = None, **cache: Any) -> Tensor:
    """Logits of a prompt given in chunks of these sizes."""
    logits, begin, state = [], 0, cache.get("past_key_values")
    for size in sizes:
        part = tokens[:, begin : begin + size]
        seen = None if mask is None else mask[:, : begin + size]
        output = model(input_ids=part, attention_mask=seen, past_key_values=state, use_cache=True)
        logits.append(output.logits)
        state, begin = output.past_key_values, begin + size
    assert begin == tokens.shape[1]
    return torch.cat(logits, dim=1)


@contextmanager
def sparse(model: Any, **settings: Any) -> Iterator[Any]:
    """The model's statistics while it is sparse."""
    try:
        yield use_xattention(model, **{**SMALL, **settings})
    finally:
        stop_xattention(model)


@ALL
def test_with_threshold_1_the_logits_are_sdpas(family: str) -> None:
    model, tokens = build(family), prompt(1, TOKENS)
    dense = model(input_ids=tokens).logits
    with sparse(model, threshold=1) as stats:
        close(model(input_ids=tokens).logits, dense)
    assert stats.summary()["sparse_calls"] == LAYERS == stats.summary()["calls"]
    # What is skipped at a lower one shows.
    with sparse(model, threshold=0.3) as stats:
        assert (model(input_ids=tokens).logits - dense).abs().max() > 1e-3
    assert stats.summary()["sparse_density"] < 0.8
    assert torch.equal(model(input_ids=tokens).logits, dense)


@ALL
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_sparse_and_with_threshold_1_sdpas(family: str, side: str) -> None:
    model, (tokens, mask) = build(family), padded(side)
    dense = model(input_ids=tokens, attention_mask=mask).logits
    with sparse(model, threshold=1) as stats:
        logits = model(input_ids=tokens, attention_mask=mask).logits
    # What padding itself attends to is nobody's concern.
    close(logits[mask.bool()], dense[mask.bool()])
    assert stats.summary()["dense_calls"] == {}


@ALL
@pytest.mark.parametrize("side", ["left", "right", None])
def test_a_prompt_in_uneven_chunks_is_sparse_and_with_threshold_1_sdpas(family: str, side: str | None) -> None:
    if side is not None:
        skip_old_chunks(family)
    model = build(family)
    tokens, mask = (prompt(2, TOKENS), None) if side is None else padded(side)
    seen = torch.ones_like(tokens) if mask is None else mask
    sizes = (40, 17, 43)
    dense = chunked(model, tokens, sizes, mask)
    with sparse(model, threshold=1) as stats:
        logits = chunked(model, tokens, sizes, mask)
    close(logits[seen.bool()], dense[seen.bool()])
    assert stats.summary()["dense_calls"] == {}
    assert stats.summary()["sparse_calls"] == LAYERS * len(sizes)


@pytest.mark.parametrize("family", ["llama", "qwen2-vl"])
def test_the_end_of_a_prompt_is_dense_where_asked_padded_chunked_and_in_static_caches(family: str) -> None:
    skip_old_chunks(family)
    model, (tokens, mask) = build(family), padded("left")

    def cache() -> Any:
        return transformers.StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=160)

    def logits(sizes: tuple[int, ...], **state: Any) -> Tensor:
        return chunked(model, tokens, sizes, mask, **state)[mask.bool()]

    for sizes, state in (((TOKENS,), dict), ((40, 17, 43), dict), ((60, 40), lambda: {"past_key_values": cache()})):
        dense = logits(sizes, **state())
        # All queries are among the last so many.
        with sparse(model, threshold=0.3, dense_last=1000) as stats:
            close(logits(sizes, **state()), dense)
        if not (OLD and state()):
            assert stats.summary()["dense_calls"] == {}
            assert stats.summary()["sparse_density"] == 1
            with sparse(model, threshold=0.3, dense_last=8) as stats:
                assert (logits(sizes, **state()) - dense).abs().max() > 1e-3
            assert stats.summary()["sparse_density"] < 1


@ALL
def test_a_static_cache_is_sparse_and_with_threshold_1_sdpas(family: str) -> None:
    skip_old_chunks(family)
    model, (tokens, mask) = build(family), padded("left")

    def cache() -> Any:
        return transformers.StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=160)

    for sizes, seen in (((TOKENS,), None), ((TOKENS,), mask), ((60, 40), mask), ((60, 40), None)):
        shown = torch.ones_like(tokens) if seen is None else seen
        dense = chunked(model, tokens, sizes, seen, past_key_values=cache())
        with sparse(model, threshold=1) as stats:
            logits = chunked(model, tokens, sizes, seen, past_key_values=cache())
        close(logits[shown.bool()], dense[shown.bool()])
        assert stats.summary()["dense_calls"] == ({"mask": LAYERS * len(sizes)} if OLD else {})


@ALL
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_sixteen_tokens_are_generated_as_with_sdpa_and_decoded_densely(family: str, cache: str) -> None:
    model, (tokens, mask) = build(family), padded("left")
    options: dict[str, Any] = {
        "attention_mask": mask, "max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False,
        "cache_implementation": cache,
    }  # fmt: skip
    dense = model.generate(tokens, **options)
    with sparse(model, threshold=1) as stats:
        assert torch.equal(model.generate(tokens, **options), dense)
    summary = stats.summary()
    whole = {"mask": LAYERS} if OLD and cache == "static" else {}
    assert summary["sparse_calls"] == (0 if whole else LAYERS)
    assert summary["dense_calls"] == {"decode": LAYERS * 15, **whole}


def test_beam_search_and_assisted_decoding_are_sdpas() -> None:
    model, helper, tokens = build("llama"), build("llama"), prompt(1, TOKENS)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    for more in ({"num_beams": 3}, {"assistant_model": helper}, {"prompt_lookup_num_tokens": 3}):
        dense = model.generate(tokens, **options, **more)
        with sparse(model, threshold=1) as stats:
            assert torch.equal(model.generate(tokens, **options, **more), dense)
        summary = stats.summary()
        assert summary["sparse_calls"] == LAYERS
        assert set(summary["dense_calls"]) == {"decode"}


def positions(queries: int, before: int) -> dict[str, Any]:
    """How the mask interface is told which queries there are."""
    return (
        {"cache_position": torch.arange(before, before + queries)} if OLD else {"q_length": queries, "q_offset": before}
    )


def test_a_range_takes_no_memory_and_says_what_the_whole_mask_says() -> None:
    _, left = padded("left")
    for queries, before in ((TOKENS, 0), (40, 60), (17, 83)):
        asked: dict[str, Any] = {"batch_size": 3, **positions(queries, before), "kv_length": TOKENS}
        ranges = range_mask(**asked, attention_mask=left)
        assert is_range(ranges)
        assert ranges.untyped_storage().nbytes() == 3 * 4
        assert torch.equal(dense_mask(ranges, queries, TOKENS), sdpa_mask(**asked, attention_mask=left))
    assert range_mask(batch_size=3, **positions(TOKENS, 0), kv_length=TOKENS) is None


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("indexer", torch.nn.Identity(), "an index of its own that chooses keys"),
        ("sink_proj", torch.nn.Identity(), "attention sinks"),
        ("head_dim", 512, r"heads of 512 dimensions \(above 256\)"),
    ],
)
def test_attention_that_is_more_than_the_kernels_know_is_refused(name: str, value: Any, words: str) -> None:
    model = build("llama")
    setattr(model.model.layers[-1].self_attn, name, value)
    with pytest.raises(ValueError, match=words):
        use_xattention(model)


@pytest.mark.parametrize("name", ["sinks", "indices", "block_indices"])
def test_what_a_model_hands_to_its_attention_is_not_dropped(name: str) -> None:
    """Models that are set to `xattention` by name alone are checked where they attend."""
    model = build("llama")
    tensor = torch.zeros(1, 2, 8, 16)
    with pytest.raises(ValueError, match=f"LlamaAttention needs {name}, which xattention does not have"):
        xattention_forward(model.model.layers[0].self_attn, tensor, tensor, tensor, None, **{name: tensor})


@pytest.mark.skipif(not hasattr(transformers, "Gemma4ForCausalLM"), reason="this transformers has no Gemma 4")
@pytest.mark.parametrize("kept", [0, 1, 5, 20])
def test_layers_that_share_keys_may_drop_queries(kept: int) -> None:
    """Gemma 4 computes its later layers for the last queries alone, which then see more keys than there are queries."""
    kinds = ["sliding_attention", "full_attention"] * 2
    sizes = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": kinds, "head_dim": 16}
    sizes["global_head_dim"] = 16
    small = {"vocab_size_per_layer_input": TEXT["vocab_size"], "hidden_size_per_layer_input": 8, "sliding_window": 512}
    config = transformers.Gemma4TextConfig(**{**TEXT, **sizes, **small})
    torch.manual_seed(0)
    model, tokens = transformers.Gemma4ForCausalLM(config).eval(), prompt(1, TOKENS)
    dense = model(input_ids=tokens, logits_to_keep=kept).logits
    with sparse(model, threshold=1):
        close(model(input_ids=tokens, logits_to_keep=kept).logits, dense)


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_checkpoints_is_dense_in_both_passes(reentrant: bool) -> None:
    """A checkpointed forward runs without gradients first; sparse, it would be another function than its gradient's."""
    gradients = []
    for threshold in (None, 0.3):
        model = build("llama").train()
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": reentrant})
        if threshold is not None:
            stats = use_xattention(model, **SMALL, threshold=threshold)
        with torch.enable_grad():
            model.enable_input_require_grads()
            model(input_ids=prompt(1, TOKENS), labels=prompt(1, TOKENS), use_cache=False).loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    assert stats.summary()["sparse_calls"] == 0
    # transformers 4 makes a whole mask where activations are checkpointed
    assert ("training" in stats.summary()["dense_calls"]) == (reentrant and not OLD)
    torch.testing.assert_close(*gradients)


def test_a_plain_prompt_needs_no_mask_where_layers_share_keys() -> None:
    """Its range says no more than "causal": a dense call needs no mask of all pairs, and what was cut off one does."""
    config = transformers.LlamaConfig(**TEXT)
    config.num_kv_shared_layers = 2
    asked: dict[str, Any] = {"batch_size": 1, **positions(TOKENS, 0), "kv_length": TOKENS, "config": config}
    ranges = range_mask(**asked)
    assert is_range(ranges)
    assert without_plain(ranges, TOKENS) is None
    cut = ranges[:, :, -5:]
    assert without_plain(cut, 5) is cut
    assert without_plain(ranges, 5) is ranges
    _, left = padded("left")
    padding = range_mask(**{**asked, "batch_size": 3}, attention_mask=left)
    assert without_plain(padding, TOKENS) is padding


def test_a_mask_of_numbers_is_no_range() -> None:
    """Of the shape of a mask for every query: transformers' own attention refuses integers there."""
    assert not is_range(torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.int32))
    assert not is_range(torch.ones(1, TOKENS, dtype=torch.int32))


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads one by one."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("before", [0, 60])
def test_the_mask_of_a_padded_prompt_is_read_at_once(before: int) -> None:
    """Each read makes the host wait for the GPU; before transformers 5 the position of a chunk is one more."""
    _, left = padded("left")
    asked: dict[str, Any] = {"batch_size": 3, **positions(TOKENS - before, before), "kv_length": TOKENS}
    with Reads() as reads:
        assert is_range(range_mask(**asked, attention_mask=left))
    assert reads.count <= ("cache_position" in asked)


@pytest.mark.parametrize("window", [TOKENS - 1, 32])
def test_a_window_that_cuts_keys_off_is_dense_and_says_so(window: int) -> None:
    config = transformers.MistralConfig(**{**TEXT, "sliding_window": window})
    torch.manual_seed(0)
    model, tokens = transformers.MistralForCausalLM(config).eval(), prompt(1, TOKENS)
    dense = model(input_ids=tokens).logits
    with sparse(model, threshold=0.3) as stats:
        assert torch.equal(model(input_ids=tokens).logits, dense)
    assert stats.summary()["dense_calls"] == {"sliding_window": LAYERS}
    # One that a prompt fits into is as good as none.
    with sparse(model, threshold=0.3) as stats:
        model(input_ids=tokens[:, :window])
    assert stats.summary()["dense_calls"] == {}


def test_of_alternating_layers_only_those_with_a_window_are_dense() -> None:
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(**{**TEXT, "head_dim": 12, "sliding_window": 24, "layer_types": kinds})
    torch.manual_seed(0)
    model, tokens = transformers.Gemma3ForCausalLM(config).eval(), prompt(1, TOKENS)
    dense = model(input_ids=tokens).logits
    with sparse(model, threshold=1) as stats:
        close(model(input_ids=tokens).logits, dense)
    by_layer = stats.summary()
    assert (by_layer["dense_calls"], by_layer["sparse_calls"]) == ({"sliding_window": 1}, 1)


def test_padding_with_holes_and_packed_prompts_are_dense_and_right() -> None:
    model, (tokens, mask) = build("llama"), padded("left")
    mask[0, 30:40] = 0
    packed = torch.cat([torch.arange(60), torch.arange(40)])[None]
    for inputs in ({"input_ids": tokens, "attention_mask": mask}, {"input_ids": tokens[:1], "position_ids": packed}):
        dense = model(**inputs, use_cache=False).logits
        with sparse(model, threshold=0.3) as stats:
            assert torch.equal(model(**inputs, use_cache=False).logits, dense)
        assert stats.summary()["dense_calls"] == {"mask": LAYERS}


def test_what_is_computed_is_xattention_with_the_models_own_scale_and_heads() -> None:
    model, (tokens, mask) = build("qwen3"), padded("left")
    seen = []
    attention = next(iter(causal_layers(model).values()))
    with sparse(model):
        name = model.config._attn_implementation
    stock = transformers.AttentionInterface()[name]

    def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        output = stock(module, query, key, value, attention_mask, **kwargs)
        if module is attention:
            seen.append((query, key, value, kwargs["scaling"], output[0]))
        return output

    transformers.AttentionInterface.register(name, spy)
    try:
        with sparse(model, threshold=0.5, stride=4):
            model(input_ids=tokens, attention_mask=mask)
    finally:
        transformers.AttentionInterface.register(name, stock)
    ((query, key, value, scale, output),) = seen
    assert (query.shape[1], key.shape[1]) == (4, 2)
    start = torch.tensor([0, TOKENS - 61, TOKENS - 83])
    expected = xattention(
        query, key, value, XAttnConfig(stride=4, threshold=0.5, **SMALL), causal=True, scale=scale, kv_start=start
    )
    assert torch.equal(output, expected.transpose(1, 2))


def test_the_vision_tower_stays_as_it_is() -> None:
    model = build("qwen2-vl")
    merged = model.config.vision_config.spatial_merge_size**2
    grid = torch.tensor([[4, 4, 4]])
    pixels = torch.randn(64, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    video = torch.full((1, 64 // merged), SPECIAL["video_token_id"])
    tokens = torch.cat([prompt(1, 40), torch.tensor([[92]]), video, torch.tensor([[93]]), prompt(1, 40, 1)], dim=1)
    kinds = (tokens == SPECIAL["video_token_id"]).int() * 2
    inputs = {"input_ids": tokens, "pixel_values_videos": pixels, "video_grid_thw": grid, "mm_token_type_ids": kinds}
    towers: list[Tensor] = []
    handle = model.model.visual.register_forward_hook(lambda *call: towers.append(call[2][0]))
    dense = model(**inputs).logits
    with sparse(model, threshold=1) as stats:
        assert model.config.vision_config._attn_implementation == "sdpa"
        close(model(**inputs).logits, dense)
    handle.remove()
    assert torch.equal(towers[0], towers[1])
    assert stats.summary()["calls"] == LAYERS


def test_two_models_and_a_copy_have_settings_and_counts_of_their_own() -> None:
    first, second, tokens = build("llama"), build("qwen3"), prompt(1, TOKENS)
    one = use_xattention(first, **SMALL, threshold=0.3)
    two = use_xattention(second, **SMALL, threshold=1.0)
    copied = copy.deepcopy(first)
    first(input_ids=tokens)
    second(input_ids=tokens)
    assert one.summary()["sparse_density"] < 0.8
    assert two.summary()["sparse_density"] == 1.0
    own = attention_stats(copied)
    assert own is not None
    assert own.summary()["calls"] == 0
    copied(input_ids=tokens)
    assert own.summary()["sparse_density"] == one.summary()["sparse_density"]
    assert one.summary()["calls"] == LAYERS
    stop_xattention(first)
    assert attention_stats(first) is None
    assert attention_stats(second) is two


def test_another_model_of_the_same_configuration_object_stays_dense() -> None:
    config = transformers.LlamaConfig(**TEXT)
    torch.manual_seed(0)
    first, second = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    # Long enough to be sparse by the settings that a model has which was loaded under the name.
    tokens = prompt(1, 1300)
    dense = second(input_ids=tokens).logits
    with sparse(first, threshold=0.3) as stats:
        assert torch.equal(second(input_ids=tokens).logits, dense)
        assert stats.summary()["calls"] == 0
        # One that asks for itself is sparse, and both may stop.
        with sparse(second, threshold=0.3) as own:
            assert not torch.equal(second(input_ids=tokens).logits, dense)
        assert own.summary()["sparse_calls"] == LAYERS


def test_layers_heads_and_short_prompts_are_set_one_by_one() -> None:
    model, tokens = build("llama"), prompt(1, TOKENS)

    def densities(**settings: Any) -> list[float]:
        with sparse(model, **settings) as stats:
            model(input_ids=tokens)
        return list(stats.summary()["density_by_layer"].values())

    low = densities(threshold=0.3)
    assert max(low) < 0.7
    for settings in ({"threshold": 1, "layer_thresholds": {-1: 0.3}}, {"threshold": 0.3, "dense_layers": ("*.0.*",)}):
        first, second = densities(**settings)
        assert (first, second < 0.7) == (1.0, True)
    heads = densities(threshold=0.3, layer_thresholds={0: (1.0, 0.3, 0.3, 0.3)})
    assert low[0] < heads[0] < 1
    with sparse(model, min_tokens=TOKENS + 1) as stats:
        model(input_ids=tokens)
    assert stats.summary()["dense_calls"] == {"min_tokens": LAYERS}


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("Gemma2", {"head_dim": 12}, "a soft cap on its logits, which xattention does not know"),
        ("GptOss", {"head_dim": 12, "num_local_experts": 2, "num_experts_per_tok": 1}, "has attention sinks"),
        (
            "DeepseekV3",
            {
                "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 2, "n_group": 1, "topk_group": 1,
                "num_experts_per_tok": 1, "first_k_dense_replace": 2,
            },
            "values of 8 dimensions and keys of 16",
        ),
    ],
)  # fmt: skip
def test_what_the_kernels_do_not_know_is_refused_before_any_prompt(
    name: str, more: dict[str, Any], message: str
) -> None:
    config = getattr(transformers, f"{name}Config")(**{**TEXT, **more})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        use_xattention(model)
    assert model.config._attn_implementation == before


def test_settings_that_do_not_fit_and_models_without_causal_attention_are_refused() -> None:
    model = build("llama")
    for settings, message in (
        ({"threshold": (0.9, 0.9)}, "one value for each of 4 heads, got 2"),
        ({"layer_thresholds": {2: 0.9}}, "layers below 2, got 2"),
        ({"layer_thresholds": {"0": 0.9}}, "by the number of a layer, got '0'"),
        ({"layer_thresholds": {0.5: 0.9}}, r"by the number of a layer, got 0\.5"),
        ({"layer_thresholds": {0: 1.5}}, "threshold must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            use_xattention(model, **settings)
        assert model.config._attn_implementation == "sdpa"
    bert = transformers.BertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    encoder = transformers.BertModel(bert)
    with pytest.raises(ValueError, match="BertModel has no causal text attention"):
        use_xattention(encoder)
    assert encoder.config._attn_implementation == "sdpa"
    # Causal, but its attention is of a class and not of a name.
    config = transformers.FalconConfig(vocab_size=32, hidden_size=48, num_hidden_layers=1, num_attention_heads=4)
    fixed = transformers.FalconForCausalLM(config)
    before = fixed.config._attn_implementation
    with pytest.raises(ValueError, match="FalconForCausalLM has no causal text attention that can be set"):
        use_xattention(fixed)
    assert fixed.config._attn_implementation == before
    assert attention_stats(fixed) is None


def test_training_is_dense_with_its_reason_and_gives_gradients() -> None:
    model, tokens = build("llama").train(), prompt(1, TOKENS)
    with sparse(model, threshold=0.3) as stats, torch.enable_grad():
        model(input_ids=tokens, labels=tokens).loss.backward()
    assert stats.summary()["dense_calls"] == {"autograd": LAYERS}
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_training_is_dense_where_the_backend_cannot_run() -> None:
    """As a reentrant checkpoint asks, whose first pass has no gradients."""
    model = build("llama").train()
    with sparse(model, threshold=0.3, backend="fa4") as stats, torch.no_grad():
        model(input_ids=prompt(1, TOKENS))
    assert stats.summary()["dense_calls"] == {"training": LAYERS}


def test_a_text_model_that_is_deeper_inside_is_named_and_the_towers_beside_it_stay() -> None:
    with torch.device("meta"):
        model = transformers.Qwen2_5OmniForConditionalGeneration(transformers.Qwen2_5OmniConfig())
    with pytest.raises(ValueError, match=r"use xattention on that part, model\.thinker"):
        use_xattention(model)
    parts = (model.thinker.config.text_config, model.thinker.config.vision_config, model.talker.config)
    assert {part._attn_implementation for part in parts} == {"sdpa"}
    use_xattention(model.thinker)
    assert [part._attn_implementation == "sdpa" for part in parts] == [False, True, True]


def test_attention_sinks_and_soft_caps_are_refused_rather_than_left_out() -> None:
    config = transformers.Gemma2Config(**{**TEXT, "head_dim": 12})
    model = transformers.Gemma2ForCausalLM(config).eval()
    # By name alone nobody looks before the first prompt.
    model.set_attn_implementation("xattention")
    with pytest.raises(ValueError, match="needs softcap"):
        model(input_ids=prompt(1, TOKENS))


def test_a_model_loads_with_the_attentions_name(tmp_path: Any) -> None:
    model, tokens = build("qwen2-vl"), prompt(1, 1200)
    for module in causal_layers(model).values():
        module.q_proj.weight.mul_(8)
    model.save_pretrained(tmp_path)
    cls = transformers.Qwen2VLForConditionalGeneration
    loaded = cls.from_pretrained(tmp_path, attn_implementation={"text_config": "xattention"}).eval()
    assert loaded.config.text_config._attn_implementation == "xattention"
    assert loaded.config.vision_config._attn_implementation == "sdpa"
    # Without settings of its own it has those of the preset.
    with sparse(model, **vars(XAttnConfig.preset("language"))):
        expected = model(input_ids=tokens).logits
    close(loaded(input_ids=tokens).logits, expected)
    assert (expected - model(input_ids=tokens).logits).abs().max() > 1e-4
    stats = use_xattention(loaded, **SMALL)
    loaded(input_ids=tokens)
    assert stats.summary()["sparse_calls"] == LAYERS
