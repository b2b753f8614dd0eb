"""What sparse prefill costs the demo's video-understanding model: does it still answer what was asked?

    held-out stories -> videos and questions -> `xattn-video qa`, dense and sparse -> paired differences -> rows

A row a length. The model is trained on stories of up to 16 scenes (4,096 tokens of video); longer ones are reported
as they come. The interval is the bootstrap over stories. A run that was killed goes on when started again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from xattn_video_eval.results import RESULTS, append_rows, provenance
from xattn_video_eval.studies.demo_quality import paired_difference
from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.demo_data import WATCHER_FPS
from xattn_video_pipelines.common.files import make_writable, write_texts
from xattn_video_pipelines.common.program import run_alone
from xattn_video_pipelines.common.settings import DtypeOrAuto, Option, Settings
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


@dataclass(frozen=True, kw_only=True)
class StoryQualitySettings(Settings):
    """Which stories are told, and with which sparse prefill they are asked about."""

    out: Annotated[Path, Option("of videos and answers; a run goes on", metavar="DIR")]
    model: Annotated[str, Option("folder that demo.training.train_watcher made")] = "demo"
    scenes: Annotated[tuple[int, ...], Option("lengths", metavar="N")] = SCENES
    stories: Annotated[int, Option("of each length, five questions each", metavar="N")] = 20
    stride: Annotated[int, Option("of the sparse prefill")] = 16
    threshold: Annotated[float, Option("of the sparse prefill", metavar="T")] = 0.9
    dense_last: Annotated[int, Option("tokens at a prompt's end whose blocks stay dense", metavar="N")] = 0
    device: Annotated[str, Option("as of xattn-video qa")] = "auto"
    dtype: Annotated[DtypeOrAuto, Option("as of xattn-video qa")] = "auto"
    record: Annotated[bool, Option(f"append the rows to eval/results/{LEDGER.name}")] = False

    def check(self) -> None:
        self.check_at_least(2, "scenes")
        self.check_at_least(1, "stories")
        _ = self.asking(Path(), Path(), 2)

    def asking(self, items: Path, out: Path, scenes: int) -> QaSettings:
        """What is asked about the stories of one length. Raises UserError for a value that is out of its range."""
        return QaSettings(
            model=self.model, items=items, out=out, attention="both", fps=WATCHER_FPS,
            max_frames=int(scenes * SCENE_FRAMES * WATCHER_FPS / FPS), max_new_tokens=4, min_tokens=0,
            stride=self.stride, threshold=self.threshold, dense_last=self.dense_last, device=self.device,
            dtype=self.dtype,
        )  # fmt: skip


def story_quality(settings: StoryQualitySettings) -> int:
    """Tell the stories, ask, compare, print a table; 0. Raises UserError."""
    config = settings.asking(Path(), Path(), 2).config
    label = config.label()
    make_writable(settings.out)
    rows = []
    for scenes in settings.scenes:
        items = write_stories(settings.out, scenes, settings.stories)
        # A folder of its own: dense answers are timed beside the sparse ones that they are compared with.
        answers = settings.out / f"answers-{scenes:03d}-{label}"
        print(summary_table(answer_questions(settings.asking(items, answers, scenes), print_answer)))
        rows.append({"scenes": scenes, "config": config.to_dict(), **_row(settings, items, answers, label)})
    print(f"sparse: {label}\n{table(rows)}")
    if settings.record:
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


def _row(settings: StoryQualitySettings, items: Path, out: Path, label: str) -> dict[str, Any]:
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
        "stories": settings.stories,
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
        "model": settings.model,
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program: 0, or 2 with one line for bad input."""
    return run_alone(story_quality, "xattn_video_eval.studies.story_quality", __doc__ or "", EXAMPLE, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
