"""Manifests are read once, and videos that are not whole are made again."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli_tools import SIZE
from xattn_video_eval.report.videos import data_url
from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.video import read_video
from xattn_video_pipelines.video.manifest import (
    NAME,
    Manifest,
    append_record,
    made_meanwhile,
    read_manifest,
    remove_records,
    size_and_digest,
)


def bulk(folder: Path, count: int) -> None:
    """A manifest with many finished videos of another prompt file, about as long as real lines."""
    layers = {f"transformer.blocks.{layer}.attn1": [0.5] * 50 for layer in range(40)}
    rows = [
        {"id": f"bulk-{number}", "seed": 0, "file": f"bulk-{number}-s0.mp4", "seconds": 1.0, "prompt": "x" * 200,
         "density_by_layer_and_step": layers}
        for number in range(count)
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_text(jsonl.text(rows))


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all lines of a `bulk` manifest that are parsed."""
    lengths: list[int] = []
    real = json.loads

    def loads(text: Any, **options: Any) -> Any:
        if ('"bulk-' if isinstance(text, str) else b'"bulk-') in text:
            lengths.append(len(text))
        return real(text, **options)

    monkeypatch.setattr(json, "loads", loads)
    return lengths


def test_a_run_parses_each_line_of_the_manifest_once(model, tmp_path, xattn, parsed):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a circle\na square\na star\n")
    bulk(out / "dense", 500)
    done = xattn("generate", "--model", model, "--prompts", prompts, "--out", out, "--attention", "dense", *SIZE)
    assert done.code == 0, done.err
    assert len(parsed) == 500
    assert len(read_manifest(out / "dense")) == 503


def test_a_video_costs_the_same_however_many_are_finished(tmp_path, parsed):
    """The first look reads all finished videos, and each look after it what is new."""
    bulk(tmp_path, 2_000)
    manifest = Manifest(tmp_path)
    started = time.perf_counter()
    assert len(manifest.records()) == 2_000
    first = time.perf_counter() - started
    started, before = time.perf_counter(), len(parsed)
    for number in range(50):
        key = (f"own-{number}", 0)
        assert not made_meanwhile(manifest, tmp_path / "own.mp4", key, None, {})
        append_record(tmp_path, {"id": key[0], "seed": 0})
    each = (time.perf_counter() - started) / 50
    assert len(manifest.records()) == 2_050
    assert len(parsed) == before == 2_000
    assert each < first / 10


def test_a_manifest_follows_what_others_add_replace_and_remove(tmp_path):
    manifest = Manifest(tmp_path)
    assert manifest.records() == {}
    for name in "abc":
        append_record(tmp_path, {"id": name, "seed": 0, "note": name})
    assert list(manifest.records()) == [("a", 0), ("b", 0), ("c", 0)]
    remove_records(tmp_path, {("b", 0)})
    assert list(manifest.records()) == [("a", 0), ("c", 0)]
    path = tmp_path / NAME
    # Edited in place by a person: the same file, as long as before or longer.
    for text in (path.read_text().replace('"note": "c"', '"note": "x"'), '{"id": "d", "seed": 0}\n' * 9, ""):
        path.write_text(text)
        assert manifest.records() == read_manifest(tmp_path)
    append_record(tmp_path, {"id": "e", "seed": 0})
    with path.open("a") as file:
        file.write('{"id": "torn", "se')
    assert list(manifest.records()) == [("e", 0)]
    append_record(tmp_path, {"id": "f", "seed": 0})
    assert list(manifest.records()) == [("e", 0), ("f", 0)]
    with path.open("a") as file:
        file.write("broken\n")
    with pytest.raises(UserError, match=rf"{NAME}:3: not a manifest line"):
        manifest.records()
    path.unlink()
    assert manifest.records() == {}


def empty(path: Path) -> None:
    path.write_bytes(b"")


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("spoil", [empty, half, grown])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_video_that_is_not_whole_is_made_again_and_said(model, tmp_path, xattn, spoil, suffix):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a circle\na square\n")
    command = ("generate", "--model", model, "--prompts", prompts, "--out", out, "--attention", "dense", *SIZE)
    command = (*command, "--lossless")
    assert xattn(*command).code == 0
    record = read_manifest(out / "dense")["0001", 0]
    path = out / f"dense/0001-s0.{suffix}"
    prefix = "lossless_" if suffix == "mkv" else ""
    assert {name: record[name] for name in (f"{prefix}bytes", f"{prefix}sha256")} == size_and_digest(path, prefix)
    size, frames = path.stat().st_size, read_video(path)
    spoil(path)
    there = path.stat().st_size
    done = xattn(*command, "--json")
    assert done.code == 0, done.err
    said = f"{path}: has {there:,} bytes, and its manifest says {size:,}; it is made again"
    assert done.err.count(said) == 1
    assert [video["status"] for video in json.loads(done.out.splitlines()[-1])["videos"]] == ["made", "kept"]
    assert np.array_equal(read_video(path), frames)
    assert "made again" not in xattn(*command).err


def test_manifests_of_earlier_versions_tell_no_size(model, tmp_path, xattn):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a circle\n")
    command = ("generate", "--model", model, "--prompts", prompts, "--out", out, "--attention", "dense", *SIZE)
    assert xattn(*command).code == 0
    path = out / "dense" / NAME
    record = json.loads(path.read_text())
    del record["bytes"], record["sha256"]
    path.write_text(json.dumps(record) + "\n")
    assert "1 of 1 videos are already finished and kept" in xattn(*command).err
    empty(out / "dense/0001-s0.mp4")
    assert "0001-s0.mp4: has 0 bytes; it is made again" in xattn(*command).err
    assert read_video(out / "dense/0001-s0.mp4").shape == (9, 64, 64, 3)


def test_a_report_holds_the_videos_that_were_made(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"a video")
    told = size_and_digest(path)
    assert data_url(path, told["sha256"]) == data_url(path) == "data:video/mp4;base64,YSB2aWRlbw=="
    path.write_bytes(b"another")
    assert path.stat().st_size == told["bytes"]
    with pytest.raises(UserError, match=r"a\.mp4: not the file that generate wrote, its SHA-256"):
        data_url(path, told["sha256"])
