"""What the command line answers to mistakes: exit code 2, nothing on stdout, and exactly the line in mistakes.txt."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli_tools import run_command

# Two lines a mistake: what is typed after `xattn-video` (G stands for a whole `generate`), and the answer.
LINES = Path(__file__).with_name("mistakes.txt").read_text(encoding="utf-8").splitlines()
MISTAKES = list(zip(LINES[::2], LINES[1::2], strict=True))
GENERATE = "generate --model demo --prompts p.txt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "p.txt").write_text("a red circle\n")
    (folder / "empty.txt").touch()
    (folder / "empty").mkdir()
    (folder / "run.toml").write_text('[generate]\nmodle = "demo"\n')
    tables = [f'[{name}]\noverwrite = true\nout = "elsewhere"' for name in ("generate", "demo", "calibrate")]
    (folder / "again.toml").write_text("\n".join([*tables, '[report]\nout = "elsewhere.html"']) + "\n")
    (folder / "other.toml").write_text('[sweep]\nmodel = "demo"\n')
    return folder


def test_there_are_many() -> None:
    assert len(dict(MISTAKES)) == len(MISTAKES) >= 60


@pytest.mark.parametrize(("typed", "answer"), MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_a_mistake_has_its_answer(
    typed: str, answer: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    there = sorted(folder.rglob("*"))
    done = run_command(capfd, *typed.replace("G", GENERATE).split())
    lines = [line for line in done.err.splitlines() if not line.startswith("torchvision was built for another torch")]
    assert (done.code, done.out, lines) == (2, "", [f"xattn-video: error: {answer.strip()}"])
    assert sorted(folder.rglob("*")) == there
