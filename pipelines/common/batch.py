"""Many items, one after the other: one that fails is written down with its reason, and the others are still done."""

from __future__ import annotations

import contextlib
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.errors import UserError, one_line
from xattn_video_pipelines.common.run_file import note_run
from xattn_video_pipelines.common.terminal import say

FAILURES, PLAN = "failures.jsonl", "plan.jsonl"
# The exit code of a run in which an item failed.
SOME_FAILED = 3

# After so many failures in a row of a kind that no item can cause, the next item would fail too.
_IN_A_ROW = 3
_NO_ITEMS_FAULT = {"device": "the device", "output": "writing"}
_OUT_OF_MEMORY = re.compile(r"out of memory|DefaultCPUAllocator|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)
_DEVICE = re.compile(
    r"\b(CUDA|HIP|cuDNN|MIOpen|NCCL)( driver| runtime)? error|\b(CU|HIP)(BLAS|DNN|SOLVER|SPARSE|FFT)_|Triton Error|"
    r"UR_RESULT_ERROR|device-side assert",
    re.IGNORECASE,
)
_COMPLAINT = "not a line of this program; remove it, or use another --out"

T = TypeVar("T")
# (attention, id, seed); None where a program has no such thing.
Key = tuple[str | None, str, int | None]


class ItemError(UserError):
    """An item failed, and this program knows of which kind the failure is: the words are those of `kind_of`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class SomeFailed(UserError):
    """Not all items are there: some failed, or the time was over. `failures` are the rows of `failures.jsonl`."""

    def __init__(self, message: str, failures: Sequence[jsonl.Row]) -> None:
        super().__init__(message)
        self.failures = list(failures)


def kind_of(error: BaseException) -> str:
    """One word for what went wrong.

    Returns:
        `input`: a file of the item is missing or damaged, or the model refuses it. `not_finite`: the result has NaN or
        inf. `out_of_memory`. `device`: a GPU or its libraries failed. `output`: the result cannot be written. `error`:
        anything else.
    """
    import torch

    if isinstance(error, ItemError):
        return error.kind
    if isinstance(error, UserError):
        return "input"
    if is_out_of_memory(error):
        return "out_of_memory"
    if isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and _DEVICE.search(str(error))):
        return "device"
    return "error"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the CPU, had too little memory. A CPU says so with a plain RuntimeError."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


class Batch:
    """One run over many items.

    Args:
        folder: where `failures.jsonl` is written; None for a run that writes nothing.
        what: what the items are called in messages, such as `videos`.
        versions: of the packages, which a failure notes.
        max_hours: no item is begun that would likely end later than so many hours from now.

    Attributes:
        failed: the failures of this run, as they are in the file.
        left: the items that were not tried, because the run stopped.
        stopped: why it stopped, or None.
    """

    def __init__(self, folder: Path | None, what: str, versions: jsonl.Row, max_hours: float | None) -> None:
        self._path = None if folder is None else folder / FAILURES
        self._what, self._versions, self._max_hours = what, versions, max_hours
        self._started = time.monotonic()
        self._seconds: list[float] = []
        self._row: list[str] = []
        self.failed: list[jsonl.Row] = []
        self.left: list[Any] = []
        self.stopped: str | None = None

    @property
    def code(self) -> int:
        """The exit code of the run: 3 if an item failed, else 0."""
        return SOME_FAILED if self.failed else 0

    def in_order(self, waiting: Iterable[T], key: Callable[[T], Key]) -> list[T]:
        """The items, those that failed in an earlier run last."""
        failed = {} if self._path is None else read_failures(self._path.parent)
        return sorted(waiting, key=lambda item: key(item) in failed)

    def items(self, waiting: Sequence[T]) -> Iterator[T]:
        """Each item in turn, until the run has to stop."""
        for place, item in enumerate(waiting):
            if self.stopped is None and self._too_late():
                self.stopped = f"the time of --max-hours {self._max_hours:g} does not suffice for another one"
            if self.stopped is not None:
                self.left = list(waiting[place:])
                return
            yield item

    @contextlib.contextmanager
    def item(self, key: Key, name: str) -> Iterator[None]:
        """Work on one item: an exception in it, but no Ctrl-C, is noted as the item's failure and goes no further.

        Raises:
            ModuleNotFoundError: a package is missing, which no item causes.
            UserError: the failure cannot be written down.
        """
        started = time.monotonic()
        try:
            yield
        except ModuleNotFoundError:
            raise
        except Exception as error:
            self.note(key, name, error)
        else:
            self._seconds.append(time.monotonic() - started)
            self._row.clear()

    def note(self, key: Key, name: str, error: Exception) -> None:
        """An item failed: write it down, say it on stderr, and decide whether the run goes on. Raises UserError."""
        kind = kind_of(error)
        # a failure of a library may have no text
        message = one_line(error, 500) or type(error).__name__
        if not isinstance(error, UserError):
            message = f"{type(error).__name__}: {message}"
        attention, identity, seed = key
        row = {
            "attention": attention, "id": identity, "seed": seed, "name": name, "kind": kind, "message": message,
            "traceback": "".join(traceback.format_exception(error)), "versions": self._versions,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        self.failed.append(row)
        if self._path is not None:
            jsonl.append(self._path, [row])
        say(f"{name} failed: {kind}: {message}", sys.stderr)
        self._row = [*self._row, kind] if kind in self._row[-1:] else [kind]
        if kind in _NO_ITEMS_FAULT and len(self._row) == _IN_A_ROW:
            cause = _NO_ITEMS_FAULT[kind]
            self.stopped = f"{_IN_A_ROW} {self._what} in a row failed because of {cause}, not of themselves"

    def told(self) -> list[str]:
        """What a person must know at the end of the run, in lines: what failed and why, and what is left."""
        lines = []
        if self.failed:
            where = "" if self._path is None else f"; {self._path} has the tracebacks"
            lines.append(f"{self._what} that failed: {len(self.failed)}{where}")
            lines += [f"  {row['name']}: {row['kind']}: {row['message']}" for row in self.failed]
        if self.stopped is not None:
            lines.append(f"stopped: {self.stopped}; {self._what} left: {len(self.left)}")
        if lines and self._path is not None:
            lines.append("run the same command again for what is left" + (" or failed" if self.failed else ""))
        return lines

    def brief(self) -> list[jsonl.Row]:
        """What failed and why, for a program's JSON document."""
        return [{name: row[name] for name in ("attention", "id", "seed", "kind", "message")} for row in self.failed]

    def check(self) -> None:
        """Raise SomeFailed unless all items are done."""
        if self.failed or self.left:
            raise SomeFailed("; ".join(line.strip() for line in self.told()), self.failed)

    def _too_late(self) -> bool:
        if self._max_hours is None:
            return False
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else 0.0
        return time.monotonic() - self._started + mean > self._max_hours * 3600


def read_failures(folder: Path) -> dict[Key, jsonl.Row]:
    """The last failure of each item of a folder, also of items that were made since.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    failures: dict[Key, jsonl.Row] = {}
    for place, row in jsonl.read(folder / FAILURES, _COMPLAINT):
        attention, identity, seed = row.get("attention"), row.get("id"), row.get("seed")
        words = isinstance(identity, str) and all(isinstance(row.get(name), str) for name in ("name", "kind"))
        if not (words and isinstance(attention, str | None) and _is_seed(seed) and isinstance(row.get("message"), str)):
            raise UserError(f"{place}: {_COMPLAINT}")
        failures[attention, str(identity), seed] = row
    return failures


def note_plan(folder: Path, of: str, attention: Sequence[str], items: Sequence[tuple[str, int | None]]) -> None:
    """Write down what a run is going to make, so that `xattn-video status` can tell what is left, and its settings.

    Args:
        folder: that of the run's outputs.
        of: `videos` or `answers`.
        attention: the names of the configurations; each item is made with each of them.
        items: id and seed of each item; answers have no seed.

    Raises:
        UserError: the file cannot be read or written.
    """
    row: jsonl.Row = {"of": of, "attention": list(attention), "items": [list(item) for item in items]}
    if row not in [known for _, known in jsonl.read(folder / PLAN, _COMPLAINT)]:
        jsonl.append(folder / PLAN, [row])
    note_run(folder)


def read_plan(folder: Path) -> dict[str, dict[Key, None]]:
    """Everything that the runs into a folder were to make, in order, by `videos` and `answers`.

    Raises:
        UserError: there is no plan, or it holds something else.
    """
    if not (folder / PLAN).is_file():
        raise UserError(f"{folder}: no {PLAN} in it; give the --out folder of xattn-video generate, sweep or qa")
    plan: dict[str, dict[Key, None]] = {"videos": {}, "answers": {}}
    for place, row in jsonl.read(folder / PLAN, _COMPLAINT):
        keys = _planned(row)
        if keys is None or row.get("of") not in list(plan):
            raise UserError(f"{place}: {_COMPLAINT}")
        plan[row["of"]] |= dict.fromkeys(keys)
    return plan


def _planned(row: jsonl.Row) -> list[Key] | None:
    """The keys of a row of the plan; None where it is no such row."""
    labels, items = row.get("attention"), row.get("items")
    if not (isinstance(labels, list) and isinstance(items, list) and all(map(_is_name, labels))):
        return None
    if not all(isinstance(item, list) and len(item) == 2 and _is_item(*item) for item in items):
        return None
    return [(label, identity, seed) for label in labels for identity, seed in items]


def _is_name(label: Any) -> bool:
    """Whether it can be the name of a folder, and leads nowhere else."""
    return isinstance(label, str) and label not in ("", ".", "..") and not set("/\\\0") & set(label)


def _is_item(identity: Any, seed: Any) -> bool:
    return isinstance(identity, str) and _is_seed(seed)


def _is_seed(seed: Any) -> bool:
    return seed is None or (isinstance(seed, int) and not isinstance(seed, bool))
