"""Public benchmarks of language and video models by their own tools, with dense and sparse prefill.

    lm-eval      RULER, LongBench and whatever else lm-evaluation-harness has, for a text model
    lmms-eval    Video-MME and whatever else lmms-eval has, for a video model

The tool loads data and scores answers; this program gives its model the attention and puts the scores side by side,
with the density of prefill. The tools are not installed with this project: pip install lm-eval, pip install lmms-eval.
They download their data. lm-eval's RULER tasks load the tokenizer with trust_remote_code; this program never does.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from xattn_video import XAttnConfig
from xattn_video_eval.results.ledger import provenance
from xattn_video_pipelines.common.environment import device_name
from xattn_video_pipelines.common.errors import UserError, one_line
from xattn_video_pipelines.common.files import make_writable, write_texts
from xattn_video_pipelines.common.program import Parser, run_program
from xattn_video_pipelines.common.tables import aligned
from xattn_video_pipelines.qa.load import add_attention_options, add_machine_options, configurations, load_model
from xattn_video_pipelines.video.models import offline_message

EXAMPLE = """\
example:
  python -m xattn_video_eval.benchmarks.harness lm-eval --model Qwen/Qwen3-8B --tasks ruler \\
      --lengths 16384 65536 --out ruler
  python -m xattn_video_eval.benchmarks.harness lm-eval --model Qwen/Qwen3-8B --tasks longbench --stride 16 \\
      --out longbench
  python -m xattn_video_eval.benchmarks.harness lmms-eval --model Qwen/Qwen2-VL-7B-Instruct --kind qwen2_vl \\
      --tasks videomme --out videomme
"""

RESULTS_JSON = "results.json"
# What the paper's language and video tables use.
_STRIDES = {"lm-eval": 8, "lmms-eval": 16}

Evaluate = Callable[[], dict[str, Any]]


def main(arguments: list[str] | None = None) -> int:
    """Run as a program: 0, or 2 with one line for bad input."""
    parser = Parser(prog="python -m xattn_video_eval.benchmarks.harness", description=__doc__, epilog=EXAMPLE)
    tools = parser.add_subparsers(dest="tool", metavar="TOOL", required=True)
    language = tools.add_parser("lm-eval", help="a text model, by lm-evaluation-harness", epilog=EXAMPLE)
    add_machine_options(language)
    language.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens of the prompts of RULER's tasks")
    video = tools.add_parser("lmms-eval", help="a video model, by lmms-eval", epilog=EXAMPLE)
    video.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    video.add_argument("--kind", default="qwen2_vl", help="lmms-eval's name of the model's class (qwen2_vl)")
    video.add_argument("--model-args", default="", metavar="A=B,...", help="more arguments of that class")
    for name, tool in tools.choices.items():
        tool.add_argument("--model", required=True, help="Hub id or local folder")
        tool.add_argument("--tasks", required=True, nargs="+", metavar="NAME", help="the tool's names of its tasks")
        tool.add_argument("--task-folder", metavar="DIR", help="more tasks, in the tool's .yaml files")
        tool.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"{RESULTS_JSON} goes there")
        tool.add_argument("--limit", type=int, metavar="N", help="items of each task (all); not the benchmark's score")
        add_attention_options(tool, stride=_STRIDES[name])
    return run_program(parser, run, arguments)


def run(args: argparse.Namespace) -> int:
    """Evaluate each attention in turn, write and print the scores; 0. Raises UserError."""
    configs = configurations(args)
    make_writable(args.out)
    model, evaluate = _language(args) if args.tool == "lm-eval" else _video(args)
    rows = list(_sides(args, model, evaluate, configs))
    document = {
        "tool": args.tool,
        "model": args.model,
        "limit": args.limit,
        "rows": rows,
        "device_name": device_name(model.device),
        **provenance("transformers", args.tool),
    }
    write_texts({args.out / RESULTS_JSON: json.dumps(document, indent=2, default=str) + "\n"})
    print(table(rows))
    print(json.dumps(document, default=str))
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
    args: argparse.Namespace, model: Any, evaluate: Evaluate, configs: dict[str, XAttnConfig | None]
) -> Iterator[dict[str, Any]]:
    """A row for each configuration."""
    from xattn_video.integrations.transformers import stop_xattention, use_xattention
    from xattn_video_pipelines.qa.qwen_positions import mend_positions

    mend_positions(model)
    for label, config in configs.items():
        try:
            stats = None if config is None else use_xattention(model, config)
        except ValueError as error:
            raise UserError(f"--model {args.model}: {error}") from None
        started = time.perf_counter()
        scores = _numbers(_checked(args, evaluate))
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


def _checked(args: argparse.Namespace, evaluate: Evaluate) -> dict[str, Any]:
    """What the tool gives; what stops it from reaching its data or its tasks, as one line."""
    try:
        results = evaluate()
    except (OSError, KeyError, ValueError) as error:
        reason = one_line(error, 300)
        raise UserError(
            f"{args.tool} could not run {' '.join(args.tasks)} ({type(error).__name__}: {reason})"
        ) from error
    if not results:
        raise UserError(f"{args.tool} gave no results for {' '.join(args.tasks)}")
    return results


def _numbers(results: dict[str, Any]) -> dict[str, float]:
    """`task metric` to its value, from the tool's `results`; standard errors and texts are left out."""
    return {
        f"{task} {name.removesuffix(',none')}": float(value)
        for task, metrics in results.items()
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "stderr" not in name
    }


def _language(args: argparse.Namespace) -> tuple[Any, Evaluate]:
    import xattn_video.integrations.transformers  # noqa: F401  (repairs torchvision)

    evaluator, models = _import(args.tool, "lm_eval.evaluator"), _import(args.tool, "lm_eval.models.huggingface")
    model, tokenizer = load_model(args, "AutoModelForCausalLM", "AutoTokenizer")
    # The longest prompt of a task must not be cut.
    longest = {} if args.lengths is None else {"max_length": max(args.lengths) + 1024}
    wrapped = models.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, **longest)
    metadata = {"tokenizer": args.model} | ({"max_seq_lengths": args.lengths} if args.lengths else {})

    def evaluate() -> dict[str, Any]:
        found = evaluator.simple_evaluate(
            model=wrapped,
            tasks=args.tasks,
            limit=args.limit,
            metadata=metadata,
            log_samples=False,
            task_manager=_import(args.tool, "lm_eval.tasks").TaskManager(
                include_path=args.task_folder, metadata=metadata
            ),
        )
        return found["results"] if found else {}

    return model, evaluate


def _video(args: argparse.Namespace) -> tuple[Any, Evaluate]:
    import xattn_video.integrations.transformers  # noqa: F401  (repairs torchvision)

    evaluator, models = _import(args.tool, "lmms_eval.evaluator"), _import(args.tool, "lmms_eval.models")
    kind = models.get_model(args.kind)
    # Where a class has both, its device_map is a GPU's unless it is told.
    both = "device_map" in inspect.signature(kind.__init__).parameters and "device_map=" not in (args.model_args or "")
    given = (f"pretrained={args.model}", f"device_map={args.device}" if both else "", args.model_args)
    try:
        wrapped = kind.create_from_arg_string(
            ",".join(part for part in given if part), {"batch_size": 1, "device": args.device}
        )
    except (OSError, ValueError) as error:
        raise UserError(offline_message(args.model, error)) from None
    # The tool throws the weights away after an evaluation, and there is another one with the other attention.
    wrapped.clean = lambda: None

    def evaluate() -> dict[str, Any]:
        found = evaluator.simple_evaluate(
            model=wrapped,
            tasks=args.tasks,
            limit=args.limit,
            log_samples=False,
            task_manager=_import(args.tool, "lmms_eval.tasks").TaskManager(
                include_path=args.task_folder, model_name=args.kind
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
