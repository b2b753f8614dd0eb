"""Text after a video begins behind all of it, as the models were trained, in every release of transformers."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from tests.language_families import build
from tests.test_watcher import single
from xattn_video_pipelines.demo import stories, watcher
from xattn_video_pipelines.demo.training.train_watcher import Batch, tokenise
from xattn_video_pipelines.qa.qwen_positions import apart, repair_positions


@pytest.fixture(scope="module")
def model() -> Any:
    built = watcher.build_watcher(seed=0).eval()
    repair_positions(built)
    return built


@pytest.mark.parametrize("scenes", [1, 4])
def test_a_question_about_a_long_video_stands_where_training_put_it(model: Any, scenes: int) -> None:
    processor = watcher.build_processor()
    rng = np.random.default_rng(0)
    story = stories.draw_story(rng, scenes, "training")
    asked = stories.draw_question(rng, story, "colour")
    inputs = single(processor, story, asked.question)
    trained = tokenise(processor.tokenizer, Batch([story], [[asked]], [0]), (4 * scenes, 8, 8))
    seen = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw")}
    with torch.no_grad():
        alone = model(**inputs).logits[0, -1]
        wanted = model(
            input_ids=trained.ids, position_ids=trained.positions, attention_mask=trained.mask, use_cache=False, **seen
        ).logits[0][trained.labels[0] != -100]
        torch.testing.assert_close(alone, wanted[0], rtol=1e-4, atol=1e-4)
        # The tokens that are generated follow the question.
        answer = processor.tokenizer(asked.answer, return_tensors="pt").input_ids[0]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer[None]], dim=1)
        told: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
        made = model.generate(**{**inputs, **_longer(inputs)}, max_new_tokens=1, **told)
    torch.testing.assert_close(made.logits[0][0], wanted[1], rtol=1e-4, atol=1e-4)


def _longer(inputs: Any) -> dict[str, torch.Tensor]:
    """The other inputs, as long as the tokens: what is added is text."""
    length = inputs["input_ids"].shape[1]
    fills = {"attention_mask": 1, "mm_token_type_ids": 0}
    return {
        name: torch.nn.functional.pad(inputs[name], (0, length - inputs[name].shape[1]), value=fill)
        for name, fill in fills.items()
        if name in inputs
    }


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl"])
def test_generated_tokens_follow_the_prompt_one_by_one(family: str) -> None:
    model = build(family)
    if not repair_positions(model):
        pytest.skip("this release of transformers has nothing to repair")
    repaired = model.model.get_rope_index
    assert not repair_positions(model)
    assert model.model.get_rope_index is repaired
    types = torch.tensor([[0] * 3 + [2] * 40 + [0] * 6])
    # 10 steps in time of 2 x 2 tokens.
    told: dict[str, Any] = {"video_grid_thw": torch.tensor([[10, 4, 4]])}
    if "second_per_grid_ts" in inspect.signature(type(model.model).get_rope_index).parameters:
        told["second_per_grid_ts"] = torch.tensor([1.0])
    positions, deltas = model.model.get_rope_index(torch.ones_like(types), types, **told)
    text = positions[:, 0, 43:]
    assert int(text[0, 0]) == int(positions[:, 0, 3:43].max()) + 1
    assert all(torch.equal(row, text[0, 0] + torch.arange(6)) for row in text)
    assert int(deltas) + types.shape[1] == int(text[0, -1]) + 1
    # Padding changes nothing for the tokens.
    padded = torch.nn.functional.pad(types, (5, 0))
    mask = torch.nn.functional.pad(torch.ones_like(types), (5, 0))
    shifted, same = model.model.get_rope_index(torch.ones_like(padded), padded, attention_mask=mask, **told)
    assert torch.equal(shifted[:, :, 5:], positions)
    assert int(same) == int(deltas)


def test_what_stands_right_is_left_and_runs_are_moved_behind_all_before_them() -> None:
    types = [0, 0, 2, 2, 2, 0, 0, 1, 1, 0]
    right = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 7, 9]] * 3)
    assert torch.equal(apart(right, types), right)
    # The text after the video at its second moment, and the image after that.
    wrong = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5, 5, 7]] * 3)
    assert torch.equal(apart(wrong, types), right)


@pytest.mark.parametrize("family", ["llama", "qwen3-vl"])
def test_models_that_were_trained_otherwise_are_left(family: str) -> None:
    assert not repair_positions(build(family))
