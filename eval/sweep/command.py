"""Where to set threshold, stride, residual and the rest: one run over all, from one model, against one dense set.

    axes -> settings -> dense, noise floor and sparse videos -> compare, judge -> sweep.csv, sweep.json, sweep.png

One axis at a time around a base point, or a grid, and whole presets. The dense videos are made once; a run that was
stopped goes on.
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

from xattn_video import HeadThresholds, XAttnConfig
from xattn_video.extras import install_command
from xattn_video_eval.compare import CompareSettings, compare
from xattn_video_eval.results import mean_interval, provenance
from xattn_video_eval.sweep.plot import plot, with_sparse_calls
from xattn_video_eval.sweep.settings import AXES, SweepSettings
from xattn_video_pipelines.common.batch import Batch
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import write_texts
from xattn_video_pipelines.common.program import for_people
from xattn_video_pipelines.common.settings import Json, Option
from xattn_video_pipelines.common.tables import aligned, duration
from xattn_video_pipelines.common.terminal import say
from xattn_video_pipelines.demo import asked, judge_folder
from xattn_video_pipelines.video import (
    Job,
    Key,
    Plan,
    Record,
    busy,
    estimate,
    first_line,
    is_all_dense,
    make_plan,
    print_video,
    produce,
    read_manifest,
    told_at_the_end,
    warn_of_all_dense,
)

if TYPE_CHECKING:
    from xattn_video import XAttnConfig

EXAMPLE = """\
example:
  xattn-video sweep --model demo --prompts prompts/demo.txt --out sweep --no-lpips
  xattn-video sweep --model demo --prompts prompts/demo.txt --out presets --presets fast balanced faithful
  xattn-video sweep --model wan2.1-1.3b --prompts prompts.txt --preset balanced --thresholds 0.1 0.3 0.5 --dry-run
"""

# A row has these settings; those after the first three only where a configuration of the sweep has another value than
# the default.
_SETTINGS = (*AXES, "per_head", "refresh", "extrapolate", "warmup", "last_steps")
_ALWAYS = ("threshold", "stride", "warmup_steps")
# Heads and formats of the printed table, by the name in a row.
_COLUMNS = {
    "name": ("name", ""), "threshold": ("threshold", "g"), "stride": ("stride", "d"), "warmup_steps": ("warm-up", "d"),
    "warmup": ("at most", "g"), "last_steps": ("dense last", "d"), "residual": ("residual", ""),
    "refresh": ("refresh", ""), "refresh_every": ("every", "g"), "extrapolate": ("extrapolated", ""),
    "anchors": ("anchors", "d"), "threshold_ramp": ("ramp", "g"), "keep_masks": ("masks kept", "d"),
    "per_head": ("per head", ""),
    "density": ("density", ".3f"), "psnr": ("PSNR dB", ".2f"), "psnr_worst": ("worst dB", ".2f"),
    "ssim": ("SSIM", ".4f"), "lpips": ("LPIPS", ".4f"), "flicker": ("flicker", ".4f"),
    "as_asked": ("as asked", ".3f"), "residual_mib": ("residual MiB", ".1f"), "sparse_seconds": ("s", ".1f"),
    "speedup": ("speed-up", ".2f"), "all_dense": ("all dense", ""),
}  # fmt: skip
_COMPARED = ("density", "psnr", "ssim", "lpips", "flicker", "dense_seconds", "sparse_seconds", "speedup", "busy")


def command(
    settings: SweepSettings,
    *,
    dry_run: Annotated[bool, Option("say what would be made, load nothing", "which videos")] = False,
    json: Json = False,
) -> int:
    """`xattn-video sweep`: make, measure, print the table; returns 0, or 3 if a video failed. Raises UserError."""
    people = for_people(json)
    if dry_run:
        plan, labels = _plan(settings)
        _tell(plan, labels)
        folders = [str(settings.out / label) for label, _ in labels]
        say(dumps({"dry_run": True, "folders": folders, "to_make": len(plan.pending)}) if json else "\n".join(folders))
        return 0
    with told_at_the_end():
        rows, batch = _sweep(settings, None if json else print_video)
    if rows:
        say(table(rows), people)
        pictured = settings.plot and bool(with_sparse_calls(rows))
        say(f"wrote sweep.csv, sweep.json{' and sweep.png' if pictured else ''} in {settings.out}", people)
        if (reason := next((row["busy"] for row in rows if row["busy"]), None)) is not None:
            say(f"{reason}: timings are not reliable", people)
        if any(row["all_dense"] for row in rows):
            say("all dense: no call was sparse, so these rows say nothing of sparse attention", people)
    if json:
        print(dumps({"rows": rows}))
    for line in batch.told():
        say(line, sys.stderr)
    return batch.code


def sweep(settings: SweepSettings, on_video: Callable[[Job, Record], None] | None = None) -> list[dict[str, Any]]:
    """Make the videos that are missing, measure all of them, write the tables and the picture.

    Args:
        settings: what is swept over.
        on_video: called with each video that is made and its record.

    Returns:
        A row for each configuration: its settings, its density and speed-up, and how close its videos are to dense
        ones: means over videos, `psnr_worst` of the worst video, and `psnr_low` and `psnr_high`, the 95 % bootstrap
        interval of the mean. `density` is of all calls: a dense call counts as 1, a refresh of the residual too.
        `busy` says why the times are not reliable, or is None. `residual_mib` is the most memory that residuals took,
        `calls_without_residual` the sparse calls of all videos that had none because it did not fit. The first row is
        dense attention itself. Where videos are missing, every row is over those that all configurations have: `videos`
        is their number. `all_dense` is True where no call of a configuration was sparse, else None; such rows are not
        in the picture.

    Raises:
        UserError: as `generate` and `compare`, or matplotlib is missing.
        SomeFailed: some videos failed, or `max_hours` was over; raised when all others are made and measured.
    """
    rows, batch = _sweep(settings, on_video)
    batch.check()
    return rows


def _sweep(
    settings: SweepSettings, on_video: Callable[[Job, Record], None] | None
) -> tuple[list[dict[str, Any]], Batch]:
    """The rows, without any where no prompt has a video of every configuration, and what failed."""
    plan, labels = _plan(settings)
    if settings.plot:
        _check_matplotlib()
    configs, names = _tell(plan, labels), settings.names
    made = 0

    def tell(job: Job, record: Record) -> None:
        """The first video that is made is a dense one if none was there: then the time can be told."""
        nonlocal made
        made += 1
        if on_video:
            on_video(job, record)
        if made == 1 and job.kind == "dense":
            say(f"\n{forecast(plan, configs, len(plan.pending) - made)}", sys.stderr, progress=True)

    batch = produce(plan, on_video=tell).batch
    keys = _made_by_all(plan)
    if not keys:
        return [], batch
    columns = _columns([config for _, config in labels if config is not None])
    rows = [
        {
            "attention": label,
            **({"name": None if config is None else names.get(config)} if names else {}),
            **{name: _value(config, name) for name in columns},
            **_measured(settings, plan, label, keys),
        }
        for label, config in labels
    ]
    environment = _environment(plan)
    _write(settings.out, rows, environment)
    if settings.plot and with_sparse_calls(rows):
        of = (
            environment["model"],
            f"{environment['tokens']} tokens, {environment['steps']} steps",
            *environment["devices"],
        )
        plot(rows, settings.out / "sweep.png", ", ".join(of))
    elif settings.plot:
        # One of an earlier sweep is not of these rows.
        (settings.out / "sweep.png").unlink(missing_ok=True)
    return rows, batch


def _plan(settings: SweepSettings) -> tuple[Plan, list[tuple[str, XAttnConfig | None]]]:
    """The videos to make, and the folders that they go to with what each is made with."""

    def labels_at(steps: int) -> list[tuple[str, XAttnConfig | None]]:
        dense: list[tuple[str, XAttnConfig | None]] = [("dense", None)]
        dense += [("dense-alt", None)] if settings.floor else []
        return dense + [(config.label(), config) for config in settings.configs_at(steps)]

    plan = prompt_by_prompt(make_plan(settings.of_videos, labels_at))
    return plan, labels_at(plan.recipe.settings.steps)


def _tell(plan: Plan, labels: Sequence[tuple[str, XAttnConfig | None]]) -> int:
    """Say on stderr what is to be made, and which of it will have no sparse call; the number of configurations."""
    configs = [config for _, config in labels if config is not None]
    say(forecast(plan, len(configs), len(plan.pending)), sys.stderr, progress=True)
    cost = estimate(plan)
    if plan.pending:
        say(first_line(cost, plan.recipe.tokens, len(plan.pending)), sys.stderr, progress=True)
    for line in cost.warnings:
        say(line, sys.stderr)
    for line in warn_of_all_dense(configs, plan.recipe):
        say(line, sys.stderr)
    return len(configs)


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
    told = [record.get("seconds") for record in read_manifest(folder).values()]
    seconds = [value for value in told if value is not None]
    text = f"{configs} configuration{'s' * (configs != 1)}, {left} of {len(plan.jobs)} videos to make"
    if not left or not seconds:
        return text
    mean = sum(seconds) / len(seconds)
    return f"{text}: at most about {duration(left * mean)} at {mean:.1f} s a dense video"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as printed: what was set, what it cost, what it kept. A column without any value is left out."""
    shown = [name for name in _COLUMNS if any(row.get(name) is not None for row in rows)]
    lines: list[tuple[str, ...]] = [("configuration", *(_COLUMNS[name][0] for name in shown))]
    lines += [(row["attention"], *(_cell(row[name], _COLUMNS[name][1]) for name in shown)) for row in rows]
    return aligned(lines, left=1)


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        # The steps of a refresh, or a threshold per head.
        return " ".join(map(str, value))
    return value if isinstance(value, str) else format(value, form)


def _columns(configs: Sequence[XAttnConfig]) -> list[str]:
    """The settings that the rows tell."""
    usual = XAttnConfig().for_videos()
    return [
        name
        for name in _SETTINGS
        if name in _ALWAYS or any(getattr(config, name) != getattr(usual, name) for config in configs)
    ]


def _value(config: XAttnConfig | None, name: str) -> Any:
    """A setting as a row holds it; None where it has no meaning."""
    if config is None or (name == "refresh" and config.residual == "off"):
        return None
    value = config.refresh_rule if name == "refresh" else getattr(config, name)
    if isinstance(value, HeadThresholds):
        return f"of {value.model}"
    return list(value) if isinstance(value, tuple) else value


def _made_by_all(plan: Plan) -> list[Key]:
    """The videos that every configuration has, in order: all of them, unless some failed or the run stopped."""
    made = [read_manifest(folder) for folder in dict.fromkeys(job.folder for job in plan.jobs)]
    keys = dict.fromkeys(job.key for job in plan.jobs)
    return [key for key in keys if all(key in manifest for manifest in made)]


def _measured(settings: SweepSettings, plan: Plan, label: str, keys: Sequence[Key]) -> dict[str, Any]:
    """What one configuration's videos cost and kept, and how many show what was asked (None: nothing asked)."""
    folder, dense = settings.out / label, settings.out / "dense"
    manifest = read_manifest(folder)
    records = [manifest[key] for key in keys]
    if label == "dense":
        told = [record.get("seconds") for record in records]
        known = [value for value in told if value is not None]
        seconds = sum(known) / len(known) if len(known) == len(told) else None
        values: dict[str, Any] = dict.fromkeys((*_COMPARED, "psnr_worst", "psnr_low", "psnr_high")) | {
            "density": 1.0, "dense_seconds": seconds, "sparse_seconds": seconds, "speedup": 1.0, "busy": busy(records),
        }  # fmt: skip
    else:
        compared = compare(CompareSettings(dense, folder, lpips=settings.lpips, floor=False), keys=keys)
        each = [video["psnr"] for video in compared["videos"]]
        low, high = mean_interval(each)
        values = {name: compared[name] for name in _COMPARED}
        values |= {"psnr_worst": min(each), "psnr_low": low, "psnr_high": high}
    all_dense = all(is_all_dense(record) for record in records)
    residual = max(record.get("residual_bytes") or 0 for record in records)
    return {
        "videos": len(keys),
        **values,
        "as_asked": judge_folder(folder, keys=keys)["totals"]["right"]["all"]["share"] if _judgeable(plan) else None,
        "residual_mib": residual / 2**20 or None,
        "all_dense": True if all_dense else None,
        "calls_without_residual": sum(record.get("calls_without_residual") or 0 for record in records),
    }


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
        "devices": sorted({record["device_name"] for record in records if record.get("device_name")}),
        **provenance("diffusers", "transformers"),
    }


def _check_matplotlib() -> None:
    """Before hours of work, not after them."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"the picture needs matplotlib: {install_command('plot')}; or use --no-plot")
