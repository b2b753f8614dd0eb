"""The generated inputs have the structure that makes a wrong choice of blocks visible."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xattn_video import block_sparse_attention, score_blocks, select_blocks
from xattn_video.ops import reference
from xattn_video.ops.key_mask import KeyMask
from xattn_video.testing.synthetic import causal_text_like_qkv, video_like_qkv

BLOCK = 128
# (make inputs, causal): 2,048 tokens in 16 blocks
INPUTS = {
    "video": (lambda: video_like_qkv(1, 3, 8, 16, 16, 64, locality=0.8), False),
    "text": (lambda: causal_text_like_qkv(1, 3, 2048, 64, locality=0.8), True),
}


def relative_error(output: Tensor, truth: Tensor) -> float:
    return ((output - truth).norm() / truth.norm()).item()


def density(block_mask: Tensor, causal: bool = False) -> float:
    length = block_mask.shape[-1] * BLOCK
    valid = KeyMask(causal).valid_blocks(1, length, length, block_size=BLOCK, device=block_mask.device)
    return block_mask.sum().item() / (valid.sum().item() * block_mask.shape[1])


def diagonal_scores(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """Block scores whose tiles are summed along the diagonal: reversing a group's queries turns one into the other."""
    reversed_query = query.unflatten(2, (-1, 8)).flip(3).flatten(2, 3)
    return score_blocks(reversed_query, key, causal=causal)


@pytest.mark.parametrize("name", INPUTS)
def test_leaving_out_the_best_block_costs_over_ten_percent(name: str) -> None:
    make, causal = INPUTS[name]
    query, key, value = make()
    length = query.shape[2]
    scores = score_blocks(query, key, causal=causal)
    kept = select_blocks(scores, causal=causal)
    forced = KeyMask(causal).valid_and_forced_blocks(1, length, length, block_size=BLOCK, device=query.device)[1]
    free = scores.masked_fill(~kept | forced, -1)
    # Rows that keep a block of their own choice, beside another one.
    chosen = (free.amax(-1) > 0) & (kept.sum(-1) > 1)
    fewer = kept.scatter(-1, free.argmax(-1, keepdim=True), False) | (kept & forced)
    with_it = block_sparse_attention(query, key, value, kept, causal=causal).unflatten(2, (-1, BLOCK))
    without = block_sparse_attention(query, key, value, fewer, causal=causal).unflatten(2, (-1, BLOCK))
    cost = ((with_it - without).norm(dim=(3, 4)) / with_it.norm(dim=(3, 4)))[chosen]
    assert chosen.float().mean() > 0.5
    assert cost.median() > 0.25
    assert (cost > 0.1).float().mean() > 0.85


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("wrong", ["diagonal", "random"])
def test_another_score_chooses_worse_blocks_at_equal_density(name: str, wrong: str) -> None:
    make, causal = INPUTS[name]
    query, key, value = make()
    length = query.shape[2]
    valid, forced = KeyMask(causal).valid_and_forced_blocks(1, length, length, block_size=BLOCK, device=query.device)
    scores = score_blocks(query, key, causal=causal)
    kept = select_blocks(scores, causal=causal)
    other = diagonal_scores(query, key, causal) if wrong == "diagonal" else torch.rand_like(scores)
    as_many = reference.select_top(other, valid, forced, count=kept.sum(-1, keepdim=True))
    assert as_many.sum() == kept.sum()

    everything = valid.expand(kept.shape)
    dense = block_sparse_attention(query, key, value, everything, causal=causal)
    error = relative_error(block_sparse_attention(query, key, value, kept, causal=causal), dense)
    worse = relative_error(block_sparse_attention(query, key, value, as_many, causal=causal), dense)
    assert error < 0.25
    assert worse > 1.8 * error


def test_density_falls_with_locality() -> None:
    found = []
    for locality in (0.0, 0.4, 0.7, 1.0):
        query, key, _ = video_like_qkv(1, 3, 4, 32, 32, 64, locality=locality)
        found.append(density(select_blocks(score_blocks(query, key))))
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.8
    assert found[-1] < 0.25


def test_text_like_heads_are_slashes_and_verticals() -> None:
    query, key, _ = causal_text_like_qkv(1, 3, 4096, 64, locality=0.8)
    mass = score_blocks(query, key, causal=True)[0] / (BLOCK // 8)
    rows = torch.arange(32)
    below = {back: mass[:, rows[back:], rows[: 32 - back]].mean(1) for back in range(1, 20)}
    # One distance stands out in the slash head, the first key block in the vertical one.
    assert max(float(band[0]) for band in below.values()) > 0.2
    assert mass[1, 8:, 0].mean() > 0.2
    assert mass[1, 8:, 0].mean() > 5 * mass[0, 8:, 0].mean()


def test_seed_dtype_heads_and_text() -> None:
    query, key, value = video_like_qkv(2, 6, 3, 5, 7, 24, kv_heads=2, text_tokens=11, dtype=torch.bfloat16, seed=3)
    assert query.shape == (2, 6, 116, 24)
    assert key.shape == value.shape == (2, 2, 116, 24)
    assert {part.dtype for part in (query, key, value)} == {torch.bfloat16}
    assert all(part.isfinite().all() for part in (query, key, value))
    again = video_like_qkv(2, 6, 3, 5, 7, 24, kv_heads=2, text_tokens=11, dtype=torch.bfloat16, seed=3)
    other = video_like_qkv(2, 6, 3, 5, 7, 24, kv_heads=2, text_tokens=11, dtype=torch.bfloat16, seed=4)
    assert all(torch.equal(one, two) for one, two in zip((query, key, value), again, strict=True))
    assert not torch.equal(query, other[0])
    assert not torch.equal(key[0], key[1])
    odd = causal_text_like_qkv(1, 3, 77, 9)
    assert [part.shape for part in odd] == [(1, 3, 77, 9)] * 3


@pytest.mark.parametrize("make", [lambda: video_like_qkv(1, 3, 3, 5, 7, 24, text_tokens=11), INPUTS["text"][0]])
def test_everything_is_made_on_the_device_that_was_asked_for(make) -> None:
    """Nothing on torch's default device, which is another one here: a tensor left there would meet the others."""
    expected = make()
    with torch.device("meta"):
        made = make()
    assert {part.device.type for part in made} == {"cpu"}
    assert all(torch.equal(one, two) for one, two in zip(made, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize("causal", [False, True])
def test_inputs_made_on_a_gpu_are_of_the_same_kind(causal: bool) -> None:
    """Other random numbers, and the same sizes: norms, and the density that a choice of blocks has.

    On a CPU the density differs by up to 15 % from seed to seed, and the norms by 1 %.
    """
    densities, norms = [], []
    for device in ("cpu", "cuda"):
        parts, again = (
            causal_text_like_qkv(1, 6, 4096, 64, device=device)
            if causal
            else video_like_qkv(1, 6, 4, 32, 32, 64, device=device)
            for _ in range(2)
        )
        assert {part.device.type for part in parts} == {device}
        assert all(torch.equal(one, two) for one, two in zip(parts, again, strict=True))
        query, key, value = (part.cpu() for part in parts)
        densities.append(density(select_blocks(score_blocks(query, key, causal=causal), causal=causal), causal))
        norms.append([part.square().mean().item() for part in (query, key, value)])
    assert densities[0] == pytest.approx(densities[1], rel=0.3)
    assert norms[0] == pytest.approx(norms[1], rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"locality": 1.2}, "locality"),
        ({"head_dim": 6}, "head_dim"),
        ({"kv_heads": 3}, "kv_heads"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, float], message: str) -> None:
    sizes = {"head_dim": 16} | arguments
    with pytest.raises(ValueError, match=message):
        video_like_qkv(1, 4, 2, 4, 4, **sizes)
    with pytest.raises(ValueError, match=message):
        causal_text_like_qkv(1, 4, 32, **sizes)
