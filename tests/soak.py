"""Kill programs at random moments, again and again, and look at what is left: `make soak`.

    a program and its folder -> started, killed, started again ... until it ends -> figures: all but the first two are 0

Also 2,000 tiny videos in one process, whose memory and time a video must stay flat.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.cli_tools import SIZE, SPARSE, save_tiny_wan
from tests.language_families import save_video_model
from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.video import GenerateSettings, make_plan, produce, read_manifest, read_video

PROGRAMS = ("generate", "qa", "compare", "report", "sweep")
# What was finished after a kill, by name, and what tells it from another one of that name.
Finished = dict[str, Any]


@dataclass
class Figures:
    """What the kills did. The last four must be 0.

    Attributes:
        kills: how many.
        items: finished videos, answers and pages, of all runs.
        lost: items that were finished and are not any more, or that no run made.
        doubled: finished items that were made again.
        undecodable: finished items that cannot be read.
        left: files in the folder that the program does not say it writes.
    """

    kills: int = 0
    items: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    undecodable: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.undecodable or self.left)

    def line(self, program: str) -> str:
        """The figures in a row, and the names behind those that are not 0."""
        names = ("lost", "doubled", "undecodable", "left")
        counts = ", ".join(f"{len(getattr(self, name))} {name}" for name in names)
        wrong = "".join(f"\n  {name}: {', '.join(getattr(self, name))}" for name in names if getattr(self, name))
        return f"{program}: {self.kills} kills, {self.items} items: {counts}{wrong}"


@dataclass(frozen=True)
class Subject:
    """A program that is killed.

    Attributes:
        arguments: of `xattn-video`, where `{out}` is its folder.
        finished: what is finished in the folder. It raises `UserError` where something finished cannot be read.
        files: suffixes of the files that may be in the folder at the end.
    """

    arguments: Sequence[str]
    finished: Callable[[Path], Finished]
    files: tuple[str, ...]


def subjects(folder: Path) -> dict[str, Subject]:
    """The five programs on tiny models, which are saved in `folder`, with what they need."""
    model, watcher = save_tiny_wan(folder / "wan"), save_video_model(folder / "watcher")
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"prompt {number}\n" for number in range(4)))
    made = folder / "made"
    generate = ["generate", "--model", str(model), "--prompts", str(prompts), "--attention", "both", "--lossless"]
    generate += [*SIZE, *SPARSE, "--out"]
    _run([*generate, str(made)])
    (label,) = (path.name for path in made.iterdir() if path.name.startswith("xattn"))
    _run(["compare", str(made / "dense"), str(made / label), "--no-lpips"])
    questions = folder / "questions.jsonl"
    video = made / "dense" / next(iter(read_manifest(made / "dense").values()))["file"]
    rows = [{"id": str(number), "video": str(video), "question": f"w{5 + number}"} for number in range(4)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    qa = [
        "qa",
        "--model",
        str(watcher),
        "--attention",
        "both",
        "--items",
        str(questions),
        "--device",
        "cpu",
        "--max-new-tokens",
        "2",
    ]
    qa += ["--stride", "8", "--block-size", "16", "--min-tokens", "0", "--out", "{out}"]
    sweep = ["sweep", "--model", str(model), "--prompts", str(prompts), "--sample", "2", "--thresholds", "0.5", "0.9"]
    sweep += [*SIZE, "--min-tokens", "0", "--block-size", "16", "--no-lpips", "--no-floor", "--no-plot"]
    compare = ["compare", str(made / "dense"), str(made / label), "--no-lpips", "--out", "{out}"]
    report = ["report", str(made), "--out", "{out}/report.html"]
    media = (".jsonl", ".mp4", ".mkv")
    return {
        "generate": Subject([*generate, "{out}"], _videos, (*media, ".json", ".toml")),
        "qa": Subject(qa, _answers, (".jsonl", ".json", ".toml")),
        "compare": Subject(compare, _pages, (".json", ".csv", ".png", ".jsonl", ".toml")),
        "report": Subject(report, _pages, (".html",)),
        "sweep": Subject([*sweep, "--out", "{out}"], _videos, (*media, ".json", ".csv", ".txt", ".png", ".toml")),
    }


def kill_often(subject: Subject, folder: Path, kills: int, chance: random.Random) -> Figures:
    """Kill a program `kills` times at random moments of its run, each time in the folder that the last one left.

    A run that ends before it is killed is looked at, and the next one begins in a folder of its own. The first one is
    not killed: it tells how long a run takes, and what there is to make.
    """
    figures = Figures()
    usual, number = 0.0, 0
    out = folder / "0"
    known: Finished = {}
    whole: set[str] = set()
    begun = False
    while figures.kills < kills or begun:
        out.mkdir(parents=True, exist_ok=True)
        arguments = [part.format(out=out) for part in subject.arguments]
        # With all kills done the last run goes to its end.
        limit = chance.uniform(0.0, 1.1) * usual if usual and figures.kills < kills else None
        started = time.monotonic()
        killed = _run(arguments, limit)
        usual = usual or time.monotonic() - started
        figures.kills += killed
        begun = killed
        known = look(subject, out, known, figures)
        if not killed:
            whole = whole or set(known)
            figures.lost += [f"{out.name}/{name}" for name in sorted(whole - known.keys())]
            figures.items += len(known)
            figures.left += [str(path.relative_to(folder)) for path in strangers(out, subject.files)]
            number += 1
            out, known = folder / str(number), {}
    return figures


def look(subject: Subject, out: Path, known: Finished, figures: Figures) -> Finished:
    """What is finished now, held against what was finished before."""
    try:
        now = subject.finished(out)
    except UserError as error:
        figures.undecodable.append(str(error))
        return known
    figures.lost += [f"{out.name}/{name}" for name in known.keys() - now.keys()]
    figures.doubled += [f"{out.name}/{name}" for name in known.keys() & now.keys() if known[name] != now[name]]
    return now


def _run(arguments: Sequence[str], limit: float | None = None) -> bool:
    """Run `xattn-video`, and kill it after `limit` seconds; whether it was killed.

    Raises:
        RuntimeError: it failed by itself.
    """
    command = [sys.executable, "-m", "xattn_video_pipelines.cli", *arguments]
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=told, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        told.seek(0)
        if code:
            raise RuntimeError(f"{' '.join(arguments)} ended with {code}: {told.read().decode(errors='replace')}")
    return False


def _videos(out: Path) -> Finished:
    """The finished videos of every folder below, each read to its end."""
    found: Finished = {}
    for manifest in sorted(out.glob("*/manifest.jsonl")):
        folder = manifest.parent
        lines = [(row["id"], row["seed"]) for _, row in jsonl.read(manifest)]
        for key, record in read_manifest(folder).items():
            file = folder / record["file"]
            if read_video(file).shape[0] != record["num_frames"]:
                raise UserError(f"{file}: not all frames")
            if record["lossless_file"]:
                read_video(folder / record["lossless_file"])
            found[f"{folder.name}/{key[0]}-s{key[1]}"] = file.stat().st_mtime_ns, lines.count(key)
    return found


def _answers(out: Path) -> Finished:
    """The finished answers: configuration and question, with how often each is there."""
    path = next(iter(out.glob("answers.jsonl")), None)
    if path is None:
        return {}
    # A last line that a kill cut short is no answer.
    rows = [row for _, row in jsonl.read(path)]
    kinds = {row["attention"] for row in rows if row["attention"] != "dense"}
    names = [f"{'sparse' if row['attention'] in kinds else 'dense'}/{row['id']}" for row in rows]
    return {name: (row["reply"], names.count(name)) for name, row in zip(names, rows, strict=True)}


def _pages(out: Path) -> Finished:
    """Pages and tables, which are there whole or not at all; one that is made again is no other one."""
    found: Finished = {}
    # A name with a dot is not finished. Until the next run a kill may leave one; at the end it would be a stranger.
    for path in out.glob("[!.]*"):
        if path.suffix == ".json":
            try:
                json.loads(path.read_text())
            except ValueError as error:
                raise UserError(f"{path}: {error}") from None
            found[path.name] = ""
        if path.suffix == ".html":
            if not path.read_text().rstrip().endswith("</html>"):
                raise UserError(f"{path}: cut short")
            found[path.name] = ""
    return found


def strangers(out: Path, suffixes: Sequence[str]) -> list[Path]:
    files = [path for path in out.rglob("*") if not path.is_dir()]
    return sorted(path for path in files if path.name.startswith(".") or path.suffix not in suffixes)


def many_videos(folder: Path, count: int) -> list[dict[str, float]]:
    """Make `count` tiny videos in this process: for each its seconds and the memory that the process has, MiB."""
    model, prompts = save_tiny_wan(folder / "wan"), folder / "many.txt"
    prompts.write_text("".join(f"prompt {number}\n" for number in range(count)))
    settings = GenerateSettings(
        model=str(model), prompts=prompts, attention="xattn", height=64, width=64, num_frames=9, steps=2,
        min_tokens=0, block_size=16, warmup_steps=1, device="cpu", out=folder / "many",
    )  # fmt: skip
    rows: list[dict[str, float]] = []
    last = time.monotonic()

    def note(*_: Any) -> None:
        nonlocal last
        now = time.monotonic()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        rows.append({"seconds": now - last, "mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20})
        last = now

    produce(make_plan(settings), note)
    return rows


def growth(values: Sequence[float]) -> float:
    """The median of the last quarter over that of the second one: the first one still fills caches."""
    quarter = len(values) // 4
    return float(np.median(values[-quarter:]) / np.median(values[quarter : 2 * quarter]))


def draw(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Memory and time over the videos of one process."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    memory, seconds = figure.subplots(2, 1, sharex=True)
    memory.plot([row["mib"] for row in rows])
    memory.set(ylabel="memory, MiB", ylim=(0, None), title=f"{len(rows):,} tiny videos in one process, on a CPU")
    seconds.plot([row["seconds"] for row in rows], linewidth=0.5)
    seconds.set(ylabel="seconds a video", xlabel="video", ylim=(0, None))
    for axes in (memory, seconds):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where nothing was lost, doubled, undecodable or left, and memory and time stayed flat; else 1."""
    parser = argparse.ArgumentParser("python -m tests.soak", description=__doc__, allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="of all programs together")
    parser.add_argument("--videos", type=int, default=2000, metavar="N", help="in one process; 0 makes none")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31), help="of the moments of the kills")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="of memory and time; needs matplotlib")
    given = parser.parse_args(arguments)
    print(f"seed {given.seed}", flush=True)
    chance, clean = random.Random(given.seed), True
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, subject in subjects(folder).items() if given.kills else ():
            figures = kill_often(subject, folder / "runs" / name, given.kills // len(PROGRAMS), chance)
            print(figures.line(name), flush=True)
            clean = clean and figures.clean
        if given.videos:
            rows = many_videos(folder, given.videos)
            memory, seconds = (growth([row[name] for row in rows]) for name in ("mib", "seconds"))
            print(f"{len(rows)} videos in one process: memory x{memory:.3f}, time a video x{seconds:.3f}")
            clean = clean and memory < 1.1 and seconds < 1.25
            if given.plot is not None:
                draw(rows, given.plot)
    return 0 if clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
