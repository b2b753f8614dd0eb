"""What has to be right before the bench times anything: each gate gives a line for everything that is wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xattn_video import XAttnConfig, block_sparse_attention, score_blocks, select_blocks, xattention
from xattn_video.ops import KeyMask, dense_attention, reference, residual
from xattn_video.ops.call_blocks import CallBlocks
from xattn_video.ops.residual import Packed
from xattn_video.testing import causal_text_like_qkv
from xattn_video_eval.bench.cases import Case

# Of the scores' norm, in a head. The sums of a row are exact to about 1e-6; a wrong tile is off by far more.
SCORES_ERROR = 1e-3


def gate_small(device: torch.device, dtype: torch.dtype, config: XAttnConfig, causal: bool) -> list[str]:
    """Scores and sparse output of odd lengths against the float64 reference."""
    length, ulp = 5 * config.block_size + 37, torch.finfo(dtype).eps
    parts = causal_text_like_qkv(1, 4, length, 64, dtype=dtype, kv_heads=2)
    query, key, value = (part.to(device) for part in parts)
    exact = query.double(), key.double(), value.double()
    settings: dict[str, Any] = {"block_size": config.block_size, "causal": causal}
    scores = score_blocks(query, key, stride=config.stride, **settings)
    wanted = score_blocks(exact[0], exact[1], stride=config.stride, backend="reference", **settings)
    # the options give one threshold for all heads
    assert isinstance(config.threshold, float)
    block_mask = select_blocks(wanted, threshold=config.threshold, q_len=length, kv_len=length, **settings)
    output = block_sparse_attention(query, key, value, block_mask, **settings)
    truth = block_sparse_attention(*exact, block_mask, backend="reference", **settings)
    assert isinstance(output, Tensor)
    assert isinstance(truth, Tensor)
    eager = _eager(query, key, value, block_mask, config.block_size, causal)
    failures = []
    if not _error(scores, wanted) <= SCORES_ERROR:
        failures.append(f"scores in {dtype} are off by {_error(scores, wanted):.2e}")
    allowed = _error(eager, truth) + 2 * ulp
    if not _error(output, truth) <= allowed:
        failures.append(f"sparse output in {dtype} is off by {_error(output, truth):.2e}, allowed {allowed:.2e}")
    return failures


def _eager(query: Tensor, key: Tensor, value: Tensor, block_mask: Tensor, block_size: int, causal: bool) -> Tensor:
    """Masked attention by three plain operations in the inputs' own dtype: the error a user would have anyway."""
    length = query.shape[2]
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    mask = block_mask.repeat_interleave(block_size, 2)[:, :, :length]
    mask = mask.repeat_interleave(block_size, 3)[:, :, :, :length]
    if causal:
        mask = mask.tril()
    logits = (query @ key.transpose(-1, -2)) * query.shape[3] ** -0.5
    return torch.softmax(logits.masked_fill(~mask, -torch.inf), dim=-1) @ value


def gate_timed(case: Case, query: Tensor, key: Tensor, value: Tensor, config: XAttnConfig) -> list[str]:
    """With threshold 1 the timed problem must give what dense attention gives."""
    dense = dense_attention(query, key, value, KeyMask(case.causal))
    output = xattention(query, key, value, config, causal=case.causal, threshold=1.0)
    assert isinstance(output, Tensor)
    # Both round their output, and both sum in another order.
    allowed = max(4 * torch.finfo(query.dtype).eps, 2e-6)
    error = _error(output, dense)
    return [] if error <= allowed else [f"threshold 1 is off SDPA by {error:.2e}, allowed {allowed:.2e}"]


def gate_choice(
    case: Case,
    query: Tensor,
    key: Tensor,
    scores: Tensor,
    block_mask: Tensor,
    blocks: CallBlocks,
    config: XAttnConfig,
) -> list[str]:
    """Scores of the timed problem in float64 and what is kept of them, at the first, middle and last query block.

    Args:
        query, key: `[1, H, S, D]`.
        scores, block_mask: `[1, H, N, N]`, of all of it.
        blocks: the call's valid and forced ones.
    """
    size, length, rows = config.block_size, case.tokens, scores.shape[2]
    bounds: dict[str, Any] = {"kv_start": None, "kv_lens": None, "causal": case.causal, "scale": case.head_dim**-0.5}
    failures = []
    for block in sorted({0, rows // 2, rows - 1}):
        row = slice(block, block + 1)
        end = min((block + 1) * size, length)
        # causal rows stand at the end of the keys that they see
        keys = end if case.causal else length
        for head in range(case.heads):
            parts = query[:, head : head + 1, block * size : end], key[:, head : head + 1, :keys]
            wanted = reference.antidiagonal_scores(
                *(part.double() for part in parts), stride=config.stride, block_size=size, **bounds
            )
            got = scores[:, head : head + 1, row, : wanted.shape[3]]
            # written so that NaN is wrong too
            if not (error := _error(got, wanted)) <= SCORES_ERROR:
                failures.append(f"scores of head {head}, block {block} are off by {error:.2e}")
        own = [part.expand(scores.shape)[:, :, row] for part in (blocks.valid, blocks.forced)]
        assert isinstance(config.threshold, float)
        wanted_mask = reference.select(scores[:, :, row], *own, threshold=config.threshold)
        # sums in another order may end a block earlier or later
        wrong = (block_mask[:, :, row] != wanted_mask).sum(-1).amax().item()
        if wrong > 1:
            failures.append(f"up to {wrong} wrong blocks are kept or left out of query block {block}")
    return failures


def gate_residual(
    case: Case,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor],
    packed: Packed,
) -> list[str]:
    """A refresh must give what dense attention gives, and the addition what plain torch gives in float64.

    Args:
        query, key, value: `[1, H, S, D]`.
        outputs: `[1, H, S, D]` each: attention over the kept blocks, the refresh, and the former with the residual.
        packed: the residual of the refresh.
    """
    output, refreshed, total = outputs
    dense = dense_attention(query, key, value, KeyMask(case.causal))
    # Three roundings: of both parts, and of their sum.
    allowed = max(6 * torch.finfo(query.dtype).eps, 2e-6)
    failures = []
    # written so that NaN is wrong too
    if not (error := _error(refreshed, dense)) <= allowed:
        failures.append(f"a refresh is off SDPA by {error:.2e}, allowed {allowed:.2e}")
    for head in range(case.heads):
        own = slice(head, head + 1)
        stored = Packed(packed.values[:, own], None if packed.scale is None else packed.scale[:, own])
        wanted = residual.add(output[:, own].double(), stored)
        if not (error := _error(total[:, own], wanted)) <= allowed:
            failures.append(f"the addition of a residual in head {head} is off by {error:.2e}, allowed {allowed:.2e}")
    return failures


def _error(output: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the truth's norm; head after head, since copies in float64 of all are too large."""
    heads = zip(output.flatten(0, 1), truth.flatten(0, 1), strict=True)
    norms = torch.tensor([(float((a.double() - b.double()).norm()), float(b.double().norm())) for a, b in heads])
    return float(norms[:, 0].norm() / norms[:, 1].norm())
