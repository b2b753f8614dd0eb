"""What `generate` is going to do: every input checked and every missing video found before weights are loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xattn_video_pipelines.common.environment import (
    device_name,
    resolve_device,
    resolve_dtype,
    source_commit,
    versions,
)
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import check_stays
from xattn_video_pipelines.common.terminal import say
from xattn_video_pipelines.video.manifest import Key, Manifest, Record, is_finished
from xattn_video_pipelines.video.models import Recipe, check_served, settle
from xattn_video_pipelines.video.prompts import Prompt, choose, completed, prompts_of_texts, read_prompts
from xattn_video_pipelines.video.settings import GenerateSettings

if TYPE_CHECKING:
    import torch

    from xattn_video import XAttnConfig

    # A folder's name and the settings of its videos; None for dense and dense-alt.
    Labelled = tuple[str, XAttnConfig | None]


@dataclass(frozen=True, eq=False)
class Job:
    """One video to make.

    `attention` is its folder's name, `config` None for dense and dense-alt. `identity` is what decides what the video
    looks like, as its record says it. `found` is the record that the manifest had of it when the plan was made.
    """

    attention: str
    config: XAttnConfig | None
    prompt: Prompt
    seed: int
    folder: Path
    identity: Record
    found: Record | None

    @property
    def kind(self) -> str:
        """`dense`, `dense-alt` or `xattn`."""
        return str(self.identity["attention"])

    @property
    def key(self) -> Key:
        return self.prompt.id, self.seed

    @property
    def name(self) -> str:
        return f"{self.prompt.id}-s{self.seed}"

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.mp4"


@dataclass(frozen=True)
class Plan:
    """Everything a run is going to do, known before any weights are loaded.

    `environment` is what every record says of the machine, the versions and the commit. `pending` are those of `jobs`
    that are to be made, in the order in which they are made. `manifests` are those of the folders, read so far.
    """

    given: GenerateSettings
    recipe: Recipe
    device: torch.device
    dtype: str
    environment: Record
    jobs: tuple[Job, ...]
    pending: tuple[Job, ...]
    manifests: dict[Path, Manifest]


def make_plan(
    settings: GenerateSettings, labels: Sequence[Labelled] | Callable[[int], Sequence[Labelled]] | None = None
) -> Plan:
    """Check every input and find what is to be made, without loading weights or writing anything.

    Args:
        settings: what is asked for.
        labels: folder names with their settings, in place of those that `settings.attention` asks for; or what gives
            them for a number of denoising steps.

    Raises:
        UserError: see the message; cheap checks come first.
    """
    prompts = _prompts(settings)
    recipe = settle(settings)
    if any(prompt.image is not None for prompt in prompts):
        # Before the images are read.
        check_served(recipe.model, settings.prompts, prompts)
    if labels is None:
        labels = _labels(settings)
    elif callable(labels):
        labels = labels(recipe.settings.steps)
    folders = {label: settings.out / label for label, _ in labels}
    for folder in folders.values():
        _check_folder(settings.out, folder)
    device = resolve_device(settings.device)
    if settings.offload != "none" and device.type == "cpu":
        raise UserError(
            f"--offload {settings.offload} moves weights off an accelerator; with --device cpu there is none"
        )
    recipe.adaptation.check_place(device, settings.offload)
    dtype = resolve_dtype(settings.dtype, device)
    environment = {
        "device": str(device),
        "device_name": device_name(device),
        "offload": settings.offload,
        "compile": settings.compile,
        "versions": versions(("xattn-video", "torch", "triton", "diffusers", "transformers")),
        "commit": source_commit(),
    }
    manifests = {folder: Manifest(folder) for folder in folders.values()}
    finished = {label: manifests[folder].records() for label, folder in folders.items()}
    jobs = []
    for label, config in labels:
        attention: Record = {"attention": label, "config": None}
        if config is not None:
            attention = {"attention": "xattn", "config": config.for_videos().to_dict()}
        for prompt in prompts:
            identity = {**prompt.identity, **recipe.identity, "dtype": dtype, **attention}
            for seed in settings.seeds or (prompt.seed or 0,):
                # The records of videos that are made again are removed before the first one is made.
                found = None if settings.overwrite else finished[label].get((prompt.id, seed))
                jobs.append(Job(label, config, prompt, seed, folders[label], identity, found))
    lossless = settings.lossless
    pending = [
        job
        for job in jobs
        if job.found is None or not is_finished(job.path, job.found, job.identity, lossless=lossless)
    ]
    if pending:
        # Only here where there are no images: a run with nothing left to make ends without the seconds that this takes.
        check_served(recipe.model, settings.prompts, prompts)
    return Plan(settings, recipe, device, dtype, environment, tuple(jobs), tuple(pending), manifests)


def _prompts(settings: GenerateSettings) -> list[Prompt]:
    """The prompts that the run is for. Raises UserError as `read_prompts`, `prompts_of_texts` and `completed`."""
    if settings.prompts is None:
        found = prompts_of_texts(settings.prompt)
    else:
        prompt_file = read_prompts(settings.prompts)
        found = prompt_file.prompts
        if prompt_file.ignored_keys:
            ignored = ", ".join(prompt_file.ignored_keys)
            say(f"note: {prompt_file.path}: keys without a meaning here: {ignored}", sys.stderr)
    return completed(choose(found, settings.sample, settings.limit), settings.image, settings.negative_prompt)


def _labels(settings: GenerateSettings) -> list[Labelled]:
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


def _check_folder(out: Path, folder: Path) -> None:
    """Refuse, before anything is loaded, an output path that runs through a file, or a link that leads out of it."""
    check_stays(folder, out)
    for path in (folder, *folder.parents):
        if path.is_dir():
            return
        if path.exists() or path.is_symlink():
            raise UserError(f"--out {out}: {path} is not a folder")
