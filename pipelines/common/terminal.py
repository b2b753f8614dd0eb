"""The one place where text goes to a terminal: how much of it there is, and that what others wrote cannot steer it.

Ids, prompts, replies, keys and names of files may come from a foreign folder. A terminal obeys escape sequences in
them: they move the cursor, hide lines, or set the title and the clipboard.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TextIO

# Control characters but for tab and line feed, and the signs that turn the direction of the text.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

# How much is printed: "quiet" leaves progress out, "verbose" has more.
_LOUDNESS: ContextVar[str] = ContextVar("loudness", default="usual")


@contextlib.contextmanager
def loudness(*, quiet: bool = False, verbose: bool = False) -> Iterator[None]:
    """While a command runs: how much it prints, as its options `--quiet` and `--verbose` say."""
    token = _LOUDNESS.set("quiet" if quiet else "verbose" if verbose else "usual")
    # The bars of other libraries, which are imported later, obey these.
    others = [name for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS") if quiet and name not in os.environ]
    os.environ.update(dict.fromkeys(others, "1"))
    try:
        yield
    finally:
        _LOUDNESS.reset(token)
        for name in others:
            del os.environ[name]


def is_quiet() -> bool:
    """Whether bars and other progress are unwanted."""
    return _LOUDNESS.get() == "quiet"


def is_verbose() -> bool:
    """Whether more than usual is wanted."""
    return _LOUDNESS.get() == "verbose"


def printable(text: object) -> str:
    r"""A text with its control characters written as escapes.

    >>> printable("red\x1b[2Jcircle")
    'red\\x1b[2Jcircle'
    """
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], str(text))


def say(text: object, file: TextIO | None = None, *, progress: bool = False) -> None:
    """Print `printable(text)` on stdout, or in `file`, above the progress bars of tqdm where there are any.

    Args:
        text: what is said.
        file: where; None is stdout.
        progress: it tells how far the work is, and no result and nothing wrong: `--quiet` leaves it out.
    """
    if progress and is_quiet():
        return
    line, file = printable(text), file or sys.stdout
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(line, file=file)
    else:
        print(line, file=file)
