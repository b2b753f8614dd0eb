"""The manifest survives a kill at any byte and never mixes settings silently."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.video.manifest import NAME, append_record, differences, read_manifest, remove_records

ROOT = Path(__file__).parent.parent


def record(name: str, seed: int = 0, **more: object) -> dict[str, object]:
    return {"id": name, "seed": seed, **more}


def test_records_come_back_by_id_and_seed_and_the_later_wins(tmp_path):
    assert read_manifest(tmp_path) == {}
    for entry in (record("a", note="🦊\n"), record("a", 1), record("b"), record("a", note="again")):
        append_record(tmp_path, entry)
    assert read_manifest(tmp_path) == {
        ("a", 0): record("a", note="again"),
        ("a", 1): record("a", 1),
        ("b", 0): record("b"),
    }
    assert len((tmp_path / NAME).read_bytes().splitlines()) == 4


def test_a_last_line_cut_at_any_byte_is_ignored_and_mended(tmp_path):
    path = tmp_path / NAME
    append_record(tmp_path, record("a"))
    whole = path.read_bytes()
    append_record(tmp_path, record("b", note="é"))
    both = path.read_bytes()
    for end in range(len(whole), len(both)):
        path.write_bytes(both[:end])
        assert set(read_manifest(tmp_path)) == {("a", 0)}
        append_record(tmp_path, record("c"))
        assert set(read_manifest(tmp_path)) == {("a", 0), ("c", 0)}
        assert len(path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("line", ["{", "[]", '{"id": 3, "seed": 0}', '{"id": "a"}', "\x00"])
def test_a_broken_line_that_is_not_the_last_is_an_error_with_its_number(tmp_path, line):
    (tmp_path / NAME).write_text(json.dumps(record("a")) + "\n" + line + "\n" + json.dumps(record("b")) + "\n")
    with pytest.raises(UserError, match=rf"{NAME}:2: not a manifest line"):
        read_manifest(tmp_path)


def test_removed_records_are_gone_and_the_others_stay_in_order(tmp_path):
    for name in "abcd":
        append_record(tmp_path, record(name))
    remove_records(tmp_path, {("b", 0), ("d", 0), ("x", 0)})
    assert list(read_manifest(tmp_path)) == [("a", 0), ("c", 0)]
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    remove_records(tmp_path / "not-there", {("a", 0)})


def test_a_line_that_does_not_fit_on_the_disk_is_an_error(tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            return super().write(data[:10])

    append_record(tmp_path, record("a"))
    monkeypatch.setattr(os, "fdopen", lambda descriptor, mode, buffering: Full(descriptor, mode))
    with pytest.raises(UserError, match=f"{NAME}: cannot write: No space left"):
        append_record(tmp_path, record("b"))
    monkeypatch.undo()
    assert set(read_manifest(tmp_path)) == {("a", 0)}
    append_record(tmp_path, record("b"))
    assert set(read_manifest(tmp_path)) == {("a", 0), ("b", 0)}


def test_differences_name_the_field_and_both_values():
    old = {"steps": 20, "config": {"dense_layers": []}, "guidance_scale": 5, "extra": 1}
    new = {"steps": 50, "config": {"dense_layers": ()}, "guidance_scale": 5.0}
    assert differences(old, new, ("steps", "config", "guidance_scale")) == ["steps 20, now 50"]
    assert differences({}, {"steps": 1}, ("steps",)) == ["steps null, now 1"]


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    """Several make videos of one folder; a line that another is writing is not a torn one, and none is replaced."""
    code = """
import sys
from pathlib import Path
from xattn_video_pipelines.video.manifest import append_record, remove_records
folder, name = Path(sys.argv[1]), sys.argv[2]
for number in range(60):
    append_record(folder, {"id": f"{name}{number}", "seed": 0, "long": "x" * 40_000})
    if number % 10 == 9:
        remove_records(folder, {(f"{name}{number - 5}", 0)})
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], cwd=ROOT) for name in "abc"]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    wanted = {(f"{name}{number}", 0) for name in "abc" for number in range(60) if number % 10 != 4}
    assert set(read_manifest(tmp_path)) == wanted
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
