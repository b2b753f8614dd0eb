"""VBench over videos of this project: its prompt list in, its own package's scores out, folder beside folder.

    prompts   VBench_full_info.json -> a prompt file for `xattn-video generate`
    score     videos of those prompts -> VBench's scores, a column a folder

VBench needs an environment of its own (it pins transformers 4.33 and numpy 1), whose Python `score` is told. What it
computes, and what it downloads for that, is its own; the videos keep the names that `generate` gave them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import make_writable, read_input, write_texts
from xattn_video_pipelines.common.program import add_command, guarded, program, run_app
from xattn_video_pipelines.common.schema import parse_json
from xattn_video_pipelines.common.settings import Option, Settings
from xattn_video_pipelines.video import finished_videos, video_file

EXAMPLE = """\
example:
  python -m venv vbench-env && vbench-env/bin/pip install vbench
  python -m xattn_video_eval.benchmarks.vbench prompts --info VBench_full_info.json \\
      --dimensions subject_consistency --out vbench.jsonl
  xattn-video generate --model wan2.1-1.3b --prompts vbench.jsonl --seeds 0 1 2 3 4 --attention both --out out
  python -m xattn_video_eval.benchmarks.vbench score out/dense out/xattn-s8-t0.90-w5 --info VBench_full_info.json \\
      --dimensions subject_consistency --python vbench-env/bin/python --out scores
"""

_MODULE = "xattn_video_eval.benchmarks.vbench"
_CHILD = Path(__file__).resolve().parent / "child.py"


@dataclass(frozen=True, kw_only=True)
class PromptsSettings(Settings):
    """Which of VBench's prompts are written, and where."""

    info: Annotated[Path, Option("VBench_full_info.json", metavar="FILE")]
    dimensions: Annotated[tuple[str, ...], Option("default: all that FILE names", metavar="NAME")] = ()
    out: Annotated[Path, Option("the prompt file", metavar="FILE.jsonl")]

    def check(self) -> None:
        if self.out.suffix != ".jsonl":
            raise UserError(f"--out {self.out}: a prompt file with ids ends in .jsonl")


@dataclass(frozen=True)
class ScoreSettings(Settings):
    """Which folders VBench scores, in which dimensions, and with which Python."""

    folders: Annotated[tuple[Path, ...], Option("folders that generate wrote", metavar="FOLDER")]
    _: KW_ONLY
    info: Annotated[Path, Option("VBench_full_info.json", metavar="FILE")]
    dimensions: Annotated[tuple[str, ...], Option("default: all that FILE names", metavar="NAME")] = ()
    python: Annotated[Path, Option("the Python of VBench's environment", metavar="FILE")]
    out: Annotated[Path, Option("VBench's results, and scores.json", metavar="DIR")]
    device: Annotated[str, Option("of VBench's models")] = "cuda"

    @property
    def names(self) -> list[str]:
        """What the scores of each folder are called."""
        return [folder.resolve().name for folder in self.folders]

    def check(self) -> None:
        if not self.python.is_file():
            raise UserError(f"--python {self.python}: no such file; it is the Python of an environment with vbench")
        if len(set(self.names)) != len(self.names):
            raise UserError(f"the folders must differ in name, got {' '.join(self.names)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program: 0, or 2 with one line for bad input."""

    def call() -> int:
        app = program(f"python -m {_MODULE}", (__doc__ or "").partition("\n")[0], EXAMPLE)
        add_command(app, write_prompts, "prompts", "write a prompt file", EXAMPLE)
        add_command(app, score_folders, "score", "score folders of videos", EXAMPLE, 1)
        return run_app(app, sys.argv[1:] if arguments is None else arguments, ("prompts", "score"))

    return guarded("vbench", call)


def write_prompts(settings: PromptsSettings) -> int:
    """`prompts`: one line for each prompt of the dimensions, its id its place in VBench's list."""
    lines: dict[str, dict[str, str]] = {}
    for number, entry in _entries(settings.info, settings.dimensions):
        # A prompt may be listed again for another dimension.
        lines.setdefault(entry["prompt_en"], {"id": f"vbench-{number:04d}", "prompt": entry["prompt_en"]})
    write_texts({settings.out: jsonl.text(lines.values())})
    print(f"{len(lines)} prompts in {settings.out}; VBench asks for five videos of each: --seeds 0 1 2 3 4")
    return 0


def score_folders(settings: ScoreSettings) -> int:
    """`score`: run VBench on each folder, and print and write its scores."""
    entries = _entries(settings.info, settings.dimensions)
    dimensions = settings.dimensions or sorted({name for _, entry in entries for name in entry["dimension"]})
    names = settings.names
    found = [full_info(folder, [entry for _, entry in entries]) for folder in settings.folders]
    scores = {}
    for name, listed in zip(names, found, strict=True):
        out = settings.out / name
        make_writable(out)
        path = out / "full_info.json"
        write_texts({path: json.dumps(listed, indent=2, ensure_ascii=False) + "\n"})
        scores[name] = _run(settings.python, path, out, settings.device, dimensions)
    write_texts({settings.out / "scores.json": json.dumps(scores, indent=2) + "\n"})
    width = max(len(name) for name in (*dimensions, "dimension"))
    print("  ".join([f"{'dimension':{width}}", *names]))
    for dimension in dimensions:
        cells = [f"{scores[name][dimension]:{len(name)}.4f}" for name in names]
        print("  ".join([f"{dimension:{width}}", *cells]))
    print(json.dumps({"scores": scores}))
    return 0


def full_info(folder: Path, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """VBench's entries with the absolute paths of the folder's videos of each prompt, by seed.

    Raises:
        UserError: the folder holds no videos, or none of a prompt that is asked for.
    """
    videos: dict[str, list[str]] = {}
    for (_, _), record in sorted(finished_videos(folder).items(), key=lambda item: item[0][1]):
        videos.setdefault(record.get("prompt") or "", []).append(str(video_file(folder, record).resolve()))
    missing = [entry["prompt_en"] for entry in entries if entry["prompt_en"] not in videos]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {len(entries)} prompts have no video here, the first is {missing[0]!r}; "
            "scores of some prompts are not VBench's (--dimensions takes fewer)"
        )
    return [{**entry, "video_list": videos[entry["prompt_en"]]} for entry in entries]


def _entries(info: Path, dimensions: Sequence[str]) -> list[tuple[int, dict[str, Any]]]:
    """VBench's entries that name one of the dimensions, each with its place in the file."""
    try:
        entries = parse_json(read_input(info))
        known = {name for entry in entries for name in entry["dimension"] if isinstance(entry["prompt_en"], str)}
    except OSError as error:
        raise UserError(f"--info {info}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"--info {error}") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"--info {info}: not VBench's list, objects with prompt_en and dimension") from None
    unknown = sorted(set(dimensions) - known)
    if unknown:
        raise UserError(f"--dimensions: {info} does not have {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    wanted = set(dimensions or known)
    return [(number, entry) for number, entry in enumerate(entries) if wanted & set(entry["dimension"])]


def _run(python: Path, info: Path, out: Path, device: str, dimensions: Sequence[str]) -> dict[str, float]:
    command = [str(python.absolute()), str(_CHILD), str(info.resolve()), str(out.resolve()), device, *dimensions]
    scores = out / "scores.json"
    # those of an earlier run are not this one's
    scores.unlink(missing_ok=True)
    try:
        # What it has to say, its progress too, goes to stderr.
        result = subprocess.run(command, stdout=sys.stderr, check=False)
    except OSError as error:
        raise UserError(f"--python {python}: cannot be run: {error.strerror}") from None
    if result.returncode != 0:
        raise UserError(f"VBench failed on {out.name} with exit code {result.returncode}; its own message is above")
    try:
        found = json.loads(scores.read_text(encoding="utf-8"))
        return {name: float(found[name]) for name in dimensions}
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"VBench ended without all scores of {out.name} ({type(error).__name__}: {error})") from None
