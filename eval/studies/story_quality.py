"""What sparse prefill costs the demo's video-understanding model: does it still answer what was asked?

    held-out stories -> videos and questions -> `xattn-video qa`, dense and sparse -> paired differences -> rows

A row a length. The model is trained on stories of up to 16 scenes (4,096 tokens of video); longer ones are reported
as they come. The interval is the bootstrap over stories. A run that was killed goes on when started again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from xattn_video_eval.results import RESULTS, append_rows, provenance
from xattn_video_eval.studies.demo_quality import paired_difference
from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.demo_data import WATCHER_FPS
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import make_writable, write_texts
from xattn_video_pipelines.common.program import Parser, run_program
from xattn_video_pipelines.common.tables import aligned
from xattn_video_pipelines.demo import FPS, KINDS, SCENE_FRAMES, draw_question, draw_story
from xattn_video_pipelines.qa import (
    ANSWERS,
    SUMMARY,
    QaSettings,
    answer_questions,
    print_answer,
    read_answers,
    read_questions,
    summary_table,
)
from xattn_video_pipelines.video import write_video

EXAMPLE = """\
example:
  python -m xattn_video_eval.studies.story_quality --out stories --record
  python -m xattn_video_eval.studies.story_quality --model watcher/model --out quick --scenes 4 --stories 4
"""

LEDGER = RESULTS / "story_quality.jsonl"
SCENES = (4, 8, 16, 32, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m xattn_video_eval.studies.story_quality`."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of videos and answers; a run goes on")
    parser.add_argument(
        "--model",
        default="demo",
        help="folder that demo.training.train_watcher made (default: demo)",
    )
    parser.add_argument(
        "--scenes", type=int, nargs="+", default=list(SCENES), metavar="N", help=f"lengths; default: {SCENES}"
    )
    parser.add_argument("--stories", type=int, default=20, metavar="N", help="of each length, five questions each (20)")
    parser.add_argument("--stride", type=int, default=16, help="of the sparse prefill (16)")
    parser.add_argument("--threshold", type=float, default=0.9, metavar="T", help="of the sparse prefill (0.9)")
    parser.add_argument(
        "--dense-last", type=int, default=0, metavar="N", help="tokens at a prompt's end whose blocks stay dense (0)"
    )
    parser.add_argument("--device", default="auto", help="as of xattn-video qa")
    parser.add_argument("--dtype", default="auto", help="as of xattn-video qa")
    parser.add_argument("--record", action="store_true", help=f"append the rows to eval/results/{LEDGER.name}")


def run(args: argparse.Namespace) -> int:
    """Tell the stories, ask, compare, print a table; 0. Raises UserError."""
    if min(args.scenes) < 2:
        raise UserError(f"--scenes must be 2 or more, got {min(args.scenes)}")
    if args.stories < 1:
        raise UserError(f"--stories must be 1 or more, got {args.stories}")
    config = _asking(args, Path(), Path(), 2).config
    label = config.label()
    make_writable(args.out)
    rows = []
    for scenes in args.scenes:
        items = write_stories(args.out, scenes, args.stories)
        # A folder of its own: dense answers are timed beside the sparse ones that they are compared with.
        answers = args.out / f"answers-{scenes:03d}-{label}"
        print(summary_table(answer_questions(_asking(args, items, answers, scenes), print_answer)))
        rows.append({"scenes": scenes, "config": config.to_dict(), **_row(args, items, answers, label)})
    print(f"sparse: {label}\n{table(rows)}")
    if args.record:
        append_rows(LEDGER, rows)
    print(json.dumps(rows))
    return 0


def write_stories(folder: Path, scenes: int, count: int) -> Path:
    """Write `count` held-out stories as mp4 and a file of questions, one of each kind about each; the file's path.

    The same arguments give the same stories. A video that is there is kept: it is written whole or not at all.
    """
    lines = []
    for number in range(count):
        rng = np.random.default_rng([scenes, number, 3])
        story = draw_story(rng, scenes, "held-out")
        video = folder / f"story-{scenes:03d}-{number:03d}.mp4"
        if not video.exists():
            write_video(video, story.render(), FPS)
        for kind in KINDS:
            asked = draw_question(rng, story, kind)
            id = f"{video.stem}-{kind}"
            record = {"id": id, "video": video.name, "question": asked.question, "answer": asked.answer}
            lines.append(record)
    file = folder / f"questions-{scenes:03d}.jsonl"
    write_texts({file: jsonl.text(lines)})
    return file


def _asking(args: argparse.Namespace, items: Path, out: Path, scenes: int) -> QaSettings:
    """What is asked about the stories of one length."""
    return QaSettings(
        model=args.model, items=items, out=out, attention="both", fps=WATCHER_FPS,
        max_frames=int(scenes * SCENE_FRAMES * WATCHER_FPS / FPS), max_new_tokens=4, min_tokens=0,
        stride=args.stride, threshold=args.threshold, dense_last=args.dense_last, device=args.device, dtype=args.dtype,
    )  # fmt: skip


def _row(args: argparse.Namespace, items: Path, out: Path, label: str) -> dict[str, Any]:
    """What one length gave, dense and sparse."""
    answers = read_answers(out / ANSWERS, ("id", "attention"), {})
    questions = read_questions(items)
    sides = [
        [{**(row := answers[question.id, side]), "right": question.right(row["reply"])} for question in questions]
        for side in ("dense", label)
    ]
    told = json.loads((out / SUMMARY).read_text(encoding="utf-8"))["configurations"]
    # The questions about a story share its video: the story is what is drawn anew.
    per_story = [np.array([row["right"] for row in side], float).reshape(-1, len(KINDS)).mean(1) for side in sides]
    return {
        "stories": args.stories,
        "questions": len(questions),
        "prompt_tokens": told["dense"]["prompt_tokens"],
        "right": {"dense": told["dense"]["accuracy"], "sparse": told[label]["accuracy"]},
        "right_by_kind": {
            kind: [float(np.mean([row["right"] for row in side if row["id"].endswith(f"-{kind}")])) for side in sides]
            for kind in KINDS
        },
        "difference": paired_difference(*(side.tolist() for side in per_story)),
        **{name: told[label][name] for name in ("sparse_density", "agreement", "kl", "logit_error")},
        "prefill_seconds": [told[side]["prefill_seconds"] for side in ("dense", label)],
        "model": args.model,
        "device": sides[0][0]["device"],
        "dtype": sides[0][0]["model_dtype"],
        **provenance("transformers"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A line a length: shares in percent, the paired difference in points with its interval."""
    lines: list[tuple[str, ...]] = [
        ("scenes", "tokens", "dense", "sparse", "difference", "density", "as dense", "prefill s")
    ]
    for row in rows:
        points = {name: 100 * value for name, value in row["difference"].items()}
        change = f"{points['difference']:+.1f} [{points['low']:+.1f}, {points['high']:+.1f}]"
        shares = [f"{100 * row['right'][side]:.0f}%" for side in ("dense", "sparse")]
        seconds = " -> ".join(f"{value:.2f}" for value in row["prefill_seconds"])
        counts = f"{row['scenes']}", f"{row['prompt_tokens']:,.0f}"
        density, agreement = f"{row['sparse_density']:.3f}", f"{100 * row['agreement']:.0f}%"
        lines.append((*counts, *shares, change, density, agreement, seconds))
    return aligned(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run as a program: 0, or 2 with one line for bad input."""
    parser = Parser(prog="python -m xattn_video_eval.studies.story_quality", description=__doc__, epilog=EXAMPLE)
    add_arguments(parser)
    return run_program(parser, run, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
