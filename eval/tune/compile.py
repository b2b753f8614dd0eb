"""Compile the configurations that `tune` will measure, many at a time: a GPU has one user, a compiler as many as cores.

Each worker is a process of its own that needs no GPU. It compiles what a launch would compile, for tensors that hold no
memory, and Triton keeps the result on disk, where the launch finds it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

from xattn_video.ops.triton.launch_tables import LaunchConfig
from xattn_video_eval.tune.problems import Runner, Shape
from xattn_video_pipelines.common.terminal import say


def workers() -> ProcessPoolExecutor:
    """A process for each core that this one may use; they start when there is work for them.

    They are spawned: torch and LLVM have threads, which a fork would lose.
    """
    return ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn"))


def compile_ahead(pool: Executor, runners: Iterable[Runner], configs: Sequence[LaunchConfig], target: Any) -> None:
    """Compile each configuration for each problem, and wait for it.

    Args:
        pool: what `workers` gives.
        runners: the problems on which they will be launched.
        configs: launch configurations of the runners' kernel.
        target: the GPU, as Triton names it.
    """
    shapes = list(dict.fromkeys(runner.shape for runner in runners))
    say(f"{shapes[0].kernel}: compiling {len(configs)} configurations", sys.stderr, progress=True)
    for _ in pool.map(_compile, [shapes] * len(configs), configs, [target] * len(configs)):
        pass


def _compile(shapes: Sequence[Shape], config: LaunchConfig, target: Any) -> None:
    """In a worker. What fails here fails again as it is launched, and that failure is the trial's reason."""
    with contextlib.suppress(Exception):
        from xattn_video_eval.tune.like_jit import compile_like_jit

        for shape in shapes:
            compile_like_jit(*shape.runner().kernel_and_arguments(config), target)
