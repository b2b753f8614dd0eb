"""The figures that docs/ quotes are those of the rows under eval/results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results"


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def table(page: str, header: str) -> list[list[str]]:
    """The cells of the table of a page under docs/ whose first line begins with `header`."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(header)) + 2
    body = lines[first : first + next(i for i, line in enumerate([*lines[first:], ""]) if not line.startswith("|"))]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in body]


def test_the_figures_of_the_gpu_are_those_of_the_rows() -> None:
    measured = {
        (row["tokens"], row["heads"], row["stride"]): row
        for row in rows_of("efficiency.jsonl")
        if row["device"] == "NVIDIA H200"
    }
    shown = set()
    tokens = heads = ""
    for _, *cells in table("performance.md", "| call | tokens"):
        # The second line of a call leaves out what is that of the first.
        tokens, heads = cells[0] or tokens, cells[1] or heads
        key = int(tokens.replace(",", "")), int(heads), int(cells[2])
        row, best = measured[key], measured[key]["best_ms"]
        dense = min(time for kernel, time in best.items() if kernel.startswith("sdpa"))
        milliseconds = dense, best["score"], best["select"], best["attend-hopper"], best["total"]
        assert cells[3:] == [
            f"{row['density']:.3f}",
            *(f"{one:.1f}" for one in milliseconds),
            *(f"{row[ratio]:.2f}x" for ratio in ("speedup", "ideal_speedup")),
        ], key
        shown.add(key)
    assert shown == set(measured)


def test_the_figures_of_the_cpu_are_those_of_the_rows() -> None:
    measured = [row for row in rows_of("efficiency.jsonl") if "EPYC" in row["device"]]
    shown = table("performance.md", "| tokens | D | dtype")
    assert len(shown) == 6
    for cells in shown:
        assert any(
            cells
            == [
                f"{row['tokens']:,}",
                str(row["head_dim"]),
                row["dtype"],
                f"{row['density']:.3f}",
                f"{row['best_ms']['sdpa']:,.0f}",
                f"{row['best_ms']['total']:,.0f}",
                f"{row['speedup']:.1f}x",
                f"{row['ideal_speedup']:.1f}x",
            ]
            for row in measured
            if "sdpa" in row["best_ms"]
        ), cells


def test_what_sparse_attention_costs_the_demo_is_what_was_measured() -> None:
    row = rows_of("demo_quality.jsonl")[-1]
    assert row["videos"] == 100
    text = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    for figure in (
        f"{row['speedup']:.2f}x",
        f"{row['dense_seconds']:.1f} s to {row['sparse_seconds']:.1f} s",
        f"select {row['sparse_density']:.3f} of the blocks",
        f"{row['psnr']:.1f} dB",
        f"SSIM {row['ssim']:.3f}",
    ):
        assert figure in " ".join(text.split()), figure
    shown = table("quality.md", "| as asked | dense")
    for name, cells in zip(("colour", "shape", "motion", "background", "all"), shown, strict=True):
        change = {end: f"{100 * row['difference'][name][end]:+.1f}" for end in ("difference", "low", "high")}
        assert cells[1:] == [
            *(f"{100 * row['right'][attention][name]:.0f} %" for attention in ("dense", "sparse")),
            f"{change['difference']} [{change['low']}, {change['high']}]",
        ], name


def test_what_each_setting_costs_is_what_was_measured() -> None:
    runs = [
        json.loads((RESULTS / name).read_text(encoding="utf-8"))
        for name in ("demo_sweep.json", "demo_sweep_quiet.json")
    ]
    busy, quiet = ({setting_of(row): row for row in run["rows"]} for run in runs)
    shown = table("quality.md", "| setting | density of all calls")
    told = set()
    for setting, density, psnr, ssim, asked, speedup, quiet_speedup in shown:
        numbers = dict(zip(("threshold", "stride", "warmup_steps"), (0.9, 8, 5), strict=True))
        if setting.startswith("dense"):
            key: Any = "dense-alt" if "noise floor" in setting else "dense"
        else:
            (found,) = re.findall(r"^(?:(threshold|stride) )?([\d.]+)( warm-up steps)?", setting)
            numbers[found[0] or "warmup_steps"] = float(found[1])
            key = tuple(float(value) for value in numbers.values())
        row = busy[key]
        likeness = ["", ""] if row["psnr"] is None else [f"{row['psnr']:.1f}", f"{row['ssim']:.3f}"]
        assert [density, psnr, ssim] == [f"{row['density']:.3f}", *likeness], setting
        assert asked == f"{round(32 * row['as_asked'])} of 32", setting
        assert (speedup, quiet_speedup) == (f"{row['speedup']:.2f}x", f"{quiet[key]['speedup']:.2f}x"), setting
        told.add(key)
    assert told == set(busy)


@pytest.mark.parametrize(
    ("title", "of"),
    [
        ("| attention | density of all calls", {"videos": 32, "steps": 20, "tokens": 4352}),
        ("| attention, 8,448 tokens | density of all calls", {"videos": 2, "steps": 20, "tokens": 8448}),
        ("| attention, 8 steps | density of all calls", {"videos": 4, "steps": 8, "tokens": 4352}),
    ],
)
def test_what_residuals_bring_is_what_was_measured(title: str, of: dict[str, int]) -> None:
    rows = rows_of("residual_quality.jsonl")
    measured = {row["name"]: row for row in rows if of.items() <= row.items()}
    for name, *cells in table("quality.md", title):
        row = measured.pop(name.removeprefix("preset ").strip("`"))
        assert cells == [*likeness_of(row), f"{row['right']['sparse']} of {row['videos']}"], name
    assert not measured


def test_what_each_option_brings_is_what_was_measured() -> None:
    of = {"videos": 8, "steps": 20, "tokens": 4352}
    measured = {row["name"]: row for row in rows_of("residual_quality.jsonl") if of.items() <= row.items()}
    options = json.loads((ROOT / "eval/studies/options_alone.json").read_text(encoding="utf-8"))
    for name, *cells in table("quality.md", "| option | density of all calls"):
        name = name.removeprefix("preset ").removesuffix(": all three").strip("`")
        row = measured[name]
        assert cells == [*likeness_of(row), f"{row['right']['sparse']} of {row['videos']}"], name
        options.pop(name)
    assert not options


def test_what_step_caches_keep_is_what_was_measured() -> None:
    rows = rows_of("step_caches.jsonl")
    measured = {row["name"]: row for row in rows if row["videos"] == 8}
    for name, *cells in table("quality.md", "| step cache | density of all calls"):
        row = measured.pop(name.replace("`", ""))
        assert cells == [*likeness_of(row), f"{row['right']['cached']} of {row['videos']}"], name
    assert not measured


def test_what_caches_and_presets_give_in_their_time_is_what_was_measured() -> None:
    of = {"videos": 2, "tokens": 4352, "device": "AMD EPYC, 2 threads"}
    rows = [*rows_of("step_caches.jsonl"), *rows_of("residual_quality.jsonl")]
    measured = {row["name"]: row for row in rows if of.items() <= row.items() and row["speedup"] is not None}
    for name, *cells in table("quality.md", "| at equal time |"):
        row = measured.pop(name.removeprefix("preset ").replace("`", ""))
        seconds = row.get("cached_seconds") or row["sparse_seconds"]
        assert cells == [
            f"{seconds:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['density']:.3f}",
            f"{row['psnr']:.1f}",
            f"{row['psnr_worst']:.1f}",
        ], name
    assert not measured


def likeness_of(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['density']:.3f}",
        f"{row['psnr']:.1f} [{row['psnr_low']:.1f}, {row['psnr_high']:.1f}]",
        f"{row['psnr_worst']:.1f}",
        f"{row['ssim']:.3f}",
        f"{row['flicker']:.4f}",
    ]


def setting_of(row: dict[str, Any]) -> Any:
    if row["threshold"] is None:
        return row["attention"]
    return tuple(float(row[name]) for name in ("threshold", "stride", "warmup_steps"))


def test_the_scores_that_find_the_blocks_are_those_of_the_rows() -> None:
    names = {
        "exact mass": "exact",
        "antidiagonal sums (this package)": "antidiagonal",
        "diagonal sums": "diagonal",
        "random in tile": "random_in_tile",
        **{f"{kind} pooling": f"{kind}_pooling" for kind in ("mean", "max", "sum")},
    }
    latest = {row["inputs"]: row for row in rows_of("selection_quality.jsonl")}
    shown = table("quality.md", "| score | cost of QK")
    assert {cells[0] for cells in shown} == set(names)
    for score, _, *cells in shown:
        for kind, cell in zip(("video", "text", "demo"), cells, strict=True):
            (recall,) = (
                one["recall"]
                for one in latest[kind]["scorers"]
                if one["scorer"] == names[score] and one["stride"] in (8, None)
            )
            assert cell == f"{recall:.3f}", (score, kind)
