"""`xattn-video status`: counts and time from the plan, the manifests and the failures; foreign folders do no harm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli_tools import SIZE, SPARSE, SPARSE_LABEL, Run
from xattn_video_pipelines.common.batch import FAILURES, PLAN
from xattn_video_pipelines.video import read_manifest


def told(xattn: Run, folder: Path) -> dict:
    done = xattn("status", folder, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_done_failed_and_left_of_a_run_that_was_stopped(model, tmp_path, xattn):
    out, prompts = tmp_path / "out", tmp_path / "p.txt"
    prompts.write_text("a cat\na dog\na hen\na fox\n")
    command = ("generate", "--model", model, "--prompts", prompts, "--out", out, "--attention", "both", *SIZE, *SPARSE)
    assert xattn(*command, "--limit", 2).code == 0
    counts = {name: told(xattn, out)[name] for name in ("done", "failed", "left", "seconds_to_go")}
    assert counts == {"done": 4, "failed": 0, "left": 0, "seconds_to_go": 0}
    # A run over all prompts that has no time is planned and not begun.
    assert xattn(*command, "--max-hours", "1e-6").code == 0
    document = told(xattn, out)
    assert (document["done"], document["failed"], document["left"]) == (4, 0, 4)
    rows = document["configurations"]
    assert list(rows) == ["dense", SPARSE_LABEL]
    for label, row in rows.items():
        seconds = [record["seconds"] for record in read_manifest(out / label).values()]
        assert row == {"done": 2, "failed": 0, "left": 2, "seconds_to_go": pytest.approx(sum(seconds))}
    assert document["seconds_to_go"] == pytest.approx(sum(row["seconds_to_go"] for row in rows.values()))
    # One fails, and one that was made is lost.
    too_large = ("--height", 65536, "--width", 65536, "--num-frames", 1001, "--steps", 2)
    third = tmp_path / "third.jsonl"
    third.write_text('{"prompt": "a hen", "id": "0003"}\n')
    failing = ("generate", "--model", model, "--prompts", third, "--out", out, "--attention", "dense", *too_large)
    assert xattn(*failing).code == 3
    (out / "dense/0001-s0.mp4").unlink()
    document = told(xattn, out)
    assert document["configurations"]["dense"] | {"seconds_to_go": 0} == {
        "done": 1, "failed": 1, "left": 2, "seconds_to_go": 0,
    }  # fmt: skip
    (failure,) = document["failures"]
    assert (failure["name"], failure["kind"]) == ("dense/0003-s0", "out_of_memory")
    printed = xattn("status", out).out.splitlines()
    assert printed[0].split() == ["done", "failed", "left", "time", "to", "go"]
    assert printed[1].split()[:4] == ["dense", "1", "1", "2"]
    assert printed[-2].split()[:4] == ["all", "3", "1", "4"]
    assert printed[-1].startswith("failed: dense/0003-s0: out_of_memory: cpu is out of memory")
    # What was made after it had failed has not failed.
    assert xattn(*command).code == 0
    document = told(xattn, out)
    assert (document["done"], document["failed"], document["left"], document["failures"]) == (8, 0, 0, [])
    # The same plan is written once.
    assert len((out / PLAN).read_text().splitlines()) == 3


def test_before_the_first_video_the_time_is_unknown(model, tmp_path, xattn):
    (tmp_path / "p.txt").write_text("a cat\n")
    command = ("generate", "--model", model, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "out", *SIZE)
    assert xattn(*command, "--max-hours", "1e-6").code == 0
    document = told(xattn, tmp_path / "out")
    assert (document["left"], document["seconds_to_go"]) == (1, None)
    assert xattn("status", tmp_path / "out").out.splitlines()[1].split()[-1] == "unknown"


def test_answers_count_one_by_one_and_a_question_fails_with_all_of_them(tmp_path, xattn):
    """The files of a run of `qa`, written out: three questions, dense and sparse."""
    (tmp_path / PLAN).write_text(
        json.dumps({"of": "answers", "attention": ["dense", "xattn"], "items": [["a", None], ["b", None], ["c", None]]})
        + "\n"
    )
    answers = [
        {"id": "a", "attention": label, "prefill_seconds": seconds, "decode_seconds": 1.0}
        for label, seconds in (("dense", 3.0), ("xattn", 1.0))
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    failure = {"attention": None, "id": "b", "seed": None, "name": "b", "kind": "input", "message": "b.mp4: damaged"}
    (tmp_path / FAILURES).write_text(json.dumps(failure) + "\n")
    document = told(xattn, tmp_path)
    assert (document["done"], document["failed"], document["left"]) == (2, 2, 2)
    assert document["seconds_to_go"] == 6.0
    assert [row["id"] for row in document["failures"]] == ["b"]
    assert xattn("status", tmp_path).out.splitlines()[-2:][0].split() == ["all", "2", "2", "2", "6", "s"]


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (None, None, "no plan.jsonl in it; give the --out folder of xattn-video generate, sweep or qa"),
        (PLAN, {"of": "videos", "attention": ["../elsewhere"], "items": [["a", 0]]}, "plan.jsonl:1: not a line"),
        (PLAN, {"of": "videos", "attention": ["/etc"], "items": [["a", 0]]}, "plan.jsonl:1: not a line"),
        (PLAN, {"of": "videos", "attention": ["."], "items": [["a", 0]]}, "plan.jsonl:1: not a line"),
        (PLAN, {"of": "videos", "attention": "dense", "items": [["a", 0]]}, "plan.jsonl:1: not a line"),
        (PLAN, {"of": "videos", "attention": ["dense"], "items": [["a"]]}, "plan.jsonl:1: not a line"),
        (PLAN, {"of": "videos", "attention": ["dense"], "items": [["a", True]]}, "plan.jsonl:1: not a line"),
        (PLAN, {"of": [], "attention": ["dense"], "items": []}, "plan.jsonl:1: not a line"),
        (FAILURES, {"attention": ["dense"], "id": "a", "seed": 0}, "failures.jsonl:1: not a line"),
        (FAILURES, {"attention": "dense", "id": "a", "seed": 0, "name": "a", "kind": "x"}, "failures.jsonl:1: not a"),
        (FAILURES, {"attention": "dense", "id": None, "seed": 0, "name": "", "kind": "", "message": ""}, "not a line"),
    ],
)
def test_a_folder_of_something_else_is_one_line(tmp_path, xattn, name, line, message):
    if name == FAILURES:
        (tmp_path / PLAN).write_text('{"of": "videos", "attention": ["dense"], "items": [["a", 0]]}\n')
    if name is not None:
        (tmp_path / name).write_text(json.dumps(line) + "\n")
    done = xattn("status", tmp_path)
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert message in done.err


def test_a_run_into_a_folder_whose_plan_is_damaged_is_one_line(model, tmp_path, xattn):
    (tmp_path / "p.txt").write_text("a cat\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / PLAN).write_text("[1]\n")
    done = xattn("generate", "--model", model, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "out", *SIZE)
    assert done.code == 2
    assert "plan.jsonl:1: not a line of this program" in done.err.splitlines()[-1]
