"""Runs the steps of the first look one after the other, each in a process of its own that ends at its limit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xattn_video_eval.first_gpu.look import ROWS, Look
from xattn_video_pipelines.common import jsonl

ROOT = Path(__file__).resolve().parents[2]
# A step that has less time than this would only import torch.
LEAST_SECONDS = 10
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Step:
    """One part of the first look.

    Attributes:
        name: what its rows and its log file are called.
        limit: seconds after which its process is killed.
        function: what it does, importable by its module and name.
        launches: whether it launches Triton kernels; a rehearsal then runs it in Triton's interpreter.
    """

    name: str
    limit: float
    function: Callable[[Look], None]
    launches: bool = False


Show = Callable[[dict[str, Any]], None]


def run_steps(
    steps: Sequence[Step],
    out: Path,
    *,
    seconds: float,
    rehearse: bool,
    no_interpreter: str | None = None,
    show: Show = lambda row: None,
) -> list[dict[str, Any]]:
    """Run every step, whatever becomes of the ones before it.

    Args:
        steps: in this order.
        out: the folder for `rows.jsonl` and a log file a step; it exists.
        seconds: for all steps together; the last ones get what is left.
        rehearse: see `Look`.
        no_interpreter: why Triton's interpreter cannot run here, or None; steps that need it are then skipped.
        show: called with each row as it comes.

    Returns:
        The rows of this run. The last row of a step says how it ended: `done`, or `failed` with its reason and log.
    """
    deadline = time.monotonic() + seconds
    log = jsonl.Follower(out / ROWS)
    rows: list[jsonl.Row] = []

    def show_new() -> None:
        for row in log.new():
            rows.append(row)
            show(row)

    for step in steps:
        limit = min(step.limit, deadline - time.monotonic())
        look = Look(step.name, out, limit, rehearse)
        if limit < min(step.limit, LEAST_SECONDS):
            look.row(end="failed", reason=f"only {max(limit, 0):.0f} s were left", seconds=0.0, log=None)
        elif rehearse and step.launches and no_interpreter is not None:
            look.skip("kernels in the interpreter", no_interpreter)
            look.row(end="done", seconds=0.0)
        else:
            began = time.monotonic()
            reason = _run(step, look, show_new)
            spent = round(time.monotonic() - began, 1)
            if reason is None:
                look.row(end="done", seconds=spent)
            else:
                look.row(end="failed", reason=reason, seconds=spent, log=_log(look).name)
        show_new()
    return rows


def _log(look: Look) -> Path:
    return look.out / f"{look.step}.log"


def _run(step: Step, look: Look, between: Callable[[], None]) -> str | None:
    """Run one step in a process of its own; why it failed, or None. `between` is called while it runs."""
    function = f"{step.function.__module__}:{step.function.__qualname__}"
    given = json.dumps({"step": look.step, "out": str(look.out), "seconds": look.seconds, "rehearse": look.rehearse})
    command = [sys.executable, "-m", "xattn_video_eval.first_gpu.child", function, given]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    if look.rehearse and step.launches:
        environment["TRITON_INTERPRET"] = "1"
    end = time.monotonic() + look.seconds
    with _log(look).open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
    try:
        while process.poll() is None:
            if time.monotonic() > end:
                return f"not finished within {look.seconds:.0f} s"
            time.sleep(POLL_SECONDS)
            between()
    finally:
        # also what the step started itself: compilers, test workers
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # a process that the driver holds in the kernel may take its time to go
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
    return None if process.returncode == 0 else _reason(process.returncode, _log(look))


def _reason(code: int, log: Path) -> str:
    """What an exit code and the last line of the log say."""
    ended = f"exit code {code}" if code > 0 else signal.Signals(-code).name
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"{ended}: {lines[-1].strip()[:200]}" if lines else ended
