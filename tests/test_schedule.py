"""Which step is it: by the pipeline's timestep object, by its own index, or by the model's argument."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from xattn_video.integrations.dense_layers import dense_layers
from xattn_video.integrations.diffusers.steps import StepTracker, WeakLink


class Loop:
    """A pipeline's denoising loop as a tracker sees it: `_current_timestep`, and forwards with a timestep."""

    def __init__(self, tracker: StepTracker | None = None) -> None:
        self._current_timestep: object = None
        self.tracker = StepTracker() if tracker is None else tracker

    def run(self, timesteps: Iterable[object], forwards: int = 1, stop_after: int | None = None) -> list[int]:
        """Steps seen by each forward. `stop_after`: the run is interrupted in that step."""
        self._current_timestep = None
        steps = []
        for index, timestep in enumerate(timesteps):
            self._current_timestep = timestep
            argument = timestep * torch.ones(2) if isinstance(timestep, Tensor) else torch.tensor(timestep)
            steps += [self.tracker.observe(argument) for _ in range(forwards)]
            if index + 1 == stop_after:
                return steps
        self._current_timestep = None
        return steps


def bound_loop() -> Loop:
    loop = Loop()
    loop.tracker.bind(loop)
    return loop


def test_guidance_runs_two_forwards_a_step() -> None:
    assert bound_loop().run(torch.tensor([900.0, 600.0, 300.0]), forwards=2) == [0, 0, 1, 1, 2, 2]


def test_a_value_that_a_scheduler_repeats_is_another_step() -> None:
    assert bound_loop().run(torch.tensor([900.0, 900.0, 300.0]), forwards=2) == [0, 0, 1, 1, 2, 2]


def test_two_runs_in_a_row_start_at_zero_each() -> None:
    loop, timesteps = bound_loop(), torch.tensor([900.0, 600.0])
    assert loop.run(timesteps) == [0, 1]
    assert loop.run(timesteps) == [0, 1]


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_run_after_an_interrupted_one_starts_at_zero(stop_after: int) -> None:
    loop = bound_loop()
    loop.run(torch.tensor([900.0, 600.0, 300.0]), stop_after=stop_after)
    # set_timesteps makes new timesteps for every run
    assert loop.run(torch.tensor([900.0, 600.0, 300.0])) == [0, 1, 2]


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_shorter_run_after_an_interrupted_one_starts_at_zero(stop_after: int) -> None:
    # video to video with strength 0.5, whose first timestep is below where the other run stopped
    loop = bound_loop()
    loop.run(torch.tensor([900.0, 850.0, 800.0, 700.0]), stop_after=stop_after)
    assert loop.run(torch.tensor([900.0, 700.0, 500.0, 300.0])[2:]) == [0, 1]


def test_video_in_sections_warms_up_in_each() -> None:
    loop = bound_loop()
    loop._current_timestep = None
    steps = []
    for _ in range(2):
        for timestep in torch.tensor([900.0, 600.0]):
            loop._current_timestep = timestep
            steps.append(loop.tracker.observe(timestep))
    assert steps == [0, 1, 0, 1]


def test_steps_count_from_the_first_one_run() -> None:
    # strength 0.5: the loop starts in the middle of the schedule
    assert bound_loop().run(torch.tensor([900.0, 700.0, 500.0, 300.0])[2:]) == [0, 1]


def test_plain_numbers_are_told_apart_by_value() -> None:
    assert bound_loop().run([0.9, 0.6, 0.3], forwards=2) == [0, 0, 1, 1, 2, 2]


def test_timesteps_of_frames_count_by_their_largest() -> None:
    # diffusion forcing: later frames lag behind, so the largest value stands still at first
    matrix = torch.tensor([[900.0, 999.0, 999.0], [600.0, 900.0, 999.0], [300.0, 600.0, 900.0]])
    loop = bound_loop()
    steps = []
    for row in matrix:
        loop._current_timestep = row
        steps += [loop.tracker.observe(row.expand(1, -1).clone()) for _ in range(2)]
    assert steps == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("preview", [950.0, 10.0])
def test_a_call_between_two_steps_does_not_begin_the_run_anew(preview: float) -> None:
    loop = bound_loop()
    steps = []
    for timestep in torch.tensor([900.0, 600.0, 300.0]):
        loop._current_timestep = timestep
        steps += [loop.tracker.observe(timestep * torch.ones(2)) for _ in range(2)]
        # a callback at the end of the step looks at the model elsewhere
        assert loop.tracker.observe(torch.tensor(preview)) == 0
    assert steps == [0, 0, 1, 1, 2, 2]
    loop._current_timestep = None
    assert loop.run(torch.tensor([900.0, 600.0])) == [0, 1]


def test_a_pipeline_that_was_interrupted_starts_at_zero_after_another_one_ran() -> None:
    tracker = StepTracker()
    one, other = Loop(tracker), Loop(tracker)
    tracker.bind(one)
    tracker.bind(other)
    one.run([0.9, 0.8, 0.7], stop_after=2)
    one._current_timestep = None
    assert other.run([0.9, 0.5]) == [0, 1]
    assert one.run([0.6, 0.3]) == [0, 1]


def test_another_pipeline_with_the_same_model_is_counted_by_its_argument() -> None:
    tracker = StepTracker()
    owner, other = Loop(tracker), Loop(tracker)
    tracker.bind(owner)
    assert owner.run(torch.tensor([900.0, 600.0])) == [0, 1]
    assert other.run(torch.tensor([900.0, 600.0, 300.0]), forwards=2) == [0, 0, 1, 1, 2, 2]
    assert owner.run(torch.tensor([900.0, 600.0])) == [0, 1]


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_timestep_left_by_an_interrupted_run_does_not_stop_the_other_pipeline(stop_after: int) -> None:
    tracker = StepTracker()
    owner, other = Loop(tracker), Loop(tracker)
    tracker.bind(owner)
    owner.run(torch.tensor([900.0, 600.0, 300.0]), stop_after=stop_after)
    assert other.run(torch.tensor([999.0, 700.0, 400.0]), forwards=2) == [0, 0, 1, 1, 2, 2]
    # and with both of them bound
    tracker.bind(other)
    owner.run(torch.tensor([900.0, 600.0, 300.0]), stop_after=stop_after)
    assert other.run(torch.tensor([999.0, 700.0, 400.0]), forwards=2) == [0, 0, 1, 1, 2, 2]


def test_binding_after_an_interrupted_run_does_not_count_what_it_left() -> None:
    owner = Loop()
    owner.run(torch.tensor([900.0, 600.0]), stop_after=1)
    owner.tracker.bind(owner)
    assert owner.run(torch.tensor([900.0, 600.0])) == [0, 1]


def test_without_a_pipeline_the_argument_counts() -> None:
    tracker = StepTracker()
    assert [tracker.observe(torch.tensor([t, t])) for t in (9, 9, 6, 6, 3)] == [0, 0, 1, 1, 2]
    assert tracker.observe(torch.tensor([9, 9])) == 0


def test_arguments_by_token_count_by_their_largest() -> None:
    # Wan 2.2 5B image to video: the first frame's tokens are at timestep 0
    tracker = StepTracker()
    arguments = [torch.tensor([[0.0, t, t]]) for t in (9.0, 9.0, 6.0)]
    assert [tracker.observe(argument) for argument in arguments] == [0, 0, 1]


def test_an_index_from_the_pipeline_goes_first() -> None:
    loop = bound_loop()
    loop._current_timestep = torch.tensor(5.0)
    steps = [loop.tracker.observe(torch.tensor(5.0), step_index=index) for index in (3, 3, 4, 5, 3, 4)]
    assert steps == [0, 0, 1, 2, 0, 1]


def test_a_pipeline_that_counts_goes_on_after_other_calls_of_its_model() -> None:
    """A callback that makes a preview between the steps, without an index."""
    tracker, seen = StepTracker(), []
    for index in range(4):
        seen.append(tracker.observe(torch.tensor(9.0 - index), step_index=index))
        tracker.observe(torch.tensor(0.5))
    assert seen == [0, 1, 2, 3]
    # stopped there, and begun anew
    assert [tracker.observe(torch.tensor(9.0), step_index=index) for index in (0, 0, 1)] == [0, 0, 1]


def test_an_index_that_goes_on_in_another_run_starts_at_zero() -> None:
    """The pipeline was interrupted, and the next run counts its steps from the middle of the schedule."""
    pipe = Scheduled()
    tracker = StepTracker()
    tracker.bind(pipe)
    pipe.scheduler.set_timesteps([900.0, 600.0, 300.0])
    assert [tracker.observe(step_index=index) for index in (0, 1)] == [0, 1]
    pipe.scheduler.set_timesteps([900.0, 600.0, 300.0])
    assert [tracker.observe(step_index=index) for index in (2, 2, 3)] == [0, 0, 1]


class Scheduler:
    """A scheduler as a tracker sees it."""

    def __init__(self) -> None:
        self.timesteps = torch.tensor([999.0])
        self.step_index: int | None = None

    def set_timesteps(self, timesteps: list[float]) -> None:
        self.timesteps, self.step_index = torch.tensor(timesteps), None

    def step(self) -> None:
        self.step_index = 1 if self.step_index is None else self.step_index + 1


class Scheduled:
    """A pipeline with a scheduler."""

    def __init__(self) -> None:
        self.scheduler = Scheduler()
        self._current_timestep: Tensor | None = None


def test_stages_of_one_generation_go_on_counting() -> None:
    """Helios calls set_timesteps for each stage, and its scheduler knows the timesteps of all."""
    pipe, tracker = Scheduled(), StepTracker()
    tracker.bind(pipe)
    for stages, expected in ((2, [0, 1, 2, 3]), (1, [0, 1, 0, 1])):
        pipe.scheduler.timesteps_per_stage = dict.fromkeys(range(stages))  # type: ignore[attr-defined]
        for _ in range(2):
            steps = []
            for schedule in ([900.0, 700.0], [500.0, 300.0]):
                pipe.scheduler.set_timesteps(schedule)
                for timestep in pipe.scheduler.timesteps:
                    steps += [tracker.observe(timestep.to(torch.int64)) for _ in range(2)]
                    pipe.scheduler.step()
            assert steps[::2] == steps[1::2] == expected


@pytest.mark.parametrize("shows", [True, False])
def test_a_call_between_two_steps_of_a_scheduler(shows: bool) -> None:
    """A preview after scheduler.step does not move the steps of the run on twice."""
    pipe, tracker, steps = Scheduled(), StepTracker(), []
    tracker.bind(pipe)
    pipe.scheduler.set_timesteps([100.0, 500.0, 300.0, 300.0])
    for timestep in pipe.scheduler.timesteps:
        pipe._current_timestep = timestep if shows else None
        # the same memory as the schedule, or a copy: a model may be called with either
        steps += [tracker.observe(timestep.expand(2)), tracker.observe(timestep.clone())]
        pipe.scheduler.step()
        if shows:
            assert tracker.observe(torch.tensor(950.0)) == 0
    assert steps == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_pipeline_goes_on_after_a_whole_run_of_another_one() -> None:
    one, other, tracker = Scheduled(), Scheduled(), StepTracker()
    tracker.bind(one)
    tracker.bind(other)

    def run(pipe: Scheduled, between: Callable[[], object] = lambda: None) -> list[int]:
        steps = []
        pipe.scheduler.set_timesteps([900.0, 600.0, 300.0])
        for timestep in pipe.scheduler.timesteps:
            pipe._current_timestep = timestep
            steps.append(tracker.observe(timestep.expand(2)))
            pipe.scheduler.step()
            between()
        pipe._current_timestep = None
        return steps

    videos: list[list[int]] = []
    assert run(one, lambda: videos.append(run(other))) == [0, 1, 2]
    assert videos == [[0, 1, 2]] * 3


def test_a_model_without_timestep_counts_forwards() -> None:
    tracker = StepTracker()
    assert [tracker.observe() for _ in range(3)] == [0, 1, 2]


def test_the_pipeline_is_held_weakly() -> None:
    tracker = StepTracker()
    loop = Loop(tracker)
    tracker.bind(loop)
    link = WeakLink(loop)
    del loop
    gc.collect()
    assert link() is None
    assert [tracker.observe(torch.tensor(t)) for t in (9.0, 6.0)] == [0, 1]


def test_a_copied_pipeline_has_a_tracker_of_its_own() -> None:
    loop = bound_loop()
    loop.run(torch.tensor([900.0, 600.0]), stop_after=2)
    copied = copy.deepcopy(loop)
    assert copied.tracker is not loop.tracker
    # the original stands in its second step while the copy runs
    assert copied.run(torch.tensor([900.0, 900.0, 300.0])) == [0, 1, 2]
    # a tracker copied without its pipeline goes by the argument
    alone = copy.deepcopy(loop.tracker)
    assert [alone.observe(torch.tensor(t)) for t in (9.0, 6.0)] == [0, 1]


def test_dense_layers_by_index_and_pattern() -> None:
    names = [f"blocks.{index}.attn1" for index in range(4)]
    assert dense_layers(names, ()) == set()
    assert dense_layers(names, (0, -1)) == {0, 3}
    assert dense_layers(names, ("blocks.[12].*", 0)) == {0, 1, 2}


@pytest.mark.parametrize("layer", [4, -5, "blocks.9.attn1", "attn1"])
def test_dense_layers_that_do_not_exist_are_named(layer: int | str) -> None:
    names = [f"blocks.{index}.attn1" for index in range(4)]
    with pytest.raises(ValueError, match="dense_layers") as raised:
        dense_layers(names, (layer,))
    assert str(layer) in str(raised.value)
