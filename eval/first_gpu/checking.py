"""The step `hopper`: the attention kernels against float64 on problems that are short and awkward.

Each runs twice into outputs full of NaN. An error that differs between the two runs is a race in the kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xattn_video.ops import reference
from xattn_video.ops.block_lists import mask_to_lists
from xattn_video.ops.key_mask import KeyMask
from xattn_video_eval.bench import reason_of, relative_error
from xattn_video_eval.first_gpu.inputs import normal_inputs
from xattn_video_eval.first_gpu.kernels import ATTENTION, BLOCK_SIZE, GPU_ONLY, settings
from xattn_video_eval.first_gpu.look import Look
from xattn_video_eval.first_gpu.plan import Call, Variant, checks

# Of the natural log-sum-exp, which is about 10 here; float32 sums in another order differ by 1e-5.
LSE_ERROR = 1e-3


@dataclass(frozen=True, eq=False)
class _Made:
    """The tensors of a call, and what float64 gives."""

    tensors: tuple[Tensor, Tensor, Tensor]
    lists: tuple[Tensor, Tensor]
    kv_lens: Tensor | None
    output: Tensor
    lse: Tensor


def hopper(look: Look) -> None:
    """A row for each call and kernel variant: the errors, and whether two runs gave the same bits."""
    if look.rehearse:
        for kernel, reason in GPU_ONLY.items():
            look.skip(kernel, reason)
    for call, tried in itertools.groupby(checks(look.rehearse), lambda check: check[0]):
        made = _make(call, look.device)
        for _, variant in tried:
            if not (look.rehearse and variant.kernel in GPU_ONLY):
                _check(look, call, made, variant)


def _make(call: Call, device: torch.device) -> _Made:
    generator = torch.Generator(device).manual_seed(call.tokens)
    query, key, value = normal_inputs(call, generator)
    kv_lens = None
    if call.kv_lens is not None:
        kv_lens = torch.tensor(call.kv_lens, dtype=torch.int32, device=device)
        padding = torch.arange(call.tokens, device=device) >= kv_lens[:, None]
        for part in (key, value):
            part.masked_fill_(padding[:, None, :, None], torch.nan)
    key_mask = KeyMask(call.causal, None, kv_lens)
    valid = key_mask.valid_blocks(call.batch, call.tokens, call.tokens, block_size=BLOCK_SIZE, device=device)
    shape = (call.batch, call.heads[0], *valid.shape[2:])
    mask = (torch.rand(shape, device=device, generator=generator) < 0.5) & valid
    # a row that keeps nothing
    mask[0, 0, 1] = False
    options = settings(call, kv_lens)
    truth = reference.block_sparse_forward(query.double(), key.double(), value.double(), mask, **options)
    return _Made((query, key, value), mask_to_lists(mask), kv_lens, *truth)


def _check(look: Look, call: Call, made: _Made, variant: Variant) -> None:
    named = {"kernel": variant.kernel, "name": variant.name, "call": str(call)}
    launch, query = ATTENTION[variant.kernel].launch, made.tensors[0]
    options = {**settings(call, made.kv_lens), "config": variant.config}
    runs = []
    try:
        for _ in range(2):
            output = torch.full_like(query, torch.nan)
            lse = torch.full(query.shape[:3], torch.nan, device=query.device)
            launch(*made.tensors, output, lse, *made.lists, **options)
            runs.append((output, lse))
        figures = judge_runs(runs, (made.output, made.lse))
    except Exception as error:  # whatever a launch raises is that variant's reason
        look.row(**named, failed=reason_of(error))
    else:
        look.row(**named, **figures)


def judge_runs(runs: Sequence[tuple[Tensor, Tensor]], truth: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """The largest errors of some runs, each an output and its log-sum-exp, and whether all gave the same bits.

    `wrong` says what is not right, if anything. An output is rounded to its dtype, and the probabilities are too.
    """
    allowed = 2 * torch.finfo(runs[0][0].dtype).eps
    off = [relative_error(output, truth[0]) for output, _ in runs]
    lse_off = [_lse_error(lse, truth[1]) for _, lse in runs]
    same = all(torch.equal(one, first) for run in runs[1:] for one, first in zip(run, runs[0], strict=True))
    wrong = []
    # written so that NaN is wrong too
    if not all(error <= allowed for error in off):
        wrong.append(f"output is off float64 by {max(off):.2e}, allowed {allowed:.2e}")
    if not all(error <= LSE_ERROR for error in lse_off):
        wrong.append(f"log-sum-exp is off float64 by {max(lse_off):.2e}, allowed {LSE_ERROR:.0e}")
    if not same:
        wrong.append("two runs differ")
    figures = {"off": max(off), "lse_off": max(lse_off), "same": same}
    return figures | ({"wrong": "; ".join(wrong)} if wrong else {})


def _lse_error(lse: Tensor, wanted: Tensor) -> float:
    """The largest difference; inf where one of the two is -inf, as for a query without a key, and the other is not."""
    blind = wanted == -torch.inf
    if not torch.equal(lse == -torch.inf, blind):
        return float("inf")
    return (lse.double() - wanted)[~blind].abs().max().item()
