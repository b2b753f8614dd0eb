"""The one place where text is made fit for a terminal: what others wrote must not steer it.

Ids, prompts, replies, keys and names of files may come from a foreign folder. A terminal obeys escape sequences in
them: they move the cursor, hide lines, or set the title and the clipboard.
"""

from __future__ import annotations

import re
import sys
from typing import TextIO

# Control characters but for tab and line feed, and the signs that turn the direction of the text.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def printable(text: object) -> str:
    r"""A text with its control characters written as escapes.

    >>> printable("red\x1b[2Jcircle")
    'red\\x1b[2Jcircle'
    """
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], str(text))


def say(text: object, file: TextIO | None = None) -> None:
    """Print `printable(text)` on stdout, or in `file`, above the progress bars of tqdm where there are any."""
    line, file = printable(text), file or sys.stdout
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(line, file=file)
    else:
        print(line, file=file)
