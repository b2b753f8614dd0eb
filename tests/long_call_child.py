"""One very long call of `xattention` on the CPU path, in a process of its own: the peak of its memory, and its result.

    python -m tests.long_call_child FRAMES HEIGHT WIDTH

Prints one line of JSON:

* `seconds` of the call;
* `extra_mib`: the peak of the process's resident memory in the call, less what was resident before, less the output;
* `density`;
* `errors`: the relative errors of some query blocks against float64.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from xattn_video import XAttnConfig, xattention
from xattn_video.ops import reference
from xattn_video.ops.key_mask import KeyMask, num_blocks
from xattn_video.testing.synthetic import video_like_qkv
from xattn_video_pipelines.common.memory import peak_bytes, reset_peak

CPU = torch.device("cpu")
HEAD_DIM = 32
CONFIG = XAttnConfig(stride=16, threshold=0.9, backend="cpu")
# queries of a first call, in which libraries compile and keep what they need for these sizes
WARM_UP = 16_384


def resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def exact_block(query: Tensor, key: Tensor, value: Tensor, row: int) -> Tensor:
    """The output of one query block `[P, D]` in float64, from scores and a selection in float64."""
    size, tokens = CONFIG.block_size, key.shape[2]
    begin = row * size
    rows = query[:, :, begin : begin + size].double()
    mask, scale = KeyMask(), HEAD_DIM**-0.5
    settings = {"stride": CONFIG.stride, "block_size": size, "scale": scale, **mask.keywords}
    scores = reference.antidiagonal_scores(rows, key.double(), **settings)
    valid, forced = mask.valid_and_forced_blocks(1, rows.shape[2], tokens, block_size=size, device=CPU)
    kept = reference.select(scores, valid, forced, threshold=CONFIG.threshold)[0, 0, 0].nonzero()[:, 0]
    chosen = (kept[:, None] * size + torch.arange(size)).flatten()
    keys, values = (part[0, 0, chosen[chosen < tokens]].double() for part in (key, value))
    return torch.softmax(rows[0, 0] @ keys.t() * scale, dim=-1) @ values


def main(frames: int, height: int, width: int) -> None:
    query, key, value = video_like_qkv(1, 1, frames, height, width, HEAD_DIM, locality=1.0)
    xattention(query[:, :, :WARM_UP], key, value, CONFIG)
    gc.collect()
    reset_peak(CPU)
    before, begin = resident_bytes(), time.perf_counter()
    output, stats = xattention(query, key, value, CONFIG, return_stats=True)
    seconds, peak = time.perf_counter() - begin, peak_bytes(CPU)
    assert peak is not None
    extra = peak - before - output.numel() * output.element_size()
    last = num_blocks(query.shape[2], CONFIG.block_size) - 1
    errors = []
    for row in (0, last // 3, last // 2, last - 1, last):
        exact = exact_block(query, key, value, row)
        got = output[0, 0, row * CONFIG.block_size :][: exact.shape[0]].double()
        errors.append(((got - exact).norm() / exact.norm()).item())
    result = {"seconds": seconds, "extra_mib": extra / 2**20, "density": stats.density, "errors": errors}
    print(json.dumps(result))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
