"""Blocks that calls share: the second call like the first makes none anew, and no call gets those of another kind."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xattn_video import xattention
from xattn_video.ops import call_blocks as module
from xattn_video.ops.call_blocks import call_blocks, head_thresholds
from xattn_video.ops.key_mask import KeyMask

RULES = {"block_size": 32, "dense_tokens": None, "dense_last": 0}
NO_BOUNDS = KeyMask()


@pytest.fixture(autouse=True)
def nothing_kept():
    for kept in (module._kept_blocks, module._kept_thresholds):
        kept.cache_clear()
    yield
    for kept in (module._kept_blocks, module._kept_thresholds):
        kept.cache_clear()


class Operators(TorchDispatchMode):
    """Counts the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def query(batch=1, tokens=200):
    return torch.zeros(batch, 2, tokens, 16)


def operators_of_a_call(**arguments):
    tensor = torch.randn(1, 2, 256, 16)
    with Operators() as seen:
        xattention(tensor, tensor, tensor, stride=4, block_size=32, min_tokens=0, return_stats=True, **arguments)
    return seen.counts


@pytest.mark.parametrize("causal", [False, True])
def test_a_second_call_makes_no_blocks(causal):
    """What is left does not depend on masking: both kinds run the same few operators on the device."""
    first, second = (operators_of_a_call(causal=causal, backend="reference") for _ in range(2))
    assert first["bitwise_and"] > second["bitwise_and"]
    assert sum(first.values()) - sum(second.values()) > 20


def test_each_kind_of_call_gets_its_own():
    """All combinations one after the other, twice: what was kept for one must not reach another."""
    calls = itertools.product((1, 2), (200, 180), (200, 300), (16, 32), (False, True), (None, (150, 180)), (0, 40))
    calls = [call for call in calls if not call[6] or call[4]]
    for batch, q_len, kv_len, block_size, causal, dense_tokens, dense_last in [*calls, *calls]:
        rules = {"block_size": block_size, "dense_tokens": dense_tokens, "dense_last": dense_last}
        mask = KeyMask(causal)
        got = call_blocks(query(batch, q_len), kv_len, mask, **rules)
        valid, forced = mask.valid_and_forced_blocks(batch, q_len, kv_len, device=torch.device("cpu"), **rules)
        assert torch.equal(got.valid, valid)
        assert torch.equal(got.forced, forced)
        assert int(got.total) == int(valid.sum())


def test_calls_with_bounds_start_anew():
    """Their values may have changed in place."""
    bound = torch.tensor([200])
    full = call_blocks(query(), 200, KeyMask(kv_lens=bound), **RULES)
    bound.fill_(40)
    short = call_blocks(query(), 200, KeyMask(kv_lens=bound), **RULES)
    assert int(short.total) == 2 * 7 < int(full.total)


def test_few_are_kept():
    for tokens in range(100, 200):
        call_blocks(query(tokens=tokens), 200, NO_BOUNDS, **RULES)
    assert module._kept_blocks.cache_info().currsize == module.KEPT_CALLS


def test_the_masks_of_long_calls_are_not_kept():
    """All that is kept together stays small beside the bound of a call."""
    assert module.KEPT_CALLS * module.KEPT_MASK_BYTES <= 32 << 20
    rules = {**RULES, "block_size": 16}
    tokens = 16 * 1448
    for length, kept in ((tokens, 1), (tokens + 16, 1)):
        call_blocks(query(tokens=tokens), length, NO_BOUNDS, **rules)
        assert module._kept_blocks.cache_info().currsize == kept
    call_blocks(query(batch=2, tokens=tokens), tokens, NO_BOUNDS, **rules)
    assert module._kept_blocks.cache_info().currsize == 1


def test_what_inference_mode_made_serves_outside_of_it():
    with torch.inference_mode():
        first = call_blocks(query(), 200, NO_BOUNDS, **RULES)
    second = call_blocks(query(), 200, NO_BOUNDS, **RULES)
    assert second.valid is first.valid
    assert not first.valid.is_inference()


def test_a_list_of_dense_tokens_is_taken():
    tensor = torch.randn(1, 2, 256, 16)
    settings = {"stride": 4, "block_size": 32, "min_tokens": 0, "threshold": 0.5}
    pair, row = (
        xattention(tensor, tensor, tensor, dense_tokens=kind((200, 230)), **settings) for kind in (tuple, list)
    )
    assert torch.equal(pair, row)


def test_tracing_and_fake_tensors_leave_nothing_behind():
    """What a tracer makes has no values; and it warns of memories that it looks through."""

    def blocks(tensor):
        return call_blocks(tensor, 200, NO_BOUNDS, **RULES).forced

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced = torch.compile(blocks, fullgraph=True, backend="eager")(query())
    with torch._subclasses.FakeTensorMode() as mode:
        call_blocks(mode.from_tensor(query()), 200, NO_BOUNDS, **RULES)
    assert module._kept_blocks.cache_info().currsize == 0
    assert torch.equal(traced, blocks(query()))
    assert type(blocks(query())) is torch.Tensor


def test_thresholds_of_heads_are_copied_once():
    """A copy from the host makes it wait, in each of sixty layers."""
    shares = (0.5, 1.0)
    tensor = torch.randn(1, 2, 256, 16)
    settings = {"stride": 4, "block_size": 32, "min_tokens": 0, "return_stats": True}
    output, _ = xattention(tensor, tensor, tensor, threshold=shares, **settings)
    assert head_thresholds(tensor, shares) is head_thresholds(tensor, shares)
    assert module._kept_thresholds.cache_info().misses == 1
    for head, share in enumerate(shares):
        own = tensor[:, head : head + 1]
        assert torch.equal(xattention(own, own, own, threshold=share, **settings)[0], output[:, head : head + 1])
    compiled = torch.compile(lambda query: head_thresholds(query, (0.25, 0.75)), fullgraph=True, backend="eager")
    assert compiled(tensor).tolist() == [0.25, 0.75]
    assert module._kept_thresholds.cache_info().currsize == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_a_captured_graph_leaves_nothing_behind():
    """Memory of a graph's pool holds the values of its last replay, or none; each stream has its own."""
    tensor = query().cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call_blocks(tensor, 200, NO_BOUNDS, **RULES)
    assert module._kept_blocks.cache_info().currsize == 0
    here = call_blocks(tensor, 200, NO_BOUNDS, **RULES)
    with torch.cuda.stream(torch.cuda.Stream()):
        there = call_blocks(tensor, 200, NO_BOUNDS, **RULES)
    assert here.valid is not there.valid
