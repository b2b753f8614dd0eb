"""The Triton kernels against float64: in the interpreter (a process of its own) and, where there is one, on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHILD = Path(__file__).with_name("triton_interpreter_child.py")

pytest.importorskip("triton", reason="Triton is for Linux only")


@pytest.mark.parametrize("part", ["scores", "not scores"])
def test_kernels_in_the_interpreter(part, tmp_path):
    """TRITON_INTERPRET=1 must be set before the kernels are imported, and excludes compiling them."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", str(CHILD), "-k", part, "-q", "-p", "no:cacheprovider"]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CHILD.parent.parent)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "skipped" not in finished.stdout, finished.stdout


needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 runs kernels in NumPy"),
]


def gpu_problems():
    """Sizes of real calls, cut to what float64 on one device can judge."""
    from tests.kernel_checks import Problem

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for head_dim in (40, 64, 80, 128, 256):
            yield Problem(heads=(2, 2), lengths=(2085, 2085), head_dim=head_dim, block_size=128, dtype=dtype)
        yield Problem(heads=(4, 2), lengths=(1000, 4097), head_dim=128, block_size=128, causal=True, dtype=dtype)
        yield Problem(
            batch=2,
            lengths=(3003, 3100),
            head_dim=64,
            block_size=64,
            stride=16,
            causal=True,
            kv_start=(100, 0),
            kv_lens=(3100, 2900),
            dtype=dtype,
            layout="bshd",
        )
        yield Problem(heads=(4, 4), lengths=(4096, 4096), head_dim=128, block_size=128, dtype=dtype, content="video")
    for stride in (4, 16, 32):
        yield Problem(lengths=(4100, 4100), head_dim=128, block_size=128, stride=stride, dtype=torch.bfloat16)
    for scale in (-0.1, 0.0, 10.0):
        yield Problem(lengths=(2085, 2085), head_dim=64, block_size=128, causal=True, dtype=torch.bfloat16, scale=scale)


def gpu_test(check_name):
    """A test of one check of kernel_checks over all problems on the GPU."""

    @pytest.mark.parametrize("number", range(30))
    def test(number):
        from tests import kernel_checks

        getattr(kernel_checks, check_name)(list(gpu_problems())[number], "cuda")

    for mark in needs_gpu:
        test = mark(test)
    return test


test_scores_on_a_gpu = gpu_test("check_scores")
test_attention_on_a_gpu = gpu_test("check_attention")
test_attention_through_tensor_descriptors_on_a_gpu = gpu_test("check_descriptors")
test_same_bits_twice_on_a_gpu = gpu_test("check_same_twice")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize("number", range(30))
def test_scores_use_scratch_again_on_a_gpu(number):
    """Two programs for many strips: a missing barrier would let threads read or overwrite each other's sums."""
    from tests import kernel_checks
    from xattn_video.kernels.launch import launch_config

    problem = list(gpu_problems())[number]
    config = launch_config("antidiagonal_scores", problem.dtype, problem.head_dim)
    kernel_checks.check_scratch(problem, "cuda", config, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize("kind", ["even", "sharp", "ties", "zero", "large", "large and sharp"])
def test_selection_on_a_gpu(kind):
    from tests import kernel_checks

    problem = kernel_checks.Problem(heads=(4, 4), lengths=(118_800, 118_800), block_size=128)
    kernel_checks.check_selection(problem, "cuda", kind)
