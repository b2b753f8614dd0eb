"""The settings of `xattn-video lm-eval` and `xattn-video lmms-eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from xattn_video_pipelines.common.settings import Option
from xattn_video_pipelines.qa import LoadSettings, PrefillSettings

RESULTS_JSON = "results.json"


@dataclass(frozen=True, kw_only=True)
class HarnessSettings(PrefillSettings):
    """Which tasks of another project's benchmark a model does, and with which attention it reads prompts.

    `limit` is the number of items of each task; with it the score is not the benchmark's.
    """

    model: Annotated[str, Option("Hub id or local folder")]
    tasks: Annotated[tuple[str, ...], Option("the tool's names of its tasks", metavar="NAME", commas=True)]
    task_folder: Annotated[str | None, Option("more tasks, in the tool's .yaml files", metavar="DIR")] = None
    out: Annotated[Path, Option(f"{RESULTS_JSON} goes there", metavar="DIR")]
    limit: Annotated[
        int | None, Option("items of each task, whose score is then not the benchmark's; default: all", metavar="N")
    ] = None


@dataclass(frozen=True, kw_only=True)
class LmEvalSettings(LoadSettings, HarnessSettings):
    """A text model, by lm-evaluation-harness. `lengths` are the prompt tokens of RULER's tasks."""

    lengths: Annotated[tuple[int, ...], Option("tokens of the prompts of RULER's tasks", metavar="N")] = ()


@dataclass(frozen=True, kw_only=True)
class LmmsEvalSettings(HarnessSettings):
    """A video model, by lmms-eval. The stride is that of the paper's video table."""

    stride: Annotated[int, Option("antidiagonal stride, a power of two", "attention")] = 16
    device: Annotated[str, Option("cuda or cpu", "machine")] = "cuda"
    kind: Annotated[str, Option("lmms-eval's name of the model's class")] = "qwen2_vl"
    model_args: Annotated[str, Option("more arguments of that class", metavar="A=B,...")] = ""
