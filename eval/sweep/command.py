"""Where to set threshold, stride and warm-up: one run over all of them, from one loaded model, against one dense set.

    axes -> settings -> dense, noise floor and sparse videos -> compare, judge -> sweep.csv, sweep.json, sweep.png

One axis at a time around a base point, or a grid. The dense videos are made once; a run that was stopped goes on.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from xattn_video import XAttnConfig
from xattn_video.extras import install_command
from xattn_video_eval.compare import CompareSettings, compare
from xattn_video_eval.results import provenance
from xattn_video_eval.sweep.plot import plot
from xattn_video_eval.sweep.settings import SweepSettings
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import write_texts
from xattn_video_pipelines.common.program import for_people
from xattn_video_pipelines.common.settings import Json, Option
from xattn_video_pipelines.common.tables import aligned
from xattn_video_pipelines.demo import asked, judge_folder
from xattn_video_pipelines.video import Job, Plan, Record, make_plan, print_video, produce, read_manifest

if TYPE_CHECKING:
    from xattn_video import XAttnConfig

EXAMPLE = """\
example:
  xattn-video sweep --model demo --prompts prompts/demo.txt --out sweep --no-lpips
  xattn-video sweep --model wan2.1-1.3b --prompts prompts.txt --strides 8 16 --warmup-steps 5 --dry-run
"""

_AXES = ("threshold", "stride", "warmup_steps")
_VALUES = ("density", "psnr", "ssim", "lpips", "dense_seconds", "sparse_seconds", "speedup")


def command(
    settings: SweepSettings,
    *,
    dry_run: Annotated[bool, Option("say what would be made, load nothing", "which videos")] = False,
    json: Json = False,
) -> int:
    """`xattn-video sweep`: make, measure, print the table; returns 0. Raises UserError."""
    people = for_people(json)
    if dry_run:
        plan, labels = _plan(settings)
        print(forecast(plan, len(settings.configs), len(plan.pending)), file=sys.stderr)
        print("\n".join(str(settings.out / label) for label, _ in labels))
        return 0
    rows = sweep(settings, None if json else print_video)
    print(table(rows), file=people)
    print(f"wrote sweep.csv, sweep.json{' and sweep.png' if settings.plot else ''} in {settings.out}", file=people)
    if json:
        print(dumps({"rows": rows}))
    return 0


def sweep(settings: SweepSettings, on_video: Callable[[Job, Record], None] | None = None) -> list[dict[str, Any]]:
    """Make the videos that are missing, measure all of them, write the tables and the picture.

    Args:
        settings: what is swept over.
        on_video: called with each video that is made and its record.

    Returns:
        A row for each configuration: its settings, its density and speed-up, and how close its videos are to dense
        ones. The first row is dense attention itself.

    Raises:
        UserError: as `generate` and `compare`, or matplotlib is missing.
    """
    plan, labels = _plan(settings)
    if settings.plot:
        _check_matplotlib()
    configs = len(settings.configs)
    print(forecast(plan, configs, len(plan.pending)), file=sys.stderr)
    made = 0

    def tell(job: Job, record: Record) -> None:
        """The first video that is made is a dense one if none was there: then the time can be told."""
        nonlocal made
        made += 1
        if on_video:
            on_video(job, record)
        if made == 1 and job.kind == "dense":
            print(f"\n{forecast(plan, configs, len(plan.pending) - made)}", file=sys.stderr)

    produce(plan, on_video=tell)
    rows = [_row(settings, plan, label, config) for label, config in labels]
    _write(settings.out, rows, _environment(plan))
    if settings.plot:
        plot(rows, settings.out / "sweep.png")
    return rows


def _plan(settings: SweepSettings) -> tuple[Plan, list[tuple[str, XAttnConfig | None]]]:
    """The videos to make, and the folders that they go to with what each is made with."""
    labels: list[tuple[str, XAttnConfig | None]] = [("dense", None)]
    labels += [("dense-alt", None)] if settings.floor else []
    labels += [(config.label(), config) for config in settings.configs]
    return prompt_by_prompt(make_plan(settings.of_videos, labels)), labels


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


def _row(settings: SweepSettings, plan: Plan, label: str, config: XAttnConfig | None) -> dict[str, Any]:
    """One configuration's values: means over its videos, and how many show what was asked (None: nothing asked)."""
    folder, dense = settings.out / label, settings.out / "dense"
    keys = list(dict.fromkeys((job.prompt.id, job.seed) for job in plan.jobs))
    axes = {name: None if config is None else getattr(config, name) for name in _AXES}
    if label == "dense":
        records = [read_manifest(folder)[key] for key in keys]
        seconds = sum(record["seconds"] for record in records) / len(records)
        values: dict[str, Any] = dict.fromkeys(_VALUES) | {
            "density": 1.0, "dense_seconds": seconds, "sparse_seconds": seconds, "speedup": 1.0,
        }  # fmt: skip
    else:
        compared = compare(CompareSettings(dense, folder, lpips=settings.lpips, floor=False), keys=keys)
        values = {name: compared[name] for name in _VALUES}
    as_asked = judge_folder(folder, keys=keys)["totals"]["right"]["all"]["share"] if _judgeable(plan) else None
    return {"attention": label, **axes, "videos": len(keys), **values, "as_asked": as_asked}


def _judgeable(plan: Plan) -> bool:
    """Whether every prompt is one of the shapes world: the judge knows no other."""
    whole = {"colour", "shape", "motion", "background"}
    return all(whole <= asked(job.prompt.text).keys() for job in plan.jobs)


def _write(folder: Path, rows: Sequence[dict[str, Any]], environment: dict[str, Any]) -> None:
    """sweep.csv and sweep.json."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    document = dumps({**environment, "rows": rows}, indent=2, allow_nan=False) + "\n"
    write_texts({folder / "sweep.csv": text.getvalue(), folder / "sweep.json": document})


def _environment(plan: Plan) -> dict[str, Any]:
    records = [record for job in plan.jobs for record in read_manifest(job.folder).values()]
    return {
        "model": plan.recipe.model.identity,
        **vars(plan.recipe.settings),
        "tokens": plan.recipe.tokens,
        "dtype": plan.dtype,
        "devices": sorted({record["device_name"] for record in records}),
        **provenance("diffusers", "transformers"),
    }


def _check_matplotlib() -> None:
    """Before hours of work, not after them."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"the picture needs matplotlib: {install_command('plot')}; or use --no-plot")
