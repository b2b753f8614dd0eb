"""Steps for test_first_gpu.py, which the runner imports in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from xattn_video_eval.first_gpu.look import Look


def good(look: Look) -> None:
    look.row(name="measured", value=1.5)


def broken(look: Look) -> None:
    look.row(name="before", value=1.0)
    raise ValueError("the kernel is not what it was")


def crashing(look: Look) -> None:
    look.row(name="before", value=float("nan"))
    os.abort()


def hanging(look: Look) -> None:
    """Measures something, starts a process that it leaves alone, and never ends."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    look.row(name="child", process=child.pid)
    time.sleep(600)
