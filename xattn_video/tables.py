"""Tables that a Python prompt prints as text and a notebook shows as HTML."""

from __future__ import annotations

import html
import itertools
import textwrap
from collections.abc import Iterator, Sequence

# Characters of a cell's line, unless a word is longer.
_WIDTH = 32


class Table:
    """Rows of text under a header.

    Args:
        header: names of the columns.
        rows: as many cells in each.
    """

    def __init__(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.header = tuple(header)
        self.rows = [tuple(row) for row in rows]

    def __repr__(self) -> str:
        lines = [line for row in (self.header, *self.rows) for line in _wrapped(row)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, tuple("-" * width for width in widths))
        texts = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join(text.rstrip() for text in texts)

    def _repr_html_(self) -> str:
        head = _html_row("th", self.header)
        return (
            f"<table><thead>{head}</thead><tbody>{''.join(_html_row('td', row) for row in self.rows)}</tbody></table>"
        )


def _wrapped(row: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The lines of a row, whose sentences take as many lines as they need."""
    cells = [textwrap.wrap(cell, _WIDTH, break_long_words=False, break_on_hyphens=False) for cell in row]
    return itertools.zip_longest(*cells, fillvalue="") if any(cells) else iter([tuple(row)])


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
