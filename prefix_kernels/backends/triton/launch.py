"""From a call to a kernel's arguments. The kernels share the names of their lengths and constants.

Triton's own launch takes the host some 50 µs to find a compiled kernel again: it looks at each of 40 arguments. Here a key of
what Triton may compile separately (dtypes, strides, alignment, what is None) finds it, and Triton is asked for new keys alone.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from operator import itemgetter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import Parameter
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from prefix_kernels.backends.triton import tile_sizes
from prefix_kernels.backends.triton.rows import Operand, bias_of, distances, rows_of, tokens
from prefix_kernels.backends.triton.tile_sizes import Tile
from prefix_kernels.problem import AttentionInputs, AttentionProblem

# Run-time values: another length never compiles a kernel again.
LENGTHS = (
    "batch", "heads", "kv_heads", "q_len", "kv_len", "q_tokens", "k_tokens", "prefixes", "prefix_len", "window", "slide",
)  # fmt: skip

MOST_COMPILED = 4096  # keys that are remembered: shapes whose strides differ have keys of their own
_compiled: dict[Hashable, tuple[Any, Callable, Any]] = {}  # compiled kernel, its arguments in order, and the kernel, kept alive
_NO_CHANGE = nullcontext()
DEPENDENT_LAUNCHES = True  # programmatic ones, from compute capability 9.0 on, where a kernel asks for it


class _Thread(threading.local):
    recorder: Any = None  # is told of each launch, see recorded.py


thread = _Thread()


@triton.jit
def wait_for_launch_before(DEPENDENT: tl.constexpr):
    """Waits until the launch before is done, since a dependent one may begin sooner; then the next may begin."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


def run(
    kernel, programs: int, device: torch.device, key: Hashable, values: Mapping[str, Any], dependent: bool = False,
    **options: Any,
) -> None:  # fmt: skip
    """Launches `programs` programs on a device. values: the kernel's arguments by name, constants too, among others.

    key: differs between any two calls of this kernel for which Triton might compile another one.
    dependent: the kernel calls wait_for_launch_before(DEPENDENT), and DEPENDENT is given here.
    options: of Triton's compiler.
    """
    if dependent:
        early = DEPENDENT_LAUNCHES and device.type != "cpu" and tile_sizes.architecture_of(device) >= 90
        key, values = (key, early), {**values, "DEPENDENT": early}
        if early:
            options["launch_pdl"] = True
    key = id(kernel), device, key
    found = _compiled.get(key)
    with on_device(device):
        if found is not None:
            compiled, in_order, _ = found
            compiled[programs, 1, 1](*map(_addressed, in_order(values)))
        else:
            told = {name: _told(values[name]) for name in kernel.arg_names}
            compiled = kernel[(programs,)](**told, **{"enable_fp_fusion": True, **options})
            if compiled is not None:  # the interpreter compiles nothing
                if len(_compiled) >= MOST_COMPILED:
                    _compiled.clear()
                _compiled[key] = compiled, itemgetter(*kernel.arg_names), kernel
    if thread.recorder is not None:
        thread.recorder.launched(compiled, programs, [values[name] for name in kernel.arg_names])


def _told(value: Any) -> Any:
    """An argument as Triton compiles it."""
    return value.value if type(value) is Operand else value


def _addressed(value: Any) -> Any:
    """An argument with addresses for tensors: a launch asks the driver about each tensor, but takes a number as it is."""
    kind = type(value)
    if kind is Tensor or kind is Parameter:
        return value.data_ptr()
    return value.addressed if kind is Operand else value


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes the host 2 µs, some ten times a call."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest one that is at least n ≥ 1; Triton's own is as slow."""
    return 1 << (n - 1).bit_length()


def key_of(value: Any) -> Hashable:
    """What Triton may look at of an argument. Of a number this is itself: leave out lengths, which are not specialised."""
    if isinstance(value, Operand):
        return value.key
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16
    return value


@functools.lru_cache(maxsize=MOST_COMPILED)
def _numbers(
    problem: AttentionProblem, scale: float, window: int | None, slide: int | None
) -> tuple[dict[str, Any], dict[str, Any], Hashable]:
    """What the kernels take besides tensors: lengths, constants; and the key of what Triton may look at of them."""
    lengths = {
        "batch": problem.batch, "heads": problem.heads, "kv_heads": problem.kv_heads,
        "q_len": problem.q_len, "kv_len": problem.kv_len, "q_tokens": problem.q_tokens, "k_tokens": problem.k_tokens,
        "prefixes": problem.prefixes, "prefix_len": problem.prefix_len, "window": window, "slide": slide,
        "scale": scale, "softcap": problem.softcap,
    }  # fmt: skip
    constants = {
        "CAUSAL": problem.causal, "HEAD_DIM": problem.head_dim, "VALUE_DIM": problem.value_dim,
        "BLOCK_DIM": max(16, next_power_of_2(problem.head_dim)),
        "BLOCK_VALUE_DIM": max(16, next_power_of_2(problem.value_dim)),
    }  # fmt: skip
    key = (
        *constants.values(), window is None, slide is None, type(problem.softcap),
        max(problem.q_tokens, problem.k_tokens) >> 31,
    )  # fmt: skip
    return lengths, constants, key


class Call:
    """One call: its tensors as kernels read them, and the arguments that do not depend on the kernel.

    bias_in_vectors: the kernels read several columns of a bias at a time, BIAS_VECTOR.
    """

    def __init__(self, inputs: AttentionInputs, bias_in_vectors: bool = False):
        problem = inputs.problem()
        self.problem, self.device = problem, inputs.q.device
        self.tensors = (
            *(tokens(tensor, problem.varlen) for tensor in inputs.tensors[:3]), *map(tokens, rounded_prefix(inputs)),
        )  # fmt: skip
        (self.bias, vector), self.rows = bias_of(inputs, bias_in_vectors), rows_of(inputs)
        self.lengths, constants, key = _numbers(problem, inputs.scale, *distances(inputs))
        self.constants = {**constants, "BIAS_VECTOR": vector}
        self.key = key, vector, self.rows.key

    def tile(self, kernel: str) -> Tile:
        """The tile sizes of one kernel for this call."""
        problem = self.problem
        dim = max(problem.head_dim, problem.value_dim)
        return tile_sizes.find(kernel, self.device, problem.dtype, dim, problem.has_bias)

    def query_programs(self, tile: Tile) -> int:
        """One program for each block of queries of each head of each row."""
        return cdiv(self.problem.q_len, tile.BLOCK_M) * self.problem.heads * self.problem.batch

    def launch(
        self, kernel, tile: Tile, programs: int, dependent: bool = False, **arguments: Operand | Tensor | int | None
    ) -> None:
        """Runs `programs` programs of a kernel, or nothing."""
        if programs == 0:
            return
        values = {
            **arguments, "rows": self.rows, **self.lengths, **self.constants, "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N,
        }  # fmt: skip
        key = tile, self.key, tuple(map(key_of, arguments.values()))
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        run(kernel, programs, self.device, key, values, dependent, **options)


def rounded_prefix(inputs: AttentionInputs) -> list[Tensor]:
    """prefix_k and prefix_v in q's dtype: a float32 prefix is rounded once, and not by every block of queries that reads it."""
    prefix, dtype = inputs.tensors[3:], inputs.q.dtype
    if prefix[0].dtype == dtype:
        return list(prefix)
    rounded = [tensor.new_empty(tensor.shape, dtype=dtype) for tensor in prefix]
    for to, source in zip(rounded, prefix, strict=True):  # a _foreach_copy_ of two tensors occupies few multiprocessors
        to.copy_(source)
    return rounded


def on_device(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device: makes it this one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NO_CHANGE
    return torch.cuda.device(device)
