"""The error that the command line shows as one line, with exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can put right: bad input, a missing file, folders that do not belong together.

    The message is one line that says what is wrong, where, and what would do. The command line prints it
    without a traceback and exits with code 2.
    """


def one_line(message: object, most: int | None = None) -> str:
    """A message without its line ends, cut to `most` characters, as a part of an error's one line."""
    return " ".join(str(message).split())[:most]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the known word that it begins, or that is most like it, or nothing.

    >>> did_you_mean("--treshold", ["--threshold", "--stride"])
    '; did you mean --threshold?'
    >>> did_you_mean("--neg", ["--height", "--negative-prompt"])
    '; did you mean --negative-prompt?'
    """
    # The dashes, which all options have, would make each like the others.
    bare, whole = word.lstrip("-"), {one.lstrip("-"): one for one in known}
    begun = [name for name in whole if bare and name.startswith(bare)]
    near = difflib.get_close_matches(bare, begun or whole, n=1, cutoff=0.0 if begun else 0.6)
    return f"; did you mean {whole[near[0]]}?" if near else ""
