"""Tables as all programs print them: plain text, the same on a terminal, in a pipe and in a file."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from xattn_video_pipelines.common.terminal import printable


def aligned(lines: Sequence[Sequence[str]], *, left: int = 0, rules: Collection[int] = ()) -> str:
    """Cells in columns, each as wide as its widest cell, with two spaces between them.

    Control characters in a cell are written as escapes. Widths are those that a terminal shows, where a Chinese
    character takes two places.

    Args:
        lines: the cells of each line, as many in each; the first line has the columns' names.
        left: how many columns, from the first, are aligned to the left; the others are aligned to the right.
        rules: the lines, counted from 0, before which a line of dashes stands; their number for one at the end.
    """
    from rich.cells import cell_len

    lines = [[printable(cell).replace("\n", "\\n") for cell in line] for line in lines]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    text = []
    for number, line in enumerate(lines):
        if number in rules:
            text.append(rule)
        cells: list[str] = []
        for cell, width in zip(line, widths, strict=True):
            gap = " " * (width - cell_len(cell))
            cells.append(cell + gap if len(cells) < left else gap + cell)
        text.append("  ".join(cells).rstrip())
    if len(lines) in rules:
        text.append(rule)
    return "\n".join(text)
