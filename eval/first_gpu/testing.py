"""The steps `small` and `tests`: the project's own tests of the kernels, by pytest."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
from pathlib import Path

from xattn_video_eval.first_gpu import pytest_rows
from xattn_video_eval.first_gpu.look import Look
from xattn_video_eval.first_gpu.runner import ROOT
from xattn_video_pipelines.common import jsonl

# Each test worker holds a CUDA context and compiles on a core of its own.
MOST_WORKERS = 12
# A test that takes longer hangs; then its worker ends, and another takes over.
TEST_SECONDS = 60
# Left of a step's time to write down what the tests said.
TO_REPORT = 5
MOST_FAILURES = 20


def small(look: Look) -> None:
    """The kernels on small problems against float64: every layout, dtype and mask; and selection against a sort."""
    if look.rehearse:
        run_pytest(look, "-k", "test_every_scale and False-0.0", "tests/triton_interpreter_child.py")
    else:
        run_pytest(look, "-m", "gpu", "-k", "small_problems or selection", "tests/test_triton_kernels.py")


def all_tests(look: Look) -> None:
    """Every test that needs a GPU, as far as the time goes; a rehearsal collects them and sees them skipped."""
    run_pytest(look, "-m", "gpu", *gpu_test_files())
    if look.rehearse:
        look.skip("the tests marked gpu", "they need a GPU; collected")


def gpu_test_files() -> list[str]:
    """The test files that hold a test marked `gpu`."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "pytest.mark.gpu" in file.read_text(encoding="utf-8")]


def run_pytest(look: Look, *arguments: str) -> None:
    """Run pytest; a row for each test that failed, and one that counts. Raises RuntimeError if no test ran."""
    results = look.out / f"{look.step}-tests.jsonl"
    results.unlink(missing_ok=True)
    workers = 0 if look.rehearse else min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    limit = max(look.seconds - TO_REPORT, 1)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", pytest_rows.__name__]
    command += ["-o", f"timeout={TEST_SECONDS}", "-o", "timeout_method=thread"]
    command += ["-n", str(workers), "--dist", "worksteal", "--continue-on-collection-errors", *arguments]
    finished = True
    try:
        subprocess.run(command, cwd=ROOT, env={**os.environ, pytest_rows.VARIABLE: str(results)}, timeout=limit)
    except subprocess.TimeoutExpired:
        finished = False
    _report(look, results, finished)


def _report(look: Look, results: Path, finished: bool) -> None:
    rows = [row for _, row in jsonl.read(results)]
    if not rows:
        raise RuntimeError("pytest reported no test, see above")
    failures = [row for row in rows if row["outcome"] == "failed"]
    for row in failures[:MOST_FAILURES]:
        look.row(name=row["test"], wrong=row["reason"] or "failed")
    counts = collections.Counter(row["outcome"] for row in rows)
    look.row(name="tests", outcomes=counts, finished=finished)
