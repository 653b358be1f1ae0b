"""CUDA graphs: the kernels of a function are recorded once, and a replay launches them all at once.

A model of many small kernels waits for the host, which issues them one by one; a replay costs the host a single launch.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

WITHOUT_EFFECTS = ("transformers", "prefix_tuning", "peft")  # packages whose hooks do all they do by kernels

# Graphs of one pool use the same memory: what one leaves there must be read before another is replayed.
Pool = Any

# Held while kernels are recorded, and from a replay until its outputs are read: other threads may have graphs of that pool.
one_at_a_time = threading.RLock()

_failed: list[torch.cuda.CUDAGraph] = []


class CaptureError(RuntimeError):
    """A function whose kernels cannot be recorded; the message says why."""


class Graph:
    """The recorded kernels of a function, on the current device.

    Args:
        function: called twice, first to load whatever it needs. At every replay its kernels read and write the same tensors; it
            may not wait for the device.
        pool: that of another graph, which is kept.
        large: the memory of the first call is freed before the second one, which is recorded, gets its own.
        loaded: a function like it has run on the device before, so that it is called once, to be recorded.

    Raises CaptureError; the device is then as it was, but the pool cannot be used again.
    """

    def __init__(self, function: Callable[[], Any], pool: Pool | None = None, large: bool = True, loaded: bool = False):
        self.pool = torch.cuda.graph_pool_handle() if pool is None else pool
        self._graph = torch.cuda.CUDAGraph()
        device, before = torch.cuda.current_device(), torch.cuda.current_stream()
        stream = _capture_stream(device)
        with one_at_a_time:
            stream.wait_stream(before)
            try:
                with torch.cuda.stream(stream):
                    if not loaded:
                        function()
                    if large:
                        torch.cuda.empty_cache()
                    self.outputs = self._record(function, device)
            except RuntimeError as error:
                _leave_capture(device)
                raise CaptureError(str(error).splitlines()[0]) from error
            finally:
                before.wait_stream(stream)

    def _record(self, function: Callable[[], Any], device: int) -> Any:
        # thread_local: other threads may do what cannot be recorded, such as pinning the memory of the next batch.
        self._graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        try:
            outputs = function()
        except BaseException:
            with suppress(RuntimeError):  # the one that ended the function says more
                self._end(device)
            raise
        self._end(device)
        return outputs

    def _end(self, device: int) -> None:
        try:
            self._graph.capture_end()
        except RuntimeError:  # then torch leaves its allocators waiting for the end; that of the host asks the graph about it
            _failed.append(self._graph)
            torch._C._cuda_endAllocateToPool(device, self.pool)
            torch._C._cuda_releasePool(device, self.pool)
            raise

    def replay(self) -> None:
        """Writes `outputs` anew: what the function returns for what now stands in the tensors it reads."""
        self._graph.replay()


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether any of a model's modules has forward hooks that nobody knows here: a replay would pass them by."""
    hooked = (module for module in modules if module._forward_pre_hooks or module._forward_hooks)
    hooks = (hook for module in hooked for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()))
    return any(getattr(getattr(hook, "func", hook), "__module__", "").split(".")[0] not in WITHOUT_EFFECTS for hook in hooks)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that torch.autocast gives on a device, where it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """torch.autocast, off for None, without its cache, whose weights a graph would read and which is freed as a block ends."""
    with torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False):
        yield


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One for all: memory of a pool is used again on its own stream alone."""
    return torch.cuda.Stream(device)


def _leave_capture(device: int) -> None:
    """After a failure the generator of random numbers still believes that its use is recorded."""
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())
