"""What reaches a terminal, what a run does without one, and several programs at work in one folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli_tools import SIZE
from tests.test_hostile_folder import DENSE, ESCAPES, SPARSE, add_video, edit
from xattn_video_pipelines.common.batch import PLAN
from xattn_video_pipelines.common.run_file import RUN_FILE
from xattn_video_pipelines.common.tables import aligned
from xattn_video_pipelines.common.terminal import printable
from xattn_video_pipelines.demo.asking import QUESTIONS
from xattn_video_pipelines.qa.settings import ANSWERS, SUMMARY
from xattn_video_pipelines.video import read_manifest, write_video
from xattn_video_pipelines.video.io import read_video

ROOT = Path(__file__).parent.parent
MAIN = "import sys; from xattn_video_pipelines.cli import main; sys.exit(main(sys.argv[1:]))"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / ".links")))}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "run"
    for label in (DENSE, SPARSE):
        for seed in range(3):
            add_video(folder / label, seed)
    return folder


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "run"))


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAIN, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def shell(redirections: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-c", MAIN, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, timeout=600)


# --- text for the terminal ------------------------------------------------------------------------------------


def test_control_characters_are_written_as_escapes():
    assert printable("a\x1b[2J\x9b\x7f\r\u202e\u2066b") == r"a\x1b[2J\x9b\x7f\r\u202e\u2066b"
    kept = "tab\tline\né 中 🦊 العربية \ud83d"
    assert printable(kept) == kept
    assert aligned([("a\nb", "\x1b[31m"), ("c", "d")], left=2) == "a\\nb  \\x1b[31m\nc     d"


@pytest.mark.parametrize("json_flag", [(), ("--json",)])
def test_what_others_wrote_never_steers_the_terminal(run, xattn, json_flag):
    for label in (DENSE, SPARSE):
        edit(run / label, line=0, prompt=f"a red circle {ESCAPES}", device_name=ESCAPES, model=ESCAPES)
    prompts = run / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "a", ESCAPES: 1}) + "\n" + json.dumps({"prompt": "a", "id": ESCAPES}))
    questions = run / "questions.jsonl"
    questions.write_text(json.dumps({"video": ESCAPES, "question": "a"}) + "\n")
    points = run / "points.json"
    points.write_text(json.dumps({ESCAPES: {ESCAPES: ESCAPES}}))
    for command in (
        ("compare", run / DENSE, run / SPARSE, "--no-lpips", *json_flag),
        ("judge", run / DENSE, *json_flag),
        ("report", run, "--no-lpips"),
        ("generate", "--model", "demo", "--prompts", prompts, "--out", run, *json_flag),
        ("qa", "--model", "demo", "--items", questions, *json_flag),
        ("sweep", "--model", "demo", "--prompts", prompts, "--points", points, "--out", run / "sweep"),
    ):
        done = xattn(*command)
        assert "Traceback" not in done.err
        # Progress bars move the cursor up.
        for text in (done.out, done.err.replace("\x1b[A", "")):
            assert not set(text) & set(ESCAPES) - set("[2J]0;owned31m"), (command, text)
    edit(run / SPARSE, id=f"cat{ESCAPES}")
    refused = xattn("judge", run / SPARSE)
    assert refused.code == 2
    assert 'id must be a text without control characters, got "cat\\u001b[2J' in refused.err


# --- streams that are closed or full --------------------------------------------------------------------------


@pytest.mark.parametrize("redirections", ["2>/dev/full", "2>&- >&- <&-", "2>&1 >&- | true"])
def test_a_run_ends_well_without_a_stderr(model, tmp_path, redirections):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a circle\na square\n")
    command = ("generate", "--model", model, "--prompts", prompts, "--out", out, "--attention", "dense", *SIZE)
    done = shell(redirections, *command, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    records = read_manifest(out / "dense")
    assert list(records) == [("0001", 0), ("0002", 0)]
    for record in records.values():
        assert read_video(out / "dense" / record["file"]).shape == (9, 64, 64, 3)


@pytest.mark.parametrize("redirections", ["2>/dev/full", "2>&-"])
def test_without_a_stderr_the_document_on_stdout_is_whole(run, redirections):
    done = shell(redirections, "compare", run / DENSE, run / SPARSE, "--no-lpips", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["pairs"] == 3
    refused = shell(redirections, "compare", run / "none", run / SPARSE, "--no-lpips", "--json")
    assert (refused.returncode, refused.stdout) == (2, "")


# --- files that are none ------------------------------------------------------------------------------------


def sparse_file(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(4 * 2**30)
    return path


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--model", "demo", "--prompts", "{}.jsonl"),
        ("generate", "--model", "demo", "--prompts", "{}.txt"),
        ("qa", "--model", "demo", "--items", "{}.jsonl"),
        ("sweep", "--model", "demo", "--prompts", "p.txt", "--out", "o", "--points", "{}.json"),
        ("generate", "--model", "demo", "--prompts", "p.txt", "--threshold", "{}.json"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("zero", "must be a regular file, and not a device or a pipe"),
        ("pipe", "must be a regular file, and not a device or a pipe"),
        ("large", "must (have|be) at most [0-9,]+ bytes"),
        ("folder", "Is a directory"),
    ],
)
def test_devices_pipes_and_huge_files_are_one_line(tmp_path, xattn, command, kind, message):
    suffix = next(Path(word).suffix for word in command if "{}" in word)
    path = tmp_path / f"file{suffix}"
    {"zero": lambda: path.symlink_to("/dev/zero"), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir,
     "large": lambda: sparse_file(path)}[kind]()  # fmt: skip
    (tmp_path / "p.txt").write_text("a red circle\n")
    words = [word.replace("{}", str(tmp_path / "file")).replace("p.txt", str(tmp_path / "p.txt")) for word in command]
    done = xattn(*words)
    assert done.code == 2, done.err
    (line,) = done.err.splitlines()
    assert str(path) in line
    assert re.search(message, line), line


# --- several at once --------------------------------------------------------------------------------------------


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    told = [process.communicate(timeout=900) for process in processes]
    for process, (_, error) in zip(processes, told, strict=True):
        assert process.returncode == 0, error
        assert "cannot write" not in error
    return told


def test_three_comparisons_at_once_measure_once(run):
    told = finish([start("compare", run / DENSE, run / SPARSE, "--no-lpips", "--json") for _ in range(3)])
    assert len({out for out, _ in told}) == 1
    for _, error in told:
        # One that starts after another has ended measures again, as a user wants it to.
        assert ("summary.json: another process is making it" in error) != ("3/3" in error)
    assert not list((run / SPARSE).glob(".*"))


def test_a_comparison_that_waits_takes_what_was_measured_for_it(run):
    from filelock import lock_descriptor

    finish([start("compare", run / DENSE, run / SPARSE, "--no-lpips")])
    summary = run / SPARSE / "summary.json"
    before = summary.stat().st_mtime_ns
    for changes, same in (({}, True), ({"seconds": 9.0, "finished": "2026-02-02"}, False)):
        edit(run / SPARSE, **changes)
        descriptor = os.open(run / SPARSE / ".summary.json.lock", os.O_RDWR | os.O_CREAT)
        assert lock_descriptor(descriptor, blocking=False)
        process = start("compare", run / DENSE, run / SPARSE, "--no-lpips")
        line = process.stderr.readline()
        assert "summary.json: another process is making it; this one waits for it" in line
        os.close(descriptor)
        finish([process])
        assert (summary.stat().st_mtime_ns == before) is same


def test_report_and_compare_at_once_all_end_well(run):
    finish(
        [start("report", run, "--no-lpips") for _ in range(3)]
        + [start("compare", run / DENSE, run / SPARSE, "--no-lpips") for _ in range(2)]
    )
    assert json.loads((run / SPARSE / "summary.json").read_text())["pairs"] == 3
    assert (run / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert not list(run.rglob(".*"))


def test_a_report_removes_the_claim_of_a_comparison_that_was_killed(run, xattn):
    assert xattn("compare", run / DENSE, run / SPARSE, "--no-lpips").code == 0
    lock = run / SPARSE / ".summary.json.lock"
    lock.touch()
    assert xattn("report", run, "--no-lpips").code == 0
    assert not lock.exists()


def story(folder: Path, seed: int) -> Path:
    """A video of the shapes world would do as well; the demo's model answers about any."""
    from tests.test_hostile_folder import clip

    path = folder / "story.mp4"
    write_video(path, clip(seed), 4)
    return path


def ask_of(folder: Path) -> tuple[object, ...]:
    (folder / QUESTIONS).write_text(
        "".join(
            json.dumps({"id": f"q{i}", "video": "story.mp4", "question": "What colour was the first shape?"}) + "\n"
            for i in range(3)
        )
    )
    options = ("--attention", "dense", "--device", "cpu", "--max-new-tokens", 2)
    return ("qa", "--model", "demo", "--items", folder / QUESTIONS, "--out", folder / "answers", *options)


def test_three_that_ask_at_once_ask_each_question_once(tmp_path):
    story(tmp_path, 0)
    told = finish([start(*ask_of(tmp_path), "--json") for _ in range(3)])
    assert len({out for out, _ in told}) == 1
    rows = (tmp_path / "answers" / ANSWERS).read_text().splitlines()
    assert [json.loads(row)["id"] for row in rows] == ["q0", "q1", "q2"]
    assert sorted(path.name for path in (tmp_path / "answers").iterdir()) == sorted([ANSWERS, PLAN, RUN_FILE, SUMMARY])


def test_a_video_replaced_by_another_of_equal_size_and_time_is_asked_about_again(tmp_path, xattn):
    path = story(tmp_path, 0)
    command = ask_of(tmp_path)
    answers = tmp_path / "answers" / ANSWERS
    assert xattn(*command).code == 0
    size, times = path.stat().st_size, (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    assert xattn(*command).code == 0
    assert len(answers.read_text().splitlines()) == 3
    (tmp_path / "other").mkdir()
    other = story(tmp_path / "other", 1).read_bytes()
    # Bytes behind the end of an mp4's boxes are no part of the picture.
    length = max(size, len(other))
    for data in (path.read_bytes(), other):
        path.write_bytes(data + b"\0\0\0\x08free" * ((length - len(data)) // 8) + b"\0" * ((length - len(data)) % 8))
        os.utime(path, ns=times)
        assert path.stat().st_size == length
        before = len(answers.read_text().splitlines())
        assert xattn(*command).code == 0
        if data is other:
            assert len(answers.read_text().splitlines()) == before + 3
    # A copy with other times is the same video.
    os.utime(path, ns=(1, 1))
    before = len(answers.read_text().splitlines())
    assert xattn(*command).code == 0
    assert len(answers.read_text().splitlines()) == before
