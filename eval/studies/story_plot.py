"""The picture of `story_quality`'s rows: right answers and prefill time over the prompt's length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from xattn_video_eval.plot_labels import Label, write_labels
from xattn_video_eval.studies import selection_plots
from xattn_video_eval.studies.story_quality import LEDGER
from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import whole_files
from xattn_video_pipelines.common.program import run_alone
from xattn_video_pipelines.common.settings import Option, Settings

Row = dict[str, Any]

EXAMPLE = """\
example:
  python -m xattn_video_eval.studies.story_plot --plot story_quality.png
"""

# A sparse prefill by its stride and the tokens at the prompt's end whose blocks stay dense.
_STYLES = {(16, 0): "s--", (16, 8): "v:", (16, 64): "o-", (8, 0): "^-."}


def latest(rows: Iterable[Row], model: str) -> dict[tuple[int, int], list[Row]]:
    """A model's last row of each sparse prefill and length, by stride and `dense_last`, shortest first."""
    last = {}
    for row in rows:
        if row["model"] == model:
            # Rows from before the setting existed had its default.
            last[row["config"]["stride"], row["config"].get("dense_last", 0), row["scenes"]] = row
    series: dict[tuple[int, int], list[Row]] = {}
    for stride, dense_last, scenes in sorted(last):
        series.setdefault((stride, dense_last), []).append(last[stride, dense_last, scenes])
    return series


def draw(series: dict[tuple[int, int], list[Row]]) -> Any:
    """The figure: a panel of right answers, their densities beside the points, and one of prefill times."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    answers, seconds = figure.subplots(1, 2)
    # All have been compared with dense answers; the longest series has the most lengths.
    most = max(series.values(), key=len)
    tokens = [row["prompt_tokens"] for row in most]
    answers.plot(tokens, [100 * row["right"]["dense"] for row in most], "k-", linewidth=3, alpha=0.25, label="dense")
    seconds.plot(tokens, [row["prefill_seconds"][0] for row in most], "k-", linewidth=3, alpha=0.25, label="dense")
    labels = []
    for key, rows in series.items():
        lengths = [row["prompt_tokens"] for row in rows]
        name = f"sparse, stride {key[0]}" + (f", last {key[1]} tokens dense" if key[1] else "")
        style = _STYLES.get(key, "x:")
        (line,) = answers.plot(lengths, [100 * row["right"]["sparse"] for row in rows], style, label=name, markersize=5)
        seconds.plot(lengths, [row["prefill_seconds"][1] for row in rows], style, color=line.get_color(), markersize=5)
        for row in rows if key in ((16, 0), (16, 64)) else ():
            text, right = f"{row['sparse_density']:.2f}", 100 * row["right"]["sparse"]
            labels.append(Label(text, row["prompt_tokens"], right, line.get_color()))
    for axes in (answers, seconds):
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [f"{length:,.0f}" for length in tokens])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    answers.set(xlabel="tokens of the prompt", ylabel="right answers, percent", ylim=(0, 108))
    answers.set_title(f"model {most[0]['model']}; beside the points the density")
    seconds.set(xlabel="tokens of the prompt", ylabel="prefill, seconds", yscale="log", title=most[0]["device"])
    answers.legend(fontsize="small", loc="lower left")
    figure.draw_without_rendering()
    write_labels(answers, labels, size=7)
    return figure


@dataclass(frozen=True, kw_only=True)
class StoryPlotSettings(Settings):
    """Whose rows are drawn, and where the picture goes."""

    plot: Annotated[Path, Option("the picture; needs matplotlib", metavar="FILE.png")]
    rows: Annotated[Path, Option("of story_quality", metavar="FILE")] = LEDGER
    model: Annotated[str, Option("as the rows name it")] = "demo"


def story_plot(settings: StoryPlotSettings) -> int:
    """Draw; 0. Raises UserError."""
    selection_plots.check(settings.plot)
    if not settings.rows.is_file():
        raise UserError(f"{settings.rows}: cannot be read: No such file or directory")
    try:
        series = latest((row for _, row in jsonl.read(settings.rows)), settings.model)
    except (UserError, KeyError, TypeError):
        raise UserError(
            f"{settings.rows}: has a line that is no row of xattn_video_eval.studies.story_quality"
        ) from None
    if not series:
        raise UserError(f"{settings.rows}: no row of --model {settings.model}")
    with whole_files(settings.plot) as (partial,):
        draw(series).savefig(partial, dpi=110)
    print(f"wrote {settings.plot}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program: 0, or 2 with one line for bad input."""
    return run_alone(story_plot, "xattn_video_eval.studies.story_plot", __doc__ or "", EXAMPLE, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
