"""What attention calls did, by layer and step: counted on the device, read only when someone asks."""

from __future__ import annotations

import statistics
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .tables import Table

# why a call was dense
REASONS = (
    "warmup",
    "dense_layer",
    "min_tokens",
    "mask",
    "joint_text",
    "cross_attention",
    "dropout",
    "autograd",
    "decode",
    "sliding_window",
    "not_causal",
    "no_backend",
    "training",
    "refresh",
    "last_steps",
    "packed_rows",
    "not_finite",
)
# columns of a layer's counts: kept and valid blocks of its sparse calls, those calls, those of them whose output is not
# finite, then dense calls by reason
_KEPT, _VALID, _SPARSE, _NOT_FINITE, _DENSE = 0, 1, 2, 3, 4
_COLUMN = {reason: _DENSE + index for index, reason in enumerate(REASONS)}
_WIDTH = _DENSE + len(REASONS)


class LayerCounts:
    """Counts of one layer since its model's current step began, int64 `[columns]` on the layer's device.

    A tensor, because a number kept in Python would make torch.compile trace every call anew.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        # a tensor made in inference mode could not be counted up outside of it
        with torch.inference_mode(False):
            # on the CPU, since a model may be attached under torch.device("meta")
            self.values = torch.zeros(_WIDTH, dtype=torch.int64, device="cpu")

    def place(self, device: torch.device) -> None:
        """Move to the device that the counted calls run on."""
        if self.values.device != device:
            with torch.inference_mode(False):
                # to a GPU without waiting for it; what comes from one has to be there
                self.values = self.values.to(device, non_blocking=device.type != "cpu")

    def add_sparse(self, kept: Tensor, valid: Tensor) -> None:
        """Count a sparse call: kept and valid blocks, int64 0-d, on the device."""
        self.values[_KEPT].add_(kept)
        self.values[_VALID].add_(valid)
        self.values[_SPARSE].add_(1)

    def note_not_finite(self, output: Tensor) -> None:
        """Note on the device whether the output of a sparse call has NaN or inf, in one pass over it."""
        # Such a value makes the sum NaN or inf. A sum that overflows, of values near 1e30, only costs a dense pass.
        self.values[_NOT_FINITE].add_(output.sum(dtype=torch.float32).isfinite().logical_not())

    def add_dense(self, reason: str) -> None:
        """Count a dense call."""
        self.values[_COLUMN[reason]].add_(1)


class ModelCounts:
    """Counts of one model's layers, one row of totals a denoising step."""

    def __init__(self, names: Sequence[str]) -> None:
        self.layers = [LayerCounts(name) for name in names]
        self._step = 0
        self._totals: dict[int, Tensor] = {}

    def begin_forward(self, step: int, device: torch.device) -> None:
        """A forward of this step starts, with its inputs on this device."""
        for layer in self.layers:
            layer.place(device)
        if step != self._step:
            self._fold()
            self._step = step

    def not_finite(self) -> Tensor:
        """How many sparse calls of the present step gave NaN or inf: int64 0-d, on the device of the first layer."""
        counts = [layer.values[_NOT_FINITE] for layer in self.layers]
        return torch.stack([count.to(counts[0].device) for count in counts]).sum()

    def forget_not_finite(self) -> None:
        """Those calls are dealt with."""
        with torch.inference_mode(False), torch.no_grad():
            for layer in self.layers:
                layer.values[_NOT_FINITE].zero_()

    def reset(self) -> None:
        """Forget all counts."""
        self._fold()
        self._totals.clear()

    def table(self) -> dict[int, list[list[int]]]:
        """`[layers][columns]` by step. Waits for the device."""
        self._fold()
        return {step: totals.tolist() for step, totals in sorted(self._totals.items())}

    def _fold(self) -> None:
        """Move the layers' counts to the totals of the current step, without waiting for the device."""
        with torch.inference_mode(False), torch.no_grad():
            values = [layer.values for layer in self.layers]
            counts = torch.stack([value.to(values[0].device) for value in values])
            before = self._totals.get(self._step)
            self._totals[self._step] = counts if before is None else before.to(counts.device) + counts
            for value in values:
                value.zero_()


class ResidualUse:
    """Memory that the residuals of one processor's layers hold.

    Attributes:
        peak: the most bytes since the statistics began.
        without: sparse calls that had no residual because it did not fit.
    """

    # Left free beside what the run is known to need, as a share of a GPU's memory.
    MARGIN = 0.04

    def __init__(self) -> None:
        # by the memory of a layer, held weakly: a model that is dropped frees its residuals and tells nobody
        self._held: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.peak = self.without = 0
        # the most bytes since torch's own peak began, and that peak of each device as it was last
        self._most = 0
        self._peaks: dict[torch.device, int] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ResidualUse:
        # what is held belongs to the original
        copied = memo[id(self)] = ResidualUse()
        return copied

    @property
    def held(self) -> int:
        """Bytes that are set aside now."""
        return sum(self._held.values())

    def held_by(self, holder: Any) -> int:
        """Bytes that are set aside for this one."""
        return self._held.get(holder, 0)

    def take(self, holder: Any, size: int, device: torch.device, most_mib: int | None) -> bool:
        """Set `size` more bytes aside, if they fit under the bound in MiB and into what the device has left."""
        held = self.held
        if most_mib is not None and held + size > most_mib << 20:
            return False
        if device.type == "cuda" and size > self._room(device, held):
            return False
        self._held[holder] = self.held_by(holder) + size
        self.peak = max(self.peak, held + size)
        self._most = max(self._most, self.peak)
        return True

    def give(self, holder: Any) -> None:
        """Give back all that this one holds."""
        self._held.pop(holder, None)

    def reset(self) -> None:
        """Start the statistics over."""
        self.peak, self.without = self.held, 0

    def _room(self, device: torch.device, held: int) -> float:
        """Bytes of a GPU that neither other programs nor the most memory of this run so far need."""
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        peak = torch.cuda.max_memory_allocated(device)
        if peak < self._peaks.get(device, 0):
            # someone has started torch's peak over: it holds no earlier residuals
            self._most = held
        self._peaks[device] = peak
        # what earlier residuals took is in torch's peak, and free again
        needed = max(peak - self._most, 0) + held
        return free + reserved - needed - self.MARGIN * total


class ForwardTimes:
    """Seconds that forwards of a model took, by kind: `"dense"`, `"refresh"` and `"sparse"`.

    A forward is sparse where one of its attention calls is.
    """

    # A median needs no more of them, and a service runs for months.
    MOST = 1000

    def __init__(self) -> None:
        self._seconds: dict[str, deque[float]] = {
            kind: deque(maxlen=self.MOST) for kind in ("dense", "refresh", "sparse")
        }

    def add(self, kind: str, seconds: float) -> None:
        """One more forward of this kind."""
        self._seconds[kind].append(seconds)

    def reset(self) -> None:
        """Forget all of them."""
        for seconds in self._seconds.values():
            seconds.clear()

    def medians(self) -> dict[str, float]:
        """The median by kind, for the kinds of which there are any."""
        return {kind: statistics.median(seconds) for kind, seconds in self._seconds.items() if seconds}


class AttentionStats:
    """Density and dense calls of everything that one processor is attached to.

    A Python prompt and a notebook show the main numbers, `table()` shows the densities of all layers and steps, and
    `summary()` has everything as a dict. All three wait for the device.

    Attributes:
        residual: the memory of residuals.
        times: how long forwards took, as far as the host knows: on a GPU it waits for sparse forwards alone.
    """

    # Lines of the reasons for dense calls in what a prompt shows.
    _MOST_REASONS = 5

    def __init__(self) -> None:
        self._models: list[ModelCounts] = []
        self.residual = ResidualUse()
        self.times = ForwardTimes()

    def __repr__(self) -> str:
        return repr(self._main_numbers())

    def _repr_html_(self) -> str:
        return self._main_numbers()._repr_html_()

    def _main_numbers(self) -> Table:
        summary = self.summary()
        calls, sparse = summary["calls"], summary["sparse_density"]
        rows = [("calls", str(calls)), ("sparse calls", str(summary["sparse_calls"]))]
        reasons = sorted(summary["dense_calls"].items(), key=lambda entry: -entry[1])
        rows += [(f"dense calls: {reason}", str(number)) for reason, number in reasons[: self._MOST_REASONS]]
        if others := reasons[self._MOST_REASONS :]:
            rows.append(("dense calls: other reasons", str(sum(number for _, number in others))))
        rows += [
            ("density, all calls", _percent(summary["density"]) if calls else "unknown"),
            ("density, sparse calls", "none" if sparse is None else _percent(sparse)),
        ]
        if medians := self.times.medians():
            rows.append(("seconds per forward", ", ".join(f"{kind} {value:.3g}" for kind, value in medians.items())))
        return Table(("attention", ""), rows)

    def table(self) -> Table:
        """The density of each layer (rows) in each step (columns); an empty cell had no call. Waits for the device.

        A Python prompt prints the table, a notebook shows it, and `table().rows` has its cells.
        """
        summary = self.summary()
        steps = list(summary["density_by_step"])
        rows = [
            (layer, *(_percent(by_step[step]) if step in by_step else "" for step in steps))
            for layer, by_step in summary["density_by_layer_and_step"].items()
        ]
        if rows:
            rows.append(("all layers", *(_percent(summary["density_by_step"][step]) for step in steps)))
        return Table(("layer", *(f"step {step}" for step in steps)), rows)

    def add_model(self, names: Sequence[str]) -> ModelCounts:
        """Counts for the layers of one more model."""
        self._models.append(ModelCounts(names))
        return self._models[-1]

    def reset(self) -> None:
        """Forget all counts, for instance before the next video."""
        for model in self._models:
            model.reset()
        self.residual.reset()
        self.times.reset()

    def summary(self) -> dict[str, Any]:
        """What the calls so far did. Waits for the device.

        Returns:
            A JSON-ready dict. `calls` is `sparse_calls` plus the sum of `dense_calls`, a dict from reason to
            number. Densities are means over calls of kept / valid blocks: `density` counts a dense call as 1 (1.0
            before any call), `sparse_density` is over sparse calls alone (None without any), `density_by_step` (by
            step of a generation), `density_by_layer` (by layer name) and `density_by_layer_and_step` (by both, steps
            without a call left out) count dense calls as 1. A refresh of the residual is a dense call.
            `residual_bytes` is the most memory that residuals took, and `calls_without_residual` counts the sparse
            calls that had none because it did not fit.
        """
        total = _Mean()
        by_step: dict[int, _Mean] = {}
        by_layer: dict[str, _Mean] = {}
        by_both: dict[str, dict[int, _Mean]] = {}
        for model in self._models:
            for step, rows in model.table().items():
                for layer, row in zip(model.layers, rows, strict=True):
                    for mean in (
                        total,
                        by_step.setdefault(step, _Mean()),
                        by_layer.setdefault(layer.name, _Mean()),
                        by_both.setdefault(layer.name, {}).setdefault(step, _Mean()),
                    ):
                        mean.add(row)
        return {
            "calls": total.calls,
            "sparse_calls": total.sparse,
            "dense_calls": {reason: number for reason, number in total.dense.items() if number},
            "density": total.density,
            "sparse_density": total.sparse_density,
            "density_by_step": {step: mean.density for step, mean in sorted(by_step.items()) if mean.calls},
            "density_by_layer": {name: mean.density for name, mean in by_layer.items() if mean.calls},
            "density_by_layer_and_step": {
                name: {step: mean.density for step, mean in sorted(steps.items()) if mean.calls}
                for name, steps in by_both.items()
                if by_layer[name].calls
            },
            "residual_bytes": self.residual.peak,
            "calls_without_residual": self.residual.without,
        }


def _percent(share: float) -> str:
    return f"{share:.1%}"


class _Mean:
    """Calls and mean density over rows of counts."""

    def __init__(self) -> None:
        self.sparse = 0
        self.dense = dict.fromkeys(REASONS, 0)
        self._sparse_sum = 0.0

    def add(self, row: Sequence[int]) -> None:
        self.sparse += row[_SPARSE]
        # a call in which every key is padding keeps all of its no blocks
        self._sparse_sum += row[_SPARSE] * (row[_KEPT] / row[_VALID] if row[_VALID] else 1.0)
        for reason, column in _COLUMN.items():
            self.dense[reason] += row[column]

    @property
    def calls(self) -> int:
        return self.sparse + sum(self.dense.values())

    @property
    def density(self) -> float:
        return (self._sparse_sum + self.calls - self.sparse) / self.calls if self.calls else 1.0

    @property
    def sparse_density(self) -> float | None:
        return self._sparse_sum / self.sparse if self.sparse else None
