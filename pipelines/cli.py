"""The `xattn-video` command: one subcommand a program.

Only the program that is asked for is imported, so that `--help` stays fast: nothing here imports torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xattn_video_pipelines.common.environment import own_version
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.program import (
    add_command,
    asked_command,
    guarded,
    program,
    run_app,
)

if TYPE_CHECKING:
    from cyclopts import App


@dataclass(frozen=True)
class Command:
    """A subcommand: a function `(settings, ...) -> exit code`, in a module that also has an `EXAMPLE`."""

    module: str
    help: str
    function: str = "command"


# Programs that are in no wheel.
_STUDIES = "xattn_video_eval.studies"

# eval is loaded from here and only here: pipelines otherwise knows nothing of it.
COMMANDS = {
    "generate": Command("xattn_video_pipelines.video.command", "make videos from prompts, dense, sparse or both"),
    "compare": Command(
        "xattn_video_eval.compare.command",
        "compare sparse videos with dense ones: PSNR, SSIM, LPIPS, flicker, worst regions",
    ),
    "report": Command(
        "xattn_video_eval.report.command", "one page about a run: tables, noise floor, players side by side, density"
    ),
    "sweep": Command("xattn_video_eval.sweep.command", "quality and speed over thresholds, strides and warm-up steps"),
    "calibrate": Command(
        "xattn_video_eval.calibrate.command",
        "find thresholds for every layer and head of a model, offline, on a few inputs",
    ),
    "qa": Command(
        "xattn_video_pipelines.qa.command", "ask a video-understanding model about videos, with sparse prefill"
    ),
    "status": Command("xattn_video_pipelines.status", "what a run has made, what failed, what is left, time to go"),
    "demo": Command("xattn_video_pipelines.demo.command", "the whole path on a small model, in minutes on a CPU"),
    "judge": Command(
        "xattn_video_pipelines.demo.judging",
        "read colour, shape, motion and background back from videos of the shapes world",
    ),
    "doctor": Command("xattn_video_pipelines.doctor", "what works on this machine, and why not"),
    "bench": Command("xattn_video_eval.bench.program", "time sparse attention against dense, after a correctness gate"),
    "tune": Command(
        "xattn_video_eval.tune.program", "measure the kernels' launch configurations on this GPU and keep the best"
    ),
    "needle": Command(
        "xattn_video_eval.benchmarks.needle.command",
        "does a language model still find what stands in a long prompt, with sparse prefill",
    ),
    "lm-eval": Command(
        "xattn_video_eval.benchmarks.harness",
        "RULER, LongBench and other tasks of lm-evaluation-harness, dense and sparse",
        "lm_eval",
    ),
    "lmms-eval": Command(
        "xattn_video_eval.benchmarks.harness", "Video-MME and other tasks of lmms-eval, dense and sparse", "lmms_eval"
    ),
    "selection-quality": Command(
        f"{_STUDIES}.selection_quality",
        "does the score find the blocks that matter; from a checkout alone",
        "selection_quality",
    ),
    "completion": Command(
        "xattn_video_pipelines.completion", "a script that completes commands and options in a shell"
    ),
}

EXAMPLE = """\
example:
  xattn-video demo
  xattn-video generate --model wan2.1-1.3b --prompts prompts.txt --attention both --out out
  xattn-video compare out
"""


# What must run where no library reads the command line.
_DOCTORS = ({"doctor"}, {"doctor", "--json"}, {"doctor", "--full"}, {"doctor", "--full", "--json"})

ABOUT = "Sparse attention (XAttention) for video diffusion models."


def build_app(command: str | None) -> App:
    """The command line with every subcommand's name, and the options of `command` alone."""
    return _app(lambda name: name == command)


def build_whole_app() -> App:
    """The command line with the options of every command that can be imported here."""
    return _app(_is_importable)


def _app(has_options: Callable[[str], bool]) -> App:
    app = program("xattn-video", ABOUT, EXAMPLE, version=lambda: f"xattn-video {own_version()}")
    for place, (name, entry) in enumerate(COMMANDS.items()):
        if has_options(name):
            module = module_of(name)
            add_command(app, getattr(module, entry.function), name, entry.help, module.EXAMPLE, place)
        else:
            app.command(_another, name=name, help=entry.help, sort_key=place)
    return app


def _is_importable(command: str) -> bool:
    """Whether the libraries that a command's module imports are installed."""
    try:
        module_of(command)
    except (ModuleNotFoundError, UserError):
        return False
    return True


def _another() -> None:
    """Stands for the commands that are not asked for, so that their modules are not imported."""


def module_of(command: str) -> Any:
    """The module of a command, imported; what a program needs of `xattn_video_eval` it takes from here.

    Raises:
        UserError: it is one of the studies, and they are not here.
    """
    name = COMMANDS[command].module
    if name.startswith(_STUDIES) and importlib.util.find_spec(_STUDIES) is None:
        raise UserError(
            f"{command} is one of the studies, which come with a checkout of the project and not with a wheel"
        )
    return importlib.import_module(name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for bad input, 3 if items failed, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = asked_command(arguments)
    # What tells how to install the rest must not need it.
    if importlib.util.find_spec("cyclopts") is None and arguments == ["--version"]:
        print(f"xattn-video {own_version()}")
        return 0
    if importlib.util.find_spec("cyclopts") is None and {*arguments} in _DOCTORS:
        doctor = module_of("doctor")
        given = {"full": "--full" in arguments, "json": "--json" in arguments}
        return guarded("xattn-video", lambda: doctor.command(**given))
    return guarded("xattn-video", lambda: run_app(build_app(command), arguments, tuple(COMMANDS)))


if __name__ == "__main__":
    sys.exit(main())
