"""Run the source of a Gluon kernel for Hopper on a CPU, and fail where its partitions break the protocol between them.

`load_kernels` executes the source text of a module with stand-ins for `triton.experimental.gluon`, so it is the
kernel's own code that runs, also code that a test has changed. `launch` runs one of its kernels over a grid.

How a program is run:

- Each partition of `warp_specialize` is a thread, but only one thread runs at a time. At every operation on a barrier,
  on shared memory or on the tensor cores it stops, and a random generator with a given seed chooses which partition
  goes on, or which copy delivers its next piece. Partitions and copies get very different speeds, drawn for each
  program, so that some are late nearly always. A seed always gives the same run.
- An mbarrier counts arrivals and bytes, and a phase ends when both counts are complete.
- A copy of the tensor memory accelerator (TMA) fills its tile with NaN at first, and delivers the content later, in two
  pieces.
- A product of tensor cores (wgmma) reads shared memory until `warpgroup_mma_wait` has waited for it.
- No clock is involved: if no partition can go on and no copy is pending, that is a deadlock.

What fails, always with a subclass of `ProtocolError`:

- Deadlock: the message says which partition waits for which barrier, and what the barrier misses.
- BarrierError: more arrivals than a barrier's count, more bytes than it expects, or a barrier that was not initialised.
- Race: a copy or a store writes a tile that a product still reads or a copy still fills; a product or a load reads a
  tile that a copy still fills; a result is used before its product was waited for; a program ends with copies or
  products in flight.
- MissingFence: a copy or a product uses a barrier or a tile that was written by plain stores, and the partition that
  wrote it has not called `fence_async_shared` since.
- OutOfBounds: an address outside the elements of the tensor that was given, or an index outside shared memory.

Everything else shows as a wrong result: outputs should be poisoned, and shared memory begins as NaN.

What cannot be caught here, because it is not part of what is run:

- Layouts, swizzling and bank conflicts. Layouts are ignored, so two that do not fit together run as if they did.
- Everything that the compiler decides: PTX and machine code, registers, the order of instructions, fences that the
  compiler adds. A kernel that runs here may not compile.
- The threads of one partition, which are one thread here: a missing `gl.barrier` between them, or an arrival of one
  thread before the others are done.
- The memory model below whole operations: what a partition does between two of the operations above happens at once.
  A missing fence is seen only between plain stores and the asynchronous units, not between plain loads of a tile and a
  copy that overwrites it.
- A mistake that the rest of the protocol makes harmless in every order of events, such as a stage that is released
  early while the producer waits for another barrier that is released late enough.
- Overflow of the hardware's counters, clusters of several blocks, and several programs that run at the same time.
- Rounding inside the tensor cores: products are computed in float32 by torch.
- A scalar of a wider type does not widen a tile, as in torch (int32 tile + int64 scalar is int32).
- NaN is never lost here: `maximum` and `max` return NaN where the GPU may return the other operand.
"""

from __future__ import annotations

import builtins
import inspect
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

# what a masked-out element of an integer load reads as: an index that no test has
_GARBAGE = 2**30

# the name under which the kernel's module keeps the lines of its source
_SOURCE = "_source_lines"

_here = threading.local()


class ProtocolError(Exception):
    """The kernel breaks a rule that the hardware does not check."""


class Deadlock(ProtocolError):
    """Every partition waits, and no copy is pending."""


class BarrierError(ProtocolError):
    """A barrier gets what it does not expect."""


class Race(ProtocolError):
    """Two operations use a tile at the same time, or a result is used before it is there."""


class MissingFence(ProtocolError):
    """The asynchronous units may not see what plain stores have written."""


class OutOfBounds(ProtocolError):
    """An address or an index outside the memory that it belongs to."""


class _Stopped(BaseException):
    """Ends the thread of a partition after another one has failed."""


# ---- scheduling ----


def _closed_lock() -> threading.Lock:
    """A lock that one thread waits for and another one opens."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class Partition:
    """One partition of a program: a thread that runs only when the program gives it the turn."""

    def __init__(self, program: Program, name: str, call: Callable[[], Any]) -> None:
        self.program, self.name, self.call = program, name, call
        self.speed = program.draw_speed()
        self.finished = False
        self.error: BaseException | None = None
        # asynchronous products that were not waited for, oldest first
        self.products: list[Product] = []
        # what this partition wrote by plain stores since its last fence
        self.unfenced: list[SharedMemory | Barrier] = []
        self.condition: Callable[[], bool] = lambda: True
        self.waits_for: Callable[[], str] = lambda: "nothing"
        self._turn = _closed_lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def ready(self) -> bool:
        return not self.finished and self.condition()

    def advance(self) -> None:
        """Let the partition run until its next operation. Called by the program."""
        self._turn.release()
        self.program.control.acquire()
        if self.error is not None:
            raise self.error

    def pause(self) -> None:
        """Give the turn back. Called by the partition."""
        self.program.control.release()
        self._turn.acquire()
        if self.program.stopped:
            raise _Stopped

    def wait(self, condition: Callable[[], bool], waits_for: Callable[[], str]) -> None:
        """Give the turn back until the condition holds. `waits_for` describes it in the report of a deadlock."""
        self.condition, self.waits_for = condition, waits_for
        self.pause()
        self.condition = lambda: True

    def end(self) -> None:
        self._turn.release()
        self._thread.join()

    def _run(self) -> None:
        _here.partition = self
        self._turn.acquire()
        try:
            if not self.program.stopped:
                self.call()
                if self.products:
                    raise Race(f"{self.name} ends while {len(self.products)} of its products are in flight")
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.finished = True
        if not self.program.stopped:
            self.program.control.release()


class Program:
    """One program of the grid."""

    def __init__(self, index: tuple[int, ...], grid: tuple[int, ...], generator: random.Random) -> None:
        self.index, self.grid, self.generator = index, grid, generator
        self.control = _closed_lock()
        self.stopped = False
        self.partitions: list[Partition] = []
        self.copies: list[Copy] = []
        self.copy_speed = self.draw_speed()

    def draw_speed(self) -> float:
        # with less spread than this, mistakes that need one late partition show in fewer runs
        return 10.0 ** self.generator.uniform(-4, 0)

    def run(self, kernel: Callable[[], Any]) -> None:
        self.partitions.append(Partition(self, "the kernel", kernel))
        try:
            while not all(partition.finished for partition in self.partitions):
                self._step()
            if self.copies:
                raise Race(f"the program ends while {len(self.copies)} of its copies are in flight")
        finally:
            self.stopped = True
            for partition in self.partitions:
                partition.end()

    def _step(self) -> None:
        choices = [*(partition for partition in self.partitions if partition.ready()), *self.copies]
        if not choices:
            waiting = [p for p in self.partitions if not p.finished]
            raise Deadlock("; ".join(f"{p.name} waits for {p.waits_for()}" for p in waiting))
        self.generator.choices(choices, [choice.speed for choice in choices])[0].advance()


def _partition() -> Partition:
    """The partition that runs, after it has given the others a chance to run first."""
    partition: Partition = _here.partition
    partition.pause()
    return partition


def _place() -> str:
    """The line of the kernel's source that is being executed."""
    frame = sys._getframe(1)
    while _SOURCE not in frame.f_globals:
        assert frame.f_back is not None
        frame = frame.f_back
    return f"line {frame.f_lineno} `{frame.f_globals[_SOURCE][frame.f_lineno - 1].strip()}`"


# ---- values, pointers and shared memory ----


class Value(torch.Tensor):
    """A scalar or a tile in registers: integers divide as in C, and `x += y` makes a new value."""

    def __floordiv__(self, other: Any) -> Tensor:
        return torch.div(self, other, rounding_mode="trunc")

    def __mod__(self, other: Any) -> Tensor:
        return torch.fmod(self, other)

    def __iadd__(self, other: Any) -> Tensor:
        return self + other

    def __isub__(self, other: Any) -> Tensor:
        return self - other

    def __imul__(self, other: Any) -> Tensor:
        return self * other


def _value(content: Any, dtype: torch.dtype | None = None) -> Any:
    return torch.as_tensor(content, dtype=dtype).as_subclass(Value)


class Pointer:
    """Addresses of elements of one tensor, as offsets from its first element."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)
        items = tensor.untyped_storage().nbytes() // tensor.element_size()
        self.memory = tensor.as_strided((items,), (1,), 0)
        # the gaps of a strided view are not the kernel's
        self.own = torch.zeros(items, dtype=torch.bool)
        self.own.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        self.offsets: Any = torch.tensor(tensor.storage_offset())

    def __add__(self, offsets: Any) -> Pointer:
        moved = object.__new__(Pointer)
        moved.__dict__.update(self.__dict__, offsets=self.offsets + offsets)
        return moved

    __radd__ = __add__

    def __sub__(self, offsets: Any) -> Pointer:
        return self + -offsets

    def elements(self, mask: Tensor) -> Tensor:
        """The offsets where the mask is true, all of which must belong to the tensor."""
        wanted = torch.as_tensor(self.offsets).broadcast_to(mask.shape)[mask].long()
        inside = (wanted >= 0) & (wanted < len(self.own))
        if not (inside.all() and self.own[wanted].all()):
            raise OutOfBounds(f"{_place()}: an address outside the tensor's {int(self.own.sum())} elements")
        return wanted


class Descriptor:
    """A tensor descriptor: a tensor of up to five dimensions and the shape of the blocks that are copied from it."""

    def __init__(self, host: TensorDescriptor) -> None:
        self.tensor = host.base.as_strided(host.shape, host.strides, host.base.storage_offset())
        self.block_shape = list(host.block_shape)
        self.dtype, self.layout = host.base.dtype, host.layout
        size = self.dtype.itemsize
        for length in self.block_shape:
            size *= length
        self.block_type = SimpleNamespace(shape=self.block_shape, element_ty=self.dtype, nbytes=size)
        self.nbytes_per_cta = size

    def read(self, coordinates: Sequence[Any]) -> Tensor:
        """A block; what lies outside the tensor reads as zero."""
        if len(coordinates) != self.tensor.ndim:
            raise OutOfBounds(f"{_place()}: {len(coordinates)} coordinates for {self.tensor.ndim} dimensions")
        block = torch.zeros(self.block_shape, dtype=self.dtype)
        source, target = [], []
        for start, length, size in zip(map(int, coordinates), self.block_shape, self.tensor.shape, strict=True):
            first, last = min(max(start, 0), size), max(min(start + length, size), 0)
            source.append(slice(first, max(first, last)))
            target.append(slice(first - start, max(first, last) - start) if first < last else slice(0, 0))
        block[tuple(target)] = self.tensor[tuple(source)]
        return block


class SharedMemory:
    """A tile of shared memory, or a view of one.

    Beside its content it knows for each element whether a copy is filling it, how many products are reading it, and
    whether a plain store has written it without a fence. A view of the tile is a view of all four.
    """

    def __init__(self, content: Tensor, filling: Tensor, readers: Tensor, unfenced: Tensor) -> None:
        self.content, self.filling, self.readers, self.unfenced = content, filling, readers, unfenced

    @classmethod
    def allocate(cls, shape: Sequence[int], dtype: torch.dtype) -> SharedMemory:
        content = torch.full(shape, torch.nan if dtype.is_floating_point else _GARBAGE, dtype=dtype)
        flags = torch.zeros(shape, dtype=torch.bool)
        return cls(content, flags, torch.zeros(shape, dtype=torch.int16), flags.clone())

    def _view(self, view: Callable[[Tensor], Tensor]) -> SharedMemory:
        return SharedMemory(view(self.content), view(self.filling), view(self.readers), view(self.unfenced))

    @property
    def shape(self) -> list[int]:
        return list(self.content.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.content.dtype

    def index(self, index: Any) -> SharedMemory:
        place = _checked_index(index, self.shape[0])
        return self._view(lambda tensor: tensor[place])

    def slice(self, start: Any, length: Any, dim: int = 0) -> SharedMemory:
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise OutOfBounds(f"{_place()}: slice {int(start)}:{int(start + length)} of {self.shape[dim]}")
        return self._view(lambda tensor: tensor.narrow(dim, int(start), int(length)))

    def permute(self, order: Sequence[int]) -> SharedMemory:
        return self._view(lambda tensor: tensor.permute(*order))

    def reshape(self, shape: Sequence[int]) -> SharedMemory:
        return self._view(lambda tensor: tensor.view(*shape))

    def load(self, layout: Any = None) -> Any:
        _partition()
        self.check_not_filling("a load reads")
        return _value(self.content.clone())

    def store(self, value: Tensor) -> None:
        partition = _partition()
        self.check_not_filling("a store writes")
        self.check_not_read("a store writes")
        if list(value.shape) != self.shape:
            raise OutOfBounds(f"{_place()}: a store of {list(value.shape)} to a tile of {self.shape}")
        self.content.copy_(value)
        self.unfenced.fill_(True)
        partition.unfenced.append(self)

    def fence(self) -> None:
        self.unfenced.fill_(False)

    def check_not_filling(self, action: str) -> None:
        if self.filling.any():
            raise Race(f"{_place()}: {action} a tile that a copy is filling")

    def check_not_read(self, action: str) -> None:
        if self.readers.any():
            raise Race(f"{_place()}: {action} a tile that a product is reading")

    def check_fenced(self, action: str) -> None:
        if self.unfenced.any():
            raise MissingFence(f"{_place()}: {action} a tile that was stored without fence_async_shared")


def _checked_index(index: Any, length: int) -> int:
    number = int(index)
    if not 0 <= number < length:
        raise OutOfBounds(f"{_place()}: index {number} of {length}")
    return number


# ---- barriers ----


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all expected bytes are there."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.fenced = False
        self.phase = 0
        self.missing_arrivals = 0
        self.missing_bytes = 0

    def init(self, count: int) -> None:
        self.count = self.missing_arrivals = count

    def fence(self) -> None:
        self.fenced = True

    def check_initialised(self) -> None:
        if not self.count:
            raise BarrierError(f"{_place()}: {self.name} is not initialised")

    def arrive(self, count: int) -> None:
        self.check_initialised()
        self.missing_arrivals -= count
        if self.missing_arrivals < 0:
            raise BarrierError(f"{_place()}: {self.name} gets more than its {self.count} arrivals")
        self._end_phase()

    def expect(self, size: int) -> None:
        """Expect bytes, and arrive once."""
        self.missing_bytes += size
        self.arrive(1)

    def deliver(self, size: int, place: str) -> None:
        """A copy that was started at a place of the source has delivered bytes."""
        self.missing_bytes -= size
        if self.missing_bytes < 0:
            raise BarrierError(f"{place}: {self.name} gets {-self.missing_bytes} bytes that it does not expect")
        self._end_phase()

    def _end_phase(self) -> None:
        if not self.missing_arrivals and not self.missing_bytes:
            self.phase += 1
            self.missing_arrivals = self.count

    def passed(self, parity: int) -> bool:
        """Whether the phase of this parity has ended, as far as a single bit can tell."""
        return self.phase % 2 != parity

    def __str__(self) -> str:
        return (
            f"{self.name} (in phase {self.phase}, {self.missing_arrivals} of {self.count} arrivals and "
            f"{self.missing_bytes} bytes missing)"
        )


class BarrierArray:
    """The barriers of one allocation, [count, 1], or a single one of them, [1]."""

    def __init__(self, barriers: list[Barrier], shape: list[int]) -> None:
        self.barriers, self.shape = barriers, shape

    def index(self, index: Any) -> BarrierArray:
        return BarrierArray([self.barriers[_checked_index(index, self.shape[0])]], self.shape[1:])

    @property
    def single(self) -> Barrier:
        (barrier,) = self.barriers
        return barrier


_MBARRIER_LAYOUT = object()


def _init(barrier: BarrierArray, count: int) -> None:
    barrier.single.init(count)
    _partition().unfenced.append(barrier.single)


def _arrive(barrier: BarrierArray, *, count: int = 1, pred: Any = True) -> None:
    _partition()
    if pred:
        barrier.single.arrive(count)


def _expect(barrier: BarrierArray, bytes_per_cta: int, pred: Any = True) -> None:
    _partition()
    if pred:
        barrier.single.expect(int(bytes_per_cta))


def _wait(barrier: BarrierArray, phase: Any, pred: Any = True, deps: Sequence[Any] = ()) -> None:
    partition = _partition()
    if pred:
        waited, parity, place = barrier.single, int(phase), _place()
        waited.check_initialised()
        partition.wait(lambda: waited.passed(parity), lambda: f"parity {parity} of {waited} at {place}")


# ---- asynchronous copies and products ----


class Copy:
    """A copy in flight: it delivers two pieces of its tile, each at a time of its own."""

    def __init__(self, program: Program, content: Tensor, barrier: Barrier, target: SharedMemory) -> None:
        target.check_not_filling("a copy writes")
        target.check_not_read("a copy writes")
        target.check_fenced("a copy writes")
        barrier.check_initialised()
        if not barrier.fenced:
            raise MissingFence(f"{_place()}: a copy uses {barrier.name}, initialised without a fence")
        if list(content.shape) != target.shape:
            raise OutOfBounds(f"{_place()}: a block of {list(content.shape)} to a tile of {target.shape}")
        target.content.fill_(torch.nan)
        target.filling.fill_(True)
        self.program, self.barrier, self.place = program, barrier, _place()
        self.speed = program.copy_speed * program.draw_speed()
        dim = max(range(content.ndim), key=lambda dim: content.shape[dim])
        cut = program.generator.randrange(1, content.shape[dim])
        pieces = [cut, content.shape[dim] - cut]
        parts = (target.content, target.filling, content)
        self.pieces = list(zip(*(part.split(pieces, dim) for part in parts), strict=True))

    def advance(self) -> None:
        """Deliver a piece."""
        target, filling, content = self.pieces.pop()
        target.copy_(content)
        filling.fill_(False)
        if not self.pieces:
            self.program.copies.remove(self)
        self.barrier.deliver(content.numel() * content.element_size(), self.place)


def _copy_to_shared(
    descriptor: Descriptor, coordinates: Sequence[Any], barrier: BarrierArray, result: SharedMemory, pred: Any = True
) -> None:
    partition = _partition()
    if pred:
        content = descriptor.read(coordinates)
        partition.program.copies.append(Copy(partition.program, content, barrier.single, result))


class Product:
    """An asynchronous product of the tensor cores. It reads its operands until it is waited for."""

    def __init__(self, left: SharedMemory | Tensor, right: SharedMemory, base: Tensor | Product | None) -> None:
        self.left, self.right, self.base = left, right, base
        for operand in self._shared():
            operand.check_not_filling("a product reads")
            operand.check_fenced("a product reads")
            operand.readers.add_(1)
        self.place = _place()

    def _shared(self) -> list[SharedMemory]:
        return [operand for operand in (self.left, self.right) if isinstance(operand, SharedMemory)]

    def finish(self) -> None:
        left = self.left.content if isinstance(self.left, SharedMemory) else self.left
        if left.dtype != self.right.dtype:
            raise TypeError(f"{self.place}: a product of {left.dtype} and {self.right.dtype}")
        product = left.float() @ self.right.content.float()
        base = self.base.result if isinstance(self.base, Product) else self.base
        if base is not None:
            if base.shape != product.shape:
                raise TypeError(f"{self.place}: a product {list(product.shape)} added to {list(base.shape)}")
            product = product + base
        self.result = _value(product)
        for operand in self._shared():
            operand.readers.sub_(1)

    def __getattr__(self, name: str) -> Any:
        raise Race(f"{_place()}: the product of {self.place} is used before it was waited for")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Race(f"{_place()}: a product is used before it was waited for")


def _product(
    a: SharedMemory | Tensor,
    b: SharedMemory,
    acc: Tensor | Product,
    *,
    use_acc: Any = True,
    precision: Any = None,
    max_num_imprecise_acc: Any = None,
    is_async: bool = False,
) -> Any:
    partition = _partition()
    product = Product(a, b, acc if use_acc else None)
    partition.products.append(product)
    return product if is_async else _wait_for_products(0, (product,))


def _wait_for_products(num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
    """Finish the oldest products; of `deps`, those that are finished become their results."""
    partition = _partition()
    while len(partition.products) > num_outstanding:
        partition.products.pop(0).finish()
    results = tuple(_result(value, partition) for value in deps)
    return results[0] if len(results) == 1 else results


def _result(value: Any, partition: Partition) -> Any:
    in_flight = not isinstance(value, Product) or any(value is product for product in partition.products)
    return value if in_flight else value.result


def _fence() -> None:
    partition = _partition()
    while partition.unfenced:
        partition.unfenced.pop().fence()


# ---- the language ----


class _Constexpr(int):
    """`gl.constexpr`, which a kernel's module uses for integers."""

    @property
    def value(self) -> int:
        return int(self)


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: Any, value: Tensor | None = None) -> Any:
    sizes = [int(size) for size in shape]
    if layout is _MBARRIER_LAYOUT:
        number = sizes[0] if len(sizes) == 2 else 1
        return BarrierArray([Barrier(f"barrier {i}") for i in range(number)], sizes)
    memory = SharedMemory.allocate(sizes, dtype)
    if value is not None:
        memory.store(value)
    return memory


def _warp_specialize(
    functions_and_args: Sequence[tuple[Callable[..., Any], Sequence[Any]]],
    worker_num_warps: Sequence[int],
    worker_num_regs: Sequence[int] | None = None,
) -> Any:
    """Run the first function in the partition that calls, the others in partitions of their own."""
    if len(worker_num_warps) != len(functions_and_args) - 1:
        raise ValueError(f"{len(functions_and_args)} partitions, warps for {len(worker_num_warps)} workers")
    caller = _partition()
    program = caller.program
    (first, first_args), *rest = functions_and_args
    workers = []
    for number, (function, args) in enumerate(rest, 1):
        name = f"partition {number} ({function.__name__})"
        workers.append(Partition(program, name, lambda function=function, args=args: function(*args)))
    program.partitions.extend(workers)
    outer, caller.name = caller.name, f"partition 0 ({first.__name__})"
    result = first(*first_args)
    caller.wait(lambda: all(worker.finished for worker in workers), lambda: "the other partitions")
    caller.name = outer
    return result


def _range(*bounds: Any) -> Iterator[Any]:
    """`range` for a kernel's source: in a kernel it yields int32 scalars."""
    numbers = builtins.range(*(int(bound) for bound in bounds))
    return (_value(number, torch.int32) for number in numbers) if hasattr(_here, "partition") else iter(numbers)


def _load(pointer: Pointer, mask: Any = None, other: Any = None) -> Any:
    shape = torch.as_tensor(pointer.offsets).shape
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else torch.as_tensor(mask).broadcast_to(shape)
    if other is None:
        other = torch.nan if pointer.memory.is_floating_point() else _GARBAGE
    loaded = torch.full(
        shape, float(other) if pointer.memory.is_floating_point() else other, dtype=pointer.memory.dtype
    )
    loaded[mask] = pointer.memory[pointer.elements(mask)]
    return _value(loaded)


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    shape = torch.as_tensor(pointer.offsets).shape
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else torch.as_tensor(mask).broadcast_to(shape)
    values = torch.as_tensor(value).broadcast_to(shape)
    pointer.memory[pointer.elements(mask)] = values[mask].to(pointer.memory.dtype)


def _both(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    """A function of two tensors that takes numbers too: a number gets the type of the other operand."""

    def apply(one: Any, other: Any) -> Any:
        dtype = next((value.dtype for value in (one, other) if isinstance(value, Tensor)), None)
        one, other = (v if isinstance(v, Tensor) else _value(v, dtype) for v in (one, other))
        return _value(function(one, other))

    return apply


def _where(condition: Any, one: Any, other: Any) -> Any:
    return _both(lambda a, b: torch.where(torch.as_tensor(condition), a, b))(one, other)


def _static_assert(condition: Any, message: str = "") -> None:
    assert condition, message


def _jit(function: Any = None, **options: Any) -> Any:
    return function if function is not None else _jit


def _ignored(*args: Any, **named: Any) -> None:
    """A layout: nothing here depends on it."""


class TensorDescriptor:
    """The descriptor that a launcher makes, with the rules of the hardware for addresses and strides."""

    def __init__(
        self, base: Tensor, shape: Sequence[int], strides: Sequence[int], block_shape: Sequence[int], layout: Any
    ) -> None:
        self.base, self.shape, self.strides = base, list(shape), list(strides)
        self.block_shape, self.layout = list(block_shape), layout
        size = base.element_size()
        if not len(self.shape) == len(self.strides) == len(self.block_shape) <= 5:
            raise ValueError(f"one to five dimensions, all alike, got {shape}, {strides}, {block_shape}")
        if base.data_ptr() % 16 or any(stride * size % 16 for stride in self.strides[:-1]) or self.strides[-1] != 1:
            raise ValueError(f"addresses must be multiples of 16 bytes and the last stride 1, got strides {strides}")

    @classmethod
    def from_tensor(cls, tensor: Tensor, block_shape: Sequence[int], layout: Any) -> TensorDescriptor:
        return cls(tensor, tensor.shape, tensor.stride(), block_shape, layout)


_LANGUAGE = SimpleNamespace(
    constexpr=_Constexpr,
    int1=torch.bool,
    int32=torch.int32,
    int64=torch.int64,
    float16=torch.float16,
    bfloat16=torch.bfloat16,
    float32=torch.float32,
    NVMMADistributedLayout=_ignored,
    NVMMASharedLayout=SimpleNamespace(get_default_for=_ignored),
    DotOperandLayout=_ignored,
    SliceLayout=_ignored,
    BlockedLayout=_ignored,
    program_id=lambda axis: _value(_here.partition.program.index[axis], torch.int32),
    num_programs=lambda axis: _value(_here.partition.program.grid[axis], torch.int32),
    allocate_shared_memory=_allocate,
    warp_specialize=_warp_specialize,
    # a partition is one thread here, so its threads need no barrier between them
    num_warps=lambda: 4,
    barrier=lambda: None,
    static_range=builtins.range,
    static_assert=_static_assert,
    arange=lambda start, end, layout=None: _value(torch.arange(start, end, dtype=torch.int32)),
    zeros=lambda shape, dtype, layout=None: _value(torch.zeros(shape, dtype=dtype)),
    full=lambda shape, value, dtype, layout=None: _value(torch.full(shape, value, dtype=dtype)),
    convert_layout=lambda value, layout, assert_trivial=False: value,
    load=_load,
    store=_store,
    where=_where,
    maximum=_both(torch.maximum),
    minimum=_both(torch.minimum),
    max=lambda value, axis: value.amax(axis),
    sum=lambda value, axis: value.sum(axis),
    exp2=torch.exp2,
    log2=torch.log2,
)
_HOPPER = SimpleNamespace(
    fence_async_shared=_fence,
    mbarrier=SimpleNamespace(
        MBarrierLayout=lambda: _MBARRIER_LAYOUT, init=_init, arrive=_arrive, expect=_expect, wait=_wait
    ),
    tma=SimpleNamespace(async_copy_global_to_shared=_copy_to_shared),
    warpgroup_mma=_product,
    warpgroup_mma_wait=_wait_for_products,
)
_GLUON = "triton.experimental.gluon"
_STAND_INS: dict[str, Any] = {
    "triton.experimental": SimpleNamespace(gluon=SimpleNamespace(jit=_jit, language=_LANGUAGE)),
    _GLUON: SimpleNamespace(jit=_jit, language=_LANGUAGE),
    f"{_GLUON}.language": _LANGUAGE,
    f"{_GLUON}.language.nvidia.hopper": _HOPPER,
    f"{_GLUON}.nvidia.hopper": SimpleNamespace(TensorDescriptor=TensorDescriptor),
}


# ---- loading and launching ----


def _import(name: str, globals_: Any = None, locals_: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    if level == 0 and name.startswith("triton.experimental"):
        if not fromlist or name not in _STAND_INS:
            raise ImportError(f"the executor knows `from ... import ...` of {', '.join(_STAND_INS)}, got {name}")
        return _STAND_INS[name]
    return builtins.__import__(name, globals_, locals_, fromlist, level)


def load_kernels(source: str, name: str) -> dict[str, Any]:
    """Execute the source text of a module and return its names.

    `name` is the module's full name, for its relative imports. Only the module's own imports of Gluon get the
    stand-ins: `sys.modules` and a real Triton stay as they are.
    """
    namespace = {
        "__name__": name,
        "__package__": name.rpartition(".")[0],
        _SOURCE: source.splitlines(),
        "__builtins__": {**vars(builtins), "__import__": _import, "range": _range},
    }
    exec(compile(source, f"<{name} on a CPU>", "exec"), namespace)
    return namespace


def launch(kernel: Callable[..., Any], grid: Sequence[int], arguments: Mapping[str, Any], *, seed: int) -> None:
    """Run every program of the grid, one after the other.

    arguments: what the kernel is launched with; tensors become pointers, and what the kernel does not annotate as a
    constexpr becomes a scalar of 32 bits (64 for a large integer). What is no parameter of the kernel is taken for an
    option of the compiler and ignored. Raises `ProtocolError`.
    """
    parameters = inspect.signature(kernel).parameters
    values = {
        argument: _argument(value, parameters[argument].annotation)
        for argument, value in arguments.items()
        if argument in parameters
    }
    sizes = (*grid, 1, 1)[:3]
    programs = [(x, y, z) for z in range(sizes[2]) for y in range(sizes[1]) for x in range(sizes[0])]
    for index in programs:
        Program(index, sizes, random.Random(f"{seed} {index}")).run(lambda: kernel(**values))


def _argument(value: Any, annotation: Any) -> Any:
    if annotation is _Constexpr or annotation == "gl.constexpr" or value is None:
        return value
    if isinstance(value, TensorDescriptor):
        return Descriptor(value)
    if isinstance(value, Tensor):
        return Pointer(value)
    if isinstance(value, float):
        return _value(value, torch.float32)
    return _value(value, torch.int32 if abs(value) < 2**31 else torch.int64)
