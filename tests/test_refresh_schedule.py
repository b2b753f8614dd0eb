"""Which steps are dense, which refresh the residual, and which threshold the others have."""

from __future__ import annotations

from typing import Any

import pytest

from xattn_video import XAttnConfig
from xattn_video.integrations.diffusers.schedule import Schedule


def refreshes(total: int | None, steps: int, layer: int = 0, **settings: Any) -> list[int]:
    """The steps in which a layer refreshes, the last one of the warm-up among them."""
    schedule = Schedule(XAttnConfig(residual="int4", **settings), total)
    return [step for step in range(steps) if schedule.last_refresh(step, layer) == step]


def test_gaps_grow_from_the_warm_up_on_up_to_the_largest_one() -> None:
    """Sparse steps 0 1 3 6 10 14; 5 dense steps come before them."""
    assert refreshes(20, 20) == [4, 5, 6, 8, 11, 15, 19]
    assert refreshes(None, 20) == [4, 5, 6, 8, 11, 15, 19]
    assert refreshes(20, 20, refresh_every=3, refresh="growing") == [4, 5, 6, 8, 10, 13, 16, 19]
    assert refreshes(20, 20, refresh_every=5, refresh="growing") == [4, 5, 6, 8, 12, 17]


def test_short_gaps_do_not_grow() -> None:
    """In a video of 8 steps most would be refreshes; and a share of the steps never means all of them."""
    assert refreshes(20, 20, refresh_every=2, refresh="growing") == [4, 6, 8, 10, 12, 14, 16, 18]
    for share in (0.25, 0.15, 0.1):
        assert refreshes(8, 8, warmup=0.25, refresh_every=share, refresh="growing") == [1, 3, 5, 7]
        assert refreshes(4, 4, warmup=0.25, refresh_every=share, refresh="growing") == [0, 2]


def test_gaps_are_longer_where_a_video_has_more_steps() -> None:
    assert refreshes(50, 50) == [4, 5, 7, 12, 20, 30, 40]
    assert refreshes(50, 50, refresh_every=0.2, refresh="growing") == refreshes(50, 50)
    assert refreshes(20, 20, refresh_every=0.25, refresh="growing") == refreshes(
        20, 20, refresh_every=5, refresh="growing"
    )


def test_layers_take_turns_where_the_gap_is_fixed() -> None:
    every_4 = [refreshes(20, 20, layer, refresh_every=4)[1:] for layer in range(4)]
    assert every_4 == [[8, 12, 16], [7, 11, 15, 19], [6, 10, 14, 18], [5, 9, 13, 17]]
    assert refreshes(20, 20, 4, refresh_every=4)[1:] == every_4[0]


def test_every_layer_refreshes_in_the_last_step_of_the_warm_up() -> None:
    for layer in range(8):
        assert refreshes(20, 20, layer, refresh_every=4)[0] == 4
        assert refreshes(20, 20, layer)[0] == 4


def test_a_gap_of_one_refreshes_in_every_step() -> None:
    assert refreshes(20, 20, 3, refresh_every=1) == list(range(4, 20))
    assert refreshes(20, 20, 3, refresh_every=1, refresh="growing") == list(range(4, 20))


def test_steps_may_be_named() -> None:
    assert refreshes(20, 20, refresh=(0, 2, 7)) == [4, 5, 7, 12]
    assert refreshes(20, 20, refresh=(2,), warmup_steps=0) == [2]


@pytest.mark.parametrize(
    ("total", "share", "dense"),
    [(4, 0.25, 1), (8, 0.25, 2), (6, 0.25, 2), (4, 0.01, 1), (50, 0.25, 5), (None, 0.25, 5)],
)
def test_the_warm_up_may_be_limited_to_a_share_of_the_steps(total: int | None, share: float, dense: int) -> None:
    assert Schedule(XAttnConfig(warmup=share), total).warmup == dense


def test_a_warm_up_of_most_steps_is_doubted() -> None:
    doubt = Schedule(XAttnConfig(), 8).doubt()
    assert doubt is not None
    assert "5 of 8 steps are dense" in doubt
    assert "warmup=0.25" in doubt
    assert "4 of 4 steps" in str(Schedule(XAttnConfig(), 4).doubt())
    for config, total in ((XAttnConfig(), 10), (XAttnConfig(warmup=0.9), 8), (XAttnConfig(), None)):
        assert Schedule(config, total).doubt() is None


def test_the_last_steps_may_be_dense() -> None:
    schedule = Schedule(XAttnConfig(last_steps=2), 10)
    assert [schedule.dense_reason(step) for step in range(10)] == ["warmup"] * 5 + [None] * 3 + ["last_steps"] * 2
    # more than there are
    schedule = Schedule(XAttnConfig(last_steps=20), 10)
    assert [schedule.dense_reason(step) for step in (4, 5, 9)] == ["warmup", "last_steps", "last_steps"]
    assert Schedule(XAttnConfig(last_steps=2), None).dense_reason(9) is None


def test_the_threshold_falls_around_its_value() -> None:
    schedule = Schedule(XAttnConfig(threshold_ramp=0.3, last_steps=1), 11)
    shifts = [schedule.threshold_shift(step) for step in range(5, 10)]
    assert shifts == pytest.approx([0.15, 0.075, 0, -0.075, -0.15])
    assert Schedule(XAttnConfig(threshold_ramp=0.3), None).threshold_shift(7) == 0
