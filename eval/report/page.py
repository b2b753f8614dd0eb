"""A report's HTML: what the template page.html.jinja is given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from xattn_video_eval.compare import COLUMN_HEADS, FLOOR
from xattn_video_eval.report import charts
from xattn_video_eval.report import data as report_data
from xattn_video_eval.report.data import Case, Compared, Run
from xattn_video_eval.report.paper_tables import load_paper_tables
from xattn_video_eval.report.scores import Scores, verdicts
from xattn_video_eval.report.templates import render
from xattn_video_eval.report.videos import Embedded, player_cases, prompt_of
from xattn_video_pipelines.video import Key, Record

_WORST = 12
# A column of a table: the name of its value, its head, and how the value is written.
Column = tuple[str, str, str]

# Of the table of configurations; the names are a summary's.
_COLUMNS: tuple[Column, ...] = (
    ("pairs", "videos", "d"),
    ("density", "density", ".3f"),
    ("psnr", "PSNR dB", ".2f"),
    ("psnr_worst", "worst PSNR dB", ".2f"),
    ("below_floor", "below floor dB", ".2f"),
    ("ssim", "SSIM", ".4f"),
    ("lpips", "LPIPS", ".4f"),
    ("flicker", "flicker", ".4f"),
    ("border_excess_db", "edge dB", "+z.1f"),
    ("dense_seconds", "dense s", ".1f"),
    ("sparse_seconds", "sparse s", ".1f"),
    ("speedup", "speed-up", ".2f"),
)
_SPEED = ("dense_seconds", "sparse_seconds", "speedup")
# Of the paper's table; its names are those of the columns above.
_PAPER_COLUMNS = tuple(column for column in _COLUMNS if column[0] in ("density", "psnr", "ssim", "lpips", "speedup"))
_SPEED_COLUMNS = (("seconds", "s a video", ".2f"), ("seconds_per_step", "s a step", ".2f"), ("peak", "peak GiB", ".2f"))


def build_page(run: Run, cases: Sequence[Case], embedded: Embedded, scores: Scores) -> str:
    """The whole page as one text.

    Args:
        run: what is reported on.
        cases: every compared video, the worst first.
        embedded: the videos that are in the page.
        scores: what the judge and the user say of the videos.
    """
    sparse = [case for case in cases if case.label != FLOOR]
    worst = sorted(sparse, key=lambda case: (case.row["psnr"], case.row["ssim"]))[:_WORST]
    series = [*run.sparse, *([run.floor] if run.floor else [])]
    configurations, subject = _configurations(run, scores), _subject(run)
    return render(
        "page.html.jinja",
        title=f"{subject}: sparse against dense attention",
        run_name=run.folder.resolve().name,
        verdicts=verdicts(run, scores),
        run=run,
        embedded=embedded,
        settings=report_data.settings(run),
        columns=_present((*_COLUMNS, *_score_columns(scores)), configurations),
        configurations=configurations,
        paper_columns=_PAPER_COLUMNS,
        paper=_paper(),
        legend=charts.legend([one.label for one in series]),
        scatters=_scatters(run, series, embedded, subject),
        worst=[(case, prompt_of(run, case.key)) for case in worst],
        flicker_known=any(case.row["flicker_worst_frame"] is not None for case in worst),
        region_known=any(case.row["worst_region"] is not None for case in worst),
        density=_density(run),
        reasons=_reasons(run),
        speed=_speed(run),
        speed_columns=_present(_SPEED_COLUMNS, _speed(run)),
        residuals=_residuals(run),
        meanings=_meanings(run),
        remarks=_remarks(run),
        player_cases=player_cases(run, embedded, scores),
    )


def _subject(run: Run) -> str:
    """The model and the device, as the dense videos name them: what a title must say."""
    records = list(run.dense.values())
    models = report_data.told(records, "model_name") or report_data.told(records, "model")
    devices = report_data.told(records, "device_name")
    return " on ".join(" / ".join(names) for names in (models or ["a model"], devices) if names)


def _present(columns: Iterable[Column], rows: Sequence[dict[str, Any]]) -> list[Column]:
    """The columns in which a row has a value."""
    return [column for column in columns if any(row["numbers"].get(column[0]) is not None for row in rows)]


def _score_columns(scores: Scores) -> list[Column]:
    """The judge's column and those of the user's scores, of whose names none is a summary's."""
    return [("as_asked", "as asked", ""), *((f"own {name}", name, ".4g") for name in scores.names)]


def _said(scores: Scores, label: str, records: Iterable[Key]) -> dict[str, Any]:
    """What the judge and the user say of a folder, as the columns of `_score_columns`."""
    right = scores.right(label, records)
    own = {f"own {name}": scores.mean(label, name) for name in scores.names}
    return {"as_asked": None if right is None else f"{right[0]} of {right[1]}", **own}


def _configurations(run: Run, scores: Scores) -> list[dict[str, Any]]:
    """The rows of the table: dense, the noise floor, and every sparse configuration."""
    dense = {"pairs": len(run.dense), "density": 1.0, **_said(scores, report_data.DENSE, run.dense)}
    rows: list[dict[str, Any]] = [_row("dense (reference)", dense)]
    if run.floor:
        # How long the floor took tells nothing about speed.
        said = _said(scores, run.floor.label, run.floor.rows)
        values = {**run.floor.summary, "psnr_worst": _worst(run.floor), **dict.fromkeys(_SPEED), **said}
        rows.append(_row(f"{run.floor.label} (noise floor)", values, "floor"))
    for one in run.sparse:
        own = {"psnr_worst": _worst(one), "below_floor": _below_floor(run, one), **_said(scores, one.label, one.rows)}
        rows.append(_row(one.label, {**one.summary, **own}))
    return rows


def _row(name: str, values: dict[str, Any], kind: str = "") -> dict[str, Any]:
    return {"name": name, "numbers": values, "kind": kind}


def _paper() -> dict[str, Any]:
    """The paper's own table of generated videos."""
    paper = load_paper_tables()
    table = paper["tables"]["video_generation_wan21_14b"]
    rows = [
        _row(
            f"theirs: Wan2.1-14B, threshold {entry['threshold']:g}",
            {**entry, "density": entry["density_percent"] / 100},
        )
        for entry in table["values"]
    ]
    return {"name": paper["paper"], "table": table, "rows": rows}


def _worst(one: Compared) -> float:
    """The PSNR of the video that is least like its dense one."""
    return float(min(row["psnr"] for row in one.rows.values()))


def _below_floor(run: Run, one: Compared) -> float | None:
    if run.floor is None:
        return None
    floor, own = run.floor.rows, one.rows
    differences = [floor[key]["psnr"] - own[key]["psnr"] for key in own.keys() & floor.keys()]
    return float(np.mean(differences)) if differences else None


def _scatters(run: Run, series: Sequence[Compared], embedded: Embedded, subject: str) -> list[Markup]:
    """PSNR against density and against speed-up, a mark a video; no picture where none of its costs is known."""
    playable = {case.id for case in embedded.cases}
    floor = (run.floor.summary["psnr"], "noise floor, mean") if run.floor else None
    pictures = []
    for cost, label in (("density", "density (share of blocks kept)"), ("speedup", "speed-up, end to end")):
        points = []
        # The floor's time is no configuration's; its line stands for it.
        for index, one in enumerate(series if cost == "density" else run.sparse):
            for key, row in one.rows.items():
                if row[cost] is not None:
                    case = Case(one.label, key, row).id
                    text = (
                        f"{case}: PSNR {row['psnr']:.2f} dB, SSIM {row['ssim']:.4f}, {cost} {row[cost]:.3f}; "
                        f"{prompt_of(run, key)}"
                    )
                    points.append(charts.Point(row[cost], row["psnr"], index, text, case if case in playable else None))
        if points:
            title = f"PSNR against {cost}: {subject}"
            y_label = "PSNR against dense, dB"
            pictures.append(charts.scatter(points, x_label=label, y_label=y_label, line=floor, title=title))
    return pictures


def _density(run: Run) -> dict[str, list[Any]]:
    """Heat maps by step, by layer (with the layers' names) and by both; configurations of one shape share a map."""
    known = [(one.label, values) for one in run.sparse if (values := report_data.mean_density_by_step(one.records))]
    by_step = []
    for length in dict.fromkeys(len(values) for _, values in known):
        rows = [(label, values) for label, values in known if len(values) == length]
        caption = "Density by denoising step: means over videos, layers and calls; a dense call counts as 1"
        by_step.append(charts.heat_map(rows, _counted(length, 1), corner="step", caption=caption))
    layered = [(one.label, table) for one in run.sparse if (table := report_data.mean_density_by_layer(one.records))]
    by_layer = []
    for names in dict.fromkeys(tuple(table) for _, table in layered):
        rows = [(label, list(table.values())) for label, table in layered if tuple(table) == names]
        caption = "Density by layer, in the model's order: means over videos, steps and calls; a dense call counts as 1"
        by_layer.append((charts.heat_map(rows, _counted(len(names), 0), corner="layer", caption=caption), names))
    both = []
    for one in run.sparse:
        if layers := report_data.mean_density_by_layer_and_step(one.records):
            steps = _counted(len(next(iter(layers.values()))), 1)
            caption = f"{one.label}: density of each layer (down, from 0) at each step (across, from 1)"
            both.append(charts.heat_picture(list(layers.items()), steps, caption=caption))
    return {"by_step": by_step, "by_layer": by_layer, "by_layer_and_step": both}


def _counted(length: int, first: int) -> list[str]:
    return [str(number) for number in range(first, first + length)]


def _reasons(run: Run) -> dict[str, Any]:
    counts = [(one.label, report_data.dense_reasons(one.records)) for one in run.sparse]
    return {"names": sorted({reason for _, found in counts for reason in found}), "rows": counts}


def _speed(run: Run) -> list[dict[str, Any]]:
    folders = [("dense", run.dense), *((one.label, one.records) for one in run.compared)]
    return [
        {
            "label": label,
            "numbers": {
                "seconds": _mean(records.values(), "seconds"),
                "seconds_per_step": _mean(records.values(), "seconds_per_step"),
                "peak": _peak(records.values()),
            },
            "devices": report_data.told(records.values(), "device_name"),
        }
        for label, records in folders
    ]


def _residuals(run: Run) -> list[dict[str, Any]]:
    """For each folder that remembered something: the most memory of it in MiB, and sparse calls without it."""
    rows = []
    for one in run.sparse:
        most = max((record.get("residual_bytes") or 0 for record in one.records.values()), default=0)
        without = sum(record.get("calls_without_residual") or 0 for record in one.records.values())
        if most or without:
            rows.append({"label": one.label, "mib": most / 2**20, "without": without})
    return rows


def _mean(records: Iterable[Record], name: str) -> float | None:
    values = _known(records, name)
    return float(np.mean(values)) if values else None


def _peak(records: Iterable[Record]) -> float | None:
    """The largest peak in GiB; None where a manifest lacks it."""
    values = _known(records, "peak_memory_bytes")
    return max(values) / 2**30 if values else None


def _known(records: Iterable[Record], name: str) -> list[float]:
    """A field of all records; empty where one of them lacks it."""
    values = [record.get(name) for record in records]
    return [] if None in values else [float(value) for value in values if value is not None]


def _meanings(run: Run) -> dict[str, str]:
    """What each measure is, by its head in the tables; measures without a value are left out."""
    return {
        COLUMN_HEADS.get(key, key): text
        for one in run.compared
        for key, text in one.summary["definitions"].items()
        if one.summary.get(key) is not None
    }


def _remarks(run: Run) -> list[str]:
    lines = []
    for one in run.compared:
        summary = one.summary
        if summary.get("lpips_unavailable"):
            lines.append(f"{one.label}: no LPIPS ({summary['lpips_unavailable']})")
        if summary["source"]["mp4"]:
            lines.append(f"{one.label}: {summary['source']['mp4']} videos measured from mp4, compression loss included")
        if summary.get("identical_frames"):
            cap = summary["psnr_cap_db"]
            lines.append(f"{one.label}: {summary['identical_frames']} identical frames, each {cap:g} dB in PSNR means")
        if summary.get("different_devices"):
            lines.append(f"{one.label}: {summary['different_devices']} videos from another device, so no speed-up")
        for side, names in summary["unmatched"].items():
            if names:
                lines.append(f"{one.label}: without a partner ({side.replace('_', ' ')}): {', '.join(names)}")
    return lines
