"""What memcheck and racecheck say of a kernel on a GPU, said of it in Triton's interpreter.

While a kernel runs, every element that a program reads or writes must belong to a tensor that was handed to it (the
gaps of a strided view do not), and no program may touch what another program of the same launch writes: programs run in
any order, so that their results would depend on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

NOBODY, SEVERAL = -1, -2


class BadAccess(AssertionError):
    """An element outside every tensor, or one that two programs share."""


class _Watched:
    """A tensor of a launch: which elements of its extent are its own, and which programs read and wrote them."""

    def __init__(self, tensor: Tensor) -> None:
        extent = 1 + sum((size - 1) * abs(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        own = torch.zeros(extent if tensor.numel() else 0, dtype=torch.bool)
        if tensor.numel():
            own.as_strided(tensor.shape, tensor.stride()).fill_(True)
        self.begin, self.item = tensor.data_ptr(), tensor.element_size()
        self.own = own.numpy()
        self.readers = np.full(own.shape, NOBODY)
        self.writers = np.full(own.shape, NOBODY)

    def find(self, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which addresses are elements of this tensor, and the elements of those."""
        offsets = addresses.astype(np.int64) - self.begin
        elements = offsets // self.item
        inside = (elements >= 0) & (elements < len(self.own)) & (offsets % self.item == 0)
        inside[inside] = self.own[elements[inside]]
        return inside, elements[inside]


class _Launch:
    def __init__(self, name: str, values: Any) -> None:
        self.name = name
        tensors = (getattr(value, "base", value) for value in values)
        self.watched = [_Watched(tensor) for tensor in tensors if isinstance(tensor, Tensor)]

    def touch(self, addresses: Any, mask: Any, program: int, writes: bool) -> None:
        addresses, mask = np.broadcast_arrays(addresses, mask)
        wanted = addresses[mask.astype(bool)]
        known = np.zeros(wanted.shape, dtype=bool)
        for tensor in self.watched:
            inside, elements = tensor.find(wanted)
            known |= inside
            if not _alone(tensor.writers[elements], program):
                raise BadAccess(f"{self.name}: program {program} touches what another one wrote")
            if writes and not _alone(tensor.readers[elements], program):
                raise BadAccess(f"{self.name}: program {program} writes what another one read")
            seen = tensor.writers if writes else tensor.readers
            seen[elements] = np.where(_alone_each(seen[elements], program), program, SEVERAL)
        if not known.all():
            done = "writes" if writes else "reads"
            raise BadAccess(f"{self.name}: program {program} {done} {int((~known).sum())} elements of no tensor")


def _alone_each(programs: np.ndarray, program: int) -> np.ndarray:
    return (programs == NOBODY) | (programs == program)


def _alone(programs: np.ndarray, program: int) -> bool:
    return bool(_alone_each(programs, program).all())


@contextlib.contextmanager
def checked_memory() -> Iterator[list[int]]:
    """Every launch inside is checked; yields a list that gets the elements which each access touched.

    A launch that is wrong raises `triton.runtime.errors.InterpreterError`, which names `BadAccess`.
    """
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__
    launches: list[_Launch] = []
    touched: list[int] = []

    def touch(self: Any, addresses: Any, mask: Any, writes: bool) -> None:
        (x, y, z), (_, height, depth) = self.grid_idx, self.grid_dim
        # some versions of Triton have the mask of a descriptor as an array
        flags = np.asarray(mask.data)
        launches[-1].touch(addresses.data, flags, (x * height + y) * depth + z, writes)
        touched.append(int(flags.sum()))

    def checked_load(self: Any, addresses: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        touch(self, addresses, mask, writes=False)
        return load(self, addresses, mask, *rest, **named)

    def checked_store(self: Any, addresses: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        touch(self, addresses, mask, writes=True)
        return store(self, addresses, value, mask, *rest, **named)

    def checked_call(self: Any, *args: Any, **named: Any) -> Any:
        launches.append(_Launch(self.fn.__name__, [*args, *named.values()]))
        try:
            return call(self, *args, **named)
        finally:
            launches.pop()

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    executor.__call__ = checked_call
    try:
        yield touched
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        executor.__call__ = call
