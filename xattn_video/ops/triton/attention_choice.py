"""Which kernel attends over the kept blocks: the plain one, or the one for Hopper where a measurement says so.

The rule, in one place: a call that `hopper_refusal` has nothing against runs on the Hopper kernel if the launch table
of the device has an entry for it that was measured to be faster than the plain kernel. Everything else is plain. The
first time that a kernel runs for a reason, a line at level INFO says so, by the logger of this module.
"""

from __future__ import annotations

import functools
import logging

import torch
import triton
from torch import Tensor

from ..key_mask import KeyMask
from .descriptors import describable, heads_inside
from .launch_tables import find_optional_config

logger = logging.getLogger(__name__)

HOPPER, PLAIN = "hopper", "plain"
HOPPER_CAPABILITY = (9, 0)
HOPPER_HEAD_DIMS = (64, 128)
HOPPER_BLOCK_SIZE = 128
LEAST_TRITON = (3, 6)


def choose_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: KeyMask,
    *,
    block_size: int,
    force: str | None = None,
) -> str:
    """`HOPPER` or `PLAIN`, for the tensors and settings of `block_sparse_forward`.

    Args:
        force: `HOPPER` runs that kernel whatever the launch table says.

    Raises:
        ValueError: `HOPPER` is forced and cannot do the call.
    """
    refusal = hopper_refusal(query, key, value, mask, block_size=block_size)
    if force == HOPPER:
        if refusal is not None:
            raise ValueError(f"backend 'triton-hopper' cannot do this call: {refusal}; backend='triton' can")
        reason = "it was asked for by name"
    elif refusal is not None:
        reason = refusal
    else:
        entry = find_optional_config("attention_hopper", query.dtype, query.shape[3], query.device)
        percent = 0 if entry is None else entry["percent_of_plain"]
        if percent > 100:
            reason = f"measured at {percent} % of the plain kernel's speed"
        else:
            refusal = reason = "the launch table has no measurement in which the Hopper kernel is faster"
    kernel = HOPPER if refusal is None else PLAIN
    # What was got may differ from call to call, and each is said once.
    _say_once(kernel, str(query.dtype), query.shape[3], reason.partition(", got ")[0])
    return kernel


@functools.cache
def _say_once(kernel: str, dtype: str, head_dim: int, reason: str) -> None:
    logger.info("attention over kept blocks, %s, head_dim %d: the %s kernel (%s)", dtype, head_dim, kernel, reason)


def hopper_refusal(query: Tensor, key: Tensor, value: Tensor, mask: KeyMask, *, block_size: int) -> str | None:
    """Why the Hopper kernel cannot do a call, or None if it can. The arguments are those of `choose_kernel`."""
    refusal = hopper_device_refusal(query.device)
    if refusal is not None:
        return refusal
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {query.dtype}"
    if query.shape[3] not in HOPPER_HEAD_DIMS:
        return f"it takes head_dim 64 and 128, not {query.shape[3]}"
    if block_size != HOPPER_BLOCK_SIZE:
        return f"it takes block_size {HOPPER_BLOCK_SIZE}, not {block_size}"
    if mask.kv_start is not None:
        return "it does not take kv_start"
    if mask.causal:
        offset = key.shape[2] - query.shape[2]
        if mask.kv_lens is not None or offset < 0 or offset % block_size:
            return "causal calls need keys that are a multiple of block_size longer than the queries, without kv_lens"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        # one whose head dimension is not dense is copied first, and can then be described
        ordered = tensor.transpose(1, 2) if heads_inside(tensor) else tensor
        if 0 in tensor.shape or (tensor.stride(3) == 1 and not describable(ordered)):
            return (
                f"{name} must have strides that TMA can copy (falling, multiples of 16 bytes, none 0), got shape "
                f"{tuple(tensor.shape)} and strides {tensor.stride()}"
            )
    return None


def hopper_device_refusal(device: torch.device) -> str | None:
    """Why the Hopper kernel cannot run on this device, or None if it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "it needs an NVIDIA GPU of compute capability 9.0"
    capability = torch.cuda.get_device_capability(device)
    if capability != HOPPER_CAPABILITY:
        return f"it needs an NVIDIA GPU of compute capability 9.0, not {capability[0]}.{capability[1]}"
    if not triton_suffices():
        return f"it needs Triton 3.6 or newer, not {triton.__version__}"
    return None


def triton_suffices() -> bool:
    """Whether this Triton has the Gluon that the Hopper kernel is written in."""
    return tuple(map(int, triton.__version__.split(".")[:2])) >= LEAST_TRITON
