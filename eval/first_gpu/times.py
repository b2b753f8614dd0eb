"""The steps that time something at the size of HunyuanVideo: dense, attention, scores with selection, whole calls,
the merge and the addition of the residual memory.

Each timed result is compared with float64 on sampled rows. Effective TFLOP/s count what the result needs: all pairs for
dense attention, those of the kept blocks for sparse attention, one product in `stride` for scores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xattn_video import XAttnConfig, score_blocks, select_blocks, xattention
from xattn_video.config import BACKENDS
from xattn_video.ops import reference
from xattn_video.ops import residual as plain_residual
from xattn_video.ops.backends import unavailable_reason
from xattn_video.ops.block_lists import lists_to_mask, mask_to_lists
from xattn_video.ops.key_mask import num_blocks
from xattn_video.ops.triton.residual import add, merge
from xattn_video.ops.triton.scores import launch_antidiagonal_scores
from xattn_video.ops.triton.selection import select as select_on_gpu
from xattn_video_eval.bench import (
    Problem,
    dense_candidates,
    median_seconds,
    peak_extra_mb,
    reason_of,
    relative_error,
    sampled_truth,
)
from xattn_video_eval.first_gpu.inputs import DENSITY, dense_flop, timed_problem
from xattn_video_eval.first_gpu.kernels import ATTENTION, BLOCK_SIZE, GPU_ONLY, settings
from xattn_video_eval.first_gpu.look import Look
from xattn_video_eval.first_gpu.plan import Variant, strides, variants

# Through torch's own choice of backends; on a CPU there is only one.
DENSE_KERNELS = ("sdpa-cudnn", "sdpa-flash")
SCORES_ERROR = 1e-3
# What select keeps of the blocks' mass while only its time is of interest.
THRESHOLD = 0.9
# Random inputs have blocks of nearly equal mass: this share of the mass is in about DENSITY of the blocks.
SPARSE_THRESHOLD = DENSITY + 0.01
# Gives the error of a result, and the error that is allowed.
Check = Callable[[Any], tuple[float, float]]
# Of whole calls; a backend that cannot run here is a row with its reason.
BACKENDS_TIMED = tuple(name for name in BACKENDS if name.startswith("triton") or name == "fa4")


def dense(look: Look) -> None:
    """Dense attention by each kernel of torch that is of interest."""
    timed = timed_problem(look)
    problem = Problem(timed.query, timed.key, timed.value, causal=False)
    candidates = dense_candidates(problem)
    check = row_check(problem)
    if look.rehearse:
        for name in DENSE_KERNELS:
            look.skip(name, "a kernel for GPUs")
    for name in ("sdpa",) if look.rehearse else DENSE_KERNELS:
        time_call(look, candidates[name], check, dense_flop(look), name=name)


def attend_hopper(look: Look) -> None:
    """The Hopper kernel over the kept blocks, and its fastest variant over all blocks."""
    _attend(look, "attention_hopper")


def attend_plain(look: Look) -> None:
    """The same by the plain kernel."""
    _attend(look, "block_sparse")


def _attend(look: Look, kernel: str) -> None:
    if look.rehearse and kernel in GPU_ONLY:
        look.skip(kernel, GPU_ONLY[kernel])
        return
    problem = timed_problem(look)
    mask = problem.block_mask
    assert mask is not None
    density = mask.float().mean().item()
    check = row_check(problem)
    seconds: dict[str, float] = {}
    found = variants(kernel, look.rehearse)
    for variant in found:
        call = _attention_call(look, problem, variant, mask_to_lists(mask))
        named = {"kernel": kernel, "name": variant.name, "shipped": variant.shipped, "density": density}
        spent = time_call(look, call, check, density * dense_flop(look), **named)
        if spent is not None:
            seconds[variant.name] = spent
    if not seconds:
        return
    best = min(found, key=lambda variant: seconds.get(variant.name, float("inf")))
    whole = Problem(problem.query, problem.key, problem.value, causal=False)
    call = _attention_call(look, problem, best, mask_to_lists(torch.ones_like(mask)))
    named = {"kernel": kernel, "name": f"{best.name}, all blocks", "density": 1.0}
    time_call(look, call, row_check(whole), dense_flop(look), **named)


def _attention_call(
    look: Look, problem: Problem, variant: Variant, lists: tuple[Tensor, Tensor]
) -> Callable[[], Tensor]:
    """A launch into memory of its own, full of NaN at first, that returns the output."""
    parts = (problem.query, problem.key, problem.value)
    output = torch.full_like(problem.query, torch.nan)
    lse = torch.full(problem.query.shape[:3], torch.nan, device=problem.query.device)
    options = {**settings(look.timed), "config": variant.config}

    def call() -> Tensor:
        ATTENTION[variant.kernel].launch(*parts, output, lse, *lists, **options)
        return output

    return call


def scores(look: Look) -> None:
    """Scores by every variant, and the selection of what the last one gave, for each stride."""
    problem = timed_problem(look)
    query, key, blocks = problem.query, problem.key, problem.block_mask
    assert blocks is not None
    for stride in strides(look.rehearse):
        check = _score_check(look, problem, stride)
        result = torch.empty(blocks.shape, device=look.device)
        for variant in variants("antidiagonal_scores", look.rehearse):
            result.fill_(torch.nan)
            options = {**settings(look.timed), "stride": stride, "config": variant.config}
            call = partial(_launch_scores, query, key, result, options)
            named = {"stride": stride, "name": variant.name, "shipped": variant.shipped}
            time_call(look, call, check, dense_flop(look) / (2 * stride), **named)
        valid = torch.ones(1, 1, *blocks.shape[2:], dtype=torch.bool, device=look.device)
        select = partial(select_on_gpu, result, valid, ~valid, threshold=THRESHOLD)
        time_call(look, select, partial(_selection_check, result, valid), None, stride=stride, name="select")


def _launch_scores(query: Tensor, key: Tensor, result: Tensor, options: dict[str, Any]) -> Tensor:
    launch_antidiagonal_scores(query, key, result, **options)
    return result


def whole(look: Look) -> None:
    """The whole call by each backend for this GPU, its peak memory beyond the output, and its density."""
    timed = timed_problem(look)
    parts = (timed.query, timed.key, timed.value)
    for backend in BACKENDS_TIMED:
        reason = unavailable_reason(backend, look.device, timed.query.dtype)
        if reason is not None:
            look.skip(f"whole call, {backend}", reason)
            continue
        for stride in strides(look.rehearse):
            config = XAttnConfig(stride=stride, threshold=SPARSE_THRESHOLD, backend=backend, min_tokens=0)
            _whole_call(look, parts, config)
    if look.rehearse:
        look.skip("peak memory", "torch counts it on a GPU alone")


def _whole_call(look: Look, parts: tuple[Tensor, Tensor, Tensor], config: XAttnConfig) -> None:
    query, key, value = parts
    named = {"name": "whole call", "backend": config.backend, "stride": config.stride}
    call = partial(xattention, query, key, value, config)
    try:
        found = score_blocks(query, key, stride=config.stride, backend=config.backend)
        mask = select_blocks(
            found, threshold=SPARSE_THRESHOLD, q_len=query.shape[2], kv_len=key.shape[2], backend=config.backend
        )
        check = row_check(Problem(query, key, value, False, mask, config.block_size))
        peak = peak_extra_mb(call, look.device)
    except Exception as error:  # whatever a launch raises is its reason
        look.row(**named, failed=reason_of(error))
        return
    output_bytes = query.numel() * query.element_size()
    extra = None if peak is None else (peak * 1e6 - output_bytes) / 2**20
    time_call(look, call, check, None, **named, density=mask.float().mean().item(), extra_mib=extra)


def residual(look: Look) -> None:
    """The merge of a refresh and the addition of a residual, each kind: what they add to the time of attention."""
    output = timed_problem(look).query
    other = output.flip(2)
    lse, other_lse = torch.randn(2, *output.shape[:3], device=look.device)
    rows = _sampled(output.shape[2])
    sampled, others = (part[:, :, rows].double() for part in (output, other))
    exact = plain_residual.merge(sampled, lse[:, :, rows], others, other_lse[:, :, rows], "full")[0]
    allowed = 2 * torch.finfo(output.dtype).eps
    for kind in plain_residual.RESIDUALS:
        packed = merge(output, lse, other, other_lse, kind)[1]
        scale = None if packed.scale is None else packed.scale[:, :, rows]
        added = plain_residual.add(sampled, plain_residual.Packed(packed.values[:, :, rows], scale))
        calls: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
            "merge": (partial(_merged, output, lse, other, other_lse, kind), exact),
            "add": (partial(add, output, packed), added),
        }
        for name, (call, truth) in calls.items():
            check = partial(_rows_check, rows, truth, allowed)
            time_call(look, call, check, None, name=f"{name}, {kind}")


def _merged(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, kind: str) -> Tensor:
    return merge(output, lse, other, other_lse, kind)[0]


def _rows_check(rows: list[int], truth: Tensor, allowed: float, output: Tensor) -> tuple[float, float]:
    return relative_error(output[:, :, rows], truth), allowed


def time_call(look: Look, call: Callable[[], object], check: Check, flop: float | None, **named: Any) -> float | None:
    """Check and time one call and write its row; the median seconds, or None where it failed or is wrong."""
    try:
        off, allowed = check(call())
        # written so that NaN is wrong too
        wrong = {} if off <= allowed else {"wrong": f"off float64 by {off:.2e}, allowed {allowed:.2e}"}
        seconds = median_seconds(call, look.device, look.rounds)
    except Exception as error:  # whatever a compiler or a launch raises is its reason
        look.row(**named, failed=reason_of(error))
        return None
    rate = {} if flop is None else {"tflops": flop / seconds / 1e12}
    look.row(**named, ms=seconds * 1e3, **rate, off=off, **wrong)
    return None if wrong else seconds


def row_check(problem: Problem) -> Check:
    """Attention outputs [B, H, S, D] on sampled rows of every head."""
    rows, truth, allowed = sampled_truth(problem)
    return lambda output: (relative_error(output[:, :, rows], truth), allowed)


def _score_check(look: Look, problem: Problem, stride: int) -> Check:
    """Scores of the first, middle and last query block of the first and the last head."""
    query, key = problem.query, problem.key
    heads, blocks = _sampled(query.shape[1]), _sampled(num_blocks(query.shape[2], BLOCK_SIZE))
    wanted = [
        reference.antidiagonal_scores(
            query[:, head : head + 1, block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE].double(),
            key[:, head : head + 1].double(),
            stride=stride,
            **settings(look.timed),
        )[0, 0, 0]
        for head in heads
        for block in blocks
    ]
    truth = torch.stack(wanted)

    def check(result: Tensor) -> tuple[float, float]:
        got = torch.stack([result[0, head, block] for head in heads for block in blocks])
        return relative_error(got, truth), SCORES_ERROR

    return check


def _selection_check(result: Tensor, valid: Tensor, lists: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Blocks by which a sampled row differs from what sorting keeps: sums in another order may cost one."""
    blocks = _sampled(result.shape[2])
    rows = valid[:, :, blocks].expand(-1, result.shape[1], -1, -1)
    wanted = reference.select(result[:, :, blocks], rows, ~rows, threshold=THRESHOLD)
    kept = lists_to_mask(lists[0][:, :, blocks], lists[1][:, :, blocks])
    return (kept != wanted).sum(-1).max().item(), 1


def _sampled(count: int) -> list[int]:
    return sorted({0, count // 2, count - 1})
