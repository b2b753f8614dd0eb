"""The bench's rows as text: one table of speed-ups, one of where the time goes."""

from __future__ import annotations

from typing import Any

from xattn_video_pipelines.common.tables import aligned

STAGES = ("score", "select", "attend")


def format_table(rows: list[dict[str, Any]]) -> str:
    """Best times and speed-ups, one line a row, with the kernels that were not timed below."""
    header = (
        "shape", "heads", "D", "dtype", "density", "dense", "dense ms", "score", "select", "attend", "total",
        "speed-up", "of medians", "ideal", "reached",
    )  # fmt: skip
    lines = [header]
    for row in rows:
        best = row["best_ms"]
        times = [best[row["dense_kernel"]], *(best[name] for name in (*STAGES, "total"))]
        lines.append(
            (
                *_shape(row),
                f"{row['density']:.3f}",
                row["dense_kernel"],
                *(f"{value:.1f}" for value in times),
                f"{row['speedup']:.2f}x",
                f"{row['speedup_of_medians']:.2f}x",
                f"{row['ideal_speedup']:.2f}x",
                f"{row['reached']:.2f}",
            )
        )
    reasons = dict.fromkeys(f"not timed: {name}: {why}" for row in rows for name, why in row["not_timed"].items())
    return "\n".join([aligned(lines), *reasons])


def format_stages(rows: list[dict[str, Any]]) -> str:
    """Every kernel and stage: best and median milliseconds, effective TFLOP/s, peak extra memory."""
    lines = [("shape", "heads", "D", "dtype", "kernel", "best ms", "median ms", "TFLOP/s", "of dense", "peak MB")]
    for row in rows:
        dense = row["best_ms"][row["dense_kernel"]]
        peaks = row["peak_extra_mb"] or {}
        for name, best in row["best_ms"].items():
            tflops = row["tflops"].get(name)
            lines.append(
                (
                    *_shape(row),
                    name,
                    f"{best:.2f}",
                    f"{row['median_ms'][name]:.2f}",
                    "-" if tflops is None else f"{tflops:.3g}",
                    f"{best / dense:.1%}",
                    f"{peaks[name]:.0f}" if name in peaks else "-",
                )
            )
    return aligned(lines)


def _shape(row: dict[str, Any]) -> tuple[str, ...]:
    return row["name"], str(row["heads"]), str(row["head_dim"]), row["dtype"]
