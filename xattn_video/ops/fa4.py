"""The `fa4` backend: attention over the kept blocks by the package flash-attn-4. Triton scores and selects.

flash-attn-4 (FlashAttention in NVIDIA's CuTe DSL) is a pre-release: `pip install 'xattn-video[fa4]'`. It is imported at
the first attention call, and compiles a kernel for each dtype, head dimension, block size, ratio of query heads to key
heads and kind of mask; such a call waits some seconds for that. On CUDA 13 `pip install 'flash-attn-4[cu13]'` is said
by its authors to be faster.

No machine of this project has run every kernel that it can compile. So the first call of a kind in a process first does
a small problem and compares the result with the reference; a wrong result raises, and nothing falls back to another
backend. That check waits for the GPU, so the first call must not happen while a CUDA graph is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .block_lists import mask_to_lists
from .key_mask import KeyMask, num_blocks
from .triton.launch import device_guard, positive_scale

Attend = Callable[..., tuple[Tensor, Tensor]]

DTYPES = (torch.float16, torch.bfloat16)
# Major compute capability -> block size -> largest head dimension. A 9.x kernel works on key tiles of exactly one
# block. A 10.x kernel gives each program two tiles of 128 queries with one list of keys, so a block is 256 there.
# Blocks of 128 could be computed in pairs, but the pair would see the blocks of both, which is another result.
LARGEST_HEAD_DIM = {9: {64: 256, 128: 128}, 10: {256: 128}}
_HEAD_DIM_STEP = 8


def check_supported(
    capability: int, dtype: torch.dtype, head_dim: int, block_size: int, kv_start: Tensor | None
) -> None:
    """Raise `ValueError` for what flash-attn-4 cannot compute exactly on a GPU of that major compute capability."""
    if dtype not in DTYPES:
        raise ValueError(
            f"query must be float16 or bfloat16 for the fa4 backend, got {str(dtype).removeprefix('torch.')}; "
            "use backend='triton'"
        )
    largest = LARGEST_HEAD_DIM[capability]
    if block_size not in largest:
        allowed = " or ".join(str(size) for size in largest)
        raise ValueError(
            f"block_size must be {allowed} for the fa4 backend on compute capability {capability}.x, got {block_size}; "
            "use backend='triton'"
        )
    if head_dim % _HEAD_DIM_STEP or head_dim > largest[block_size]:
        raise ValueError(
            f"head_dim must be a multiple of {_HEAD_DIM_STEP} and at most {largest[block_size]} for the fa4 backend "
            f"with block_size {block_size}, got {head_dim}; use backend='triton'"
        )
    if kv_start is not None:
        raise ValueError(
            "kv_start must be None for the fa4 backend, because flash-attn-4 can cut the keys only at their end, got a "
            "tensor; use backend='triton'"
        )


@torch.library.custom_op("xattn_video::fa4_attend", mutates_args=())
def block_sparse_forward(  # noqa: PLR0913 - torch takes neither a KeyMask nor a pair of lists
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    kv_start: Tensor | None,
    kv_lens: Tensor | None,
    *,
    causal: bool,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Exact softmax attention over the kept blocks (`reference.block_sparse_forward`).

    With `kv_lens` the values are copied once, because padding may hold NaN and the kernel multiplies it by 0.

    Args:
        query: `[B, Hq, Sq, D]`, float16 or bfloat16.
        key, value: `[B, Hkv, Sk, D]`.
        indices: int32 `[B, Hq, Nq, Nk]`, contiguous, ascending as far as counts says. The kernel masks what lies past
            the last key only in a row's last block.
        counts: int32 `[B, Hq, Nq]`, contiguous.
        kv_start: None.
        kv_lens, causal, block_size, scale: as in `block_sparse_attention`.

    Returns:
        output `[B, Hq, Sq, D]` in query's dtype, a view of a `[B, Sq, Hq, D]` tensor, and the natural log-sum-exp
        float32 `[B, Hq, Sq]`; a query that sees no key gets 0 and -inf.

    Raises:
        ValueError: a dtype, head dimension, block size or `kv_start` that flash-attn-4 cannot take on this GPU.
        RuntimeError: the installed flash-attn-4 computed the small problem wrong.
    """
    capability = torch.cuda.get_device_capability(query.device)[0]
    check_supported(capability, query.dtype, query.shape[3], block_size, kv_start)
    group = query.shape[1] // key.shape[1]
    with device_guard(query):
        check_once(Kind(query.device, query.dtype, query.shape[3], group, block_size, causal, kv_lens is not None))
        settings: dict[str, Any] = {"block_size": block_size, "causal": causal, "scale": scale, "kv_lens": kv_lens}
        return attend(query, key, value, indices, counts, **settings)


@block_sparse_forward.register_fake
def _(query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    batch, heads, q_len, head_dim = query.shape
    output = query.new_empty(batch, q_len, heads, head_dim).transpose(1, 2)
    return output, query.new_empty(batch, heads, q_len, dtype=torch.float32)


def attend(  # noqa: PLR0913 - what the operator hands on
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    block_size: int,
    causal: bool,
    scale: float,
    kv_lens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The call of flash-attn-4; arguments and results are those of `block_sparse_forward`, nothing is checked."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    query, scale = positive_scale(query, scale)
    arguments = call_arguments(query, key, value, causal=causal, scale=scale, kv_lens=kv_lens)
    lists = BlockSparseTensorsTorch(**list_arguments(indices, counts, block_size=block_size, causal=causal))
    function = flash_attn_func if kv_lens is None else flash_attn_varlen_func
    with torch.no_grad():
        output, lse = function(**arguments, block_sparse_tensors=lists)
    return output.transpose(1, 2), lse


def call_arguments(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float, kv_lens: Tensor | None
) -> dict[str, Any]:
    """The arguments of flash-attn-4 but for the lists; `[B, H, S, D]` enters as `[B, S, H, D]` without a copy."""
    arguments: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": causal,
        "return_lse": True,
        # Packed, the query heads of one key head would have to share one list.
        "pack_gqa": False,
    }
    if kv_lens is not None:
        # With more than there are, the kernel's mask for the last block would end past the last key.
        kv_lens = kv_lens.clamp(max=key.shape[2])
        arguments["seqused_k"] = kv_lens
        # A masked probability is 0, and 0 times whatever lies in the padding must be 0 too.
        padding = torch.arange(value.shape[2], device=value.device).view(-1, 1) >= kv_lens.view(-1, 1, 1, 1)
        value = value.masked_fill(padding, 0)
    names = ("q", "k", "v")
    arguments |= {name: part.transpose(1, 2) for name, part in zip(names, (query, key, value), strict=True)}
    return arguments


def list_arguments(indices: Tensor, counts: Tensor, *, block_size: int, causal: bool) -> dict[str, Any]:
    """The fields of flash-attn-4's lists of blocks.

    It has two lists for each row. In the blocks of the full one tokens are masked only past the last key, in those of
    the masked one also above the diagonal.
    """
    used, unused = ("mask", "full") if causal else ("full", "mask")
    # Both lists must be there; an empty one for each row, expanded over batch and heads, will do.
    empty = counts.new_zeros(1, 1, counts.shape[2])
    return {
        f"{used}_block_cnt": counts,
        f"{used}_block_idx": indices,
        f"{unused}_block_cnt": empty,
        f"{unused}_block_idx": empty.unsqueeze(-1),
        "block_size": (block_size, block_size),
    }


class Kind(NamedTuple):
    """What calls that run one compiled kernel have in common; `group` is query heads for each key head."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    group: int
    block_size: int
    causal: bool
    padded: bool


_CHECKED: set[Kind] = set()


def check_once(kind: Kind) -> None:
    """`check_small_problem` of `attend`, the first time that this process asks for the kind."""
    if kind not in _CHECKED:
        check_small_problem(attend, kind)
        _CHECKED.add(kind)


def check_small_problem(compute: Attend, kind: Kind) -> None:
    """Run a small problem and compare it with the reference in float64; waits for the device.

    Two batch items, two key heads, lengths that are no multiples of a block, a diagonal that crosses the corners of no
    block, and rows without a kept block.

    Args:
        compute: a function with the arguments of `attend`.
        kind: device, dtype and shapes of the problem.

    Raises:
        RuntimeError: a row of the output or its log-sum-exp is wrong.
    """
    block_size, device = kind.block_size, kind.device
    # The last block of keys holds less than half a block: where the kernel halves it, the second half is empty.
    q_len, kv_len = 2 * block_size + block_size // 4 + 5, 3 * block_size + block_size // 4 + 3
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int, heads: int) -> Tensor:
        made = torch.randn(2, length, heads, kind.head_dim, generator=generator)
        return made.to(device=device, dtype=kind.dtype).transpose(1, 2)

    query, key, value = tokens(q_len, 2 * kind.group), tokens(kv_len, 2), tokens(kv_len, 2)
    kv_lens = None
    if kind.padded:
        kv_lens = torch.tensor([kv_len, 2 * block_size - 7], dtype=torch.int32, device=device)
        for part in (key, value):
            part[1, :, 2 * block_size - 7 :] = torch.nan
    mask = KeyMask(kind.causal, None, kv_lens)
    blocks = num_blocks(q_len, block_size), num_blocks(kv_len, block_size)
    block_mask = (torch.rand(2, 2 * kind.group, *blocks, generator=generator) < 0.6).to(device)
    block_mask[0, 0, 0] = False
    block_mask[0, 1] = True
    block_mask &= mask.valid_blocks(2, q_len, kv_len, block_size=block_size, device=device)

    scale = kind.head_dim**-0.5
    settings: dict[str, Any] = {"block_size": block_size, "scale": scale, "causal": kind.causal, "kv_lens": kv_lens}
    output, lse = compute(query, key, value, *mask_to_lists(block_mask), **settings)
    truth, truth_lse = reference.block_sparse_forward(
        query.double(), key.double(), value.double(), block_mask, kv_start=None, **settings
    )

    error = (output.double() - truth).norm(dim=-1)
    allowed = 4 * torch.finfo(kind.dtype).eps * truth.norm(dim=-1)
    # Not `error > allowed`, which a NaN would pass.
    wrong = ~(error <= allowed) | ~((lse == truth_lse) | ((lse - truth_lse).abs() <= 1e-3))
    if bool(wrong.any()):
        raise RuntimeError(
            f"the installed flash-attn-4 computes attention wrong here ({_description(kind)}): {int(wrong.sum())} of "
            f"{wrong.numel()} rows differ from the reference; use backend='triton'"
        )


def _description(kind: Kind) -> str:
    return ", ".join(f"{name} {value}" for name, value in kind._asdict().items())
