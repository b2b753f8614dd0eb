"""The attention kernel for Hopper: which calls get it, what is said about it, and on such a GPU its results.

Its source is also run on a CPU, by test_gluon_executor.py, and compiled for sm_90, by test_triton_aot.py.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tests.kernel_checks import Problem, check_listed_attention
from xattn_video import XAttnConfig, block_sparse_attention, score_blocks, select_blocks, xattention
from xattn_video.ops import KeyMask
from xattn_video.ops.backends import unavailable_reason
from xattn_video.ops.triton import attention_choice, launch_tables
from xattn_video.ops.triton.attention_choice import HOPPER, PLAIN, choose_kernel, hopper_refusal

RULES: dict[str, Any] = {"mask": KeyMask(), "block_size": 128}
BF16, FP16 = torch.bfloat16, torch.float16

# a fake tensor has no address, which counts as an aligned one
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[dict[str, Any]]:
    """A GPU that is not there, of compute capability 9.0: the package's launch tables, and tensors without values."""
    says = {"capability": (9, 0)}
    monkeypatch.setenv(launch_tables.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: says["capability"])
    monkeypatch.setattr(torch.version, "hip", None)
    forget_what_was_read()
    with FakeTensorMode():
        yield says
    forget_what_was_read()


def forget_what_was_read() -> None:
    launch_tables.forget_tables()
    launch_tables._gpu_class.cache_clear()
    attention_choice._say_once.cache_clear()


def on_gpu(tokens: int = 1000, heads: int = 4, head_dim: int = 128, dtype: torch.dtype = BF16) -> Tensor:
    """Of batch 2, as diffusers lays it out: the heads of a token lie together."""
    return torch.empty(2, tokens, heads, head_dim, device="cuda:0", dtype=dtype).transpose(1, 2)


def strided(shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(shape, stride, device="cuda:0", dtype=BF16)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_calls_that_the_kernel_takes(gpu, head_dim, dtype):
    query, key = on_gpu(300, 4, head_dim, dtype), on_gpu(1000, 2, head_dim, dtype)
    lens = torch.empty(2, device="cuda:0", dtype=torch.int32)
    assert choose_kernel(query, key, key, **RULES) == HOPPER
    assert choose_kernel(query, key, key, **RULES | {"mask": KeyMask(kv_lens=lens)}) == HOPPER
    by_head = torch.empty(2, 2, 1000, head_dim, device="cuda:0", dtype=dtype)
    assert choose_kernel(query, by_head, key, **RULES) == HOPPER
    assert choose_kernel(query, query, query, **RULES | {"mask": KeyMask(causal=True)}) == HOPPER
    longer = on_gpu(300 + 3 * 128, 2, head_dim, dtype)
    assert choose_kernel(query, longer, longer, **RULES | {"mask": KeyMask(causal=True)}) == HOPPER


def test_calls_that_stay_plain_and_why(gpu):
    query, lens = on_gpu(), torch.empty(2, device="cuda:0", dtype=torch.int32)
    longer = on_gpu(1000 + 100)
    cases: list[tuple[str, Tensor, Tensor, dict[str, Any]]] = [
        ("float32", on_gpu(dtype=torch.float32), on_gpu(dtype=torch.float32), {}),
        ("head_dim 64 and 128, not 96", on_gpu(head_dim=96), on_gpu(head_dim=96), {}),
        ("block_size 128, not 64", query, query, {"block_size": 64}),
        ("kv_start", query, query, {"mask": KeyMask(kv_start=lens)}),
        ("multiple of block_size", query, longer, {"mask": KeyMask(True)}),
        ("multiple of block_size", on_gpu(1000 + 128), query, {"mask": KeyMask(True)}),
        ("without kv_lens", query, query, {"mask": KeyMask(True, kv_lens=lens)}),
        ("key must have strides", query, strided((2, 4, 1000, 128), (0, 128, 512, 1)), {}),
        ("key must have strides", query, strided((2, 4, 1000, 128), (513_000, 128, 513, 1)), {}),
        ("query must have strides", on_gpu(0), query, {}),
    ]
    for words, one, other, changes in cases:
        refusal = hopper_refusal(one, other, other, **RULES | changes)
        assert refusal is not None, words
        assert words in refusal
        assert choose_kernel(one, other, other, **RULES | changes) == PLAIN
        with pytest.raises(ValueError, match=r"backend 'triton-hopper' cannot do this call: .*; backend='triton' can"):
            choose_kernel(one, other, other, force=HOPPER, **RULES | changes)


def test_other_gpus_stay_plain(gpu):
    query = on_gpu()
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        gpu["capability"] = capability
        launch_tables._gpu_class.cache_clear()
        assert f"not {capability[0]}.{capability[1]}" in str(hopper_refusal(query, query, query, **RULES))
        assert choose_kernel(query, query, query, **RULES) == PLAIN


@pytest.mark.parametrize(("percent", "kernel"), [(101, HOPPER), (100, PLAIN), (60, PLAIN)])
def test_a_measurement_of_ones_own_decides(gpu, tmp_path, percent, kernel):
    """An entry of the user's table, which tune writes, comes before the package's."""
    query = on_gpu()
    entry = {"num_stages": 2, "percent_of_plain": percent}
    launch_tables.write_table(tmp_path / "sm_90.json", {"attention_hopper": {"16-bit": {"128": entry}}}, {})
    assert choose_kernel(query, query, query, **RULES) == kernel
    assert choose_kernel(query, query, query, force=HOPPER, **RULES) == HOPPER
    other = on_gpu(head_dim=64)
    assert choose_kernel(other, other, other, **RULES) == HOPPER


def test_a_device_class_without_a_measurement_stays_plain(gpu, monkeypatch):
    monkeypatch.setattr(attention_choice, "find_optional_config", lambda *call: None)
    query = on_gpu()
    assert choose_kernel(query, query, query, **RULES) == PLAIN


def test_what_runs_is_said_once(gpu, caplog):
    query, odd = on_gpu(), on_gpu(head_dim=96)
    with caplog.at_level(logging.INFO, logger=attention_choice.__name__):
        for _ in range(3):
            choose_kernel(query, query, query, **RULES)
            choose_kernel(odd, odd, odd, **RULES)
    first, second = (record.getMessage() for record in caplog.records)
    assert "head_dim 128: the hopper kernel (measured at " in first
    assert second.endswith("head_dim 96: the plain kernel (it takes head_dim 64 and 128, not 96)")


def test_calls_of_other_lengths_with_one_reason_are_said_once(gpu, caplog):
    query = on_gpu()
    with caplog.at_level(logging.INFO, logger=attention_choice.__name__):
        for tokens in (1000, 2000, 3000):
            odd = strided((2, 4, tokens, 128), (tokens * 513, 128, 513, 1))
            choose_kernel(query, odd, odd, **RULES)
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "(key must have strides that TMA can copy (falling, multiples of 16 bytes, none 0))"
    )


def test_the_backend_by_name_also_selects_from_scores(gpu):
    """Scores are float32, which the attention kernel does not take."""
    for dtype in (torch.float32, BF16, FP16):
        assert unavailable_reason("triton-hopper", torch.device("cuda:0"), dtype) is None
    gpu["capability"] = (8, 0)
    assert unavailable_reason("triton-hopper", torch.device("cuda:0"), BF16) == (
        "it needs an NVIDIA GPU of compute capability 9.0, not 8.0"
    )


def test_the_backend_by_name_says_what_it_needs():
    config = XAttnConfig(backend="triton-hopper")
    assert config.label().endswith("triton-hopper")
    query = torch.zeros(1, 1, 256, 64)
    with pytest.raises(ValueError, match="backend 'triton-hopper' cannot run here: it needs an NVIDIA"):
        block_sparse_attention(query, query, query, torch.ones(1, 1, 2, 2, dtype=torch.bool), backend="triton-hopper")


# --- on a GPU ----------------------------------------------------------------------------------------------------

GPU_PROBLEMS = [
    Problem(heads=(2, 2), lengths=(700, 700), head_dim=128, block_size=128, dtype=BF16, layout="bshd"),
    Problem(heads=(4, 2), lengths=(640, 1111), head_dim=128, block_size=128, dtype=FP16, batch=2),
    Problem(heads=(4, 1), lengths=(333, 900), head_dim=64, block_size=128, dtype=BF16, batch=2, kv_lens=(700, 640)),
    Problem(heads=(2, 1), lengths=(300, 700), head_dim=128, block_size=128, dtype=BF16, batch=2, kv_lens=(0, 5)),
    Problem(heads=(4, 4), lengths=(500, 1000), head_dim=64, block_size=128, dtype=FP16, layout="slice"),
    Problem(heads=(4, 2), lengths=(1000, 1000), head_dim=128, block_size=128, dtype=BF16, causal=True, layout="bshd"),
    Problem(heads=(4, 2), lengths=(500, 1140), head_dim=64, block_size=128, dtype=BF16, causal=True, batch=2),
    Problem(heads=(2, 2), lengths=(700, 700), head_dim=128, block_size=128, dtype=BF16, scale=-0.2),
    Problem(heads=(2, 2), lengths=(700, 700), head_dim=128, block_size=128, dtype=BF16, scale=0.0),
    Problem(heads=(3, 3), lengths=(16500, 16500), head_dim=128, block_size=128, dtype=BF16, content="video"),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("problem", GPU_PROBLEMS, ids=str)
def test_results_on_a_gpu(problem, stages):
    """Against float64, twice with the same bits. Values are new in each run; a failure shows their seed."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    from xattn_video.ops.triton.attention_hopper import launch_hopper

    problem = dataclasses.replace(problem, seed=int.from_bytes(os.urandom(2)))
    config = {"num_stages": stages, "percent_of_plain": 101}
    outputs = [check_listed_attention(problem, "cuda", launch_hopper, config=config) for _ in range(2)]
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_backend_by_name_on_a_gpu(dtype):
    """The public function, forced and as the table chooses: the same bits, and right."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    query, key, value = (torch.randn(2, 900, 4, 128, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(3))
    mask = torch.rand(2, 4, 8, 8, device="cuda") < 0.6
    lens = torch.tensor([900, 500], device="cuda")
    call = {"block_mask": mask, "kv_lens": lens, "return_lse": True}
    forced, chosen, plain = (
        block_sparse_attention(query, key, value, backend=name, **call)
        for name in ("triton-hopper", "triton", "reference")
    )
    assert torch.equal(forced[0], chosen[0])
    assert (forced[0] - plain[0]).norm() <= 2 * torch.finfo(dtype).eps * plain[0].norm()
    torch.testing.assert_close(forced[1], plain[1], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("causal", [False, True])
def test_the_whole_call_by_name_on_a_gpu(causal):
    """In one call, in chunks and by stages: the same bits."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    query, key, value = (torch.randn(1, 33500, 2, 64, device="cuda", dtype=BF16).transpose(1, 2) for _ in range(3))
    settings = {"threshold": 0.6, "min_tokens": 0, "causal": causal}
    forced, chosen, in_chunks = (
        xattention(query, key, value, backend=name, max_extra_mib=bound, **settings)
        for name, bound in (("triton-hopper", 256), ("triton", 256), ("triton-hopper", 1))
    )
    assert torch.equal(forced, chosen)
    assert torch.equal(forced, in_chunks)
    scores = score_blocks(query, key, causal=causal, backend="triton-hopper")
    sizes = {"q_len": 33500, "kv_len": 33500}
    mask = select_blocks(scores, threshold=0.6, causal=causal, backend="triton-hopper", **sizes)
    output = block_sparse_attention(query, key, value, mask, causal=causal, backend="triton-hopper")
    assert torch.equal(forced, output)
