"""A generation without a sparse attention call is warned of once, with the reason and the setting that changes it."""

from __future__ import annotations

import copy
import gc
import linecache
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny.wan_family import TEXT_DIM, TOKENS, tiny_transformer
from xattn_video import XAttnProcessor
from xattn_video.integrations.diffusers import NothingSparse

SETTINGS: dict[str, Any] = {"stride": 4, "block_size": 32, "min_tokens": 64, "threshold": 0.5, "warmup_steps": 2}
CALL = "model(latents, torch.tensor([999]), text)"


@pytest.fixture(scope="module")
def shared_model() -> Any:
    torch.manual_seed(0)
    return tiny_transformer()


@pytest.fixture
def model(shared_model: Any) -> Iterator[Any]:
    yield shared_model
    shared_model.set_attn_processor(None)


@pytest.fixture
def said() -> Iterator[list[Any]]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", NothingSparse)
        yield seen


def texts(said: list[Any]) -> list[str]:
    """The texts of the warnings, each of which points to the line that runs the model."""
    found = [warning for warning in said if warning.category is NothingSparse]
    assert {linecache.getline(one.filename, one.lineno).strip() for one in found} <= {CALL}
    return [str(warning.message) for warning in found]


def generate(model: Any, processor: XAttnProcessor, steps: int, *, told: bool = True, run: int | None = None) -> None:
    """A loop of one's own: `steps` steps with two forwards each, of which `run` are run."""
    latents, text = torch.zeros(1, 16, 5, 14, 18), torch.zeros(1, 6, TEXT_DIM)
    processor.start_generation(steps if told else None)
    for step in range(steps if run is None else run):
        processor.step(step)
        for _ in range(2):
            model(latents, torch.tensor([999]), text)


def test_each_generation_is_told_under_pythons_usual_filters(model: Any) -> None:
    processor = XAttnProcessor(**SETTINGS | {"warmup_steps": 5})
    model.set_attn_processor(processor)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(2):
            generate(model, processor, 1)
    assert len(texts(seen)) == 2


CASES = {
    "warm-up": ({"warmup_steps": 5}, 4, ["4 of 4 steps are dense", "warmup_steps=5", "warmup=0.25"]),
    "a share": ({"warmup_steps": 5, "warmup": 0.9}, 4, ["4 of 4 steps are dense", "warmup=0.9"]),
    "one step": ({"warmup": 0.25}, 1, ["1 of 1 steps are dense", "warmup_steps=0"]),
    "both ends": ({"last_steps": 3}, 4, ["4 of 4 steps are dense", "warmup_steps=2", "last_steps=3"]),
    "short": ({"min_tokens": 1024}, 4, [f"{TOKENS} keys", "fewer than min_tokens=1024"]),
    "short but for a layer": ({"min_tokens": 1024, "dense_layers": (1,)}, 4, ["min_tokens=1024"]),
    "refreshes": ({"residual": "int4", "refresh": (0, 1)}, 4, ["residual", "refresh_every", "fewer steps in refresh"]),
    "some are sparse": ({}, 3, None),
    "only the last layer": ({"dense_layers": (0,)}, 3, None),
    "refreshes and sparse": ({"residual": "int4", "refresh": (0,)}, 4, None),
    # these are asked for
    "threshold 1": ({"threshold": 1.0}, 4, None),
    "all layers": ({"dense_layers": ("*",)}, 4, None),
}


@pytest.mark.parametrize(("settings", "steps", "words"), CASES.values(), ids=CASES.keys())
def test_what_is_said_of_a_generation(
    model: Any, said: list[Any], settings: dict[str, Any], steps: int, words: list[str] | None
) -> None:
    processor = XAttnProcessor(**{**SETTINGS, **settings})
    model.set_attn_processor(processor)
    with torch.no_grad():
        generate(model, processor, steps)
        generate(model, processor, steps)
    summary = processor.stats.summary()
    assert (summary["sparse_calls"] == 0) == (words is not None or settings.get("dense_layers") == ("*",))
    # one for each of two generations, whatever their layers and forwards
    assert len(texts(said)) == (0 if words is None else 2)
    assert all(word in text for word in words or () for text in texts(said))


def test_a_gradient_is_named_with_what_turns_it_off(model: Any, said: list[Any]) -> None:
    processor = XAttnProcessor(**SETTINGS)
    model.set_attn_processor(processor)
    generate(model, processor, 3)
    assert processor.stats.summary()["dense_calls"].keys() == {"warmup", "autograd"}
    (text,) = texts(said)
    assert "torch.no_grad()" in text


@torch.no_grad()
def test_a_plan_without_sparse_steps_is_told_at_its_start(model: Any, said: list[Any]) -> None:
    processor = XAttnProcessor(**SETTINGS)
    model.set_attn_processor(processor)
    generate(model, processor, 2, run=1)
    assert len(texts(said)) == 1


@torch.no_grad()
def test_a_generation_that_is_interrupted_in_its_warm_up_is_none_to_warn_of(model: Any, said: list[Any]) -> None:
    processor = XAttnProcessor(**SETTINGS)
    model.set_attn_processor(processor)
    generate(model, processor, 8, run=2)
    generate(model, processor, 8)
    assert texts(said) == []
    # one that could have been sparse is one to warn of
    processor = XAttnProcessor(**{**SETTINGS, "min_tokens": 1024})
    model.set_attn_processor(processor)
    generate(model, processor, 8, run=3)
    model.set_attn_processor(None)
    assert len(texts(said)) == 1


@torch.no_grad()
@pytest.mark.parametrize("end", ["another", "detached", "gone"])
def test_where_nobody_knows_the_last_step_the_end_is_seen_later(model: Any, said: list[Any], end: str) -> None:
    own = copy.deepcopy(model)
    processor = XAttnProcessor(**{**SETTINGS, "warmup_steps": 5})
    own.set_attn_processor(processor)
    generate(own, processor, 3, told=False)
    assert texts(said) == []
    if end == "another":
        generate(own, processor, 6, told=False)
    elif end == "detached":
        own.set_attn_processor(None)
    else:
        del own, processor
        gc.collect()
    (text,) = texts(said)
    assert "all its steps were in the warm-up" in text
    assert "warmup_steps than 5" in text


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_it_is_found_without_reading_from_the_device(model: Any, said: list[Any]) -> None:
    processor = XAttnProcessor(**{**SETTINGS, "min_tokens": 1024})
    model.set_attn_processor(processor)
    with Reads() as reads:
        generate(model, processor, 3)
    assert len(texts(said)) == 1
    assert reads.number == 0
