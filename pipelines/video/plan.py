"""What `generate` is going to do: every input checked and every missing video found before weights are loaded."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.settings import option_name
from xattn_video_pipelines.video import make as runner
from xattn_video_pipelines.video.manifest import Record, differences, read_manifest
from xattn_video_pipelines.video.models import (
    KNOWN_MODELS,
    Model,
    call_parameters,
    find_model,
    with_pipeline_defaults,
)
from xattn_video_pipelines.video.prompts import Prompt, evenly_spaced, read_prompts
from xattn_video_pipelines.video.settings import GenerateSettings

if TYPE_CHECKING:
    import torch

    from xattn_video import XAttnConfig

    # A folder's name and the settings of its videos; None for dense and dense-alt.
    Labelled = tuple[str, XAttnConfig | None]

_SIZES = ("height", "width", "num_frames")
# What makes a video what it is: a finished one is kept only if all of these are as they would be now.
COMPARED = (
    "prompt", "negative_prompt", "image_sha256", "model", "weights", "height", "width", "num_frames", "fps", "steps",
    "guidance_scale", "guidance_scale_2", "flow_shift", "dtype", "attention", "config",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One video to make: `attention` is its folder's name, `config` None for dense and dense-alt."""

    attention: str
    config: XAttnConfig | None
    prompt: Prompt
    seed: int
    folder: Path

    @property
    def kind(self) -> str:
        """`dense`, `dense-alt` or `xattn`."""
        return self.attention if self.config is None else "xattn"

    @property
    def name(self) -> str:
        return f"{self.prompt.id}-s{self.seed}"

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.mp4"


@dataclass(frozen=True)
class Plan:
    """Everything a run is going to do, known before any weights are loaded."""

    model: Model
    settings: runner.Settings
    device: torch.device
    dtype: str
    jobs: tuple[Job, ...]
    pending: tuple[Job, ...]
    # The records that were there when the plan was made, by folder, id and seed.
    found: Mapping[tuple[Path, str, int], Record]

    @property
    def tokens(self) -> int | None:
        """Video tokens in a forward pass, where the model's geometry is known."""
        size = self.settings
        geometry = self.model.geometry
        return None if geometry is None else geometry.tokens(size.height, size.width, size.num_frames)


def make_plan(settings: GenerateSettings, configs: Sequence[Labelled] | None = None) -> Plan:
    """Check every input and find what is to be made, without loading weights or writing anything.

    Args:
        settings: what is asked for.
        configs: folder names with their settings, in place of those that `settings.attention` asks for.

    Raises:
        UserError: see the message; cheap checks come first.
    """
    prompt_file = read_prompts(settings.prompts)
    if prompt_file.ignored_keys:
        print(
            f"note: {prompt_file.path}: keys without a meaning here: {', '.join(prompt_file.ignored_keys)}",
            file=sys.stderr,
        )
    prompts = _chosen(prompt_file.prompts, settings)
    model = find_model(settings.model)
    resolved = _resolve_settings(model, settings)
    configs = _configs(settings) if configs is None else configs
    for label, _ in configs:
        _check_folder(settings.out, label)
    device = runner.resolve_device(settings.device)
    offload = settings.offload
    if offload != "none" and device.type == "cpu":
        raise UserError(f"--offload {offload} moves weights off an accelerator; with --device cpu there is none")
    if settings.compile and any(label == "dense-alt" for label, _ in configs):
        raise UserError(f"--attention {settings.attention} makes dense-alt videos, which do not go with --compile")
    dtype = runner.resolve_dtype(settings.dtype, device)
    runner.check_prompts(model, prompt_file.path, prompts, call_parameters(model))
    jobs = tuple(
        Job(label, config, prompt, seed, settings.out / label)
        for label, config in configs
        for prompt in prompts
        for seed in (settings.seeds or [prompt.seed or 0])
    )
    manifests = {folder: read_manifest(folder) for folder in {job.folder for job in jobs}}
    found = {(folder, *key): record for folder, records in manifests.items() for key, record in records.items()}
    plan = Plan(model, resolved, device, dtype, jobs, pending=jobs, found=found)
    return plan if settings.overwrite else replace(plan, pending=_pending(plan, lossless=settings.lossless))


def _chosen(prompts: Sequence[Prompt], settings: GenerateSettings) -> list[Prompt]:
    chosen = list(prompts) if settings.sample is None else evenly_spaced(prompts, settings.sample)
    return chosen[: settings.limit]


def _resolve_settings(model: Model, given: GenerateSettings) -> runner.Settings:
    defaults = model.defaults if model.name in KNOWN_MODELS else with_pipeline_defaults(model)

    def value(name: str) -> Any:
        own = getattr(given, name)
        return getattr(defaults, name) if own is None else own

    for name in ("height", "width", "num_frames", "steps"):
        if value(name) is None:
            raise UserError(f"{option_name(name)}: {model.name} ({model.pipeline}) has no default; give one")
    _check_call(model)
    settings = runner.Settings(
        **{name: value(name) for name in ("height", "width", "num_frames", "fps", "steps", "flow_shift")},
        guidance_scale=value("guidance_scale"),
        guidance_scale_2=None if given.guidance_scale is not None else defaults.guidance_scale_2,
    )
    if model.geometry is not None:
        model.geometry.check(settings.height, settings.width, settings.num_frames)
    return settings


def _check_call(model: Model) -> None:
    """Raise UserError for a pipeline that is not called with a prompt, a size and a number of steps."""
    parameters = call_parameters(model)
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        and name not in ("self", "prompt", "image")
    ]
    lacking = [name for name in ("prompt", *_SIZES, "num_inference_steps") if name not in parameters]
    for names, what in ((needed, "needs"), (lacking, "takes no")):
        if names and "kwargs" not in parameters:
            raise UserError(
                f"--model {model.name}: {model.pipeline} {what} {', '.join(names)}, which generate cannot serve; "
                "attach an XAttnProcessor to it in Python"
            )


def _configs(settings: GenerateSettings) -> list[Labelled]:
    config = settings.config
    dense: list[Labelled] = [("dense", None)]
    sparse: list[Labelled] = [(config.label(), config)]
    floor: list[Labelled] = [("dense-alt", None)]
    return {
        "dense": dense,
        "dense-alt": floor,
        "xattn": sparse,
        "both": dense + sparse,
        "all": dense + floor + sparse,
    }[settings.attention]


def _pending(plan: Plan, *, lossless: bool) -> tuple[Job, ...]:
    """The jobs without a finished video. A finished one of other settings is an error, not a surprise."""
    from xattn_video_pipelines.video.io import lossless_path

    pending = []
    for job in plan.jobs:
        record = plan.found.get((job.folder, job.prompt.id, job.seed))
        if record is None or not job.path.is_file():
            pending.append(job)
            continue
        found = changes(plan, job, record)
        if found:
            raise UserError(
                f"{job.path} was made with other settings ({'; '.join(found)}); "
                "use another --out, or --overwrite to make it anew"
            )
        if lossless and not (record.get("lossless_file") and lossless_path(job.path).is_file()):
            pending.append(job)
    return tuple(pending)


def changes(plan: Plan, job: Job, record: Record) -> list[str]:
    """What a record of a job's video says otherwise than the plan does."""
    from xattn_video import XAttnConfig

    wanted = identity(plan, job)
    # Weights that are gone, or were not noted, tell nothing.
    weighed = wanted.get("weights") is not None and record.get("weights") is not None
    # What was no setting then had its default.
    if record.get("config") is not None:
        record = {**record, "config": {**XAttnConfig().to_dict(), **record["config"]}}
    return differences(record, wanted, [name for name in COMPARED if name != "weights" or weighed])


def identity(plan: Plan, job: Job) -> Record:
    """The settings that decide what the video looks like (`COMPARED`)."""
    settings = plan.settings
    return {
        "prompt": job.prompt.text,
        "negative_prompt": job.prompt.negative_prompt,
        "image": None if job.prompt.image is None else job.prompt.image.name,
        "image_sha256": None if job.prompt.image is None else _digest(job.prompt.image),
        "model": plan.model.identity,
        **({} if plan.model.weights is None else {"weights": plan.model.weights}),
        "height": settings.height,
        "width": settings.width,
        "num_frames": settings.num_frames,
        "fps": settings.fps,
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "guidance_scale_2": settings.guidance_scale_2,
        "flow_shift": settings.flow_shift,
        "dtype": plan.dtype,
        "attention": job.kind,
        "config": None if job.config is None else job.config.to_dict(),
    }


@cache
def _digest(path: Path) -> str:
    """A picture is known by its bytes: its path differs by where a run starts, and a file can be replaced."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_folder(out: Path, label: str) -> None:
    """Refuse, before anything is loaded, an output path that runs through a file."""
    folder = out / label
    for path in (folder, *folder.parents):
        if path.is_dir():
            return
        if path.exists() or path.is_symlink():
            raise UserError(f"--out {out}: {path} is not a folder")


def by_folder(jobs: Sequence[Job]) -> dict[Path, list[Job]]:
    """The jobs of each output folder, in order."""
    folders: dict[Path, list[Job]] = {}
    for job in jobs:
        folders.setdefault(job.folder, []).append(job)
    return folders
