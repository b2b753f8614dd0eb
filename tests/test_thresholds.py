"""Thresholds for every layer and head: the file, the setting made of it, and the models that take it or refuse it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.language_families import build, prompt
from tests.tiny.wan_family import T2V, T2V_A14B, tiny_transformer
from xattn_video import HeadThresholds, XAttnConfig, XAttnProcessor, xattention
from xattn_video.integrations.diffusers.models import find_self_attention
from xattn_video.integrations.transformers import causal_layers, stop_xattention, use_xattention
from xattn_video.ops import Call
from xattn_video.thresholds import LayerThresholds

SMALL: dict[str, Any] = {"stride": 8, "block_size": 16, "min_tokens": 0}


def thresholds(
    values: dict[str, Sequence[float]] | None = None, model_class: str = "WanTransformer3DModel", **changes: Any
) -> HeadThresholds:
    """Thresholds by layer as a file says them, with densities and errors that nothing depends on."""
    values = {"transformer.blocks.0.attn1": (0.5, 1.0)} if values is None else values
    layers = tuple(
        LayerThresholds(name, tuple(map(float, of_heads)), (0.25,) * len(of_heads), (0.125,) * len(of_heads))
        for name, of_heads in values.items()
    )
    made = HeadThresholds(
        model="demo",
        model_class=model_class,
        stride=8,
        block_size=16,
        budget=0.05,
        calibrated_on="two prompts",
        versions=(("torch", "2.13.0"),),
        layers=layers,
    )
    return replace(made, **changes)


def written(folder: Path, given: HeadThresholds | None = None) -> Path:
    path = folder / "thresholds.json"
    path.write_text((given or thresholds()).to_json(), encoding="utf-8")
    return path


# ---- the file


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    many = thresholds({f"transformer.blocks.{layer}.attn1": (0.9, 0.81, 1.0) for layer in range(12)})
    path = written(tmp_path, many)
    assert HeadThresholds.load(path) == many
    assert HeadThresholds.load(str(path)).of_layer("transformer.blocks.3.attn1") == (0.9, 0.81, 1.0)
    # People read it: a line for each layer.
    assert sum('"name": "transformer.' in line for line in path.read_text().splitlines()) == 12


def broken(field: str, value: Any, layer: bool = False) -> str:
    """The text of a file in which one field has another value; None takes the field out."""
    document = thresholds().to_dict()
    target = document["layers"][0] if layer else document
    if value is None:
        del target[field]
    else:
        target[field] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ("[1, 2]", "the document must be an object with the fields"),
        (broken("format", 2), "format must be 1, got 2"),
        (broken("stride", None), "the document has no field 'stride'"),
        (broken("strid", 8), "the document has an unknown field 'strid'"),
        (broken("stride", 0), "stride must be an integer of 1 or more, got 0"),
        (broken("stride", True), "stride must be an integer of 1 or more, got True"),
        (broken("block_size", "128"), "block_size must be an integer of 1 or more, got '128'"),
        (broken("budget", -1), "budget must be a number of 0 or more, got -1"),
        (broken("budget", 10**400), "budget must be a number of 0 or more, got 1000"),
        (broken("model", ""), "model must be a text, got ''"),
        (broken("versions", []), r"versions must be an object of texts, got \[\]"),
        (broken("versions", {"torch": 2}), "versions.torch must be a text, got 2"),
        (broken("layers", []), r"layers must be a list of at least one layer, got \[\]"),
        (broken("layers", [{}]), r"layers\[0\] has no field 'density'"),
        (broken("layers", thresholds().to_dict()["layers"] * 2), "different names, got 'transformer.blocks.0.attn1'"),
        (broken("threshold", [0.5, float("nan")], True), "every number must be finite, got NaN"),
        (broken("error", [0.1, float("inf")], True), "every number must be finite, got Infinity"),
        (broken("threshold", [0.5, 0], True), r"layers\[0\].threshold\[1\] must be above 0, got 0"),
        (broken("threshold", [0.5, 1.5], True), r"layers\[0\].threshold\[1\] must be a number from 0 to 1, got 1.5"),
        (broken("threshold", [0.5, "1"], True), r"layers\[0\].threshold\[1\] must be a number from 0 to 1, got '1'"),
        (broken("threshold", 0.9, True), r"layers\[0\].threshold must be a list of at least one number, got 0.9"),
        (broken("density", [0.5], True), r"layers\[0\].density must have as many values as layers\[0\].threshold, 2"),
        (broken("density", [-0.5, 0], True), r"layers\[0\].density\[0\] must be a number from 0 to 1, got -0.5"),
    ],
)
def test_a_broken_file_is_refused_by_file_field_and_value(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=words) as refused:
        XAttnConfig(threshold=path, **SMALL)
    assert str(path) in str(refused.value)
    assert len(str(refused.value)) < 400


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"threshold file .*none\.json: No such file"):
        XAttnConfig(threshold=tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"threshold file .*: Is a directory"):
        XAttnConfig(threshold=tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be JSON"):
        XAttnConfig(threshold=tmp_path / "bytes")
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(ValueError, match=r"must be at most 16,777,216 bytes"):
        XAttnConfig(threshold=tmp_path / "huge.json")
    # A number in quotes is no file, even where there is one of that name.
    with pytest.raises(TypeError, match=r"got the text '0\.9'"):
        XAttnConfig(threshold="0.9")


def test_a_dict_may_hold_what_a_file_may_not() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="budget must be a number"):
            HeadThresholds.from_dict({**thresholds().to_dict(), "budget": value})


# ---- the setting


def test_a_configuration_keeps_what_the_file_said(tmp_path: Path) -> None:
    path = written(tmp_path)
    config = XAttnConfig(threshold=path, **SMALL)
    same = XAttnConfig(threshold=str(path), **SMALL)
    path.unlink()
    assert config == same
    assert hash(config) == hash(same)
    assert config.threshold == thresholds()
    assert XAttnConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    # a prompt does not show the numbers of all layers
    assert f"{len(thresholds().layers)} layers" in repr(config)
    assert "0." not in repr(config).replace(f"mean {thresholds().mean:.2f}", "")
    assert config.replace(warmup_steps=1).threshold == thresholds()
    assert config.replace(threshold=0.5).threshold == 0.5
    assert config.layer_threshold("transformer.blocks.0.attn1") == (0.5, 1.0)
    with pytest.raises(ValueError, match=r"no values for the layer 'blocks.1'; thresholds of the model demo"):
        config.layer_threshold("blocks.1")


def test_other_thresholds_have_another_label() -> None:
    swapped = thresholds({"transformer.blocks.0.attn1": (1.0, 0.5)})
    told = [thresholds(), swapped, thresholds(budget=0.06), thresholds(model="other"), thresholds(calibrated_on="x")]
    labels = {XAttnConfig(threshold=one, **SMALL).label() for one in told} | {
        XAttnConfig(threshold=one, **SMALL).label() for one in (0.75, (0.5, 1.0), (1.0, 0.5))
    }
    assert len(labels) == 8
    assert all(label.startswith("xattn-s8-t0.75") for label in labels)
    assert not any(set(label) & set("/\\ :*") for label in labels)


@pytest.mark.parametrize(("name", "value"), [("stride", 4), ("block_size", 32)])
def test_other_settings_than_the_files_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be .* thresholds of demo .*, {SMALL[name]}, got {value}"):
        XAttnConfig(threshold=thresholds(), **{**SMALL, name: value})
    config = XAttnConfig(threshold=thresholds(), **SMALL)
    with pytest.raises(ValueError, match=f"{name} must be"):
        config.replace(**{name: value})


def test_a_single_call_has_no_layer() -> None:
    query = torch.randn(1, 2, 64, 32)
    with pytest.raises(ValueError, match="threshold must be a number or one value per head for a single"):
        xattention(query, query, query, XAttnConfig(threshold=thresholds(), **SMALL))


# ---- diffusers


def of_pipeline(pipe: Any, *by_layer: Sequence[float], **changes: Any) -> HeadThresholds:
    """Thresholds for the layers of a pipeline's transformers, in their order; the last one goes on."""
    names = [
        f"{name}.{path}"
        for name in ("transformer", "transformer_2")
        if getattr(pipe, name, None) is not None
        for path in find_self_attention(getattr(pipe, name))
    ]
    values = [by_layer[min(index, len(by_layer) - 1)] for index in range(len(names))]
    return thresholds(dict(zip(names, values, strict=True)), **changes)


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = T2V.build(0)
    made.set_progress_bar_config(disable=True)
    return made


def attached(pipe: Any, given: HeadThresholds, **settings: Any) -> XAttnProcessor:
    processor = XAttnProcessor(XAttnConfig(threshold=given, warmup_steps=1, **SMALL), **settings)
    pipe.set_attn_processor(processor)
    return processor


def test_thresholds_of_1_make_the_dense_video(pipe: Any) -> None:
    pipe.set_attn_processor(None)
    dense = T2V.call(pipe)
    processor = attached(pipe, of_pipeline(pipe, (1, 1)))
    torch.testing.assert_close(T2V.call(pipe), dense, rtol=1e-4, atol=1e-4)
    assert processor.stats.summary()["sparse_density"] == 1
    attached(pipe, of_pipeline(pipe, (0.2, 0.2)))
    assert (T2V.call(pipe) - dense).abs().max() > 1e-2


def test_every_layer_and_head_has_its_own(pipe: Any) -> None:
    seen: dict[str, Call] = {}
    processor = attached(pipe, of_pipeline(pipe, (1, 1), (0.2, 1)), on_call=seen.__setitem__)
    T2V.call(pipe)
    sparse = {
        layer: steps[1] for layer, steps in processor.stats.summary()["density_by_layer_and_step"].items()
    }  # the first sparse step
    assert list(sparse) == ["transformer.blocks.0.attn1", "transformer.blocks.1.attn1"] == list(seen)
    assert sparse["transformer.blocks.0.attn1"] == 1
    assert 0.5 < sparse["transformer.blocks.1.attn1"] < 1
    # The very thresholds of the file, in the order of the heads.
    assert seen["transformer.blocks.1.attn1"].threshold.tolist() == [0.2, 1]
    assert seen["transformer.blocks.1.attn1"].query.shape[1] == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model_class": "HunyuanVideoTransformer3DModel"}, "class WanTransformer3DModel, got thresholds of the model"),
        ({"layers": thresholds().layers}, "which has 2, got 1, and transformer.blocks.1.attn1 is only in one of them"),
        ({"layers": thresholds({"blocks.0.attn1": (1, 1), "blocks.1.attn1": (1, 1)}).layers}, "which has 2, got 0"),
    ],
)
def test_another_models_thresholds_are_refused_and_nothing_is_attached(
    pipe: Any, given: dict[str, Any], words: str
) -> None:
    pipe.set_attn_processor(None)
    with pytest.raises(ValueError, match=words) as refused:
        attached(pipe, of_pipeline(pipe, (1, 1), **given))
    assert "thresholds of the model demo" in str(refused.value)
    assert not any(isinstance(module, XAttnProcessor) for module in pipe.transformer.attn_processors.values())
    assert T2V.call(pipe).isfinite().all()


def test_another_number_of_heads_is_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"threshold of transformer.blocks.0.attn1 must have .* 2 heads, got 3; "):
        attached(pipe, of_pipeline(pipe, (1, 1, 1)))


def test_two_transformers_have_thresholds_each() -> None:
    pipe = T2V_A14B.build(0)
    given = of_pipeline(pipe, (1, 1), (1, 1), (0.3, 0.3))
    assert len(given.layers) == 4
    attached(pipe, given)
    # The second transformer's are of no use to a pipeline without one, and its own are needed.
    with pytest.raises(ValueError, match="which has 2, got 0"):
        attached(pipe, replace(given, layers=given.layers[:2]))
    # One transformer alone is called `transformer`.
    model: nn.Module = tiny_transformer()
    model.set_attn_processor(XAttnProcessor(XAttnConfig(threshold=given, **SMALL)))


# ---- transformers


def of_model(model: Any, *by_layer: Sequence[float], **changes: Any) -> HeadThresholds:
    paths = list(causal_layers(model))
    values = [by_layer[min(index, len(by_layer) - 1)] for index in range(len(paths))]
    return thresholds(dict(zip(paths, values, strict=True)), **{"model_class": type(model).__name__, **changes})


@pytest.mark.parametrize("family", ["qwen2-vl", "llama"])
@torch.no_grad()
def test_a_language_model_takes_its_own(family: str) -> None:
    model, tokens = build(family), prompt(1, 100)
    heads = model.config.get_text_config().num_attention_heads
    dense = model(input_ids=tokens).logits
    use_xattention(model, threshold=of_model(model, (1,) * heads), **SMALL)
    torch.testing.assert_close(model(input_ids=tokens).logits, dense, rtol=1e-4, atol=1e-5)
    seen: dict[str, Call] = {}
    given = of_model(model, (0.3,) + (1,) * (heads - 1), (1,) * heads)
    stats = use_xattention(model, threshold=given, on_call=seen.__setitem__, **SMALL)
    assert (model(input_ids=tokens).logits - dense).abs().max() > 1e-4
    densities = list(stats.summary()["density_by_layer"].values())
    assert densities[0] < 1
    assert set(densities[1:]) == {1.0}
    assert list(seen) == [layer.name for layer in given.layers]
    assert seen[given.layers[0].name].mask.causal
    # A layer's own setting comes first.
    stats = use_xattention(model, threshold=given, layer_thresholds={0: 1.0}, **SMALL)
    model(input_ids=tokens)
    assert stats.summary()["density"] == 1
    stop_xattention(model)


def test_a_language_model_refuses_anothers() -> None:
    model = build("qwen2-vl")
    heads = model.config.get_text_config().num_attention_heads
    given = of_model(model, (1,) * heads)
    for wrong, words in (
        (replace(given, model_class="LlamaForCausalLM"), "class Qwen2VLForConditionalGeneration, got thresholds of"),
        (replace(given, layers=given.layers[:-1]), "is only in one of them"),
        (of_model(model, (1,) * (heads + 1)), f"each of {heads} heads, got {heads + 1}"),
    ):
        with pytest.raises(ValueError, match=words):
            use_xattention(model, threshold=wrong, **SMALL)
        assert not hasattr(model, "_xattn_video")
