"""Files that people write or are sent, changed at random: a command says one line or works, and never more.

100 examples of each kind; the environment variable XATTN_VIDEO_FUZZ raises the number, as `make soak` does.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.test_hostile_folder import DENSE, SPARSE, add_video
from xattn_video_eval.report.command import write_report
from xattn_video_eval.report.settings import ReportSettings
from xattn_video_eval.sweep import SweepSettings
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.qa.questions import read_questions
from xattn_video_pipelines.video.manifest import Manifest, read_manifest
from xattn_video_pipelines.video.prompts import read_prompts

EXAMPLES = int(os.environ.get("XATTN_VIDEO_FUZZ", "100"))
# Times depend on what else the machine does.
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

TEXTS = st.text(st.characters(codec=None), max_size=20) | st.sampled_from(
    ["", "a", "0001", "a.mp4", "../a.mp4", "/etc/passwd", "\ud83d", "\x1b[2J", "\u2028", "a\nb", "x" * 300]
)
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from([2**31, 2**63, 2**64, 10**400, 1e308, -1e308, 5e-324, -0.0, float("nan"), float("inf")]),
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
PROMPT = {"prompt": "a red circle", "id": "a", "seed": 1, "negative_prompt": "b", "image": "picture.png"}
QUESTION = {"video": "story.mp4", "question": "what?", "options": ["a", "b"], "answer": "A", "id": "q"}
RAW = st.sampled_from(
    [b"[" * 200_000, b'{"a":' * 100_000, b"\xff\xfe", b"\x00", b"NaN", b"9" * 5000, b"{", b'"', b"\xef\xbb\xbf{}",
     b'{"id": "a", "id": "b"}', b"\r", b"null",
     b"[]", b'{"id": "\\ud83d", "seed": 0}', b"-", b'{"seed": 1e999, "id": "a"}']
) | st.binary(max_size=40)  # fmt: skip


def mutated(row: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """A line with some of the fields of `row` changed, missing or doubled, or with anything else in it."""
    changes = st.dictionaries(st.sampled_from(sorted(row)) | TEXTS, VALUES, min_size=1, max_size=3)
    gone = st.sets(st.sampled_from(sorted(row)), max_size=1)

    def line(changes: dict[str, Any], gone: set[str], cut: int | None) -> bytes:
        text = json.dumps({name: value for name, value in {**row, **changes}.items() if name not in gone})
        return text.encode()[:cut]

    return st.builds(line, changes, gone, st.none() | st.integers(0, 200)) | RAW


def lines(row: dict[str, Any]) -> st.SearchStrategy[bytes]:
    good = st.just(json.dumps(row).encode())
    return st.lists(good | mutated(row), min_size=1, max_size=3).map(lambda rows: b"\n".join([*rows, b""]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "story.mp4").write_bytes(b"not looked into")
    (folder / "picture.png").write_bytes(b"not looked into")
    return folder


def one_line(error: UserError) -> None:
    text = str(error)
    assert text
    # `guarded` prints it so, whatever it quotes.
    " ".join(text.split()).encode("utf-8", "backslashreplace")
    assert len(text) < 5000


@fuzz
@given(data=lines(PROMPT))
def test_prompt_files(place, data):
    for suffix in (".jsonl", ".txt"):
        path = place / f"prompts{suffix}"
        path.write_bytes(data)
        try:
            found = read_prompts(path).prompts
        except UserError as error:
            one_line(error)
        else:
            assert all(prompt.text.encode() and prompt.id.isascii() for prompt in found)


@fuzz
@given(data=lines(QUESTION))
def test_question_files(place, data):
    path = place / "questions.jsonl"
    path.write_bytes(data)
    try:
        found = read_questions(path)
    except UserError as error:
        one_line(error)
    else:
        for question in found:
            assert question.video.is_file()
            assert isinstance(question.prompt, str)
            question.right("A")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fuzz-run")
    record = {label: add_video(folder / label, 0, lossless=False) for label in (DENSE, SPARSE)}[SPARSE]
    return folder, record


RECORD = {
    "id": "cat", "seed": 0, "file": "cat-s0.mp4", "lossless_file": None, "prompt": "a red circle on white",
    "model": "m", "config": {"stride": 8, "threshold": 0.9}, "height": 64, "width": 64, "num_frames": 4, "fps": 16,
    "steps": 2, "seconds": 2.0, "seconds_per_step": 1.0, "mean_density": 0.5, "density_by_step": [1.0, 0.5],
    "density_by_layer": {"a": 0.5}, "density_by_layer_and_step": {"a": [1.0, 0.5]}, "dense_reasons": {"x": 1},
    "device_name": "CPU", "versions": {"torch": "2"}, "finished": "2026", "peak_memory_bytes": 5, "tokens": 7,
    "residual_bytes": 0, "calls_without_residual": 0, "bytes": 100, "sha256": None, "weights": None, "commit": None,
}  # fmt: skip


@fuzz
@given(data=lines(RECORD))
def test_manifests(place, data):
    (place / "manifest.jsonl").write_bytes(data)
    try:
        found = read_manifest(place)
    except UserError as error:
        one_line(error)
    else:
        assert Manifest(place).records() == found
        assert all("/" not in (record.get("file") or "") for record in found.values())


@fuzz
@given(name=st.sampled_from(sorted(RECORD)), value=VALUES)
def test_a_report_about_a_changed_manifest(run, name, value):
    """The whole way: what passes the door must not end in a traceback behind it."""
    folder, _ = run
    record = {**RECORD, name: value}
    (folder / SPARSE / "manifest.jsonl").write_text(json.dumps(record) + "\n")
    (folder / SPARSE / "summary.json").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as out:
        try:
            write_report(ReportSettings(folder, out=Path(out) / "page.html", lpips=False), progress=False)
        except UserError as error:
            one_line(error)


CONFIG = {
    "preset": "balanced", "stride": 8, "threshold": 0.9, "block_size": 128, "warmup_steps": 5, "residual": "int4",
    "refresh_every": 0.2, "anchors": 1, "threshold_ramp": 0.1, "keep_masks": 2, "per_head": True,
    "dense_layers": [], "selection": "top_k", "top_k": 3, "top_ratio": 0.1, "warmup": 0.5, "min_tokens": 0,
    "refresh": "fixed",
}  # fmt: skip


@fuzz
@given(values=st.dictionaries(st.sampled_from(sorted(CONFIG)), VALUES, max_size=3) | VALUES)
def test_points_of_a_sweep(place, values):
    path = place / "points.json"
    path.write_text(json.dumps({"a": values} if isinstance(values, dict) else values))
    try:
        sweep = SweepSettings(model="demo", prompts=place / "none.txt", out=place / "out", points=path)
        assert sweep.configs
    except UserError as error:
        one_line(error)
