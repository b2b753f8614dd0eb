"""Block geometry against token-level masks written out one query and key at a time."""

from __future__ import annotations

import pytest
import torch

from xattn_video.ops.block_lists import lists_to_mask, mask_to_lists
from xattn_video.ops.key_mask import KeyMask, num_blocks

CPU = torch.device("cpu")

CASES = [
    # batch, q_len, kv_len, block, causal, kv_start, kv_lens
    (1, 64, 64, 16, False, None, None),
    (1, 61, 77, 16, False, None, None),
    (1, 64, 64, 16, True, None, None),
    (1, 61, 77, 16, True, None, None),
    (1, 77, 61, 16, True, None, None),
    (3, 40, 70, 16, True, [0, 5, 33], [70, 70, 70]),
    (3, 40, 70, 16, True, None, [70, 41, 3]),
    (3, 50, 50, 32, False, [0, 7, 20], [50, 50, 20]),
    (2, 1, 33, 16, True, None, [33, 1]),
]


def token_visible(batch, q_len, kv_len, causal, kv_start, kv_lens):
    visible = torch.zeros(batch, q_len, kv_len, dtype=torch.bool)
    for b in range(batch):
        start = kv_start[b] if kv_start else 0
        stop = kv_lens[b] if kv_lens else kv_len
        for i in range(q_len):
            for j in range(start, stop):
                visible[b, i, j] = not causal or j <= i + stop - q_len
    return visible


def as_tensor(values):
    return None if values is None else torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("case", CASES)
def test_valid_blocks_hold_a_visible_pair(case):
    batch, q_len, kv_len, block, causal, kv_start, kv_lens = case
    visible = token_visible(batch, q_len, kv_len, causal, kv_start, kv_lens)
    mask = KeyMask(causal, as_tensor(kv_start), as_tensor(kv_lens))
    got = mask.valid_blocks(batch, q_len, kv_len, block_size=block, device=CPU)
    assert got.shape == (batch, 1, num_blocks(q_len, block), num_blocks(kv_len, block))
    for b in range(batch):
        for i in range(got.shape[2]):
            for j in range(got.shape[3]):
                pairs = visible[b, i * block : (i + 1) * block, j * block : (j + 1) * block]
                assert got[b, 0, i, j] == pairs.any(), (b, i, j)


@pytest.mark.parametrize("case", [case for case in CASES if case[4]])
def test_causal_keeps_the_first_block_and_the_querys_own(case):
    batch, q_len, kv_len, block, causal, kv_start, kv_lens = case
    visible = token_visible(batch, q_len, kv_len, causal, kv_start, kv_lens)
    mask = KeyMask(True, as_tensor(kv_start), as_tensor(kv_lens))
    forced = mask.valid_and_forced_blocks(batch, q_len, kv_len, block_size=block, device=CPU)[1][:, 0]
    for b in range(batch):
        offset = (kv_lens[b] if kv_lens else kv_len) - q_len
        for row in range(forced.shape[1]):
            queries = range(row * block, min((row + 1) * block, q_len))
            rows = visible[b, queries.start : queries.stop]
            valid = {j for j in range(forced.shape[2]) if rows[:, j * block : (j + 1) * block].any()}
            wanted = {min(valid)} if valid else set()
            wanted |= {(i + offset) // block for i in queries if i + offset >= 0} & valid
            assert set(forced[b, row].nonzero().flatten().tolist()) == wanted, (b, row)


def test_an_unaligned_offset_forces_two_own_blocks():
    forced = KeyMask(causal=True).valid_and_forced_blocks(1, 32, 72, block_size=32, device=CPU)[1]
    assert forced[0, 0].tolist() == [[True, True, True]]
    aligned = KeyMask(causal=True).valid_and_forced_blocks(1, 32, 96, block_size=32, device=CPU)[1]
    assert aligned[0, 0].tolist() == [[True, False, True]]


@pytest.mark.parametrize(("dense_last", "rows"), [(0, 0), (1, 1), (4, 1), (5, 2), (20, 2), (21, 3), (1000, 7)])
def test_the_blocks_of_the_last_queries_are_dense(dense_last, rows):
    # 100 queries are six blocks of 16 and one of 4.
    mask, geometry = KeyMask(causal=True), {"block_size": 16, "device": CPU}
    valid, forced = mask.valid_and_forced_blocks(1, 100, 132, dense_last=dense_last, **geometry)
    assert torch.equal(forced[:, :, 7 - rows :], valid[:, :, 7 - rows :])
    paper = mask.valid_and_forced_blocks(1, 100, 132, **geometry)[1]
    assert torch.equal(forced[:, :, : 7 - rows], paper[:, :, : 7 - rows])
    assert not KeyMask().valid_and_forced_blocks(1, 100, 100, dense_last=9, **geometry)[1].any()


def test_text_rows_and_columns_are_dense():
    geometry = {"block_size": 16, "device": CPU}
    forced = KeyMask().valid_and_forced_blocks(1, 100, 100, dense_tokens=(70, 81), **geometry)[1][0, 0]
    touching = torch.tensor([False, False, False, False, True, True, False])
    assert torch.equal(forced, touching[:, None] | touching[None, :])
    empty = KeyMask().valid_and_forced_blocks(1, 100, 100, dense_tokens=(70, 70), **geometry)[1]
    assert not empty.any()


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_valid_blocks_needs_no_mask(case):
    batch, q_len, kv_len, block, causal, kv_start, kv_lens = case
    mask, settings = KeyMask(causal, as_tensor(kv_start), as_tensor(kv_lens)), {"block_size": block, "device": CPU}
    count = mask.count_valid_blocks(batch, q_len, kv_len, **settings)
    assert count.dtype == torch.int64
    assert int(count) == int(mask.valid_blocks(batch, q_len, kv_len, **settings).sum())


@pytest.mark.parametrize("case", CASES)
def test_the_masks_of_some_rows_are_those_rows_of_the_masks(case):
    batch, q_len, kv_len, block, causal, kv_start, kv_lens = case
    mask, settings = KeyMask(causal, as_tensor(kv_start), as_tensor(kv_lens)), {"block_size": block, "device": CPU}
    exact = [{}, {"dense_last": 20}] if causal else [{}]
    exact += [{"dense_tokens": (20, 25)}, {"dense_tokens": (50, q_len)}] if q_len == kv_len else []
    for rules in exact:
        whole = mask.valid_and_forced_blocks(batch, q_len, kv_len, **settings, **rules)
        for begin in range(num_blocks(q_len, block)):
            for end in range(begin + 1, num_blocks(q_len, block) + 1):
                part = mask.valid_and_forced_blocks(batch, q_len, kv_len, rows=(begin, end), **settings, **rules)
                for got, wanted in zip(part, whole, strict=True):
                    assert torch.equal(got, wanted[:, :, begin:end]), (rules, begin, end)


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_kept_block_lists_hold_the_mask(keep):
    mask = torch.rand(2, 3, 5, 17, generator=torch.Generator().manual_seed(0)) < keep
    indices, counts = mask_to_lists(mask)
    assert indices.dtype == counts.dtype == torch.int32
    for b, h, row in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        count = int(counts[b, h, row])
        assert indices[b, h, row, :count].tolist() == mask[b, h, row].nonzero().flatten().tolist()
        assert not indices[b, h, row, count:].any()
    assert torch.equal(lists_to_mask(indices, counts), mask)
