"""The attention calls that the kernels are checked on: small ones anywhere, sizes of real calls on a GPU."""

from __future__ import annotations

import torch

from tests.kernel_checks import Problem

FP16, BF16 = torch.float16, torch.bfloat16

SMALL = [
    Problem(lengths=(203, 331), heads=(4, 2), batch=2, head_dim=40, dtype=FP16, causal=True, kv_lens=(331, 290)),
    Problem(lengths=(130, 77), head_dim=72, causal=True, batch=2, kv_start=(3, 10), kv_lens=(60, 77)),
    Problem(lengths=(77, 205), head_dim=80, batch=2, kv_start=(0, 70), kv_lens=(205, 90), dtype=BF16, layout="bshd"),
    Problem(lengths=(100, 100), head_dim=96, heads=(3, 1), layout="slice", causal=True),
    Problem(lengths=(65, 96), head_dim=112, layout="bhds", dtype=FP16),
    Problem(lengths=(150, 150), content="video", dtype=BF16, block_size=64, causal=True, kv_start=(37,)),
    Problem(lengths=(9, 200), causal=True, head_dim=64, content="video", dtype=FP16, kv_lens=(180,)),
    Problem(lengths=(64, 64), batch=2, kv_lens=(0, 64), head_dim=33),
]

# large logits too: the power of two that keeps the sums finite joins them in the exponent
HUGE = [
    Problem(lengths=(70, 420), heads=(2, 1), content="huge", dtype=dtype, kv_lens=(400,), scale=scale)
    for dtype in (torch.float32, BF16)
    for scale in (None, 30.0)
]

# small tiles: several a strip, whole ones and cut ones, and the last one beyond the last key block
TILES = {"BLOCK_R": 16, "BLOCK_C": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
WIDE_TILES = {**TILES, "BLOCK_R": 64, "BLOCK_C": 32}
STRIPS = [
    Problem(lengths=(420, 1100), heads=(2, 1), head_dim=16, block_size=16),
    Problem(lengths=(420, 700), heads=(2, 1), head_dim=24, causal=True, content="video", dtype=FP16),
    Problem(lengths=(500, 430), batch=2, causal=True, kv_start=(0, 150), kv_lens=(430, 380), block_size=64, dtype=BF16),
    Problem(lengths=(270, 530), batch=2, head_dim=16, stride=4, block_size=64, kv_start=(140, 6), kv_lens=(400, 6)),
    Problem(lengths=(600, 600), head_dim=16, stride=16, block_size=128, causal=True, content="video"),
    Problem(lengths=(600, 600), head_dim=16, block_size=64, causal=True, scale=-0.2),
]


def gpu_problems():
    """Sizes of real calls, cut to what float64 on one device can judge."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for head_dim in (40, 64, 80, 128, 256):
            yield Problem(heads=(2, 2), lengths=(2085, 2085), head_dim=head_dim, block_size=128, dtype=dtype)
        yield Problem(heads=(4, 2), lengths=(1000, 4097), head_dim=128, block_size=128, causal=True, dtype=dtype)
        yield Problem(
            batch=2,
            lengths=(3003, 3100),
            head_dim=64,
            block_size=64,
            stride=16,
            causal=True,
            kv_start=(100, 0),
            kv_lens=(3100, 2900),
            dtype=dtype,
            layout="bshd",
        )
        yield Problem(heads=(4, 4), lengths=(4096, 4096), head_dim=128, block_size=128, dtype=dtype, content="video")
    # long enough for tiles that no mask cuts, also the large ones of some GPUs
    yield Problem(heads=(2, 1), lengths=(8300, 8300), head_dim=128, block_size=128, causal=True, dtype=BF16)
    yield Problem(heads=(1, 1), lengths=(17_000, 17_000), head_dim=128, block_size=128, stride=32, dtype=BF16)
    for stride in (4, 16, 32):
        yield Problem(lengths=(4100, 4100), head_dim=128, block_size=128, stride=stride, dtype=torch.bfloat16)
    for scale in (-0.1, 0.0, 10.0):
        yield Problem(lengths=(2085, 2085), head_dim=64, block_size=128, causal=True, dtype=torch.bfloat16, scale=scale)
