"""What all command lines share: one line for bad input and exit code 2, an example under every `--help`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from xattn_video_pipelines.common.errors import UserError


class Parser(argparse.ArgumentParser):
    """A usage error in one line, as for every other bad input; `--help` keeps the lines of its texts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": argparse.RawDescriptionHelpFormatter, **kwargs})

    @property
    def program(self) -> str:
        """What the user calls it: "xattn-video", and "contact_sheet" for "python -m PACKAGE.contact_sheet"."""
        first, *rest = self.prog.split()
        return rest[1].rpartition(".")[2] if first == "python" else first

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.program}: error: {message} (see: {self.prog} --help)\n")


def run_program(
    parser: Parser, run: Callable[[argparse.Namespace], int], arguments: Sequence[str] | None = None
) -> int:
    """Parse `arguments` (None: the process's own) and run.

    Returns:
        What `run` gives, 2 for bad input, 130 for Ctrl-C, 141 for a reader of stdout that has left.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a prompt may hold what the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        code = run(parser.parse_args(arguments))
        # what fails now would fail at exit, where nobody can say why
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"{parser.program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"{parser.program}: stopped; what is finished under --out is kept, and the same command goes on",
            file=sys.stderr,
        )
        return 130
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            print(f"{parser.program}: error: {str(error.filename)[:60]}...: the name is too long", file=sys.stderr)
            return 2
        if error.filename is not None:
            print(f"{parser.program}: error: {error.filename}: {error.strerror or error}", file=sys.stderr)
            return 2
        # The reader of stdout (head, less) has left, or its disk is full; Python must not try again at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        print(f"{parser.program}: error: {error.strerror or error}", file=sys.stderr)
        return 2
