"""A first look at an H100 or H200: what this package does there, in at most eight minutes.

    ident -> compile -> small -> hopper -> dense, attend-hopper, attend-plain, scores, whole, residual -> tests
    -> verdict

Each step is a process of its own with a limit of its own, the most telling ones first, so a step that fails or hangs
costs its own time alone. Every result is a row in `rows.jsonl` as soon as it is there. It needs torch, triton, pytest
and pytest-xdist, and nothing of diffusers; the project need not be installed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from xattn_video.ops.triton.launch_tables import device_class
from xattn_video_eval.first_gpu.checking import hopper
from xattn_video_eval.first_gpu.compiling import compile_all
from xattn_video_eval.first_gpu.ident import ident
from xattn_video_eval.first_gpu.look import ROWS
from xattn_video_eval.first_gpu.plan import TARGET
from xattn_video_eval.first_gpu.runner import Step, run_steps
from xattn_video_eval.first_gpu.testing import all_tests, small
from xattn_video_eval.first_gpu.times import attend_hopper, attend_plain, dense, residual, scores, whole
from xattn_video_eval.first_gpu.verdict import all_well, summary
from xattn_video_eval.results import RESULTS, append_rows
from xattn_video_pipelines.common.environment import device_name
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import make_writable
from xattn_video_pipelines.common.program import Parser, run_program
from xattn_video_pipelines.common.settings import Settings

LEDGER = RESULTS / "first_gpu.jsonl"
# For all steps together.
SECONDS = 480
# The limits are for a GPU machine with many cores; a rehearsal gets so many times more.
PATIENCE = 4
STEPS = (
    Step("ident", 40, ident),
    Step("compile", 90, compile_all),
    Step("small", 60, small, launches=True),
    Step("hopper", 45, hopper, launches=True),
    Step("dense", 40, dense),
    Step("attend-hopper", 40, attend_hopper, launches=True),
    Step("attend-plain", 45, attend_plain, launches=True),
    Step("scores", 45, scores, launches=True),
    Step("whole", 60, whole, launches=True),
    Step("residual", 40, residual, launches=True),
    Step("tests", SECONDS, all_tests),
)
# What every row says of its origin, which the screen need not repeat.
SOURCE = ("rehearsal", "device", "versions", "commit", "time")
EXAMPLE = """\
examples:
  python3 -m xattn_video_eval.first_gpu --out first-gpu-out
  python3 -m xattn_video_eval.first_gpu --rehearse --out rehearsal-out

The folder gets rows.jsonl, one JSON line a result, and a log of each step. A second run appends to the rows.
Exit code 0: every step ended and no result is wrong, whether or not it reached its goal; 1: something failed; 2: bad
input.
"""


@dataclass(frozen=True, kw_only=True)
class FirstGpuSettings(Settings):
    """Where rows and logs go. A rehearsal tries the code without a GPU, and measures nothing."""

    out: Path
    record: bool = False
    rehearse: bool = False

    def check(self) -> None:
        if self.rehearse and self.record:
            raise UserError("--record does not go with --rehearse, which measures nothing")


def main(argv: Sequence[str] | None = None) -> int:
    """Run as a program; the exit code, as EXAMPLE says."""
    # A GPU machine has torch and triton, and not the library that makes options from settings.
    parser = Parser(prog="python -m xattn_video_eval.first_gpu", description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for rows and logs")
    parser.add_argument("--record", action="store_true", help="also append the rows to eval/results/first_gpu.jsonl")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="no GPU: run every step at a tiny size, compile for sm_90 what the interpreter cannot run",
    )
    return run_program(parser, lambda given: first_gpu(FirstGpuSettings(**vars(given))), argv)


def first_gpu(settings: FirstGpuSettings) -> int:
    """Run the steps, printing each row as it comes; 0 if all is well, else 1. Raises UserError."""
    if not settings.rehearse:
        _check_gpu()
    make_writable(settings.out)
    patience = PATIENCE if settings.rehearse else 1
    rows = run_steps(
        [replace(step, limit=patience * step.limit) for step in STEPS],
        settings.out.resolve(),
        seconds=patience * SECONDS,
        rehearse=settings.rehearse,
        no_interpreter=interpreter_trouble(*(metadata.version(package) for package in ("triton", "numpy"))),
        show=lambda row: print(format_row(row), flush=True),
    )
    if settings.record:
        append_rows(LEDGER, rows)
    print(f"wrote {settings.out / ROWS}")
    if settings.rehearse:
        print("not tried here:")
        for row in rows:
            if "skipped" in row:
                print(f"  {row['step']}: {row['name']}: {row['skipped']}")
    print(("rehearsal, which measures nothing: " if settings.rehearse else "") + summary(rows))
    return 0 if all_well(rows) else 1


def _check_gpu() -> None:
    """Raise UserError unless this is a machine that the plan is made for."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("unset TRITON_INTERPRET: interpreted kernels cannot be timed")
    if not torch.cuda.is_available():
        raise UserError("torch sees no GPU here; --rehearse tries the code without one")
    device = torch.device("cuda")
    if device_class(device) != TARGET:
        raise UserError(
            f"the first look is made for an H100 or H200 ({TARGET}), and this is {device_name(device)} "
            f"({device_class(device)}); xattn-video bench --goals measures other GPUs"
        )


def interpreter_trouble(triton: str, numpy: str) -> str | None:
    """Why Triton's interpreter cannot run with these versions, or None."""
    if _release(triton) < (3, 7) and _release(numpy) >= (2, 4):
        return f"Triton {triton}'s interpreter does not work with NumPy {numpy}; it does with NumPy below 2.4"
    return None


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def format_row(row: dict[str, Any]) -> str:
    """One row for the screen: the step, then its values without what all rows share."""
    values = [f"{name} {_short(value)}" for name, value in row.items() if name != "step" and name not in SOURCE]
    return f"{row['step']:14}" + ", ".join(values)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
