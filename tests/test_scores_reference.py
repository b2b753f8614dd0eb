"""The reference scores against the paper's formula, one tile at a time, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from xattn_video import score_blocks


def scores_by_loops(query, key, stride, block_size, causal, kv_start, kv_lens):
    batch, heads, q_len, head_dim = query.shape
    kv_len = key.shape[2]
    repeats = heads // key.shape[1]
    q_groups, k_groups = math.ceil(q_len / stride), math.ceil(kv_len / stride)
    scores = torch.zeros(
        batch, heads, math.ceil(q_len / block_size), math.ceil(kv_len / block_size), dtype=torch.float64
    )
    for b in range(batch):
        start = kv_start[b] if kv_start else 0
        stop = kv_lens[b] if kv_lens else kv_len
        offset = stop - q_len

        def sees(i, j, start=start, stop=stop, offset=offset):
            return 0 <= i < q_len and start <= j < stop and (not causal or j <= i + offset)

        real_query = [any(sees(i, j) for j in range(kv_len)) for i in range(q_len)]
        for h in range(heads):
            for r in range(q_groups):
                if not any(real_query[r * stride : (r + 1) * stride]):
                    continue
                logits = {}
                for c in range(k_groups):
                    holds_key = any(start <= j < stop for j in range(c * stride, (c + 1) * stride))
                    if not holds_key or (causal and c * stride > offset + r * stride + stride - 1):
                        continue
                    total = 0.0
                    for i in range(stride):
                        qi, ki = r * stride + stride - 1 - i, c * stride + i
                        if qi < q_len and real_query[qi] and start <= ki < stop:
                            total += float(query[b, h, qi] @ key[b, h // repeats, ki])
                    logits[c] = total / (math.sqrt(head_dim) * stride)
                top = max(logits.values())
                norm = sum(math.exp(x - top) for x in logits.values())
                for c, x in logits.items():
                    scores[b, h, r * stride // block_size, c * stride // block_size] += math.exp(x - top) / norm
    return scores


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "kv_start", "kv_lens"),
    [
        (64, 64, None, None),
        (53, 53, None, None),
        (37, 70, None, None),
        (53, 53, [0, 21], [53, 53]),
        (53, 53, None, [53, 30]),
        (30, 61, [3, 40], [61, 47]),
    ],
)
def test_reference_follows_the_formula(causal, q_len, kv_len, kv_start, kv_lens):
    generator = torch.Generator().manual_seed(q_len + kv_len)
    query = 3 * torch.randn(2, 2, q_len, 6, dtype=torch.float64, generator=generator)
    key = torch.randn(2, 1, kv_len, 6, dtype=torch.float64, generator=generator)
    got = score_blocks(
        query,
        key,
        stride=4,
        block_size=16,
        causal=causal,
        kv_start=None if kv_start is None else torch.tensor(kv_start),
        kv_lens=None if kv_lens is None else torch.tensor(kv_lens),
        backend="reference",
    )
    torch.testing.assert_close(got, scores_by_loops(query, key, 4, 16, causal, kv_start, kv_lens))


def test_stride_one_is_the_exact_block_mass():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 64, 16, dtype=torch.float64, generator=generator) for _ in range(2))
    exact = torch.softmax(query @ key.transpose(-1, -2) / 4, dim=-1)
    exact = exact.unflatten(2, (4, 16)).sum(3).unflatten(3, (4, 16)).sum(4)
    torch.testing.assert_close(score_blocks(query, key, stride=1, block_size=16, backend="reference"), exact)
