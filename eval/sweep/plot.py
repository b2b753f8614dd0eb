"""The sweep's picture: quality and what is still as asked, against density and speed-up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xattn_video import XAttnConfig
from xattn_video.config import RESIDUALS, usual_anchors
from xattn_video_eval.plot_labels import Label, write_labels
from xattn_video_pipelines.common.files import whole_files

_LABELS = {
    "psnr": "PSNR against dense, dB, mean",
    "psnr_worst": "PSNR against dense, dB, worst video",
    "ssim": "SSIM against dense",
    "as_asked": "as asked, share of videos",
}
# Of each axis: its name, and the marker and line.
_STYLES = {
    "threshold": ("threshold", "o-"),
    "stride": ("stride", "s--"),
    "warmup_steps": ("warm-up steps", "^-."),
    "residual": ("residual", "D:"),
    "refresh_every": ("refresh at most every", "v-"),
    "anchors": ("anchors", "P--"),
    "threshold_ramp": ("threshold ramp", "X-."),
    "keep_masks": ("masks kept for steps", "h:"),
}
# Without a residual these have no meaning, so a point without one is on every line that leaves them alone.
_OF_RESIDUAL = ("refresh_every", "refresh", "extrapolate")


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """A panel per quality, above against density, below against speed-up; a line per axis, its points named.

    Rows without a sparse call are left out: they would show as perfect. Presets and other points with a name are stars
    with that name. Qualities that no row has are left out; the noise floor and dense are dashed lines.

    Args:
        rows: as `sweep.json` holds them, one of them with a sparse call.
        path: of the picture; the suffix says which format.
        title: above all panels: which model and device they are of.
    """
    figure = draw(rows, title)
    with whole_files(path) as (partial,):
        figure.savefig(partial, dpi=110)


def with_sparse_calls(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of sparse attention that can be drawn: not dense, not the noise floor, not dense in every call."""
    return [row for row in rows if row["threshold"] is not None and not row.get("all_dense")]


def draw(rows: Sequence[dict[str, Any]], title: str) -> Any:
    """The figure of `plot`."""
    from matplotlib.figure import Figure

    sparse = with_sparse_calls(rows)
    qualities = [name for name in _LABELS if any(row.get(name) is not None for row in sparse)]
    figure = Figure(figsize=(4.6 * len(qualities), 7.6), layout="constrained")
    figure.suptitle(title, fontsize="medium", wrap=True)
    grid = figure.subplots(2, len(qualities), squeeze=False)
    named: list[tuple[Any, list[Label]]] = []
    for panels, cost in zip(grid, ("density", "speedup"), strict=True):
        for axes, quality in zip(panels, qualities, strict=True):
            labels = []
            for name, points in _lines(sparse).items():
                points = [row for row in points if row[cost] is not None]
                label, style = _STYLES[name]
                costs, qualities_of = [row[cost] for row in points], [row[quality] for row in points]
                (line,) = axes.plot(costs, qualities_of, style, label=label, markersize=5, linewidth=1.2)
                for row in points:
                    text = row[name] if isinstance(row[name], str) else f"{row[name]:g}"
                    labels.append(Label(text, row[cost], row[quality], line.get_color()))
            for row in sparse:
                if row.get("name") and row[cost] is not None:
                    axes.plot(row[cost], row[quality], "*", color="black", markersize=9)
                    labels.append(Label(row["name"], row[cost], row[quality]))
            axes.margins(0.12)
            for row in rows:
                if row["threshold"] is None and row.get(quality) is not None:
                    style = ":" if row["attention"] == "dense" else "--"
                    what = "dense" if row["attention"] == "dense" else "noise floor"
                    axes.axhline(row[quality], color="grey", linestyle=style, label=what)
            axes.set(xlabel="density" if cost == "density" else "speed-up, end to end", ylabel=_LABELS[quality])
            axes.grid(alpha=0.3)
            named.append((axes, labels))
    # One legend beside all panels: inside of one it would cover points or names.
    lines = {line.get_label(): line for axes, _ in named for line in axes.get_lines()}
    known = {text: line for text, line in lines.items() if not str(text).startswith("_")}
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=max(1, len(known)), fontsize="small")
    figure.draw_without_rendering()
    for axes, labels in named:
        write_labels(axes, labels)
    return figure


def _lines(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """For each axis that is swept, the rows that differ from the base point in that axis alone, in the axis's order.

    The base point is the package's defaults, or where no row without a name has them, the first row. A line of named
    points alone is left out: they have marks of their own.
    """
    defaults, names = XAttnConfig(), [name for name in _STYLES if name in rows[0]]
    settings = [
        name for name in (*names, "per_head", "refresh", "extrapolate", "warmup", "last_steps") if name in rows[0]
    ]
    plain = (
        row
        for row in rows
        if row.get("name") is None
        and all(_chosen(row, name) == getattr(defaults, name) for name in settings if name not in _OF_RESIDUAL)
    )
    base = next(plain, rows[0])

    def beside(row: dict[str, Any], axis: str) -> bool:
        ignored = _OF_RESIDUAL if axis == "residual" and row["residual"] == "off" else ()
        return all(
            row[name] == base[name] or _chosen(row, name) == _chosen(base, name)
            for name in settings
            if name != axis and name not in ignored
        )

    lines = {}
    for axis in names:
        # Thresholds that differ between heads have no place on the line.
        points = [row for row in rows if (axis != "threshold" or isinstance(row[axis], float)) and beside(row, axis)]
        if any(row is not base and row.get("name") is None for row in points):
            lines[axis] = sorted(points, key=lambda row: _place(axis, row[axis]))
    return lines or ({} if base.get("name") else {"threshold": [base]})


def _chosen(row: dict[str, Any], name: str) -> Any:
    """A setting of a row; None for anchors that come with its threshold, so that a line of thresholds has them all."""
    value = row[name]
    return None if name == "anchors" and value == usual_anchors(row["threshold"]) else value


def _place(axis: str, value: Any) -> float:
    """Where a value stands on its axis; without refreshes (None) comes first."""
    if axis == "residual":
        return RESIDUALS.index(value)
    return 0.0 if value is None else value
