"""`xattn-video demo`: prompt file -> dense and sparse videos -> comparison -> questions, on small trained models.

On any CPU.
"""

from __future__ import annotations

import argparse
import json
import shlex
import textwrap
from pathlib import Path
from typing import Any

from xattn_video_pipelines.common.tables import aligned
from xattn_video_pipelines.demo.files import shipped_prompts
from xattn_video_pipelines.demo.judging import judge_folder
from xattn_video_pipelines.video.manifest import read_manifest

EXAMPLE = """\
example:
  xattn-video demo --out demo-out
"""

_INTRODUCTION = """\
The model `demo` is a small Wan pipeline (diffusers' and transformers' real classes) that this project trained on
videos of coloured shapes. It makes each video twice, with dense and with sparse attention. The default prompts are
combinations that it never saw in training. The judge reads the videos back by classical image processing. At the end
a second small model, a Qwen2-VL, watches them in a row and is asked about each, with dense and with sparse prefill."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `xattn-video demo`."""
    parser.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="default: demo-out")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="default: the demo's own four prompts")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N prompts")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the model's 20")
    parser.add_argument("--warmup-steps", type=int, help="first steps that stay dense; default: 5")
    parser.add_argument("--num-frames", type=int, help="default: the model's 33")
    parser.add_argument("--overwrite", action="store_true", help="make finished videos anew")
    parser.add_argument("--json", action="store_true", help="the summary as one JSON document on the last line")


def run(args: argparse.Namespace) -> int:
    """Generate, compare, judge, print the summary; returns the exit code of the first program that fails.

    `args.run_command` runs another subcommand: the demo does what a user would type, and shows it.
    """
    out: Path = args.out
    print(_INTRODUCTION, flush=True)
    generate = [
        "generate",
        "--model",
        "demo",
        "--prompts",
        str(args.prompts or shipped_prompts("demo.txt")),
        "--attention",
        "both",
    ]
    generate += ["--lossless", "--device", "cpu", "--out", str(out)]
    for name in ("limit", "steps", "warmup_steps", "num_frames"):
        value = getattr(args, name)
        generate += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    generate += ["--overwrite"] if args.overwrite else []
    code = _run(args, generate)
    if code != 0:
        return code

    dense, sparse = out / "dense", out / _label(args.warmup_steps)
    compare = ["compare", str(dense), str(sparse), "--no-lpips", "--allow-unmatched"]
    code = _run(args, compare)
    if code != 0:
        return code
    summary = _summary(dense, sparse)
    print(_judged(summary["videos"]))
    print(_table(summary))
    code = _ask(args, [(video["dense"]["id"], video["dense"]["seed"]) for video in summary["videos"]])
    if code != 0:
        return code
    print(f"videos: {dense} and {sparse}")
    if args.json:
        print(json.dumps(summary))
    return 0


def _run(args: argparse.Namespace, command: list[str]) -> int:
    print(f"\n$ xattn-video {shlex.join(command)}", flush=True)
    return args.run_command(command)


def _ask(args: argparse.Namespace, keys: list[tuple[str, int]]) -> int:
    """Have the dense videos watched and asked about."""
    # Not before: `--help` loads no torch.
    from xattn_video_pipelines.demo.asking import write_story
    from xattn_video_pipelines.demo.stories import ORDINALS, SCENE_FRAMES
    from xattn_video_pipelines.qa.command import ANSWERS

    folder = args.out / "answers"
    questions = write_story(args.out / "dense", keys, folder)
    if questions is None:
        print(f"\nno questions: they need up to {len(ORDINALS)} videos of the shapes world, {SCENE_FRAMES} frames each")
        return 0
    # Answers to the same questions about other videos may be there.
    (folder / ANSWERS).unlink(missing_ok=True)
    asked = ["qa", "--model", "demo", "--items", str(questions), "--attention", "both", "--device", "cpu"]
    return _run(args, [*asked, "--max-new-tokens", "4", "--out", str(folder)])


def _label(warmup_steps: int | None) -> str:
    from xattn_video import XAttnConfig

    return XAttnConfig(**({} if warmup_steps is None else {"warmup_steps": warmup_steps})).label()


def _summary(dense: Path, sparse: Path) -> dict[str, Any]:
    """Means over the compared videos and what the judge saw; step seconds leave text encoding and decoding out."""
    compared = json.loads((sparse / "summary.json").read_text(encoding="utf-8"))
    names = ("pairs", "dense_seconds", "sparse_seconds", "speedup", "density", "psnr", "ssim")
    keys = [(video["id"], video["seed"]) for video in compared["videos"]]
    records = [read_manifest(folder) for folder in (dense, sparse)]
    steps = [sum(side[key]["seconds_per_step"] for key in keys) for side in records]
    judged = [judge_folder(folder, keys=keys, progress=False) for folder in (dense, sparse)]
    by_key = [{(video["id"], video["seed"]): video for video in side["videos"]} for side in judged]
    videos = [
        {
            "prompt": records[0][key]["prompt"],
            "dense": by_key[0][key],
            "sparse": by_key[1][key],
            **{name: video[name] for name in ("density", "psnr", "ssim")},
        }
        for key, video in zip(keys, compared["videos"], strict=True)
    ]
    means = {name: compared[name] for name in names} | {"speedup_of_steps": steps[0] / steps[1]}
    right = {
        side: document["totals"]["right"]["all"] for side, document in zip(("dense", "sparse"), judged, strict=True)
    }
    return means | {"right": right, "videos": videos}


def _judged(videos: list[dict[str, Any]]) -> str:
    """Prompt, what the judge saw dense and sparse, density and PSNR: a row a video."""
    lines = [("prompt", "the judge saw: dense", "sparse", "density", "PSNR dB")]
    for video in videos:
        sides = [_sight(video[side]) for side in ("dense", "sparse")]
        lines.append(
            (
                textwrap.shorten(video["prompt"], 60, placeholder="..."),
                *sides,
                f"{video['density']:.3f}",
                f"{video['psnr']:.2f}",
            )
        )
    return "\n" + aligned(lines, left=3)


def _sight(judged: dict[str, Any]) -> str:
    return judged["saw"] + (f" (wrong: {', '.join(judged['wrong'])})" if judged["wrong"] else "")


def _table(summary: dict[str, Any]) -> str:
    columns = {
        "dense s": f"{summary['dense_seconds']:.1f}",
        "sparse s": f"{summary['sparse_seconds']:.1f}",
        # Where the two were not made on the same device, or with as many threads, there is none.
        "speed-up": "-" if summary["speedup"] is None else f"{summary['speedup']:.2f}",
        "steps alone": f"{summary['speedup_of_steps']:.2f}",
        "density": f"{summary['density']:.3f}",
        "PSNR dB": f"{summary['psnr']:.2f}",
        "SSIM": f"{summary['ssim']:.4f}",
    }
    for side, right in summary["right"].items():
        columns[f"as asked, {side}"] = f"{right['right']} of {right['asked']}"
    table = aligned([tuple(columns), tuple(columns.values())])
    return f"\nsummary: means over {summary['pairs']} videos\n{table}"
