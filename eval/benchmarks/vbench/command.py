"""VBench over videos of this project: its prompt list in, its own package's scores out, folder beside folder.

    prompts   VBench_full_info.json -> a prompt file for `xattn-video generate`
    score     videos of those prompts -> VBench's scores, a column a folder

VBench needs an environment of its own (it pins transformers 4.33 and numpy 1), whose Python `score` is told. What it
computes, and what it downloads for that, is its own; the videos keep the names that `generate` gave them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import make_writable, write_texts
from xattn_video_pipelines.common.program import Parser, run_program
from xattn_video_pipelines.video import finished_videos

EXAMPLE = """\
example:
  python -m venv vbench-env && vbench-env/bin/pip install vbench
  python -m xattn_video_eval.benchmarks.vbench prompts --info VBench_full_info.json \\
      --dimensions subject_consistency --out vbench.jsonl
  xattn-video generate --model wan2.1-1.3b --prompts vbench.jsonl --seeds 0 1 2 3 4 --attention both --out out
  python -m xattn_video_eval.benchmarks.vbench score out/dense out/xattn-s8-t0.90-w5 --info VBench_full_info.json \\
      --dimensions subject_consistency --python vbench-env/bin/python --out scores
"""

_CHILD = Path(__file__).resolve().parent / "child.py"


def main(arguments: list[str] | None = None) -> int:
    """Run as a program: 0, or 2 with one line for bad input."""
    parser = Parser(prog="python -m xattn_video_eval.benchmarks.vbench", description=__doc__, epilog=EXAMPLE)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    prompts = commands.add_parser("prompts", help="write a prompt file", epilog=EXAMPLE)
    prompts.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    prompts.set_defaults(run=write_prompts)
    score = commands.add_parser("score", help="score folders of videos", epilog=EXAMPLE)
    score.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folders that generate wrote")
    score.add_argument("--python", type=Path, required=True, metavar="FILE", help="the Python of VBench's environment")
    score.add_argument("--out", type=Path, required=True, metavar="DIR", help="VBench's results, and scores.json")
    score.add_argument("--device", default="cuda", help="of VBench's models (cuda)")
    score.set_defaults(run=score_folders)
    for command in (prompts, score):
        command.add_argument("--info", type=Path, required=True, metavar="FILE", help="VBench_full_info.json")
        command.add_argument("--dimensions", nargs="+", metavar="NAME", help="default: all that FILE names")
    return run_program(parser, lambda args: args.run(args), arguments)


def write_prompts(args: argparse.Namespace) -> int:
    """`prompts`: one line for each prompt of the dimensions, its id its place in VBench's list."""
    if args.out.suffix != ".jsonl":
        raise UserError(f"--out {args.out}: a prompt file with ids ends in .jsonl")
    lines: dict[str, dict[str, str]] = {}
    for number, entry in _entries(args.info, args.dimensions):
        # A prompt may be listed again for another dimension.
        lines.setdefault(entry["prompt_en"], {"id": f"vbench-{number:04d}", "prompt": entry["prompt_en"]})
    write_texts({args.out: jsonl.text(lines.values())})
    print(f"{len(lines)} prompts in {args.out}; VBench asks for five videos of each: --seeds 0 1 2 3 4")
    return 0


def score_folders(args: argparse.Namespace) -> int:
    """`score`: run VBench on each folder, and print and write its scores."""
    entries = _entries(args.info, args.dimensions)
    dimensions = args.dimensions or sorted({name for _, entry in entries for name in entry["dimension"]})
    if not args.python.is_file():
        raise UserError(f"--python {args.python}: no such file; it is the Python of an environment with vbench")
    names = [folder.resolve().name for folder in args.folders]
    if len(set(names)) != len(names):
        raise UserError(f"the folders must differ in name, got {' '.join(names)}")
    found = [full_info(folder, [entry for _, entry in entries]) for folder in args.folders]
    scores = {}
    for name, listed in zip(names, found, strict=True):
        out = args.out / name
        make_writable(out)
        path = out / "full_info.json"
        write_texts({path: json.dumps(listed, indent=2, ensure_ascii=False) + "\n"})
        scores[name] = _run(args.python, path, out, args.device, dimensions)
    write_texts({args.out / "scores.json": json.dumps(scores, indent=2) + "\n"})
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
        videos.setdefault(record["prompt"], []).append(str((folder / record["file"]).resolve()))
    missing = [entry["prompt_en"] for entry in entries if entry["prompt_en"] not in videos]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {len(entries)} prompts have no video here, the first is {missing[0]!r}; "
            "scores of some prompts are not VBench's (--dimensions takes fewer)"
        )
    return [{**entry, "video_list": videos[entry["prompt_en"]]} for entry in entries]


def _entries(info: Path, dimensions: Sequence[str] | None) -> list[tuple[int, dict[str, Any]]]:
    """VBench's entries that name one of the dimensions, each with its place in the file."""
    try:
        entries = json.loads(info.read_text(encoding="utf-8"))
        known = {name for entry in entries for name in entry["dimension"] if isinstance(entry["prompt_en"], str)}
    except OSError as error:
        raise UserError(f"--info {info}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"--info {info}: not VBench's list, objects with prompt_en and dimension") from None
    unknown = sorted(set(dimensions or ()) - known)
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


if __name__ == "__main__":
    raise SystemExit(main())
