"""The demo's video-understanding model: its inputs, its training, and that questions do not see each other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from xattn_video_pipelines.demo import stories, watcher, world
from xattn_video_pipelines.demo.training import eyes as train_eyes
from xattn_video_pipelines.demo.training import train_watcher
from xattn_video_pipelines.demo.training.loop import Plan, build_optimizers
from xattn_video_pipelines.demo.training.train_watcher import (
    NAMED,
    PHASES,
    READ,
    Batch,
    Learner,
    Phase,
    batch_loss,
    draw_batch,
    question_labels,
    scene_labels,
    tokenise,
)

import transformers  # isort: skip


BUILD_WATCHER = watcher.build_watcher


def small_watcher(seed: int = 0) -> Any:
    """A watcher with few and narrow layers, which learns a batch in seconds where the shipped one takes minutes."""
    settings = BUILD_WATCHER().config.to_dict()
    layers = train_watcher.READ_AFTER + 1
    settings["text_config"] |= {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "layer_types": ["full_attention"] * layers,
    }
    # of heads of 32 dimensions
    rotary = next(name for name in ("rope_parameters", "rope_scaling") if settings["text_config"].get(name))
    settings["text_config"][rotary] |= {"mrope_section": [8, 4, 4]}
    settings["vision_config"] |= {"depth": 1, "embed_dim": 64, "hidden_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig.from_dict(settings))


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
    assert int((inputs["input_ids"] == video).sum()) == 3 * 256
    assert processor.tokenizer.unk_token_id not in inputs["input_ids"]


def test_questions_asked_at_once_are_answered_as_if_alone(processor: Any, model: Any) -> None:
    batch = draw_batch(0, 0, 1, (Phase(1.0, (2,), 4, 10),))
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
    batch = draw_batch(0, 0, 1, (Phase(1.0, (3,), 6, 11),))
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
    assert lengths == {length for phase in PHASES for length in phase.lengths}


def test_an_interrupted_training_ends_with_the_very_same_weights(tmp_path: Path, monkeypatch: Any) -> None:
    phases = (Phase(1.0, (2,), 2, 4),)

    def go(name: str, **changes: Any) -> tuple[Any, int]:
        values = {"matrix_learning_rate": 3e-3, "blocks": train_watcher.BLOCKS, "log_steps": 1, **changes}
        plan = Plan("watcher", tmp_path / name, 4, 1e-3, **values)
        return train_watcher.train_watcher(plan, small_watcher(), 0, phases)

    def kill_later(*arguments: Any) -> Batch:
        if arguments[1] == 2:
            raise KeyboardInterrupt
        return draw_batch(*arguments)

    monkeypatch.setattr(watcher, "build_watcher", small_watcher)
    whole, steps = go("whole")
    assert steps == 4
    with monkeypatch.context() as patch:
        patch.setattr(train_watcher, "draw_batch", kill_later)
        with pytest.raises(KeyboardInterrupt):
            go("parts", checkpoint_seconds=0.0)
    parts, steps = go("parts")
    assert steps == 4
    untrained = small_watcher()
    for (name, value), other, first in zip(
        whole.named_parameters(), parts.parameters(), untrained.parameters(), strict=True
    ):
        assert torch.equal(value, other), name
        assert value.ndim < 2 or not torch.equal(value, first), name
    lines = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_the_program_trains_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_watcher, "PHASES", (Phase(1.0, (1,), 1, 2),))
    monkeypatch.setattr(watcher, "build_watcher", small_watcher)
    arguments = ["--out", str(tmp_path), "--eye-steps", "2", "--steps", "2", "--device", "cpu"]
    assert train_watcher.main([*arguments, "--minutes", "0"]) == 3
    assert not (tmp_path / "model").exists()
    assert train_watcher.main(arguments) == 0
    saved = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    average = load_file(tmp_path / "watcher.safetensors")
    for name, value in saved.named_parameters():
        assert torch.equal(value, average[f"average.watcher.{name}"].bfloat16()), name


def test_the_eyes_learn_what_two_frames_show_and_the_model_keeps_their_averaged_weights(tmp_path: Path) -> None:
    model = watcher.build_watcher(seed=0)
    before = {name: value.clone() for name, value in model.named_parameters()}
    plan = Plan("eyes", tmp_path, 30, 1e-3, matrix_learning_rate=1e-2, blocks=train_watcher.BLOCKS, log_steps=10)
    assert train_eyes.train_eyes(plan, model, seed=0, count=16) == 30
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert lines[-1]["background"] > 0.7
    average = load_file(tmp_path / "eyes.safetensors")
    for name, value in model.named_parameters():
        if name.startswith("model.visual."):
            assert torch.equal(value, average[f"average.{name.removeprefix('model.')}"]), name
        else:
            assert torch.equal(value, before[name]), name


def test_the_eyes_see_training_scenes_alone_as_stories_show_them() -> None:
    seen = set()
    for step in range(10):
        scenes, clips = train_eyes.draw_glances(0, step, 64)
        seen.update(scenes)
    assert not any(map(world.is_held_out, seen))
    assert len(seen) > 300
    still = next(number for number, scene in enumerate(scenes) if scene.motion == "still")
    right = next(number for number, scene in enumerate(scenes) if scene.motion == "right")
    assert all(clip.shape == (2, 128, 128, 3) for clip in clips)
    assert np.array_equal(clips[still][0], clips[still][1])
    # Half a second apart.
    background = np.array(world.BACKGROUNDS[scenes[right].background])
    coloured = (np.abs(frame.astype(int) - background).sum(-1).any(0) for frame in clips[right])
    first, second = (columns.nonzero()[0].mean() for columns in coloured)
    assert watcher.EVERY * 1.1 < second - first < watcher.EVERY * 1.8


def test_saving_leaves_the_model_as_it_was(tmp_path: Path, model: Any) -> None:
    before = {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    watcher.save_watcher(model, tmp_path / "model")
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]), name
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert "old" not in files
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".jinja"}
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for name, value in loaded.named_parameters():
        assert torch.equal(value, before[name].bfloat16().float()), name
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "model")
    story = stories.draw_story(np.random.default_rng(0), 1, "training")
    own, again = (single(one, story, "What shape is it?") for one in (watcher.build_processor(), processor))
    for name, value in own.items():
        assert torch.equal(value, again[name]), name


def test_training_learns_a_batch(processor: Any, tmp_path: Path) -> None:
    batch = _fixed()
    learner = Learner(small_watcher(seed=0), seed=0)
    plan = Plan("x", tmp_path, 1, 3e-3, matrix_learning_rate=1e-2, blocks=train_watcher.BLOCKS)
    optimizers = build_optimizers(plan, learner)
    losses = []
    for _ in range(50):
        values = batch_loss(learner, processor, batch)
        values["loss"].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(values["loss"].item())
        learnt = losses[-1] < 0.3 * losses[0] and min(values["right"], values["read"]) > 0.8 and values["found"] == 1
        if learnt:
            break
    assert losses[-1] < 0.3 * losses[0]
    assert values["right"] > 0.8
    assert values["read"] > 0.8
    assert values["found"] == 1
    with torch.no_grad():
        other = batch_loss(learner, processor, dataclasses.replace(batch, offsets=[2, 3]))["loss"].item()
        assert other != batch_loss(learner, processor, batch)["loss"].item()


def test_what_is_read_off_a_scene_is_what_it_shows() -> None:
    batch = draw_batch(0, 0, 1, (Phase(1.0, (3,), 6, 10),))
    labels = scene_labels(batch)
    assert labels.shape == (2, 3, len(READ))
    for story, rows in zip(batch.stories, labels.tolist(), strict=True):
        for number, (scene, row) in enumerate(zip(story.scenes, rows, strict=True)):
            values = dict(zip(READ, row, strict=True))
            assert world.SHAPES[values["shape"]] == scene.shape
            for name in ("colour", "motion", "background"):
                assert list(getattr(world, f"{name.upper()}S"))[values[name]] == getattr(scene, name)
            assert values["place"] == number
            before = [*world.COLOURS, None][values["colour before"]], [*world.SHAPES, None][values["shape before"]]
            one = story.scenes[number - 1] if number else None
            assert before == ((one.colour, one.shape) if one else (None, None))
            assert all(value < READ[name] for name, value in values.items())


def test_what_is_read_off_a_question_is_what_it_names_and_the_scenes_it_means(processor: Any) -> None:
    batch = draw_batch(0, 0, 1, (Phase(1.0, (3,), 6, 40),))
    named, found = (iter(labels.tolist()) for labels in question_labels(batch))
    meant = []
    for story, several in zip(batch.stories, batch.asked, strict=True):
        looks = [stories.look(scene) for scene in story.scenes]
        for one in several:
            # "What shape was the first one?" names no shape; "What came first, ...?" does say first.
            spoken = one.question.lower().rstrip("?").replace(",", "").split()
            wanted = [
                *_padded([word for word in spoken if word in world.COLOURS], 2),
                *_padded([word for word in spoken if word in world.SHAPES], 2),
                *_padded([word for word in spoken if word in (*stories.ORDINALS, "last")], 1),
            ]
            by_look = sorted((one.question.find(look), at) for at, look in enumerate(looks) if look in one.question)
            scenes = _padded([at for _, at in by_look], 2)
            # Every word of an answer has its row.
            for _ in one.answer.split():
                choices = [[*names, None] for names, times in NAMED for _ in range(times)]
                assert [values[at] for values, at in zip(choices, next(named), strict=True)] == wanted
                places = [*range(READ["place"]), None]
                assert [places[at] for at in next(found)] == [one.scene, *scenes]
            meant.append((one.kind, *scenes))
    assert next(named, None) is next(found, None) is None
    assert {len([at for at in scenes if at is not None]) for kind, *scenes in meant if kind == "order"} == {1, 2}
    # In the order of the tokens that they are read off.
    tokens = tokenise(processor.tokenizer, batch, (12, 8, 8))
    telling = tokens.telling(processor.tokenizer.eos_token_id)
    follows = processor.tokenizer.convert_ids_to_tokens(tokens.labels[telling])
    assert follows == [word for several in batch.asked for one in several for word in one.answer.split()]


def _padded(values: list[Any], length: int) -> list[Any]:
    return [*values, *[None] * length][:length]


def _fixed() -> Batch:
    rng = np.random.default_rng(0)
    told = [stories.draw_story(rng, 1, "training") for _ in range(2)]
    asked = [[stories.draw_question(rng, story, kind) for kind in stories.KINDS[:-1]] for story in told]
    return Batch(told, asked, [0, 0])
