"""What a packed residual is held to, in plain torch and by the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from xattn_video.ops.residual import Packed, unpack


def check_stored(packed: Packed, kind: str, exact: Tensor, dtype: torch.dtype) -> None:
    """Types, sizes and scales, and each value within half a step of the exact residual `[B, H, S, D]` in float64.

    `dtype` is that of the attention's output.
    """
    head_dim, values = exact.shape[-1], packed.values
    # what float32 adds to a value
    rounding = 1e-6 * exact.abs().amax()
    if kind == "full":
        assert (values.dtype, values.shape, packed.scale) == (dtype, exact.shape, None)
        assert packed.nbytes == values.nbytes
        allowed = exact.abs() * torch.finfo(dtype).eps
    else:
        assert packed.scale is not None
        assert (packed.scale.dtype, packed.scale.shape) == (torch.float32, exact.shape[:-1])
        assert packed.nbytes == values.nbytes + 4 * packed.scale.numel()
        most = 7 if kind == "int4" else 448
        torch.testing.assert_close(packed.scale.double(), exact.abs().amax(-1) / most, rtol=1e-4, atol=0)
        scale = packed.scale.double().unsqueeze(-1)
        if kind == "int4":
            assert (values.dtype, values.shape) == (torch.uint8, (*exact.shape[:-1], (head_dim + 1) // 2))
            allowed = scale * 0.5001
        else:
            assert (values.dtype, values.shape) == (torch.float8_e4m3fn, exact.shape)
            # three bits behind the point, or below the smallest normal number a step of 2^-9
            allowed = torch.maximum(exact.abs() * 2**-4, scale * 2**-10) * 1.0001
    assert ((unpack(packed, head_dim, torch.float64) - exact).abs() <= allowed + rounding).all()


def exact_residual(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """In float64; 0 where the complement is empty."""
    share = torch.sigmoid(other_lse.double() - lse.double()).nan_to_num(0).unsqueeze(-1)
    return share * (other.double() - output.double())
