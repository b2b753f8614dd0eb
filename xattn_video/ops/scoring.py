"""Stage one: how much attention mass does each block hold, judged by its antidiagonals."""

from __future__ import annotations

from torch import Tensor

from ..config import check_geometry
from .autocast import without_autocast
from .backends import resolve
from .checks import check_key_bounds, check_query_key, default_scale


def score_blocks(
    query: Tensor,
    key: Tensor,
    *,
    stride: int = 8,
    block_size: int = 128,
    causal: bool = False,
    scale: float | None = None,
    kv_start: Tensor | None = None,
    kv_lens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Estimate the attention mass of every block (the paper's section 2.1).

    The logit of a pair of token groups is `scale / stride` times the sum of query-key products over the
    antidiagonal of their `stride x stride` tile; a softmax over key groups follows, and its entries are summed
    over each block. Costs `1 / (2 * stride)` of dense attention's floating point operations.

    Args:
        query: `[B, Hq, Sq, D]`, floating point.
        key: `[B, Hkv, Sk, D]`; `Hq % Hkv == 0`, query head h uses key head `h // (Hq / Hkv)`.
        stride: side of the tiles, a power of two that divides block_size.
        block_size: side of the blocks in tokens, a power of two.
        causal: query i of item b sees keys up to `i + kv_lens[b] - Sq`.
        scale: factor on the products; None is `1 / sqrt(D)`.
        kv_start, kv_lens: integer `[B]`, the range of valid keys; None is 0 and Sk.
        backend: `auto`, `triton`, `triton-hopper`, `cpu`, `flex`, `fa4` or `reference`.

    Returns:
        float32 `[B, Hq, Nq, Nk]` (float64 from `reference` for float64 inputs). A row sums to the number of
        groups in it that hold a query which sees a key: `block_size / stride` for a full row.

    Raises:
        ValueError: shapes or settings that do not go together, or a backend that cannot run here.
    """
    check_query_key(query, key)
    check_geometry(stride, block_size)
    kv_start, kv_lens = check_key_bounds(kv_start, kv_lens, query.shape[0], key.shape[2], query.device)
    with without_autocast(query.device):
        return resolve(backend, query.device, query.dtype).antidiagonal_scores(
            query,
            key,
            stride=stride,
            block_size=block_size,
            causal=causal,
            scale=default_scale(scale, query.shape[3]),
            kv_start=kv_start,
            kv_lens=kv_lens,
        )
