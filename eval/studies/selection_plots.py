"""The rows of `selection_quality` as a picture: quality over cost of each scorer, and the selection rules."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from xattn_video.extras import install_command
from xattn_video_eval.studies.block_scorers import EXACT, SCORERS
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import make_writable, whole_files


def check(path: Path) -> None:
    """Make the picture's folder, before anything is measured. Raises `UserError` for what cannot be written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"--plot needs matplotlib; install it with: {install_command('plot')}")
    if path.suffix != ".png":
        raise UserError(f"--plot must end in .png, got {path}")
    if path.is_dir():
        raise UserError(f"--plot: {path} is a folder")
    make_writable(path.parent)


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw a column an input: mass recalled and AUC over cost, and mass recalled over density by rule."""
    # Without pyplot nothing looks for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(rows), 12), layout="constrained")
    grid = figure.subplots(3, len(rows), squeeze=False)
    for row, (recall, auc, rules) in zip(rows, grid.T, strict=True):
        for axes, metric, label in ((recall, "recall", "mass recalled at the oracle's density"), (auc, "auc", "AUC")):
            _over_cost(axes, row["scorers"], metric)
            axes.set(ylabel=label, title=f"{row['inputs']}, {row['tokens']} tokens, threshold {row['threshold']:g}")
        # Without causality two of them are one: the dashed line lets the other be seen.
        for rule, line in (("threshold", "-"), ("top_k", "-"), ("top_ratio", "--")):
            points = sorted((point["density"], point["recall"][rule]) for point in row["rules"])
            rules.plot(*zip(*points, strict=True), marker="o", linestyle=line, label=rule)
        rules.set(xlabel="density", ylabel="mass recalled", title=f"selection by antidiagonals, stride {row['stride']}")
        rules.legend(fontsize="small")
    with whole_files(path) as (partial,):
        figure.savefig(partial, dpi=150)


def _over_cost(axes: Any, scorers: list[dict[str, Any]], metric: str) -> None:
    for name in SCORERS:
        points = [
            (row["cost"], row[metric])
            for row in sorted(scorers, key=lambda row: row["cost"])
            if row["scorer"] == name and row[metric] is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="*" if name == EXACT else "o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("multiply-adds, as a share of the whole query-key product's")
    axes.legend(fontsize="small")
