"""What a report is made from: the folders of one run, their manifests, and what `compare` measured.

A summary is believed only where it is of these very videos; otherwise the folder is compared anew.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xattn_video_eval.compare import FLOOR, SUMMARY_JSON, CompareSettings, compare, read_summary
from xattn_video_eval.report.settings import ReportSettings
from xattn_video_eval.report.wording import in_words
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import check_stays, remove_dead_claim
from xattn_video_pipelines.common.terminal import say
from xattn_video_pipelines.video import MANIFEST, Key, Record, finished_videos, video_name

DENSE = "dense"


@dataclass(frozen=True)
class Compared:
    """One folder beside dense/: its records by (id, seed), and what `compare` says of it."""

    label: str
    folder: Path
    records: dict[Key, Record]
    summary: dict[str, Any]

    @property
    def is_floor(self) -> bool:
        return self.label == FLOOR

    @property
    def rows(self) -> dict[Key, Record]:
        """The summary's rows by (id, seed)."""
        return {(row["id"], row["seed"]): row for row in self.summary["videos"]}


@dataclass(frozen=True)
class Run:
    """A folder that `generate` or `sweep` wrote: the dense videos and every folder that is compared with them."""

    folder: Path
    dense_folder: Path
    dense: dict[Key, Record]
    compared: tuple[Compared, ...]

    @property
    def floor(self) -> Compared | None:
        return next((one for one in self.compared if one.is_floor), None)

    @property
    def sparse(self) -> tuple[Compared, ...]:
        return tuple(one for one in self.compared if not one.is_floor)


@dataclass(frozen=True)
class Case:
    """One video of one folder beside its dense one: a place in the players and a point in the scatter."""

    label: str
    key: Key
    row: Record

    @property
    def name(self) -> str:
        return video_name(self.key)

    @property
    def id(self) -> str:
        return f"{self.label}/{self.name}"


def load_run(settings: ReportSettings, *, progress: bool = True) -> Run:
    """Read every manifest, take the summaries that are up to date and measure the rest.

    Args:
        settings: of the report. Its `run_dir` is what `generate` was given as --out.
        progress: show bars on stderr.

    Raises:
        UserError: one line; no such folder, no dense/ in it, nothing to compare with it, or what `compare` raises.
    """
    folder = settings.run_dir
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    labels = sorted((path.name for path in folder.iterdir() if (path / MANIFEST).is_file()), key=_in_order)
    if not labels:
        raise UserError(f"{folder}: no folder with a {MANIFEST} in it; give the --out of `xattn-video generate`")
    if DENSE not in labels:
        raise UserError(
            f"{folder}: no {DENSE}/ with a {MANIFEST} in it; xattn-video generate --attention dense makes it"
        )
    if labels == [DENSE]:
        raise UserError(f"{folder}: only {DENSE}/ is in it; xattn-video generate --attention all makes the rest")
    for label in labels:
        check_stays(folder / label, folder)
    dense_folder = folder / DENSE
    dense = finished_videos(dense_folder)
    compared = []
    for label in labels:
        if label != DENSE:
            records = finished_videos(folder / label)
            # Of a comparison that was killed after it had written its summary.
            remove_dead_claim(folder / label / SUMMARY_JSON)
            summary = _current_summary(dense_folder, dense, folder / label, records)
            if summary is None:
                asked = CompareSettings(
                    dense_folder, folder / label, allow_unmatched=True, floor=False,
                    lpips=settings.lpips, lpips_weights=settings.lpips_weights, device=settings.device,
                )  # fmt: skip
                summary = compare(asked, progress=progress)
            compared.append(Compared(label, folder / label, records, summary))
    return Run(folder, dense_folder, dense, tuple(compared))


def worst_first(run: Run) -> list[Case]:
    """Every compared video, the least like dense first, by rank within its folder; the noise floor's come last.

    By rank, so that each configuration's worst cases come early and not only those of the sparsest.
    """
    ranked = []
    for one in run.compared:
        rows = sorted(one.rows.items(), key=lambda item: (item[1]["psnr"], item[1]["ssim"]))
        ranked += [(one.is_floor, rank, row["psnr"], Case(one.label, key, row)) for rank, (key, row) in enumerate(rows)]
    return [case for *_, case in sorted(ranked, key=lambda entry: entry[:3])]


def told(records: Iterable[Record], name: str) -> list[str]:
    """The different values of a field, as texts, in the order in which they come; nothing where no record has it."""
    values = (record.get(name) for record in records)
    return list(dict.fromkeys(_text(value) for value in values if value is not None))


def settings(run: Run) -> list[tuple[str, list[str]]]:
    """What all videos were made with: a name and its values, more than one where the videos differ.

    Last, for each sparse folder, its settings of attention in words.
    """
    records = [*run.dense.values(), *(record for one in run.compared for record in one.records.values())]
    sizes = dict.fromkeys(
        f"{record['width']} x {record['height']}, {record['num_frames']} frames at {_text(record.get('fps'))} a second"
        for record in records
        if {"width", "height", "num_frames"} <= record.keys()
    )
    packages = [record.get("versions") or {} for record in records]
    names = dict.fromkeys(name for package in packages for name in package)
    versions = [f"{name} {' / '.join(values)}" for name in names if (values := told(packages, name))]
    named = [
        ("model", told(records, "model_name") or told(records, "model")),
        ("size", list(sizes)),
        ("video tokens", told(records, "tokens")),
        ("denoising steps", told(records, "steps")),
        ("guidance scale", told(records, "guidance_scale")),
        ("flow shift", told(records, "flow_shift")),
        ("dtype", told(records, "dtype")),
        ("device", told(records, "device_name")),
        ("offload", told(records, "offload")),
        ("torch.compile", told(records, "compile")),
        ("versions", [", ".join(versions)] if versions else []),
        ("commit", told(records, "commit")),
        ("made", _span(told(records, "finished"))),
    ]
    # What differs between the configurations, in words; old manifests may lack it.
    named += [(one.label, _words(one, config)) for one in run.sparse if (config := _config(one))]
    return [(name, values) for name, values in named if values]


def _config(one: Compared) -> dict[str, Any] | None:
    """The settings of sparse attention, which are the same in all records of a folder."""
    return next((record["config"] for record in one.records.values() if record.get("config")), None)


def _words(one: Compared, config: dict[str, Any]) -> list[str]:
    try:
        return in_words(config)
    except (ValueError, TypeError) as error:
        raise UserError(f"{one.folder / MANIFEST}: config: {error}") from None


def mean_density_by_step(records: Mapping[Key, Record]) -> list[float]:
    """Mean over videos, step by step; empty where the manifest does not have it or the videos differ in steps."""
    tables = [record.get("density_by_step") or [] for record in records.values()]
    if len({len(table) for table in tables}) != 1:
        return []
    return [sum(column) / len(column) for column in zip(*tables, strict=True)]


def mean_density_by_layer(records: Mapping[Key, Record]) -> dict[str, float]:
    """Mean over videos, layer by layer; empty where the manifest does not have it or the layers differ."""
    tables = [record.get("density_by_layer") or {} for record in records.values()]
    if not tables or any(table.keys() != tables[0].keys() for table in tables):
        return {}
    return {layer: sum(table[layer] for table in tables) / len(tables) for layer in tables[0]}


def mean_density_by_layer_and_step(records: Mapping[Key, Record]) -> dict[str, list[float | None]]:
    """Mean over videos for each step of each layer, None where it had no call; empty as `mean_density_by_layer`."""
    tables = [record.get("density_by_layer_and_step") or {} for record in records.values()]
    shapes = {tuple((layer, len(steps)) for layer, steps in table.items()) for table in tables}
    if len(shapes) != 1:
        return {}
    return {layer: [_known_mean(cell) for cell in zip(*(t[layer] for t in tables), strict=True)] for layer in tables[0]}


def _known_mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def dense_reasons(records: Mapping[Key, Record]) -> dict[str, int]:
    """Dense calls of all videos by reason, the most frequent first."""
    counts: dict[str, int] = {}
    for record in records.values():
        for reason, number in (record.get("dense_reasons") or {}).items():
            counts[reason] = counts.get(reason, 0) + number
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _current_summary(
    dense_folder: Path, dense: dict[Key, Record], folder: Path, records: dict[Key, Record]
) -> dict[str, Any] | None:
    """summary.json, if it is of these manifests' videos and has what a report needs; else None."""
    path = folder / SUMMARY_JSON
    try:
        written = os.lstat(path).st_mtime_ns
        if any(written < os.stat(place / MANIFEST).st_mtime_ns for place in (dense_folder, folder)):
            return None
        summary = read_summary(folder)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        say(f"{path}: not of this version, so the folder is compared again: {error}", sys.stderr)
        return None
    rows = summary["videos"]
    by_key = {(row["id"], row["seed"]): row for row in rows}
    if by_key.keys() != dense.keys() & records.keys():
        return None
    # Paths depend on where compare ran; times tell whether the rows are of these videos.
    same = all(
        (row["dense_seconds"], row["sparse_seconds"], row["density"])
        == (dense[key].get("seconds"), records[key].get("seconds"), records[key].get("mean_density"))
        for key, row in by_key.items()
    )
    return summary if same else None


def _in_order(label: str) -> tuple[bool, bool, list[tuple[int, str]]]:
    """dense, then the noise floor, then the rest with numbers in them read as numbers."""
    parts = [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", label)]
    return label != DENSE, label != FLOOR, parts


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _span(times: list[str]) -> list[str]:
    """The first and the last of ISO times."""
    return list(dict.fromkeys((min(times), max(times)))) if times else []
