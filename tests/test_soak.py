"""A few random kills of each program, as `make soak` does many: nothing is lost, doubled, unreadable or left over."""

from __future__ import annotations

import random
import secrets
import shutil
from pathlib import Path

import pytest

from tests import soak
from tests.soak import Figures, Subject

KILLS = 5
ITEMS = {"generate": 8, "qa": 8, "compare": 1, "report": 1, "sweep": 6}


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    return soak.subjects(tmp_path_factory.mktemp("soak"))


@pytest.mark.parametrize("program", soak.PROGRAMS)
def test_random_kills_lose_nothing(program: str, subjects: dict[str, Subject], tmp_path: Path) -> None:
    seed = secrets.randbelow(2**31)
    figures = soak.kill_often(subjects[program], tmp_path, KILLS, random.Random(seed))
    assert figures.clean, f"seed {seed}: {figures.line(program)}"
    assert figures.kills == KILLS
    assert figures.items % ITEMS[program] == 0
    assert figures.items >= 2 * ITEMS[program]


def test_it_sees_what_is_lost_doubled_and_left(subjects: dict[str, Subject], tmp_path: Path) -> None:
    """Folders as a worse program would leave them."""
    subject = subjects["generate"]
    made = tmp_path / "0" / "dense"
    (source,) = (Path(subject.arguments[4]).parent / "made").glob("dense")
    shutil.copytree(source, made)
    figures = Figures()
    known = soak.look(subject, made.parent, {}, figures)
    assert (len(known), figures.clean) == (4, True)
    first, second = sorted(made.glob("*.mp4"))[:2]
    lines = (made / "manifest.jsonl").read_text().splitlines()
    (made / "manifest.jsonl").write_text("\n".join(lines[1:]) + "\n")
    second.touch()
    after = soak.look(subject, made.parent, known, figures)
    assert len(after) == 3
    assert len(figures.lost) == 1
    assert figures.doubled == [f"0/dense/{second.stem}"]
    first.write_bytes(b"")
    (made / ".partial.mp4").touch()
    assert [path.name for path in soak.strangers(made.parent, subject.files)] == [".partial.mp4"]
    sorted(made.glob("*.mp4"))[-1].write_bytes(b"no video")
    soak.look(subject, made.parent, after, figures)
    assert len(figures.undecodable) == 1


def test_growth_is_told_from_the_quarters() -> None:
    assert soak.growth([9.0, 9.0, 1.0, 1.0, 1.0, 5.0, 1.5, 1.5]) == 1.5


def test_many_videos_in_one_process(tmp_path: Path) -> None:
    rows = soak.many_videos(tmp_path, 6)
    assert len(rows) == 6
    assert all(row["seconds"] > 0 and row["mib"] > 50 for row in rows)
    soak.draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
