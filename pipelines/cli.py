"""The `xattn-video` command: one subcommand a program.

Only the program that is asked for is imported, so that `--help` stays fast: nothing here imports torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xattn_video_pipelines.common.environment import own_version
from xattn_video_pipelines.common.program import (
    Parser,
    UsageError,
    add_command,
    guarded,
    program,
    run_app,
    run_program,
)

if TYPE_CHECKING:
    from cyclopts import App


@dataclass(frozen=True)
class Command:
    """A subcommand: its module offers `command(settings, ...) -> int` and an `EXAMPLE`."""

    module: str
    help: str


# eval is loaded from here and only here: pipelines otherwise knows nothing of it.
COMMANDS = {
    "generate": Command("xattn_video_pipelines.video.command", "make videos from a prompt file, dense, sparse or both"),
    "compare": Command(
        "xattn_video_eval.compare.command",
        "compare sparse videos with dense ones: PSNR, SSIM, LPIPS, flicker, worst regions",
    ),
    "report": Command(
        "xattn_video_eval.report.command", "one page about a run: tables, noise floor, players side by side, density"
    ),
    "sweep": Command("xattn_video_eval.sweep.command", "quality and speed over thresholds, strides and warm-up steps"),
    "qa": Command(
        "xattn_video_pipelines.qa.command", "ask a video-understanding model about videos, with sparse prefill"
    ),
    "demo": Command("xattn_video_pipelines.demo.command", "the whole path on a small model, in minutes on a CPU"),
    "judge": Command(
        "xattn_video_pipelines.demo.judging",
        "read colour, shape, motion and background back from videos of the shapes world",
    ),
    "doctor": Command("xattn_video_pipelines.doctor", "what works on this machine, and why not"),
    "bench": Command("xattn_video_eval.bench.command", "time sparse attention against dense, after a correctness gate"),
    "tune": Command(
        "xattn_video_eval.tune.command", "measure the kernels' launch configurations on this GPU and keep the best"
    ),
}

EXAMPLE = """\
example:
  xattn-video demo
  xattn-video generate --model wan2.1-1.3b --prompts prompts.txt --attention both --out out
  xattn-video compare out/dense out/xattn-s8-t0.90-w5
"""


ABOUT = "Sparse attention (XAttention) for video diffusion models."


def build_app(command: str | None) -> App:
    """The command line with every subcommand's name, and the options of `command` alone."""
    app = program("xattn-video", ABOUT, EXAMPLE, version=lambda: f"xattn-video {own_version()}")
    for place, (name, entry) in enumerate(COMMANDS.items()):
        if name == command:
            module = importlib.import_module(entry.module)
            add_command(app, module.command, name, entry.help, module.EXAMPLE, place)
        else:
            app.command(_another, name=name, help=entry.help, sort_key=place)
    return app


def _another() -> None:
    """Stands for the commands that are not asked for, so that their modules are not imported."""


def build_parser(command: str | None) -> Parser:
    """The parser with every subcommand's name, and the options of `command` alone."""
    parser = Parser(prog="xattn-video", description=ABOUT, epilog=EXAMPLE)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, entry in COMMANDS.items():
        description = entry.help[0].upper() + entry.help[1:] + "."
        subparser = subparsers.add_parser(name, help=entry.help, description=description)
        if name == command:
            module = importlib.import_module(entry.module)
            module.add_arguments(subparser)
            if subparser.epilog is None:
                subparser.epilog = getattr(module, "EXAMPLE", None)
            # The demo runs other programs; through here, so that pipelines need not import eval.
            subparser.set_defaults(run=module.run, run_command=main)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for bad input, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    return guarded("xattn-video", lambda: _run(command, arguments))


def _run(command: str | None, arguments: Sequence[str]) -> int:
    if command in COMMANDS and hasattr(importlib.import_module(COMMANDS[command].module), "add_arguments"):
        return run_program(build_parser(command), lambda args: args.run(args), arguments)
    if command is None and not {"-h", "--help", "--version"}.intersection(arguments):
        raise UsageError("xattn-video", "the following arguments are required: COMMAND")
    if command is not None and command not in COMMANDS:
        choices = ", ".join(map(repr, COMMANDS))
        raise UsageError("xattn-video", f"argument COMMAND: invalid choice: {command!r} (choose from {choices})")
    # What tells how to install the rest must not need it.
    if importlib.util.find_spec("cyclopts") is None and arguments == ["--version"]:
        print(f"xattn-video {own_version()}")
        return 0
    if importlib.util.find_spec("cyclopts") is None and arguments in (["doctor"], ["doctor", "--json"]):
        from xattn_video_pipelines import doctor

        return doctor.command(json="--json" in arguments)
    return run_app(build_app(command), arguments)


if __name__ == "__main__":
    sys.exit(main())
