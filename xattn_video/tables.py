"""Tables that a Python prompt prints as text and a notebook shows as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence


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
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, tuple("-" * width for width in widths))
        texts = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join(text.rstrip() for text in texts)

    def _repr_html_(self) -> str:
        head = _html_row("th", self.header)
        return (
            f"<table><thead>{head}</thead><tbody>{''.join(_html_row('td', row) for row in self.rows)}</tbody></table>"
        )


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
