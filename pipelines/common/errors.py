"""The error that the command line shows as one line, with exit code 2."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can put right: bad input, a missing file, folders that do not belong together.

    The message is one line that says what is wrong, where, and what would do. The command line prints it
    without a traceback and exits with code 2.
    """


def one_line(message: object, most: int | None = None) -> str:
    """A message without its line ends, cut to `most` characters, as a part of an error's one line."""
    return " ".join(str(message).split())[:most]
