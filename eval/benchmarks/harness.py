"""Public benchmarks of language and video models by their own tools, with dense and sparse prefill.

    lm-eval      RULER, LongBench and whatever else lm-evaluation-harness has, for a text model
    lmms-eval    Video-MME and whatever else lmms-eval has, for a video model

The tool loads data and scores answers; this program gives its model the attention and puts the scores side by side,
with the density of prefill. The tools are not installed with this project: pip install lm-eval, pip install lmms-eval.
They download their data. lm-eval's RULER tasks load the tokenizer with trust_remote_code; this program never does.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import time
from collections.abc import Callable, Iterator
from json import dumps
from typing import Any, TypeVar

from xattn_video import XAttnConfig
from xattn_video_eval.benchmarks.settings import RESULTS_JSON, HarnessSettings, LmEvalSettings, LmmsEvalSettings
from xattn_video_eval.results import provenance
from xattn_video_pipelines.common.environment import device_name
from xattn_video_pipelines.common.errors import UserError, one_line
from xattn_video_pipelines.common.files import make_writable, write_texts
from xattn_video_pipelines.common.program import add_command, for_people, guarded, program, run_app
from xattn_video_pipelines.common.run_file import note_run
from xattn_video_pipelines.common.settings import Json
from xattn_video_pipelines.common.tables import aligned
from xattn_video_pipelines.common.terminal import say
from xattn_video_pipelines.qa import load_model, reach
from xattn_video_pipelines.video import offline_message

EXAMPLE = """\
example:
  xattn-video lm-eval --model Qwen/Qwen3-8B --tasks ruler --lengths 16384 65536 --out ruler
  xattn-video lm-eval --model Qwen/Qwen3-8B --tasks longbench --stride 16 --out longbench
  xattn-video lmms-eval --model Qwen/Qwen2-VL-7B-Instruct --kind qwen2_vl --tasks videomme --out videomme
"""

Evaluate = Callable[[], dict[str, Any]]
S = TypeVar("S", bound=HarnessSettings)


def main(arguments: list[str] | None = None) -> int:
    """`python -m xattn_video_eval.benchmarks.harness`: 0, or 2 with one line for bad input."""

    def call() -> int:
        app = program("python -m xattn_video_eval.benchmarks.harness", __doc__ or "", EXAMPLE)
        add_command(app, lm_eval, "lm-eval", "a text model, by lm-evaluation-harness", EXAMPLE)
        add_command(app, lmms_eval, "lmms-eval", "a video model, by lmms-eval", EXAMPLE)
        return run_app(app, sys.argv[1:] if arguments is None else arguments, ("lm-eval", "lmms-eval"))

    return guarded("harness", call)


def lm_eval(settings: LmEvalSettings, *, json: Json = False) -> int:
    """`xattn-video lm-eval`: write and print the scores; 0. Raises UserError."""
    return _evaluate(settings, "lm-eval", _language, json)


def lmms_eval(settings: LmmsEvalSettings, *, json: Json = False) -> int:
    """`xattn-video lmms-eval`: write and print the scores; 0. Raises UserError."""
    return _evaluate(settings, "lmms-eval", _video, json)


def _evaluate(settings: S, tool: str, load: Callable[[S], tuple[Any, Evaluate]], json: bool) -> int:
    """Evaluate each attention in turn."""
    configs = settings.configurations
    make_writable(settings.out)
    note_run(settings.out)
    # The tools print on stdout too.
    with contextlib.redirect_stdout(for_people(json)):
        model, evaluate = load(settings)
        rows = list(_sides(settings, tool, model, evaluate, configs))
    document = {
        "tool": tool,
        "model": settings.model,
        "limit": settings.limit,
        "rows": rows,
        "device_name": device_name(model.device),
        **provenance("transformers", tool),
    }
    write_texts({settings.out / RESULTS_JSON: dumps(document, indent=2, default=str) + "\n"})
    say(table(rows), for_people(json))
    if json:
        print(dumps(document, default=str))
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Every number that the tool gave, a line each, dense beside sparse; the density and the time below."""
    heads = [row["attention"] for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    lines = [(name, *(_cell(row["scores"].get(name)) for row in rows)) for name in names]
    lines.append(("density of sparse prefill", *(_cell(row["sparse_density"]) for row in rows)))
    lines.append(("seconds", *(f"{row['seconds']:.0f}" for row in rows)))
    return aligned([("task and metric", *heads), *lines], left=1)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _sides(
    settings: HarnessSettings, tool: str, model: Any, evaluate: Evaluate, configs: dict[str, XAttnConfig | None]
) -> Iterator[dict[str, Any]]:
    """A row for each configuration."""
    from xattn_video.integrations.transformers import stop_xattention, use_xattention
    from xattn_video_pipelines.qa import repair_positions

    repair_positions(model)
    for label, config in configs.items():
        try:
            stats = None if config is None else use_xattention(model, config)
        except ValueError as error:
            raise UserError(f"--model {settings.model}: {error}") from None
        started = time.perf_counter()
        scores = _numbers(_checked(settings, tool, evaluate))
        seconds = time.perf_counter() - started
        summary = {} if stats is None else stats.summary()
        stop_xattention(model)
        yield {
            "attention": label,
            "scores": scores,
            "sparse_density": summary.get("sparse_density"),
            "dense_calls": summary.get("dense_calls", {}),
            "seconds": round(seconds, 2),
        }


def _checked(settings: HarnessSettings, tool: str, evaluate: Evaluate) -> dict[str, Any]:
    """What the tool gives; what stops it from reaching its data or its tasks, as one line."""
    try:
        results = evaluate()
    except (OSError, KeyError, ValueError) as error:
        reason = one_line(error, 300)
        raise UserError(
            f"{tool} could not run {' '.join(settings.tasks)} ({type(error).__name__}: {reason})"
        ) from error
    if not results:
        raise UserError(f"{tool} gave no results for {' '.join(settings.tasks)}")
    return results


def _numbers(results: dict[str, Any]) -> dict[str, float]:
    """`task metric` to its value, from the tool's `results`; standard errors and texts are left out."""
    return {
        f"{task} {name.removesuffix(',none')}": float(value)
        for task, metrics in results.items()
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "stderr" not in name
    }


def _language(settings: LmEvalSettings) -> tuple[Any, Evaluate]:
    import xattn_video.integrations.transformers  # noqa: F401  (repairs torchvision)

    evaluator, models = _import("lm-eval", "lm_eval.evaluator"), _import("lm-eval", "lm_eval.models.huggingface")
    model, tokenizer = load_model(
        settings.model, "AutoModelForCausalLM", "AutoTokenizer", device=settings.device, dtype=settings.dtype
    )
    # The longest prompt of a task must not be cut.
    longest = {} if not settings.lengths else {"max_length": max(settings.lengths) + 1024}
    wrapped = models.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, **longest)
    metadata = {"tokenizer": settings.model} | ({"max_seq_lengths": list(settings.lengths)} if settings.lengths else {})

    def evaluate() -> dict[str, Any]:
        found = evaluator.simple_evaluate(
            model=wrapped,
            tasks=list(settings.tasks),
            limit=settings.limit,
            metadata=metadata,
            log_samples=False,
            task_manager=_import("lm-eval", "lm_eval.tasks").TaskManager(
                include_path=settings.task_folder, metadata=metadata
            ),
        )
        return found["results"] if found else {}

    return model, evaluate


def _video(settings: LmmsEvalSettings) -> tuple[Any, Evaluate]:
    import xattn_video.integrations.transformers  # noqa: F401  (repairs torchvision)

    evaluator, models = _import("lmms-eval", "lmms_eval.evaluator"), _import("lmms-eval", "lmms_eval.models")
    # The tool would look for a model for minutes where there is no network.
    reach(settings.model)
    kind = models.get_model(settings.kind)
    # Where a class has both, its device_map is a GPU's unless it is told.
    both = "device_map" in inspect.signature(kind.__init__).parameters and "device_map=" not in settings.model_args
    given = (f"pretrained={settings.model}", f"device_map={settings.device}" if both else "", settings.model_args)
    try:
        wrapped = kind.create_from_arg_string(
            ",".join(part for part in given if part), {"batch_size": 1, "device": settings.device}
        )
    except (OSError, ValueError) as error:
        raise UserError(offline_message(settings.model, error)) from None
    # The tool throws the weights away after an evaluation, and there is another one with the other attention.
    wrapped.clean = lambda: None

    def evaluate() -> dict[str, Any]:
        found = evaluator.simple_evaluate(
            model=wrapped,
            tasks=list(settings.tasks),
            limit=settings.limit,
            log_samples=False,
            task_manager=_import("lmms-eval", "lmms_eval.tasks").TaskManager(
                include_path=settings.task_folder, model_name=settings.kind
            ),
        )
        return found["results"] if found else {}

    return wrapped.model, evaluate


def _import(tool: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{tool} is not here ({error}): pip install {tool}") from None


if __name__ == "__main__":
    raise SystemExit(main())
