"""The picture of the stories' rows, and which rows it is drawn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xattn_video_eval.studies.story_plot import draw, latest, main


def row(scenes: int, sparse: float, model: str = "demo", stride: int = 16, **config: int) -> dict[str, Any]:
    return {
        "model": model, "scenes": scenes, "prompt_tokens": 256.0 * scenes, "right": {"dense": 1.0, "sparse": sparse},
        "sparse_density": 1 / scenes, "prefill_seconds": [0.1 * scenes, 0.05 * scenes], "device": "a CPU",
        "config": {"stride": stride, **config},
    }  # fmt: skip


def test_the_last_row_of_each_prefill_and_length_counts() -> None:
    rows = [row(8, 0.1), row(4, 0.2), row(8, 0.3, dense_last=0), row(4, 0.4, dense_last=64), row(4, 0.5, model="other")]
    series = latest(rows, "demo")
    assert {key: [one["right"]["sparse"] for one in of] for key, of in series.items()} == {
        (16, 0): [0.2, 0.3],
        (16, 64): [0.4],
    }
    assert latest(rows, "none") == {}


def test_the_panels_show_answers_with_their_density_and_seconds() -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    figure = draw(latest([row(4, 0.9), row(8, 0.7), row(4, 0.95, dense_last=64), row(4, 0.8, stride=8)], "demo"))
    answers, seconds = figure.axes
    shown = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in answers.lines}
    assert shown == {
        "dense": ([1024, 2048], [100, 100]),
        "sparse, stride 16": ([1024, 2048], [90, 70]),
        "sparse, stride 16, last 64 tokens dense": ([1024], [95]),
        "sparse, stride 8": ([1024], [80]),
    }
    assert sorted(text.get_text() for text in answers.texts) == ["0.12", "0.25", "0.25"]
    assert [list(line.get_ydata()) for line in seconds.lines] == [[0.4, 0.8], [0.2], [0.2, 0.4], [0.2]]


def test_it_is_drawn_from_a_file_of_rows(tmp_path: Path, capfd: Any) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    rows, picture = tmp_path / "rows.jsonl", tmp_path / "stories.png"
    rows.write_text(json.dumps(row(4, 0.9)) + "\n")
    assert main(["--plot", str(picture), "--rows", str(rows)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capfd.readouterr().out == f"wrote {picture}\n"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "rows.jsonl: cannot be read: No such file"),
        ("{}\n", "rows.jsonl: has a line that is no row of xattn_video_eval.studies.story_quality"),
        ("[\n", "rows.jsonl: has a line that is no row of xattn_video_eval.studies.story_quality"),
        ("", "rows.jsonl: no row of --model demo"),
    ],
)
def test_bad_input_is_one_line(lines: str | None, message: str, tmp_path: Path, capfd: Any) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    if lines is not None:
        (tmp_path / "rows.jsonl").write_text(lines)
    assert main(["--plot", str(tmp_path / "a.png"), "--rows", str(tmp_path / "rows.jsonl")]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("story_plot: error: ")
    assert message in error


def test_a_picture_of_another_format_is_refused(tmp_path: Path, capfd: Any) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    assert main(["--plot", str(tmp_path / "a.txt")]) == 2
    assert "--plot must end in .png" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
