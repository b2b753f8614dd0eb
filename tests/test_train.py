"""The demo's training: no held-out scene in a batch, a kill loses nothing, the fast attention is the real one."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.demo import text, world
from xattn_video_pipelines.demo.training import latents as train_latents
from xattn_video_pipelines.demo.training import vae as train_vae
from xattn_video_pipelines.demo.training.attention import TrainingAttention, padding_bias
from xattn_video_pipelines.demo.training.curve import draw_curve
from xattn_video_pipelines.demo.training.latents import ClipSize, clip_scene
from xattn_video_pipelines.demo.training.loop import Plan, schedule_at, train
from xattn_video_pipelines.demo.training.phases import CONTINUED_PHASES, FULL, PHASES, Anchor, Phase, draw_batch
from xattn_video_pipelines.demo.training.train import assemble, main, run, save_pipeline, save_samples
from xattn_video_pipelines.demo.training.transformer import (
    build_transformer,
    cut_out,
    noise_levels,
    rotary_of,
    train_transformer,
)
from xattn_video_pipelines.video.models import import_diffusers

TINY = (
    Phase(0.5, ClipSize(1, 80), 3, 5),
    Phase(0.7, ClipSize(5, 80), 2, 3, kept=2),
    Phase(1.0, ClipSize(5, 80), 2, 3, kept=2, cut=4, shift=8.0, anchor=Anchor(1.0, (0.2, 0.6))),
)


def tiny_transformer(seed: int) -> Any:
    torch.manual_seed(seed)
    return import_diffusers().WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, num_layers=1, ffn_dim=16,
        in_channels=4, out_channels=4, text_dim=text.TEXT_DIM, freq_dim=16,
    )  # fmt: skip


BOTH_OPTIMIZERS = {"matrix_learning_rate": 4e-3, "checkpoint_seconds": 0.0, "log_steps": 1}


def plan_for(folder: Path, steps: int = 6, **changes: Any) -> Plan:
    folder.mkdir(exist_ok=True)
    return Plan("transformer", folder, steps, 1e-3, **{**BOTH_OPTIMIZERS, **changes})


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_parameters()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=name)


@pytest.fixture(scope="module")
def vae() -> Any:
    return train_vae.build_vae().eval().requires_grad_(False)


@pytest.mark.parametrize("phases", [PHASES, CONTINUED_PHASES])
def test_no_held_out_scene_is_in_a_batch_of_the_transformer(phases: tuple[Phase, ...]) -> None:
    held_out = {(s.colour, s.shape, s.motion, s.background) for s in world.held_out_scenes()}
    sizes, seen = set(), set()
    for step in range(0, 2000, 3):
        batch = draw_batch(0, step, 2000, phases)
        sizes.add(batch.phase.size)
        assert len(batch.captions) == len(batch.clips) == len(batch.sigmas) == batch.phase.batch
        assert ((batch.sigmas > 0) & (batch.sigmas < 1)).all()
        assert len(batch.frames) == (batch.phase.kept or batch.phase.size.latent_frames)
        for number, words in zip(batch.clips, batch.captions, strict=True):
            scene = clip_scene(int(number))
            named = (scene.colour, scene.shape, scene.motion, scene.background)
            assert named not in held_out
            seen.add(scene)
            assert words == "" or {scene.colour, scene.shape, scene.background} <= set(words.replace(",", "").split())
    assert sizes == {phase.size for phase in phases}
    assert len(seen) > 400


def test_nothing_held_out_is_ever_rendered_for_training(
    monkeypatch: pytest.MonkeyPatch, vae: Any, tmp_path: Path
) -> None:
    rendered = []
    render = world.render
    monkeypatch.setattr(world, "render", lambda scene, *a, **k: rendered.append(scene) or render(scene, *a, **k))
    for step in range(20):
        train_vae.training_crops(0, step)
    monkeypatch.setattr(train_latents, "_SHARD", 8)
    train_latents.load_latents(vae, ClipSize(1, 80), 8, tmp_path)
    assert len(rendered) == 20 * 8 + 8
    assert not any(world.is_held_out(scene) for scene in rendered)


def test_clips_go_through_every_training_scene() -> None:
    scenes = world.training_scenes()
    for start in (0, len(scenes)):
        assert {clip_scene(start + number) for number in range(len(scenes))} == set(scenes)


def test_the_full_size_has_4096_tokens_or_more_and_the_model_four_heads_of_64() -> None:
    config = build_transformer().config
    assert FULL.tokens >= 4096
    assert PHASES[-1].size == CONTINUED_PHASES[-1].size == FULL
    assert (config.num_attention_heads, config.attention_head_dim) >= (4, 64)
    assert config.num_layers >= 4


def test_frames_left_out_of_a_step_leave_the_others_at_their_places() -> None:
    model, processor = tiny_transformer(0).eval(), TrainingAttention()
    model.set_attn_processor(processor)
    clip = torch.randn(1, 4, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    words, time_of = torch.zeros(1, 3, text.TEXT_DIM), torch.tensor([500.0])

    def seen(*frames: int) -> torch.Tensor:
        processor.rotary = rotary_of(model, clip, torch.tensor(frames))
        with torch.no_grad():
            return model(clip[:, :, :2], time_of, words, return_dict=False)[0]

    # Attention knows how far apart two frames are, not where both stand.
    torch.testing.assert_close(seen(0, 2), seen(1, 3), rtol=1e-4, atol=1e-5)
    assert (seen(0, 2) - seen(0, 1)).abs().max() > 1e-3
    processor.rotary = None
    with torch.no_grad():
        own = model(clip[:, :, :2], time_of, words, return_dict=False)[0]
    torch.testing.assert_close(seen(0, 1), own, rtol=0, atol=0)


def test_the_kept_frames_of_a_step_are_distinct_in_order_and_reach_both_ends() -> None:
    kept = [draw_batch(0, step, 2000, CONTINUED_PHASES).frames for step in range(100)]
    assert all((np.diff(frames) > 0).all() for frames in kept)
    assert set(np.concatenate(kept)) == set(range(FULL.latent_frames))


def test_a_square_is_cut_out_of_each_clip_anywhere_in_it() -> None:
    phase = Phase(1.0, FULL, 8, 100, kept=2, cut=10)
    assert phase.tokens == 2 * 10 * 10
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    # Latents that say which token they belong to: two of them a side.
    clips = torch.stack([rows, columns]).div(2, rounding_mode="floor").expand(8, 3, 2, 32, 32).transpose(1, 2)
    upper_left, lower_right = set(), set()
    for step in range(60):
        batch = draw_batch(0, step, 1, (phase,))
        seen = cut_out(clips, batch)
        assert np.array_equal(seen[:, :, 0, 0, 0], batch.corners)
        assert seen.shape == (8, 2, 3, 20, 20)
        for clip in seen[:, :, 0]:
            assert torch.equal(clip - clip[:, :1, :1], clips[0, :, 0, :20, :20])
            upper_left.add(tuple(clip[:, 0, 0].tolist()))
            lower_right.add(tuple(clip[:, -1, -1].tolist()))
    assert (0, 0) in upper_left
    assert (15, 15) in lower_right
    assert len(upper_left) == 7 * 7
    whole = draw_batch(0, 0, 1, (Phase(1.0, FULL, 8, 100),))
    assert cut_out(clips, whole) is clips


@pytest.mark.parametrize("first", [True, False], ids=["the first", "any"])
def test_one_frame_has_less_noise_in_the_asked_share_of_the_steps(first: bool) -> None:
    phase = Phase(1.0, FULL, 6, 100, kept=3, anchor=Anchor(0.75, (0.2, 0.4), first=first))
    places = []
    for step in range(400):
        batch = draw_batch(0, step, 1, (phase,))
        levels = noise_levels(batch) / torch.from_numpy(batch.sigmas).float()[:, None]
        if batch.anchored is None:
            assert (levels == 1).all()
            continue
        place = batch.anchored[0]
        places.append(place)
        assert ((levels[:, place] >= 0.2) & (levels[:, place] <= 0.4)).all()
        assert (levels[:, [other for other in range(3) if other != place]] == 1).all()
    assert 0.65 < len(places) / 400 < 0.85
    assert set(places) == ({0} if first else {0, 1, 2})


def test_the_frame_with_less_noise_is_told_so_and_does_not_count(vae: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(train_latents, "_SHARD", 4)
    size, seen = ClipSize(5, 80), []

    def build(seed: int) -> Any:
        model = tiny_transformer(seed)
        torch.nn.init.zeros_(model.proj_out.weight)
        torch.nn.init.zeros_(model.proj_out.bias)
        model.register_forward_pre_hook(lambda _, inputs: seen.append([part.clone() for part in inputs]))
        return model

    def loss_with(name: str, anchor: Anchor | None) -> float:
        phase = Phase(1.0, size, 2, 3, anchor=anchor)
        plan = plan_for(tmp_path / name, steps=1)
        train_transformer(plan, vae, torch.device("cpu"), 0, tmp_path / "latents", phases=(phase,), build=build)
        return json.loads((tmp_path / name / "log.jsonl").read_text())["loss"]

    clean_first = loss_with("anchored", Anchor(1.0, (0.0, 0.0), first=True))
    (mixed, times, _), tokens = seen[0], size.tokens // size.latent_frames
    assert times.shape == (2, size.tokens)
    assert (times[:, :tokens] == 0).all()
    assert (times[:, tokens:] > 0).all()
    batch = draw_batch(0, 0, 1, (Phase(1.0, size, 2, 3, anchor=Anchor(1.0, (0.0, 0.0), first=True)),))
    latents = train_latents.load_latents(vae, size, 3, tmp_path / "latents")[torch.from_numpy(batch.clips)].float()
    torch.testing.assert_close(mixed[:, :, 0], latents[:, :, 0])
    # The model says zero, so its error is the target itself: that of the other frames.
    sigmas = torch.from_numpy(batch.sigmas).float().view(-1, 1, 1, 1, 1)
    noise = (mixed[:, :, 1:] - (1 - sigmas) * latents[:, :, 1:]) / sigmas
    assert clean_first == pytest.approx(float((noise - latents[:, :, 1:]).square().mean()), rel=1e-3)
    assert loss_with("alike", None) != pytest.approx(clean_first, rel=1e-3)
    assert seen[1][1].shape == (2,)


def test_an_interrupted_training_ends_with_the_very_same_weights(vae: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(train_latents, "_SHARD", 4)

    def go(name: str, **changes: Any) -> tuple[Any, int]:
        plan = plan_for(tmp_path / name, **changes)
        device = torch.device("cpu")
        return train_transformer(plan, vae, device, 0, tmp_path / "latents", phases=TINY, build=tiny_transformer)

    whole, steps = go("whole", checkpoint_seconds=1e9)
    assert steps == 6
    # Out of time before the first step, killed in the middle of the fourth, then to the end.
    assert go("parts", deadline=time.monotonic())[1] == 0
    calls = []

    def kill_later(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return draw_batch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("xattn_video_pipelines.demo.training.transformer.draw_batch", kill_later)
        with pytest.raises(KeyboardInterrupt):
            go("parts")
    parts, steps = go("parts")
    assert steps == 6
    assert_same(weights(whole), weights(parts))
    lines = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert (tmp_path / "parts" / "loss.png").exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_the_curve_shows_every_stage_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the curve needs matplotlib")
    assert draw_curve(tmp_path / "log.jsonl") is None

    def write(*stages: str, steps: int, loss: float = 1.0) -> bytes:
        lines = [{"stage": stage, "step": step, "loss": loss / (step + 1)} for stage in stages for step in range(steps)]
        lines.append({"stage": "vae", "step": 600, "held_out_psnr": 31.4})
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        path = draw_curve(tmp_path / "log.jsonl")
        assert path == tmp_path / "loss.png"
        return path.read_bytes()

    def height(picture: bytes) -> int:
        return int.from_bytes(picture[20:24])

    one, longer, two = write("vae", steps=5), write("vae", steps=9), write("vae", "transformer", steps=5)
    assert one[:8] == b"\x89PNG\r\n\x1a\n"
    assert one != longer
    assert write("vae", steps=5, loss=0.1) != one
    assert height(two) == 2 * height(one)
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "loss.png"}


LOOP = """
import sys, torch
from pathlib import Path
from xattn_video_pipelines.demo.training.loop import Plan, train
torch.manual_seed(0)
model = torch.nn.Linear(3, 3)
def loss_of(step):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
    return {"loss": (model(x) - x.flip(1)).square().mean()}
folder, steps, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
_, average = train(Plan("toy", folder, steps, 1e-2, checkpoint_seconds=seconds), model, loss_of)
torch.save(average, folder / "average.pt")
"""


def test_sigkill_at_any_moment_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A checkpoint draws the curve too, so only the run that is killed writes one after each step.
    def arguments(folder: str, checkpoint_seconds: float) -> list[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        return ["loop", str(tmp_path / folder), "400", str(checkpoint_seconds)]

    def finish(folder: str) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(sys, "argv", arguments(folder, 1e9))
        exec(LOOP, {})
        return torch.load(tmp_path / folder / "average.pt")

    def logged_steps(folder: str) -> list[int]:
        return [json.loads(line)["step"] for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]

    command = [sys.executable, "-c", LOOP, *arguments("killed", 0.0)[1:]]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent)
    while not (tmp_path / "killed" / "toy.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "average.pt").exists()
    assert_same(finish("whole"), finish("killed"))
    assert logged_steps("killed") == logged_steps("whole") == list(range(20, 401, 20))


def test_training_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        return {"loss": (model(x) - 2 * x).square().mean()}

    train(Plan("toy", tmp_path, 300, 3e-2, log_steps=10), model, loss_of)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.02 * losses[0]


def test_a_run_of_another_model_is_one_line(tmp_path: Path) -> None:
    def loss_of(step: int) -> dict[str, torch.Tensor]:
        return {"loss": model(torch.ones(1, 4)).square().mean()}

    for model in (torch.nn.Linear(4, 4), torch.nn.Linear(4, 5), torch.nn.Sequential(torch.nn.Linear(4, 4))):
        plan = Plan("toy", tmp_path, 2, 1e-2)
        if plan.checkpoint.exists():
            with pytest.raises(UserError, match=r"toy\.safetensors: of another model than is trained now"):
                train(plan, model, loss_of)
        else:
            assert train(plan, model, loss_of)[0] == 2


def test_the_learning_rate_rises_stays_and_falls_to_nothing(tmp_path: Path) -> None:
    plan = Plan("toy", tmp_path, 1000, 1.0)
    rates = [schedule_at(plan, step) for step in range(1000)]
    assert rates[0] < 0.05
    assert rates[100] == rates[600] == 1.0
    assert 0 < rates[-1] < 0.01
    assert rates[600:] == sorted(rates[600:], reverse=True)


@pytest.mark.parametrize("frames", [2, 24])
def test_training_attention_is_wans_attention_over_the_padded_prompt(frames: int, monkeypatch: Any) -> None:
    # 24 frames of 10 x 10 tokens take the path that computes the probabilities twice.
    monkeypatch.setattr("xattn_video_pipelines.demo.training.attention._KEPT", 1000)
    model = tiny_transformer(0)
    words = text.encode(text.build_tokenizer(), text.build_text_encoder(), ["a red circle moving left", "star"])
    padded = torch.nn.functional.pad(words, (0, 0, 0, text.MAX_TEXT_TOKENS - words.shape[1]))
    x = torch.randn(2, 4, frames, 20, 20, generator=torch.Generator().manual_seed(0))
    results = []
    for states in (padded, words):
        if states is words:
            processor = TrainingAttention()
            processor.text_bias = padding_bias(words, text.MAX_TEXT_TOKENS)
            model.set_attn_processor(processor)
        output = model(x, torch.tensor([900.0, 200.0]), states, return_dict=False)[0]
        model.zero_grad()
        output.square().mean().backward()
        results.append((output.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-3, atol=1e-6, msg=name)


def test_words_are_told_apart_whatever_stands_beside_them() -> None:
    tokenizer, encoder = text.build_tokenizer(), text.build_text_encoder()
    scenes = world.all_scenes()
    captions = [world.caption(scene, number) for number, scene in enumerate(scenes)]
    assert not any(tokenizer.unk_token_id in ids for ids in tokenizer(captions).input_ids)
    assert tokenizer("a Teal CIRCLE").input_ids[1:] == [tokenizer.unk_token_id, *tokenizer("circle").input_ids]
    by_word: dict[str, list[torch.Tensor]] = {}
    for words in captions[::24]:
        states = text.encode(tokenizer, encoder, [words])[0]
        for word, state in zip(tokenizer.tokenize(words), states, strict=False):
            by_word.setdefault(word, []).append(torch.nn.functional.normalize(state, dim=0))
    means = {word: torch.stack(states).mean(0) for word, states in by_word.items()}
    for word, states in by_word.items():
        for state in states:
            likeness = {other: float(state @ mean) for other, mean in means.items()}
            assert max(likeness, key=likeness.get) == word
            assert sorted(likeness.values())[-2] < 0.5 < likeness[word]


def test_the_pipeline_pads_prompts_as_training_assumes() -> None:
    diffusers = import_diffusers()
    tokenizer, encoder = text.build_tokenizer(), text.build_text_encoder()
    pipeline = diffusers.WanPipeline(tokenizer, encoder, None, None)
    prompts = ["a red circle moving left on a white background", ""]
    expected, _ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=text.MAX_TEXT_TOKENS
    )
    states = text.encode(tokenizer, encoder, prompts)
    torch.testing.assert_close(expected[:, : states.shape[1]], states, rtol=1e-4, atol=1e-4)
    assert not expected[:, states.shape[1] :].any()


def test_the_vae_starts_as_a_resampler_of_colours(vae: Any) -> None:
    assert train_vae.reconstruction_psnr(vae, count=1) > 18
    clip = train_vae.to_tensor(np.full((1, 5, 64, 64, 3), (240, 128, 16), np.uint8))
    latents = vae.encode(clip).latent_dist.mode()
    assert latents.shape == (1, 4, 3, 16, 16)
    inner = latents[0, :3, :, 4:-4, 4:-4]
    torch.testing.assert_close(inner.mean((1, 2, 3)), clip[0, :, 0, 0, 0], rtol=0, atol=0.25)


def test_pixels_survive_the_way_to_a_tensor_and_back() -> None:
    video = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 10, 3), dtype=np.uint8)
    np.testing.assert_array_equal(train_vae.to_uint8(train_vae.to_tensor(video)), video)


def test_training_begins_with_a_given_pipeline(vae: Any, tmp_path: Path) -> None:
    transformer = tiny_transformer(5)
    save_pipeline(assemble(vae, transformer), tmp_path / "first")
    # Out of time at once: what comes out is what went in.
    assert not run(tmp_path / "out", steps=2, vae_steps=1, minutes=0.0, start=tmp_path / "first", phases=TINY)
    cls = import_diffusers().WanPipeline
    first, second = (cls.from_pretrained(folder) for folder in (tmp_path / "first", tmp_path / "out" / "pipeline"))
    for part in ("transformer", "vae"):
        assert_same(weights(getattr(first, part)), weights(getattr(second, part)))


def test_from_a_given_pipeline_all_clips_move_and_the_rates_fall_for_long(
    vae: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    save_pipeline(assemble(vae, tiny_transformer(5)), tmp_path / "first")
    asked = []

    def no_training(plan: Plan, *_: Any, phases: tuple[Phase, ...], **__: Any) -> tuple[Any, int]:
        asked.append((plan, phases))
        return tiny_transformer(5), 0

    monkeypatch.setattr("xattn_video_pipelines.demo.training.train.train_transformer", no_training)
    run(tmp_path / "out", steps=4000, vae_steps=1, start=tmp_path / "first")
    plan, phases = asked[0]
    assert phases == CONTINUED_PHASES
    assert all(phase.size.frames > 16 for phase in phases)
    assert [schedule_at(plan, step) for step in (1600, 2200, 2800, 3400)] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_a_start_that_is_no_pipeline_is_one_line(tmp_path: Path, capsys: Any) -> None:
    assert main(["--out", str(tmp_path / "out"), "--start", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("not a pipeline's folder, it has no model_index.json")
    assert not (tmp_path / "out").exists()


def test_the_saved_pipeline_loads_by_its_name_alone_and_draws(vae: Any, tmp_path: Path) -> None:
    pipeline = assemble(vae, tiny_transformer(0))
    for _ in range(2):
        save_pipeline(pipeline, tmp_path / "pipeline")
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    written = "".join(path.read_text() for path in (tmp_path / "pipeline").rglob("*.json"))
    assert str(tmp_path) not in written
    assert "TokenizersBackend" not in written
    assert pipeline.transformer.dtype == torch.float32
    loaded = import_diffusers().WanPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=torch.bfloat16)
    assert loaded.transformer.dtype == loaded.vae.dtype == torch.bfloat16
    assert loaded.transformer.scale_shift_table.dtype == torch.float32
    assert loaded.tokenizer("a red star").input_ids == text.build_tokenizer()("a red star").input_ids
    # A size of the training that the pipeline itself would not take.
    save_samples(tmp_path / "samples.png", loaded, ClipSize(5, 88))
    assert (tmp_path / "samples.png").stat().st_size > 1000
