"""The step `compile`: every kernel that will be checked or timed goes into Triton's cache, on all cores at once.

No GPU is needed for it, and each later step then only loads what it launches.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, as_completed

from xattn_video_eval.bench import reason_of
from xattn_video_eval.first_gpu.kernels import arguments_without_memory
from xattn_video_eval.first_gpu.look import Look
from xattn_video_eval.first_gpu.plan import ATTENTION_KERNELS, TARGET, TIMED, Call, Variant, checks, strides, variants
from xattn_video_eval.tune import workers

Job = tuple[Variant, Call, int | None]


def jobs(rehearse: bool) -> list[Job]:
    """Each variant with a call and, for scores, a stride; at the timed size in a rehearsal too."""
    timed: list[Job] = [
        (variant, TIMED, None) for kernel in ATTENTION_KERNELS for variant in variants(kernel, rehearse)
    ]
    timed += [
        (variant, TIMED, stride)
        for stride in strides(rehearse)
        for variant in variants("antidiagonal_scores", rehearse)
    ]
    return timed if rehearse else timed + [(variant, call, None) for call, variant in checks(rehearse)]


def compile_all(look: Look) -> None:
    """A row for each kernel: how long it took to compile for sm_90 and the shared memory it uses, or what failed."""
    began = time.monotonic()
    with workers() as pool:
        pending: dict[Future[tuple[float, int]], Job] = {
            pool.submit(compile_variant, *job): job for job in jobs(look.rehearse)
        }
        for future in as_completed(pending):
            variant, call, stride = pending[future]
            named = {"kernel": variant.kernel, "name": variant.name, "call": str(call), "stride": stride}
            try:
                seconds, shared = future.result()
            except Exception as error:  # whatever a compiler raises is that kernel's reason
                look.row(**named, failed=reason_of(error))
            else:
                look.row(**named, seconds=round(seconds, 1), shared=shared)
    look.row(name="all", seconds=round(time.monotonic() - began, 1), cores=len(os.sched_getaffinity(0)))


def compile_variant(variant: Variant, call: Call, stride: int | None) -> tuple[float, int]:
    """Seconds, and bytes of shared memory."""
    from xattn_video_eval.tune import TARGETS, compile_like_jit

    began = time.monotonic()
    kernel, arguments = arguments_without_memory(variant, call, stride)
    compiled = compile_like_jit(kernel, arguments, TARGETS[TARGET])
    return time.monotonic() - began, compiled.metadata.shared
