"""One step in a process of its own, started by runner.py.

`python -m xattn_video_eval.first_gpu.child MODULE:FUNCTION LOOK`
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from xattn_video_eval.first_gpu.look import Look


def main(function: str, look: str) -> None:
    """Call the function with the `Look` that the JSON text describes."""
    module, name = function.split(":")
    given = json.loads(look)
    getattr(importlib.import_module(module), name)(Look(**{**given, "out": Path(given["out"])}))


if __name__ == "__main__":
    main(*sys.argv[1:])
