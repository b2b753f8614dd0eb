"""Folders that several processes use at once: a claim excludes, and a temporary file belongs to one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli_tools import SIZE, save_tiny_wan
from xattn_video_pipelines.common import files, jsonl
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import (
    claimed,
    make_writable,
    remove_dead_claim,
    remove_dead_partials,
    whole_files,
    write_texts,
)
from xattn_video_pipelines.video.manifest import read_manifest

ROOT = Path(__file__).parent.parent


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_claims_and_removals_of_dead_ones_never_overlap_and_nothing_else_is_said(tmp_path):
    """As `generate` does it: some processes hold the claim, others find the video finished and remove what is dead."""
    code = """
import os, sys, time
from pathlib import Path
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import claimed, remove_dead_claim
folder, held, refused = Path(sys.argv[1]), 0, 0
until = time.monotonic() + 120
while held < 200 and time.monotonic() < until:
    remove_dead_claim(folder / "video")
    try:
        with claimed(folder / "video"):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            os.unlink(folder / "inside")
            held += 1
    except UserError as error:
        assert str(error).endswith("video: another process is making it"), error
        refused += 1
print(held)
"""
    processes = [python(code, tmp_path) for _ in range(4)]
    told = [process.communicate(timeout=300) for process in processes]
    assert [out for out, _ in told] == ["200\n"] * 4, told
    assert list(tmp_path.iterdir()) == []


def test_a_removal_of_a_dead_claim_does_not_refuse_a_living_one(tmp_path):
    """It holds the lock for a moment, in which another process may ask for the claim."""
    code = """
import os, sys, time
from filelock import lock_descriptor
descriptor = os.open(sys.argv[1] + "/.video.lock", os.O_RDWR | os.O_CREAT)
assert lock_descriptor(descriptor, blocking=False)
print("held", flush=True)
time.sleep(0.05)
"""
    process = python(code, tmp_path)
    assert process.stdout.readline() == "held\n"
    with claimed(tmp_path / "video"):
        pass
    assert process.wait(60) == 0


def test_who_waits_for_a_claim_gets_it_and_says_so(tmp_path, capsys):
    code = """
import sys, time
from pathlib import Path
from xattn_video_pipelines.common.files import claimed
with claimed(Path(sys.argv[1]) / "video"):
    print("held", flush=True)
    time.sleep(1.5)
    (Path(sys.argv[1]) / "done").touch()
"""
    process = python(code, tmp_path)
    assert process.stdout.readline() == "held\n"
    with claimed(tmp_path / "video", wait=True):
        assert (tmp_path / "done").exists()
    assert process.wait(60) == 0
    note = f"{tmp_path / 'video'}: another process is making it; this one waits for it\n"
    assert capsys.readouterr().err == note


def test_two_runs_at_once_make_each_video_once(tmp_path):
    model, prompts, out = save_tiny_wan(tmp_path / "model"), tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a circle\na square\na star\n")
    code = "import sys; from xattn_video_pipelines.cli import main; sys.exit(main(sys.argv[1:]))"
    command = ("generate", "--model", model, "--prompts", prompts, "--out", out, "--attention", "dense", *SIZE)
    for _ in range(6):
        # A process that is refused a claim ends; the same command goes on.
        processes = [python(code, *command, "--device", "cpu") for _ in range(2)]
        codes = [(process.communicate(timeout=900), process.returncode) for process in processes]
        for (_, error), number in codes:
            assert number == 0 or error.rstrip().endswith("another process is making it"), error
        if len(read_manifest(out / "dense")) == 3:
            break
    lines = [json.loads(line) for line in (out / "dense/manifest.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == ["0001", "0002", "0003"]
    names = sorted(path.name for path in (out / "dense").iterdir())
    assert names == ["0001-s0.mp4", "0002-s0.mp4", "0003-s0.mp4", "manifest.jsonl"]


def test_links_with_temporary_names_are_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("report.html", "summary.json"):
        (folder / f".{Path(name).stem}.partial{Path(name).suffix}").symlink_to(victim)
        (folder / f".{name}.lock").symlink_to(tmp_path / "made-by-a-link")
        make_writable(folder)
        write_texts({folder / name: "text"})
        assert (folder / name).read_text() == "text"
        with (
            pytest.raises(UserError, match=r"\.lock: cannot write: it is a symbolic link"),
            claimed(folder / name, wait=True),
        ):
            pass
        remove_dead_claim(folder / name)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "made-by-a-link").exists()


def test_a_link_under_the_final_name_is_replaced_and_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "report.html").symlink_to(victim)
    write_texts({tmp_path / "report.html": "text"})
    assert (victim.read_text(), (tmp_path / "report.html").is_symlink()) == ("precious", False)


def test_a_new_file_has_the_permissions_that_the_user_wants(tmp_path):
    before = os.umask(0o027)
    try:
        write_texts({tmp_path / "a.json": "{}"})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_processes_that_write_one_file_at_once_all_succeed(tmp_path):
    code = """
import sys
from pathlib import Path
from xattn_video_pipelines.common.files import make_writable, write_texts
folder, text = Path(sys.argv[1]), sys.argv[2] * 100_000
for _ in range(100):
    make_writable(folder)
    write_texts({folder / "a.json": text, folder / "b.json": text})
"""
    processes = [python(code, tmp_path, letter) for letter in "xyz"]
    told = [(process.communicate(timeout=300), process.returncode) for process in processes]
    assert told == [(("", ""), 0)] * 3
    for name in ("a.json", "b.json"):
        assert (tmp_path / name).read_text() in {letter * 100_000 for letter in "xyz"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_what_a_killed_writer_leaves_goes_and_what_a_living_one_writes_stays(tmp_path):
    code = """
import sys, time
from pathlib import Path
from xattn_video_pipelines.common.files import whole_files
with whole_files(Path(sys.argv[1]) / "a.mp4") as (partial,):
    print(partial, flush=True)
    time.sleep(600)
"""
    process = python(code, tmp_path)
    partial = Path(process.stdout.readline().strip())
    not_ours = [tmp_path / ".notes.txt", tmp_path / ".notes.partial.md", tmp_path / "a.partial.mp4"]
    for path in not_ours:
        path.write_text("of somebody else")
    remove_dead_partials(tmp_path)
    assert partial.exists()
    process.kill()
    process.wait()
    assert partial.exists()
    with whole_files(tmp_path / "a.mp4") as (own,):
        own.write_bytes(b"a video")
        remove_dead_partials(tmp_path)
        assert (own.exists(), partial.exists()) == (True, False)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a.mp4", *not_ours])


def test_cleaning_up_takes_neither_links_nor_folders(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".a.partial.json").symlink_to(victim)
    (tmp_path / ".b.partial.json").mkdir()
    os.mkfifo(tmp_path / ".c.partial.json")
    started = time.monotonic()
    remove_dead_partials(tmp_path)
    assert time.monotonic() - started < 10
    assert len(list(tmp_path.iterdir())) == 4
    assert victim.read_text() == "precious"


def test_a_file_is_listed_for_leftovers_once_and_not_for_each_video(tmp_path, monkeypatch):
    listed = []
    real = os.listdir
    monkeypatch.setattr(files.os, "listdir", lambda folder: listed.append(folder) or real(folder))
    for number in range(20):
        write_texts({tmp_path / f"{number}.json": "{}"})
    assert listed == [tmp_path]


def test_a_log_that_is_a_link_a_pipe_or_a_device_is_refused(tmp_path):
    victim = tmp_path / "victim.jsonl"
    victim.write_text('{"id": "a", "seed": 0}\n')
    for name, make in (
        ("link", lambda path: path.symlink_to(victim)),
        ("pipe", os.mkfifo),
        ("device", lambda path: path.symlink_to("/dev/zero")),
    ):
        path = tmp_path / f"{name}.jsonl"
        make(path)
        for use in (lambda path=path: list(jsonl.read(path)), lambda path=path: jsonl.append(path, [{"b": 1}])):
            with pytest.raises(UserError, match=f"{name}.jsonl: cannot (read|write): (it is a symb|not a reg)"):
                use()
    assert victim.read_text() == '{"id": "a", "seed": 0}\n'
