"""A training's loss over its steps as a picture, from the log that every sitting continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.files import whole_files


def draw_curve(log: Path) -> Path | None:
    """Draw `loss.png` beside a log: a panel a stage, the loss of each line over its steps.

    Returns:
        The picture, or None where matplotlib is not installed or the log has no loss yet.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    stages: dict[str, list[dict[str, Any]]] = {}
    for _, line in jsonl.read(log):
        if "loss" in line:
            stages.setdefault(line["stage"], []).append(line)
    if not stages:
        return None
    figure = Figure(figsize=(9, 3.2 * len(stages)), layout="constrained")
    for axes, (stage, lines) in zip(figure.subplots(len(stages), 1, squeeze=False)[:, 0], stages.items(), strict=True):
        axes.semilogy([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=0.8)
        axes.set(xlabel="step", ylabel="loss", title=stage)
        axes.grid(alpha=0.3, which="both")
    path = log.with_name("loss.png")
    with whole_files(path) as (partial,):
        figure.savefig(partial, dpi=100)
    return path
