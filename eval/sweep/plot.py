"""The sweep's picture: quality and what is still as asked, against density and speed-up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xattn_video import XAttnConfig
from xattn_video_pipelines.common.files import whole_files

_LABELS = {"psnr": "PSNR against dense, dB", "ssim": "SSIM against dense", "as_asked": "as asked, share of videos"}
# Of each axis: the marker and line, and where a point's name stands, in points from it.
_STYLES = {"threshold": ("o-", (4, 4)), "stride": ("s--", (4, -11)), "warmup_steps": ("^-.", (-12, 5))}
_AXES = {"threshold": "threshold", "stride": "stride", "warmup_steps": "warm-up steps"}


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel a quality, above against density, below against speed-up; a line an axis, its points named.

    Qualities that no row has are left out; the noise floor and dense are dashed lines.

    Args:
        rows: as `sweep.json` holds them.
        path: of the picture; the suffix says which format.
    """
    from matplotlib.figure import Figure

    sparse = [row for row in rows if row["threshold"] is not None]
    qualities = [name for name in _LABELS if any(row[name] is not None for row in sparse)]
    figure = Figure(figsize=(4.6 * len(qualities), 7), layout="constrained")
    grid = figure.subplots(2, len(qualities), squeeze=False)
    for panels, cost in zip(grid, ("density", "speedup"), strict=True):
        for axes, quality in zip(panels, qualities, strict=True):
            for name, points in _lines(sparse).items():
                points = sorted((row for row in points if row[cost] is not None), key=lambda row: row[name])
                style, place = _STYLES[name]
                costs, qualities_of = [row[cost] for row in points], [row[quality] for row in points]
                (line,) = axes.plot(costs, qualities_of, style, label=_AXES[name], markersize=5, linewidth=1.2)
                for row in points:
                    axes.annotate(
                        f"{row[name]:g}",
                        (row[cost], row[quality]),
                        xytext=place,
                        textcoords="offset points",
                        fontsize="small",
                        color=line.get_color(),
                    )
            axes.margins(0.12)
            for row in rows:
                if row["threshold"] is None and row[quality] is not None:
                    style = ":" if row["attention"] == "dense" else "--"
                    title = "dense" if row["attention"] == "dense" else "noise floor"
                    axes.axhline(row[quality], color="grey", linestyle=style, label=title)
            axes.set(xlabel="density" if cost == "density" else "speed-up, end to end", ylabel=_LABELS[quality])
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
    with whole_files(path) as (partial,):
        figure.savefig(partial, dpi=110)


def _lines(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """For each axis that is swept, the rows that differ from the base point in that axis alone.

    The base point is the package's defaults, or where a grid leaves them out, the first row.
    """
    defaults = XAttnConfig()
    base = next((row for row in rows if all(row[name] == getattr(defaults, name) for name in _AXES)), rows[0])
    lines = {
        name: [row for row in rows if all(row[other] == base[other] for other in _AXES if other != name)]
        for name in _AXES
    }
    return {name: points for name, points in lines.items() if len(points) > 1} or {"threshold": [base]}
