"""The calls of flash-attn-4, compiled for a GPU that is not there.

test_fa4_backend.py runs this file in a process of its own, because flash-attn-4 reads from the
environment for which GPU it compiles, once.
"""

from __future__ import annotations

import inspect
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

if "FLASH_ATTENTION_ARCH" not in os.environ:
    pytest.skip("needs FLASH_ATTENTION_ARCH before flash-attn-4 is imported", allow_module_level=True)

import flash_attn.cute
from flash_attn.cute import interface
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

from xattn_video.ops import fa4

CAPABILITY = int(os.environ["FLASH_ATTENTION_ARCH"].removeprefix("sm_")) // 10
FP16, BF16 = torch.float16, torch.bfloat16

# dtype, head dimension, block size, heads, causal, with kv_lens. A kernel for 10.x that is not causal asks the driver
# how many programs fit, so without one only causal ones compile.
CALLS = {
    9: [
        (BF16, 128, 128, (4, 4), False, False),
        (FP16, 64, 128, (4, 2), True, True),
        (BF16, 72, 128, (2, 1), False, True),
        (BF16, 256, 64, (2, 2), False, False),
    ],
    10: [(BF16, 128, 256, (4, 2), True, True)],
}
# head dimension and block size
REFUSED = {9: [(128, 32), (128, 256), (136, 128), (264, 64), (60, 128)], 10: [(128, 128), (136, 256), (60, 256)]}


def fake_call(
    dtype: torch.dtype, head_dim: int, block_size: int, heads: tuple[int, int], causal: bool, padded: bool
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Arguments of `fa4.attend` on a GPU without memory behind them; inside of a FakeTensorMode."""
    lengths, device = (1000, 900), "cuda"
    query, key, value = (
        torch.empty(2, length, count, head_dim, dtype=dtype, device=device).transpose(1, 2)
        for length, count in ((lengths[0], heads[0]), (lengths[1], heads[1]), (lengths[1], heads[1]))
    )
    rows, columns = (-(-length // block_size) for length in lengths)
    indices = torch.empty(2, heads[0], rows, columns, dtype=torch.int32, device=device)
    kv_lens = torch.empty(2, dtype=torch.int32, device=device) if padded else None
    settings = {"block_size": block_size, "causal": causal, "scale": 0.1, "kv_lens": kv_lens}
    return (query, key, value, indices, indices.new_empty(2, heads[0], rows)), settings


@pytest.mark.parametrize("call", CALLS[CAPABILITY], ids=str)
def test_the_call_compiles_and_the_fake_operator_agrees(call):
    fa4.check_supported(CAPABILITY, call[0], call[1], call[2], None)
    compiled = interface._flash_attn_fwd.compile_cache.cache
    with FakeTensorMode():
        arguments, settings = fake_call(*call)
        before = len(compiled)
        results = fa4.attend(*arguments, **settings)
        assert len(compiled) == before + 1
        expected = fa4.block_sparse_forward(*arguments, kv_start=None, **settings)
    for result, fake in zip(results, expected, strict=True):
        assert (result.shape, result.stride(), result.dtype) == (fake.shape, fake.stride(), fake.dtype)


@pytest.mark.parametrize(("head_dim", "block_size"), REFUSED[CAPABILITY])
def test_what_the_backend_refuses_this_release_refuses_too(head_dim, block_size):
    with pytest.raises(ValueError, match="for the fa4 backend"):
        fa4.check_supported(CAPABILITY, BF16, head_dim, block_size, None)
    with FakeTensorMode():
        arguments, settings = fake_call(BF16, head_dim, block_size, (2, 2), CAPABILITY == 10, False)
        with pytest.raises((ValueError, AssertionError), match=r"[Bb]lock spars|head_dim"):
            fa4.attend(*arguments, **settings)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_arguments_are_those_of_the_installed_package(causal, padded):
    query = torch.randn(2, 2, 300, 64)
    kv_lens = torch.tensor([300, 200], dtype=torch.int32) if padded else None
    indices = torch.zeros(2, 2, 3, 3, dtype=torch.int32)
    lists = fa4.list_arguments(indices, indices[..., 0].contiguous(), block_size=128, causal=causal)
    inspect.signature(BlockSparseTensorsTorch).bind(**lists)
    arguments = fa4.call_arguments(query, query, query, causal=causal, scale=0.1, kv_lens=kv_lens)
    function = flash_attn.cute.flash_attn_varlen_func if padded else flash_attn.cute.flash_attn_func
    bound = inspect.signature(function).bind(**arguments, block_sparse_tensors=lists)
    assert bound.arguments["q"].shape == (2, 300, 2, 64)
