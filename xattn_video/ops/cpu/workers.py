"""Run many small tasks on CPU threads whose torch operations are serial.

PyTorch splits every operation over all threads and waits for the slowest at its end. For thousands of operations
of a millisecond, on a machine that does other work too, most of the time goes into that waiting: each wait can
last a scheduler slice. Here each thread takes the next task when it is done with one, and waits once.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Task = TypeVar("Task")


class Scratch:
    """Buffers that one thread reuses from task to task, so that their memory is mapped once."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor; it lives until the same name is taken again."""
        size = prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            buffer = self._buffers[name] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(shape)


def for_each(function: Callable[[Task, Scratch], None], tasks: Iterable[Task]) -> None:
    """Call `function(task, scratch)` for every task, on as many threads as torch uses.

    Tasks are taken in their order, so long ones belong first. The first error is raised after all threads have
    ended. Where OpenMP cannot be told to keep a thread serial, the tasks run one after the other, each as parallel
    as torch makes it.
    """
    tasks = list(tasks)
    threads = min(torch.get_num_threads(), len(tasks))
    set_threads, set_mkl_threads = _openmp_set_num_threads(), _mkl_set_num_threads()
    if threads <= 1 or set_threads is None:
        scratch = Scratch()
        for task in tasks:
            function(task, scratch)
        return

    inference = torch.is_inference_mode_enabled()
    queue = iter(tasks)
    lock = threading.Lock()

    def work() -> None:
        # Asking first makes torch set up this thread; later it would undo the next line. Only this thread is changed.
        torch.get_num_threads()
        set_threads(1)
        set_mkl_threads(1)
        scratch = Scratch()
        # Grad and inference mode belong to a thread: take over the caller's.
        with torch.inference_mode(inference), torch.no_grad():
            while True:
                with lock:
                    try:
                        task = next(queue)
                    except StopIteration:
                        return
                function(task, scratch)

    with ThreadPoolExecutor(threads, thread_name_prefix="xattn-cpu") as pool:
        for future in [pool.submit(work) for _ in range(threads)]:
            future.result()


@cache
def _openmp_set_num_threads() -> Callable[[int], Any] | None:
    """OpenMP's own function, which changes the calling thread alone, or None where torch has no OpenMP.

    `torch.set_num_threads` would also change the default of every thread that starts later.
    """
    if not torch.backends.openmp.is_available():
        return None
    try:
        function = ctypes.CDLL(None).omp_set_num_threads
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes, function.restype = [ctypes.c_int], None
    return function


@cache
def _mkl_set_num_threads() -> Callable[[int], Any]:
    """MKL's own function, which changes the calling thread alone. It does nothing where torch has no MKL inside.

    MKL has a number of threads of its own, which `torch.set_num_threads` sets for all threads.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(library)).MKL_Set_Num_Threads_Local
    except (AttributeError, OSError):
        return lambda _: None
    function.argtypes, function.restype = [ctypes.c_int], ctypes.c_int
    return function
