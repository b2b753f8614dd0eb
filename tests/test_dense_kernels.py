"""The kernels that the bench compares with are called as their packages want it, and judged before they are timed."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from xattn_video import block_sparse_attention
from xattn_video_eval.bench import dense_kernels
from xattn_video_eval.bench.dense_kernels import Problem

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"flash-attn-2": "flash_attn", "flash-attn-3": "flash_attn_interface", "flash-attn-4": "flash_attn.cute"}


def problem(causal: bool, length: int = 200) -> Problem:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, length, 32, generator=generator) for heads in (4, 2, 2))
    return Problem(query, key, value, causal)


def sparse_problem(causal: bool) -> Problem:
    """600 tokens in blocks of 128; each row keeps its own block."""
    case = problem(causal, 600)
    block_mask = torch.rand(2, 4, 5, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    return Problem(case.query, case.key, case.value, causal, block_mask | torch.eye(5, dtype=torch.bool))


def gpu_candidates(case: Problem, monkeypatch: pytest.MonkeyPatch) -> dict[str, dense_kernels.Kernel]:
    """The candidates that a GPU gets, on tensors of the CPU."""
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "device", property(lambda self: types.SimpleNamespace(type="cuda")))
        return dense_kernels.dense_candidates(case)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "flashinfer"])
def test_packages_get_the_layout_they_take(name, causal, monkeypatch):
    def flash_attn_func(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Any:
        parts = (part.transpose(1, 2) for part in (query, key, value))
        output = scaled_dot_product_attention(*parts, is_causal=causal, enable_gqa=True).transpose(1, 2)
        return (output, None) if name == "flash-attn-4" else output

    def single_prefill_with_kv_cache(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
        assert query.ndim == 3
        return flash_attn_func(query[None], key[None], value[None], causal=causal)[0]

    module: Any = types.ModuleType(name)
    module.flash_attn_func, module.single_prefill_with_kv_cache = flash_attn_func, single_prefill_with_kv_cache
    monkeypatch.setitem(sys.modules, NAMES.get(name, name), module)
    case = problem(causal)
    judged = dense_kernels.judge({name: gpu_candidates(case, monkeypatch)[name]}, case)
    assert judged.refused == {}
    assert set(judged.kernels) == {name}


def test_what_is_not_installed_says_so(monkeypatch):
    case = problem(False)
    found = gpu_candidates(case, monkeypatch)
    # Compiling FlexAttention takes its time: it has a test of its own.
    del found["flex"]
    judged = dense_kernels.judge(found, case)
    assert set(found) == set(judged.kernels) | set(judged.refused)
    for name, package in {**NAMES, "flashinfer": "flashinfer"}.items():
        assert judged.refused[name] == f"not installed: {package.split('.')[0]}"
    assert "sdpa" in judged.kernels


def test_the_causal_mask_of_flex_attention_is_the_triangle_of_blocks_and_tokens():
    mask = dense_kernels._causal_mask(500, torch.device("cpu"))
    assert torch.equal(mask.to_dense()[0, 0].bool(), torch.ones(4, 4).tril().bool())
    assert mask.full_kv_num_blocks.tolist() == [[[0, 1, 2, 3]]]
    tokens = torch.arange(500)
    assert torch.equal(mask.mask_mod(0, 3, tokens[:, None], tokens), torch.ones(500, 500).tril().bool())


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_flex_attention_compiled(causal, monkeypatch):
    """And as many as are asked for: torch stops compiling code that it had to compile too often."""
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        for length in (700, 600, 500):
            case = problem(causal, length)
            judged = dense_kernels.judge({"flex": gpu_candidates(case, monkeypatch)["flex"]}, case)
            assert judged.refused == {}


@pytest.mark.parametrize("causal", [False, True])
def test_sparse_flex_attention_takes_the_same_blocks(causal):
    sparse = sparse_problem(causal)
    kernel = dense_kernels._FlexSparse(sparse)
    judged = dense_kernels.judge({"flex-sparse": kernel}, sparse)
    assert judged.refused == {}
    assert torch.equal(kernel(), kernel())


@pytest.mark.parametrize("causal", [False, True])
def test_a_wrong_block_is_seen(causal):
    sparse = sparse_problem(causal)
    other = sparse.block_mask.clone()
    other[1, 2, 3, 1] ^= True
    parts = (sparse.query, sparse.key, sparse.value)
    right, off = (
        partial(block_sparse_attention, *parts, mask, block_size=128, causal=causal)
        for mask in (sparse.block_mask, other)
    )
    judged = dense_kernels.judge({"own": right, "off": off}, sparse)
    assert set(judged.kernels) == {"own"}
    assert judged.refused["off"].startswith("wrong result: off float64 by")


def test_a_cpu_has_none_of_the_attention_kernels_of_gpus():
    assert dense_kernels.attention_candidates(sparse_problem(False)) == ({}, {})


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((9, 0), torch.bfloat16, None),
        ((9, 0), torch.float32, "it takes float16 and bfloat16, not torch.float32"),
        ((8, 0), torch.bfloat16, "it needs an NVIDIA GPU of compute capability 9.0, not 8.0"),
    ],
)
def test_the_kernel_for_hopper_is_there_or_says_why_not(capability, dtype, reason, monkeypatch):
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton 3.6 or newer")
    parts = [torch.zeros(1, heads, 300, 64, dtype=dtype) for heads in (2, 1, 1)]
    problem = Problem(*parts, causal=False, block_mask=torch.ones(1, 2, 3, 3, dtype=torch.bool))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "device", property(lambda self: types.SimpleNamespace(type="cuda")))
        own = dense_kernels.attention_candidates(problem)
    assert set(own.kernels) == ({"attend-plain", "attend-hopper"} if reason is None else {"attend-plain"})
    assert own.refused == ({} if reason is None else {"attend-hopper": reason})


OWN = """
import torch
from xattn_video_eval.bench.dense_kernels import Problem, _OnLists, judge
from xattn_video.ops.triton.attention import launch_block_sparse

parts = [torch.randn(1, heads, 300, 16, dtype=torch.bfloat16) for heads in (2, 1, 1)]
block_mask = torch.eye(3, dtype=torch.bool).expand(1, 2, 3, 3).clone()
block_mask[0, 1, 2, 0] = True
for causal in (False, True):
    problem, other = (Problem(*parts, causal, mask) for mask in (block_mask, block_mask.flip(1)))
    kernels = {"own": _OnLists(problem, launch_block_sparse), "off": _OnLists(other, launch_block_sparse)}
    judged = judge(kernels, problem)
    assert set(judged.kernels) == {"own"}, judged
    assert judged.refused["off"].startswith("wrong result"), judged
"""


def test_an_attention_kernel_by_itself_takes_the_blocks_of_its_problem(tmp_path):
    """In Triton's interpreter, in a process of its own."""
    pytest.importorskip("triton", reason="Triton is for Linux only")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", OWN]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=1000)
    assert done.returncode == 0, done.stderr
