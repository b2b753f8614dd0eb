"""What must hold for every model family: each check takes a `Family` and works on its tiny pipeline.

    @pytest.mark.parametrize("check", CHECKS, ids=check_id)
    @pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
    def test_family(family, check):
        check(family)

One pipeline and one dense run are kept, for the family in work: keep the families in the lower decorator,
as the upper one varies fastest.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tests.tiny.common import Family
from xattn_video import XAttnConfig, XAttnProcessor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

WARMUP_STEPS = 5
SETTINGS: dict[str, Any] = {"stride": 4, "block_size": 32, "min_tokens": 64}


@dataclass
class Run:
    """One call of a pipeline: its result and what every transformer forward gave, in order."""

    result: Tensor = field(default_factory=lambda: torch.empty(0))
    forwards: list[Tensor] = field(default_factory=list)
    log: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Subject:
    """A family's pipeline, the processors it was built with, and its dense run with them."""

    pipe: DiffusionPipeline
    stock: dict[str, object]
    dense: Run


@functools.lru_cache(maxsize=1)
def subject(family: Family) -> Subject:
    pipe = family.build(0)
    pipe.set_progress_bar_config(disable=True)
    return Subject(pipe, processors(family, pipe), run(family, pipe))


def processors(family: Family, pipe: DiffusionPipeline) -> dict[str, object]:
    """Every attention processor of the family's transformers by module path."""
    return {
        f"{component}.{path}": module.processor
        for component in family.transformers
        for path, module in getattr(pipe, component).named_modules()
        if hasattr(module, "processor")
    }


def run(family: Family, pipe: DiffusionPipeline, **overrides: Any) -> Run:
    """Call the pipeline; keep the result, each forward's output and diffusers' log."""
    record = Run()

    def keep(module: torch.nn.Module, args: object, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output.sample
        record.forwards.append(first.detach().clone())

    handles = [getattr(pipe, name).register_forward_hook(keep) for name in family.transformers]
    with _diffusers_log(record.log):
        try:
            record.result = family.call(pipe, **overrides).detach().clone()
        finally:
            for handle in handles:
                handle.remove()
    return record


@contextmanager
def _diffusers_log(messages: list[str]) -> Iterator[None]:
    # diffusers' loggers do not propagate to the root logger, so pytest's caplog would see nothing
    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("diffusers"), Keep()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def attached(pipe: DiffusionPipeline, **changes: Any) -> Iterator[XAttnProcessor]:
    """Sparse attention on all the pipeline's transformers; the processors it had afterwards."""
    processor = XAttnProcessor(XAttnConfig(**{**SETTINGS, **changes}))
    pipe.set_attn_processor(processor)
    try:
        yield processor
    finally:
        pipe.set_attn_processor(None)


@contextmanager
def spied_xattention() -> Iterator[list[tuple[int, int]]]:
    """The (query length, key length) of every sparse call that the integration makes."""
    lengths: list[tuple[int, int]] = []
    owners = [
        module
        for name, module in sys.modules.items()
        if name.startswith("xattn_video.integrations") and hasattr(module, "attend_sparse")
    ]
    assert owners, "no module of xattn_video.integrations holds attend_sparse: this spy would see nothing"
    with pytest.MonkeyPatch.context() as patch:
        for owner in owners:
            original = owner.attend_sparse

            def spy(backend: Any, call: Any, config: XAttnConfig, _original: Any = original) -> Any:
                lengths.append((call.query.shape[2], call.key.shape[2]))
                return _original(backend, call, config)

            patch.setattr(owner, "attend_sparse", spy)
        yield lengths


@functools.lru_cache(maxsize=1)
def spied_run(family: Family) -> tuple[Run, list[tuple[int, int]]]:
    """A run that is sparse from the first step on, and the lengths of its sparse calls."""
    own = subject(family)
    with attached(own.pipe, threshold=0.5, warmup_steps=0), spied_xattention() as lengths:
        return run(family, own.pipe), lengths


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def forwards(family: Family, steps: int) -> int:
    """Transformer forwards in `steps` steps of each generation of one call."""
    return steps * family.forwards_per_step * family.generations


def check_runs_as_described(family: Family) -> None:
    """The description of the family that the other checks build on."""
    assert len(subject(family).dense.forwards) == forwards(family, family.steps)
    assert family.steps > WARMUP_STEPS
    assert torch.isfinite(subject(family).dense.result).all()


def check_threshold_one_equals_stock(family: Family) -> None:
    """Every block kept in every step: the sparse path gives what the stock processors give."""
    own = subject(family)
    with attached(own.pipe, threshold=1.0, warmup_steps=0) as processor:
        sparse = run(family, own.pipe)
    summary = processor.stats.summary()
    assert summary["sparse_calls"] == family.layers * forwards(family, family.steps)
    assert summary["density"] == 1.0
    assert sparse.result.dtype == own.dense.result.dtype
    assert relative_error(sparse.result, own.dense.result) < family.tolerance


def check_refreshes_equal_stock_and_leave_nothing(family: Family) -> None:
    """A refresh in each step gives what the stock processors give, and nothing is remembered after the video."""
    own = subject(family)
    every: dict[str, Any] = {"residual": "int4", "refresh_every": 1, "anchors": 1}
    with attached(own.pipe, threshold=0.5, warmup_steps=1, **every) as processor:
        refreshed = run(family, own.pipe)
    assert processor.stats.residual.held == 0
    summary = processor.stats.summary()
    assert summary["dense_calls"] == {"refresh": family.layers * forwards(family, family.steps)}
    assert summary["density"] == 1.0
    assert summary["residual_bytes"] > 0
    assert relative_error(refreshed.result, own.dense.result) < family.tolerance


def check_warmup_is_dense_then_sparse(family: Family) -> None:
    """Five steps equal dense exactly, the later ones do not, and the statistics say so."""
    own = subject(family)
    with attached(own.pipe, threshold=0.5, warmup_steps=WARMUP_STEPS) as processor:
        sparse = run(family, own.pipe)
    assert len(sparse.forwards) == len(own.dense.forwards)
    first = WARMUP_STEPS * family.forwards_per_step
    for index in range(first):
        assert torch.equal(sparse.forwards[index], own.dense.forwards[index]), f"forward {index} is not dense"
    for index in range(first, family.steps * family.forwards_per_step):
        error = relative_error(sparse.forwards[index], own.dense.forwards[index])
        assert error > 1e-3, f"forward {index} does not show the dropped blocks: {error:.1e}"

    summary = processor.stats.summary()
    assert summary["calls"] == family.layers * forwards(family, family.steps)
    assert summary["dense_calls"] == {"warmup": family.layers * forwards(family, WARMUP_STEPS)}
    assert summary["sparse_calls"] == summary["calls"] - summary["dense_calls"]["warmup"]
    assert summary["sparse_density"] < 0.9
    by_step, by_layer = summary["density_by_step"], summary["density_by_layer"]
    assert list(by_step) == list(range(family.steps))
    assert all((density == 1.0) == (step < WARMUP_STEPS) for step, density in by_step.items())
    assert summary["density"] == pytest.approx(sum(by_step.values()) / family.steps)
    assert len(by_layer) == family.layers * len(family.transformers)
    assert all(density <= 1.0 for density in by_layer.values())
    assert min(by_layer.values()) < 1.0


def check_restore(family: Family) -> None:
    """`None` gives back the very processors that were there, and the very same output."""
    own = subject(family)
    with attached(own.pipe, threshold=0.5, warmup_steps=0):
        wrapped = processors(family, own.pipe)
    changed = [name for name, processor in own.stock.items() if wrapped[name] is not processor]
    assert len(changed) >= family.layers
    restored = processors(family, own.pipe)
    assert restored.keys() == own.stock.keys()
    assert all(restored[name] is processor for name, processor in own.stock.items())
    again = run(family, own.pipe)
    assert torch.equal(again.result, own.dense.result)


def check_only_video_self_attention_is_sparse(family: Family) -> None:
    """Text refiners, cross-attention and image branches never reach sparse attention."""
    _, lengths = spied_run(family)
    assert len(lengths) == family.layers * forwards(family, family.steps)
    assert {(tokens, tokens) for tokens in family.tokens} == set(lengths)


def check_no_argument_is_ignored(family: Family) -> None:
    """No wrapper hides its processor's arguments from diffusers (the rotary embedding would be dropped)."""
    sparse, _ = spied_run(family)
    log = subject(family).dense.log + sparse.log
    assert not [message for message in log if "will be ignored" in message]


def check_batch_items_are_independent(family: Family) -> None:
    """Two videos in one call are what each is alone."""
    if not family.batches:
        pytest.skip(f"{family.name}: the pipeline takes one video at a time")
    own = subject(family)
    # half the steps: nothing here depends on how many there are, only that some are dense and some sparse
    steps = {"num_inference_steps": family.inputs((0,))["num_inference_steps"] // 2}
    with attached(own.pipe, threshold=0.5, warmup_steps=WARMUP_STEPS // 2):
        both = run(family, own.pipe, items=(0, 1), **steps).result
        alone = [run(family, own.pipe, items=(item,), **steps).result for item in (0, 1)]
    assert both.shape[0] == 2
    for item in (0, 1):
        # room for a block at the very edge of the threshold, which rounding may keep or drop
        assert relative_error(both[item], alone[item][0]) < 5e-3
    assert relative_error(both[0], both[1]) > 1e-2


CHECKS: tuple[Callable[[Family], None], ...] = (
    check_runs_as_described,
    check_threshold_one_equals_stock,
    check_refreshes_equal_stock_and_leave_nothing,
    check_warmup_is_dense_then_sparse,
    check_restore,
    check_only_video_self_attention_is_sparse,
    check_no_argument_is_ignored,
    check_batch_items_are_independent,
)


def check_id(check: Callable[[Family], None]) -> str:
    return check.__name__.removeprefix("check_")
