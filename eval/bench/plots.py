"""The bench's rows as two pictures: speed-up over length beside the ideal, and where the time goes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from xattn_video.extras import install_command
from xattn_video_eval.bench.tables import STAGES
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import make_writable, whole_files

SPEEDUP, BREAKDOWN = "speedup.png", "stages.png"


def check(folder: Path) -> None:
    """Make the folder, before anything is timed. Raises `UserError` without matplotlib, or for a closed one."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"--plot needs matplotlib; install it with: {install_command('plot')}")
    make_writable(folder)


def write(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw both pictures into the folder; returns their paths."""
    figures = {SPEEDUP: speedup_figure(rows), BREAKDOWN: breakdown_figure(rows)}
    for name, figure in figures.items():
        with whole_files(folder / name) as (partial,):
            figure.savefig(partial, dpi=150)
    return [folder / name for name in figures]


def speedup_figure(rows: list[dict[str, Any]]) -> Any:
    """Speed-up over the fastest dense kernel by sequence length: measured solid, ideal dashed, one colour a series."""
    figure, axes = _figure()
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        kind = "causal" if row["causal"] else row["inputs"]
        groups.setdefault(f"{kind}, D {row['head_dim']}, {row['dtype']}", []).append(row)
    for number, (name, group) in enumerate(groups.items()):
        tokens = [row["tokens"] for row in group]
        style = {"color": f"C{number % 10}", "marker": "o"}
        axes.plot(tokens, [row["speedup"] for row in group], label=name, **style)
        axes.plot(tokens, [row["ideal_speedup"] for row in group], label=f"{name}, ideal", linestyle="--", **style)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    lengths = sorted({row["tokens"] for row in rows})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30, ha="right")
    axes.minorticks_off()
    axes.set(xlabel="tokens", ylabel="speed-up over the fastest dense kernel", title=rows[0]["device"], ylim=(0, None))
    axes.legend(fontsize="small")
    return figure


def breakdown_figure(rows: list[dict[str, Any]]) -> Any:
    """Time of score, select and attend, stacked, as a share of the fastest dense kernel's time; one bar a row."""
    figure, axes = _figure()
    labels = [f"{row['name']}\nD {row['head_dim']} {row['dtype']}, density {row['density']:.2f}" for row in rows]
    start = [0.0] * len(rows)
    for stage in STAGES:
        shares = [row["best_ms"][stage] / row["best_ms"][row["dense_kernel"]] for row in rows]
        axes.barh(range(len(rows)), shares, left=start, label=stage)
        start = [before + share for before, share in zip(start, shares, strict=True)]
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(rows)), labels, fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="time, as a share of the fastest dense kernel's", title=rows[0]["device"])
    axes.legend(fontsize="small")
    figure.set_size_inches(8, 2 + 0.5 * len(rows))
    return figure


def _figure() -> tuple[Any, Any]:
    # Without pyplot nothing looks for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    return figure, figure.add_subplot()
