"""The demo's video-understanding model: its inputs, its training, and that questions do not see each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipelines.demo import stories, train_watcher, watcher, world
from pipelines.demo.train_watcher import PHASES, Batch, Phase, draw_batch, tokenise


@pytest.fixture(scope="module")
def processor() -> Any:
    return watcher.build_processor()


@pytest.fixture(scope="module")
def model() -> Any:
    return watcher.build_watcher(seed=1).eval()


def single(processor: Any, story: stories.Story, question: str) -> Any:
    """What `xattn-video qa` would give the model."""
    message = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return processor(text=[text], videos=[story.render(4)], do_sample_frames=False, return_tensors="pt")


def test_a_scene_has_256_tokens(processor: Any) -> None:
    story = stories.draw_story(np.random.default_rng(0), 3, "training")
    inputs = single(processor, story, "What colour was the second shape?")
    video = processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert int((inputs["input_ids"] == video).sum()) == 3 * watcher.SCENE_TOKENS
    assert processor.tokenizer.unk_token_id not in inputs["input_ids"]


def test_questions_asked_at_once_are_answered_as_if_alone(processor: Any, model: Any) -> None:
    batch = draw_batch(0, 0, 1, (Phase(1.0, (2,), 4, 5),))
    videos = [story.render(watcher.EVERY) for story in batch.stories]
    seen = processor.video_processor(videos, do_sample_frames=False, return_tensors="pt")
    tokens = tokenise(processor.tokenizer, batch, (8, 8, 8))
    with torch.no_grad():
        together = model(input_ids=tokens.ids, position_ids=tokens.positions, attention_mask=tokens.mask, **seen).logits
        for row, (story, asked) in enumerate(zip(batch.stories, batch.asked, strict=True)):
            wanted = tokens.labels[row] != -100
            answers = iter(together[row][wanted])
            for one in asked:
                alone = model(**single(processor, story, one.question)).logits[0, -1]
                torch.testing.assert_close(next(answers), alone, rtol=1e-4, atol=1e-4)
                # The other words of the answer, and its end.
                for _ in one.answer.split():
                    next(answers)
            assert next(answers, None) is None


def test_the_labels_are_the_answers_and_their_ends(processor: Any) -> None:
    batch = draw_batch(0, 0, 1, (Phase(1.0, (3,), 6, 5),))
    tokens = tokenise(processor.tokenizer, batch, (12, 8, 8))
    for row, asked in enumerate(batch.asked):
        labels = tokens.labels[row][tokens.labels[row] != -100]
        assert processor.tokenizer.decode(labels) == " ".join(f"{one.answer} </s>" for one in asked)


def test_no_held_out_scene_is_in_a_training_batch() -> None:
    seen, lengths = set(), set()
    for step in range(0, 600, 3):
        batch = draw_batch(0, step, 600)
        lengths.add(len(batch.stories[0].scenes))
        assert len({len(story.scenes) for story in batch.stories}) == 1
        seen.update(scene for story in batch.stories for scene in story.scenes)
    assert not any(map(world.is_held_out, seen))
    assert len(seen) > 500
    assert lengths == {length for phase in PHASES for length in phase.scenes}


def test_an_interrupted_training_ends_with_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_watcher, "PHASES", (Phase(1.0, (1,), 1, 2),))

    def go(name: str, *more: str) -> int:
        return train_watcher.main(["--out", str(tmp_path / name), "--steps", "3", "--device", "cpu", *more])

    assert go("whole") == 0
    assert go("parts", "--minutes", "0") == 3
    assert go("parts") == 0
    whole, parts = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert {value.dtype for value in whole.values()} == {torch.bfloat16}
    # What is saved is the average that the checkpoint has.
    average = load_file(tmp_path / "whole" / "watcher.safetensors")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(whole[name], average[f"average.{name}"].bfloat16(), rtol=0, atol=0)


def test_a_step_of_training_learns_its_batch(processor: Any) -> None:
    batch = _fixed()
    model = watcher.build_watcher(seed=0)
    seen = processor.video_processor(
        [story.render(watcher.EVERY) for story in batch.stories], do_sample_frames=False, return_tensors="pt"
    )
    tokens = tokenise(processor.tokenizer, batch, (4, 8, 8))
    counted = tokens.labels != -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        hidden = model.model(
            input_ids=tokens.ids, position_ids=tokens.positions, attention_mask=tokens.mask, use_cache=False, **seen
        )[0]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[counted]), tokens.labels[counted])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def _fixed() -> Batch:
    rng = np.random.default_rng(0)
    told = [stories.draw_story(rng, 1, "training") for _ in range(2)]
    asked = [[stories.draw_question(rng, story, kind) for kind in stories.KINDS[:-1]] for story in told]
    return Batch(told, asked, [0, 0])
