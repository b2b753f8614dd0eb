"""The `fa4` backend without a GPU: lists, layouts, refusals, the check on first use, and calls compiled for GPUs."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xattn_video import XAttnConfig, block_sparse_attention, xattention
from xattn_video.ops import backends
from xattn_video.ops.backends import unavailable_reason
from xattn_video.ops.block_lists import lists_to_mask, mask_to_lists
from xattn_video.ops.key_mask import KeyMask

pytest.importorskip("triton", reason="Triton is for Linux only")

from xattn_video.ops import fa4

CHILD = Path(__file__).with_name("fa4_compile_child.py")
INSTALLED = any(importlib.metadata.distributions(name="flash-attn-4"))
FP16, BF16 = torch.float16, torch.bfloat16
CPU = torch.device("cpu")


@pytest.mark.skipif(not INSTALLED, reason="flash-attn-4 is not installed; one CI job installs it")
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_calls_compile_for_a_gpu_that_is_not_here(arch):
    environment = {
        **os.environ,
        "FLASH_ATTENTION_ARCH": arch,
        "CUTE_DSL_ARCH": f"{arch}a",
        "FLASH_ATTENTION_NUM_SMS": "132",
    }
    command = [sys.executable, "-m", "pytest", str(CHILD), "-q", "-p", "no:cacheprovider", "-n", "0"]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CHILD.parent.parent)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "skipped" not in finished.stdout, finished.stdout


def some_lists() -> tuple[Tensor, Tensor]:
    mask = torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[1, 2, 3] = False
    return mask_to_lists(mask)


@pytest.mark.parametrize(("causal", "used", "unused"), [(False, "full", "mask"), (True, "mask", "full")])
def test_tokens_are_masked_in_every_block_only_where_causality_asks_for_it(causal, used, unused):
    indices, counts = some_lists()
    lists = fa4.list_arguments(indices, counts, block_size=64, causal=causal)
    assert lists[f"{used}_block_idx"] is indices
    assert lists[f"{used}_block_cnt"] is counts
    assert lists["block_size"] == (64, 64)
    # As many rows as there are query blocks, and in each of them nothing.
    empty_counts, empty_indices = lists[f"{unused}_block_cnt"], lists[f"{unused}_block_idx"]
    assert (empty_counts.shape, empty_indices.shape) == ((1, 1, 5), (1, 1, 5, 1))
    assert not empty_counts.any()
    assert {item.dtype for item in lists.values() if isinstance(item, Tensor)} == {torch.int32}


@pytest.mark.parametrize("models_layout", [False, True])
def test_inputs_go_in_as_views(models_layout):
    query, key, value = (torch.randn(2, length, heads, 64) for length, heads in ((300, 4), (200, 2), (200, 2)))
    parts = [part.transpose(1, 2) for part in (query, key, value)]
    if not models_layout:
        parts = [part.contiguous() for part in parts]
    arguments = fa4.call_arguments(*parts, causal=True, scale=0.3, kv_lens=None)
    for name, part, original in zip("qkv", parts, (query, key, value), strict=True):
        assert arguments[name].data_ptr() == part.data_ptr()
        assert torch.equal(arguments[name], original)
    others = {name: value for name, value in arguments.items() if name not in "qkv"}
    assert others == {"softmax_scale": 0.3, "causal": True, "return_lse": True, "pack_gqa": False}


def test_what_padding_holds_reaches_no_product():
    parts = [torch.randn(2, 3, 50, 8) for _ in range(3)]
    kv_lens = torch.tensor([50, 20], dtype=torch.int32)
    clean = parts[2].clone()
    parts[2][1, :, 20:] = torch.nan
    arguments = fa4.call_arguments(*parts, causal=False, scale=1.0, kv_lens=kv_lens)
    assert arguments["seqused_k"].dtype == torch.int32
    assert arguments["seqused_k"].tolist() == [50, 20]
    assert torch.equal(arguments["v"][0], clean[0].transpose(0, 1))
    assert torch.equal(arguments["v"][1, :20], clean[1, :, :20].transpose(0, 1))
    assert (arguments["v"][1, 20:] == 0).all()
    assert parts[2].isnan().any()


def test_a_length_beyond_the_keys_is_all_keys_as_for_the_other_backends():
    parts = [torch.randn(2, 3, 50, 8) for _ in range(3)]
    kv_lens = torch.tensor([60, 20], dtype=torch.int32)
    arguments = fa4.call_arguments(*parts, causal=False, scale=1.0, kv_lens=kv_lens)
    assert arguments["seqused_k"].tolist() == [50, 20]
    assert kv_lens.tolist() == [60, 20]


def test_the_operator_promises_the_layout_of_the_package():
    query = torch.empty(2, 4, 300, 64, dtype=BF16, device="meta")
    key = torch.empty(2, 2, 200, 64, dtype=BF16, device="meta")
    indices = torch.empty(2, 4, 3, 2, dtype=torch.int32, device="meta")

    def call(query: Tensor) -> tuple[Tensor, Tensor]:
        settings = {"causal": False, "block_size": 128, "scale": 0.1}
        return fa4.block_sparse_forward(query, key, key, indices, indices[..., 0], None, None, **settings)

    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        output, lse = run(query)
        assert (output.shape, output.dtype) == (query.shape, BF16)
        assert output.transpose(1, 2).is_contiguous()
        assert (lse.shape, lse.dtype) == ((2, 4, 300), torch.float32)


def test_scores_and_selection_are_those_of_triton():
    own, triton = (backends._import(name, torch.device("cuda")) for name in ("fa4", "triton"))
    assert own.name == "fa4"
    assert (own.antidiagonal_scores, own.select) == (triton.antidiagonal_scores, triton.select)
    assert own.block_sparse_forward is fa4.block_sparse_forward


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((9, torch.float32, 64, 128, None), "query must be float16 or bfloat16 for the fa4 backend, got float32"),
        ((9, BF16, 64, 32, None), "block_size must be 64 or 128 .* on compute capability 9.x, got 32"),
        ((9, BF16, 64, 256, None), "block_size must be 64 or 128 .* on compute capability 9.x, got 256"),
        ((10, FP16, 64, 128, None), "block_size must be 256 .* on compute capability 10.x, got 128"),
        ((9, BF16, 60, 128, None), "head_dim must be a multiple of 8 and at most 128 .*, got 60"),
        ((9, BF16, 192, 128, None), "head_dim must be a multiple of 8 and at most 128 .*, got 192"),
        ((9, BF16, 264, 64, None), "head_dim must be a multiple of 8 and at most 256 .*, got 264"),
        ((10, BF16, 136, 256, None), "head_dim must be a multiple of 8 and at most 128 .*, got 136"),
        ((9, BF16, 64, 128, torch.zeros(1)), "kv_start must be None .* only at their end, got a tensor"),
    ],
)
def test_what_it_cannot_do_is_a_value_error_that_names_what_can(arguments, words):
    with pytest.raises(ValueError, match=f"{words}.*; use backend='triton'"):
        fa4.check_supported(*arguments)


@pytest.mark.parametrize("arguments", [(9, BF16, 128, 128), (9, FP16, 256, 64), (9, BF16, 8, 64), (10, BF16, 64, 256)])
def test_what_it_can_do(arguments):
    fa4.check_supported(*arguments, None)


def test_only_hopper_and_data_centre_blackwell():
    assert backends.fa4_capability_reason((9, 0)) is None
    assert backends.fa4_capability_reason((10, 3)) is None
    for capability in ((8, 0), (8, 9), (11, 0), (12, 0)):
        reason = backends.fa4_capability_reason(capability)
        assert "9.x or 10.x, not {}.{}".format(*capability) in reason


def test_where_it_cannot_run_it_says_why(monkeypatch):
    assert unavailable_reason("fa4", CPU, BF16) == "it needs an NVIDIA GPU, not cpu"
    query = torch.randn(1, 1, 2048, 64)
    with pytest.raises(ValueError, match="backend 'fa4' cannot run here: it needs an NVIDIA GPU, not cpu; usable: "):
        xattention(query, query, query, XAttnConfig(backend="fa4"))
    with pytest.raises(ValueError, match="backend 'fa4' cannot run here"):
        block_sparse_attention(query, query, query, torch.ones(1, 1, 16, 16, dtype=torch.bool), backend="fa4")
    monkeypatch.setattr(backends, "_HAS_FA4", False)
    assert "pip install 'xattn-video[fa4]'" in unavailable_reason("fa4", torch.device("cuda"), BF16)


def test_whether_it_is_installed_is_known_without_an_import():
    assert backends._HAS_FA4 is INSTALLED
    code = "import sys; from xattn_video import xattention\n"
    code += "assert not {'xattn_video.ops.fa4', 'flash_attn'} & sys.modules.keys()"
    code += "; import xattn_video.ops.fa4; assert 'flash_attn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=1000)


def kind(**changes: Any) -> fa4.Kind:
    plain = {"device": CPU, "dtype": BF16, "head_dim": 64, "group": 2, "block_size": 64, "causal": False}
    return fa4.Kind(**{**plain, "padded": False, **changes})


def low_precision(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    block_size: int,
    causal: bool,
    scale: float,
    kv_lens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A right kernel: sums in float32, with probabilities and output rounded to the inputs' dtype."""
    q_len, kv_len = query.shape[2], key.shape[2]
    seen = KeyMask(causal, None, kv_lens).visible(q_len, kv_len, CPU)[:, None]
    kept = lists_to_mask(indices, counts).repeat_interleave(block_size, 2).repeat_interleave(block_size, 3)
    group = query.shape[1] // key.shape[1]
    keys, values = (part.float().nan_to_num(0).repeat_interleave(group, 1) for part in (key, value))
    logits = query.float() @ keys.transpose(-1, -2) * scale
    logits = logits.masked_fill(~(kept[:, :, :q_len, :kv_len] & seen), -torch.inf)
    weights = torch.exp(logits - logits.amax(-1, keepdim=True).nan_to_num(neginf=0))
    output = weights.to(query.dtype).float() @ values / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    return output.to(query.dtype), torch.logsumexp(logits, -1)


KINDS = [
    kind(),
    kind(dtype=FP16, causal=True, group=1),
    kind(padded=True, block_size=128),
    kind(causal=True, padded=True, head_dim=128),
    kind(dtype=FP16, block_size=256, causal=True, padded=True),
]


@pytest.mark.parametrize("one", KINDS, ids=str)
def test_the_first_call_takes_what_rounding_explains(one):
    fa4.check_small_problem(low_precision, one)


def forgets_a_block(query, key, value, indices, counts, **settings):
    counts = counts.clone()
    counts[1, -1, 1] -= 1
    return low_precision(query, key, value, indices, counts, **settings)


def sees_keys_past_the_end(query, key, value, indices, counts, **settings):
    padding = (0, 0, 0, -key.shape[2] % settings["block_size"])
    key, value = (torch.nn.functional.pad(part, padding) for part in (key, value))
    return low_precision(query, key, value, indices, counts, **settings)


def ignores_the_lists(query, key, value, indices, counts, **settings):
    return low_precision(query, key, value, *mask_to_lists(torch.ones_like(indices, dtype=torch.bool)), **settings)


def takes_pairs_of_rows(query, key, value, indices, counts, **settings):
    mask = lists_to_mask(indices, counts)
    mask[:, :, :2] = mask[:, :, :2].any(2, keepdim=True)
    return low_precision(query, key, value, *mask_to_lists(mask), **settings)


def mixes_up_heads(query, key, value, indices, counts, **settings):
    return low_precision(query, key.flip(1), value.flip(1), indices, counts, **settings)


def divides_by_a_wrong_sum(query, key, value, indices, counts, **settings):
    output, lse = low_precision(query, key, value, indices, counts, **settings)
    return output * 1.05, lse


def leaves_empty_rows_unwritten(query, key, value, indices, counts, **settings):
    output, lse = low_precision(query, key, value, indices, counts, **settings)
    return output.masked_fill((lse == -torch.inf)[..., None], torch.nan), lse


def has_a_finite_log_sum_exp_there(query, key, value, indices, counts, **settings):
    output, lse = low_precision(query, key, value, indices, counts, **settings)
    return output, lse.nan_to_num(neginf=0)


def takes_powers_of_two_for_those_of_e(query, key, value, indices, counts, **settings):
    output, lse = low_precision(query, key, value, indices, counts, **settings)
    return output, lse * 1.4427


@pytest.mark.parametrize(
    "compute",
    [
        forgets_a_block,
        sees_keys_past_the_end,
        ignores_the_lists,
        takes_pairs_of_rows,
        mixes_up_heads,
        divides_by_a_wrong_sum,
        leaves_empty_rows_unwritten,
        has_a_finite_log_sum_exp_there,
        takes_powers_of_two_for_those_of_e,
    ],
)
def test_the_first_call_finds_a_wrong_kernel(compute: Callable[..., Any]):
    with pytest.raises(
        RuntimeError, match=r"flash-attn-4 computes attention wrong here \(device cpu, dtype torch.bflo"
    ):
        fa4.check_small_problem(compute, kind())


def is_not_causal(query, key, value, indices, counts, *, causal, **settings):
    return low_precision(query, key, value, indices, counts, causal=False, **settings)


def masks_the_first_block_alone(query, key, value, indices, counts, *, causal, **settings):
    """What a kernel does that takes causal blocks for full ones: it masks in the last block of a row and no other."""
    mask = lists_to_mask(indices, counts)
    place = torch.arange(mask.shape[-1])
    last = torch.where(mask, place, -1).amax(-1, keepdim=True)
    lasts, others = mask & (place == last), mask & (place != last)
    parts = [
        low_precision(query, key, value, *mask_to_lists(part), causal=cut, **settings)
        for part, cut in ((lasts, True), (others, False))
    ]
    lse = torch.logsumexp(torch.stack([part[1] for part in parts]), 0)
    shares = [torch.exp(part[1] - lse).nan_to_num(0)[..., None] for part in parts]
    merged = sum(part[0].float() * share for part, share in zip(parts, shares, strict=True))
    return merged.to(query.dtype), lse


@pytest.mark.parametrize("compute", [is_not_causal, masks_the_first_block_alone])
def test_the_first_causal_call_finds_a_wrong_mask(compute: Callable[..., Any]):
    with pytest.raises(RuntimeError, match="causal True"):
        fa4.check_small_problem(compute, kind(causal=True))


def ignores_lengths(query, key, value, indices, counts, *, kv_lens, **settings):
    return low_precision(query, key.nan_to_num(0), value.nan_to_num(0), indices, counts, kv_lens=None, **settings)


def lets_padding_through(query, key, value, indices, counts, **settings):
    output, lse = low_precision(query, key, value, indices, counts, **settings)
    return output + 0 * value[:, :1, -1:], lse


@pytest.mark.parametrize("compute", [ignores_lengths, lets_padding_through])
def test_the_first_padded_call_finds_wrong_lengths(compute: Callable[..., Any]):
    with pytest.raises(RuntimeError, match="padded True"):
        fa4.check_small_problem(compute, kind(padded=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, FP16), (128, BF16), (72, BF16)])
def test_on_a_gpu_it_is_the_reference(head_dim, dtype, padded, causal):
    device = torch.device("cuda")
    reason = unavailable_reason("fa4", device, dtype)
    if reason is not None:
        pytest.skip(reason)
    block_size = 128 if torch.cuda.get_device_capability(device)[0] == 9 else 256
    query, key, value = (
        torch.randn(2, length, heads, head_dim, device=device, dtype=dtype).transpose(1, 2)
        for length, heads in ((1100, 6), (1333, 2), (1333, 2))
    )
    rows, columns = (-(-length // block_size) for length in (1100, 1333))
    block_mask = torch.rand(2, 6, rows, columns, device=device) < 0.5
    block_mask[1, 3, 0] = False
    kv_lens = torch.tensor([1333, 1290], device=device) if padded else None
    settings: dict[str, Any] = {"block_size": block_size, "causal": causal, "kv_lens": kv_lens, "return_lse": True}
    output, lse = block_sparse_attention(query, key, value, block_mask, backend="fa4", **settings)
    exact = [part.double() for part in (query, key, value)]
    truth, truth_lse = block_sparse_attention(*exact, block_mask, backend="reference", **settings)
    error = (output.double() - truth).norm(dim=-1)
    assert (error <= 4 * torch.finfo(dtype).eps * truth.norm(dim=-1)).all()
    torch.testing.assert_close(lse.double(), truth_lse, atol=1e-3, rtol=0)
