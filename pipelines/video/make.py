"""Load the model once and make the videos of a plan: the part of `generate` that needs weights."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xattn_video.extras import require
from xattn_video_pipelines.common.errors import UserError, one_line
from xattn_video_pipelines.common.files import claimed, make_writable, remove_dead_claim, remove_partial
from xattn_video_pipelines.video.manifest import (
    Record,
    append_record,
    density,
    made_meanwhile,
    remove_records,
)
from xattn_video_pipelines.video.models import Model, ResolvedSettings, check_available, offline_message
from xattn_video_pipelines.video.plan import Job, Plan

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from xattn_video import XAttnConfig
    from xattn_video.ops import Call
    from xattn_video_pipelines.video.progress import VideoProgress


def produce(
    plan: Plan,
    on_video: Callable[[Job, Record], None] | None = None,
    on_pipeline: Callable[[Any], None] | None = None,
) -> list[Record]:
    """Make the plan's missing videos.

    Args:
        plan: what is to be made.
        on_video: called with each video that is made and its record.
        on_pipeline: called with the pipeline when it is loaded, before the first video. Not where nothing is missing.

    Returns:
        the records of the videos that were made.

    Raises:
        UserError: the output cannot be written, or the model cannot be loaded or made sparse.
    """
    if plan.pending and not plan.recipe.model.is_folder:
        check_available(plan.recipe.model)
    for folder in {job.folder for job in plan.jobs}:
        make_writable(folder)
    kept = set(plan.jobs) - set(plan.pending)
    for job in kept:
        # Of a run that was killed after it had finished this video and before it gave it back.
        remove_dead_claim(job.folder / job.name)
    if kept:
        print(f"{len(kept)} of {len(plan.jobs)} videos are already finished and kept", file=sys.stderr)
    return _make_videos(plan, on_video, on_pipeline) if plan.pending else []


def _make_videos(
    plan: Plan, on_video: Callable[[Job, Record], None] | None, on_pipeline: Callable[[Any], None] | None
) -> list[Record]:
    import torch

    from xattn_video.integrations.diffusers import pipeline_transformers
    from xattn_video_pipelines.video.progress import VideoProgress

    given, recipe = plan.given, plan.recipe
    pipe = load_pipeline(
        recipe.model,
        recipe.settings,
        device=plan.device,
        dtype=plan.dtype,
        offload=given.offload,
        compile_blocks=given.compile,
    )
    if on_pipeline:
        on_pipeline(pipe)
    # Every attention once: a model that cannot be sparse says so before hours of dense videos.
    for config in dict.fromkeys(job.config for job in plan.pending):
        attached, processor = config, attach(pipe, config)
    transformers = list(pipeline_transformers(pipe).values())
    if given.overwrite:
        # Only now that there is a model to make them with; and all of them, so that the run can be gone on with.
        for folder in {job.folder for job in plan.pending}:
            remove_records(folder, {job.key for job in plan.pending if job.folder == folder})
    # of the device that is asked for: it need not be the current one
    on_device = partial(torch.accelerator.synchronize, plan.device)
    synchronize = on_device if plan.device.type != "cpu" else lambda: None
    records = []
    with VideoProgress(len(plan.pending), synchronize) as progress:
        pipe.progress_bar = progress.steps
        for job in plan.pending:
            if job.config != attached:
                attached, processor = job.config, attach(pipe, job.config)
            with progress.video(f"{job.attention}/{job.name}"), claimed(job.folder / job.name):
                # What a killed run left half written.
                for suffix in (".mp4", ".mkv"):
                    remove_partial(job.path.with_suffix(suffix))
                if made_meanwhile(job.path, job.key, job.found, job.identity):
                    continue
                record = _make_video(pipe, transformers, processor, plan, job, progress)
            records.append(record)
            if on_video:
                on_video(job, record)
    return records


def observe(plan: Plan, on_call: Callable[[int, str, Call], None]) -> Any:
    """Run the pending videos of a plan, all of one configuration, up to their latents; nothing is decoded or written.

    Args:
        plan: what is to be run.
        on_call: `on_call(step, layer, call)` sees each sparse call before it is computed, as of `XAttnProcessor`; steps
            count from 0 in each video.

    Returns:
        the pipeline that ran.

    Raises:
        UserError: the model cannot be loaded or made sparse, or the device is out of memory.
    """
    import torch

    from xattn_video_pipelines.video.progress import VideoProgress

    given, recipe = plan.given, plan.recipe
    if not recipe.model.is_folder:
        check_available(recipe.model)
    pipe = load_pipeline(
        recipe.model, recipe.settings, device=plan.device, dtype=plan.dtype, offload=given.offload, compile_blocks=False
    )
    with VideoProgress(len(plan.pending), lambda: None) as progress:
        attach(pipe, plan.pending[0].config, lambda layer, call: on_call(len(progress.step_seconds), layer, call))
        pipe.progress_bar = progress.steps
        for job in plan.pending:
            with progress.video(job.name):
                try:
                    pipe(**{**_arguments(recipe.model, recipe.settings, job), "output_type": "latent"})
                except torch.OutOfMemoryError:
                    advice = "--offload model (or sequential), --dtype bfloat16, fewer frames or a smaller size"
                    raise UserError(f"{job.name}: {plan.device} is out of memory; try {advice}") from None
    return pipe


def _make_video(
    pipe: Any, transformers: list[torch.nn.Module], processor: Any, plan: Plan, job: Job, progress: VideoProgress
) -> Record:
    """Make one video and write it; its record, which is in the manifest then."""
    import torch

    from xattn_video_pipelines.common.memory import peak_bytes, reset_peak
    from xattn_video_pipelines.video.io import lossless_path, write_video
    from xattn_video_pipelines.video.noise_floor import reversed_keys

    arguments = _arguments(plan.recipe.model, plan.recipe.settings, job)
    if processor is not None:
        processor.stats.reset()
    try:
        with reversed_keys(transformers) if job.kind == "dense-alt" else contextlib.nullcontext():
            reset_peak(plan.device)
            started = time.perf_counter()
            # float32 [T, H, W, 3] in [0, 1]
            frames = pipe(**arguments).frames[0]
            seconds, peak = time.perf_counter() - started, peak_bytes(plan.device)
    except torch.OutOfMemoryError:
        advice = "--offload model (or sequential), --dtype bfloat16, fewer frames or a smaller size"
        raise UserError(f"{job.path}: {plan.device} is out of memory; try {advice}") from None
    settings, steps = plan.recipe.settings, progress.step_seconds
    copy = lossless_path(job.path)
    if plan.given.lossless:
        write_video(copy, frames, settings.fps, lossless=True)
    else:
        # A copy of an earlier run would no longer be of this video.
        copy.unlink(missing_ok=True)
    write_video(job.path, frames, settings.fps)
    record = {
        "id": job.prompt.id,
        "seed": job.seed,
        "file": job.path.name,
        "lossless_file": copy.name if plan.given.lossless else None,
        **job.identity,
        "model_name": plan.recipe.model.name,
        "tokens": plan.recipe.tokens,
        "seconds": round(seconds, 4),
        "seconds_per_step": round(sum(steps) / len(steps), 4) if steps else None,
        "peak_memory_bytes": peak,
        **density(None if processor is None else processor.stats.summary(), settings.steps),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **plan.environment,
    }
    append_record(job.folder, record)
    return record


def _arguments(model: Model, settings: ResolvedSettings, job: Job) -> dict[str, Any]:
    """What the pipeline is called with for one video.

    The noise comes from a CPU generator of this video's own, so it depends neither on other videos nor on the
    attention nor on the device.
    """
    import torch

    arguments: dict[str, Any] = {
        "prompt": job.prompt.text,
        "height": settings.height,
        "width": settings.width,
        "num_frames": settings.num_frames,
        "num_inference_steps": settings.steps,
        "generator": torch.Generator("cpu").manual_seed(job.seed),
        "output_type": "np",
    }
    if "guidance_scale" in model.parameters and settings.guidance_scale is not None:
        arguments["guidance_scale"] = settings.guidance_scale
    if "frame_rate" in model.parameters:
        # LTX is told the speed of the video.
        arguments["frame_rate"] = settings.fps
    if settings.guidance_scale_2 is not None:
        arguments["guidance_scale_2"] = settings.guidance_scale_2
    if job.prompt.negative_prompt is not None:
        arguments["negative_prompt"] = job.prompt.negative_prompt
    if job.prompt.image is not None:
        arguments["image"] = _load_image(job.prompt.image)
    return arguments


def load_pipeline(
    model: Model, settings: ResolvedSettings, *, device: torch.device, dtype: str, offload: str, compile_blocks: bool
) -> Any:
    """The model's pipeline on its device, with its scheduler's shift and guidance set.

    Raises:
        UserError: the weights are neither here nor reachable, the folder is broken, or an option does not go
            with this model or device.
    """
    import torch
    from safetensors import SafetensorError

    dtypes: dict[str, torch.dtype] = {"default": getattr(torch, dtype)}
    if dtype != "float32":
        dtypes |= {part: getattr(torch, name) for part, name in model.dtypes.items()}
    # Before the minutes that loading and the first video take, and not when that video is written.
    require("generate", "imageio_ffmpeg")
    pipeline_class = model.pipeline_class
    # diffusers renamed the argument in 0.40.
    major, minor = (int(number) for number in metadata.version("diffusers").split(".")[:2])
    argument = "dtype" if (major, minor) >= (0, 40) else "torch_dtype"
    try:
        pipe = pipeline_class.from_pretrained(model.source, **{argument: dtypes})
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(_load_message(model, error)) from None
    _set_flow_shift(pipe, settings.flow_shift)
    if settings.guidance_scale is not None and "guidance_scale" not in model.parameters:
        # HunyuanVideo 1.5 takes guidance from a component and not from the call.
        pipe.guider = pipe.guider.new(guidance_scale=settings.guidance_scale)
    if model.vae_tiling:
        pipe.vae.enable_tiling()
    if compile_blocks:
        _compile(pipe, model)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def attach(pipe: Any, config: XAttnConfig | None, on_call: Callable[[str, Call], None] | None = None) -> Any:
    """Switch the pipeline to sparse attention, or with None back to its own; gives the processor or None."""
    from xattn_video import XAttnProcessor

    processor = None if config is None else XAttnProcessor(config, on_call=on_call)
    try:
        pipe.set_attn_processor(processor)
    except ValueError as error:
        raise UserError(f"--attention xattn: {error}") from None
    return processor


def _load_image(path: Path) -> Image:
    from PIL import Image, ImageOps

    try:
        # Upright: photographs of phones say beside their pixels how they are to be turned.
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except OSError as error:
        raise UserError(f"{path}: damaged image: {one_line(error)}") from None


def _set_flow_shift(pipe: Any, flow_shift: float | None) -> None:
    if flow_shift is None:
        return
    config = pipe.scheduler.config
    # UniPC and DPM call it flow_shift, flow-match Euler calls it shift.
    name = next((name for name in ("flow_shift", "shift") if name in config), None)
    if name is None:
        raise UserError(f"--flow-shift: the scheduler {type(pipe.scheduler).__name__} has no flow shift")
    pipe.scheduler = type(pipe.scheduler).from_config(config, **{name: flow_shift})


def _compile(pipe: Any, model: Model) -> None:
    parts = [part for part in pipe.components.values() if getattr(part, "_repeated_blocks", None)]
    if not parts:
        raise UserError(f"--compile: {model.name} has no part with repeated blocks to compile")
    for part in parts:
        part.compile_repeated_blocks(fullgraph=True)


def _load_message(model: Model, error: Exception) -> str:
    if not model.is_folder:
        return offline_message(model.source, error)
    return f"--model {model.name}: the folder cannot be loaded: {one_line(error, 200)}"
