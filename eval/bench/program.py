"""The program `xattn-video bench`: what its `--help` says, without torch, and the call of its command."""

from __future__ import annotations

import contextlib
from json import dumps

from xattn_video_eval.bench.settings import BenchSettings
from xattn_video_pipelines.common.program import for_people
from xattn_video_pipelines.common.settings import Json

EXAMPLE = """\
example:
  xattn-video bench
  xattn-video bench --tokens 8192 16384 --head-dim 128 --dtype bfloat16
  xattn-video bench --inputs demo
  xattn-video bench --full --record --plot plots
  xattn-video bench --device cuda --goals --rounds 3 --out goals-out
  xattn-video bench --model Qwen/Qwen3-8B --tokens 16384 65536

a row is timed only if its results are right; a kernel that is missing, raises or is wrong is listed with the reason.
effective TFLOP/s: dense 4*heads*tokens^2*head_dim operations (half if causal), score 1/(2*stride) of it,
attend density of it, total the sum of both.
"""


def command(settings: BenchSettings, *, json: Json = False) -> int:
    """`xattn-video bench`; returns 0, or 1 where something is wrong or nothing was timed. Raises UserError."""
    from xattn_video_eval.bench.command import bench

    with contextlib.redirect_stdout(for_people(json)):
        report = bench(settings)
    if json:
        print(dumps(report))
    return 0 if report["ok"] else 1
