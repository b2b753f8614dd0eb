"""The tensors of the timed call, made on the device: random, in the memory layout that diffusers' models have."""

from __future__ import annotations

import torch
from torch import Tensor

from xattn_video.ops.key_mask import num_blocks
from xattn_video_eval.bench import DTYPES, Problem
from xattn_video_eval.first_gpu.kernels import BLOCK_SIZE
from xattn_video_eval.first_gpu.look import Look
from xattn_video_eval.first_gpu.plan import Call

# Share of the blocks that attention is timed over.
DENSITY = 0.35


def timed_problem(look: Look) -> Problem:
    """Query, key and value of the timed call with a random block mask of that density and a full diagonal."""
    call, generator = look.timed, torch.Generator(look.device).manual_seed(0)
    query, key, value = normal_inputs(call, generator)
    blocks = num_blocks(call.tokens, BLOCK_SIZE)
    mask = torch.rand(1, call.heads[0], blocks, blocks, device=look.device, generator=generator) < DENSITY
    mask |= torch.eye(blocks, dtype=torch.bool, device=look.device)
    return Problem(query, key, value, False, mask, BLOCK_SIZE)


def normal_inputs(call: Call, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal query, key and value [B, H, S, D] whose memory is [B, S, H, D], on the generator's device."""

    def normal(heads: int) -> Tensor:
        shape = (call.batch, call.tokens, heads, call.head_dim)
        values = torch.empty(shape, dtype=DTYPES[call.dtype], device=generator.device)
        return values.normal_(generator=generator).transpose(1, 2)

    heads, kv_heads = call.heads
    return normal(heads), normal(kv_heads), normal(kv_heads)


def dense_flop(look: Look) -> float:
    """Floating-point operations of dense attention: two products of all pairs."""
    call = look.timed
    return 4.0 * call.heads[0] * call.tokens**2 * call.head_dim
