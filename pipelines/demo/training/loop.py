"""The loop that the demo's trainings share: schedule, moving average, log with its curve, checkpoints that survive.

What a step does depends on its number alone (its random numbers are drawn from the seed and the step), so a run
that is killed and started again gives the same weights as one that is not.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.environment import emulates_bfloat16
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import whole_files
from xattn_video_pipelines.demo.training.curve import draw_curve

logger = logging.getLogger(__name__)

_WARMUP_STEPS = 50
COOLDOWN = 0.35
_EMA_DECAY = 0.998
_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Plan:
    """How a training runs.

    `name` is the log's and the checkpoint's; `steps` is the whole training, over all sittings; `deadline` is the
    `time.monotonic()` at which this sitting ends, or None. A checkpoint is written at the end and at least every
    `checkpoint_seconds`, a line of the log every `log_steps`. `matrix_learning_rate` is Muon's, see `build_optimizers`;
    `blocks` is in the names of its blocks. `cooldown` is the last share of the steps, over which the learning rates
    fall to zero.
    """

    name: str
    folder: Path
    steps: int
    learning_rate: float
    weight_decay: float = 0.01
    matrix_learning_rate: float | None = None
    blocks: tuple[str, ...] = ("blocks.",)
    cooldown: float = COOLDOWN
    deadline: float | None = None
    checkpoint_seconds: float = 300.0
    log_steps: int = 20

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    @property
    def log(self) -> Path:
        """A JSON line every `log_steps`, of all stages that share the folder."""
        return self.folder / "log.jsonl"


class HasEnd(Protocol):
    """A part of a training: `until` is the share of all steps at which it ends."""

    @property
    def until(self) -> float: ...


P = TypeVar("P", bound=HasEnd)


def phase_at(phases: Sequence[P], step: int, steps: int) -> P:
    """The phase of a step, the first being 0, of `steps`."""
    return next((phase for phase in phases if step < phase.until * steps), phases[-1])


def schedule_at(plan: Plan, step: int) -> float:
    """The share of the learning rate: linear warm-up, constant, linear to zero. A run is fixed by its `steps`."""
    warmup = min(1.0, (step + 1) / _WARMUP_STEPS)
    cooldown = min(1.0, (plan.steps - step) / max(1.0, plan.cooldown * plan.steps))
    return warmup * cooldown


def mixed_precision(device: torch.device) -> torch.autocast:
    """Products in bfloat16 inside of it; in float32 where bfloat16 is emulated."""
    return torch.autocast(device.type, torch.bfloat16, enabled=not emulates_bfloat16(device))


def build_optimizers(plan: Plan, model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """AdamW; where the plan has a `matrix_learning_rate`, Muon for the matrices of the model's blocks and AdamW else.

    Raises:
        RuntimeError: Muon is asked for and torch has none (before 2.9).
    """
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    inside: set[str] = set()
    if plan.matrix_learning_rate is not None:
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(f"training needs torch 2.9 or newer for torch.optim.Muon, this is {torch.__version__}")
        inside = {name for name, value in named if value.ndim == 2 and any(part in name for part in plan.blocks)}
    others = [value for name, value in named if name not in inside]
    adamw = torch.optim.AdamW(others, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=plan.weight_decay)
    if plan.matrix_learning_rate is None or not inside:
        return [adamw]
    matrices = [value for name, value in named if name in inside]
    muon = torch.optim.Muon(
        matrices, lr=plan.matrix_learning_rate, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [adamw, muon]


def train(
    plan: Plan,
    model: torch.nn.Module,
    loss_of: Callable[[int], dict[str, torch.Tensor]],
    on_checkpoint: Callable[[int, dict[str, torch.Tensor]], None] | None = None,
) -> tuple[int, dict[str, torch.Tensor]]:
    """Train `model` until `plan.steps` or the deadline, from the checkpoint if there is one.

    Args:
        loss_of: gives the losses of a step, the one to minimise under `loss`, the others for the log.
        on_checkpoint: called with the step and the averaged weights after each checkpoint.

    Returns:
        The steps done, over all sittings, and the averaged weights by parameter name.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizers = build_optimizers(plan, model)
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    step, seconds = 0, 0.0
    if plan.checkpoint.exists():
        step, seconds = _load(plan, model, average, optimizers)
        logger.info("%s: resuming at step %d of %d", plan.name, step, plan.steps)
    # Loading a checkpoint makes new groups, with the rates that the optimizers were built with.
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    _truncate_log(plan, step)
    started = saved = time.monotonic()
    losses: dict[str, list[float]] = {}
    model.train()
    while step < plan.steps:
        if plan.deadline is not None and time.monotonic() >= plan.deadline:
            break
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * schedule_at(plan, step)
        values = loss_of(step)
        values["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, _GRADIENT_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        # The average forgets its random start quickly.
        decay = min(_EMA_DECAY, step / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in model.parameters()], 1 - decay)
        for name, value in values.items():
            losses.setdefault(name, []).append(value.item())
        now = time.monotonic()
        if step % plan.log_steps == 0 or step == plan.steps:
            _log(plan, step, losses, plan.learning_rate * schedule_at(plan, step - 1), seconds + now - started)
            losses = {}
        if now - saved >= plan.checkpoint_seconds:
            _save(plan, model, average, optimizers, step, seconds + now - started)
            draw_curve(plan.log)
            if on_checkpoint:
                on_checkpoint(step, average)
            saved = time.monotonic()
    if not plan.checkpoint.exists() or step > _checkpoint_step(plan):
        _save(plan, model, average, optimizers, step, seconds + time.monotonic() - started)
        draw_curve(plan.log)
        if on_checkpoint:
            on_checkpoint(step, average)
    return step, average


def _save(
    plan: Plan,
    model: torch.nn.Module,
    average: dict[str, torch.Tensor],
    optimizers: list[torch.optim.Optimizer],
    step: int,
    seconds: float,
) -> None:
    tensors = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for number, optimizer in enumerate(optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{key}": value for key, value in values.items()}
    tensors = {name: value.contiguous().cpu() for name, value in tensors.items()}
    state = json.dumps({"step": step, "seconds": seconds})
    with whole_files(plan.checkpoint) as (partial,):
        save_file(tensors, partial, metadata={"state": state})


def _load(
    plan: Plan, model: torch.nn.Module, average: dict[str, torch.Tensor], optimizers: list[torch.optim.Optimizer]
) -> tuple[int, float]:
    """Fill model, average and optimizers from the checkpoint; the steps and the seconds it stands for.

    Raises:
        UserError: the checkpoint is of another model.
    """
    with safe_open(plan.checkpoint, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = json.loads(file.metadata()["state"])
    shapes = {name: tensors[key].shape for name in average if (key := f"model.{name}") in tensors}
    if shapes != {name: value.shape for name, value in average.items()}:
        raise UserError(f"{plan.checkpoint}: of another model than is trained now; use another --out")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            average[name].copy_(tensors[f"average.{name}"])
    moments: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in optimizers]
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, index, key = name.split(".")
            moments[int(number)].setdefault(int(index), {})[key] = value
    for optimizer, state_of in zip(optimizers, moments, strict=True):
        optimizer.load_state_dict({"state": state_of, "param_groups": optimizer.state_dict()["param_groups"]})
    return state["step"], state["seconds"]


def _checkpoint_step(plan: Plan) -> int:
    with safe_open(plan.checkpoint, framework="pt") as file:
        return int(json.loads(file.metadata()["state"])["step"])


def _log(plan: Plan, step: int, losses: dict[str, list[float]], rate: float, seconds: float) -> None:
    means = {name: round(sum(values) / len(values), 6) for name, values in losses.items()}
    line = {"stage": plan.name, "step": step, **means, "learning_rate": rate, "seconds": round(seconds, 1)}
    jsonl.append(plan.log, [line])
    left = (plan.steps - step) * seconds / step / 60
    shown = " ".join(f"{name} {value:.4f}" for name, value in means.items())
    logger.info("%s %d/%d: %s, %.0f min left", plan.name, step, plan.steps, shown, left)


def _truncate_log(plan: Plan, step: int) -> None:
    """Drop the lines of steps that a killed run did after its last checkpoint: they are done again."""
    if plan.log.exists():
        jsonl.keep(plan.log, lambda line: line["stage"] != plan.name or line["step"] <= step)
