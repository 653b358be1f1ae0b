"""From a call to a kernel's arguments. The kernels share the names of their lengths and constants.

Triton's own launch takes the host some 50 µs to find a compiled kernel again: it looks at each of 40 arguments. Here a key of
what Triton may compile separately (dtypes, strides, alignment, what is None) finds it, and Triton is asked for new keys alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from prefix_kernels.backends.triton import tile_sizes
from prefix_kernels.backends.triton.rows import Tokens, distances, rows_of, tokens
from prefix_kernels.backends.triton.tile_sizes import Tile
from prefix_kernels.problem import AttentionInputs

# Run-time values: another length never compiles a kernel again.
LENGTHS = (
    "batch", "heads", "kv_heads", "q_len", "kv_len", "q_tokens", "k_tokens", "prefixes", "prefix_len", "window", "slide",
)  # fmt: skip

MOST_COMPILED = 4096  # keys that are remembered: shapes whose strides differ have keys of their own
_compiled: dict[Hashable, Any] = {}


def run(kernel, programs: int, device: torch.device, key: Hashable, values: Mapping[str, Any], **options: Any) -> None:
    """Launches `programs` programs on a device. values: all of the kernel's arguments by name, constants too.

    key: differs between any two calls of this kernel for which Triton might compile another one.
    """
    key = kernel, device, key
    compiled = _compiled.get(key)
    with _current(device):
        if compiled is not None:
            compiled[programs, 1, 1](*[values[name] for name in kernel.arg_names])
            return
        compiled = kernel[(programs,)](**values, enable_fp_fusion=True, **options)
    if compiled is not None:  # the interpreter compiles nothing
        if len(_compiled) >= MOST_COMPILED:
            _compiled.clear()
        _compiled[key] = compiled


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes the host 2 µs, some ten times a call."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest one that is at least n ≥ 1; Triton's own is as slow."""
    return 1 << (n - 1).bit_length()


def key_of(value: Any) -> Hashable:
    """What Triton may look at of an argument. Of a number this is itself: leave out lengths, which are not specialised."""
    if isinstance(value, Tokens):
        return value.pointer.dtype, value.pointer.data_ptr() % 16, value.batch, value.head, value.token
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16
    return value


class Call:
    """One call: its tensors as kernels read them, and the arguments that do not depend on the kernel."""

    def __init__(self, inputs: AttentionInputs):
        problem = inputs.problem()
        self.problem, self.device = problem, inputs.q.device
        self.tensors = tuple(tokens(tensor, problem.varlen) for tensor in (inputs.q, inputs.k, inputs.v)) + tuple(
            tokens(tensor.to(problem.dtype)) for tensor in (inputs.prefix_k, inputs.prefix_v)
        )  # a float32 prefix is rounded once, and not by every block of queries that reads it
        self.rows = rows_of(inputs)
        window, slide = distances(inputs)
        self.lengths = {
            "batch": problem.batch, "heads": problem.heads, "kv_heads": problem.kv_heads,
            "q_len": problem.q_len, "kv_len": problem.kv_len, "q_tokens": problem.q_tokens, "k_tokens": problem.k_tokens,
            "prefixes": problem.prefixes, "prefix_len": problem.prefix_len, "window": window, "slide": slide,
            "scale": inputs.scale, "softcap": inputs.softcap,
        }  # fmt: skip
        self.constants = {
            "CAUSAL": problem.causal, "HEAD_DIM": problem.head_dim, "VALUE_DIM": problem.value_dim,
            "BLOCK_DIM": max(16, next_power_of_2(problem.head_dim)),
            "BLOCK_VALUE_DIM": max(16, next_power_of_2(problem.value_dim)),
        }  # fmt: skip
        self.key = (
            *self.constants.values(), *map(key_of, self.rows), window is None, slide is None, type(inputs.softcap),
            max(problem.q_tokens, problem.k_tokens) >> 31,
        )  # fmt: skip

    def tile(self, kernel: str) -> Tile:
        """The tile sizes of one kernel for this call."""
        problem = self.problem
        return tile_sizes.find(kernel, self.device, problem.dtype, max(problem.head_dim, problem.value_dim))

    def launch(self, kernel, tile: Tile, programs: int, **arguments: Tokens | Tensor | int | None) -> None:
        """Runs `programs` programs of a kernel, or nothing."""
        if programs == 0:
            return
        values = {
            **arguments, "rows": self.rows, **self.lengths, **self.constants, "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N,
        }  # fmt: skip
        key = tile, self.key, tuple(map(key_of, arguments.values()))
        run(kernel, programs, self.device, key, values, num_warps=tile.num_warps, num_stages=tile.num_stages)


def _current(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device: makes it this one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
