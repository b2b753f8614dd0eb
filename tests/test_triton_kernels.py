"""The Triton kernels against float64: in the interpreter (a process of its own) and, where there is one, on a GPU."""

from __future__ import annotations

import dataclasses
import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

CHILD = Path(__file__).with_name("triton_interpreter_child.py")

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests import kernel_checks  # noqa: E402
from tests.kernel_checks import Problem  # noqa: E402
from tests.kernel_problems import HUGE, SMALL, gpu_problems  # noqa: E402
from xattn_video.ops.triton.launch import launch_config  # noqa: E402


@pytest.mark.parametrize("part", ["scores", "not scores"])
def test_kernels_in_the_interpreter(part, tmp_path):
    """TRITON_INTERPRET=1 must be set before the kernels are imported, and excludes compiling them."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", str(CHILD), "-k", part, "-q", "-p", "no:cacheprovider"]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CHILD.parent.parent)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "skipped" not in finished.stdout, finished.stdout


# inputs on a GPU are new in every run; this brings those of a failure back
SEED = int(os.environ.get("XATTN_TEST_SEED") or secrets.randbelow(2**31))
REAL = list(gpu_problems())


def on_a_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that runs there alone."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    test = pytest.mark.skipif(interpreted, reason="TRITON_INTERPRET=1 runs kernels in NumPy")(test)
    test = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")(test)
    return pytest.mark.gpu(test)


def fresh(problem: Problem) -> Problem:
    """The same call on inputs of this run; a test that fails shows what was printed."""
    print(f"XATTN_TEST_SEED={SEED}: {problem}")
    return dataclasses.replace(problem, seed=SEED)


@on_a_gpu
@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_small_problems_on_a_gpu(problem):
    """Few and short, so that a checker of memory accesses can run them too: make memcheck-gpu."""
    kernel_checks.check_scores(fresh(problem), "cuda")
    kernel_checks.check_attention(fresh(problem), "cuda")
    kernel_checks.check_descriptors(fresh(problem), "cuda")
    kernel_checks.check_selection(fresh(problem), "cuda", "even")
    kernel_checks.check_residual(fresh(problem), "cuda")


@on_a_gpu
@pytest.mark.parametrize("check", ["scores", "attention", "descriptors", "residual", "same_twice"])
@pytest.mark.parametrize("problem", REAL, ids=str)
def test_real_sizes_on_a_gpu(problem, check):
    getattr(kernel_checks, f"check_{check}")(fresh(problem), "cuda")


@on_a_gpu
@pytest.mark.parametrize("problem", HUGE, ids=str)
def test_values_near_the_largest_number_on_a_gpu(problem):
    kernel_checks.check_attention(fresh(problem), "cuda", density=0.9)


@on_a_gpu
@pytest.mark.parametrize("device", [None, "cuda"], ids=["default", "own"])
@pytest.mark.parametrize("problem", REAL, ids=str)
def test_scores_use_scratch_again_on_a_gpu(problem, device):
    """Two programs for many strips: a missing barrier would let threads read or overwrite each other's sums."""
    own = device and torch.device(device)
    config = launch_config("antidiagonal_scores", problem.dtype, problem.head_dim, own)
    kernel_checks.check_scratch(fresh(problem), "cuda", config, 2)


@on_a_gpu
@pytest.mark.parametrize("kind", ["even", "sharp", "ties", "zero", "large", "large and sharp", "broken"])
def test_selection_on_a_gpu(kind):
    problem = Problem(heads=(4, 4), lengths=(118_800, 118_800), block_size=128)
    kernel_checks.check_selection(fresh(problem), "cuda", kind)
