"""`xattn-video generate`: a prompt file to videos, dense, sparse or both, resumable at any video."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import runner
from pipelines.errors import UserError
from pipelines.manifest import Record, append_record, differences, read_manifest, remove_records
from pipelines.models import KNOWN_MODELS, Model, call_parameters, find_model, with_pipeline_defaults
from pipelines.prompts import MAX_SEED, Prompt, evenly_spaced, read_prompts

if TYPE_CHECKING:
    from pipelines.progress import VideoProgress
    from xattn_video import XAttnConfig

EXAMPLE = """\
example:
  xattn-video generate --model wan2.1-1.3b --prompts prompts.txt --attention both --out out
  xattn-video compare out/dense out/xattn-s8-t0.90-w5
"""

# What makes a video what it is: a finished one is kept only if all of these are as they would be now.
COMPARED = (
    "prompt", "negative_prompt", "image", "model", "height", "width", "num_frames", "fps", "steps",
    "guidance_scale", "guidance_scale_2", "flow_shift", "dtype", "attention", "config",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One video to make: `attention` is its folder's name, `config` None for dense."""

    attention: str
    config: XAttnConfig | None
    prompt: Prompt
    seed: int
    folder: Path

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
    device: Any
    dtype: str
    jobs: tuple[Job, ...]
    pending: tuple[Job, ...]

    @property
    def tokens(self) -> int | None:
        """Video tokens in a forward pass, where the model's geometry is known."""
        size = self.settings
        geometry = self.model.geometry
        return None if geometry is None else geometry.tokens(size.height, size.width, size.num_frames)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `xattn-video generate`."""
    parser.add_argument("--model", required=True, help=f"{', '.join(KNOWN_MODELS)}; or a local folder; or a Hub id")
    parser.add_argument("--prompts", required=True, type=Path, metavar="FILE", help=".txt or .jsonl")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="default: out")

    group = parser.add_argument_group("attention")
    group.add_argument("--attention", choices=("dense", "xattn", "both"), default="xattn", help="default: xattn")
    group.add_argument("--threshold", type=float, help="share of the score mass to keep, in (0, 1]; default: 0.9")
    group.add_argument("--stride", type=int, help="antidiagonal stride, a power of two; default: 8")
    group.add_argument("--block-size", type=int, help="tokens a block, a multiple of the stride; default: 128")
    group.add_argument("--warmup-steps", type=int, help="first denoising steps that stay dense; default: 5")
    group.add_argument("--min-tokens", type=int, help="shorter sequences stay dense; default: 1024")

    group = parser.add_argument_group("video (defaults: the model's own)")
    group.add_argument("--steps", type=int, help="denoising steps")
    group.add_argument("--guidance-scale", type=float)
    group.add_argument("--flow-shift", type=float, help="shift of the scheduler's noise levels")
    group.add_argument("--height", type=int, help="pixels")
    group.add_argument("--width", type=int, help="pixels")
    group.add_argument("--num-frames", type=int)
    group.add_argument("--fps", type=int, help="frames a second of the file")
    group.add_argument("--lossless", action="store_true", help="also write an FFV1 .mkv copy, for measuring")

    group = parser.add_argument_group("which videos")
    group.add_argument(
        "--seeds", type=int, nargs="+", metavar="SEED",
        help="a video a prompt for each; default: the prompt's own seed, else 0",
    )  # fmt: skip
    group.add_argument("--sample", type=int, metavar="N", help="N prompts, evenly spaced over the file")
    group.add_argument("--limit", type=int, metavar="N", help="the first N prompts (of the sample)")
    group.add_argument("--overwrite", action="store_true", help="make finished videos anew")
    group.add_argument("--dry-run", action="store_true", help="say what would be made, load nothing")

    group = parser.add_argument_group("machine")
    group.add_argument("--dtype", choices=runner.DTYPES, default="auto", help="default: auto")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, xpu, mps; default: auto")
    group.add_argument("--offload", choices=runner.OFFLOADS, default="none", help="CPU offload; default: none")
    group.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks")
    group.add_argument("--json", action="store_true", help="results as one JSON document on the last line")


def run(args: argparse.Namespace) -> int:
    """Make the videos that are missing. Returns 0; raises UserError for bad input."""
    plan = make_plan(args)
    if args.dry_run:
        _report_dry_run(plan, as_json=args.json)
        return 0
    for folder in {job.folder for job in plan.jobs}:
        _make_writable(folder)
    _remove_leftovers(plan.pending)
    if args.overwrite:
        for folder, jobs in _by_folder(plan.pending).items():
            remove_records(folder, {(job.prompt.id, job.seed) for job in jobs})
    skipped = len(plan.jobs) - len(plan.pending)
    if skipped:
        print(f"{skipped} of {len(plan.jobs)} videos are already finished and kept", file=sys.stderr)
    started = time.perf_counter()
    records = _make_videos(plan, args) if plan.pending else []
    _report(plan, records, time.perf_counter() - started, as_json=args.json)
    return 0


def make_plan(args: argparse.Namespace) -> Plan:
    """Check every input and find what is to be made, without loading weights or writing anything.

    Raises:
        UserError: see the message; cheap checks come first.
    """
    prompt_file = read_prompts(args.prompts)
    if prompt_file.ignored_keys:
        print(
            f"note: {prompt_file.path}: keys without a meaning here: {', '.join(prompt_file.ignored_keys)}",
            file=sys.stderr,
        )
    prompts = _chosen(prompt_file.prompts, args)
    seeds = _checked_seeds(args.seeds)
    model = find_model(args.model)
    settings = _resolve_settings(model, args)
    configs = _configs(args)
    _check_folder(args.out)
    device = runner.resolve_device(args.device)
    dtype = runner.resolve_dtype(args.dtype, device)
    runner.check_prompts(model, prompt_file.path, prompts, call_parameters(model))
    jobs = tuple(
        Job(label, config, prompt, seed, args.out / label)
        for label, config in configs
        for prompt in prompts
        for seed in (seeds or [prompt.seed or 0])
    )
    plan = Plan(model, settings, device, dtype, jobs, pending=jobs)
    return plan if args.overwrite else replace(plan, pending=_pending(plan, lossless=args.lossless))


def _chosen(prompts: Sequence[Prompt], args: argparse.Namespace) -> list[Prompt]:
    for name in ("sample", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be 1 or more, got {value}")
    chosen = list(prompts) if args.sample is None else evenly_spaced(prompts, args.sample)
    return chosen[: args.limit]


def _checked_seeds(seeds: list[int] | None) -> list[int]:
    for seed in seeds or []:
        if not 0 <= seed <= MAX_SEED:
            raise UserError(f"--seeds must be integers from 0 to 2**63 - 1, got {seed}")
    if len(set(seeds or [])) != len(seeds or []):
        raise UserError(f"--seeds must differ, got {' '.join(map(str, seeds or []))}")
    return seeds or []


def _resolve_settings(model: Model, args: argparse.Namespace) -> runner.Settings:
    for name in ("height", "width", "num_frames", "fps", "steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    for name in ("guidance_scale", "flow_shift"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be a number from 0, got {value}")
    defaults = model.defaults if model.name in KNOWN_MODELS else with_pipeline_defaults(model)

    def value(name: str) -> Any:
        given = getattr(args, name)
        return getattr(defaults, name) if given is None else given

    for name in ("height", "width", "num_frames", "steps"):
        if value(name) is None:
            raise UserError(f"--{name.replace('_', '-')}: {model.name} ({model.pipeline}) has no default; give one")
    settings = runner.Settings(
        **{name: value(name) for name in ("height", "width", "num_frames", "fps", "steps", "flow_shift")},
        guidance_scale=value("guidance_scale"),
        guidance_scale_2=None if args.guidance_scale is not None else defaults.guidance_scale_2,
    )
    if model.geometry is not None:
        model.geometry.check(settings.height, settings.width, settings.num_frames)
    return settings


def _configs(args: argparse.Namespace) -> list[tuple[str, XAttnConfig | None]]:
    from xattn_video import XAttnConfig

    names = ("threshold", "stride", "block_size", "warmup_steps", "min_tokens")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    try:
        config = XAttnConfig(**given)
    except ValueError as error:
        raise UserError(str(error)) from None
    dense: list[tuple[str, XAttnConfig | None]] = [("dense", None)]
    sparse: list[tuple[str, XAttnConfig | None]] = [(config.label(), config)]
    return {"dense": dense, "xattn": sparse, "both": dense + sparse}[args.attention]


def _pending(plan: Plan, *, lossless: bool) -> tuple[Job, ...]:
    """The jobs without a finished video. A finished one of other settings is an error, not a surprise."""
    from pipelines.video_io import lossless_path

    manifests = {folder: read_manifest(folder) for folder in {job.folder for job in plan.jobs}}
    pending = []
    for job in plan.jobs:
        record = manifests[job.folder].get((job.prompt.id, job.seed))
        if record is None or not job.path.is_file():
            pending.append(job)
            continue
        found = differences(record, _identity(plan, job), COMPARED)
        if found:
            raise UserError(
                f"{job.path} was made with other settings ({'; '.join(found)}); "
                "use another --out, or --overwrite to make it anew"
            )
        if lossless and not lossless_path(job.path).is_file():
            pending.append(job)
    return tuple(pending)


def _identity(plan: Plan, job: Job) -> Record:
    """The settings that decide what the video looks like (`COMPARED`)."""
    settings = plan.settings
    return {
        "prompt": job.prompt.text,
        "negative_prompt": job.prompt.negative_prompt,
        "image": None if job.prompt.image is None else str(job.prompt.image),
        "model": plan.model.source,
        "height": settings.height,
        "width": settings.width,
        "num_frames": settings.num_frames,
        "fps": settings.fps,
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "guidance_scale_2": settings.guidance_scale_2,
        "flow_shift": settings.flow_shift,
        "dtype": plan.dtype,
        "attention": "dense" if job.config is None else "xattn",
        "config": None if job.config is None else job.config.to_dict(),
    }


def _check_folder(out: Path) -> None:
    """Refuse, before anything is loaded, an output path that runs through a file."""
    for path in (out, *out.parents):
        if path.is_dir():
            return
        if path.exists() or path.is_symlink():
            raise UserError(f"--out {out}: {path} is not a folder")


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--out: cannot write to {folder}: {error.strerror}") from None


def _remove_leftovers(jobs: Sequence[Job]) -> None:
    """What a killed run left half written. Only of videos about to be made: another run may share the folder."""
    for job in jobs:
        for suffix in (".mp4", ".mkv"):
            (job.folder / f".{job.name}.partial{suffix}").unlink(missing_ok=True)


def _by_folder(jobs: Sequence[Job]) -> dict[Path, list[Job]]:
    folders: dict[Path, list[Job]] = {}
    for job in jobs:
        folders.setdefault(job.folder, []).append(job)
    return folders


def _make_videos(plan: Plan, args: argparse.Namespace) -> list[Record]:
    import torch

    from pipelines.progress import VideoProgress

    pipe = runner.load_pipeline(
        plan.model,
        plan.settings,
        device=plan.device,
        dtype=plan.dtype,
        offload=args.offload,
        compile_blocks=args.compile,
    )
    synchronize = torch.accelerator.synchronize if plan.device.type != "cpu" else lambda: None
    common = _environment(plan, args)
    records = []
    with VideoProgress(len(plan.pending), synchronize) as progress:
        pipe.progress_bar = progress.steps
        for jobs in _by_folder(plan.pending).values():
            processor = runner.attach(pipe, jobs[0].config)
            for job in jobs:
                record = _make_video(pipe, processor, plan, job, progress, lossless=args.lossless)
                record |= common
                append_record(job.folder, record)
                records.append(record)
                progress.finish()
                if not args.json:
                    progress.print(f"{job.path}  {record['seconds']:.1f} s  density {record['mean_density']:.2f}")
    return records


def _make_video(pipe: Any, processor: Any, plan: Plan, job: Job, progress: VideoProgress, *, lossless: bool) -> Record:
    from pipelines.video_io import lossless_path, write_video

    progress.start(f"{job.attention}/{job.name}")
    if processor is not None:
        processor.stats.reset()
    started = time.perf_counter()
    frames = runner.make_frames(pipe, job.prompt, job.seed, plan.settings)
    seconds = time.perf_counter() - started
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
        **_identity(plan, job),
        "model_name": plan.model.name,
        "tokens": plan.tokens,
        "seconds": round(seconds, 4),
        "seconds_per_step": round(sum(steps) / len(steps), 4) if steps else None,
        **_density(processor, plan.settings.steps),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _density(processor: Any, steps: int) -> Record:
    """Mean density, density by step and dense calls by reason; a dense run keeps every block."""
    if processor is None:
        return {"mean_density": 1.0, "density_by_step": [1.0] * steps, "dense_reasons": {}}
    summary = processor.stats.summary()
    return {
        "mean_density": summary["density"],
        "density_by_step": [summary["density_by_step"][step] for step in sorted(summary["density_by_step"])],
        "dense_reasons": summary["dense_calls"],
    }


def _environment(plan: Plan, args: argparse.Namespace) -> Record:
    """Device, versions and commit: the same for every video of a run."""
    from pipelines.environment import device_name, source_commit, versions

    return {
        "device": str(plan.device),
        "device_name": device_name(plan.device),
        "offload": args.offload,
        "compile": args.compile,
        "versions": versions(("xattn-video", "torch", "triton", "diffusers", "transformers")),
        "commit": source_commit(),
    }


def _report_dry_run(plan: Plan, *, as_json: bool) -> None:
    settings, pending = plan.settings, set(plan.pending)
    document = {
        "dry_run": True,
        "model": plan.model.source,
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
        print(json.dumps(document))
        return
    tokens = "unknown" if plan.tokens is None else f"{plan.tokens:,}"
    print(f"model   {plan.model.source} ({plan.model.pipeline})")
    print(f"size    {settings.width} x {settings.height}, {settings.num_frames} frames at {settings.fps} a second")
    print(f"tokens  {tokens} video tokens a forward pass, {settings.steps} steps")
    print(f"device  {plan.device}, {plan.dtype}")
    for video in document["videos"]:
        print(f"{video['status']:8}  {video['file']}")
    print(f"{len(pending)} of {len(plan.jobs)} videos to make; nothing was loaded or written")


def _report(plan: Plan, records: list[Record], seconds: float, *, as_json: bool) -> None:
    made = {(record["attention"] == "dense", record["id"], record["seed"]): record for record in records}
    videos = []
    for job in plan.jobs:
        record = made.get((job.config is None, job.prompt.id, job.seed))
        video = {"attention": job.attention, "id": job.prompt.id, "seed": job.seed, "file": str(job.path)}
        video["status"] = "made" if record else "kept"
        videos.append(video | ({key: record[key] for key in ("seconds", "mean_density")} if record else {}))
    if as_json:
        document = {"made": len(records), "kept": len(videos) - len(records), "seconds": round(seconds, 2)}
        print(json.dumps(document | {"videos": videos}))
        return
    folders = ", ".join(str(folder) for folder in _by_folder(plan.jobs))
    print(f"{len(records)} videos made, {len(videos) - len(records)} kept, in {folders}")
