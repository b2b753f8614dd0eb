"""Does the score find the blocks that matter? `python -m xattn_video_eval.studies.selection_quality`

    queries and keys  ->  exact mass of every block, in chunks of rows
      ->  each scorer at each stride: Spearman, AUC, mass recalled at the oracle's density, cost
      ->  threshold against top-k against top-ratio at one density; thresholds against density and mass recalled
      ->  XAttention's published tables beside ours, and where their order is not ours

Inputs: the demo model's own tensors, and a video-like and a causal text-like generator. `--json` prints a row an input
in place of the tables, `--record` appends the rows to a ledger, and `--plot` draws them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from xattn_video.config import check_geometry
from xattn_video.testing import causal_text_like_qkv, video_like_qkv
from xattn_video_eval.bench import load_demo_qkv
from xattn_video_eval.report import compare_orders
from xattn_video_eval.results import RESULTS, append_rows, provenance
from xattn_video_eval.studies import selection_plots
from xattn_video_eval.studies.selection_measures import (
    Problem,
    as_good_for_less,
    measure_rules,
    measure_scorers,
    measure_thresholds,
)
from xattn_video_eval.studies.selection_tables import format_input, format_legend
from xattn_video_pipelines.common.demo_data import DEMO_QKV
from xattn_video_pipelines.common.environment import device_name
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.program import for_people, run_alone
from xattn_video_pipelines.common.settings import Json, Option, Settings
from xattn_video_pipelines.common.terminal import say

LEDGER = RESULTS / "selection_quality.jsonl"
INPUTS = ("demo", "video", "text")
STRIDES = (1, 2, 4, 8, 16, 32, 64)
# At which the selection rules are compared, and what is printed by threshold: the paper's and the usual ones.
RULE_THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95)
THRESHOLDS = (0.1, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
# A generated frame is as large as the demo model's.
FRAME_SIDE = 16
HEAD_DIM = 64
MAX_SEED = 2**63 - 1

EXAMPLE = """\
example:
  python -m xattn_video_eval.studies.selection_quality
  xattn-video selection-quality --inputs video text --tokens 8192 --threshold 0.95
  xattn-video selection-quality --inputs demo --record --plot selection.png
"""


# Not the options' own defaults, so that one that was given is seen.
_GENERATED = {"tokens": 4096, "heads": 3, "samples": 4, "locality": 0.78}


@dataclass(frozen=True, kw_only=True)
class SelectionSettings(Settings):
    """What is scored, and how blocks are chosen. None and empty take the defaults of generated inputs, and all inputs.

    `threshold` says which blocks matter. The tables that have one stride are for `stride`.
    """

    inputs: Annotated[
        tuple[Literal["demo", "video", "text"], ...],
        Option("what is scored: the demo model's tensors, video-like, causal text-like (default: all that are there)"),
    ] = ()
    tokens: Annotated[int | None, Option("length of generated inputs (default 4096)")] = None
    heads: Annotated[int | None, Option("heads of generated inputs, of three kinds in turn (default 3)")] = None
    samples: Annotated[int | None, Option("generated inputs of each kind (default 4)")] = None
    seed: Annotated[int, Option("of generated inputs and the random pattern")] = 0
    locality: Annotated[float | None, Option("how local generated inputs are, 0 to 1 (default 0.78)")] = None
    stride: Annotated[int, Option("of the tables that have one stride")] = 8
    block_size: Annotated[int, Option("tokens a block")] = 128
    threshold: Annotated[float, Option("that says which blocks matter")] = 0.9
    record: Annotated[bool, Option(f"append the rows to eval/results/{LEDGER.name}")] = False
    plot: Annotated[
        Path | None, Option("draw quality over cost; needs matplotlib", metavar="FILE.png", command_line_only=True)
    ] = None

    @property
    def generated(self) -> dict[str, Any]:
        """The sizes of generated inputs."""
        given = {name: getattr(self, name) for name in _GENERATED}
        return _GENERATED | {name: value for name, value in given.items() if value is not None}

    def check(self) -> None:
        try:
            check_geometry(self.stride, self.block_size)
        except ValueError as error:
            raise UserError(f"--{str(error).replace('block_size', 'block-size')}") from error
        self.check_at_least(2, "block_size")
        sizes = self.generated
        for name, least in (("tokens", 2 * self.block_size), ("heads", 1), ("samples", 1)):
            if sizes[name] < least:
                blocks = ", two blocks," if name == "tokens" else ""
                raise UserError(f"--{name} must be {least}{blocks} or more, got {sizes[name]}")
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"--seed must be from 0 to 2**63 - 1, got {self.seed}")
        if not 0 < self.threshold < 1:
            raise UserError(f"--threshold must be above 0 and below 1, got {self.threshold}")
        if not 0 <= sizes["locality"] <= 1:
            raise UserError(f"--locality must be from 0 to 1, got {sizes['locality']}")
        if set(self.inputs) == {"demo"}:
            for name in _GENERATED:
                if getattr(self, name) is not None:
                    raise UserError(f"--{name} does not go with --inputs demo, whose tensors have a shape of their own")


def selection_quality(settings: SelectionSettings, *, json: Json = False) -> int:
    """`xattn-video selection-quality`: measure and print; returns 0. Raises `UserError` for bad input."""
    with contextlib.redirect_stdout(for_people(json)):
        document = _measured(settings)
    if json:
        print(dumps(document))
    return 0


def _measured(settings: SelectionSettings) -> dict[str, Any]:
    """The rows, an input each, and what was skipped and why; each row is printed as it comes."""
    if settings.plot is not None:
        selection_plots.check(settings.plot)
    skipped = {}
    chosen = tuple(dict.fromkeys(settings.inputs or INPUTS))
    if not settings.inputs and not DEMO_QKV.is_file():
        chosen = tuple(name for name in INPUTS if name != "demo")
        skipped["demo"] = (
            f"no file {DEMO_QKV.name} in this installation; "
            "python -m xattn_video_pipelines.demo.training.capture makes it"
        )
    problems = _made_inputs(chosen, settings)
    source = {"device": device_name(torch.device("cpu")), **provenance()}
    print(format_legend())
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}")
    rows = []
    for shape, query, key in problems:
        say(f"{shape['inputs']}: exact block mass of {shape['tokens']} tokens", sys.stderr, progress=True)
        measured = _measure(query, key, shape, settings)
        rows.append(shape | measured | source)
        print(format_input(rows[-1]), flush=True)
    if settings.record:
        append_rows(LEDGER, rows)
    if settings.plot is not None:
        selection_plots.write(rows, settings.plot)
        print(f"wrote {settings.plot}")
    return {"rows": rows, "skipped": skipped}


def _made_inputs(names: Sequence[str], settings: SelectionSettings) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
    """What describes each input, its queries and its keys `[samples, heads, tokens, head_dim]` in float32."""
    # Read before anything is measured, so that a bad file is found at once.
    demo = _demo_inputs() if "demo" in names else None
    return (_with_shape(*demo) if name == "demo" and demo else _generated(name, settings) for name in names)


def _demo_inputs() -> tuple[dict[str, Any], Tensor, Tensor]:
    try:
        entries = load_demo_qkv()
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--inputs demo: {error}") from error
    query, key = (torch.cat([getattr(entry, part) for entry in entries], 1).float() for part in ("query", "key"))
    described = {
        "inputs": "demo",
        "head_names": [entry.name for entry in entries],
        "grid": entries[0].grid,
        "locality": None,
        "seed": None,
    }
    return described, query, key


def _generated(name: str, settings: SelectionSettings) -> tuple[dict[str, Any], Tensor, Tensor]:
    sizes = settings.generated
    samples, heads, tokens = sizes["samples"], sizes["heads"], sizes["tokens"]
    made = {"locality": sizes["locality"], "seed": settings.seed}
    if name == "text":
        kinds, grid = ("slash", "vertical", "both"), None
        query, key, _ = causal_text_like_qkv(samples, heads, tokens, HEAD_DIM, **made)
    else:
        kinds = ("local", "temporal", "sink")
        rows = min(FRAME_SIDE, max(1, tokens // FRAME_SIDE))
        columns = min(FRAME_SIDE, tokens)
        grid = (tokens // (rows * columns), rows, columns)
        # What does not fill a frame is text.
        rest = tokens % (rows * columns)
        query, key, _ = video_like_qkv(samples, heads, *grid, HEAD_DIM, text_tokens=rest, **made)
    head_names = [kinds[head % len(kinds)] for head in range(heads)]
    return _with_shape({"inputs": name, "head_names": head_names, "grid": grid, **made}, query, key)


def _with_shape(described: dict[str, Any], query: Tensor, key: Tensor) -> tuple[dict[str, Any], Tensor, Tensor]:
    samples, heads, tokens, head_dim = query.shape
    shape = {"samples": samples, "heads": heads, "tokens": tokens, "head_dim": head_dim}
    return described | shape | {"causal": described["inputs"] == "text"}, query, key


def _measure(query: Tensor, key: Tensor, shape: dict[str, Any], settings: SelectionSettings) -> dict[str, Any]:
    problem = Problem.of(query, key, block_size=settings.block_size, causal=shape["causal"])
    strides = sorted({stride for stride in (*STRIDES, settings.stride) if stride <= settings.block_size})
    progress = partial(_progress, shape["inputs"])
    tables = {
        "scorers": measure_scorers(problem, strides, settings.threshold, settings.seed, progress),
        "rules": measure_rules(problem, settings.stride, sorted({*RULE_THRESHOLDS, settings.threshold})),
        "thresholds": measure_thresholds(problem, settings.stride, sorted({*THRESHOLDS, settings.threshold})),
    }
    chosen = {"stride": settings.stride, "block_size": settings.block_size, "threshold": settings.threshold}
    as_good = as_good_for_less(tables["scorers"], settings.stride)
    return chosen | tables | {"as_good_for_less": as_good, "orders": compare_orders(**tables)}


def _progress(name: str, line: str) -> None:
    say(f"{name}: {line}", sys.stderr, progress=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program: 0, or 2 with one line for bad input."""
    return run_alone(selection_quality, "xattn_video_eval.studies.selection_quality", __doc__ or "", EXAMPLE, arguments)


if __name__ == "__main__":
    sys.exit(main())
