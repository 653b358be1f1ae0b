"""Triton kernels that leave something compiled behind, as on a GPU; launched, that runs in the interpreter from addresses."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from prefix_kernels.backends.triton import backward_kernels, decode_kernel, dkeys_kernels, dq_kernel, forward_kernel, launch
from prefix_kernels.backends.triton.rows import Rows, Tokens

KERNELS = {
    forward_kernel: ("forward_kernel",),
    decode_kernel: ("decode_kernel", "merge_kernel"),
    backward_kernels: ("delta_kernel", "sum_splits_kernel"),
    dq_kernel: ("dq_kernel",),
    dkeys_kernels: ("dkeys_kernel", "dprefix_kernel"),
}


_one_at_a_time = threading.Lock()  # in the interpreter


class Kernel:
    """Stands for a function under @triton.jit."""

    def __init__(self, interpreted: Any):
        self.interpreted, self.arg_names = interpreted, interpreted.arg_names

    def __getitem__(self, grid: tuple[int]):
        def call(**values: Any) -> Compiled:
            _interpret(self.interpreted, grid, values)
            return Compiled(self.interpreted, [_reader_of(values[name]) for name in self.arg_names])

        return call


class Compiled:
    """readers: by argument what makes of its numbers in a launch what the interpreter takes."""

    def __init__(self, interpreted: Any, readers: list[Callable]):
        self.interpreted, self.readers = interpreted, readers

    def __getitem__(self, grid: tuple[int, int, int]):
        def start(*arguments: Any) -> None:
            values = [read(argument) for read, argument in zip(self.readers, arguments, strict=True)]
            _interpret(self.interpreted, grid[:1], dict(zip(self.interpreted.arg_names, values, strict=True)))

        return start


def _interpret(kernel: Any, grid: tuple[int], values: dict[str, Any]) -> None:
    with _one_at_a_time, _disable_current_modes():  # the interpreter's own operators are no part of a call
        kernel[grid](**values)


def _reader_of(value: Any) -> Callable:
    if isinstance(value, Tokens):
        return lambda launched, dtype=value.pointer.dtype: Tokens(_memory(launched[0], dtype), *launched[1:])
    if isinstance(value, Rows):
        dtypes = [None if tensor is None else tensor.dtype for tensor in value]
        return lambda launched: Rows(*map(_memory, launched, dtypes))
    return functools.partial(_memory, dtype=value.dtype) if isinstance(value, Tensor) else lambda launched: launched


def _memory(address: int | None, dtype: torch.dtype | None) -> Tensor | None:
    """The number at an address; the interpreter finds what follows by itself. Empty tensors are nowhere."""
    if not address:
        return None if address is None else torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


def leave_compiled_kernels(monkeypatch) -> None:
    """Under TRITON_INTERPRET=1, the backend finds compiled kernels again for CPU tensors."""
    monkeypatch.setattr(launch, "_compiled", {})
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Kernel(getattr(module, name)))
