"""Step caches beside sparse attention: how close their videos stay, and what share of the attention they compute.

    held-out prompts, caches by name -> dense videos and those with each cache -> compare, judge -> a row each

A step cache skips most blocks of a model in steps that are much like the one before; sparse attention skips parts of
every step. Both are told by the share of the attention that is computed (`density`) and by their time: a step that is
skipped saves the rest of the model too. The dense videos are those of `residual_quality` where both are given one
folder. A run that was killed goes on when started again.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from xattn_video import XAttnConfig
from xattn_video.integrations.diffusers import pipeline_transformers
from xattn_video_eval.compare import CompareSettings, compare
from xattn_video_eval.results import RESULTS, append_rows, mean_interval, provenance
from xattn_video_eval.studies.held_out import write_prompts
from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.program import run_alone
from xattn_video_pipelines.common.settings import DtypeOrAuto, Option, Settings, sparse_config
from xattn_video_pipelines.demo import judge_folder
from xattn_video_pipelines.video import GenerateSettings, Job, Plan, Record, make_plan, produce, read_manifest

EXAMPLE = """\
example:
  python -m xattn_video_eval.studies.step_caches --out residual --every 4 --record
  python -m xattn_video_eval.studies.step_caches --out quick --every 16
"""

LEDGER = RESULTS / "step_caches.jsonl"
CACHES = Path(__file__).with_suffix(".json")
# What share of a video's attention calls ran, a line a video, in the folder of its cache.
_SHARES = "shares.jsonl"


@dataclass(frozen=True, kw_only=True)
class StepCachesSettings(Settings):
    """Which videos are made with which caches, and where the results go."""

    out: Annotated[Path, Option("of the videos; a run goes on", metavar="DIR")]
    caches: Annotated[
        Path,
        Option(
            'JSON with caches by name: {"mine": {"cache": "first-block", "threshold": 0.1}}, also mag and cache-dit; '
            "attention may be there too, with settings of XAttnConfig",
            metavar="FILE",
        ),
    ] = CACHES
    model: Annotated[str, Option("name or folder of a model of the shapes world")] = "demo"
    videos: Annotated[int, Option("held-out prompts, evenly spaced over the file", metavar="N")] = 32
    every: Annotated[int, Option("of these only every so many-th, for a shorter run", metavar="N")] = 1
    steps: Annotated[int, Option("denoising steps")] = 20
    num_frames: Annotated[int, Option("frames a video")] = 33
    device: Annotated[str, Option("as of xattn-video generate")] = "auto"
    dtype: Annotated[DtypeOrAuto, Option("as of xattn-video generate")] = "auto"
    record: Annotated[bool, Option(f"append the rows to eval/results/{LEDGER.name}")] = False


def step_caches(settings: StepCachesSettings) -> int:
    """Make what is missing, measure it, print the rows; 0. Raises UserError."""
    caches = _read(settings.caches)
    file, _ = write_prompts(settings.out, settings.videos, settings.every)
    generating = GenerateSettings(
        model=settings.model, prompts=file, out=settings.out, lossless=True, steps=settings.steps,
        num_frames=settings.num_frames, height=128, width=128, guidance_scale=1.0, device=settings.device,
        dtype=settings.dtype,
    )  # fmt: skip
    produce(make_plan(generating, [("dense", None)])).batch.check()
    rows = []
    for name, values in caches.items():
        values = dict(values)
        attention = values.pop("attention", None)
        config = None if attention is None else sparse_config(attention.pop("preset", None), **attention)
        folder = settings.out / re.sub(r"[^a-z0-9.]+", "-", name.lower())
        plan = make_plan(generating, [(folder.name, config)])
        _make(plan, folder, values)
        rows.append({"name": name, **values, **_row(settings, plan, folder, config)})
        print(json.dumps(rows[-1]), flush=True)
    if settings.record:
        append_rows(LEDGER, rows)
    return 0


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The caches by name. Raises UserError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--caches {path}: cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise UserError(f"--caches {path}: must hold an object with caches by name")
    for name, values in document.items():
        if not isinstance(values, dict) or values.get("cache") not in _ENABLE or "threshold" not in values:
            kinds = ", ".join(_ENABLE)
            raise UserError(f"--caches {path}: {name}: must have cache (one of {kinds}) and threshold, got {values}")
    return document


def _make(plan: Plan, folder: Path, values: Mapping[str, Any]) -> None:
    """Make the missing videos of a plan with a cache, and write down which share of the attention calls each ran."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    modules = 0

    def prepare(pipe: Any) -> None:
        nonlocal modules, calls
        models = pipeline_transformers(pipe).values()
        # the name of self-attention in Wan, which models of the shapes world are
        found = [module for model in models for path, module in model.named_modules() if path.endswith(".attn1")]
        modules = len(found)
        for module in found:
            module.register_forward_hook(count)
        _ENABLE[values["cache"]](pipe, plan, values["threshold"])
        calls = 0

    def note(job: Job, record: Record) -> None:
        nonlocal calls
        share = calls / (modules * plan.recipe.settings.steps)
        jsonl.append(folder / _SHARES, [{"id": job.prompt.id, "seed": job.seed, "share": share}])
        print(f"{job.path}  {record['seconds']:.1f} s  {share:.2f} of the attention calls", flush=True)
        calls = 0

    produce(plan, note, prepare).batch.check()


def _row(settings: StepCachesSettings, plan: Plan, folder: Path, config: XAttnConfig | None) -> dict[str, Any]:
    keys = [job.key for job in plan.jobs]
    compared = compare(CompareSettings(settings.out / "dense", folder, lpips=False, floor=False), keys=keys)
    each = [video["psnr"] for video in compared["videos"]]
    low, high = mean_interval(each)
    shares = {(row["id"], row["seed"]): row["share"] for _, row in jsonl.read(folder / _SHARES)}
    share = float(np.mean([shares[key] for key in keys]))
    record = read_manifest(folder)[keys[0]]
    judged = {side: judge_folder(settings.out / side, keys=keys) for side in ("dense", folder.name)}
    right = {side: document["totals"]["right"]["all"]["right"] for side, document in judged.items()}
    return {
        "config": None if config is None else config.to_dict(),
        "videos": len(keys),
        "steps": settings.steps,
        "tokens": record["tokens"],
        # of the calls that ran, times how many ran
        "density": compared["density"] * share,
        "psnr": compared["psnr"],
        "psnr_low": low,
        "psnr_high": high,
        "psnr_worst": min(each),
        "ssim": compared["ssim"],
        "flicker": compared["flicker"],
        "right": {"dense": right["dense"], "cached": right[folder.name]},
        "dense_seconds": compared["dense_seconds"],
        "cached_seconds": compared["sparse_seconds"],
        "speedup": compared["speedup"],
        "device": record["device_name"],
        "dtype": record["dtype"],
        **provenance("diffusers", "transformers"),
    }


def _first_block(pipe: Any, plan: Plan, threshold: float) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))


def _mag(pipe: Any, plan: Plan, threshold: float) -> None:
    """MagCache, measured first on the first prompt with another seed."""
    from diffusers import MagCacheConfig

    steps = plan.recipe.settings.steps
    pipe.transformer.enable_cache(MagCacheConfig(num_inference_steps=steps, calibrate=True))
    # It prints what it measured, and nothing else has it.
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        _run_other_seed(pipe, plan)
    pipe.transformer.disable_cache()
    ratios = ast.literal_eval(re.findall(r"^\[.*\]$", printed.getvalue(), re.MULTILINE)[-1])
    pipe.transformer.enable_cache(
        MagCacheConfig(threshold=threshold, num_inference_steps=steps, mag_ratios=[float(ratio) for ratio in ratios])
    )


def _cache_dit(pipe: Any, plan: Plan, threshold: float) -> None:
    """cache-dit's DBCache: the first block decides, and as many steps as in the presets are warm-up.

    Without guidance a step is one forward, which has to be said: for Wan it is taken for two otherwise.
    """
    try:
        import cache_dit
    except ModuleNotFoundError:
        raise UserError("cache-dit is not installed; pip install cache-dit") from None
    cache_dit.enable_cache(
        pipe,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=4, residual_diff_threshold=threshold,
            enable_separate_cfg=False,
        ),
    )  # fmt: skip


def _run_other_seed(pipe: Any, plan: Plan) -> None:
    import torch

    job, settings = plan.jobs[0], plan.recipe.settings
    pipe(
        prompt=job.prompt.text, height=settings.height, width=settings.width, num_frames=settings.num_frames,
        num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale, output_type="latent",
        generator=torch.Generator("cpu").manual_seed(job.seed + 1),
    )  # fmt: skip


_ENABLE: dict[str, Callable[[Any, Plan, float], None]] = {
    "first-block": _first_block, "mag": _mag, "cache-dit": _cache_dit,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program: 0, or 2 with one line for bad input."""
    return run_alone(step_caches, "xattn_video_eval.studies.step_caches", __doc__ or "", EXAMPLE, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
