"""The launch configurations that `tune` tries: at most a dozen a kernel, chosen from machine code and a few timings.

How: about 40 configurations were compiled for sm_80, sm_90 and sm_100 at head_dim 128 in bf16 with Triton 3.7.1, the
chosen ones with 3.6.0 too, and the inner loops were read (as `make bench-static` does). Left out is what

* reads spilled registers in more than one of 20 instructions of the loop,
* waits for every copy before it multiplies, where the same tile with a stage more does not (but two stages are what the
  compiler for AMD wants, and what fits into the shared memory of sm_86 and sm_120), or
* needs 1.7 times the instructions of the best for the same product, unless several programs of 4 warps share a
  multiprocessor.

On sm_90 also what was over 20 % slower than the fastest on an H200 at 119,056 tokens (Triton 3.6.0, TFLOP/s): attention
128x128 with TMA 468, without 453, 128x64 with 4 stages and TMA 429, 64x64 with TMA 416, 64x128 with TMA 345; scores at
stride 8 and 16 128x256x64 572 and 510 with 3 stages, 531 and 533 with 4, 128x128x64 446 and 365, 128x128x128 420 and
375. Tiles of 32 keys are for head_dim 256, those of 128 x 64 with 4 warps for 64.
"""

from __future__ import annotations

from xattn_video.ops.triton.launch_tables import OPTIONAL, LaunchConfig
from xattn_video_eval.tune.problems import ATTEND, HOPPER, KERNELS, SCORES

# float32 accumulators a thread may hold; with more the compiler spills.
MOST_ACCUMULATORS = 160

NAMES = {
    SCORES: ("BLOCK_R", "BLOCK_C", "BLOCK_K", "num_warps", "num_stages"),
    # TMA is left out of a configuration where it is 0.
    ATTEND: ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "TMA"),
    HOPPER: ("num_stages",),
}
# By kernel and device class. EVERY_OTHER multiplies out of registers, as sm_80 does.
EVERY_OTHER = "every other"
HALF_WIDTH: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = {
    SCORES: {
        EVERY_OTHER: (
            (128, 256, 64, 8, 3), (128, 256, 32, 8, 4), (128, 128, 128, 8, 3), (128, 128, 64, 8, 2),
            (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 32, 8, 4), (128, 128, 32, 4, 4),
            (64, 256, 64, 8, 3), (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (128, 64, 64, 4, 3),
        ),
        "sm_90": (
            (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 256, 32, 8, 4), (64, 256, 64, 4, 3),
        ),
        "sm_100": (
            (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 256, 32, 8, 4), (128, 128, 128, 8, 3),
            (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (128, 128, 32, 4, 4),
        ),
    },
    ATTEND: {
        EVERY_OTHER: (
            (128, 128, 8, 3, 0), (128, 64, 8, 2, 0), (128, 64, 8, 3, 0), (128, 64, 8, 4, 0), (128, 64, 4, 3, 0),
            (128, 32, 8, 3, 0), (128, 32, 4, 3, 0), (128, 32, 4, 4, 0), (64, 64, 4, 2, 0), (64, 64, 4, 3, 0),
            (64, 32, 4, 3, 0),
        ),
        "sm_90": (
            (128, 128, 8, 3, 0), (128, 128, 8, 3, 1), (128, 128, 8, 2, 1), (128, 64, 8, 3, 0), (128, 64, 8, 3, 1),
            (128, 64, 8, 4, 0), (128, 64, 8, 4, 1), (128, 64, 4, 3, 1), (64, 64, 4, 3, 0), (64, 64, 4, 3, 1),
            (128, 32, 8, 3, 1),
        ),
        "sm_100": (
            (128, 128, 8, 3, 1), (128, 128, 8, 2, 1), (128, 64, 8, 3, 0), (128, 64, 8, 3, 1), (128, 64, 8, 4, 0),
            (128, 64, 8, 4, 1), (128, 64, 4, 3, 1), (128, 32, 4, 3, 0), (64, 128, 4, 2, 1), (64, 64, 4, 3, 0),
            (64, 64, 4, 3, 1),
        ),
        "sm_120": (
            (128, 64, 8, 2, 0), (128, 64, 8, 2, 1), (128, 64, 8, 3, 0), (128, 64, 4, 2, 1), (128, 32, 8, 3, 0),
            (128, 32, 8, 3, 1), (128, 32, 4, 3, 0), (128, 32, 4, 3, 1), (64, 64, 4, 3, 0), (64, 64, 4, 3, 1),
            (64, 32, 4, 3, 0),
        ),
    },
    HOPPER: {EVERY_OTHER: ((2,), (3,))},
}  # fmt: skip
# float32 is multiplied without matrix units, in the same way by all devices: what spills no registers on sm_80.
FULL_WIDTH: dict[str, tuple[tuple[int, ...], ...]] = {
    SCORES: (
        (64, 64, 32, 8, 1), (64, 64, 32, 8, 2), (64, 64, 32, 4, 1), (64, 32, 32, 4, 1), (32, 64, 32, 4, 1),
        (32, 32, 32, 4, 1), (32, 32, 32, 4, 2),
    ),
    ATTEND: (
        (64, 16, 8, 1, 0), (32, 32, 8, 1, 0), (32, 32, 8, 2, 0), (32, 16, 8, 1, 0), (32, 16, 4, 1, 0),
        (32, 16, 4, 2, 0),
    ),
}  # fmt: skip


def candidates(kernel: str, bits: str, head_dim: int, own: LaunchConfig, device_class: str) -> list[LaunchConfig]:
    """Configurations worth a try, the package's own first, none twice.

    Args:
        kernel: `antidiagonal_scores`, `block_sparse` or `attention_hopper`.
        bits: `16-bit` or `32-bit`, the width of the inputs.
        head_dim: of the problem; tiles that cannot pay at it are left out.
        own: the package's for this problem. Names that only it has keep its value.
        device_class: as launch tables are named after it (`sm_90`).
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    lists = HALF_WIDTH[kernel]
    values = lists.get(device_class, lists[EVERY_OTHER]) if bits == "16-bit" else FULL_WIDTH[kernel]
    kept = {name: value for name, value in own.items() if name not in OPTIONAL.get(kernel, ())}
    found = [dict(own)]
    for listed in values:
        config = kept | {name: value for name, value in zip(NAMES[kernel], listed, strict=True) if value}
        # a step over the head dimension that is at most half full
        wide = kernel == SCORES and config["BLOCK_K"] > 32 and config["BLOCK_K"] >= 2 * head_dim
        if config not in found and not wide and accumulators(kernel, config, head_dim) <= MOST_ACCUMULATORS:
            found.append(config)
    return [*found]


def accumulators(kernel: str, config: LaunchConfig, head_dim: int) -> float:
    """float32 values a thread accumulates: a tile of logits and, where the kernel attends, one of outputs."""
    if kernel == HOPPER:
        # two consumers of 128 threads, each with 64 rows of a block of 128 keys
        return 64 * (128 + head_dim) / 128
    threads = 32 * config["num_warps"]
    if kernel == SCORES:
        return config["BLOCK_R"] * config["BLOCK_C"] / threads
    padded = 1 << (head_dim - 1).bit_length()
    return config["BLOCK_M"] * (config["BLOCK_N"] + padded) / threads
