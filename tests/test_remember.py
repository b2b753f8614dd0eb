"""Calls that remember: the same in chunks as whole, on every backend for a CPU; what a kept choice of blocks gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xattn_video import XAttnConfig
from xattn_video.ops import (
    Backend,
    Call,
    KeyMask,
    attend_choosing,
    attend_kept,
    attend_sparse,
    checked_call,
    dense_attention,
    find_backend,
    packed_bytes,
    refresh,
)
from xattn_video.ops.remember import pack_bits, unpack_bits

BACKENDS = ("reference", "cpu", "flex")
SETTINGS: dict[str, Any] = {"stride": 4, "block_size": 16, "threshold": 0.5, "min_tokens": 0, "residual": "full"}


def problem(tokens: int = 200, seed: int = 0, **settings: Any) -> Call:
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(2, 4, tokens, 16, generator=generator)
    key, value = (torch.randn(2, 2, tokens, 16, generator=generator) for _ in range(2))
    return checked_call(query, key, value, settings.pop("mask", KeyMask()), threshold=0.5, **settings)


def backend_of(config: XAttnConfig, call: Call) -> Backend:
    tokens = call.query.shape[2]
    backend = find_backend(config, *call[:3], q_len=tokens, kv_len=tokens)
    assert isinstance(backend, Backend), backend
    return backend


def dense(call: Call) -> Tensor:
    return dense_attention(*call[:4], scale=call.scale)


def padded() -> KeyMask:
    return KeyMask(kv_lens=torch.tensor([200, 131], dtype=torch.int32))


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"mask": padded()},
    "text": {"dense_tokens": (170, 200)},
}


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_refresh_is_dense_and_what_it_leaves_makes_the_next_call_dense(name: str, kind: str) -> None:
    config = XAttnConfig(**SETTINGS, backend=name)
    call = problem(**CALLS[kind])
    backend = backend_of(config, call)
    outcome, memory = refresh(backend, call, config)
    torch.testing.assert_close(outcome.output, dense(call), rtol=0, atol=1e-5)
    plain = attend_sparse(backend, call, config)
    assert int(outcome.kept.sum()) == int(plain.kept.sum()) < 4 * int(outcome.valid)
    # the same queries, keys and values once more: the residual is just what is missed
    again = attend_kept(backend, call, config, memory)
    torch.testing.assert_close(again.output, dense(call), rtol=0, atol=1e-5)
    # other ones, with the blocks of the first: a refresh is dense all the same
    other = problem(seed=1, **CALLS[kind])
    moved, later = refresh(backend, other, config, memory.blocks)
    torch.testing.assert_close(moved.output, dense(other), rtol=0, atol=1e-5)
    assert torch.equal(later.blocks, memory.blocks)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_kept_choice_gives_the_bits_of_the_call_that_chose(name: str) -> None:
    config = XAttnConfig(**{**SETTINGS, "residual": "off"}, backend=name)
    call = problem()
    backend = backend_of(config, call)
    plain = attend_sparse(backend, call, config)
    chosen, memory = attend_choosing(backend, call, config)
    kept = attend_kept(backend, call, config, memory)
    for outcome in (chosen, kept):
        assert torch.equal(outcome.output, plain.output)
        assert torch.equal(outcome.kept.sum(), plain.kept.sum())


@pytest.mark.parametrize("kind", ["int4", "full"])
def test_long_calls_are_remembered_in_chunks(kind: str) -> None:
    """2,048 tokens in blocks of 16: lists and masks of the whole call take more than the bound of 1 MiB."""
    whole_config = XAttnConfig(**{**SETTINGS, "residual": kind})
    config = whole_config.replace(max_extra_mib=1)
    call = problem(2048)
    backend = backend_of(config, call)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return backend.block_sparse_forward(*args, **kwargs)

    counting = backend._replace(block_sparse_forward=counted)
    whole, memory = refresh(backend, call, whole_config)
    parts, memory_of_parts = refresh(counting, call, config)
    assert calls > 2, "the call was done whole: the test shows nothing"
    torch.testing.assert_close(parts.output, whole.output, rtol=0, atol=1e-5)
    assert torch.equal(memory_of_parts.blocks, memory.blocks)
    other = problem(2048, seed=1)
    for before in (None, memory):
        torch.testing.assert_close(
            attend_kept(backend, other, config, memory_of_parts, before=before, factor=0.5).output,
            attend_kept(backend, other, whole_config, memory, before=before, factor=0.5).output,
            rtol=0,
            # one step of an int4 where a value lies between two
            atol=1e-5 if kind == "full" else 0.3,
        )
    chosen, choice = attend_choosing(counting, call, config)
    assert torch.equal(choice.blocks, memory.blocks)
    assert int(chosen.kept.sum()) == int(parts.kept.sum())


def test_packed_bytes_are_what_a_residual_takes() -> None:
    for kind in ("int4", "fp8", "full"):
        call = problem()
        config = XAttnConfig(**{**SETTINGS, "residual": kind})
        _, memory = refresh(backend_of(config, call), call, config)
        assert memory.residual is not None
        assert memory.residual.nbytes == packed_bytes(call.query.shape, 4, kind)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 34])
def test_masks_survive_their_packing(length: int) -> None:
    mask = torch.rand(2, 3, 5, length) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape[-1] == -(-length // 8)
    assert torch.equal(unpack_bits(packed, length), mask)
