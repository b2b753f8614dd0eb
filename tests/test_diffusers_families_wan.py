"""Sparse attention on tiny real pipelines of Wan 2.1 and 2.2, VACE, Animate, SkyReels-V2, ChronoEdit and Helios."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.family_checks import CHECKS, attached, check_id, run
from tests.tiny.common import Family
from tests.tiny.wan_family import WAN_FAMILIES
from tests.tiny.wan_relatives import WAN_RELATIVES

FAMILIES = (*WAN_FAMILIES, *WAN_RELATIVES)


# diffusers' Helios scheduler gives numpy.linspace a 0-d tensor
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
@pytest.mark.parametrize("check", CHECKS, ids=check_id)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_family(family: Family, check: Callable[[Family], None]) -> None:
    check(family)


def by_name(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def test_the_second_transformer_goes_on_counting_steps() -> None:
    """Wan 2.2 A14B: the switch comes during the dense steps and does not start them again."""
    family = by_name("wan2.2-a14b-t2v")
    pipe = family.build(0)
    with attached(pipe, threshold=0.5, warmup_steps=5) as processor:
        run(family, pipe)
    densities = processor.stats.summary()["density_by_layer"]
    first = [density for name, density in densities.items() if name.startswith("transformer.")]
    second = [density for name, density in densities.items() if name.startswith("transformer_2.")]
    assert first == [1.0, 1.0]
    assert len(second) == 2
    assert max(second) < 1.0


def test_block_causal_diffusion_forcing_stays_dense_and_says_why() -> None:
    """SkyReels-V2 with causal blocks passes a mask that is no key range: the result is stock's, not a wrong one."""
    family = by_name("skyreels-v2-df")
    pipe = family.build(0)
    # 4 latent frames, in blocks of 2 that start 2 steps apart
    asynchronous = {"causal_block_size": 2, "ar_step": 2, "num_frames": 13, "num_inference_steps": 2}
    dense = run(family, pipe, **asynchronous)
    with attached(pipe, threshold=0.5, warmup_steps=0) as processor:
        sparse = run(family, pipe, **asynchronous)
    assert torch.equal(sparse.result, dense.result)
    summary = processor.stats.summary()
    assert summary["dense_calls"] == {"mask": family.layers * len(dense.forwards)}
    assert summary["sparse_calls"] == 0


def test_control_layers_of_vace_are_counted_by_name() -> None:
    family = by_name("wan-vace")
    pipe = family.build(0)
    with attached(pipe, threshold=0.5, warmup_steps=0) as processor:
        run(family, pipe, num_inference_steps=1)
    names = processor.stats.summary()["density_by_layer"].keys()
    assert {name.split(".", 1)[1] for name in names} == {"vace_blocks.0.attn1", "blocks.0.attn1", "blocks.1.attn1"}
