"""The `flex` backend against the float64 reference: odd lengths, causal, shared key heads, padding, dtypes, limits."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from xattn_video import XAttnConfig, block_sparse_attention, xattention
from xattn_video.ops import flex, reference
from xattn_video.ops.backends import resolve
from xattn_video.ops.block_lists import mask_to_lists
from xattn_video.ops.cpu import backend as cpu
from xattn_video.ops.key_mask import KeyMask
from xattn_video.testing.synthetic import causal_text_like_qkv, video_like_qkv

BLOCK_SIZE = 32


def problem(seed: int, *, heads: tuple[int, int], lengths: tuple[int, int], head_dim: int, dtype: torch.dtype) -> Any:
    """Query, key and value of a batch of two in the models' layout, and a random block mask with an empty row."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(2, length, count, head_dim, generator=generator).to(dtype).transpose(1, 2)
        for length, count in zip((lengths[0], lengths[1], lengths[1]), (heads[0], heads[1], heads[1]), strict=True)
    )
    blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    block_mask = torch.rand(2, heads[0], *blocks, generator=generator) < 0.5
    block_mask[0, 0, -1] = False
    return [query, 2 * key, value], block_mask


def eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention by three operations in the inputs' dtype."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    logits = (query @ key.transpose(-1, -2)) * scale
    return torch.softmax(logits.masked_fill(~mask, -torch.inf), dim=-1).nan_to_num(0) @ value


def visible_pairs(block_mask: Tensor, lengths: tuple[int, int], **bounds: Any) -> Tensor:
    """Which keys each query attends to, bool `[B, H, Sq, Sk]`."""
    inside = KeyMask(**bounds).visible(*lengths, block_mask.device)
    kept = block_mask.repeat_interleave(BLOCK_SIZE, 2).repeat_interleave(BLOCK_SIZE, 3)
    return kept[:, :, : lengths[0], : lengths[1]] & inside[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("heads", "lengths", "head_dim"),
    [((2, 2), (128, 128), 32), ((4, 2), (100, 157), 24), ((3, 1), (77, 77), 40), ((2, 1), (1, 65), 16)],
)
def test_attention_and_log_sum_exp_are_the_references(heads, lengths, head_dim, causal, padded, dtype):
    inputs, block_mask = problem(3, heads=heads, lengths=lengths, head_dim=head_dim, dtype=dtype)
    bounds: dict[str, Any] = {"causal": causal, "kv_start": None, "kv_lens": None}
    if padded:
        bounds["kv_start"] = torch.tensor([0, 35], dtype=torch.int32)
        bounds["kv_lens"] = torch.tensor([lengths[1] - 20, lengths[1]], dtype=torch.int32)
    settings: dict[str, Any] = {"block_size": BLOCK_SIZE, "scale": 0.3, "return_lse": True, **bounds}
    exact = [part.double() for part in inputs]
    truth, truth_lse = block_sparse_attention(*exact, block_mask, backend="reference", **settings)
    pairs = visible_pairs(block_mask, lengths, **bounds)
    allowed = (eager(*inputs, pairs, 0.3).double() - truth).norm() + 2 * torch.finfo(dtype).eps * truth.norm()
    if padded:
        # NaN in the padding must reach neither output.
        for part in inputs[1:]:
            part[0, :, lengths[1] - 20 :] = torch.nan
            part[1, :, :35] = torch.nan
    output, lse = block_sparse_attention(*inputs, block_mask, backend="flex", **settings)
    assert (output.dtype, lse.dtype) == (dtype, torch.float32)
    assert output.stride() == torch.empty_like(inputs[0]).stride()
    assert (output.double() - truth).norm() <= allowed
    torch.testing.assert_close(lse.double(), truth_lse, atol=1e-5, rtol=1e-5)
    blind = ~pairs.any(-1)
    assert blind.any()
    assert (output[blind] == 0).all()
    assert (lse[blind] == -torch.inf).all()


def test_float64_stays_float64():
    inputs, block_mask = problem(1, heads=(2, 1), lengths=(70, 70), head_dim=16, dtype=torch.float64)
    settings: dict[str, Any] = {"block_size": BLOCK_SIZE, "causal": True, "return_lse": True}
    output, lse = block_sparse_attention(*inputs, block_mask, backend="flex", **settings)
    truth, truth_lse = block_sparse_attention(*inputs, block_mask, backend="reference", **settings)
    torch.testing.assert_close(output, truth)
    torch.testing.assert_close(lse, truth_lse)


@pytest.mark.parametrize("causal", [False, True])
def test_the_whole_call_keeps_the_blocks_of_the_cpu_backend(causal):
    backend = resolve("flex", torch.device("cpu"), torch.float32)
    assert backend.antidiagonal_scores is cpu.antidiagonal_scores
    query, key, value = video_like_qkv(1, 4, 3, 12, 14, 32, kv_heads=2, text_tokens=9)
    config = XAttnConfig(backend="flex", min_tokens=0, block_size=64, threshold=0.7)
    output, stats = xattention(query, key, value, config, causal=causal, return_stats=True)
    expected, expected_stats = xattention(
        query, key, value, config.replace(backend="cpu"), causal=causal, return_stats=True
    )
    assert (stats.kept, stats.valid) == (expected_stats.kept, expected_stats.valid)
    assert stats.density < 1
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def some_mask(causal: bool) -> tuple[Any, Tensor, tuple[int, int], dict[str, Any]]:
    lengths = (200, 333)
    bounds: dict[str, Any] = {
        "causal": causal,
        "kv_start": torch.tensor([40, 0], dtype=torch.int32),
        "kv_lens": torch.tensor([333, 290], dtype=torch.int32),
    }
    block_mask = torch.rand(2, 4, 7, 11, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = KeyMask(**bounds)
    block_mask &= mask.valid_blocks(2, *lengths, block_size=BLOCK_SIZE, device=torch.device("cpu"))
    return flex.make_block_mask(block_mask, *lengths, mask, BLOCK_SIZE), block_mask, lengths, bounds


@pytest.mark.parametrize("causal", [False, True])
def test_the_lists_name_the_kept_blocks_and_which_need_a_mask(causal):
    mask, block_mask, lengths, bounds = some_mask(causal)
    assert torch.equal(mask.to_dense().bool(), block_mask)
    pairs = visible_pairs(torch.ones_like(block_mask), lengths, **bounds)
    padded = torch.nn.functional.pad(pairs, (0, 11 * BLOCK_SIZE - 333))
    # Rows past the last query are never written, so they decide nothing.
    padded = torch.nn.functional.pad(padded, (0, 0, 0, 7 * BLOCK_SIZE - 200), value=True)
    whole = padded.unflatten(3, (11, BLOCK_SIZE)).all(-1).unflatten(2, (7, BLOCK_SIZE)).all(3)
    assert torch.equal(mask.full_kv_num_blocks, (block_mask & whole).sum(-1, dtype=torch.int32))
    assert torch.equal(mask.kv_num_blocks, (block_mask & ~whole).sum(-1, dtype=torch.int32))
    assert mask.full_kv_num_blocks.sum() > 0
    assert mask.kv_num_blocks.sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_compiled_flex_attention_visits_the_listed_blocks_and_no_others(causal):
    """Uncompiled FlexAttention reads no lists; compiled it reads nothing else, once the token mask forgets them."""
    mask, block_mask, lengths, bounds = some_mask(causal)
    first, end = (part.contiguous() for part in KeyMask(**bounds).query_range(*lengths, block_mask.device))
    mask.mask_mod = lambda item, head, query, key: (key >= first[item, query]) & (key < end[item, query])
    inputs = [torch.randn(2, heads, length, 32) for heads, length in ((4, 200), (2, 333), (2, 333))]
    compiled = torch.compile(flex.torch_flex.flex_attention, fullgraph=True)
    with torch.no_grad():
        output = compiled(*inputs, block_mask=mask, scale=0.2, enable_gqa=True)
    exact = [part.double() for part in inputs]
    truth, _ = reference.block_sparse_forward(*exact, block_mask, block_size=BLOCK_SIZE, scale=0.2, **bounds)
    torch.testing.assert_close(output.double(), truth, atol=1e-5, rtol=1e-5)


def test_operator_and_its_fake_agree():
    (query, key, value), block_mask = problem(2, heads=(4, 2), lengths=(70, 90), head_dim=24, dtype=torch.float32)
    kv_lens = torch.tensor([80, 90], dtype=torch.int32)
    arguments = (query, key, value, *mask_to_lists(block_mask), None, kv_lens)
    settings = {"causal": True, "block_size": BLOCK_SIZE, "scale": 0.2}
    # torch.library.opcheck runs under modes that the vmap inside uncompiled FlexAttention does not bear.
    with FakeTensorMode() as mode:
        parts = (mode.from_tensor(item) if isinstance(item, Tensor) else item for item in arguments)
        faked = flex.block_sparse_forward(*parts, **settings)
    for fake, real in zip(faked, flex.block_sparse_forward(*arguments, **settings), strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_many_shapes_in_one_process():
    """torch gives a function up that it had to compile too often; each kind of call has its own count."""
    for heads, head_dim in itertools.product((1, 2, 3), (8, 16, 24)):
        length = 30 + head_dim + heads
        inputs, block_mask = problem(
            0, heads=(heads, heads), lengths=(length, length), head_dim=head_dim, dtype=torch.float32
        )
        settings: dict[str, Any] = {"block_size": BLOCK_SIZE}
        output = block_sparse_attention(*inputs, block_mask, backend="flex", **settings)
        truth = block_sparse_attention(*inputs, block_mask, backend="reference", **settings)
        torch.testing.assert_close(output, truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("device", "head_dim", "block_size", "words"),
    [
        ("cuda", 8, 128, "head_dim must be at least 16 for the flex backend on a GPU, got 8"),
        ("cuda", 64, 64, "block_size must be a multiple of 128 for the flex backend on a GPU"),
    ],
)
def test_what_a_gpu_cannot_do_is_a_value_error(device, head_dim, block_size, words):
    with pytest.raises(ValueError, match=words):
        flex.check_supported(torch.device(device), head_dim, block_size)
    flex.check_supported(torch.device("cpu"), head_dim, block_size)
    flex.check_supported(torch.device(device), 64, 128)


def test_layouts_modes_and_gradients_in_one_process():
    """torch makes code anew for each, and past a few for one piece of code it gives up."""
    size = (2, 2, 130, 16)
    layouts = (
        lambda: torch.randn(size),
        lambda: torch.randn(2, 130, 2, 16).transpose(1, 2),
        lambda: torch.randn(2, 1, 130, 16).expand(size),
    )
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    for number, made in enumerate(itertools.product(layouts, repeat=3)):
        if number % 2 == 0:
            parts = [make() for make in made]
            with torch.no_grad() if number % 4 else torch.inference_mode():
                output = block_sparse_attention(*parts, mask, backend="flex")
            torch.testing.assert_close(output, block_sparse_attention(*parts, mask, backend="reference"))
    query, key, value = (make() for make in layouts)
    key.requires_grad_()
    with torch.no_grad():
        output = block_sparse_attention(query, key, value, mask, backend="flex")
        torch.testing.assert_close(output, block_sparse_attention(query, key, value, mask, backend="reference"))


def test_a_device_without_it_says_so():
    query = torch.empty(1, 1, 128, 64, device="meta")
    with pytest.raises(
        ValueError, match="backend 'flex' cannot run here: it runs on a CPU and on an NVIDIA or AMD GPU"
    ):
        block_sparse_attention(
            query, query, query, torch.ones(1, 1, 1, 1, dtype=torch.bool, device="meta"), backend="flex"
        )


def test_it_is_imported_only_when_it_is_used():
    code = "import sys; from xattn_video import xattention; assert 'xattn_video.ops.flex' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=1000)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_on_a_gpu_it_is_the_reference(head_dim, causal, dtype):
    query, key, value = causal_text_like_qkv(1, 4, 1100, head_dim, dtype=dtype, kv_heads=2)
    inputs = [part.cuda() for part in (query, key, value)]
    block_mask = torch.rand(1, 4, 9, 9, device="cuda") < 0.5
    settings: dict[str, Any] = {"causal": causal, "kv_lens": torch.tensor([1050], device="cuda"), "return_lse": True}
    output, lse = block_sparse_attention(*inputs, block_mask, backend="flex", **settings)
    exact = [part.double() for part in inputs]
    truth, truth_lse = block_sparse_attention(*exact, block_mask, backend="reference", **settings)
    # float32 products are summed one after the other there, over 1,050 keys
    allowed = (16 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
    assert (output.double() - truth).norm() <= allowed * truth.norm()
    torch.testing.assert_close(lse.double(), truth_lse, atol=1e-4, rtol=1e-4)
