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


def duration(seconds: float | None) -> str:
    """A time in its two largest units, below a minute in seconds and from two days on in days.

    >>> duration(0.04), duration(42.4), duration(90), duration(9000), duration(400_000)
    ('0.04 s', '42 s', '1 min 30 s', '2 h 30 min', '4.6 days')
    """
    if seconds is None:
        return "unknown"
    if seconds < 10:
        # Digits that say something, also where a video takes far less than a second.
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{seconds / 86400:,.1f} days"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size(number: float) -> str:
    """A number of bytes, in GiB, MiB or KiB.

    >>> size(3 * 2**29), size(5 * 2**20), size(45_000)
    ('1.5 GiB', '5.0 MiB', '44 KiB')
    """
    if number >= 2**30:
        return f"{number / 2**30:,.1f} GiB"
    return f"{number / 2**20:.1f} MiB" if number >= 2**20 else f"{number / 2**10:.0f} KiB"
