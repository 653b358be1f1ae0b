"""cuda_graphs.Graph for the CPU: a function's operators are written down once and run again, by address, without Python."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from prefix_tuning.cuda_graphs import CaptureError

READ_BY_THE_HOST = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
}
MADE_BY_THE_HOST = torch.ops.aten.lift_fresh.default
# Files that read values of CPU tensors alone, where it stops nothing, and that make tensors which stay on the CPU.
READING_CPU_TENSORS = (
    "/prefix_tuning/masks.py",
    "/prefix_tuning/positions.py",
    "/prefix_tuning/prefix_ids.py",
    "/prefix_kernels/",
)
MAKING_CPU_TENSORS = ("/transformers/models/",)


class EmulatedGraph:
    """Stands in for prefix_tuning.cuda_graphs.Graph.

    Of the function's two calls only the first leaves its traces in tensors from before, and floating outputs of the second are
    NaN until a replay writes them; loaded: there is no first one. A replay leaves NaN in what other graphs of its pool have put
    out. What would have the host wait for the device is an error.
    """

    refusal = None  # why nothing can be recorded
    recorded = 0
    replays = 0

    def __init__(
        self, function: Callable[[], Any], pool: list[EmulatedGraph] | None = None, large: bool = True, loaded: bool = False
    ):
        if self.refusal is not None:
            raise CaptureError(self.refusal)
        run, tape = _Tape(), _Tape()
        try:
            if not loaded:
                with run:
                    function()
            with run.undone():
                try:
                    with tape:
                        self.outputs = function()
                finally:
                    tape.undo()
        except RuntimeError as error:
            raise CaptureError(str(error)) from error
        self._operations = tape.operations
        self._written = [tensor for tensor in _tensors(self.outputs) if _storage(tensor) in tape.own]
        self._forget()
        self.pool = [] if pool is None else pool
        self.pool.append(self)
        type(self).recorded += 1

    def replay(self) -> None:
        type(self).replays += 1
        for graph in self.pool:
            graph._forget()
        with torch.no_grad():
            for operator, args, kwargs, results in self._operations:
                for kept, new in zip(results, _tensors(operator(*args, **kwargs)), strict=True):
                    if _storage(kept) != _storage(new):
                        kept.copy_(new)

    def _forget(self) -> None:
        for tensor in self._written:
            if tensor.is_floating_point():
                tensor.detach().fill_(torch.nan)


class _NothingIsRead(TorchDispatchMode):
    """RuntimeError where the host would wait for a GPU."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in READ_BY_THE_HOST or operator is MADE_BY_THE_HOST:
            files = [frame.filename for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
            caller = [file for file in files if not file.endswith("/emulated_graphs.py")][-1]
            allowed = MAKING_CPU_TENSORS if operator is MADE_BY_THE_HOST else READING_CPU_TENSORS
            if not any(file in caller for file in allowed):
                raise RuntimeError(f"{caller} has the host wait for the device: {operator}")
        return operator(*args, **kwargs or {})


class _Tape(_NothingIsRead):
    """Writes down the operators that run within, and what they overwrite of tensors from before."""

    def __init__(self):
        super().__init__()
        self.operations: list[tuple[Callable, tuple, dict, list]] = []
        self.own: set[int] = set()  # storages that are made within; kept alive by the operations
        self._overwritten: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for value, argument in _given(operator, args, kwargs):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(value):
                    self._save(tensor)
        before = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        given = _as_they_are((args, kwargs))
        results = super().__torch_dispatch__(operator, types, args, kwargs)
        made = _tensors(_as_they_are(results))
        self.own.update(_storage(tensor) for tensor in made if _storage(tensor) not in before)
        self.operations.append((operator, *given, made))
        return results

    def undo(self) -> None:
        """Tensors from before are as they were."""
        for tensor, values in self._overwritten.values():
            tensor.untyped_storage().copy_(values)

    @contextmanager
    def undone(self) -> Iterator[None]:
        now = [(tensor, tensor.untyped_storage().clone()) for tensor, _ in self._overwritten.values()]
        self.undo()
        try:
            yield
        finally:
            for tensor, values in now:
                tensor.untyped_storage().copy_(values)

    def _save(self, tensor: Tensor) -> None:
        if _storage(tensor) not in self.own:
            self._overwritten.setdefault(_storage(tensor), (tensor, tensor.untyped_storage().clone()))


def _given(operator, args: tuple, kwargs: dict):
    """The values that are given, each with the argument of the operator's schema."""
    arguments = operator._schema.arguments
    yield from zip(args, arguments, strict=False)
    yield from ((kwargs[argument.name], argument) for argument in arguments if argument.name in kwargs)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _as_they_are(values: Any) -> Any:
    """The same with tensors whose shapes stay what they are now."""
    return tree_map_only(Tensor, Tensor.detach, values)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
