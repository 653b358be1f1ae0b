"""Runs a Gluon kernel's own Python code on the CPU, one program after another: what its warps tell each other is real.

The functions of the kernel's module are made anew from their source, with this file's `gl`, `mbarrier`, `tma` and products in
place of Gluon's. Each partition of a program is a thread, of which one runs at a time; which one, and when a TMA load lands, a
seeded generator chooses at every step. Barriers count arrivals and bytes, and a program that cannot go on is a Deadlock.
Shared memory is NaN until a load has landed. A product reads its tiles twice, when it is issued and when it is waited for, and
they must be the same; its result is NaN until then. A TMA store needs a fence before it and happens when it is waited for.

Not emulated: layouts, swizzling, registers, memory ordering between threads but that fence.
"""

from __future__ import annotations

import functools
import inspect
import random
import textwrap
import threading
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from triton.experimental.gluon import language
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LANDING = 0.1  # the chance that a load lands while a partition can go on


class Deadlock(AssertionError):
    """No partition can go on, and no load is on its way."""


class Value(np.ndarray):
    """A tensor in registers, or a scalar: an array without dimensions."""

    def to(self, dtype: torch.dtype) -> Value:
        if dtype.is_floating_point:
            return value(torch.from_numpy(np.array(self, dtype=np.float32)).to(dtype).float().numpy())
        return value(np.array(self).astype(torch.empty(0, dtype=dtype).numpy().dtype))


def value(data) -> Value:
    return np.asarray(data).view(Value)


class Partition(threading.Thread):
    """A thread that runs when it is told to, until it gives control back."""

    def __init__(self, schedule: Schedule, function, arguments):
        super().__init__(daemon=True)
        self.schedule, self.function, self.arguments = schedule, function, arguments
        self.turn, self.ready, self.done, self.error = threading.Semaphore(0), lambda: True, False, None
        self.products, self.stores, self.unfenced = [], [], False

    def run(self) -> None:
        self.turn.acquire()
        try:
            with np.errstate(all="ignore"):
                self.function(*self.arguments)
            assert not self.products and not self.stores, "a partition ends before what it started"
        except BaseException as error:
            self.error = error
        self.done = True
        self.schedule.control.release()

    def pause(self, ready=lambda: True) -> None:
        """Gives control back until chosen again, not before `ready`."""
        self.ready = ready
        self.schedule.control.release()
        self.turn.acquire()
        if self.schedule.abandoned:
            raise SystemExit


class Schedule:
    """Who runs next."""

    def __init__(self, generator: random.Random):
        self.generator, self.control = generator, threading.Semaphore(0)
        self.loads, self.abandoned = [], False

    def run(self, functions) -> None:
        partitions = [Partition(self, *each) for each in functions]
        for partition in partitions:
            partition.start()
        try:
            while living := [partition for partition in partitions if not partition.done]:
                able = [partition for partition in living if partition.ready()]
                if self.loads and (not able or self.generator.random() < LANDING):
                    self.loads.pop(self.generator.randrange(len(self.loads)))()
                elif able:
                    chosen = self.generator.choice(able)
                    self.resume(chosen)
                    if chosen.error is not None:
                        raise chosen.error
                else:
                    raise Deadlock(f"{len(living)} partitions wait for each other")
        finally:
            self.abandoned = True
            for partition in partitions:
                if not partition.done:
                    self.resume(partition)

    def resume(self, partition: Partition) -> None:
        partition.turn.release()
        self.control.acquire()


class Barrier:
    """An mbarrier: its phase flips when all arrivals and all bytes of the phase have come."""

    def init(self, count: int) -> None:
        self.count, self.missing, self.bytes, self.phase = count, count, 0, 0

    def change(self, arrivals: int, more: int) -> None:
        self.missing, self.bytes = self.missing - arrivals, self.bytes + more
        assert self.missing >= 0, "more arrivals than the barrier counts"
        if self.missing == 0 and self.bytes == 0:
            self.missing, self.phase = self.count, self.phase ^ 1


class Shared:
    """A tile in shared memory, or several; or barriers."""

    def __init__(self, array: np.ndarray, dtype: torch.dtype):
        self.array, self.dtype, self.shape = array, dtype, array.shape

    def index(self, i):
        assert 0 <= int(i) < self.shape[0]
        part = self.array[int(i)]
        return part if isinstance(part, Barrier) else Shared(part, self.dtype)

    def reshape(self, shape) -> Shared:
        array = self.array.reshape(shape)
        assert np.shares_memory(array, self.array)
        return Shared(array, self.dtype)

    def permute(self, order) -> Shared:
        return Shared(self.array.transpose(order), self.dtype)

    def load(self, layout) -> Value:
        return value(np.array(self.array))

    def store(self, data: Value) -> None:
        partition = threading.current_thread()
        assert not partition.products, "a tile is written while a product may read it"
        partition.unfenced = True
        self.array[...] = data


class Pointer:
    """An address in a torch tensor's memory, or a tensor of addresses."""

    def __init__(self, memory: torch.Tensor, offset):
        self.memory, self.offset = memory, offset

    def __add__(self, offset) -> Pointer:
        return Pointer(self.memory, self.offset + np.asarray(offset))


class Descriptor:
    """A tensor descriptor over a torch tensor's memory; addresses wrap around 2^64 as on the device."""

    def __init__(self, real: TensorDescriptor):
        self.real, self.memory, self.dtype, self.layout = real, memory_of(real.base), real.base.dtype, None
        size = real.base.element_size() * int(np.prod(real.block_shape))
        self.block_type = SimpleNamespace(shape=list(real.block_shape), nbytes=size)

    def box(self, coordinates) -> tuple[np.ndarray, np.ndarray]:
        """(which elements of a block exist, and where in the memory those are)."""
        exists, address = np.ones((), dtype=bool), np.zeros((), dtype=np.uint64)
        width = np.uint64(self.real.base.element_size())
        for axis, (start, size, length, stride) in enumerate(
            zip(coordinates, self.real.block_shape, self.real.shape, self.real.strides, strict=True)
        ):
            assert -(2**31) <= int(start) < 2**31
            at = int(start) + np.arange(size, dtype=np.int64).reshape([-1 if i == axis else 1 for i in range(5)])
            exists = exists & (at >= 0) & (at < length)
            address = address + at.astype(np.uint64) * (np.uint64(stride) * width)
        elements = address[exists].view(np.int64) // int(width) + self.real.base.storage_offset()
        assert not elements.size or (elements.min() >= 0 and elements.max() < len(self.memory)), "outside the tensor's memory"
        return exists, elements


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """All of the storage that a tensor lies in."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def tma_load(descriptor: Descriptor, coordinates, full: Barrier, tile: Shared, pred=True) -> None:
    if not pred:
        return
    tile.array[...] = np.nan

    def land():
        exists, elements = descriptor.box(coordinates)
        tile.array[...] = 0
        tile.array[exists] = descriptor.memory[torch.from_numpy(elements)].float().numpy()
        full.change(0, -descriptor.block_type.nbytes)

    partition = threading.current_thread()
    partition.schedule.loads.append(land)
    partition.pause()


def tma_store(descriptor: Descriptor, coordinates, tile: Shared) -> None:
    partition = threading.current_thread()
    assert not partition.unfenced, "TMA would not see what was written to the tile"

    def land():
        exists, elements = descriptor.box(coordinates)
        descriptor.memory[torch.from_numpy(elements)] = torch.from_numpy(tile.array[exists]).to(descriptor.dtype)

    partition.stores.append(land)


def store_wait(pending: int) -> None:
    partition = threading.current_thread()
    while len(partition.stores) > pending:
        partition.stores.pop(0)()


def fence_async_shared() -> None:
    threading.current_thread().unfenced = False


def warpgroup_mma(a, b: Shared, accumulator: Value, use_acc=True, is_async=False) -> Value:
    def operands() -> list[np.ndarray]:
        return [np.array(x.array if isinstance(x, Shared) else x, dtype=np.float64) for x in (a, b)]

    issued, result = operands(), value(np.full(accumulator.shape, np.nan, np.float32))

    def retire():
        for before, now in zip(issued, operands(), strict=True):
            assert np.array_equal(before, now, equal_nan=True), "a tile changes while a product may read it"
        result[...] = issued[0] @ issued[1] + (accumulator if use_acc else 0)

    threading.current_thread().products.append(retire)
    if not is_async:
        warpgroup_mma_wait(0, ())
    return result


def warpgroup_mma_wait(pending: int, deps):
    partition = threading.current_thread()
    partition.pause()
    while len(partition.products) > pending:
        partition.products.pop(0)()
    return deps[0] if len(deps) == 1 else tuple(deps)


def wait(barrier: Barrier, phase, pred=True) -> None:
    """Until the phase of this parity is over; one that is two phases late waits again, as on the device."""
    if pred:
        threading.current_thread().pause(lambda: barrier.phase != int(phase) & 1)


def arrive(barrier: Barrier, count: int = 1) -> None:
    barrier.change(count, 0)
    threading.current_thread().pause()


def allocate_shared_memory(dtype: torch.dtype, shape, layout) -> Shared:
    if dtype != torch.int64:
        return Shared(np.full(shape, np.nan, np.float32), dtype)
    barriers = np.empty(shape[:1], dtype=object)
    barriers[:] = [Barrier() for _ in range(shape[0])]
    return Shared(barriers, dtype)


def load(pointer: Pointer, mask: Value | None = None, other: float | None = None) -> Value:
    if mask is None:
        return value(pointer.memory[int(pointer.offset)].numpy())
    result = np.full(mask.shape, other, np.float32)
    result[np.asarray(mask)] = pointer.memory[torch.from_numpy(np.asarray(pointer.offset)[np.asarray(mask)])].float().numpy()
    return value(result)


def store(pointer: Pointer, data: Value, mask: Value) -> None:
    elements = torch.from_numpy(np.asarray(pointer.offset)[np.asarray(mask)])
    assert not elements.numel() or 0 <= elements.min() <= elements.max() < len(pointer.memory), "outside the tensor's memory"
    pointer.memory[elements] = torch.from_numpy(np.asarray(data)[np.asarray(mask)]).to(pointer.memory.dtype)


def on_values(function):
    return lambda *arguments: value(function(*(np.asarray(argument) for argument in arguments)))


def no_layout(*arguments) -> None:
    return None


GL = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int32": torch.int32, "int64": torch.int64,
    "constexpr": lambda constant: constant, "static_range": range, "NVMMADistributedLayout": no_layout,
    "DotOperandLayout": no_layout, "SliceLayout": no_layout, "BlockedLayout": no_layout, "SwizzledSharedLayout": no_layout,
    "allocate_shared_memory": allocate_shared_memory,
    "arange": lambda start, stop, layout: value(np.arange(start, stop)),
    "full": lambda shape, fill, dtype, layout: value(np.full(shape, fill, np.float32)),
    "zeros": lambda shape, dtype, layout: value(np.zeros(shape, np.float32)),
    "expand_dims": lambda tensor, axis: value(np.expand_dims(tensor, axis)),
    "convert_layout": lambda tensor, layout, assert_trivial: tensor,
    "where": lambda condition, a, b: value(np.where(condition, a, b).astype(np.result_type(a))),
    "max": lambda tensor, axis: value(np.max(np.asarray(tensor), axis)),
    "sum": lambda tensor, axis: value(np.sum(np.asarray(tensor), axis)),
    "maximum": on_values(np.maximum), "minimum": on_values(np.minimum), "exp2": on_values(np.exp2), "log2": on_values(np.log2),
    "cdiv": lambda a, b: value(-(-np.asarray(a) // b)),
    "load": load, "store": store,
}  # fmt: skip


def functions_of(module: ModuleType) -> list[GluonJITFunction]:
    """The functions that a module names, and those of other modules that these call."""
    found = {name: v for name, v in vars(module).items() if isinstance(v, GluonJITFunction)}
    left = list(found.values())
    while left:
        function = left.pop().fn
        for name in function.__code__.co_names:
            called = function.__globals__.get(name)
            if isinstance(called, GluonJITFunction) and name not in found:
                found[name] = called
                left.append(called)
    return list(found.values())


class EmulatedKernel:
    """kernel[grid](…) of a module on CPU tensors. change: (old, new) in the source, to see that the emulator notices."""

    def __init__(self, module: ModuleType, name: str, change: tuple[str, str] | None = None, seed: int = 0):
        self.generator, self.programs = random.Random(seed), 0
        gl = SimpleNamespace(
            **GL, program_id=lambda axis: value(self.program), num_programs=lambda axis: value(self.grid[axis]),
            warp_specialize=self.warp_specialize,
        )  # fmt: skip
        functions = functions_of(module)
        self.namespace = {"range": lambda *ends: map(value, range(*map(int, ends)))}
        for names in (*(function.fn.__globals__ for function in functions), vars(module)):
            self.namespace |= {n: v.value if isinstance(v, language.constexpr) else v for n, v in names.items()}
        self.namespace |= {
            "gl": gl, "tma_load": tma_load, "tma_store": tma_store, "tma": SimpleNamespace(store_wait=store_wait),
            "fence_async_shared": fence_async_shared, "warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait,
            "mbarrier": SimpleNamespace(
                MBarrierLayout=no_layout, init=lambda barrier, count: barrier.init(count), wait=wait, arrive=arrive,
                expect=lambda barrier, size: barrier.change(1, size),
            ),
        }  # fmt: skip
        sources = [textwrap.dedent(inspect.getsource(function.fn)) for function in functions]
        assert change is None or sum(source.count(change[0]) for source in sources) == 1, f"not once in the source: {change[0]}"
        for source in sources:
            source = source[source.index("def ") :]
            exec(source.replace(*change) if change else source, self.namespace)
        self.kernel = self.namespace[name]
        self.arg_names = tuple(inspect.signature(self.kernel).parameters)

    def __getitem__(self, grid):
        return functools.partial(self.run, grid)

    def run(self, grid, *arguments, **options) -> None:
        signature = inspect.signature(self.kernel)
        given = signature.bind(*arguments, **{name: each for name, each in options.items() if name in signature.parameters})
        for name, each in given.arguments.items():
            if signature.parameters[name].annotation is inspect.Parameter.empty:  # no constexpr
                given.arguments[name] = self.argument(each)
        self.grid = grid
        for self.program in range(grid[0]):
            self.kernel(*given.args)
        self.programs += grid[0]

    def argument(self, given):
        if isinstance(given, TensorDescriptor):
            return Descriptor(given)
        if isinstance(given, torch.Tensor):
            return Pointer(memory_of(given), value(given.storage_offset()))
        return given if given is None else value(np.float32(given) if isinstance(given, float) else np.int64(given))

    def warp_specialize(self, functions, warps, registers) -> None:
        assert len(functions) == 1 + len(warps) == 1 + len(registers)
        Schedule(self.generator).run(functions)
