"""Peak memory of a CPU process: it can be begun anew, and sees what is taken after that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from xattn_video_pipelines.common.memory import peak_bytes, reset_peak

CPU = torch.device("cpu")
SIZE = 400 * 2**20


def test_the_peak_begins_anew_and_sees_what_is_taken_then() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not let the peak of a process be reset")
    taken = np.ones(SIZE // 8)
    high = peak_bytes(CPU)
    del taken
    reset_peak(CPU)
    low = peak_bytes(CPU)
    assert high is not None
    assert low is not None
    assert low < high - SIZE * 0.9
    taken = np.ones(SIZE // 8)
    del taken
    again = peak_bytes(CPU)
    assert again is not None
    assert low + SIZE * 0.9 < again < high + SIZE // 2
