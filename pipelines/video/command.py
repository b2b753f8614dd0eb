"""`xattn-video generate`: a prompt file to videos, dense, sparse or both, resumable at any video."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from json import dumps
from typing import TYPE_CHECKING, Annotated, Any

from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import claimed, make_writable, partial_name, remove_dead_claim
from xattn_video_pipelines.common.settings import Json, Option
from xattn_video_pipelines.video import make as runner
from xattn_video_pipelines.video.manifest import Record, append_record, read_manifest, remove_records
from xattn_video_pipelines.video.models import check_available
from xattn_video_pipelines.video.plan import Job, Plan, by_folder, changes, identity, make_plan
from xattn_video_pipelines.video.settings import GenerateSettings

if TYPE_CHECKING:
    from xattn_video_pipelines.video.progress import VideoProgress

EXAMPLE = """\
example:
  xattn-video generate --model wan2.1-1.3b --prompts prompts.txt --attention both --out out
  xattn-video compare out/dense out/xattn-s8-t0.90-w5
"""


def command(
    settings: GenerateSettings,
    *,
    dry_run: Annotated[bool, Option("say what would be made, load nothing", "which videos")] = False,
    json: Json = False,
) -> int:
    """`xattn-video generate`: make the videos that are missing. Returns 0; raises UserError for bad input."""
    plan = make_plan(settings)
    if dry_run:
        _report_dry_run(plan, as_json=json)
        return 0
    started = time.perf_counter()
    records = produce(plan, settings, None if json else print_video)
    _report(plan, records, time.perf_counter() - started, as_json=json)
    return 0


def generate(settings: GenerateSettings) -> list[Record]:
    """Make the videos that are missing under `settings.out`, with one loaded pipeline.

    Returns:
        The records of the videos that were made, as the manifest in each folder has them. Finished videos of the same
        settings are kept and are not in it.

    Raises:
        UserError: a setting does not fit the model or the machine, a file is missing or damaged, a finished video has
            other settings, the output cannot be written, or the model cannot be loaded or made sparse.
    """
    return produce(make_plan(settings), settings)


def produce(
    plan: Plan, settings: GenerateSettings, on_video: Callable[[Job, Record], None] | None = None
) -> list[Record]:
    """Make the plan's missing videos; their records, each given to `on_video` as it comes.

    Raises:
        UserError: the output cannot be written, or the model cannot be loaded or made sparse.
    """
    if plan.pending:
        check_available(plan.model)
    for folder in {job.folder for job in plan.jobs}:
        make_writable(folder)
    for job in set(plan.jobs) - set(plan.pending):
        # Of a run that was killed after it had finished this video and before it gave it back.
        remove_dead_claim(job.folder / job.name)
    skipped = len(plan.jobs) - len(plan.pending)
    if skipped:
        print(f"{skipped} of {len(plan.jobs)} videos are already finished and kept", file=sys.stderr)
    return _make_videos(plan, settings, on_video) if plan.pending else []


def _remove_leftovers(job: Job) -> None:
    """What a killed run left half written."""
    for suffix in (".mp4", ".mkv"):
        partial_name(job.folder / f"{job.name}{suffix}").unlink(missing_ok=True)


def _made_meanwhile(plan: Plan, job: Job, *, overwrite: bool) -> bool:
    """Whether another run has made this very video since the plan was made.

    Raises:
        UserError: it has made another one under this name, which is not written over.
    """
    key = job.prompt.id, job.seed
    record = read_manifest(job.folder).get(key)
    if record is None or (not overwrite and record == plan.found.get((job.folder, *key))):
        return False
    if changes(plan, job, record):
        raise UserError(f"{job.path}: another run has made another video of this name; use another --out")
    return True


def _make_videos(
    plan: Plan, settings: GenerateSettings, on_video: Callable[[Job, Record], None] | None
) -> list[Record]:
    import torch

    from xattn_video_pipelines.video.progress import VideoProgress

    pipe = runner.load_pipeline(
        plan.model,
        plan.settings,
        device=plan.device,
        dtype=plan.dtype,
        offload=settings.offload,
        compile_blocks=settings.compile,
    )
    # of the device that is asked for: it need not be the current one
    on_device = partial(torch.accelerator.synchronize, plan.device)
    synchronize = on_device if plan.device.type != "cpu" else lambda: None
    # A model that cannot be sparse says so before hours of dense videos.
    for config in dict.fromkeys(job.config for job in plan.pending if job.config is not None):
        runner.attach(pipe, config)
        runner.attach(pipe, None)
    common = _environment(plan, settings)
    records = []
    if settings.overwrite:
        # Only now that there is a model to make them anew with; and all of them, so that the run can be gone on with.
        for folder, jobs in by_folder(plan.pending).items():
            remove_records(folder, {(job.prompt.id, job.seed) for job in jobs})
    with VideoProgress(len(plan.pending), synchronize) as progress:
        pipe.progress_bar = progress.steps
        label, processor = None, None
        for job in plan.pending:
            if job.attention != label:
                label, processor = job.attention, runner.attach(pipe, job.config)
            with claimed(job.folder / job.name):
                _remove_leftovers(job)
                if _made_meanwhile(plan, job, overwrite=settings.overwrite):
                    progress.finish()
                    continue
                record = _make_video(pipe, processor, plan, job, progress, lossless=settings.lossless)
                record |= common
                append_record(job.folder, record)
            records.append(record)
            progress.finish()
            if on_video:
                on_video(job, record)
    return records


def _make_video(pipe: Any, processor: Any, plan: Plan, job: Job, progress: VideoProgress, *, lossless: bool) -> Record:
    import torch

    from xattn_video_pipelines.common.memory import peak_bytes, reset_peak
    from xattn_video_pipelines.video.io import lossless_path, write_video

    progress.start(f"{job.attention}/{job.name}")
    if processor is not None:
        processor.stats.reset()
    reset_peak(plan.device)
    started = time.perf_counter()
    try:
        with runner.floor_attention(pipe) if job.kind == "dense-alt" else contextlib.nullcontext():
            frames = runner.make_frames(pipe, job.prompt, job.seed, plan.settings)
    except torch.OutOfMemoryError:
        advice = "--offload model (or sequential), --dtype bfloat16, fewer frames or a smaller size"
        raise UserError(f"{job.path}: {plan.device} is out of memory; try {advice}") from None
    seconds, peak = time.perf_counter() - started, peak_bytes(plan.device)
    steps = progress.step_seconds
    copy = lossless_path(job.path) if lossless else None
    if copy is not None:
        write_video(copy, frames, plan.settings.fps, lossless=True)
    else:
        # A copy of an earlier run would no longer be of this video.
        lossless_path(job.path).unlink(missing_ok=True)
    write_video(job.path, frames, plan.settings.fps)
    return {
        "id": job.prompt.id,
        "seed": job.seed,
        "file": job.path.name,
        "lossless_file": None if copy is None else copy.name,
        **identity(plan, job),
        "model_name": plan.model.name,
        "tokens": plan.tokens,
        "seconds": round(seconds, 4),
        "seconds_per_step": round(sum(steps) / len(steps), 4) if steps else None,
        "peak_memory_bytes": peak,
        **_density(processor, plan.settings.steps),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def print_video(job: Job, record: Record) -> None:
    """A line on stdout about a video that was made; it does not tear the bars on stderr."""
    from tqdm import tqdm

    line = f"{job.path}  {record['seconds']:.1f} s  density {record['mean_density']:.2f}"
    if job.config is not None and record["mean_density"] == 1.0:
        # Asked for sparse and got dense throughout: say why at once.
        line += f" (dense calls: {', '.join(f'{n} {reason}' for reason, n in record['dense_reasons'].items())})"
    tqdm.write(line, file=sys.stdout)


def _density(processor: Any, steps: int) -> Record:
    """Mean density, density by step, by layer and by both, dense calls by reason; a dense run keeps every block."""
    if processor is None:
        layers: Record = {"density_by_layer": {}, "density_by_layer_and_step": {}}
        return {"mean_density": 1.0, "density_by_step": [1.0] * steps, **layers, "dense_reasons": {}}
    summary = processor.stats.summary()
    steps_done = sorted(summary["density_by_step"])
    return {
        "mean_density": summary["density"],
        "density_by_step": [summary["density_by_step"][step] for step in steps_done],
        # Rounded: a line of the manifest holds up to a hundred layers. None: a layer without a call in a step.
        "density_by_layer": {layer: round(density, 4) for layer, density in summary["density_by_layer"].items()},
        "density_by_layer_and_step": {
            layer: [round(by_step[step], 3) if step in by_step else None for step in steps_done]
            for layer, by_step in summary["density_by_layer_and_step"].items()
        },
        "dense_reasons": summary["dense_calls"],
    }


def _environment(plan: Plan, settings: GenerateSettings) -> Record:
    """Device, versions and commit: the same for every video of a run."""
    from xattn_video_pipelines.common.environment import device_name, source_commit, versions

    return {
        "device": str(plan.device),
        "device_name": device_name(plan.device),
        "offload": settings.offload,
        "compile": settings.compile,
        "versions": versions(("xattn-video", "torch", "triton", "diffusers", "transformers")),
        "commit": source_commit(),
    }


def _report_dry_run(plan: Plan, *, as_json: bool) -> None:
    settings, pending = plan.settings, set(plan.pending)
    document = {
        "dry_run": True,
        "model": plan.model.identity,
        "pipeline": plan.model.pipeline,
        **vars(settings),
        "tokens": plan.tokens,
        "device": str(plan.device),
        "dtype": plan.dtype,
        "videos": [
            {"attention": job.attention, "id": job.prompt.id, "seed": job.seed, "file": str(job.path),
             "status": "to make" if job in pending else "finished"}
            for job in plan.jobs
        ],
    }  # fmt: skip
    if as_json:
        print(dumps(document))
        return
    tokens = "unknown" if plan.tokens is None else f"{plan.tokens:,}"
    print(f"model   {plan.model.identity} ({plan.model.pipeline})")
    print(f"size    {settings.width} x {settings.height}, {settings.num_frames} frames at {settings.fps} a second")
    print(f"tokens  {tokens} video tokens a forward pass, {settings.steps} steps")
    print(f"device  {plan.device}, {plan.dtype}")
    for video in document["videos"]:
        print(f"{video['status']:8}  {video['file']}")
    print(f"{len(pending)} of {len(plan.jobs)} videos to make; nothing was loaded or written")


def _report(plan: Plan, records: list[Record], seconds: float, *, as_json: bool) -> None:
    made = {(record["attention"], record["id"], record["seed"]): record for record in records}
    videos = []
    for job in plan.jobs:
        record = made.get((job.kind, job.prompt.id, job.seed))
        video = {"attention": job.attention, "id": job.prompt.id, "seed": job.seed, "file": str(job.path)}
        video["status"] = "made" if record else "kept"
        videos.append(video | ({key: record[key] for key in ("seconds", "mean_density")} if record else {}))
    if as_json:
        document = {"made": len(records), "kept": len(videos) - len(records), "seconds": round(seconds, 2)}
        print(dumps(document | {"videos": videos}))
        return
    folders = ", ".join(str(folder) for folder in by_folder(plan.jobs))
    print(f"videos: {len(records)} made, {len(videos) - len(records)} kept, in {folders}")
