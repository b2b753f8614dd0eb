"""Load the model once and make the videos of a plan: the part of `generate` that needs weights."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from xattn_video.extras import require
from xattn_video_pipelines.common.batch import Batch, ItemError, Key, is_out_of_memory, note_plan
from xattn_video_pipelines.common.errors import UserError, one_line
from xattn_video_pipelines.common.files import claimed, make_writable, remove_dead_claim
from xattn_video_pipelines.common.terminal import say
from xattn_video_pipelines.video.adaptation import Adaptation
from xattn_video_pipelines.video.lengths import told_of_long_prompts
from xattn_video_pipelines.video.manifest import (
    Record,
    append_record,
    density,
    made_meanwhile,
    remove_records,
    size_and_digest,
)
from xattn_video_pipelines.video.models import Model, ResolvedSettings, check_available, offline_message
from xattn_video_pipelines.video.pictures import load_picture
from xattn_video_pipelines.video.plan import Job, Plan

if TYPE_CHECKING:
    import torch

    from xattn_video import XAttnConfig
    from xattn_video.ops import Call
    from xattn_video_pipelines.video.progress import VideoProgress


# From the fastest to the one that takes least memory of the device.
_OFFLOADS = ("none", "model", "sequential")
_AS_PUBLISHED = Adaptation()


@dataclass(frozen=True)
class Produced:
    """What a run made: the records of its videos, and in `batch` what failed and what is left."""

    records: list[Record]
    batch: Batch


def produce(
    plan: Plan,
    on_video: Callable[[Job, Record], None] | None = None,
    on_pipeline: Callable[[Any], None] | None = None,
) -> Produced:
    """Make the plan's missing videos. One that fails is noted in `failures.jsonl`, and the others are still made.

    Args:
        plan: what is to be made.
        on_video: called with each video that is made and its record.
        on_pipeline: called with the pipeline when it is loaded, before the first video. Not where nothing is missing.

    Raises:
        UserError: the output cannot be written, or the model cannot be loaded or made sparse.
    """
    batch = Batch(plan.given.out, "videos", plan.environment["versions"], plan.given.max_hours)
    if plan.pending and not plan.recipe.model.is_folder:
        check_available(plan.recipe.model)
    for folder in {job.folder for job in plan.jobs}:
        make_writable(folder)
    note_plan(
        plan.given.out,
        "videos",
        list(dict.fromkeys(job.attention for job in plan.jobs)),
        list(dict.fromkeys(job.key for job in plan.jobs)),
    )
    kept = set(plan.jobs) - set(plan.pending)
    for job in kept:
        # Of a run that was killed after it had finished this video and before it gave it back.
        remove_dead_claim(job.folder / job.name)
    if kept:
        say(f"{len(kept)} of {len(plan.jobs)} videos are already finished and kept", sys.stderr, progress=True)
    pending = _with_pictures(batch, batch.in_order(plan.pending, _key))
    return Produced(_make_videos(plan, pending, batch, on_video, on_pipeline) if pending else [], batch)


def _key(job: Job) -> Key:
    return job.attention, *job.key


def _with_pictures(batch: Batch, jobs: Sequence[Job]) -> list[Job]:
    """The jobs without those whose picture cannot be read, which is known before the model is loaded."""
    good = []
    for job in jobs:
        try:
            if job.prompt.image is not None:
                load_picture(job.prompt.image)
            good.append(job)
        except Exception as error:
            batch.note(_key(job), f"{job.attention}/{job.name}", error)
    return good


def _make_videos(
    plan: Plan,
    pending: Sequence[Job],
    batch: Batch,
    on_video: Callable[[Job, Record], None] | None,
    on_pipeline: Callable[[Any], None] | None,
) -> list[Record]:
    import torch

    from xattn_video_pipelines.video.progress import VideoProgress

    given = plan.given
    pipe = load_pipeline(
        plan.recipe.model,
        plan.recipe.settings,
        device=plan.device,
        dtype=plan.dtype,
        offload=given.offload,
        compile_blocks=given.compile,
        adaptation=plan.recipe.adaptation,
    )
    if on_pipeline:
        on_pipeline(pipe)
    for line in told_of_long_prompts(pipe, plan.recipe.model, [job.prompt for job in pending]):
        say(line, sys.stderr)
    maker = _Maker(plan, pipe)
    # Every attention once: a model that cannot be sparse says so before hours of dense videos.
    for config in dict.fromkeys(job.config for job in pending):
        maker.attach(config)
    if given.overwrite:
        # Only now that there is a model to make them with; and all of them, so that the run can be gone on with.
        for folder in {job.folder for job in plan.pending}:
            remove_records(folder, {job.key for job in plan.pending if job.folder == folder})
    # of the device that is asked for: it need not be the current one
    on_device = partial(torch.accelerator.synchronize, plan.device)
    synchronize = on_device if plan.device.type != "cpu" else lambda: None
    records = []
    with VideoProgress(len(pending), synchronize) as progress:
        pipe.progress_bar = progress.steps
        for job in batch.items(pending):
            record: Record | None = None
            with progress.video(f"{job.attention}/{job.name}"), claimed(job.folder / job.name):
                if made_meanwhile(plan.manifests[job.folder], job.path, job.key, job.found, job.identity):
                    continue
                with batch.item(_key(job), f"{job.attention}/{job.name}"):
                    record = maker.make(job, progress)
            if record is not None:
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
    from xattn_video_pipelines.video.progress import VideoProgress

    given, recipe = plan.given, plan.recipe
    if not recipe.model.is_folder:
        check_available(recipe.model)
    pipe = load_pipeline(
        recipe.model,
        recipe.settings,
        device=plan.device,
        dtype=plan.dtype,
        offload=given.offload,
        compile_blocks=False,
        adaptation=recipe.adaptation,
    )
    with VideoProgress(len(plan.pending), lambda: None) as progress:
        attach(pipe, plan.pending[0].config, lambda layer, call: on_call(len(progress.step_seconds), layer, call))
        pipe.progress_bar = progress.steps
        for job in plan.pending:
            with progress.video(job.name):
                try:
                    pipe(**{**_arguments(recipe.model, recipe.settings, job), "output_type": "latent"})
                except Exception as error:
                    # a CPU says so with an exception of no class of its own
                    if not is_out_of_memory(error):
                        raise
                    advice = "--offload model (or sequential), --dtype bfloat16, fewer frames or a smaller size"
                    raise UserError(f"{job.name}: {plan.device} is out of memory; try {advice}") from None
    return pipe


class _Maker:
    """The loaded pipeline, with the attention that it has now and where its weights are kept."""

    def __init__(self, plan: Plan, pipe: Any) -> None:
        from xattn_video.integrations.diffusers import pipeline_transformers

        self._plan, self._pipe = plan, pipe
        self._offload: str = plan.given.offload
        self._transformers = list(pipeline_transformers(pipe).values())
        self._attached: XAttnConfig | None = None
        self._processor: Any = None

    def attach(self, config: XAttnConfig | None) -> None:
        """Have this attention. Raises UserError where the model cannot have it."""
        if config != self._attached:
            self._processor = attach(self._pipe, config)
            self._attached = config

    def make(self, job: Job, progress: VideoProgress) -> Record:
        """Make one video and write it; its record, which is in the manifest then.

        Where the device is out of memory, it is tried once more with less of the weights on it.

        Raises:
            ItemError: the memory does not suffice, the video has NaN or inf, or it cannot be written.
            Exception: whatever else goes wrong in the pipeline.
        """
        tries = 2
        while True:
            tries -= 1
            try:
                return self._make(job, progress)
            except Exception as error:
                self._clear()
                if not is_out_of_memory(error):
                    raise
                more = self._next_offload
                if not tries or more is None:
                    advice = f"{(more and f'--offload {more}, ') or ''}--dtype bfloat16, fewer frames or a smaller size"
                    message = f"{self._plan.device} is out of memory; try {advice}"
                    raise ItemError("out_of_memory", message) from error
            # Only here are the tensors of the failed call gone, because its traceback held them.
            self._offload_to(more)
            progress.forget_steps()

    def _make(self, job: Job, progress: VideoProgress) -> Record:
        from xattn_video_pipelines.common.memory import peak_bytes, reset_peak
        from xattn_video_pipelines.video.io import lossless_path
        from xattn_video_pipelines.video.noise_floor import reversed_keys

        self.attach(job.config)
        plan, processor = self._plan, self._processor
        arguments = _arguments(plan.recipe.model, plan.recipe.settings, job)
        if processor is not None:
            processor.stats.reset()
        with reversed_keys(self._transformers) if job.kind == "dense-alt" else contextlib.nullcontext():
            reset_peak(plan.device)
            started = time.perf_counter()
            # float32 [T, H, W, 3] in [0, 1]
            frames = self._pipe(**arguments).frames[0]
            seconds, peak = time.perf_counter() - started, peak_bytes(plan.device)
        _check_finite(frames)
        settings, steps = plan.recipe.settings, progress.step_seconds
        record = {
            "id": job.prompt.id,
            "seed": job.seed,
            "file": job.path.name,
            "lossless_file": lossless_path(job.path).name if plan.given.lossless else None,
            **job.identity,
            "model_name": plan.recipe.model.name,
            "tokens": plan.recipe.tokens,
            "seconds": round(seconds, 4),
            "seconds_per_step": round(sum(steps) / len(steps), 4) if steps else None,
            "cpu_share": _cpu_share(progress) if plan.device.type == "cpu" else None,
            "peak_memory_bytes": peak,
            **density(None if processor is None else processor.stats.summary(), settings.steps),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            **plan.environment,
            "offload": self._offload,
        }
        try:
            _write(job, frames, settings.fps, lossless=plan.given.lossless)
            record |= size_and_digest(job.path)
            if plan.given.lossless:
                record |= size_and_digest(lossless_path(job.path), "lossless_")
            append_record(job.folder, record)
        except UserError as error:
            raise ItemError("output", str(error)) from error
        return record

    @property
    def _next_offload(self) -> str | None:
        """The next way to keep less on the device; None where there is none, or no device beside the CPU."""
        place = _OFFLOADS.index(self._offload) + 1
        return _OFFLOADS[place] if self._plan.device.type != "cpu" and place < len(_OFFLOADS) else None

    def _offload_to(self, offload: str) -> None:
        from tqdm import tqdm

        device = self._plan.device
        tqdm.write(f"{device} is out of memory: from here on with --offload {offload}", file=sys.stderr)
        # Off and on again: the hooks of offloading and those of sparse attention both go around the model's forward.
        attach(self._pipe, None)
        self._attached, self._processor, self._offload = None, None, offload
        gc.collect()
        _place(self._pipe, device, offload)

    def _clear(self) -> None:
        """Let go of what a failed call left on the device."""
        if self._processor is not None:
            self._processor.forget()
        if self._offload == "model":
            self._pipe.maybe_free_model_hooks()


def _cpu_share(progress: VideoProgress) -> float | None:
    """The share of the time of torch's threads that this process computed in the steps of a video; None without steps.

    A process that has to share the cores gets less.
    """
    import torch

    seconds = sum(progress.step_seconds) * torch.get_num_threads()
    return round(min(progress.cpu_seconds / seconds, 1.0), 4) if seconds else None


def _check_finite(frames: Any) -> None:
    """Raise ItemError for frames `[T, H, W, 3]` with NaN or inf, which no video file can hold."""
    import numpy as np

    for number, frame in enumerate(frames):
        if not np.isfinite(frame).all():
            raise ItemError("not_finite", f"frame {number} of the video has NaN or inf; try another --dtype")


def _write(job: Job, frames: Any, fps: float, *, lossless: bool) -> None:
    """Write the video, and its lossless copy where one is asked for. Raises UserError as `write_video`."""
    from xattn_video_pipelines.video.io import lossless_path, write_video

    copy = lossless_path(job.path)
    if lossless:
        write_video(copy, frames, fps, lossless=True)
    else:
        # A copy of an earlier run would no longer be of this video.
        copy.unlink(missing_ok=True)
    write_video(job.path, frames, fps)


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
        arguments["image"] = load_picture(job.prompt.image)
    return arguments


def load_pipeline(
    model: Model,
    settings: ResolvedSettings,
    *,
    device: torch.device,
    dtype: str,
    offload: str,
    compile_blocks: bool,
    adaptation: Adaptation = _AS_PUBLISHED,
) -> Any:
    """The model's pipeline on its device, with its LoRAs, and with its scheduler's shift and guidance set.

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
        pipe = pipeline_class.from_pretrained(model.source, **{argument: dtypes}, **adaptation.loading(dtype))
    # Checkpoints that are pickles are read as plain tensors only; one that holds more is refused so.
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise UserError(_load_message(model, error)) from None
    _set_flow_shift(pipe, settings.flow_shift)
    if settings.guidance_scale is not None and "guidance_scale" not in model.parameters:
        # HunyuanVideo 1.5 takes guidance from a component and not from the call.
        pipe.guider = pipe.guider.new(guidance_scale=settings.guidance_scale)
    adaptation.apply(pipe)
    if model.vae_tiling:
        pipe.vae.enable_tiling()
    if compile_blocks:
        _compile(pipe, model)
    _place(pipe, device, offload)
    return pipe


def _place(pipe: Any, device: torch.device, offload: str) -> None:
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)


def attach(pipe: Any, config: XAttnConfig | None, on_call: Callable[[str, Call], None] | None = None) -> Any:
    """Switch the pipeline to sparse attention, or with None back to its own; gives the processor or None."""
    from xattn_video import XAttnProcessor

    processor = None if config is None else XAttnProcessor(config, on_call=on_call)
    try:
        pipe.set_attn_processor(processor)
    except ValueError as error:
        raise UserError(f"--attention xattn: {error}") from None
    return processor


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
