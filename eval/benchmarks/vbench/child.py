"""Runs inside of VBench's own environment, which pins packages that ours cannot have: needs nothing but `vbench`.

python vbench_child.py FULL_INFO.json OUT_DIR DEVICE DIMENSION...

FULL_INFO is VBench's list of prompts with the paths of their videos, so that no file need be named after its prompt.
The scores are written to OUT_DIR/scores.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(arguments: list[str]) -> None:
    """Score every dimension and write the scores."""
    info, out, device, *dimensions = arguments
    # The folder of this file, whose modules are none of VBench's.
    sys.path.pop(0)
    import torch
    from vbench import VBench

    class Given(VBench):  # type: ignore[misc]  # the package vbench has no types
        """VBench with the videos that it is told, instead of those whose names begin with a prompt."""

        def build_full_info_json(self, *_args: object, **_kwargs: object) -> str:
            return info

    bench = Given(torch.device(device), info, out)
    bench.evaluate(videos_path=out, name="vbench", dimension_list=dimensions, local=False, read_frame=False)
    results = json.loads((Path(out) / "vbench_eval_results.json").read_text(encoding="utf-8"))
    # A dimension's result is its score, then what each video got.
    scores = {dimension: float(result[0]) for dimension, result in results.items()}
    (Path(out) / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
