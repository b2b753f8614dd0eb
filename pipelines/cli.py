"""The `xattn-video` command: one subcommand a program.

Only the program that is asked for is imported, so that `--help` stays fast: nothing here imports torch.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xattn_video_pipelines.common.program import Parser, run_program


@dataclass(frozen=True)
class Command:
    """A subcommand: its module offers `add_arguments(parser)`, `run(args) -> int` and an epilog or an `EXAMPLE`."""

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


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from xattn_video.version import __version__

        print(f"xattn-video {__version__}")
        parser.exit()


def build_parser(command: str | None) -> Parser:
    """The parser with every subcommand's name, and the options of `command` alone."""
    parser = Parser(
        prog="xattn-video", description="Sparse attention (XAttention) for video diffusion models.", epilog=EXAMPLE
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
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
    return run_program(build_parser(command), lambda args: args.run(args), arguments)


if __name__ == "__main__":
    sys.exit(main())
