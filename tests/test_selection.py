"""Selection keeps the smallest sufficient set: brute force over all subsets of small rows."""

from __future__ import annotations

import itertools

import pytest
import torch

from xattn_video import select_blocks
from xattn_video.ops.key_mask import KeyMask

CPU = torch.device("cpu")


def smallest_sufficient(row, valid, forced, tau):
    """Size and mass of the best set: fewest blocks that contain `forced` and reach tau, then most mass."""
    candidates = [j for j in range(len(row)) if valid[j] and not forced[j]]
    always = [j for j in range(len(row)) if forced[j]]
    total = sum(row[j] for j in range(len(row)) if valid[j])
    for extra in range(len(candidates) + 1):
        sets = [always + list(more) for more in itertools.combinations(candidates, extra)]
        sets = [kept for kept in sets if kept and sum(row[j] for j in kept) >= tau * total]
        if sets:
            return len(sets[0]), max(sum(row[j] for j in kept) for kept in sets)
    raise AssertionError("no set suffices")


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize(
    ("causal", "dense_tokens", "kv_lens"),
    [(False, None, None), (False, (120, 128), None), (True, None, None), (True, None, [128, 83])],
)
def test_the_kept_set_is_the_smallest_that_suffices(tau, causal, dense_tokens, kv_lens):
    generator = torch.Generator().manual_seed(int(tau * 100))
    scores = torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64) ** 4
    lens = None if kv_lens is None else torch.tensor(kv_lens)
    geometry = {"block_size": 16, "causal": causal, "kv_lens": lens}
    valid, forced = (
        blocks.expand(scores.shape)
        for blocks in KeyMask(causal, None, lens).valid_and_forced_blocks(
            2, 128, 128, block_size=16, dense_tokens=dense_tokens, device=CPU
        )
    )
    kept = select_blocks(scores, threshold=tau, dense_tokens=dense_tokens, **geometry)
    assert not (kept & ~valid).any()
    assert (kept | ~forced).all()
    for index in itertools.product(range(2), range(3), range(8)):
        if not valid[index].any():
            assert not kept[index].any()
            continue
        size, mass = smallest_sufficient(scores[index].tolist(), valid[index].tolist(), forced[index].tolist(), tau)
        assert int(kept[index].sum()) == size, index
        assert float(scores[index][kept[index]].sum()) == pytest.approx(mass)


def test_the_last_queries_keep_every_valid_block():
    scores = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)) ** 4
    geometry = {"block_size": 16, "causal": True, "threshold": 0.3}
    kept, paper = select_blocks(scores, dense_last=17, **geometry), select_blocks(scores, **geometry)
    assert torch.equal(kept[:, :, :6], paper[:, :, :6])
    assert torch.equal(kept[:, :, 6:], torch.ones(8, 8, dtype=torch.bool).tril()[6:].expand(1, 2, 2, 8))
    assert not paper[:, :, 6:].equal(kept[:, :, 6:])


def test_threshold_one_keeps_every_valid_block_even_without_mass():
    scores = torch.zeros(1, 1, 4, 4)
    scores[..., 0] = 1
    assert select_blocks(scores, threshold=1.0).all()
    causal = select_blocks(scores, threshold=1.0, causal=True)[0, 0]
    assert torch.equal(causal, torch.ones(4, 4).tril().bool())


def test_equal_scores_go_to_the_lower_index():
    kept = select_blocks(torch.ones(1, 1, 1, 8), threshold=0.5)
    assert kept[0, 0, 0].tolist() == [True] * 4 + [False] * 4


def test_a_row_without_mass_keeps_its_first_valid_block():
    kept = select_blocks(torch.zeros(1, 1, 2, 4), threshold=0.9, block_size=16, kv_start=torch.tensor([16]))
    assert kept[0, 0].tolist() == [[False, True, False, False]] * 2


def test_forced_mass_counts_towards_the_threshold():
    # The text block holds 0.6 of the mass: with tau 0.5 nothing else is needed.
    scores = torch.tensor([0.3, 0.1, 0.0, 0.6]).expand(1, 1, 4, 4)
    kept = select_blocks(scores, threshold=0.5, block_size=16, dense_tokens=(48, 64))[0, 0]
    assert kept[0].tolist() == [False, False, False, True]
    assert kept[3].all()


def test_thresholds_are_one_a_head():
    scores = torch.rand(2, 3, 4, 16, generator=torch.Generator().manual_seed(1))
    together = select_blocks(scores, threshold=torch.tensor([0.3, 0.8, 1.0]))
    for head, tau in enumerate([0.3, 0.8, 1.0]):
        assert torch.equal(together[:, head : head + 1], select_blocks(scores[:, head : head + 1], threshold=tau))
    assert together[:, 2].all()


def test_top_k_and_top_ratio():
    scores = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    kept = select_blocks(scores, selection="top_k", top_k=3)
    assert (kept.sum(-1) == 3).all()
    assert scores[kept].view(1, 2, 8, 3).amin(-1).ge(scores.masked_fill(kept, -1).amax(-1)).all()
    causal = select_blocks(scores, selection="top_ratio", top_ratio=0.5, causal=True)
    counts = torch.arange(1, 9)
    # The first and the own block are forced even where half of the valid blocks would be fewer.
    assert torch.equal(causal.sum(-1)[0, 0], torch.maximum((counts + 1) // 2, counts.clamp(max=2)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"threshold": 0.0}, "threshold must be in"),
        ({"threshold": 90}, r"threshold must be in \(0, 1\], got 90; 0\.9, not 90\?"),
        ({"threshold": torch.tensor([0.9, float("nan")])}, r"threshold must be in \(0, 1\], got \[0.8999"),
        ({"threshold": torch.tensor(1.5)}, "threshold must be in"),
        ({"threshold": torch.ones(5)}, "threshold must be a number or have shape"),
        ({"q_len": 500}, "q_len must fill 4 blocks"),
        ({"kv_len": 300}, "kv_len must fill 4 blocks"),
        ({"dense_tokens": (0, 513)}, "dense_tokens must be"),
        ({"dense_tokens": (9, 3)}, "dense_tokens must be"),
        ({"kv_lens": torch.tensor([600])}, "kv_lens must lie between"),
        ({"kv_lens": torch.tensor([1.5])}, "kv_lens must be an integer tensor"),
        ({"kv_start": torch.tensor([1, 2])}, "kv_start must have shape"),
        ({"dense_last": -1}, "dense_last must be an integer of 0 or more"),
        ({"dense_last": 2.5}, "dense_last must be an integer of 0 or more"),
        ({"dense_last": 9}, "dense_last goes with causal attention"),
        ({"selection": "top_k"}, "top_k"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, words):
    if "q_len" in arguments:
        arguments = {**arguments, "q_len": 384}
    with pytest.raises(ValueError, match=words):
        select_blocks(torch.rand(1, 2, 4, 4), **arguments)


def test_scores_must_have_four_dimensions():
    with pytest.raises(ValueError, match="scores must be"):
        select_blocks(torch.rand(4, 4))


def test_a_ratio_of_blocks_is_taken_exactly():
    """0.3 of 50 is 15, and above 15 in float32; 0.14 of 50 is 7, and above 7 in float64."""
    scores = torch.rand(1, 1, 50, 50)
    for ratio, count in ((0.3, 15), (0.14, 7), (0.5, 25), (0.31, 16), (1e-12, 1)):
        kept = select_blocks(scores, block_size=16, selection="top_ratio", top_ratio=ratio)
        assert kept.sum(-1).unique().tolist() == [count]
