"""`xattn-video demo`: prompt file -> dense and sparse videos -> comparison -> questions, on small trained models.

On any CPU.
"""

from __future__ import annotations

import contextlib
import shlex
import textwrap
from json import dumps, loads
from pathlib import Path
from typing import Any

from xattn_video_pipelines.common.demo_data import shipped_prompts
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.program import for_people
from xattn_video_pipelines.common.settings import Json, Settings
from xattn_video_pipelines.common.tables import aligned
from xattn_video_pipelines.common.terminal import say
from xattn_video_pipelines.demo.judging import judge_folder
from xattn_video_pipelines.demo.settings import DemoSettings
from xattn_video_pipelines.video import read_manifest

EXAMPLE = """\
example:
  xattn-video demo --out demo-out
"""

_INTRODUCTION = """\
The model `demo` is a small Wan pipeline (diffusers' and transformers' real classes) that this project trained on
videos of coloured shapes. It makes each video twice, with dense and with sparse attention. The default prompts are
combinations that it never saw in training. The judge reads the videos back by classical image processing. At the end
a second small model, a Qwen2-VL, watches them in a row and is asked about each, with dense and with sparse prefill."""


def command(settings: DemoSettings, *, json: Json = False) -> int:
    """`xattn-video demo`; returns 0. Raises UserError."""
    with contextlib.redirect_stdout(for_people(json)):
        summary = demo(settings)
    if json:
        print(dumps(summary))
    return 0


def demo(settings: DemoSettings) -> dict[str, Any]:
    """Generate, compare, judge, ask; print each command as a user would type it, what it says, and a summary.

    Returns:
        Means over the compared videos, how many show what was asked, and a row for each video.

    Raises:
        UserError: as the programs that are run.
    """
    # Programs do not import the measures. The command line knows them, and runs each program as a user would.
    from xattn_video_pipelines.cli import module_of
    from xattn_video_pipelines.video import GenerateSettings

    print(_INTRODUCTION, flush=True)
    generating = GenerateSettings(
        model="demo", prompts=settings.prompts or shipped_prompts("demo.txt"), attention="both", lossless=True,
        device="cpu", out=settings.out, limit=settings.limit, steps=settings.steps, overwrite=settings.overwrite,
        preset=settings.preset, warmup_steps=settings.warmup_steps, num_frames=settings.num_frames,
    )  # fmt: skip
    _announce("generate", generating)
    if module_of("generate").command(generating):
        raise UserError("some videos failed, as said above; run the same command again")

    compare = module_of("compare")
    dense, sparse = settings.out / "dense", settings.out / generating.config.label()
    comparing = compare.CompareSettings(dense, sparse, lpips=False, allow_unmatched=True)
    _announce("compare", comparing)
    compare.command(comparing)
    summary = _summary(dense, sparse)
    say(_judged(summary["videos"]))
    say(_table(summary))
    _ask(settings.out, [(row["dense"]["id"], row["dense"]["seed"]) for row in summary["videos"]])
    say(f"videos: {dense} and {sparse}")
    return summary


def _announce(command: str, settings: Settings) -> None:
    say(f"\n$ xattn-video {shlex.join([command, *settings.arguments()])}")


def _ask(out: Path, keys: list[tuple[str, int]]) -> None:
    """Have the dense videos watched and asked about."""
    # Not before: `--help` loads no torch.
    from xattn_video_pipelines.cli import module_of
    from xattn_video_pipelines.demo.asking import write_story
    from xattn_video_pipelines.demo.stories import ORDINALS, SCENE_FRAMES
    from xattn_video_pipelines.qa import ANSWERS, DEMO, QaSettings

    folder = out / "answers"
    questions = write_story(out / "dense", keys, folder)
    if questions is None:
        print(f"\nno questions: they need up to {len(ORDINALS)} videos of the shapes world, {SCENE_FRAMES} frames each")
        return
    # Answers to the same questions about other videos may be there.
    (folder / ANSWERS).unlink(missing_ok=True)
    asking = QaSettings(model=DEMO, items=questions, attention="both", device="cpu", max_new_tokens=4, out=folder)
    _announce("qa", asking)
    if module_of("qa").command(asking):
        raise UserError("some answers failed, as said above; run the same command again")


def _summary(dense: Path, sparse: Path) -> dict[str, Any]:
    """Means over the compared videos and what the judge saw; step seconds leave text encoding and decoding out."""
    compared = loads((sparse / "summary.json").read_text(encoding="utf-8"))
    names = ("pairs", "dense_seconds", "sparse_seconds", "speedup", "density", "psnr", "ssim")
    keys = [(video["id"], video["seed"]) for video in compared["videos"]]
    records = [read_manifest(folder) for folder in (dense, sparse)]
    # Videos that were there already may lack their times.
    steps = [sum(side[key].get("seconds_per_step") or 0.0 for key in keys) for side in records]
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
    means = {name: compared[name] for name in names} | {"speedup_of_steps": steps[0] / steps[1] if all(steps) else None}
    right = {
        side: document["totals"]["right"]["all"] for side, document in zip(("dense", "sparse"), judged, strict=True)
    }
    return means | {"right": right, "videos": videos}


def _judged(videos: list[dict[str, Any]]) -> str:
    """Prompt, what the judge saw dense and sparse, density and PSNR: a row a video."""
    lines = [("prompt", "the judge saw: dense", "sparse", "density", "PSNR dB")]
    for video in videos:
        lines.append(
            (
                textwrap.shorten(video["prompt"], 60, placeholder="..."),
                _sight(video["dense"]),
                _sight(video["sparse"]),
                f"{video['density']:.3f}",
                f"{video['psnr']:.2f}",
            )
        )
    return "\n" + aligned(lines, left=3)


def _sight(judged: dict[str, Any]) -> str:
    wrong = f" (wrong: {', '.join(judged['wrong'])})" if judged["wrong"] else ""
    return f"{judged['saw']}{wrong}"


def _table(summary: dict[str, Any]) -> str:
    columns = {
        "dense s": f"{summary['dense_seconds']:.1f}",
        "sparse s": f"{summary['sparse_seconds']:.1f}",
        # Where the two were not made on the same device, or with as many threads, there is none.
        "speed-up": "-" if summary["speedup"] is None else f"{summary['speedup']:.2f}",
        "steps alone": "-" if summary["speedup_of_steps"] is None else f"{summary['speedup_of_steps']:.2f}",
        "density": f"{summary['density']:.3f}",
        "PSNR dB": f"{summary['psnr']:.2f}",
        "SSIM": f"{summary['ssim']:.4f}",
    }
    for side, right in summary["right"].items():
        columns[f"as asked, {side}"] = f"{right['right']} of {right['asked']}"
    table = aligned([tuple(columns), tuple(columns.values())])
    return f"\nsummary: means over {summary['pairs']} videos\n{table}"
