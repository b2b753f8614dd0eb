"""A report's pictures as inline SVG: quality against cost for every video, and heat maps of density."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from xattn_video_eval.report.templates import macro

# Each configuration's colour is a variable of the style sheet, so that it can differ in dark mode.
COLOURS = 8
_TEMPLATE = "charts.html.jinja"
_SHAPES = ("circle", "square", "diamond", "triangle")
_WIDTH, _HEIGHT = 560, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 30, 34, 56


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
) -> Markup:
    """An SVG of all points; `line` is a horizontal one with its name. Points that can be played are links."""
    xs = [point.x for point in points]
    ys = [point.y for point in points] + ([line[0]] if line else [])
    x_low, x_high, x_ticks = _scale(min(xs), max(xs))
    y_low, y_high, y_ticks = _scale(min(ys), max(ys))
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def across(x: float) -> float:
        return round(_LEFT + (x - x_low) / (x_high - x_low) * (right - _LEFT), 2)

    def down(y: float) -> float:
        return round(bottom - (y - y_low) / (y_high - y_low) * (bottom - _TOP), 2)

    chart = {
        "width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": right, "top": _TOP, "bottom": bottom,
        "title": title, "x_label": x_label, "y_label": y_label, "colours": COLOURS,
        "x_ticks": [(across(tick), f"{tick:g}") for tick in x_ticks],
        "y_ticks": [(down(tick), f"{tick:g}") for tick in y_ticks],
        "line": line and (down(line[0]), line[1]),
        "marks": [(point, _outline(point.series, across(point.x), down(point.y))) for point in points],
    }  # fmt: skip
    return macro("scatter", _TEMPLATE, chart)


def legend(names: Sequence[str]) -> Markup:
    """The series' marks with their names."""
    return macro("legend", _TEMPLATE, [(name, i % COLOURS, _outline(i, 7, 7)) for i, name in enumerate(names)])


def heat_map(
    rows: Sequence[tuple[str, Sequence[float]]], columns: Sequence[str], *, corner: str, caption: str
) -> Markup:
    """A table whose cells are as dark as their density (0 to 1), the number written in each."""
    written = [(name, [(value, _two_digits(value)) for value in values]) for name, values in rows]
    return macro("heat_map", _TEMPLATE, written, columns, corner, caption)


def heat_picture(rows: Sequence[tuple[str, Sequence[float | None]]], columns: Sequence[str], *, caption: str) -> Markup:
    """An SVG with a cell for each value (0 to 1, None: blank), as dark as it is; a cell tells itself when pointed at.

    For maps with too many cells to write numbers in. Every fifth column and every second row is named.
    """
    size, left, top = 12, 40, 14
    picture = {
        "caption": caption, "size": size, "left": left,
        "width": left + size * len(columns), "height": top + size * len(rows),
        "x_names": [(left + size * index + size / 2, columns[index]) for index in range(0, len(columns), 5)],
        "y_names": [(top + size * index + 10, index) for index in range(0, len(rows), 2)],
        "cells": [
            (left + size * column, top + size * row, value, f"{name}, step {columns[column]}: {value:.3f}")
            for row, (name, values) in enumerate(rows)
            for column, value in enumerate(values)
            if value is not None
        ],
    }  # fmt: skip
    return macro("heat_picture", _TEMPLATE, picture)


def _two_digits(value: float) -> str:
    """`.42`, and `1` for exactly 1: .9968 is not all blocks."""
    return "1" if value == 1 else f"{min(value, 0.99):.2f}".lstrip("0")


def _outline(series: int, x: float, y: float) -> str:
    """The path of a mark; shape and colour both tell the series."""
    return {
        "circle": f"M{x - 4.5} {y}a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
        "square": f"M{x - 4} {y - 4}h8v8h-8z",
        "diamond": f"M{x} {y - 5.5}l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
        "triangle": f"M{x} {y - 5}l5 9h-10z",
    }[_SHAPES[series % len(_SHAPES)]]


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
