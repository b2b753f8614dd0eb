"""Names beside the points of a picture, none of which covers another name or a point, where there is room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# From a point to its name, in typographic points: around it, then farther away.
_DIRECTIONS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
_DISTANCES = (4, 9, 15, 22, 30, 40)
# A point covers so much around itself, in typographic points.
_RADIUS = 3.0


@dataclass(frozen=True)
class Label:
    """A name for the point at `x` and `y`, in data coordinates."""

    text: str
    x: float
    y: float
    colour: str = "black"


def write_labels(axes: Any, labels: Sequence[Label], size: float = 8) -> list[Any]:
    """Write each name where it covers no other name and no point, and stays inside of the axes; give the texts.

    Names that are farther from their point get a thin line to it. Where no place is free, a name takes the one where it
    covers least. Call it last, after `figure.draw_without_rendering()`, which settles where the axes are: what is drawn
    later, or changes the limits, is not looked at.

    Args:
        axes: of matplotlib.
        labels: with the same text at the same point, one is written.
        size: of the letters, in typographic points.
    """
    labels = list(dict.fromkeys(labels))
    unit = axes.figure.dpi / 72
    points = axes.transData.transform([(label.x, label.y) for label in labels]) if labels else []
    taken = [_box(x, y, _RADIUS * unit, _RADIUS * unit) for x, y in points]
    frame = axes.get_window_extent()
    inside = (frame.x0, frame.y0, frame.x1, frame.y1)
    texts = []
    for label, (x, y) in zip(labels, points, strict=True):
        text = axes.annotate(
            label.text, (label.x, label.y), xytext=(0, 0), textcoords="offset points", fontsize=size,
            color=label.colour, ha="center", va="center",
        )  # fmt: skip
        extent = text.get_window_extent()
        # With a pixel between two names.
        half = extent.width / 2 + 1, extent.height / 2 + 1
        best = None
        for distance in _DISTANCES:
            for across, up in _DIRECTIONS:
                place = x + across * (half[0] + distance * unit), y + up * (half[1] + distance * unit)
                box = _box(*place, *half)
                # Outside of the axes it may be cut off, or cover a title.
                cost = sum(_shared(box, other) for other in taken) + 4 * (_area(box) - _shared(box, inside))
                if best is None or cost < best[0] - 1e-6:
                    best = cost, place, box, distance
            if best is not None and best[0] <= 1e-6:
                break
        assert best is not None
        _, place, box, distance = best
        text.set_position(((place[0] - x) / unit, (place[1] - y) / unit))
        if distance > _DISTANCES[1]:
            line = {"arrowstyle": "-", "color": label.colour, "linewidth": 0.5, "alpha": 0.5}
            axes.annotate(
                "", (label.x, label.y), xytext=text.get_position(), textcoords="offset points", arrowprops=line
            )
        taken.append(box)
        texts.append(text)
    return texts


Box = tuple[float, float, float, float]


def _box(x: float, y: float, half_width: float, half_height: float) -> Box:
    return x - half_width, y - half_height, x + half_width, y + half_height


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _shared(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
