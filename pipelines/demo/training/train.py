"""Trains the demo's model on the shapes world: first the VAE, then the transformer. `--help` says how.

Everything lands in one folder: `log.jsonl`, checkpoints (safetensors), sample pictures, the encoded clips, and
`pipeline`, which `WanPipeline.from_pretrained` loads. A run that was stopped or killed goes on when started again.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import edit_json, whole_files, whole_folder
from xattn_video_pipelines.common.program import Parser, run_program
from xattn_video_pipelines.demo import text, world
from xattn_video_pipelines.demo.training.latents import ClipSize
from xattn_video_pipelines.demo.training.loop import COOLDOWN, Plan, phase_at
from xattn_video_pipelines.demo.training.phases import (
    CONTINUED_COOLDOWN,
    CONTINUED_PHASES,
    CONTINUED_RATE,
    FLOW_SHIFT,
    FULL,
    PHASES,
    Phase,
)
from xattn_video_pipelines.demo.training.transformer import (
    LEARNING_RATE,
    MATRIX_LEARNING_RATE,
    build_transformer,
    train_transformer,
)
from xattn_video_pipelines.demo.training.vae import LEARNING_RATE as VAE_LEARNING_RATE
from xattn_video_pipelines.demo.training.vae import reconstruction_psnr, train_vae
from xattn_video_pipelines.video import import_diffusers

logger = logging.getLogger(__name__)

_SAMPLE_STEPS, _SAMPLE_PROMPTS, _SAMPLE_FRAMES = 16, 4, 6


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and train; 0 if the whole training is done, 3 if there is more to do."""
    parser = Parser(
        prog="python -m xattn_video_pipelines.demo.training.train",
        description=__doc__,
        epilog="example: python -m xattn_video_pipelines.demo.training.train --out shapes --minutes 60",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; an existing run goes on")
    parser.add_argument("--minutes", type=float, help="stop after this long, to be continued (default: no limit)")
    parser.add_argument("--vae-steps", type=int, default=1000, help="steps of the VAE (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12000, help="steps of the transformer (default: %(default)s)")
    parser.add_argument("--sample-minutes", type=float, default=10, help="minutes between sample pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, metavar="DIR", help="a pipeline to go on from; its VAE is kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return run_program(parser, _run, arguments)


def _run(options: argparse.Namespace) -> int:
    if options.start and not (options.start / "model_index.json").is_file():
        raise UserError(f"--start {options.start}: not a pipeline's folder, it has no model_index.json")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    done = run(
        options.out,
        steps=options.steps,
        vae_steps=options.vae_steps,
        minutes=options.minutes,
        sample_minutes=options.sample_minutes,
        seed=options.seed,
        start=options.start,
        device=torch.device(options.device),
    )
    return 0 if done else 3


def run(  # noqa: PLR0913 - settings of a training
    out: Path,
    *,
    steps: int,
    vae_steps: int,
    minutes: float | None = None,
    sample_minutes: float = 10.0,
    seed: int = 0,
    start: Path | None = None,
    device: torch.device | None = None,
    phases: tuple[Phase, ...] | None = None,
    checkpoint_seconds: float = 300.0,
) -> bool:
    """Train, or go on training, in the folder `out`; True once all steps are done and `out/pipeline` is final.

    With `start`, a pipeline's folder, its VAE is kept and its transformer is what the training begins with; the
    phases are then `CONTINUED_PHASES`, else `PHASES`.
    """
    phases = phases or (PHASES if start is None else CONTINUED_PHASES)
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    device = device or torch.device("cpu")
    out.mkdir(parents=True, exist_ok=True)
    plan = Plan("vae", out, vae_steps, VAE_LEARNING_RATE, deadline=deadline, checkpoint_seconds=checkpoint_seconds)
    diffusers = import_diffusers()
    if start is None:
        vae = _finished_vae(plan, device, seed)
    else:
        vae = _load(diffusers.AutoencoderKLWan, start / "vae", device)
    if vae is None:
        return False
    sampled = time.monotonic()

    def on_checkpoint(step: int, transformer: Any) -> None:
        nonlocal sampled
        if time.monotonic() - sampled >= 60 * sample_minutes:
            size = phase_at(phases, step - 1, steps).size
            save_samples(out / f"samples-{step:06d}.png", assemble(vae, transformer), size)
            sampled = time.monotonic()

    plan = Plan(
        "transformer",
        out,
        steps,
        LEARNING_RATE * (1.0 if start is None else CONTINUED_RATE),
        matrix_learning_rate=MATRIX_LEARNING_RATE * (1.0 if start is None else CONTINUED_RATE),
        # What given weights know must not be lost: the rates fall for long.
        cooldown=COOLDOWN if start is None else CONTINUED_COOLDOWN,
        deadline=deadline,
        checkpoint_seconds=checkpoint_seconds,
    )

    def build(seed: int) -> Any:
        if start is None:
            return build_transformer(seed)
        return diffusers.WanTransformer3DModel.from_pretrained(start / "transformer", torch_dtype=torch.float32)

    transformer, finished = train_transformer(
        plan, vae, device, seed, out / "latents", phases=phases, build=build, on_checkpoint=on_checkpoint
    )
    pipeline = assemble(vae, transformer)
    if finished:
        save_samples(out / f"samples-{finished:06d}.png", pipeline, phase_at(phases, finished - 1, steps).size)
    save_pipeline(pipeline, out / "pipeline")
    return finished >= steps


def assemble(vae: Any, transformer: Any) -> Any:
    """A `WanPipeline` of the two trained parts, the frozen text encoder, the tokenizer and a flow scheduler."""
    diffusers = import_diffusers()
    return diffusers.WanPipeline(
        tokenizer=text.build_tokenizer(),
        text_encoder=text.build_text_encoder().to(transformer.device),
        vae=vae,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
        ),
        transformer=transformer,
    )


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Write a bfloat16 copy, whole or not at all; what diffusers keeps in float32 stays so, and so does `pipeline`."""
    import_diffusers()
    full = folder.with_name(f".{folder.name}.float32")
    with whole_folder(folder) as partial:
        shutil.rmtree(full, ignore_errors=True)
        pipeline.save_pretrained(full)
        type(pipeline).from_pretrained(full, torch_dtype=torch.bfloat16).save_pretrained(partial)
        shutil.rmtree(full)
        # transformers 5 writes a class name that 4 does not have, and diffusers the folder that it loaded from.
        edit_json(partial / "model_index.json", tokenizer=["transformers", "PreTrainedTokenizerFast"])
        edit_json(partial / "tokenizer" / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        for config in partial.rglob("*.json"):
            if "_name_or_path" in config.read_text(encoding="utf-8"):
                edit_json(config, _name_or_path=None)


def save_samples(path: Path, pipeline: Any, size: ClipSize = FULL) -> None:
    """Generate a few held-out prompts and write them as a picture: a row a prompt, its frames from left to right."""
    import imageio.v3 as imageio

    scenes = world.held_out_scenes()
    chosen = np.random.default_rng(0).choice(len(scenes), size=_SAMPLE_PROMPTS, replace=False)
    pipeline.set_progress_bar_config(disable=True)
    # WanPipeline takes multiples of 16 only; a phase of the training need not be one.
    side = size.side // 16 * 16
    rows, prompts = [], []
    for number, index in enumerate(chosen):
        prompts.append(world.caption(scenes[index], number))
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            video = pipeline(
                prompts[-1],
                height=side,
                width=side,
                num_frames=size.frames,
                num_inference_steps=_SAMPLE_STEPS,
                guidance_scale=1.0,
                generator=generator,
                output_type="np",
            ).frames[0]
        shown = np.linspace(0, size.frames - 1, _SAMPLE_FRAMES).round().astype(int)
        rows.append(np.concatenate(list(video[shown]), axis=1))
    picture = np.rint(np.concatenate(rows) * 255).astype(np.uint8)
    with whole_files(path) as (partial,):
        imageio.imwrite(partial, picture)
    logger.info("%s: %s", path.name, " | ".join(prompts))


def _finished_vae(plan: Plan, device: torch.device, seed: int) -> Any | None:
    """The trained VAE, from `vae` in the run's folder or by training it; None if time ran out before the end."""
    folder = plan.folder / "vae"
    if folder.exists():
        return _load(import_diffusers().AutoencoderKLWan, folder, device)
    vae, steps = train_vae(plan, device, seed)
    if steps < plan.steps:
        return None
    quality = reconstruction_psnr(vae)
    logger.info("vae: held-out clips come back at %.1f dB", quality)
    jsonl.append(plan.log, [{"stage": "vae", "step": steps, "held_out_psnr": round(quality, 2)}])
    with whole_folder(folder) as partial:
        vae.save_pretrained(partial)
    return vae


def _load(cls: Any, folder: Path, device: torch.device) -> Any:
    return cls.from_pretrained(folder, torch_dtype=torch.float32).to(device).eval().requires_grad_(False)


if __name__ == "__main__":
    raise SystemExit(main())
