"""What remembering the residual brings: presets beside pure attention reuse and beside plain selection.

    held-out prompts, named configurations -> sweep (generate, compare, judge) -> a row per configuration, a picture

Every configuration is compared with the same dense videos. It is judged by the worst video first: settings that are
good on average can still spoil one video. The package's defaults, the base point of a sweep, are always made too. A run
that was killed goes on when started again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from xattn_video_eval.plot_labels import Label, write_labels
from xattn_video_eval.results import RESULTS, append_rows, provenance
from xattn_video_eval.studies import selection_plots
from xattn_video_eval.studies.held_out import write_prompts
from xattn_video_eval.sweep import SweepSettings, sweep, table
from xattn_video_pipelines.common.files import whole_files
from xattn_video_pipelines.common.program import run_alone
from xattn_video_pipelines.common.settings import DtypeOrAuto, Option, Settings
from xattn_video_pipelines.video import print_video, read_manifest

EXAMPLE = """\
example:
  python -m xattn_video_eval.studies.residual_quality --out residual --record --plot residual.png
  python -m xattn_video_eval.studies.residual_quality --out quick --videos 2
"""

LEDGER = RESULTS / "residual_quality.jsonl"
CONFIGURATIONS = Path(__file__).with_suffix(".json")


@dataclass(frozen=True, kw_only=True)
class ResidualQualitySettings(Settings):
    """Which videos are made with which configurations, and where the results go."""

    out: Annotated[Path, Option("of the videos; a run goes on", metavar="DIR")]
    configurations: Annotated[
        Path, Option("JSON with settings by name, as --points of xattn-video sweep", metavar="FILE")
    ] = CONFIGURATIONS
    model: Annotated[str, Option("name or folder of a model of the shapes world")] = "demo"
    videos: Annotated[int, Option("held-out prompts, evenly spaced over the file", metavar="N")] = 32
    every: Annotated[int, Option("of these only every so many-th, for a shorter run", metavar="N")] = 1
    steps: Annotated[int, Option("denoising steps, of which 5 are dense")] = 20
    num_frames: Annotated[int, Option("frames a video")] = 33
    device: Annotated[str, Option("as of xattn-video generate")] = "auto"
    dtype: Annotated[DtypeOrAuto, Option("as of xattn-video generate")] = "auto"
    plot: Annotated[Path | None, Option("picture of the rows; needs matplotlib", metavar="FILE.png")] = None
    record: Annotated[bool, Option(f"append the rows to eval/results/{LEDGER.name}")] = False


def residual_quality(settings: ResidualQualitySettings) -> int:
    """Make what is missing, measure it, print the table; 0. Raises UserError."""
    if settings.plot is not None:
        selection_plots.check(settings.plot)
    swept = sweep(_sweep_settings(settings), print_video)
    print(table(swept))
    rows = _rows(settings, swept)
    if settings.plot is not None:
        draw(rows, settings.plot, settings.model)
    if settings.record:
        append_rows(LEDGER, rows)
    for row in rows:
        print(json.dumps(row))
    return 0


def draw(rows: Sequence[dict[str, Any]], path: Path, model: str) -> None:
    """PSNR over density: for each configuration the mean with its interval, and the worst video.

    Args:
        rows: as the ledger has them.
        path: of the picture; the suffix says which format.
        model: that made the videos, for the title.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    density = [row["density"] for row in rows]
    mean, worst = [row["psnr"] for row in rows], [row["psnr_worst"] for row in rows]
    spread = [
        [row["psnr"] - row["psnr_low"] for row in rows],
        [row["psnr_high"] - row["psnr"] for row in rows],
    ]
    axes.errorbar(density, mean, yerr=spread, fmt="o", capsize=3, label="mean over videos, 95 % bootstrap interval")
    axes.plot(density, worst, "v", label="worst video")
    axes.set(xlabel="density of all calls, refreshes counted as 1", ylabel="PSNR against dense, dB")
    size = f"{rows[0]['videos']} videos, {rows[0]['tokens']:,} tokens, {rows[0]['steps']} steps"
    axes.set_title(f"model {model} on {rows[0]['device']}: {size}", fontsize="medium")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.draw_without_rendering()
    write_labels(axes, [Label(row["name"], row["density"], row["psnr"]) for row in rows])
    with whole_files(path) as (partial,):
        figure.savefig(partial, dpi=110)


def _sweep_settings(settings: ResidualQualitySettings) -> SweepSettings:
    """The sweep of the named configurations over the chosen prompts, which are written to a file of their own."""
    file, _ = write_prompts(settings.out, settings.videos, settings.every)
    return SweepSettings(
        model=settings.model, prompts=file, out=settings.out, points=settings.configurations, steps=settings.steps,
        num_frames=settings.num_frames, height=128, width=128, guidance_scale=1.0, device=settings.device,
        dtype=settings.dtype, lpips=False, floor=False, plot=False,
    )  # fmt: skip


def _rows(settings: ResidualQualitySettings, swept: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The named rows of a sweep as the ledger has them, each with the dense videos' judgement and where it was made."""
    dense = swept[0]
    rows = []
    for row in swept:
        if row["name"] is None:
            continue
        record = next(iter(read_manifest(settings.out / row["attention"]).values()))
        measured = {name: row[name] for name in ("psnr", "psnr_low", "psnr_high", "psnr_worst", "ssim", "flicker")}
        rows.append(
            {
                "name": row["name"],
                "config": record["config"],
                "videos": row["videos"],
                "steps": settings.steps,
                "tokens": record["tokens"],
                "density": row["density"],
                **measured,
                "right": {
                    side: round(one["as_asked"] * one["videos"]) for side, one in (("dense", dense), ("sparse", row))
                },
                **{name: row[name] for name in ("residual_mib", "calls_without_residual")},
                **{name: row[name] for name in ("dense_seconds", "sparse_seconds", "speedup")},
                "device": record["device_name"],
                "dtype": record["dtype"],
                **provenance("diffusers", "transformers"),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program: 0, or 2 with one line for bad input."""
    return run_alone(residual_quality, "xattn_video_eval.studies.residual_quality", __doc__ or "", EXAMPLE, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
