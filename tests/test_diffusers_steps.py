"""Which step is it, in loops that no pipeline runs: by the scheduler, by what the user says, by the timesteps."""

from __future__ import annotations

import doctest
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny.wan_family import T2V, TEXT_DIM, flow_scheduler, tiny_transformer
from xattn_video import XAttnProcessor
from xattn_video.integrations import diffusers as integration

# after tests.tiny, which repairs a torchvision that does not fit this torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler  # isort: skip

SETTINGS: dict[str, Any] = {"stride": 4, "block_size": 32, "min_tokens": 64, "threshold": 0.5, "warmup_steps": 2}
LAYERS = 2
# eight forwards each; the order matters, since one processor runs them one after the other
TIMESTEPS = {
    "falling": [900, 800, 700, 600, 500, 400, 300, 200],
    "rising": [100, 200, 300, 400, 500, 600, 700, 800],
    "zigzag": [900, 700, 500, 800, 600, 400, 700, 500],
    "constant": [999] * 8,
}


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return tiny_transformer()


@pytest.fixture
def pipe() -> Any:
    pipe = T2V.build(0, scheduler=FlowMatchEulerDiscreteScheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def attached(target: Any, **changes: Any) -> XAttnProcessor:
    processor = XAttnProcessor(**{**SETTINGS, **changes})
    target.set_attn_processor(processor)
    return processor


def forward(model: Any, timestep: Tensor | float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 16, 5, 14, 18, generator=generator)
    text = torch.randn(1, 20, TEXT_DIM, generator=generator)
    with torch.no_grad():
        return model(latents, torch.as_tensor(timestep).reshape(1), text).sample


def calls(processor: XAttnProcessor) -> tuple[int, int]:
    """(dense, sparse) calls since the last look, the dense ones all in the first steps; and start counting again."""
    summary = processor.stats.summary()
    processor.stats.reset()
    assert set(summary["dense_calls"]) <= {"warmup"}
    by_step = summary["density_by_step"]
    assert all((density == 1.0) == (step < 2) for step, density in by_step.items())
    return sum(summary["dense_calls"].values()), summary["sparse_calls"]


def run_own_loop(
    pipe: Any, timesteps: list[int], forwards: int = 1, after_step: Callable[[], Any] = lambda: None
) -> None:
    """A denoising loop with the parts of a pipeline, which sets nothing on the pipeline itself."""
    pipe.scheduler.set_timesteps(sigmas=[timestep / 1000 for timestep in timesteps])
    # or it would look the timestep up, which tells nothing where two are the same
    pipe.scheduler.set_begin_index(0)
    latents = torch.zeros(1, 16, 5, 14, 18)
    for timestep in pipe.scheduler.timesteps:
        for _ in range(forwards):
            velocity = forward(pipe.transformer, timestep)
        latents = pipe.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        after_step()


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.WARNING, logger="xattn_video"):
        yield lambda: [record.getMessage() for record in caplog.records if "denoising step" in record.getMessage()]


@pytest.mark.parametrize("forwards", [1, 2])
def test_a_loop_with_the_pipelines_scheduler_counts_whatever_the_timesteps_do(
    pipe: Any, forwards: int, warnings: Callable[[], list[str]]
) -> None:
    processor = attached(pipe)
    dense = {}
    for name, timesteps in TIMESTEPS.items():
        run_own_loop(pipe, timesteps, forwards)
        dense[name] = calls(processor)
    # two layers: 4 of 16 calls with one forward a step
    assert dense == dict.fromkeys(TIMESTEPS, (4 * forwards, 12 * forwards))
    assert not warnings()


@pytest.mark.parametrize("forwards", [1, 2])
def test_steps_that_the_user_counts_are_right_whatever_the_timesteps_do(
    model: Any, forwards: int, warnings: Callable[[], list[str]]
) -> None:
    processor = attached(model)
    dense = {}
    for name, timesteps in TIMESTEPS.items():
        processor.start_generation()
        for index, timestep in enumerate(timesteps):
            processor.step(index)
            for _ in range(forwards):
                forward(model, timestep)
        dense[name] = calls(processor)
    assert dense == dict.fromkeys(TIMESTEPS, (4 * forwards, 12 * forwards))
    assert not warnings()


def test_the_begin_of_a_generation_is_enough_where_the_timestep_changes(
    model: Any, warnings: Callable[[], list[str]]
) -> None:
    processor = attached(model)
    for name in ("falling", "rising", "zigzag", "rising"):
        processor.start_generation()
        for timestep in TIMESTEPS[name]:
            forward(model, timestep)
            forward(model, timestep)
        assert calls(processor) == (8, 24), name
    assert not warnings()


@pytest.mark.parametrize("name", ["falling", "rising"])
def test_timesteps_alone_tell_a_generation_and_an_inversion(
    model: Any, name: str, warnings: Callable[[], list[str]]
) -> None:
    processor = attached(model)
    for timestep in TIMESTEPS[name]:
        forward(model, timestep)
    summary = processor.stats.summary()
    assert (summary["dense_calls"], summary["sparse_calls"]) == ({"warmup": 4}, 12)
    assert not warnings()


@pytest.mark.parametrize(("name", "dense"), [("zigzag", 12), ("constant", 16)])
def test_what_timesteps_alone_cannot_tell_is_dense_and_said_once(
    model: Any, name: str, dense: int, warnings: Callable[[], list[str]]
) -> None:
    processor = attached(model)
    for timestep in TIMESTEPS[name]:
        forward(model, timestep)
    assert calls(processor) == (dense, 16 - dense)
    for timestep in TIMESTEPS[name]:
        forward(model, timestep)
    assert len(warnings()) == 1
    assert "processor.step(i)" in warnings()[0]


def test_a_run_of_the_pipeline_warms_up_after_steps_that_the_user_counted(pipe: Any) -> None:
    processor = attached(pipe)
    for index in (5, 6):
        processor.step(index)
        forward(pipe.transformer, 500.0)
    assert calls(processor) == (0, 4)
    for _ in range(2):
        T2V.call(pipe, num_inference_steps=4, guidance_scale=1.0)
        assert calls(processor) == (4, 4)
    processor.step(0)
    run_own_loop(pipe, TIMESTEPS["constant"])
    assert calls(processor) == (4, 12)


def test_the_users_count_goes_before_a_scheduler_that_steps(pipe: Any) -> None:
    processor = attached(pipe)
    pipe.scheduler.set_timesteps(4)
    # begins again in the middle of the schedule, a section of a video for instance
    for index, timestep in zip((0, 1, 0, 1), pipe.scheduler.timesteps, strict=True):
        processor.step(index)
        pipe.scheduler.step(forward(pipe.transformer, timestep), timestep, torch.zeros(1, 16, 5, 14, 18))
    assert calls(processor) == (8, 0)
    # and goes on with the scheduler
    pipe.scheduler.set_timesteps(6)
    for index, timestep in enumerate(pipe.scheduler.timesteps):
        if index == 3:
            processor.start_generation()
        pipe.scheduler.step(forward(pipe.transformer, timestep), timestep, torch.zeros(1, 16, 5, 14, 18))
    assert calls(processor) == (8, 4)


def test_a_loop_that_was_interrupted_begins_again_with_its_scheduler(pipe: Any) -> None:
    processor = attached(pipe)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_own_loop(pipe, TIMESTEPS["falling"], after_step=stop)
    assert calls(processor) == (2, 0)
    # with a first timestep below the one where the other loop stopped
    run_own_loop(pipe, TIMESTEPS["falling"][4:])
    assert calls(processor) == (4, 4)
    # and after a run of the pipeline that left its timestep behind
    with pytest.raises(KeyboardInterrupt):
        T2V.call(pipe, num_inference_steps=4, guidance_scale=1.0, callback_on_step_end=lambda *_: stop())
    assert pipe._current_timestep is not None
    processor.stats.reset()
    run_own_loop(pipe, TIMESTEPS["zigzag"])
    assert calls(processor) == (4, 12)


def test_a_scheduler_that_is_set_after_attaching_is_seen(pipe: Any) -> None:
    processor = attached(pipe)
    run_own_loop(pipe, TIMESTEPS["rising"])
    assert calls(processor) == (4, 12)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    run_own_loop(pipe, TIMESTEPS["constant"])
    assert calls(processor) == (4, 12)
    pipe.scheduler = flow_scheduler()
    T2V.call(pipe, num_inference_steps=4, guidance_scale=1.0)
    assert calls(processor) == (4, 4)


def test_a_scheduler_that_counts_no_steps_shows_where_a_generation_begins(pipe: Any) -> None:
    processor = attached(pipe)
    pipe.scheduler = DDIMScheduler()
    for steps in (6, 3):
        pipe.scheduler.set_timesteps(steps)
        for timestep in pipe.scheduler.timesteps:
            forward(pipe.transformer, timestep)
        assert calls(processor) == (4, LAYERS * steps - 4)
    # another run in the middle of the schedule, as after an interrupted one; then back and forth
    pipe.scheduler.set_timesteps(6)
    for timestep in pipe.scheduler.timesteps[3:]:
        forward(pipe.transformer, timestep)
    assert calls(processor) == (4, 2)
    pipe.scheduler.set_timesteps(6)
    processor.start_generation()
    for index in (2, 4, 3, 5, 4):
        forward(pipe.transformer, pipe.scheduler.timesteps[index])
    assert calls(processor) == (4, 6)


def test_the_end_of_a_run_is_no_step_of_what_comes_after_it(pipe: Any) -> None:
    processor = attached(pipe)
    run_own_loop(pipe, TIMESTEPS["falling"])
    assert calls(processor) == (4, 12)
    # another loop with the same model, whose scheduler nobody sees
    for timestep in (150.0, 100.0, 50.0):
        forward(pipe.transformer, timestep)
    assert calls(processor) == (4, 2)


@pytest.mark.parametrize(
    ("index", "error", "words"), [(-1, ValueError, "step must be 0 or more, got -1"), (1.0, TypeError, "float")]
)
def test_a_wrong_step_is_named(index: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        XAttnProcessor().step(index)


def test_the_example_of_a_loop_runs() -> None:
    runner = doctest.DocTestRunner()
    examples = doctest.DocTestFinder(recurse=False).find(
        integration.XAttnProcessor.start_generation, "start_generation"
    )
    assert examples
    for example in examples:
        runner.run(example)
    assert runner.tries > 5
    assert runner.failures == 0


@pytest.mark.parametrize("threshold", [0.5, (0.4, 0.8)], ids=["one", "by_head"])
def test_attaching_under_a_default_device_of_meta(model: Any, threshold: Any) -> None:
    expected = attached(model, threshold=threshold)
    outputs = [forward(model, timestep) for timestep in TIMESTEPS["falling"]]
    with torch.device("meta"):
        empty = tiny_transformer()
        processor = attached(empty, threshold=threshold)
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(model.state_dict(), assign=True)
    # what is no weight is made again, as loading does
    empty.rope = model.rope
    for timestep, output in zip(TIMESTEPS["falling"], outputs, strict=True):
        assert torch.equal(forward(empty, timestep), output)
    assert processor.stats.summary() == expected.stats.summary()
    with torch.device("meta"):
        processor.stats.reset()
        assert processor.stats.summary()["calls"] == 0
