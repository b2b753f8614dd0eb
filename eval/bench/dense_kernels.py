"""The kernels that sparse attention is timed beside: those that are here, each judged before it is timed.

The functions `..._candidates` list what could run, `judge` runs each once and compares a sample of its rows with
float64. What raises, is not installed or is wrong comes back with the reason, so that a table without it says why.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from xattn_video.ops import KeyMask, dense_attention, flex
from xattn_video.ops.block_lists import mask_to_lists

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Kernel = Callable[[], Tensor]

# Query rows of each head that are compared with float64.
SAMPLED_ROWS = 64


@dataclass(frozen=True, eq=False)
class Problem:
    """One attention call: query, key, value `[B, H, S, D]`; with a block mask `[B, H, Nq, Nk]`, a sparse one."""

    query: Tensor
    key: Tensor
    value: Tensor
    causal: bool
    block_mask: Tensor | None = None
    block_size: int = 128


class Judged(NamedTuple):
    """The kernels that gave the right result, and why each of the others is not timed."""

    kernels: dict[str, Kernel]
    refused: dict[str, str]


def dense_candidates(problem: Problem) -> dict[str, Kernel]:
    """Every dense kernel that might take this call on this device, by name."""
    found: dict[str, Kernel] = {"sdpa": partial(_sdpa, problem, None)}
    if problem.query.device.type == "cuda":
        for name in ("flash", "cudnn", "efficient"):
            found[f"sdpa-{name}"] = partial(_sdpa, problem, getattr(SDPBackend, f"{name.upper()}_ATTENTION"))
        found["flex"] = _Flex(problem)
        found["flash-attn-2"] = partial(_flash_attn, problem, "flash_attn")
        found["flash-attn-3"] = partial(_flash_attn, problem, "flash_attn_interface")
        found["flash-attn-4"] = partial(_flash_attn, problem, "flash_attn.cute")
        found["flashinfer"] = partial(_flashinfer, problem)
    return found


def attention_candidates(problem: Problem) -> Judged:
    """This package's own attention kernels for a GPU, each by itself, and why one of them cannot run this problem.

    A call takes one of the two; here both are named, to be timed beside each other.
    """
    if problem.query.device.type != "cuda":
        return Judged({}, {})
    from xattn_video.ops.triton.attention import launch_block_sparse
    from xattn_video.ops.triton.attention_choice import hopper_refusal

    own = Judged({"attend-plain": _OnLists(problem, launch_block_sparse)}, {})
    query, key, value = problem.query, problem.key, problem.value
    reason = hopper_refusal(query, key, value, KeyMask(problem.causal), block_size=problem.block_size)
    if reason is None:
        # Triton before 3.6 cannot import it
        from xattn_video.ops.triton.attention_hopper import launch_hopper

        own.kernels["attend-hopper"] = _OnLists(problem, launch_hopper)
    else:
        own.refused["attend-hopper"] = reason
    return own


class _OnLists:
    """One of our attention kernels over the blocks of a sparse problem; its lists are made once, before it is timed."""

    def __init__(self, problem: Problem, launch: Callable[..., None]) -> None:
        self._problem, self._launch = problem, launch

    def __call__(self) -> Tensor:
        problem = self._problem
        output = torch.empty_like(problem.query)
        lse = torch.empty(problem.query.shape[:3], dtype=torch.float32, device=problem.query.device)
        settings: dict[str, Any] = {"block_size": problem.block_size, "causal": problem.causal}
        settings |= {"scale": problem.query.shape[3] ** -0.5, "kv_start": None, "kv_lens": None}
        self._launch(problem.query, problem.key, problem.value, output, lse, *self._lists, **settings)
        return output

    @cached_property
    def _lists(self) -> tuple[Tensor, Tensor]:
        assert self._problem.block_mask is not None
        return mask_to_lists(self._problem.block_mask)


def sparse_candidates(problem: Problem) -> dict[str, Kernel]:
    """Kernels of others that take the same block mask on this device, by name."""
    if problem.query.device.type != "cuda":
        return {}
    return {"flex-sparse": _FlexSparse(problem)}


class _FlexSparse:
    """FlexAttention over the blocks of a sparse problem; its mask is made once, as other kernels get finished lists."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self._attend()[0]

    @cached_property
    def _attend(self) -> Callable[[], tuple[Tensor, Tensor]]:
        problem, length = self._problem, self._problem.query.shape[2]
        assert problem.block_mask is not None
        mask = flex.make_block_mask(problem.block_mask, length, length, KeyMask(problem.causal), problem.block_size)
        scale = problem.query.shape[3] ** -0.5
        attend = flex.compiled_attention(problem.query, problem.key, problem.value, problem.block_size, scale)
        return partial(attend, problem.query, problem.key, problem.value, mask, scale)


def judge(candidates: Mapping[str, Kernel], problem: Problem) -> Judged:
    """Run each candidate once and compare it with float64.

    A kernel passes if its error on the sampled rows is at most that of attention by three plain operations in the
    inputs' dtype, plus rounding.
    """
    rows, truth, allowed = sampled_truth(problem)
    judged = Judged({}, {})
    for name, kernel in candidates.items():
        try:
            error = relative_error(kernel()[:, :, rows], truth)
        # Whatever a foreign kernel raises (no such device, no memory, a compiler's error) is its reason.
        except Exception as failure:
            judged.refused[name] = reason_of(failure)
            continue
        # written so that NaN is wrong too
        if not error <= allowed:
            judged.refused[name] = f"wrong result: off float64 by {error:.2e}, allowed {allowed:.2e}"
        else:
            judged.kernels[name] = kernel
    return judged


def _sdpa(problem: Problem, backend: SDPBackend | None) -> Tensor:
    attend = partial(dense_attention, problem.query, problem.key, problem.value, KeyMask(problem.causal))
    if backend is None:
        return attend()
    with sdpa_kernel([backend]):
        return attend()


class _Flex:
    """FlexAttention without a block mask, or with the causal one; compiled at the first call."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def __call__(self) -> Tensor:
        return self._attend()

    @cached_property
    def _attend(self) -> Kernel:
        from torch.nn.attention.flex_attention import flex_attention

        problem = self._problem
        length, mask = problem.query.shape[2], None
        if problem.causal:
            mask = _causal_mask(length, problem.query.device)
        options: dict[str, Any] = {"enable_gqa": problem.query.shape[1] != problem.key.shape[1]}
        # code of its own: torch counts recompilations by code, and past a few it gives up
        code = flex_attention.__code__.replace()
        own = types.FunctionType(code, flex_attention.__globals__, "flex_attention", flex_attention.__defaults__)
        own.__kwdefaults__ = flex_attention.__kwdefaults__
        attend = torch.compile(own, fullgraph=True, dynamic=False)
        return partial(attend, problem.query, problem.key, problem.value, block_mask=mask, **options)


def _causal_mask(length: int, device: torch.device) -> BlockMask:
    causal = KeyMask(causal=True)
    blocks = causal.valid_blocks(1, length, length, block_size=128, device=device)
    mask = flex.make_block_mask(blocks, length, length, causal, block_size=128)
    # All heads share these lists, so the test of a token may not look a head up.
    mask.mask_mod = lambda item, head, query, key: query >= key
    return mask


def _flash_attn(problem: Problem, module: str) -> Tensor:
    attend = importlib.import_module(module).flash_attn_func
    query, key, value = (part.transpose(1, 2) for part in (problem.query, problem.key, problem.value))
    found = attend(query, key, value, causal=problem.causal)
    # some versions return the log-sum-exp as well
    output: Tensor = found[0] if isinstance(found, tuple) else found
    return output.transpose(1, 2)


def _flashinfer(problem: Problem) -> Tensor:
    attend = importlib.import_module("flashinfer").single_prefill_with_kv_cache
    items = (part.transpose(1, 2) for part in (problem.query, problem.key, problem.value))
    outputs = [attend(*item, causal=problem.causal) for item in zip(*items, strict=True)]
    return torch.stack(outputs).transpose(1, 2)


def sampled_truth(problem: Problem) -> tuple[Tensor, Tensor, float]:
    """Sampled rows, what float64 gives there `[B, H, rows, D]`, and the error that is allowed."""
    length = problem.query.shape[2]
    rows = torch.linspace(0, length - 1, min(SAMPLED_ROWS, length), device=problem.query.device).long()
    exact, eager = (torch.stack(list(_rows(problem, rows, double))) for double in (True, False))
    truth = exact.unflatten(0, problem.query.shape[:2])
    allowed = relative_error(eager.unflatten(0, problem.query.shape[:2]), truth)
    return rows, truth, max(allowed + 2 * torch.finfo(problem.query.dtype).eps, 2e-6)


def _rows(problem: Problem, rows: Tensor, double: bool) -> Iterator[Tensor]:
    """Attention of the sampled rows by three plain operations, head after head: a float64 copy of all is too large."""
    batch, heads, length, head_dim = problem.query.shape
    group = heads // problem.key.shape[1]
    position = torch.arange(length, device=rows.device)
    for item in range(batch):
        for head in range(heads):
            parts = (
                problem.query[item, head, rows],
                problem.key[item, head // group],
                problem.value[item, head // group],
            )
            query, key, value = (part.double() if double else part for part in parts)
            logits = (query @ key.transpose(0, 1)) * head_dim**-0.5
            if problem.causal:
                logits = logits.masked_fill(position > rows[:, None], -torch.inf)
            if problem.block_mask is not None:
                kept = problem.block_mask[item, head][rows // problem.block_size][:, position // problem.block_size]
                logits = logits.masked_fill(~kept, -torch.inf)
            yield torch.softmax(logits, dim=-1) @ value


def relative_error(output: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth, in float64; NaN where the output has one."""
    return float((output.double() - truth.double()).norm() / truth.double().norm())


def reason_of(error: Exception) -> str:
    """One line of why a kernel did not run."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}"
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
