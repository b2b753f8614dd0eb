"""`xattn-video demo`: prompt file -> dense and sparse videos -> comparison -> a page, a video and one line of words.

On small trained models, on any machine.
"""

from __future__ import annotations

import contextlib
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from json import dumps, loads
from pathlib import Path
from typing import Annotated, Any

from xattn_video_pipelines.common.browser import show_page
from xattn_video_pipelines.common.demo_data import shipped_prompts
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import write_texts
from xattn_video_pipelines.common.program import for_people
from xattn_video_pipelines.common.settings import Json, Option, Settings
from xattn_video_pipelines.common.tables import aligned
from xattn_video_pipelines.common.terminal import say
from xattn_video_pipelines.common.verdict import verdict
from xattn_video_pipelines.demo.judging import judge_folders, totals
from xattn_video_pipelines.demo.settings import DEMO_JSON, JUDGED_JSON, SIDE_BY_SIDE, DemoSettings, JudgeSettings
from xattn_video_pipelines.demo.timing import Timing, Watch, attention_speedup, loaded, read_timing
from xattn_video_pipelines.video import (
    GenerateSettings,
    Job,
    Key,
    Record,
    busy,
    make_plan,
    print_video,
    produce,
    read_manifest,
    video_name,
)

EXAMPLE = """\
example:
  xattn-video demo --out demo-out --open
"""

_INTRODUCTION = """\
The model `demo` is a small Wan pipeline (diffusers' and transformers' real classes) that this project trained on
videos of coloured shapes. It makes each video twice, with dense and with sparse attention. The default prompts are
combinations that it never saw in training. The judge reads the videos back by classical image processing. Then a
second small model, a Qwen2-VL, watches them in a row and is asked about each, with dense and with sparse prefill."""


def command(
    settings: DemoSettings,
    *,
    open: Annotated[bool, Option("show the page in a browser at the end")] = False,
    json: Json = False,
) -> int:
    """`xattn-video demo`; returns 0. Raises UserError."""
    with contextlib.redirect_stdout(for_people(json)):
        summary = demo(settings)
        if open:
            show_page(Path(summary["report"]))
    if json:
        print(dumps(summary))
    return 0


def demo(settings: DemoSettings) -> dict[str, Any]:
    """Generate, compare, judge, ask, report; print each command as a user would type it, and a summary.

    Returns:
        Means over the compared videos, how many show what was asked, and a row for each video. `speedup` is of whole
        videos, `speedup_of_steps` without reading the prompt and decoding, `speedup_of_attention` of the self-attention
        layers alone; `busy` says why these are not reliable, or is None. `verdict` is all of it in a line. `report`
        and `side_by_side` are the files.

    Raises:
        UserError: as the programs that are run.
    """
    # Programs do not import the measures. The command line knows them, and runs each program as a user would.
    from xattn_video_pipelines.cli import module_of

    say(_INTRODUCTION, progress=True)
    generating = GenerateSettings(
        model="demo", prompts=settings.prompts or shipped_prompts("demo.txt"), attention="both", lossless=True,
        device=settings.device, out=settings.out, limit=settings.first, steps=settings.steps,
        num_frames=settings.num_frames, overwrite=settings.overwrite, **settings.attention,
    )  # fmt: skip
    _announce("generate", generating)
    timing = _generate(generating)

    compare, report = module_of("compare"), module_of("report")
    dense, sparse = settings.out / "dense", settings.out / generating.config.label()
    comparing = compare.CompareSettings(dense, sparse, lpips=False, allow_unmatched=True)
    _announce("compare", comparing)
    compare.compare(comparing)
    judging = JudgeSettings((dense, sparse))
    _announce("judge", judging)
    judge_folders(judging)
    summary = _summary(dense, sparse, timing)
    say(_judged(summary["videos"]))
    _ask(settings, [(row["dense"]["id"], row["dense"]["seed"]) for row in summary["videos"]])
    reporting = report.ReportSettings(settings.out, lpips=False, side_by_side=settings.out / SIDE_BY_SIDE)
    _announce("report", reporting)
    report.write_report(reporting)
    say(_table(summary))
    say(f"videos        {dense} and {sparse}")
    say(f"side by side  {reporting.side_by_side}")
    say(f"page          {reporting.path}")
    say(f"verdict       {summary['verdict']}")
    return summary | {"report": str(reporting.path), "side_by_side": str(reporting.side_by_side)}


def _announce(command: str, settings: Settings) -> None:
    say(f"\n$ xattn-video {shlex.join([command, *settings.arguments()])}", progress=True)


def _generate(settings: GenerateSettings) -> Timing:
    """Make the videos that are missing, and note how long their attention took and how busy the machine was."""
    plan = make_plan(settings)
    plan = replace(plan, pending=_alternating(plan.pending))
    watch = Watch()
    timing: Timing = {"runs": [], "attention_seconds": {}} if settings.overwrite else read_timing(settings.out)

    def on_video(job: Job, record: Record) -> None:
        timing["attention_seconds"][f"{job.attention}/{job.name}"] = watch.take_attention()
        # After each video: a run that is killed was as busy as it was.
        noted = {**timing, "runs": [*timing["runs"], watch.load]}
        write_texts({settings.out / DEMO_JSON: dumps(noted, indent=2) + "\n"})
        print_video(job, record)

    made = produce(plan, on_video, watch.attach)
    kept = len(plan.jobs) - len(made.records)
    say(f"videos: {len(made.records)} made, {kept} kept", progress=True)
    if made.records:
        timing["runs"].append(watch.load)
    if made.batch.code:
        for line in made.batch.told():
            say(line)
        raise UserError("some videos failed, as said above; run the same command again")
    return timing


def _alternating(jobs: Sequence[Job]) -> tuple[Job, ...]:
    """The jobs with the dense and the sparse video of each prompt beside each other, every other pair turned round.

    A machine that becomes slower or faster while they are made then does so for both alike.
    """
    places = {key: place for place, key in enumerate(dict.fromkeys(job.key for job in jobs))}

    def place(job: Job) -> tuple[int, bool]:
        number = places[job.key]
        return number, (job.kind == "dense") == bool(number % 2)

    return tuple(sorted(jobs, key=place))


def _ask(settings: DemoSettings, keys: list[Key]) -> None:
    """Have the dense videos watched and asked about."""
    # Not before: `--help` loads no torch.
    from xattn_video_pipelines.cli import module_of
    from xattn_video_pipelines.demo.asking import write_story
    from xattn_video_pipelines.demo.stories import ORDINALS, SCENE_FRAMES
    from xattn_video_pipelines.qa import ANSWERS, DEMO, QaSettings

    folder = settings.out / "answers"
    questions = write_story(settings.out / "dense", keys, folder)
    if questions is None:
        print(
            "\nno questions for the second model: it is asked about at most "
            f"{len(ORDINALS)} videos, each of at least {SCENE_FRAMES} frames and with a prompt of the shapes world"
        )
        return
    # Answers to the same questions about other videos may be there.
    (folder / ANSWERS).unlink(missing_ok=True)
    asking = QaSettings(
        model=DEMO, items=questions, attention="both", device=settings.device, max_new_tokens=4, out=folder
    )
    _announce("qa", asking)
    if module_of("qa").command(asking):
        raise UserError("some answers failed, as said above; run the same command again")


def _summary(dense: Path, sparse: Path, timing: Timing) -> dict[str, Any]:
    """Means over the compared videos and what the judge saw; step seconds leave text encoding and decoding out."""
    compared = loads((sparse / "summary.json").read_text(encoding="utf-8"))
    names = ("pairs", "dense_seconds", "sparse_seconds", "speedup", "density", "psnr", "ssim")
    keys = [(video["id"], video["seed"]) for video in compared["videos"]]
    records = [read_manifest(folder) for folder in (dense, sparse)]
    # Videos that were there already may lack their times.
    steps = [sum(side[key].get("seconds_per_step") or 0.0 for key in keys) for side in records]
    judged = [_by_key(folder, keys) for folder in (dense, sparse)]
    videos = [
        {
            "prompt": records[0][key]["prompt"],
            "dense": judged[0][key],
            "sparse": judged[1][key],
            **{name: video[name] for name in ("density", "psnr", "ssim")},
        }
        for key, video in zip(keys, compared["videos"], strict=True)
    ]
    right = {
        side: totals(list(rows.values()))["right"]["all"]
        for side, rows in zip(("dense", "sparse"), judged, strict=True)
    }
    pairs = [(f"{dense.name}/{video_name(key)}", f"{sparse.name}/{video_name(key)}") for key in keys]
    attention = attention_speedup(timing, pairs)
    unknown = None if attention is not None else "it is not known how busy the machine was"
    summary = {name: compared[name] for name in names} | {
        "speedup_of_steps": steps[0] / steps[1] if all(steps) else None,
        "speedup_of_attention": attention,
        "busy": loaded(timing["runs"]) or busy(side[key] for side in records for key in keys) or unknown,
        "right": right,
        "videos": videos,
    }
    return summary | {"verdict": _verdict(summary)}


def _by_key(folder: Path, keys: Sequence[Key]) -> dict[Key, Record]:
    """The rows of a folder's judged.json that are of these videos."""
    document = loads((folder / JUDGED_JSON).read_text(encoding="utf-8"))
    rows = {(row["id"], row["seed"]): row for row in document["videos"]}
    return {key: rows[key] for key in keys}


def _verdict(summary: dict[str, Any]) -> str:
    right = {side: (counts["right"], counts["asked"]) for side, counts in summary["right"].items()}
    return verdict(
        right=right["sparse"] if right["sparse"][1] else None,
        dense_right=right["dense"],
        density=summary["density"],
        attention=summary["speedup_of_attention"],
        whole=summary["speedup"],
        doubt=summary["busy"],
    )


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
    columns = {"density": f"{summary['density']:.3f}"}
    columns |= {"PSNR dB": f"{summary['psnr']:.2f}", "SSIM": f"{summary['ssim']:.4f}"}
    for side, right in summary["right"].items():
        columns[f"as asked, {side}"] = f"{right['right']} of {right['asked']}"
    # Where the machine was busy, the verdict says what can be said of times.
    if summary["busy"] is None:
        columns |= {"dense s": f"{summary['dense_seconds']:.1f}", "sparse s": f"{summary['sparse_seconds']:.1f}"}
        ratios = {"speed-up": "speedup", "steps alone": "speedup_of_steps", "attention alone": "speedup_of_attention"}
        # Where the two were not made on the same device, or with as many threads, there is none.
        columns |= {head: f"{summary[name]:.2f}" for head, name in ratios.items() if summary[name] is not None}
    table = aligned([tuple(columns), tuple(columns.values())])
    over = "" if summary["pairs"] == 1 else f": means over {summary['pairs']} videos"
    return f"\nsummary{over}\n{table}"
