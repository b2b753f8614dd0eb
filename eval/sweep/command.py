"""Where to set threshold, stride and warm-up: one run over all of them, from one loaded model, against one dense set.

    axes -> settings -> dense, noise floor and sparse videos -> compare, judge -> sweep.csv, sweep.json, sweep.png

One axis at a time around a base point, or a grid. The dense videos are made once; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from xattn_video import XAttnConfig
from xattn_video_eval.compare.command import compare
from xattn_video_eval.results.ledger import provenance
from xattn_video_eval.sweep.plot import plot
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import write_texts
from xattn_video_pipelines.common.tables import aligned
from xattn_video_pipelines.demo.judging import judge_folder
from xattn_video_pipelines.demo.world import asked
from xattn_video_pipelines.video import command
from xattn_video_pipelines.video.manifest import Record, read_manifest
from xattn_video_pipelines.video.plan import Plan, make_plan

EXAMPLE = """\
example:
  xattn-video sweep --model demo --prompts prompts/demo.txt --out sweep --no-lpips
  xattn-video sweep --model wan2.1-1.3b --prompts prompts.txt --strides 8 16 --warmup-steps 5 --dry-run
"""

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
STRIDES = (4, 8, 16, 32)
WARMUP_STEPS = (0, 2, 5, 8)
_AXES = ("threshold", "stride", "warmup_steps")
_VALUES = ("density", "psnr", "ssim", "lpips", "dense_seconds", "sparse_seconds", "speedup")
# Options that go on to `generate` as they are.
_PASSED = (
    "steps", "guidance_scale", "flow_shift", "height", "width", "num_frames", "fps", "sample", "limit",
    "dtype", "device", "offload", "block_size", "min_tokens",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `xattn-video sweep`."""
    parser.add_argument("--model", required=True, help="as of generate")
    parser.add_argument("--prompts", required=True, type=Path, metavar="FILE", help=".txt or .jsonl")
    parser.add_argument("--out", type=Path, default=Path("sweep"), metavar="DIR", help="default: sweep")

    group = parser.add_argument_group("axes; the base point is threshold 0.9, stride 8, 5 warm-up steps")
    for name, kind, values in (
        ("thresholds", float, THRESHOLDS), ("strides", int, STRIDES), ("warmup-steps", int, WARMUP_STEPS),
    ):  # fmt: skip
        group.add_argument(f"--{name}", type=kind, nargs="+", default=values, metavar="N", help=_listed(values))
    group.add_argument("--grid", action="store_true", help="every combination, not one axis at a time")
    group.add_argument("--block-size", type=int, help="tokens a block; default: 128")
    group.add_argument("--min-tokens", type=int, help="shorter sequences stay dense; default: 1024")

    group = parser.add_argument_group("videos (defaults: the model's own)")
    for name, kind in (
        ("steps", int), ("guidance-scale", float), ("flow-shift", float), ("height", int), ("width", int),
        ("num-frames", int), ("fps", int), ("sample", int), ("limit", int),
    ):  # fmt: skip
        group.add_argument(f"--{name}", type=kind, help="as of generate")
    group.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="as of generate")

    group = parser.add_argument_group("machine and measuring")
    for name in ("dtype", "device", "offload"):
        group.add_argument(f"--{name}", help="as of generate")
    group.add_argument("--no-lpips", action="store_true", help="PSNR and SSIM only")
    group.add_argument("--no-floor", action="store_true", help="leave the noise floor's videos out")
    group.add_argument("--no-plot", action="store_true", help="no picture; without it matplotlib is not needed")
    group.add_argument("--dry-run", action="store_true", help="say what would be made, load nothing")
    group.add_argument("--json", action="store_true", help="the rows as one JSON document on the last line")


def run(args: argparse.Namespace) -> int:
    """Make what is missing, measure all of it, write the tables and the picture. Returns 0; raises UserError."""
    configs = settings(args)
    labels: list[tuple[str, XAttnConfig | None]] = [("dense", None)]
    labels += [] if args.no_floor else [("dense-alt", None)]
    labels += [(config.label(), config) for config in configs]
    options = _generate_options(args)
    plan = prompt_by_prompt(make_plan(options, labels))
    if not args.no_plot:
        _check_matplotlib()
    print(forecast(plan, len(configs), len(plan.pending)), file=sys.stderr)
    if args.dry_run:
        print("\n".join(str(args.out / label) for label, _ in labels))
        return 0
    made = 0

    def tell(record: Record) -> None:
        """The first video that is made is a dense one if none was there: then the time can be told."""
        nonlocal made
        made += 1
        if made == 1 and record["attention"] == "dense":
            print(f"\n{forecast(plan, len(configs), len(plan.pending) - made)}", file=sys.stderr)

    command.produce(plan, options, on_record=tell)

    rows = [_row(args, plan, label, config) for label, config in labels]
    _write(args.out, rows, _environment(plan))
    if not args.no_plot:
        plot(rows, args.out / "sweep.png")
    print(table(rows))
    print(f"wrote sweep.csv, sweep.json{'' if args.no_plot else ' and sweep.png'} in {args.out}")
    if args.json:
        print(json.dumps({"rows": rows}))
    return 0


def settings(args: argparse.Namespace) -> list[XAttnConfig]:
    """The configurations of the sweep, each once: the base point first, then along each axis, or the grid.

    Raises:
        UserError: a value that `XAttnConfig` refuses.
    """
    options = ("thresholds", "strides", "warmup_steps")
    axes = {name: tuple(getattr(args, option)) for name, option in zip(_AXES, options, strict=True)}
    fixed = {name: getattr(args, name) for name in ("block_size", "min_tokens") if getattr(args, name) is not None}
    try:
        base = XAttnConfig(**fixed)
        if args.grid:
            points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        else:
            points = [{}] + [{name: value} for name, values in axes.items() for value in values]
        configs = [base.replace(**point) for point in points]
    except ValueError as error:
        raise UserError(str(error)) from None
    return list(dict.fromkeys(configs))


def prompt_by_prompt(plan: Plan) -> Plan:
    """The plan with its videos in the order of prompts and seeds, dense beside sparse.

    A machine that slows down in a run of hours then slows down every configuration alike.
    """
    order = list(dict.fromkeys((job.prompt.id, job.seed) for job in plan.jobs))
    places = {key: place for place, key in enumerate(order)}
    return replace(plan, pending=tuple(sorted(plan.pending, key=lambda job: places[job.prompt.id, job.seed])))


def forecast(plan: Plan, configs: int, left: int) -> str:
    """How many videos are left to make, and how long at most, from the dense ones that are finished.

    A sparse video is counted with a dense one's time, so the figure is a bound where sparse is not slower.
    """
    folder = next(job.folder for job in plan.jobs if job.attention == "dense")
    seconds = [record["seconds"] for record in read_manifest(folder).values()]
    text = f"{configs} configurations, {left} of {len(plan.jobs)} videos to make"
    if not left or not seconds:
        return text
    mean = sum(seconds) / len(seconds)
    return f"{text}: at most about {left * mean / 60:.0f} min at {mean:.1f} s a dense video"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as printed: what was set, what it cost, what it kept."""
    formats = {
        "threshold": "g", "stride": "d", "warmup_steps": "d", "density": ".3f", "psnr": ".2f", "ssim": ".4f",
        "lpips": ".4f", "as_asked": ".3f", "sparse_seconds": ".1f", "speedup": ".2f",
    }  # fmt: skip
    measured = ("density", "PSNR dB", "SSIM", "LPIPS", "as asked", "s", "speed-up")
    lines: list[tuple[str, ...]] = [("videos of", "threshold", "stride", "warm-up", *measured)]
    for row in rows:
        cells = ("-" if row[name] is None else format(row[name], spec) for name, spec in formats.items())
        lines.append((row["attention"], *cells))
    return aligned(lines, left=1)


def _row(args: argparse.Namespace, plan: Plan, label: str, config: XAttnConfig | None) -> dict[str, Any]:
    """One configuration's values: means over its videos, and how many show what was asked (None: nothing asked)."""
    folder, dense = args.out / label, args.out / "dense"
    keys = list(dict.fromkeys((job.prompt.id, job.seed) for job in plan.jobs))
    axes = {name: None if config is None else getattr(config, name) for name in _AXES}
    if label == "dense":
        records = [read_manifest(folder)[key] for key in keys]
        seconds = sum(record["seconds"] for record in records) / len(records)
        values: dict[str, Any] = dict.fromkeys(_VALUES) | {
            "density": 1.0, "dense_seconds": seconds, "sparse_seconds": seconds, "speedup": 1.0,
        }  # fmt: skip
    else:
        compared = compare(dense, folder, keys=keys, lpips=not args.no_lpips, floor=False)
        values = {name: compared[name] for name in _VALUES}
    as_asked = judge_folder(folder, keys=keys)["totals"]["right"]["all"]["share"] if _judgeable(plan) else None
    return {"attention": label, **axes, "videos": len(keys), **values, "as_asked": as_asked}


def _judgeable(plan: Plan) -> bool:
    """Whether every prompt is one of the shapes world: the judge knows no other."""
    whole = {"colour", "shape", "motion", "background"}
    return all(whole <= asked(job.prompt.text).keys() for job in plan.jobs)


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _generate_options(args: argparse.Namespace) -> argparse.Namespace:
    """The options of `generate` that this sweep's videos are made with."""
    parser = _Options()
    command.add_arguments(parser)
    given = ["--model", args.model, "--prompts", str(args.prompts), "--out", str(args.out), "--lossless"]
    for name in _PASSED:
        value = getattr(args, name)
        given += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    given += [] if args.seeds is None else ["--seeds", *map(str, args.seeds)]
    return parser.parse_args(given)


def _write(folder: Path, rows: Sequence[dict[str, Any]], environment: dict[str, Any]) -> None:
    """sweep.csv and sweep.json."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    document = json.dumps({**environment, "rows": rows}, indent=2, allow_nan=False) + "\n"
    write_texts({folder / "sweep.csv": text.getvalue(), folder / "sweep.json": document})


def _environment(plan: Plan) -> dict[str, Any]:
    records = [record for job in plan.jobs for record in read_manifest(job.folder).values()]
    return {
        "model": plan.model.identity,
        **vars(plan.settings),
        "tokens": plan.tokens,
        "dtype": plan.dtype,
        "devices": sorted({record["device_name"] for record in records}),
        **provenance("diffusers", "transformers"),
    }


def _check_matplotlib() -> None:
    """Before hours of work, not after them."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the picture needs matplotlib: pip install 'xattn-video[plot]'; or use --no-plot")


def _listed(values: Sequence[float]) -> str:
    return f"default: {' '.join(map(str, values))}"
