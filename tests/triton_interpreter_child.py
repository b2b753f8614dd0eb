"""The Triton kernels in the interpreter. test_triton_kernels.py runs this file in a process of its own."""

from __future__ import annotations

import importlib
import os
import sys

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before the kernels are imported", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterBuilder

from tests import kernel_checks
from tests.kernel_checks import Problem
from tests.kernel_problems import HUGE, SMALL, STRIPS, TILES, WIDE_TILES
from tests.memory_check import checked_memory
from xattn_video import xattention
from xattn_video.ops import residual
from xattn_video.ops.block_lists import mask_to_lists
from xattn_video.ops.triton import attention_forward as attention_operator
from xattn_video.ops.triton import block_lists as lists_kernel
from xattn_video.ops.triton import descriptors, launch_tables
from xattn_video.ops.triton import residual as residual_kernel
from xattn_video.ops.triton import scores as scores_kernel
from xattn_video.ops.triton import selection as selection_kernel
from xattn_video.ops.triton.descriptors import describe

FP16, BF16 = torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def touched():
    """Every test here also fails where a kernel reads or writes what it should not, see memory_check.py."""
    with checked_memory() as touched:
        yield touched


@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_scores(problem):
    kernel_checks.check_scores(problem, "cpu")


@pytest.mark.parametrize(
    ("stride", "block_size"), [(4, 128), (8, 64), (16, 128), (32, 128), (32, 32), (1, 128), (2, 64)]
)
def test_scores_for_every_stride(stride, block_size):
    problem = Problem(lengths=(299, 270), heads=(1, 1), stride=stride, block_size=block_size, causal=True)
    kernel_checks.check_scores(problem, "cpu")


@pytest.mark.parametrize(("tiles", "programs"), [(TILES, 1), (TILES, 3), (WIDE_TILES, 1)], ids=["16-1", "16-3", "64-1"])
@pytest.mark.parametrize("problem", STRIPS, ids=str)
def test_scores_use_scratch_again(problem, tiles, programs):
    kernel_checks.check_scratch(problem, "cpu", tiles, programs)


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_tiles_of_the_shipped_tables(name):
    """What a GPU class launches with, on blocks as large as its tiles."""
    table = launch_tables.packaged_table(name)
    own = {kernel: launch_tables.lookup(table, kernel, "16-bit", 128) for kernel in table}
    problem = Problem(lengths=(300, 2500), heads=(2, 1), head_dim=128, block_size=128, kv_lens=(2300,), dtype=FP16)
    kernel_checks.check_scratch(problem, "cpu", own["antidiagonal_scores"], 1)
    kernel_checks.check_attention(problem, "cpu", config=own["block_sparse"])


@pytest.mark.parametrize("causal", [False, True])
def test_scores_multiply_each_tile_once(causal, monkeypatch):
    """One product a visible tile and step of the stride groups, the rest of the work does not need any."""
    multiplied = []
    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda *args: multiplied.append(args[1]) or dot(*args))
    problem = Problem(lengths=(512, 512), heads=(1, 1), head_dim=16, causal=causal)
    query, key, _ = problem.tensors("cpu")
    scores = problem.unwritten_scores("cpu")
    options = {**problem.options("cpu"), "stride": problem.stride, "config": TILES}
    scores_kernel.launch_antidiagonal_scores(query, key, scores, **options)
    visible_tiles = 4 * (4 + 1) // 2 if causal else 4 * 4
    assert len(multiplied) == visible_tiles * problem.stride


@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_attention(problem):
    kernel_checks.check_attention(problem, "cpu")


@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_attention_through_tensor_descriptors(problem):
    kernel_checks.check_descriptors(problem, "cpu")


def test_layouts_without_a_descriptor():
    """Each is attended through pointers instead: the copy engine wants falling strides of 16 bytes, none of them 0."""
    tensor = torch.zeros(2, 4, 64, 32)
    assert describe(tensor, tensor, 32, 32) is not None
    assert describe(tensor.transpose(1, 2), tensor.transpose(1, 2), 32, 32) is not None
    odd = torch.zeros(2, 4, 64, 33)[..., 1:]
    for refused in (odd, tensor[:1].expand(2, -1, -1, -1), tensor[:, :, :0], tensor.permute(1, 0, 2, 3)):
        assert describe(refused, refused, 32, 32) is None, refused.stride()
    assert describe(tensor, tensor.transpose(1, 2).contiguous().transpose(1, 2), 32, 32) is None


def test_an_older_triton_has_no_descriptors(monkeypatch):
    """Its kernels still import, and a table that asks for descriptors gets pointers."""
    monkeypatch.setitem(sys.modules, "triton.tools.tensor_descriptor", None)
    older = importlib.reload(descriptors)
    try:
        tensor = torch.zeros(2, 4, 64, 32)
        assert not older.has_copy_engine(tensor.device)
        assert older.describe(tensor, tensor, 32, 32) is None
    finally:
        monkeypatch.undo()
        importlib.reload(descriptors)


@pytest.mark.parametrize("block_size", [16, 64, 128, 256])
def test_attention_for_every_block_size(block_size):
    problem = Problem(lengths=(300, 300), block_size=block_size, causal=True, kv_start=(20,))
    kernel_checks.check_attention(problem, "cpu")


@pytest.mark.parametrize("head_dim", [8, 128, 200, 256])
@pytest.mark.parametrize("dtype", [torch.float32, FP16], ids=str)
def test_attention_for_every_head_dim(head_dim, dtype):
    problem = Problem(lengths=(70, 70), heads=(1, 1), head_dim=head_dim, dtype=dtype)
    kernel_checks.check_attention(problem, "cpu")
    kernel_checks.check_scores(problem, "cpu")


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-46, 30.0])
@pytest.mark.parametrize("causal", [False, True])
def test_every_scale(scale, causal):
    """Maxima are taken before the scale is applied: one below 0 turns them round, and 0 must not meet -inf."""
    problem = Problem(lengths=(90, 140), causal=causal, kv_start=(5,), kv_lens=(120,), scale=scale)
    kernel_checks.check_attention(problem, "cpu")
    kernel_checks.check_scores(problem, "cpu")


@pytest.mark.parametrize("problem", HUGE, ids=str)
def test_values_near_the_largest_number(problem):
    """Their average is a number of their type, their sum is not."""
    kernel_checks.check_attention(problem, "cpu", density=0.9)


@pytest.mark.parametrize("causal", [False, True])
def test_a_list_is_searched_from_its_ends(causal, touched):
    """A program reads each of its entries once, and again only the blocks that the key range or the diagonal cuts."""
    problem = Problem(heads=(1, 1), lengths=(32, 2048), head_dim=16, causal=causal, kv_start=(10,), kv_lens=(2040,))
    query, key, value = problem.tensors("cpu")
    indices = torch.arange(64, dtype=torch.int32).expand(1, 1, 1, 64).contiguous()
    counts = torch.full((1, 1, 1), 64, dtype=torch.int32)
    attention_operator.block_sparse_forward(query, key, value, indices, counts, **problem.options("cpu"))
    # tiles have more elements than one; the count and the two bounds are no entries
    entries = touched.count(1) - 3
    # the first and the last block are cut, causal also the last but one; and at each end the one that is not is read
    assert entries == 64 + 2 + (3 if causal else 2)


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "slice", "bhds"])
def test_public_functions_and_layouts(layout):
    problem = Problem(lengths=(70, 90), heads=(4, 2), batch=2, dtype=BF16, layout=layout, kv_lens=(90, 71))
    kernel_checks.check_public_functions(problem, "cpu")


@pytest.mark.parametrize("causal", [False, True])
def test_whole_call(causal):
    problem = Problem(
        lengths=(100, 150), heads=(4, 2), batch=2, causal=causal, kv_start=(0, 20), kv_lens=(150, 131), content="video"
    )
    kernel_checks.check_whole_call(problem, "cpu")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_key_that_is_no_number_keeps_all_blocks(bad):
    """Where dense attention would give NaN a sparse choice must not hide it."""
    query, key, value = Problem(heads=(2, 1), lengths=(200, 200), content="video").tensors("cpu")
    key[:, :, 150] = bad
    settings = {"block_size": 32, "threshold": 0.6, "min_tokens": 0, "return_stats": True}
    output, stats = xattention(query, key, value, backend="triton", **settings)
    assert stats.density == 1
    assert output.isnan().all(-1).any()
    causal, stats = xattention(query, key, value, backend="triton", causal=True, **settings)
    assert stats.density < 1
    assert not causal[:, :, :128].isnan().any()


def test_bounds_may_be_strided():
    """Such as a column of a mask: the kernels read item after item."""
    problem = Problem(lengths=(100, 150), batch=2, causal=True, content="video")
    query, key, value = problem.tensors("cpu")
    bounds = torch.tensor([[0, 150], [20, 131]], dtype=torch.int32)
    settings = {"stride": 8, "block_size": 32, "threshold": 0.6, "min_tokens": 0, "causal": True}
    outputs = [
        xattention(query, key, value, backend=backend, kv_start=bounds[:, 0], kv_lens=bounds[:, 1], **settings)
        for backend in ("triton", "reference")
    ]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["even", "sharp", "ties", "zero", "large", "large and sharp", "broken"])
@pytest.mark.parametrize("causal", [False, True])
def test_selection_is_the_sorted_set(kind, causal):
    problem = Problem(lengths=(40, 600), batch=2, block_size=16, causal=causal, kv_lens=(600, 333))
    kernel_checks.check_selection(problem, "cpu", kind)


# every layout, and a batch with an odd head dimension; its masks do not matter here
@pytest.mark.parametrize("problem", [*SMALL[2:5], SMALL[7]], ids=str)
def test_residual(problem):
    kernel_checks.check_residual(problem, "cpu")


@pytest.mark.parametrize("head_dim", [1, 2, 5, 88, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_residual_for_every_head_dim(head_dim, dtype):
    kernel_checks.check_residual(Problem(lengths=(40, 1), head_dim=head_dim, dtype=dtype, layout="bshd"), "cpu")


@pytest.mark.parametrize("kind", residual.RESIDUALS)
@pytest.mark.parametrize("place", range(4), ids=["output", "lse", "other", "other_lse"])
def test_a_nan_shows_in_a_residual(kind, place):
    parts = (torch.randn(1, 2, 70, 8), torch.randn(1, 2, 70), torch.randn(1, 2, 70, 8), torch.randn(1, 2, 70))
    parts[place][0, 1, 65] = torch.nan
    dense, packed = residual_kernel.merge(*parts, kind)
    for result in (dense, residual_kernel.add(torch.zeros_like(dense), packed)):
        assert result[0, 1, 65].isnan().all()
        assert result.isnan().any(-1).sum() == 1


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_a_residual_without_a_usable_scale(kind):
    """Too small it is zero, infinite it is NaN, as in plain torch."""
    lse = torch.zeros(1, 1, 2)
    other = torch.tensor([[3e-40, -1e-40, 7e-45, 0.0], [1.0, torch.inf, -torch.inf, 0.0]]).expand(1, 1, 2, 4)
    _, packed = residual_kernel.merge(torch.zeros(1, 1, 2, 4), lse, other, lse, kind)
    total = residual_kernel.add(torch.zeros(1, 1, 2, 4), packed)
    assert torch.equal(total[0, 0, 0], torch.zeros(4))
    assert total[0, 0, 1].isnan().all()


def test_every_fp8_number_is_as_torch_has_it():
    """All 254 numbers, and those halfway between two of them, which go to the even one."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].sort().values
    values = torch.cat((numbers, (numbers[1:] + numbers[:-1]) / 2)).view(1, 1, 169, 3)
    # a largest magnitude of 448 is a scale of 1
    values = torch.cat((values, torch.full((1, 1, 169, 1), 448.0)), dim=-1)
    lse = torch.zeros(1, 1, 169)
    _, packed = residual_kernel.merge(torch.zeros_like(values), lse, 2 * values, lse, "fp8")
    wanted = values.to(torch.float8_e4m3fn).float()
    assert torch.equal(packed.values.float(), wanted)
    assert torch.equal(residual_kernel.add(torch.zeros_like(values), packed), wanted)


def test_a_residual_is_read_and_written_once(touched):
    """Every element of the tensors is touched once, and the log-sum-exps and scales once for each row."""
    parts = (torch.randn(1, 2, 70, 24), torch.randn(1, 2, 70), torch.randn(1, 2, 70, 24), torch.randn(1, 2, 70))
    rows, values = 140, 140 * 24
    _, packed = residual_kernel.merge(*parts, "int4")
    assert sum(touched) == 3 * values + values // 2 + 3 * rows
    touched.clear()
    residual_kernel.add(parts[0], packed)
    assert sum(touched) == 2 * values + values // 2 + rows


def test_residual_kernels_refuse_float64():
    parts = (torch.zeros(1, 1, 2, 4, dtype=torch.float64), torch.zeros(1, 1, 2)) * 2
    with pytest.raises(ValueError, match=r"output must be one of torch.float32.* got torch.float64"):
        residual_kernel.merge(*parts, "int4")
    with pytest.raises(ValueError, match=r"output must be one of torch.float32.* got torch.float64"):
        residual_kernel.add(parts[0], residual.merge(*parts, "int4")[1])
    with pytest.raises(ValueError, match="kind must be one of int4, fp8, full, got 'int8'"):
        residual_kernel.merge(*(part.float() for part in parts), "int8")


def test_residual_operators_keep_their_contract():
    """Schema, fake and real results agree, and a compiled caller is compiled once for all factors."""
    output = torch.randn(1, 2, 70, 40).transpose(1, 2).contiguous().transpose(1, 2)
    lse = torch.randn(1, 2, 70)
    factor = torch.tensor(0.5)
    # torch cannot compare tensors of fp8, which the check does
    for kind in ("int4", "full"):
        torch.library.opcheck(residual_kernel._merge, (output, lse, -output, lse + 1, kind))
        _, packed = residual_kernel.merge(output, lse, -output, lse + 1, kind)
        torch.library.opcheck(residual_kernel._add, (output, *packed, *packed, factor))
        torch.library.opcheck(residual_kernel._add, (output, *packed, None, None, None))
    graphs = []
    compiled = torch.compile(
        residual_kernel.add, fullgraph=True, backend=lambda module, _: graphs.append(module) or module.forward
    )
    for later in (0.25, 1.0, 2.0):
        arguments = (output, packed, packed._replace(values=packed.values * 2), torch.tensor(later))
        assert torch.equal(compiled(*arguments), residual_kernel.add(*arguments))
    assert len(graphs) == 1


def test_a_wrong_block_shows():
    kernel_checks.check_wrong_block_shows(Problem(lengths=(320, 480), content="video", block_size=32), "cpu")


@pytest.mark.parametrize("causal", [False, True])
def test_all_blocks_kept_is_sdpa(causal):
    problem = Problem(lengths=(101, 101), heads=(4, 2), causal=causal)
    kernel_checks.check_all_kept_is_sdpa(problem, "cpu")


def test_operators_keep_their_contract():
    """Schema, fake and real outputs agree; fullgraph compilation passes through both operators."""
    problem = Problem(lengths=(70, 90), layout="bshd", kv_lens=(80,))
    query, key, value = problem.tensors("cpu")
    options = problem.options("cpu")
    bounds = (options["kv_start"], options["kv_lens"])
    sizes = {"causal": False, "block_size": 32, "scale": 0.2}
    torch.library.opcheck(scores_kernel.antidiagonal_scores, (query, key, *bounds), {"stride": 8, **sizes})
    block_mask = problem.block_mask("cpu")
    lists = lists_kernel.mask_to_lists(block_mask)
    torch.library.opcheck(lists_kernel.mask_to_lists, (block_mask,))
    chosen = (torch.rand(block_mask.shape), torch.ones_like(block_mask), block_mask)
    shares = torch.full(block_mask.shape[1:2], 0.9, dtype=torch.float64)
    torch.library.opcheck(selection_kernel._block_selection, (*chosen, shares))
    torch.library.opcheck(attention_operator.block_sparse_forward, (query, key, value, *lists, *bounds), sizes)

    def both(query, key, value):
        scores = scores_kernel.antidiagonal_scores(query, key, stride=8, **options)
        lists = lists_kernel.mask_to_lists(scores > scores.mean())
        return attention_operator.block_sparse_forward(query, key, value, *lists, **options)[0]

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(query, key, value), both(query, key, value), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float64}, "query must be one of torch.float32"),
        ({"head_dim": 257}, "head_dim must be at most 256"),
        ({"block_size": 256, "stride": 1}, "block_size / stride must be at most 128"),
    ],
)
def test_scores_refuse_what_they_cannot_do(change, words):
    problem = Problem(**change)
    query, key, _ = problem.tensors("cpu")
    with pytest.raises(ValueError, match=words):
        scores_kernel.antidiagonal_scores(query, key, stride=problem.stride, **problem.options("cpu"))


def test_more_heads_than_a_launch_has_are_refused():
    """The driver would only say that an argument is invalid."""
    problem = Problem(batch=65_536, heads=(1, 1), lengths=(1, 1), head_dim=16)
    query, key, value = problem.tensors("cpu")
    scores = torch.ones(65_536, 1, 1, 1)
    mask, share = scores.bool(), torch.ones(1, dtype=torch.float64)
    lists = mask_to_lists(mask)
    for call in (
        lambda: attention_operator.block_sparse_forward(query, key, value, *lists, **problem.options("cpu")),
        lambda: lists_kernel.mask_to_lists(mask),
        lambda: selection_kernel.select(scores, mask, mask, threshold=share),
    ):
        with pytest.raises(ValueError, match=r"batch \* heads must be at most 65535 .* got 65536 \* 1"):
            call()


def test_attention_refuses_blocks_below_a_tile():
    problem = Problem(block_size=8)
    with pytest.raises(ValueError, match=r"block_size must be at least 16 .* got 8"):
        attention_operator.block_sparse_forward(
            *problem.tensors("cpu"), *mask_to_lists(problem.block_mask("cpu")), **problem.options("cpu")
        )


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("causal", [False, True])
def test_a_bad_value_spoils_the_rows_that_the_reference_says(causal):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 150, 16, generator=generator) for _ in range(3))
    value[0, 1, 60, 3] = torch.nan
    settings = {"causal": causal, "min_tokens": 0, "block_size": 32, "stride": 8, "threshold": 0.4}
    want = xattention(query, key, value, backend="reference", **settings)
    output = xattention(query, key, value, backend="triton", **settings)
    assert torch.equal(output.isfinite(), want.isfinite())
    assert 0 < int((~want.isfinite()).sum()) < 150


@triton.jit
def _copy(source, target, count, step, SIZE: tl.constexpr):
    places = tl.program_id(0) * step + tl.arange(0, SIZE)
    tl.store(target + places, tl.load(source + places, mask=places < count), mask=places < count)


def test_the_memory_check_sees_what_it_is_for(touched):
    source, target = torch.arange(16.0), torch.zeros(16)
    _copy[(2,)](source, target, 16, 8, SIZE=8)
    assert torch.equal(source, target)
    assert touched == [8, 8, 8, 8]
    every_other, both = torch.zeros(32)[::2], torch.zeros(24)
    for words, arguments in (
        ("program 1 reads 4 elements of no tensor", (source[:12], target, 16, 8)),
        ("program 1 writes 4 elements of no tensor", (source, target[:12], 16, 8)),
        ("program 0 reads 4 elements of no tensor", (every_other, target, 16, 8)),
        ("program 1 touches what another one wrote", (source, target, 16, 4)),
        ("program 1 touches what another one wrote", (target[:8], target[8:], 16, 8)),
        ("program 1 writes what another one read", (both[8:], both[:16], 16, 8)),
    ):
        with pytest.raises(InterpreterError, match=words):
            _copy[(2,)](*arguments, SIZE=8)
