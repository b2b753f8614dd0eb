"""Logs lose no row to a kill or to another process, and a claim is held by one process at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import claimed, remove_dead_claim

ROOT = Path(__file__).parent.parent


def rows(path: Path) -> list[jsonl.Row]:
    return [row for _, row in jsonl.read(path)]


def test_rows_come_back_with_their_places(tmp_path):
    path = tmp_path / "log.jsonl"
    written = [{"a": "\u2028 \ud83d\n"}, {"b": [1, None, 0.1]}]
    assert list(jsonl.read(path)) == []
    jsonl.append(path, written[:1])
    jsonl.append(path, written[1:])
    assert list(jsonl.read(path)) == [(f"{path}:1", written[0]), (f"{path}:2", written[1])]
    assert path.read_bytes() == b'{"a": "\xe2\x80\xa8 \\ud83d\\n"}\n{"b": [1, null, 0.1]}\n'


def test_a_row_cut_at_any_byte_is_left_out_and_cut_away(tmp_path):
    path = tmp_path / "log.jsonl"
    jsonl.append(path, [{"a": 1}])
    whole = path.stat().st_size
    jsonl.append(path, [{"b": "é"}, {"c": 3}])
    data = path.read_bytes()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        kept = [{"a": 1}, {"b": "é"}][: data[:end].count(b"\n")]
        assert rows(path) == kept
        jsonl.repair(path)
        assert path.read_bytes() == jsonl.text(kept).encode()
        path.write_bytes(data[:end])
        jsonl.append(path, [{"d": 4}])
        assert rows(path) == [*kept, {"d": 4}]
    assert whole < len(data)


@pytest.mark.parametrize("line", [b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b"\x00"])
def test_a_whole_line_that_is_no_object_is_an_error_with_its_place(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=r"log\.jsonl:3: not one of ours$"):
        list(jsonl.read(path, "not one of ours"))


def test_only_wanted_rows_are_kept_and_the_torn_one_goes(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(jsonl.text({"n": n} for n in range(5)) + '{"n": 5')
    jsonl.keep(path, lambda row: row["n"] % 2 == 0)
    assert path.read_text() == jsonl.text([{"n": 0}, {"n": 2}, {"n": 4}])


def test_a_follower_reads_new_whole_lines_only(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"old": 1}\n')
    log = jsonl.Follower(path)
    assert log.new() == []
    with path.open("a") as file:
        file.write('{"a": 1}\n{"b"')
    assert log.new() == [{"a": 1}]
    with path.open("a") as file:
        file.write(": 2}\n")
    assert log.new() == [{"b": 2}]
    assert log.new() == []
    assert jsonl.Follower(tmp_path / "none").new() == []


def test_what_cannot_be_read_or_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot read: Is a directory"):
        list(jsonl.read(tmp_path))
    jsonl.repair(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    for change in (
        lambda: jsonl.repair(tmp_path),
        lambda: jsonl.append(tmp_path, [{}]),
        lambda: jsonl.keep(tmp_path, bool),
    ):
        with pytest.raises(UserError, match="cannot write: Is a directory"):
            change()


def test_a_claim_is_held_by_one_process_at_a_time(tmp_path):
    """Each holder creates a file that must not be there, and removes it before it gives the claim back."""
    code = """
import os, sys
from pathlib import Path
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import claimed
folder, held = Path(sys.argv[1]), 0
while held < 300:
    try:
        with claimed(folder / "video"):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            os.unlink(folder / "inside")
            held += 1
    except UserError:
        pass
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(4)]
    assert [process.wait(120) for process in processes] == [0] * 4
    assert list(tmp_path.iterdir()) == []


def test_only_a_dead_claim_is_removed(tmp_path):
    lock = tmp_path / ".video.lock"
    with claimed(tmp_path / "video"):
        remove_dead_claim(tmp_path / "video")
        assert lock.exists()
        with pytest.raises(UserError, match="video: another process is making it"), claimed(tmp_path / "video"):
            pass
    lock.touch()
    remove_dead_claim(tmp_path / "video")
    assert not lock.exists()
