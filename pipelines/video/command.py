"""`xattn-video generate`: prompts to videos, dense, sparse or both, resumable at any video."""

from __future__ import annotations

import contextlib
import sys
import time
from json import dumps
from typing import Annotated

from xattn_video_pipelines.common.settings import Json, Option
from xattn_video_pipelines.common.tables import size
from xattn_video_pipelines.common.terminal import say
from xattn_video_pipelines.video.all_dense import is_all_dense, told_at_the_end, told_of_all_dense, warn_of_all_dense
from xattn_video_pipelines.video.cost import Cost, estimate, first_line, lines_of
from xattn_video_pipelines.video.make import Produced, produce
from xattn_video_pipelines.video.manifest import Record
from xattn_video_pipelines.video.plan import Job, Plan, make_plan
from xattn_video_pipelines.video.settings import GenerateSettings

EXAMPLE = """\
example:
  xattn-video generate "a red fox runs through fresh snow" --model wan2.1-1.3b
  xattn-video generate --model wan2.1-1.3b --prompts prompts.txt --attention both --out out
  xattn-video compare out
"""


def command(
    settings: GenerateSettings,
    *,
    dry_run: Annotated[bool, Option("say what would be made, load nothing", "which videos")] = False,
    json: Json = False,
) -> int:
    """`xattn-video generate`: make the videos that are missing.

    Returns:
        0, or 3 if a video failed.

    Raises:
        UserError: bad input.
    """
    plan = make_plan(settings)
    if plan.pending or dry_run:
        cost = estimate(plan, ask_hub=dry_run)
        if not dry_run:
            say(first_line(cost, plan.recipe.tokens, len(plan.pending)), sys.stderr, progress=True)
        for line in [*warn_of_all_dense([job.config for job in plan.pending], plan.recipe), *cost.warnings]:
            say(line, sys.stderr)
        if dry_run:
            _report_dry_run(plan, cost, as_json=json)
            return 0
    started = time.perf_counter()
    with told_at_the_end() if plan.pending else contextlib.nullcontext():
        made = produce(plan, None if json else print_video)
    _report(plan, made, time.perf_counter() - started, as_json=json)
    return made.batch.code


def generate(settings: GenerateSettings) -> list[Record]:
    """Make the videos that are missing under `settings.out`, with one loaded pipeline.

    Returns:
        The records of the videos that were made, as the manifest in each folder has them. Finished videos of the same
        settings are kept and are not in it.

    Raises:
        UserError: a setting does not fit the model or the machine, a file is missing or damaged, a finished video has
            other settings, the output cannot be written, or the model cannot be loaded or made sparse.
        SomeFailed: some videos failed, or `max_hours` was over; raised when all others are made.
    """
    made = produce(make_plan(settings))
    made.batch.check()
    return made.records


def print_video(job: Job, record: Record) -> None:
    """A line on stdout about a video that was made; it does not tear the bars on stderr."""
    line = f"{job.path}  {record['seconds']:.1f} s  density {record['mean_density']:.2f}"
    if is_all_dense(record):
        # Asked for sparse and got dense throughout: say why at once.
        line += f" (dense calls: {', '.join(f'{n} {reason}' for reason, n in record['dense_reasons'].items())})"
    say(line, progress=True)


def _report_dry_run(plan: Plan, cost: Cost, *, as_json: bool) -> None:
    recipe, pending = plan.recipe, set(plan.pending)
    settings = recipe.settings
    document = {
        "dry_run": True,
        "model": recipe.model.identity,
        "pipeline": recipe.model.pipeline,
        **vars(settings),
        "tokens": recipe.tokens,
        "residual_bytes": _residual_bytes(plan),
        "device": str(plan.device),
        "dtype": plan.dtype,
        "cost": cost.document(),
        "videos": [
            {"attention": job.attention, "id": job.prompt.id, "seed": job.seed, "file": str(job.path),
             "status": "to make" if job in pending else "finished"}
            for job in plan.jobs
        ],
    }  # fmt: skip
    if as_json:
        print(dumps(document))
        return
    tokens = "unknown" if recipe.tokens is None else f"{recipe.tokens:,}"
    say(f"model     {recipe.model.identity} ({recipe.model.pipeline})")
    say(f"size      {settings.width} x {settings.height}, {settings.num_frames} frames at {settings.fps} a second")
    say(f"tokens    {tokens} video tokens a forward pass, {settings.steps} steps")
    for line in lines_of(cost):
        say(line)
    residual = document["residual_bytes"]
    if residual is None and any(job.config is not None and job.config.residual != "off" for job in plan.jobs):
        say("memory    of the residuals is not known for this model; it is bounded by what the GPU has left")
    if residual is not None:
        say(f"memory    {size(residual)} for the residuals of a forward; guidance as two forwards takes twice")
    say(f"device    {plan.device}, {plan.dtype}")
    for video in document["videos"]:
        say(f"{video['status']:8}  {video['file']}")
    say(f"{len(pending)} of {len(plan.jobs)} videos to make; nothing was loaded or written")


def _residual_bytes(plan: Plan) -> int | None:
    """The most that the residuals of one forward take; None where there are none, or the model's sizes are unknown."""
    configs = {job.config for job in plan.jobs if job.config is not None}
    sizes = [plan.recipe.residual_bytes(config, plan.dtype) for config in configs]
    return max((size for size in sizes if size is not None), default=None)


def _report(plan: Plan, made: Produced, seconds: float, *, as_json: bool) -> None:
    records = {(record["attention"], record["id"], record["seed"]): record for record in made.records}
    failed = {(row["attention"], row["id"], row["seed"]) for row in made.batch.failed}
    videos = []
    for job in plan.jobs:
        record = records.get((job.kind, job.prompt.id, job.seed))
        video = {"attention": job.attention, "id": job.prompt.id, "seed": job.seed, "file": str(job.path)}
        if record is not None:
            video["status"] = "made"
        elif (job.attention, *job.key) in failed:
            video["status"] = "failed"
        else:
            video["status"] = "left" if job in made.batch.left else "kept"
        videos.append(video | ({key: record[key] for key in ("seconds", "mean_density")} if record else {}))
    counts = {status: sum(video["status"] == status for video in videos) for status in ("made", "kept")}
    if as_json:
        document = {**counts, "left": len(made.batch.left), "seconds": round(seconds, 2)}
        print(dumps(document | {"failures": made.batch.brief(), "videos": videos}))
    else:
        folders = ", ".join(dict.fromkeys(str(job.folder) for job in plan.jobs))
        say(f"videos: {counts['made']} made, {counts['kept']} kept, in {folders}")
    all_dense = told_of_all_dense(made.records)
    for line in [*([all_dense] if all_dense else []), *made.batch.told()]:
        say(line, sys.stderr)
