"""The step `ident`: which machine this is, and the most that its memory and its matrix units give."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import torch

from xattn_video_eval.bench import median_seconds
from xattn_video_eval.first_gpu.look import Look

# Bytes copied, and the side of the multiplied matrices: on a GPU, and in a rehearsal.
COPIED_BYTES = (1 << 30, 1 << 20)
MATRIX_SIDE = (8192, 64)


def ident(look: Look) -> None:
    """A row with the driver's figures, the copy bandwidth in TB/s (read and written) and a bf16 product in TFLOP/s."""
    size, side = COPIED_BYTES[look.rehearse], MATRIX_SIDE[look.rehearse]
    source = torch.zeros(size, dtype=torch.uint8, device=look.device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=look.device, dtype=torch.bfloat16) for _ in range(2))
    copy, product = (_seconds(look, function) for function in (lambda: target.copy_(source), lambda: left @ right))
    look.row(
        name="machine",
        driver=_driver(),
        cuda=torch.version.cuda,
        memory_gib=None if look.rehearse else torch.cuda.get_device_properties(look.device).total_memory / 2**30,
        copy_tbs=2 * size / copy / 1e12,
        matmul_tflops=2 * side**3 / product / 1e12,
    )
    if look.rehearse:
        look.skip("driver, clock and power limit", "nvidia-smi is asked on a GPU machine")


def _seconds(look: Look, function: Callable[[], object]) -> float:
    function()
    return median_seconds(function, look.device, look.rounds)


def _driver() -> str | None:
    """Driver version, highest clock and power limit as nvidia-smi says them; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
