"""`qa` over a file of questions of which some fail: exit codes, what is noted, what is answered, what a rerun does."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.language_families import save_video_model
from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.batch import FAILURES, SomeFailed
from xattn_video_pipelines.demo import world
from xattn_video_pipelines.qa import ANSWERS, SUMMARY, QaSettings, answer_questions
from xattn_video_pipelines.video import write_video

ROOT = Path(__file__).resolve().parent.parent
LABEL = "xattn-s8-t0.50-w0-b16-m0"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qa")
    save_video_model(folder)
    return folder


def write_items(folder: Path, *videos: str) -> Path:
    """A question about each video of the folder: `one`, `two`..."""
    lines = [{"id": f"q{number}", "video": video, "question": "w5"} for number, video in enumerate(videos)]
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "items.jsonl"


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Three videos, of which the second is cut in half."""
    for name, scene in zip(("first", "second", "third"), world.all_scenes(), strict=False):
        write_video(tmp_path / f"{name}.mp4", world.render(scene, 0), 8)
    whole = (tmp_path / "second.mp4").read_bytes()
    (tmp_path / "whole").write_bytes(whole)
    (tmp_path / "second.mp4").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def asked(model: Path, items: Path, out: Path, *more: Any) -> list[str]:
    given = ["qa", "--model", model, "--items", items, "--out", out, "--fps", 4, "--max-new-tokens", 2]
    given += ["--device", "cpu", "--stride", 8, "--threshold", 0.5, "--block-size", 16, "--min-tokens", 0]
    return [str(part) for part in (*given, "--dense-last", 0, *more)]


def rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in jsonl.read(path)]


def test_a_damaged_video_costs_its_own_questions_alone(model, videos, tmp_path, xattn):
    out = tmp_path / "out"
    items = write_items(videos, "second.mp4", "first.mp4", "third.mp4")
    command = asked(model, items, out, "--attention", "both", "--json")
    done = xattn(*command)
    assert done.code == 3
    assert [(row["id"], row["attention"]) for row in rows(out / ANSWERS)] == [
        (name, label) for name in ("q1", "q2") for label in ("dense", LABEL)
    ]
    (failure,) = rows(out / FAILURES)
    assert (failure["id"], failure["attention"], failure["seed"], failure["kind"]) == ("q0", None, None, "input")
    assert f"{videos / 'second.mp4'}: damaged or not a video" in failure["message"]
    assert failure["traceback"].startswith("Traceback")
    assert failure["versions"]["transformers"]
    assert done.err.splitlines()[-3:] == [
        f"questions that failed: 1; {out / FAILURES} has the tracebacks",
        f"  q0: input: {failure['message']}",
        "run the same command again for what is left or failed",
    ]
    document = json.loads(done.out)
    assert document == json.loads((out / SUMMARY).read_text())
    assert document["configurations"]["dense"]["answers"] == 2
    assert [row["id"] for row in document["failures"]] == ["q0"]

    # With one more question: the one that failed comes last, and this time it is answered.
    (videos / "second.mp4").write_bytes((videos / "whole").read_bytes())
    write_items(videos, "second.mp4", "first.mp4", "third.mp4", "first.mp4")
    again = xattn(*command)
    assert again.code == 0, again.err
    assert [row["id"] for row in rows(out / ANSWERS)][4:] == ["q3", "q3", "q0", "q0"]
    assert json.loads(again.out)["failures"] == []


def test_python_is_told_when_the_others_are_answered(model, videos, tmp_path):
    settings = QaSettings(
        model=str(model), items=write_items(videos, "second.mp4", "first.mp4"), device="cpu", attention="dense",
        max_new_tokens=1,
    )  # fmt: skip
    answered: list[str] = []
    with pytest.raises(SomeFailed, match=r"questions that failed: 1; q0: input: .*second.mp4") as failed:
        answer_questions(settings, lambda row: answered.append(row["id"]))
    assert answered == ["q1"]
    assert [row["id"] for row in failed.value.failures] == ["q0"]


def test_the_only_question_is_refused_in_one_line(model, videos, xattn):
    done = xattn("qa", "--model", model, "--video", videos / "second.mp4", "--question", "w5", "--device", "cpu")
    assert done.code == 2
    assert "second.mp4: damaged or not a video" in done.err.splitlines()[-1]


def test_a_run_of_questions_that_is_killed_goes_on(model, videos, tmp_path, xattn):
    out = tmp_path / "out"
    items = write_items(videos, "second.mp4", *["first.mp4", "third.mp4"] * 20)
    command = asked(model, items, out, "--attention", "dense")
    process = subprocess.Popen(
        [sys.executable, "-m", "xattn_video_pipelines.cli", *command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and len(rows(out / ANSWERS)) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=1000) == -signal.SIGKILL
    before = rows(out / ANSWERS)
    assert 3 <= len(before) < 40
    done = xattn(*command)
    assert done.code == 3
    after = rows(out / ANSWERS)
    assert after[: len(before)] == before
    assert [row["id"] for row in after] == [f"q{number}" for number in range(1, 41)]
    assert [row["id"] for row in rows(out / FAILURES)] == ["q0", "q0"]


def test_questions_that_the_time_does_not_suffice_for_are_left(model, videos, tmp_path, xattn):
    items, out = write_items(videos, "first.mp4", "third.mp4"), tmp_path / "out"
    done = xattn(*asked(model, items, out, "--max-hours", "1e-6"))
    assert done.code == 0, done.err
    assert "stopped: the time of --max-hours 1e-06 does not suffice for another one; questions left: 2" in done.err
    assert xattn(*asked(model, items, out)).code == 0
    assert len(rows(out / ANSWERS)) == 2
