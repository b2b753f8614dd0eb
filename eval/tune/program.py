"""The program `xattn-video tune`: what its `--help` says, without torch, and the call of its command."""

from __future__ import annotations

import contextlib
from json import dumps

from xattn_video_eval.tune.settings import TuneSettings
from xattn_video_pipelines.common.program import for_people
from xattn_video_pipelines.common.settings import Json

EXAMPLE = """\
example:
  xattn-video tune
  xattn-video tune --head-dim 64 128 --dtype bfloat16 float16 --tokens 75600 --heads 8

needs a GPU. The table is <device class>.json (sm_90.json, gfx942.json) in $XATTN_VIDEO_CONFIG_DIR, or
else in xattn-video/launch_configs in the user's cache (~/.cache), written after each kernel and size; all kernels at
one size take 2 to 4 minutes on 16 cores. Its entries come before the package's own for that class and before
default.json; what was not measured stays. Delete the file to have the package's again.
"""


def command(settings: TuneSettings, *, json: Json = False) -> int:
    """`xattn-video tune`; returns 0, or 1 where a configuration of the package fails. Raises UserError."""
    from xattn_video_eval.tune.command import tune

    with contextlib.redirect_stdout(for_people(json)):
        report = tune(settings)
    if json:
        print(dumps(report))
    return 0 if report["ok"] else 1
