"""Thresholds for every layer and head of a model, measured on a few inputs: the program behind `xattn-video calibrate`.

inputs -> a dense run in which some calls are measured at every threshold -> a choice for each head -> one JSON file

The file goes to `XAttnConfig(threshold=FILE)`. It is the paper's minimum threshold prediction, with the objective that
`choose.py` states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xattn_video import HeadThresholds, XAttnConfig
from xattn_video.thresholds import LayerThresholds
from xattn_video_eval.calibrate.choose import choose
from xattn_video_eval.calibrate.settings import CalibrateSettings
from xattn_video_pipelines.common.environment import versions
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import make_writable, read_input, write_texts
from xattn_video_pipelines.common.program import for_people
from xattn_video_pipelines.common.settings import Json
from xattn_video_pipelines.common.tables import aligned
from xattn_video_pipelines.common.terminal import say
from xattn_video_pipelines.video import evenly_spaced, make_plan, observe

if TYPE_CHECKING:
    from xattn_video.ops import Call
    from xattn_video_eval.calibrate.measure import Measurement

EXAMPLE = """\
example:
  xattn-video calibrate --model demo --prompts prompts/demo.txt --limit 2 --out thresholds.json
  xattn-video generate --model demo --prompts prompts/demo.txt --threshold thresholds.json
  xattn-video calibrate --model demo --items demo-out/answers/questions.jsonl --out watcher.json
  xattn-video calibrate --model Qwen/Qwen3-8B --texts one.txt two.txt --out qwen3.json
"""


def command(settings: CalibrateSettings, *, json: Json = False) -> int:
    """`xattn-video calibrate`: measure, choose, write, print; returns 0. Raises UserError."""
    document = calibrate(settings)
    say(dumps(document) if json else table(document))
    say(f"wrote {settings.out}", for_people(json))
    return 0


def calibrate(settings: CalibrateSettings) -> dict[str, Any]:
    """Measure the calls of a few inputs, choose a threshold for each head and write the file.

    Returns:
        A JSON-ready dict: `out` (the file), `model`, `layers` and `heads` (how many), `measured_calls` (of all layers),
        `budget`, `flat` (threshold, density and error where all heads have one threshold), and `chosen` (mean
        threshold, density and error of what is in the file, and its number of heads by threshold).

    Raises:
        UserError: bad input, a model that cannot be loaded or made sparse, inputs too short for a sparse call, or a
            budget that no threshold keeps to.
    """
    if settings.out.is_dir():
        raise UserError(f"--out {settings.out}: is a folder")
    if settings.out.exists() and not settings.overwrite:
        raise UserError(f"--out {settings.out}: is there already; another name, or --overwrite")
    make_writable(settings.out.parent)
    run = _run_videos(settings) if settings.prompts is not None else _run_prompts(settings)
    measurement = run.measurement
    means = {layer: measurement.means(layer) for layer in measurement.calls}
    density = np.concatenate([density for density, _ in means.values()])
    error = np.concatenate([error for _, error in means.values()])
    if not np.isfinite(error).all():
        raise UserError(f"--model {settings.model}: its attention gave NaN or inf; try --dtype bfloat16 or float32")
    budget = float(error[:, 1].mean()) if settings.budget is None else settings.budget
    try:
        chosen = choose(density, error, budget)
    except ValueError as wrong:
        raise UserError(f"--budget: {wrong}") from None
    thresholds = HeadThresholds(
        model=run.model,
        model_class=run.model_class,
        stride=settings.score_stride,
        block_size=settings.block_size,
        budget=_rounded(budget),
        calibrated_on=run.told,
        versions=_versions(),
        layers=_layers(means, chosen, measurement.grid),
    )
    try:
        # A layer that made no sparse call is missing, and the model would refuse the file later.
        run.attach(run.config.replace(threshold=thresholds))
    except ValueError as wrong:
        raise UserError(f"--model {settings.model}: not every layer made a sparse call: {wrong}") from None
    write_texts({settings.out: thresholds.to_json()})
    rows = np.arange(len(chosen))
    return {
        "out": str(settings.out),
        "model": run.model,
        "layers": len(means),
        "heads": len(chosen),
        "measured_calls": sum(measurement.calls.values()),
        "budget": budget,
        "flat": [
            {"threshold": tau, "density": density[:, index].mean(), "error": error[:, index].mean()}
            for index, tau in enumerate(measurement.grid)
        ],
        "chosen": {
            "threshold": thresholds.mean,
            "density": density[rows, chosen].mean(),
            "error": error[rows, chosen].mean(),
            "heads_by_threshold": np.bincount(chosen, minlength=len(measurement.grid)).tolist(),
        },
    }


def table(document: dict[str, Any]) -> str:
    """What was measured, for people: one threshold for all heads, and the choice."""
    chosen = document["chosen"]
    lines: list[tuple[str, ...]] = [("thresholds", "density", "error", "heads chosen")]
    for row, heads in zip(document["flat"], chosen["heads_by_threshold"], strict=True):
        lines.append((f"all {row['threshold']:.3f}", f"{row['density']:.3f}", f"{row['error']:.4f}", str(heads)))
    mean = f"chosen, mean {chosen['threshold']:.3f}"
    lines.append((mean, f"{chosen['density']:.3f}", f"{chosen['error']:.4f}", str(document["heads"])))
    told = f"{document['model']}: {document['layers']} layers, {document['measured_calls']} measured calls"
    return f"{told}, budget {document['budget']:.4f}\n{aligned(lines, left=1, rules=(1, len(lines) - 1))}"


@dataclass(frozen=True)
class _Run:
    """A run that was measured.

    Attributes:
        model: what the model is called.
        model_class: the name of its class.
        config: the settings of the run.
        measurement: what was measured of its layers.
        told: what it was measured on, in words.
        attach: gives the model other settings; raises ValueError where they do not fit it.
    """

    model: str
    model_class: str
    config: XAttnConfig
    measurement: Measurement
    told: str
    attach: Callable[[XAttnConfig], object]


def _run_videos(settings: CalibrateSettings) -> _Run:
    from xattn_video.integrations.diffusers import XAttnProcessor, pipeline_transformers
    from xattn_video_eval.calibrate.measure import Measurement

    assert settings.prompts is not None
    plan = make_plan(settings.of_videos)
    steps = plan.recipe.settings.steps
    sparse = range(settings.warmup_steps, steps)
    if not sparse:
        raise UserError(f"--warmup-steps must be below the number of steps, {steps}, got {settings.warmup_steps}")
    measured = set(evenly_spaced(sparse, min(settings.measured_steps, len(sparse))))
    measurement = Measurement(settings.grid, stride=settings.score_stride, block_size=settings.block_size)
    seen: dict[str, int] = {}

    def on_call(step: int, layer: str, call: Call) -> None:
        seen[layer] = seen.get(layer, 0) + 1
        if step in measured:
            measurement(layer, call)

    pipe = observe(plan, on_call)
    _check_seen(settings, plan.recipe.tokens, seen)
    if missing := [layer for layer in seen if layer not in measurement.calls]:
        raise UserError(f"--measured-steps: {missing[0]} ran in none of the steps {_listed(measured)}; give more")
    classes = sorted({type(model).__name__ for model in pipeline_transformers(pipe).values()})
    if len(classes) > 1:
        raise UserError(f"--model {settings.model}: its transformers have different classes, {' and '.join(classes)}")
    video = plan.recipe.settings
    told = (
        f"{settings.prompts.name} (videos: {len(plan.pending)}), {video.width}x{video.height}, {video.num_frames} "
        f"frames, {plan.recipe.tokens} tokens, steps {_listed(measured)} of {steps}"
    )
    return _Run(
        plan.recipe.model.identity, classes[0], settings.of_videos.config, measurement, told,
        lambda config: pipe.set_attn_processor(XAttnProcessor(config)),
    )  # fmt: skip


def _run_prompts(settings: CalibrateSettings) -> _Run:
    from xattn_video.integrations.transformers import use_xattention
    from xattn_video_eval.calibrate.measure import Measurement
    from xattn_video_pipelines.qa import generate_answer, load_model, load_video_model, prompts_of, read_questions

    config: XAttnConfig
    inputs: Iterator[dict[str, Any]]
    if settings.items is not None:
        asked = settings.of_questions
        questions = read_questions(settings.items)[: settings.limit]
        model, processor = load_video_model(asked)
        inputs = prompts_of(asked, model, processor, questions)
        config, told = asked.config, f"{settings.items.name} (questions: {len(questions)})"
    else:
        texts = [_text(path) for path in settings.texts[: settings.limit]]
        model, tokenizer = load_model(
            settings.model, "AutoModelForCausalLM", "AutoTokenizer", device=settings.device, dtype=settings.dtype
        )
        inputs = (dict(tokenizer(text, return_tensors="pt").to(model.device)) for text in texts)
        config = XAttnConfig(
            threshold=1.0, stride=settings.score_stride, block_size=settings.block_size, min_tokens=settings.min_tokens
        )
        told = ", ".join(path.name for path in settings.texts[: settings.limit])
    measurement = Measurement(
        settings.grid, stride=config.stride, block_size=config.block_size, dense_last=config.dense_last
    )
    try:
        use_xattention(model, config, on_call=measurement)
    except ValueError as error:
        raise UserError(f"--model {settings.model}: {error}") from None
    lengths = [generate_answer(model, one, 1).prompt_tokens for one in inputs]
    _check_seen(settings, max(lengths), measurement.calls)
    told += f", {min(lengths)} to {max(lengths)} tokens"
    return _Run(
        settings.model, type(model).__name__, config, measurement, told, lambda config: use_xattention(model, config)
    )


def _check_seen(settings: CalibrateSettings, tokens: int | None, seen: Mapping[str, int]) -> None:
    if not seen:
        raise UserError(
            f"--min-tokens {settings.min_tokens}: no attention call was sparse, so nothing could be measured; "
            f"the longest input has {tokens} tokens"
        )


def _layers(
    means: dict[str, tuple[np.ndarray, np.ndarray]], chosen: np.ndarray, grid: tuple[float, ...]
) -> tuple[LayerThresholds, ...]:
    """The layers of the file; `chosen` has the heads of all layers in a row."""
    layers, first = [], 0
    for name, (density, error) in means.items():
        own = chosen[first : first + len(density)]
        heads = range(len(own))
        first += len(own)
        columns = [grid[index] for index in own], density[heads, own].tolist(), error[heads, own].tolist()
        layers.append(LayerThresholds(name, *(tuple(map(_rounded, column)) for column in columns)))
    return tuple(layers)


def _rounded(value: float) -> float:
    """Six digits: enough for what is measured, and a file that people can read."""
    return float(f"{value:.6g}")


def _versions() -> tuple[tuple[str, str], ...]:
    found = versions(("xattn-video", "torch", "triton", "diffusers", "transformers"))
    return tuple((name, version) for name, version in found.items() if version is not None)


def _text(path: Path) -> str:
    try:
        text = read_input(path).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not text.strip():
        raise UserError(f"{path}: no text in it")
    return text


def _listed(steps: set[int]) -> str:
    return ", ".join(map(str, sorted(steps)))
