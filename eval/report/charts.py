"""A report's pictures as inline SVG: quality against cost for every video, and heat maps of density."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Each configuration's colour is a variable of the style sheet, so that it can differ in dark mode.
COLOURS = 8
_SHAPES = ("circle", "square", "diamond", "triangle")
_WIDTH, _HEIGHT = 560, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 30, 34, 48


@dataclass(frozen=True)
class Point:
    """One video: where it stands, of which series, what to say of it, and what it is called in the players."""

    x: float
    y: float
    series: int
    text: str
    case: str | None = None


def scatter(
    points: Sequence[Point], *, x_label: str, y_label: str, line: tuple[float, str] | None = None, title: str
) -> str:
    """An SVG of all points; `line` is a horizontal one with its name. Points that can be played are links."""
    xs = [point.x for point in points]
    ys = [point.y for point in points] + ([line[0]] if line else [])
    x_low, x_high, x_ticks = _scale(min(xs), max(xs))
    y_low, y_high, y_ticks = _scale(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(_LEFT + across, 2), round(_HEIGHT - _BOTTOM - up, 2)

    parts = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_low)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text x="4" y="16">{escape(y_label)}</text>')
    if line:
        _, y = place(x_low, line[0])
        # Above the line, unless it lies at the top.
        text_y = y - 5 if y > _TOP + 16 else y + 15
        parts.append(f'<line class="floor" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_WIDTH - _RIGHT - 4}" y="{text_y}" text-anchor="end">{escape(line[1])}</text>')
    for point in points:
        mark = f"{_mark(point.series, *place(point.x, point.y))}<title>{escape(point.text)}</title></path>"
        if point.case is None:
            parts.append(mark)
        else:
            parts.append(f'<a href="#players" data-case="{escape(point.case)}">{mark}</a>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def legend(names: Sequence[str]) -> str:
    """The series' marks with their names."""
    items = "".join(
        f'<li><svg viewBox="0 0 14 14" aria-hidden="true">{_mark(index, 7, 7)}</path></svg>{escape(name)}</li>'
        for index, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def heat_map(rows: Sequence[tuple[str, Sequence[float]]], columns: Sequence[str], *, corner: str, caption: str) -> str:
    """A table whose cells are as dark as their density (0 to 1), the number written in each."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(
            f'<td class="{"dark" if value > 0.55 else ""}" style="--density:{value:.3f}" title="{value:.4f}">'
            f"{_two_digits(value)}</td>"
            for value in values
        )
        + "</tr>"
        for name, values in rows
    )
    return (
        f'<div class="wide"><table class="heat"><caption>{escape(caption)}</caption>'
        f'<thead><tr><th scope="col">{escape(corner)}</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def heat_picture(rows: Sequence[tuple[str, Sequence[float | None]]], columns: Sequence[str], *, caption: str) -> str:
    """An SVG with a cell for each value (0 to 1, None: blank), as dark as it is; a cell tells itself when pointed at.

    For maps with too many cells to write numbers in. Row and column names are written as far as there is room.
    """
    size, left, top = 12, 40, 14
    width, height = left + size * len(columns), top + size * len(rows)
    parts = []
    for index in range(0, len(columns), 5):
        parts.append(
            f'<text x="{left + size * index + size / 2}" y="10" text-anchor="middle">{escape(columns[index])}</text>'
        )
    for row, (name, values) in enumerate(rows):
        y = top + size * row
        if row % 2 == 0:
            parts.append(f'<text x="{left - 5}" y="{y + 10}" text-anchor="end">{row}</text>')
        for column, value in enumerate(values):
            if value is not None:
                says = escape(f"{name}, step {columns[column]}: {value:.3f}")
                place = f'x="{left + size * column}" y="{y}" width="{size - 1}" height="{size - 1}"'
                parts.append(f'<rect class="cell" {place} fill-opacity="{value:.3f}"><title>{says}</title></rect>')
    svg = f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{escape(caption)}">'
    return f'<figure class="map"><figcaption>{escape(caption)}</figcaption>{svg}{"".join(parts)}</svg></figure>'


def _two_digits(value: float) -> str:
    """`.42`, and `1` for exactly 1: .9968 is not all blocks."""
    return "1" if value == 1 else f"{min(value, 0.99):.2f}".lstrip("0")


def _mark(series: int, x: float, y: float) -> str:
    """The open tag of a mark; shape and colour both tell the series."""
    shape = _SHAPES[series % len(_SHAPES)]
    outline = {
        "circle": f"M{x - 4.5} {y}a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
        "square": f"M{x - 4} {y - 4}h8v8h-8z",
        "diamond": f"M{x} {y - 5.5}l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
        "triangle": f"M{x} {y - 5}l5 9h-10z",
    }[shape]
    return f'<path class="mark c{series % COLOURS}" d="{outline}">'


def _scale(low: float, high: float) -> tuple[float, float, list[float]]:
    """Round limits around the values, and three to seven round ticks between them."""
    span = high - low
    # values that differ by rounding alone are one value
    if span < 1e-9 * max(abs(low), abs(high), 1.0):
        span = abs(high) if abs(high) > 1e-9 else 1.0
    raw = span / 4
    power = 10.0 ** _floor_log10(raw)
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    first, last = _floor(low / step), -_floor(-high / step)
    if first == last:
        first, last = first - 1, last + 1
    ticks = [round(index * step, 10) for index in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def _floor(value: float) -> int:
    # Rounded first: 0.3 / 0.1 must be 3 and not 2.
    return int(round(value, 9) // 1)


def _floor_log10(value: float) -> int:
    from math import floor, log10

    return floor(log10(value))
