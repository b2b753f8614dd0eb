"""Residual memory: what a refresh stores and what the other steps add, in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.residual_checks import check_stored, exact_residual
from xattn_video.ops import KeyMask, dense_attention
from xattn_video.ops.backends import resolve
from xattn_video.ops.block_lists import mask_to_lists
from xattn_video.ops.residual import RESIDUALS, Packed, add, merge, unpack

CPU_BACKENDS = ("reference", "cpu", "flex")
INF = torch.inf


def random_qkv(heads, kv_heads, q_len, kv_len, head_dim, *, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(q_len + head_dim)
    sizes = [(heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len)]
    query, key, value = (torch.randn(batch, count, length, head_dim, generator=generator) for count, length in sizes)
    return (2 * query).to(dtype), key.to(dtype), value.to(dtype)


def two_parts(
    backend: str, query: Tensor, key: Tensor, value: Tensor, mask: KeyMask, dense_tokens: tuple[int, int] | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Outputs and log-sum-exps over random blocks and over their complement, and which blocks were kept."""
    batch, heads, q_len, head_dim = query.shape
    sizes: dict[str, Any] = {"block_size": 32, "device": query.device}
    valid, forced = mask.valid_and_forced_blocks(batch, q_len, key.shape[2], dense_tokens=dense_tokens, **sizes)
    shape = (batch, heads, *valid.shape[2:])
    kept = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4) & valid | forced
    options = {"block_size": 32, "scale": head_dim**-0.5, **mask.keywords}
    forward = resolve(backend, query.device, query.dtype).block_sparse_forward
    parts = [forward(query, key, value, *mask_to_lists(part), **options) for part in (kept, valid & ~kept)]
    return (*parts[0], *parts[1]), kept


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim", "masking"),
    [
        ((200, 200), (4, 2), 40, {}),
        ((130, 203), (2, 1), 33, {"causal": True}),
        ((201, 201), (2, 2), 16, {"kv_lens": torch.tensor([201, 90])}),
        (
            (90, 203),
            (4, 1),
            16,
            {"causal": True, "kv_start": torch.tensor([33, 0]), "kv_lens": torch.tensor([203, 80])},
        ),
    ],
    ids=["plain", "causal, odd D", "padded", "causal and padded"],
)
@pytest.mark.parametrize("kind", RESIDUALS)
def test_a_refresh_is_dense_attention(backend, lengths, heads, head_dim, masking, kind):
    """Every key is read once, in one of the two parts: also where a row sees no key of one part, or none at all."""
    mask = KeyMask(**masking)
    query, key, value = random_qkv(*heads, *lengths, head_dim)
    parts, _ = two_parts(backend, query, key, value, mask)
    wanted = dense_attention(query, key, value, mask)
    dense, packed = merge(*parts, kind)
    torch.testing.assert_close(dense, wanted, atol=4e-6, rtol=1e-5)
    residual = unpack(packed, head_dim, torch.float32)
    if kind == "full":
        torch.testing.assert_close(parts[0] + residual, wanted, atol=4e-6, rtol=1e-5)
    else:
        exact = wanted - parts[0]
        assert (residual - exact).norm() < (0.1 if kind == "int4" else 0.03) * exact.norm()
        assert (add(parts[0], packed) - wanted).norm() < (parts[0] - wanted).norm() * 0.1


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_rows_that_keep_every_block_have_no_residual(backend):
    """Such as a text's, which `dense_tokens` keeps exact: the output of the refresh is theirs bit for bit."""
    query, key, value = random_qkv(2, 2, 200, 200, 32)
    (output, lse, other, other_lse), kept = two_parts(backend, query, key, value, KeyMask(), dense_tokens=(160, 200))
    assert kept[:, :, 5:].all()
    assert not kept.all()
    dense, packed = merge(output, lse, other, other_lse, "int4")
    assert (other_lse[:, :, 160:] == -INF).all()
    assert torch.equal(dense[:, :, 160:], output[:, :, 160:])
    assert packed.scale is not None
    assert torch.equal(packed.scale > 0, other_lse.isfinite())
    assert packed.scale.any()
    assert torch.equal(add(output, packed)[:, :, 160:], output[:, :, 160:])


@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [1, 2, 5, 40, 128])
def test_what_is_stored(kind, dtype, head_dim):
    output, lse, other, other_lse = random_parts(head_dim, dtype)
    dense, packed = merge(output, lse, other, other_lse, kind)
    assert dense.dtype == dtype
    check_stored(packed, kind, exact_residual(output, lse, other, other_lse), dtype)
    assert unpack(packed, head_dim, dtype).dtype == dtype


def random_parts(head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs `[2, 3, 9, D]` and log-sum-exps of two parts of an attention call."""
    generator = torch.Generator().manual_seed(head_dim)
    output, other = (torch.randn(2, 3, 9, head_dim, generator=generator, dtype=torch.float64) for _ in range(2))
    lse, other_lse = (2 * torch.randn(2, 3, 9, generator=generator) for _ in range(2))
    return output.to(dtype), lse, other.to(dtype), other_lse


def test_the_bytes_of_an_int4_residual():
    """Dimensions 0 to 2 in the low bits, 3 and 4 in the high ones, each with 8 added: what a kernel must write too."""
    lse = torch.zeros(1, 1, 1)
    residual = torch.tensor([7.0, -7.0, 3.4, -0.6, 2.0])
    # with equal log-sum-exps R is half of the other output, where the own one is 0
    _, packed = merge(torch.zeros(1, 1, 1, 5), lse, 2 * residual.expand(1, 1, 1, 5), lse, "int4")
    assert packed.values.flatten().tolist() == [15 | 7 << 4, 1 | 10 << 4, 11 | 8 << 4]
    assert unpack(packed, 5, torch.float32).flatten().tolist() == [7, -7, 3, -1, 2]


@pytest.mark.parametrize("kind", RESIDUALS)
def test_parts_that_are_empty(kind):
    output, lse, other, other_lse = random_parts(8, torch.float32)
    other[0, 0, 0], other_lse[0, 0, 0] = 0, -INF
    output[0, 0, 1], lse[0, 0, 1] = 0, -INF
    output[0, 0, 2] = other[0, 0, 2] = 0
    lse[0, 0, 2] = other_lse[0, 0, 2] = -INF
    dense, packed = merge(output, lse, other, other_lse, kind)
    residual = unpack(packed, 8, torch.float32)
    assert torch.equal(dense[0, 0, 0], output[0, 0, 0])
    assert not residual[0, 0, 0].any()
    assert torch.equal(dense[0, 0, 1], other[0, 0, 1])
    assert residual[0, 0, 1].any()
    assert not dense[0, 0, 2].any()
    assert not residual[0, 0, 2].any()
    assert dense.isfinite().all()
    assert residual.isfinite().all()


@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("place", range(4), ids=["output", "lse", "other", "other_lse"])
def test_a_nan_shows(kind, place):
    parts = random_parts(8, torch.float32)
    parts[place][0, 0, 3] = torch.nan
    dense, packed = merge(*parts, kind)
    residual = unpack(packed, 8, torch.float32)
    for result in (dense, residual, add(torch.zeros_like(dense), packed)):
        assert result[0, 0, 3].isnan().all()
        assert result.isnan().any(-1).sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_near_the_largest_number(dtype):
    """Their difference is infinite, and dense attention is not."""
    output = torch.full((1, 1, 2, 4), 3e38).to(dtype)
    lse = torch.zeros(1, 1, 2)
    dense, _ = merge(output, lse, -output, lse - 1, "int4")
    share = torch.sigmoid(torch.tensor(1.0)).double()
    torch.testing.assert_close(dense.double(), output.double() * (2 * share - 1), rtol=1e-2, atol=0)


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_a_row_without_a_usable_scale(kind):
    """Too small for a normal float32 it is zero; infinite it is NaN, and no finite number that is wrong."""
    lse = torch.zeros(1, 1, 2)
    other = torch.tensor([[3e-40, -1e-40, 7e-45, 0.0], [1.0, torch.inf, -torch.inf, 0.0]]).expand(1, 1, 2, 4)
    _, packed = merge(torch.zeros(1, 1, 2, 4), lse, other, lse, kind)
    residual = unpack(packed, 4, torch.float32)
    assert torch.equal(residual[0, 0, 0], torch.zeros(4))
    assert residual[0, 0, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_linear_change_is_continued_exactly(dtype):
    """Three outputs on a line: the residuals of the first two give the third, at any distance."""
    generator = torch.Generator().manual_seed(0)
    # eighths, which each of these types holds, and so their sums
    start, slope, output = (torch.randint(-8, 8, (1, 2, 6, 10), generator=generator).to(dtype) / 8 for _ in range(3))
    before, last = (Packed(start + step * slope, None) for step in (0, 2))
    for later in (1, 2, 4):
        wanted = output + start + (2 + later) * slope
        assert torch.equal(add(output, last, before, later / 2), wanted)
        assert torch.equal(add(output, last, before, torch.tensor(later / 2)), wanted)
    assert torch.equal(add(output, last), output + start + 2 * slope)


def test_the_sum_is_rounded_once():
    """The residual ends just below half a step of the output. Rounded by itself it would be that half, and go up."""
    output = torch.full((1, 1, 1, 2), 1 + 2**-7, dtype=torch.bfloat16)
    last, before = (Packed(torch.full_like(output, value), None) for value in (2**-8, 2**-8 * (1 + 2**-7)))
    assert torch.equal(add(output, last, before, 0.25), output)


def test_no_residual_is_bfloat16_before_it_is_packed():
    """Two outputs that bfloat16 can hold, and a difference with a share that it cannot."""
    output = torch.ones(1, 1, 1, 2, dtype=torch.bfloat16)
    lse, other_lse = torch.zeros(1, 1, 1), torch.full((1, 1, 1), -0.3)
    _, packed = merge(output, lse, -output, other_lse, "int4")
    share = torch.sigmoid(torch.tensor(-0.3, dtype=torch.float64))
    assert packed.scale is not None
    assert abs(float(packed.scale) - 2 * float(share) / 7) < 1e-7


def test_float64_stays_float64():
    query, key, value = random_qkv(2, 2, 130, 130, 24, dtype=torch.float64)
    parts, _ = two_parts("reference", query, key, value, KeyMask())
    dense, packed = merge(*parts, "full")
    wanted = scaled_dot_product_attention(query, key, value)
    for result in (dense, add(parts[0], packed)):
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, wanted, atol=1e-13, rtol=1e-12)


def test_any_layout():
    """A model's outputs are often views of `[B, S, H, D]`."""
    parts = random_parts(8, torch.float32)
    views = tuple(part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts)
    for kind in RESIDUALS:
        (dense, packed), (from_views, packed_from_views) = merge(*parts, kind), merge(*views, kind)
        assert torch.equal(dense, from_views)
        assert torch.equal(unpack(packed, 8, torch.float32), unpack(packed_from_views, 8, torch.float32))
        assert torch.equal(add(parts[0], packed), add(views[0], packed_from_views))


def test_an_unknown_kind_is_refused():
    parts = random_parts(8, torch.float32)
    with pytest.raises(ValueError, match="kind must be one of int4, fp8, full, got 'int8'"):
        merge(*parts, "int8")
