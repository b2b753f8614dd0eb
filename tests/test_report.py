"""`report`: one page that says what compare and generate said, plays every video, and needs nothing else."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
import webbrowser
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import escape

from tests.browser_tools import browser_page, find_chromium
from tests.cli_tools import SPARSE_LABEL, run_command, save_tiny_wan
from xattn_video import XAttnConfig
from xattn_video_eval.compare.command import compare
from xattn_video_eval.compare.settings import CompareSettings
from xattn_video_eval.report import charts
from xattn_video_eval.report import data as report_data
from xattn_video_eval.report.charts import Point, heat_picture, scatter
from xattn_video_eval.report.command import write_report
from xattn_video_eval.report.paper_tables import load_paper_tables
from xattn_video_eval.report.settings import ReportSettings
from xattn_video_eval.report.wording import in_words
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.video.io import read_video
from xattn_video_pipelines.video.manifest import read_manifest

HOSTILE = '</script><script>alert(1)</script> <img src=x onerror=alert(2)> & "quotes" \' ${title} $title'
SECOND = "xattn-s8-t0.30-w1-b16-m0-a1"
TINY = ("--height", 64, "--width", 64, "--num-frames", 17, "--steps", 3, "--fps", 8)
NO_LAYERS = {"density_by_layer": {}, "density_by_layer_and_step": {}}
SPARSE = ("--min-tokens", 0, "--block-size", 16, "--warmup-steps", 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two sparse configurations and the floor, of two prompts, one of them hostile."""
    from xattn_video_pipelines.cli import main

    folder = tmp_path_factory.mktemp("run")
    model, prompts, out = save_tiny_wan(folder / "model"), folder / "prompts.txt", folder / "out"
    prompts.write_text(f"a red circle\n{HOSTILE}\n", encoding="utf-8")
    for threshold in (0.9, 0.3):
        command = ("generate", "--model", model, "--prompts", prompts, "--out", out, "--attention", "all")
        options = (*TINY, *SPARSE, "--threshold", threshold, "--lossless", "--device", "cpu")
        assert main([str(part) for part in (*command, *options)]) == 0
    for label in ("dense-alt", SPARSE_LABEL, SECOND):
        compare(CompareSettings(out / "dense", out / label, lpips=False, floor=False), progress=False)
    return out


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run, with its times kept, so that its summaries stay current."""
    return Path(shutil.copytree(made, tmp_path / "run"))


class Reader(HTMLParser):
    """What a browser would see: elements, script texts, and the cells of every table row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.rows: list[list[tuple[str, str]]] = []
        self._inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append(("", dict(attrs).get("title") or ""))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data
        elif self._inside != "style":
            self.text += data
            if self._inside in ("td", "th"):
                text, title = self.rows[-1][-1]
                self.rows[-1][-1] = text + data, title

    def row(self, head: str) -> list[tuple[str, str]]:
        return next(row for row in self.rows if row and row[0][0] == head)

    @property
    def videos(self) -> dict[str | None, str]:
        return {names["data-video"]: text for names, text in self.scripts if "data-video" in names}

    @property
    def cases(self) -> list[dict]:
        return json.loads(next(text for names, text in self.scripts if names.get("id") == "cases"))


def read(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


def test_rows_are_the_summaries(run, xattn):
    done = xattn("report", run, "--no-lpips")
    assert done.code == 0, done.err
    assert str(run / "report.html") in done.out
    # The summaries were there and current: nothing was measured anew.
    assert "compare" not in done.err
    page = read(run / "report.html")
    floor = json.loads((run / "dense-alt" / "summary.json").read_text())
    for label in (SPARSE_LABEL, SECOND):
        summary = json.loads((run / label / "summary.json").read_text())
        row = page.row(label)
        # LPIPS was switched off, so no column is there for it.
        columns = ("pairs", "density", "psnr", None, None, "ssim", "flicker", "border_excess_db")
        columns += ("dense_seconds", "sparse_seconds", "speedup")
        for name, (text, title) in zip(columns, row[1:], strict=True):
            if name is not None:
                assert title == ("" if summary[name] is None else repr(summary[name])), name
                assert text == "-" or float(text) == pytest.approx(summary[name], abs=0.06)
        worst = min(video["psnr"] for video in summary["videos"])
        assert worst < summary["psnr"]
        assert row[4][1] == repr(worst)
        assert float(row[5][1]) == pytest.approx(floor["psnr"] - summary["psnr"])
    assert page.row("dense (reference)")[2] == ("1.000", "1.0")
    assert page.row("dense-alt (noise floor)")[3][1] == repr(floor["psnr"])
    # How long the floor took is nobody's speed.
    assert [text for text, _ in page.row("dense-alt (noise floor)")[-3:]] == ["-", "-", "-"]


def test_published_rows_are_marked_as_theirs(run):
    page = read(write_report(ReportSettings(run), progress=False))
    for entry in load_paper_tables()["tables"]["video_generation_wan21_14b"]["values"]:
        row = page.row(f"theirs: Wan2.1-14B, threshold {entry['threshold']:g}")
        assert [float(text) for text, _ in row[1:]] == pytest.approx(
            [entry["density_percent"] / 100, entry["psnr"], entry["ssim"], entry["lpips"], entry["speedup"]]
        )
    assert "another model" in page.text
    assert "Compare orders, not numbers" in page.text


def test_every_video_is_in_the_page_and_nothing_else_is_asked_for(run):
    path = write_report(ReportSettings(run), progress=False)
    page, text = read(path), path.read_text(encoding="utf-8")
    labels = ("dense", "dense-alt", SPARSE_LABEL, SECOND)
    assert set(page.videos) == {f"{label}/{name}-s0" for label in labels for name in ("0001", "0002")}
    for name, url in page.videos.items():
        head, _, data = url.partition(",")
        assert head == "data:video/mp4;base64"
        assert base64.b64decode(data, validate=True) == (run / f"{name}.mp4").read_bytes()
    assert {case["id"] for case in page.cases} == set(page.videos) - {"dense/0001-s0", "dense/0002-s0"}
    assert all((case["frames"], case["fps"]) == (17, 8) for case in page.cases)
    for _, attributes in page.tags:
        for name in ("src", "href", "poster", "action", "data"):
            assert re.match(r"#|data:,$", attributes.get(name) or "#"), attributes
    assert not re.search(r"url\(|@import|https?://", text)
    assert "default-src 'none'" in text


def test_a_prompt_is_text_and_never_markup(run):
    path = write_report(ReportSettings(run), progress=False)
    page, text = read(path), path.read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "<img" not in text
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in page.tags)
    assert str(escape(HOSTILE)) in text
    assert {case["prompt"] for case in page.cases} == {"a red circle", HOSTILE}
    # Read again as HTML, it is the prompt that was asked for.
    assert HOSTILE in page.text


def test_settings_reasons_steps_and_layers_are_the_manifests(run):
    page = read(write_report(ReportSettings(run), progress=False))
    records = read_manifest(run / SPARSE_LABEL)
    record = records["0001", 0]
    for expected in ("64 x 64, 17 frames at 8 a second", record["device_name"], f"torch {record['versions']['torch']}"):
        assert expected in page.text
    assert record["commit"] is None or record["commit"] in page.text
    reasons = [row for row in page.rows if row and row[0][0] == SPARSE_LABEL and len(row) == 2]
    # One warm-up step, two layers, guidance, two videos.
    assert reasons == [[(SPARSE_LABEL, ""), ("8", "8")]]
    steps, layers = (
        [row for row in page.rows if row and row[0][0] == SPARSE_LABEL and len(row) == 1 + length] for length in (3, 2)
    )
    by_step = report_data.mean_density_by_step(records)
    assert by_step[0] == 1
    assert any([float(title) for _, title in row[1:]] == pytest.approx(by_step, abs=1e-4) for row in steps)
    by_layer = list(record["density_by_layer"].values())
    assert len(by_layer) == 2
    assert sum(by_layer) / 2 == pytest.approx(record["mean_density"], abs=1e-4)
    expected = list(report_data.mean_density_by_layer(records).values())
    assert any([float(title or "nan") for _, title in row[1:]] == pytest.approx(expected, abs=1e-4) for row in layers)


def test_each_configuration_has_a_map_of_layers_and_steps(run):
    text = write_report(ReportSettings(run), progress=False).read_text(encoding="utf-8")
    for label in (SPARSE_LABEL, SECOND):
        records = read_manifest(run / label)
        figure = next(part for part in text.split('<figure class="map">') if part.startswith(f"<figcaption>{label}:"))
        shown = dict(re.findall(r"<title>([^<]*, step \d+): ([0-9.]+)</title>", figure.split("</figure>")[0]))
        for layer in ("blocks.0.attn1", "blocks.1.attn1"):
            tables = [record["density_by_layer_and_step"][f"transformer.{layer}"] for record in records.values()]
            for step in range(3):
                mean = sum(table[step] for table in tables) / len(tables)
                assert float(shown.pop(f"transformer.{layer}, step {step + 1}")) == pytest.approx(mean, abs=6e-4)
        assert not shown
        # The first step is dense in every layer; the others tell the layers' own densities.
        table = report_data.mean_density_by_layer_and_step(records)
        assert {steps[0] for steps in table.values()} == {1.0}
        assert len({steps[-1] for steps in table.values()}) == 2


def test_a_layer_without_a_call_in_a_step_is_a_blank_cell():
    both = [{"density_by_layer_and_step": {"a": [1.0, None], "b": [None, 0.2]}}] * 2
    both.append({"density_by_layer_and_step": {"a": [0.4, None], "b": [None, 0.5]}})
    table = report_data.mean_density_by_layer_and_step({(str(i), 0): record for i, record in enumerate(both)})
    assert table == {"a": [pytest.approx(0.8), None], "b": [None, pytest.approx(0.3)]}
    assert heat_picture(list(table.items()), ["1", "2"], caption="map").count("<rect") == 2


def test_peak_memory_is_the_largest_of_the_videos_and_left_out_where_not_known(run):
    # Of dense/, no summary depends on it.
    path = run / "dense" / "manifest.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(record["peak_memory_bytes"] > 2**26 for record in records)
    for record, peak in zip(records, (3 * 2**30, 2**30), strict=True):
        record["peak_memory_bytes"] = peak
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    for label in ("dense-alt", SPARSE_LABEL, SECOND):
        os.utime(run / label / "summary.json")
    assert speed_row(run, "dense")[3] == "3.00"
    del records[0]["peak_memory_bytes"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    for label in ("dense-alt", SPARSE_LABEL, SECOND):
        os.utime(run / label / "summary.json")
    assert speed_row(run, "dense")[3] == "-"


def speed_row(run: Path, label: str) -> list[str]:
    """A row of the table of speed and memory: the one whose last cell names a device."""
    page = read(write_report(ReportSettings(run), progress=False))
    rows = [row for row in page.rows if len(row) == 5 and row[0][0] == label]
    return [text for text, _ in rows[-1]]


def test_a_manifest_without_layers_is_said_to_have_steps_only(run):
    for label in (SPARSE_LABEL, SECOND):
        path, summary = run / label / "manifest.jsonl", run / label / "summary.json"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(record | NO_LAYERS) + "\n" for record in records))
        os.utime(summary)
    page = read(write_report(ReportSettings(run), progress=False))
    assert "Steps only: these manifests do not tell layers apart" in page.text
    assert "by denoising step" in page.text
    assert "Density by layer" not in page.text


def test_the_settings_of_each_configuration_are_said_in_words(run):
    page = read(write_report(ReportSettings(run), progress=False))
    for label, threshold in ((SPARSE_LABEL, "0.9"), (SECOND, "0.3")):
        assert f"{label}threshold {threshold}, stride 8, blocks of 16 tokensdense: the first 1 step" in page.text
    assert "residual" not in page.text
    # A manifest from before these settings, and one from before any was noted.
    path = run / SPARSE_LABEL / "manifest.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record["config"] = {name: record["config"][name] for name in ("stride", "threshold", "warmup_steps")}
        del record["residual_bytes"], record["calls_without_residual"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert (
        "threshold 0.9, stride 8, blocks of 128 tokens"
        in write_report(ReportSettings(run, lpips=False), progress=False).read_text()
    )
    path.write_text("".join(json.dumps(record | {"config": None}) + "\n" for record in records))
    assert (
        "threshold 0.9, stride 8, blocks"
        not in write_report(ReportSettings(run, lpips=False), progress=False).read_text()
    )


def test_a_residual_is_told_with_its_memory_and_the_calls_that_had_none(run):
    path = run / SECOND / "manifest.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    config = XAttnConfig.preset("balanced", last_steps=2, warmup=0.25).to_dict()
    for record, size, without in zip(records, (3 * 2**20, 2**19), (0, 7), strict=True):
        record |= {"config": config, "residual_bytes": size, "calls_without_residual": without}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    page = read(write_report(ReportSettings(run, lpips=False), progress=False))
    rows = [row for row in page.rows if row and row[0][0] == SECOND and len(row) == 3 and row[1][0] == "3.0"]
    assert [[text for text, _ in row] for row in rows] == [[SECOND, "3.0", "7"]]
    for line in (
        "dense: the first 4 steps, at most 25 % of all, and the last 2 steps",
        "always kept: 1 neighbour of each block",
        "what the kept blocks miss is remembered (int4) and added back",
        "refreshes: gaps grow to 15 % of all steps, and their change is continued in between",
    ):
        assert line in page.text


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (XAttnConfig(threshold=(0.5, 0.9)), "threshold 0.5 to 0.9, one per head, stride 8, blocks of 128 tokens"),
        (XAttnConfig(selection="top_k", top_k=1), "1 key block per query block, stride 8, blocks of 128 tokens"),
        (XAttnConfig(selection="top_ratio", top_ratio=0.25), "25 % of the key blocks, stride 8, blocks of 128 tokens"),
        (XAttnConfig(keep_masks=4), "one choice of blocks for 4 sparse steps"),
        (
            XAttnConfig(per_head=True),
            "the threshold is shared out among the heads of all layers in the last dense step",
        ),
        (XAttnConfig(threshold_ramp=0.3), "the threshold falls by 0.3 over the sparse steps"),
        (XAttnConfig(threshold_ramp=-0.1), "the threshold rises by 0.1 over the sparse steps"),
        (XAttnConfig(residual="fp8"), "refreshes: gaps grow to 20 % of all steps"),
        (XAttnConfig(residual="fp8", refresh_every=3), "refreshes: one layer after another, each every 3 steps"),
        (XAttnConfig(residual="full", refresh=(0, 2)), "refreshes: at the sparse steps 0, 2, counted from 0"),
    ],
)
def test_settings_have_words(config, line):
    assert line in in_words(config.to_dict())


def test_worst_cases_come_first_by_rank_and_the_floor_last(run):
    loaded = report_data.load_run(ReportSettings(run))
    cases = report_data.worst_first(loaded)
    assert [case.label == "dense-alt" for case in cases] == [False] * 4 + [True] * 2
    first, second = cases[:2], cases[2:4]
    assert {case.label for case in first} == {case.label for case in second} == {SPARSE_LABEL, SECOND}
    for one in loaded.sparse:
        own = [case.row["psnr"] for case in cases if case.label == one.label]
        assert own == sorted(own)
    assert first[0].row["psnr"] <= first[1].row["psnr"]


def test_the_size_limit_keeps_the_worst_and_names_the_rest(run):
    worst = report_data.worst_first(report_data.load_run(ReportSettings(run)))
    files = [run / f"{name}.mp4" for name in (f"dense/{worst[0].key[0]}-s0", worst[0].id)]
    limit = sum((file.stat().st_size + 2) // 3 * 4 for file in files) / 1e6
    page = read(write_report(ReportSettings(run, max_megabytes=limit), progress=False))
    assert [case["id"] for case in page.cases] == [worst[0].id]
    assert len(page.videos) == 2
    count, left_out = page.text.split("comparisons left out")[0].split()[-1], page.text.split("left out to keep")[1]
    left_out = left_out.split("Every video")[0]
    assert int(count) == len(worst) - 1
    assert all(case.id in left_out for case in worst[1:])
    assert worst[0].id not in left_out
    none = read(write_report(ReportSettings(run, max_megabytes=0), progress=False))
    assert (none.videos, none.cases) == ({}, [])
    assert not any(tag == "video" for tag, _ in none.tags)


def test_what_is_not_measured_or_out_of_date_is_measured(run):
    summary = run / SPARSE_LABEL / "summary.json"
    before = summary.read_text()
    summary.unlink()
    # Of other videos, though newer than the manifest.
    other = run / SECOND / "summary.json"
    other.write_text(other.read_text().replace('"dense_seconds": ', '"dense_seconds": 1'))
    # Older than the videos.
    os.utime(run / "dense-alt" / "summary.json", ns=(1, 1))
    write_report(ReportSettings(run, lpips=False), progress=False)
    assert json.loads(summary.read_text())["psnr"] == json.loads(before)["psnr"]
    manifest = read_manifest(run / "dense")
    for row in json.loads(other.read_text())["videos"]:
        assert row["dense_seconds"] == manifest[row["id"], row["seed"]]["seconds"]
    assert os.stat(run / "dense-alt" / "summary.json").st_mtime_ns > 1


def test_an_interrupted_run_is_reported_with_what_it_lacks(run):
    path = run / SPARSE_LABEL / "manifest.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    page = read(write_report(ReportSettings(run, lpips=False), progress=False))
    assert f"{SPARSE_LABEL}: without a partner (dense only): 0002-s0" in page.text
    assert page.row(SPARSE_LABEL)[1][0] == "1"


def without_dense(run: Path) -> None:
    shutil.rmtree(run / "dense")


def only_dense(run: Path) -> None:
    for label in ("dense-alt", SPARSE_LABEL, SECOND):
        shutil.rmtree(run / label)


def nothing(run: Path) -> None:
    only_dense(run)
    without_dense(run)


def truncated(run: Path) -> None:
    path = run / SPARSE_LABEL / "0001-s0.mp4"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def missing(run: Path) -> None:
    (run / "dense" / "0002-s0.mp4").unlink()


def broken_manifest(run: Path) -> None:
    (run / "dense" / "manifest.jsonl").write_text("not json\n")


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (shutil.rmtree, (), "run: no such folder"),
        (nothing, (), "run: no folder with a manifest.jsonl in it; give the --out of `xattn-video generate`"),
        (without_dense, (), "run: no dense/ with a manifest.jsonl in it"),
        (only_dense, (), "run: only dense/ is in it; xattn-video generate --attention all makes the rest"),
        (broken_manifest, (), "dense/manifest.jsonl:1: not a manifest line"),
        (truncated, (), f"{SPARSE_LABEL}/0001-s0.mp4: damaged or not a video"),
        (missing, (), "dense/0002-s0.mp4: listed in the manifest, but missing; run generate again"),
        (None, ("--max-megabytes", "nan"), "--max-megabytes must be a number from 0, got nan"),
        (None, ("--max-megabytes", -1), "--max-megabytes must be a number from 0, got -1"),
        (None, ("--no-lpips", "--lpips-weights", "x"), "--no-lpips and --lpips-weights exclude each other"),
        (None, ("--out", "/no-such-folder/page.html"), "/no-such-folder/page.html: cannot write"),
        (None, ("--out", "."), "--out .: is a folder"),
        (None, ("--out", "run/dense/manifest.jsonl"), "--out must end in .html, got run/dense/manifest.jsonl"),
        (None, ("--side-by-side", "both.avi"), "--side-by-side must end in .mp4, got both.avi"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_page(run, xattn, spoil, options, message):
    if spoil:
        spoil(run)
    done = xattn("report", run, *options, *(() if "--no-lpips" in options else ("--no-lpips",)))
    assert done.code == 2
    assert done.out == ""
    # Progress bars end in a carriage return's line of their own.
    lines = [line for line in done.err.splitlines() if line.startswith("xattn-video: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in done.err
    assert not list(run.parent.rglob("*report.html*"))


def test_an_older_page_survives_a_failure(run):
    page = write_report(ReportSettings(run), progress=False)
    before = page.read_bytes()
    truncated(run)
    with pytest.raises(UserError, match="damaged"):
        write_report(ReportSettings(run), progress=False)
    assert page.read_bytes() == before
    assert sorted(path.name for path in run.iterdir() if path.is_file()) == ["plan.jsonl", "report.html", "run.toml"]


def test_help_ends_with_an_example_and_the_exit_codes(capfd):
    done = run_command(capfd, "report", "--help")
    assert done.code == 0
    options, _, end = done.out.partition("\nexit codes: ")
    assert options.rstrip().endswith("xattn-video report out")
    assert end.startswith("0 ")


@pytest.mark.parametrize("values", [[(0.5, 30.0)], [(0.3, 99.0), (0.3, 99.0)], [(0.1, -2.5), (1.0, 100.0)]])
def test_points_stay_inside_the_picture(values):
    picture = scatter([Point(x, y, 0, "t") for x, y in values], x_label="x", y_label="y", title="t")
    places = [tuple(map(float, found)) for found in re.findall(r'd="M([-\d.]+) ([-\d.]+)a', picture)]
    assert len(places) == len(values)
    for x, y in places:
        assert 40 <= x <= 560
        assert 10 <= y <= 300


def test_labels_are_sorted_by_the_numbers_in_them():
    labels = ["xattn-s16-t0.90-w5", "xattn-s8-t0.90-w5", "dense-alt", "xattn-s4-t0.50-w5", "dense"]
    assert sorted(labels, key=report_data._in_order) == [
        "dense",
        "dense-alt",
        "xattn-s4-t0.50-w5",
        "xattn-s8-t0.90-w5",
        "xattn-s16-t0.90-w5",
    ]


TIMES = "['dense', 'sparse'].map((id) => document.getElementById(id).currentTime)"
DRAWN = "Number(document.getElementById('difference').dataset.frame)"
BRIGHTEST = """(() => {
  const canvas = document.getElementById('difference');
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  return data.reduce((most, value, index) => index % 4 === 3 ? most : Math.max(most, value), 0);
})()"""


def press(id: str) -> str:
    return f"document.getElementById('{id}').click()"


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium on the path")
def test_players_play_seek_and_step_together_in_a_browser(run, tmp_path):
    path = write_report(ReportSettings(run), progress=False)
    with browser_page(find_chromium(), tmp_path / "profile") as page:
        page.open(path)
        page.wait(f"{DRAWN} === 0")
        assert page.evaluate(TIMES) == pytest.approx([0.5 / 8] * 2)
        # The sparse video differs from the dense one, and the difference shows it.
        assert page.evaluate(BRIGHTEST) > 0
        page.evaluate(press("forward"))
        page.wait(f"{DRAWN} === 1")
        assert page.evaluate(TIMES) == pytest.approx([1.5 / 8] * 2)
        seek = "const seek = document.getElementById('seek'); seek.value = 12; seek.dispatchEvent(new Event('input'))"
        page.evaluate(f"{{ {seek} }}")
        page.wait(f"{DRAWN} === 12")
        assert page.evaluate(TIMES) == pytest.approx([12.5 / 8] * 2)
        page.evaluate("document.getElementById('loop').checked = false")
        page.evaluate(press("back"))
        page.wait(f"{DRAWN} === 11")
        page.evaluate(press("play"))
        page.wait("document.getElementById('play').textContent === 'Pause'")
        page.wait("!document.getElementById('dense').paused && !document.getElementById('sparse').paused")
        page.wait("document.getElementById('dense').currentTime > 12.5 / 8")
        dense, sparse = page.evaluate(TIMES)
        assert abs(dense - sparse) * 8 < 1.5
        # At the end both stop at the last frame.
        page.wait(f"document.getElementById('play').textContent === 'Play' && {DRAWN} === 16")
        assert page.evaluate(TIMES) == pytest.approx([16.5 / 8] * 2)
        # From the start again, four times as slowly, and stopped by hand: in the page, with seconds to do it in.
        page.evaluate("document.getElementById('speed').value = '0.25'")
        page.evaluate("document.getElementById('speed').dispatchEvent(new Event('change'))")
        stop = "if (!this.paused && this.currentTime < 1) { this.ontimeupdate = null; " + press("play") + " }"
        page.evaluate(f"document.getElementById('dense').ontimeupdate = function () {{ {stop} }}")
        page.evaluate(press("play"))
        page.wait("document.getElementById('dense').ontimeupdate === null")
        assert page.evaluate("['dense', 'sparse'].every((id) => document.getElementById(id).paused)")
        assert page.evaluate("['dense', 'sparse'].map((id) => document.getElementById(id).playbackRate)") == [0.25] * 2
        assert all(time < 1.9 for time in page.evaluate(TIMES))
        # Another case, by its link in the table of worst cases.
        link = "[...document.querySelectorAll('#worst-cases a[data-case]')].at(-1)"
        page.evaluate(f"{link}.click()")
        page.wait(f"document.getElementById('video').value === {link}.dataset.case")
        page.wait(f"{DRAWN} === Number({link}.dataset.frame)")
        assert page.complaints == []
        assert [url for url in page.requests if not url.startswith(("file:", "blob:", "data:"))] == []


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium on the path")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_no_wider_than_the_window(run, tmp_path, width):
    path = write_report(ReportSettings(run), progress=False)
    with browser_page(find_chromium(), tmp_path / "profile") as page:
        page.open(path, width, 844)
        page.wait(f"{DRAWN} === 0")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # Nor with all that is folded.
        page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.evaluate(press("play"))
        page.wait("document.getElementById('dense').currentTime > 0.2")
        for _ in range(20):
            dense, sparse = page.evaluate(TIMES)
            assert abs(dense - sparse) <= 0.05
        assert page.complaints == []


@pytest.mark.parametrize(("low", "high"), [(0.7692307692307692, 0.7692307692307693), (1e9, 1e9), (0.0, 1e-12), (-3, 4)])
def test_a_scale_holds_its_values_between_different_ticks(low: float, high: float) -> None:
    """Two means may differ by the rounding of a sum alone."""
    first, last, ticks = charts._scale(low, high)
    assert first <= low <= high <= last
    assert len(set(ticks)) == len(ticks) >= 2


def judge(folder: Path, *rows: tuple[str, str, list[str]]) -> None:
    """A judged.json: of each row the id, what was seen, and what of it is wrong."""
    asked = {"colour": "red", "shape": "circle"}
    videos = [{"id": id, "seed": 0, "asked": asked, "saw": saw, "wrong": wrong} for id, saw, wrong in rows]
    (folder / "judged.json").write_text(json.dumps({"videos": videos}))


def columns_of(page: Reader, name: str) -> dict[str, str]:
    """The cells of a configuration by the heads of the table's columns."""
    heads = next(row for row in page.rows if [text for text, _ in row[:2]] == ["configuration", "videos"])
    return {head: text for (head, _), (text, _) in zip(heads, page.row(name), strict=True)}


def test_the_verdict_and_the_scores_of_the_judge_and_the_user_are_told(run, tmp_path):
    judge(run / "dense", ("0001", "red circle", []), ("0002", "red circle", []))
    judge(run / SECOND, ("0001", "red circle", ["size"]), ("0002", "blue circle", ["colour"]))
    scores = tmp_path / "scores.jsonl"
    rows = [{"id": "0001", "folder": SECOND, "mine": 4}, {"id": "0002", "folder": SECOND, "seed": 0, "mine": 1}]
    # As an editor may leave it: with a mark at its head and no line end behind its last line; and by another name.
    text = "\n".join(json.dumps(row) for row in [*rows, {"id": "0001", "folder": "dense", "mine": 5}])
    (tmp_path / "mine.jsonl").write_text(text, encoding="utf-8-sig")
    scores.symlink_to("mine.jsonl")
    page = read(write_report(ReportSettings(run, scores=scores), progress=False))
    density = json.loads((run / SECOND / "summary.json").read_text())["density"]
    assert f"{SECOND} 1 of 2 as asked (dense: 2 of 2); {100 * (1 - density):.0f} % of blocks skipped" in page.text
    # Nobody judged these.
    psnr = json.loads((run / SPARSE_LABEL / "summary.json").read_text())["psnr"]
    assert f"{SPARSE_LABEL} PSNR {psnr:.1f} dB against dense" in page.text
    said = {case["id"]: (case["dense_said"], case["sparse_said"]) for case in page.cases}
    assert said[f"{SECOND}/0002-s0"] == (
        ["the judge saw red circle"],
        ["the judge saw blue circle (wrong: colour)", "mine 1"],
    )
    assert said[f"{SPARSE_LABEL}/0001-s0"] == (["the judge saw red circle", "mine 5"], [])
    assert [columns_of(page, SECOND)[head] for head in ("as asked", "mine")] == ["1 of 2", "2.5"]
    assert [columns_of(page, "dense (reference)")[head] for head in ("as asked", "mine")] == ["2 of 2", "5"]
    # Verdicts older than the videos are of other ones; without any, there is no column.
    for folder in ("dense", SECOND):
        os.utime(run / folder / "judged.json", ns=(1, 1))
    page = read(write_report(ReportSettings(run), progress=False))
    assert not {"as asked", "mine"} & columns_of(page, SECOND).keys()
    assert "the judge saw" not in page.text


def test_the_demo_noted_how_busy_its_machine_was(run):
    names = [f"{label}/{name}-s0" for label in ("dense", SECOND) for name in ("0001", "0002")]
    seconds = dict(zip(names, (3.0, 3.0, 1.0, 1.0), strict=True))
    load = {"load": 9.0, "cores": 2}
    document = {"runs": [load | {"load": 0.1}], "attention_seconds": seconds}
    (run / "demo.json").write_text(json.dumps(document))
    assert f"{SECOND} PSNR" in (text := read(write_report(ReportSettings(run), progress=False)).text)
    assert "attention 3.0x faster" in text
    (run / "demo.json").write_text(json.dumps(document | {"runs": [load]}))
    text = read(write_report(ReportSettings(run), progress=False)).text
    assert text.count("this machine was busy (load 9.0 on 2 cores before the start): timings are not reliable") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "0001", "folder": "none", "mine": 1}, "scores.jsonl:1: folder must be one of dense, dense-alt"),
        ({"id": "0009", "folder": "dense", "mine": 1}, "scores.jsonl:1: dense has no video '0009'"),
        ({"id": "0001", "seed": 7, "folder": "dense"}, "scores.jsonl:1: dense has no video '0001' with seed 7"),
        ({"id": "0001", "folder": "dense", "mine": "good"}, "scores.jsonl:1: mine must be a number from"),
        ({"id": "0001", "folder": "dense", "mine": math.nan}, "scores.jsonl:1: not a line such as"),
        ({"id": "0001", "folder": "dense", "mine": 1e308}, "scores.jsonl:1: mine must be a number from"),
        ({"id": "0001", "folder": "dense", "mine": 10**400}, "scores.jsonl:1: mine must be a number from"),
        ({"id": "0001"}, "scores.jsonl:1: not a line such as"),
        (None, "scores.jsonl: no such file"),
    ],
)
def test_scores_that_are_of_no_video_are_refused(run, tmp_path, line, message):
    scores = tmp_path / "scores.jsonl"
    if line is not None:
        scores.write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=re.escape(message)):
        write_report(ReportSettings(run, scores=scores), progress=False)


def test_a_video_of_the_run_is_not_written_over(run):
    video = run / "dense" / "0001-s0.mp4"
    before = video.read_bytes()
    with pytest.raises(UserError, match="that folder has the run's own videos"):
        write_report(ReportSettings(run, side_by_side=video), progress=False)
    assert video.read_bytes() == before


def test_the_pages_comparisons_become_one_video(run, xattn):
    done = xattn("report", run, "--no-lpips", "--side-by-side", run / "both.mp4", "--json", "--quiet")
    assert (done.code, "videos: " in done.err) == (0, False), done.err
    page, both = run / "report.html", run / "both.mp4"
    assert json.loads(done.out) == {"page": str(page), "bytes": page.stat().st_size, "side_by_side": str(both)}
    cases = read(run / "report.html").cases
    sparse = [case["id"] for case in cases if case["folder"] != "dense-alt"]
    both = read_video(run / "both.mp4")
    # Four comparisons of 17 frames; 64 pixels become 256, with a gap between the two and texts above and below.
    assert both.shape == (4 * 17, 256 + 76, 2 * 256 + 8, 3)
    for place, id in enumerate(sparse):
        for left, name in ((0, f"dense/{id.split('/')[1]}"), (264, id)):
            small = read_video(run / f"{name}.mp4")[5].astype(float)
            drawn = both[place * 17 + 5, 28:284, left : left + 256].reshape(64, 4, 64, 4, 3).mean((1, 3))
            assert abs(drawn - small).mean() < 4, name
    # Above and below stand texts, which are lighter than the paper.
    for text in (both[0, :28, :256], both[0, :28, 264:], both[0, 284:310], both[0, 310:]):
        assert text.max() > 120 > 60 > text.min()


def test_the_page_is_shown_where_a_browser_is_found(run, xattn):
    opened: list[str] = []

    class Browser(webbrowser.BaseBrowser):
        def open(self, url: str, new: int = 0, autoraise: bool = True) -> bool:
            opened.append(url)
            return True

    webbrowser.register("of-the-tests", None, Browser(), preferred=True)
    try:
        assert "no browser" not in xattn("report", run, "--no-lpips", "--max-megabytes", 0, "--open").out
        assert opened == [(run / "report.html").resolve().as_uri()]
    finally:
        webbrowser._tryorder.remove("of-the-tests")
        del webbrowser._browsers["of-the-tests"]
