"""A report's HTML: tables, charts, players. Every text that comes from a file is escaped here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from xattn_video_eval.compare.table import COLUMN_HEADS
from xattn_video_eval.report import charts as report_charts
from xattn_video_eval.report import data as report_data
from xattn_video_eval.report.data import Case, Compared, Run
from xattn_video_eval.report.paper_tables import load_paper_tables
from xattn_video_eval.report.videos import Embedded, player_cases, prompt_of
from xattn_video_pipelines.video.manifest import video_name

_ASSETS = Path(__file__).resolve().parent / "assets"
_WORST = 12

# Columns of the table of configurations: a summary's name, the head, how its value is written.
_COLUMNS = (
    ("pairs", "videos", "d"),
    ("density", "density", ".3f"),
    ("psnr", "PSNR dB", ".2f"),
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


def build_page(run: Run, cases: Sequence[Case], embedded: Embedded) -> str:
    """The whole page as one text.

    Args:
        run: what is reported on.
        cases: every compared video, the worst first.
        embedded: the videos that are in the page.
    """
    sections = (
        _settings(run),
        _configurations(run),
        _players(embedded),
        _scatter(run, embedded),
        _worst(run, cases, embedded),
        _density(run),
        _reasons(run),
        _speed(run),
        _notes(run),
    )
    videos = "\n".join(
        f'<script type="text/plain" data-video="{escape(name)}">{url}</script>' for name, url in embedded.videos.items()
    )
    return Template(_asset("page.html")).substitute(
        title=escape(f"xattn-video report: {run.folder.resolve().name}"),
        lead="Sparse attention against dense attention on the same prompts and seeds. Read every likeness against the "
        "noise floor: dense attention in another order of summation, which is all that a sparse video could reach.",
        style=_asset("style.css"),
        script=_asset("script.js"),
        sections="\n".join(sections),
        cases=json_in_script(player_cases(run, embedded)),
        videos=videos,
    )


def json_in_script(value: Any) -> str:
    """JSON that no text in it can end: `<` never appears, so neither `</script>` nor `<!--` does."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _section(id: str, title: str, *parts: str) -> str:
    return f'<section id="{id}">\n<h2>{title}</h2>\n' + "\n".join(parts) + "\n</section>"


def _table(id: str, heads: Sequence[str], rows: Sequence[str]) -> str:
    """Rows under their heads; a head with a star is that of a column of texts."""
    cells = "".join(
        f'<th scope="col" class="{"text" if name.startswith("*") else ""}">{escape(name.removeprefix("*"))}</th>'
        for name in heads
    )
    table = f'<table id="{id}"><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="wide">{table}</div>'


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _settings(run: Run) -> str:
    entries = "".join(
        f"<dt>{escape(name)}</dt><dd>{'<br>'.join(escape(value) for value in values)}</dd>"
        for name, values in report_data.settings(run)
    )
    return _section("settings", "Settings", f'<dl class="settings">{entries}</dl>')


def _configurations(run: Run) -> str:
    dense: dict[str, Any] = {"pairs": len(run.dense), "density": 1.0}
    rows = [_row("dense (reference)", dense)]
    if run.floor:
        floor = {**run.floor.summary, **dict.fromkeys(_SPEED)}
        rows.append(_row(f"{run.floor.label} (noise floor)", floor, "floor"))
    rows += [_row(one.label, {**one.summary, "below_floor": _below_floor(run, one)}) for one in run.sparse]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for _, name, _ in _COLUMNS)
    paper = load_paper_tables()
    table = paper["tables"]["video_generation_wan21_14b"]
    theirs = [
        _row(
            f"theirs: Wan2.1-14B, threshold {entry['threshold']:g}",
            {**entry, "density": entry["density_percent"] / 100},
        )
        for entry in table["values"]
    ]
    says = (
        f"Theirs, another model: {table['measure']}. {paper['paper']}; {table['source']}. Compare orders, not numbers."
    )
    parts = [
        '<div class="wide"><table id="configurations"><thead><tr><th scope="col">videos of</th>',
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody>",
        f'<tbody class="theirs"><tr><td class="says" colspan="{len(_COLUMNS) + 1}"><div>{escape(says)}</div></td></tr>',
        f"{''.join(theirs)}</tbody></table></div>",
    ]
    notes = [_note("Means over videos. Below floor: the floor's PSNR less this one's, on the videos that both have.")]
    if run.floor is None:
        notes = [_note("Noise floor: not measured; xattn-video generate --attention dense-alt makes its videos.")]
    return _section("table", "All configurations", "".join(parts), *notes)


def _below_floor(run: Run, one: Compared) -> float | None:
    if run.floor is None:
        return None
    floor, own = run.floor.rows, one.rows
    differences = [floor[key]["psnr"] - own[key]["psnr"] for key in own.keys() & floor.keys()]
    return float(np.mean(differences)) if differences else None


def _row(name: str, values: dict[str, Any], kind: str = "") -> str:
    cells = "".join(_cell(values.get(key), spec) for key, _, spec in _COLUMNS)
    return f'<tr class="{kind}" data-row="{escape(name)}"><th scope="row">{escape(name)}</th>{cells}</tr>'


def _cell(value: float | None, spec: str) -> str:
    """A number, written short, with all its digits as the tooltip."""
    return "<td>-</td>" if value is None else f'<td title="{value!r}">{format(value, spec)}</td>'


def _players(embedded: Embedded) -> str:
    parts = []
    if embedded.cases:
        parts.append(_asset("players.html"))
    megabytes = embedded.bytes / 1e6
    parts.append(
        _note(
            f"{len(embedded.videos)} videos ({megabytes:.1f} MB) in this page for {len(embedded.cases)} comparisons, "
            "each configuration's worst first. The difference is drawn by this browser from the mp4 files, so it shows "
            "compression too; the numbers are from the lossless copies where there are any."
        )
    )
    if embedded.left_out:
        # Hundreds of names would push everything else off the screen.
        count = f"{len(embedded.left_out)} comparisons left out to keep the page small (--max-megabytes)"
        names = _note(", ".join(case.id for case in embedded.left_out))
        parts.append(f'<details id="left-out"><summary class="note">{escape(count)}</summary>{names}</details>')
    return _section("players", "Side by side", *parts)


def _scatter(run: Run, embedded: Embedded) -> str:
    playable = {case.id for case in embedded.cases}
    series = [*run.sparse, *([run.floor] if run.floor else [])]
    floor = (run.floor.summary["psnr"], "noise floor, mean") if run.floor else None
    charts = []
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
                    points.append(
                        report_charts.Point(row[cost], row["psnr"], index, text, case if case in playable else None)
                    )
        if points:
            charts.append(
                report_charts.scatter(
                    points, x_label=label, y_label="PSNR against dense, dB", line=floor, title=f"PSNR against {cost}"
                )
            )
    if not charts:
        return _section("scatter", "Every video", _note("Neither density nor speed-up is known of these videos."))
    names = report_charts.legend([one.label for one in series])
    note = _note("A mark a video. Where it is in this page, choosing it plays it.")
    return _section("scatter", "Every video", names, f'<div class="charts">{"".join(charts)}</div>', note)


def _worst(run: Run, cases: Sequence[Case], embedded: Embedded) -> str:
    playable = {case.id for case in embedded.cases}
    sparse = [case for case in cases if case.label != report_data.FLOOR]
    worst = sorted(sparse, key=lambda case: (case.row["psnr"], case.row["ssim"]))[:_WORST]
    if not worst:
        return _section("worst", "Worst cases", _note("No sparse videos in this run."))
    rows = []
    for case in worst:
        row = case.row
        name = escape(f"{video_name(case.key)}")
        # The frame after the largest error in a step: where it flickers most.
        frame = row["flicker_worst_frame"]
        if case.id in playable:
            name = f'<a href="#players" data-case="{escape(case.id)}" data-frame="{frame or 0}">{name}</a>'
        region = "-" if row["worst_region"] is None else f"{row['worst_region']} {100 * row['worst_region_share']:.0f}%"
        cells = [f'<td class="text">{escape(case.label)}</td>', _cell(row["psnr"], ".2f"), _cell(row["ssim"], ".4f")]
        cells += [_cell(row["psnr_worst_frame"], ".2f"), _cell(None if frame is None else frame + 1, "d")]
        cells += [
            f'<td class="text">{escape(region)}</td>',
            f'<td class="prompt">{escape(prompt_of(run, case.key))}</td>',
        ]
        rows.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
    heads = (
        "video",
        "*videos of",
        "PSNR dB",
        "SSIM",
        "worst frame dB",
        "flickers at frame",
        "*worst region",
        "*prompt",
    )
    table = _table("worst-cases", heads, rows)
    return _section("worst", "Worst cases", table, _note(f"The {len(worst)} sparse videos least like dense, by PSNR."))


def _density(run: Run) -> str:
    parts = []
    by_step = [(one.label, report_data.mean_density_by_step(one.records)) for one in run.sparse]
    known = [(label, values) for label, values in by_step if values]
    for length in dict.fromkeys(len(values) for _, values in known):
        rows = [(label, values) for label, values in known if len(values) == length]
        steps = [str(step + 1) for step in range(length)]
        caption = "Density by denoising step: means over videos, layers and calls; a dense call counts as 1"
        parts.append(report_charts.heat_map(rows, steps, corner="step", caption=caption))
    layered = [(one.label, table) for one in run.sparse if (table := report_data.mean_density_by_layer(one.records))]
    for names in dict.fromkeys(tuple(table) for _, table in layered):
        rows = [(label, list(table.values())) for label, table in layered if tuple(table) == names]
        caption = "Density by layer, in the model's order: means over videos, steps and calls; a dense call counts as 1"
        numbers = [str(index) for index in range(len(names))]
        parts.append(report_charts.heat_map(rows, numbers, corner="layer", caption=caption))
        parts.append(_note(f"Layers 0 to {len(names) - 1}: {names[0]} to {names[-1]}."))
    for one in run.sparse:
        if table := report_data.mean_density_by_layer_and_step(one.records):
            steps = [str(step + 1) for step in range(len(next(iter(table.values()))))]
            caption = f"{one.label}: density of each layer (down, from 0) at each step (across, from 1)"
            parts.append(report_charts.heat_picture(list(table.items()), steps, caption=caption))
    if not layered:
        parts.append(_note("Steps only: these manifests do not tell layers apart; generate writes them now."))
    return _section("density", "Density over steps and layers", *parts)


def _reasons(run: Run) -> str:
    counts = [(one.label, report_data.dense_reasons(one.records)) for one in run.sparse]
    reasons = sorted({reason for _, found in counts for reason in found})
    if not reasons:
        return _section("reasons", "Dense calls by reason", _note("No call of a sparse run went dense."))
    rows = [
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(_cell(found.get(name, 0), "d") for name in reasons)
        + "</tr>"
        for label, found in counts
    ]
    table = _table("dense-reasons", ("videos of", *reasons), rows)
    return _section("reasons", "Dense calls by reason", table, _note("Attention calls of all videos that went dense."))


def _speed(run: Run) -> str:
    folders = [("dense", run.dense), *((one.label, one.records) for one in run.compared)]
    rows = [
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(_cell(_mean(records.values(), name), ".2f") for name in ("seconds", "seconds_per_step"))
        + _cell(_peak(records.values()), ".2f")
        + f'<td class="text">{escape(", ".join(report_data.told(records.values(), "device_name")) or "-")}</td></tr>'
        for label, records in folders
    ]
    table = _table("speed-rows", ("videos of", "s a video", "s a step", "peak GiB", "*device"), rows)
    notes = _note(
        "Times are means over videos, from the manifests; the noise floor's is no attention's that one would use. Peak "
        "memory is the largest of any video, weights included: a GPU's allocations, on a CPU the process's pages."
    )
    return _section("speed", "Speed and memory", table, notes)


def _mean(records: Any, name: str) -> float | None:
    values = [record.get(name) for record in records]
    return None if None in values or not values else float(np.mean(values))


def _peak(records: Any) -> float | None:
    """The largest peak in GiB; None where a manifest lacks it."""
    values = [record.get("peak_memory_bytes") for record in records]
    return None if None in values or not values else max(values) / 2**30


def _notes(run: Run) -> str:
    lines = []
    meanings: dict[str, str] = {}
    for one in run.compared:
        summary = one.summary
        meanings |= {key: text for key, text in summary["definitions"].items() if summary.get(key) is not None}
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
    entries = "".join(
        f"<dt>{escape(COLUMN_HEADS.get(key, key))}</dt><dd>{escape(text)}</dd>" for key, text in meanings.items()
    )
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return _section("notes", "What the numbers mean", f'<dl class="meanings">{entries}</dl>', f"<ul>{items}</ul>")
