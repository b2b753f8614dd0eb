"""What all programs share: whatever goes wrong outside of them is one line and exit code 2."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xattn_video_pipelines.common.program import Parser, run_program

ROOT = Path(__file__).parent.parent
PRINTING = """
import argparse, sys
from xattn_video_pipelines.common.program import Parser, run_program
sys.exit(run_program(Parser(prog="shout"), lambda arguments: print("h\\xf6r \\ud800 zu") or 0, []))
"""


def shout(**options: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-c", PRINTING],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        env={**environment, "PYTHONIOENCODING": "ascii"},
        **options,
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "closed/one"), "closed/one: Permission denied"),
        (OSError(errno.EIO, "Input/output error", "disk"), "disk: Input/output error"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300), f"{'a' * 60}...: the name is too long"),
    ],
)
def test_what_the_system_refuses_is_one_line(error, line, capsys):
    def run(arguments):
        raise error

    assert run_program(Parser(prog="tool"), run, []) == 2
    assert capsys.readouterr().err == f"tool: error: {line}\n"


def test_text_that_the_terminal_lacks_is_escaped():
    done = shout(stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "h\\xf6r \\ud800 zu\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_an_output_that_is_full_is_one_line():
    with open("/dev/full", "w") as full:
        done = shout(stdout=full)
    assert (done.returncode, done.stderr) == (2, "shout: error: No space left on device\n")


def test_a_reader_that_has_left_is_no_error():
    ours, theirs = os.pipe()
    os.close(ours)
    done = shout(stdout=theirs)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, "")
