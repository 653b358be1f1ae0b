"""CUDA graphs: the kernels of a function are recorded once, and a replay launches them all at once.

A model of many small kernels waits for the host, which issues them one by one; a replay costs the host a single launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

WITHOUT_EFFECTS = ("transformers", "prefix_tuning", "peft")  # packages whose hooks do all they do by kernels

# Graphs of one pool use the same memory: what one leaves there must be read before another is replayed.
Pool = Any


class CaptureError(RuntimeError):
    """A function whose kernels cannot be recorded; the message says why."""


class Graph:
    """The recorded kernels of a function, on the current device.

    function: called twice, first to load whatever it needs. At every replay its kernels read and write the same tensors;
        it may not wait for the device.

    Raises CaptureError; the device is then as it was.
    """

    def __init__(self, function: Callable[[], Any], pool: Pool | None = None):
        before, stream = torch.cuda.current_stream(), _capture_stream(torch.cuda.current_device())
        self._graph = torch.cuda.CUDAGraph()
        stream.wait_stream(before)
        try:
            with torch.cuda.stream(stream):
                with _stops_are_errors():
                    function()
                # thread_local: other threads may do what cannot be recorded, such as pinning the memory of the next batch.
                with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    self.outputs = function()
        except RuntimeError as error:
            _leave_capture()
            raise CaptureError(str(error).splitlines()[0]) from error
        finally:
            before.wait_stream(stream)

    @property
    def pool(self) -> Pool:
        return self._graph.pool()

    def replay(self) -> None:
        """Writes `outputs` anew: what the function returns for what now stands in the tensors it reads."""
        self._graph.replay()


def has_hooks(model: nn.Module) -> bool:
    """Whether a model has forward hooks that nobody knows here: a replay would pass them by."""
    hooks = (
        hook for module in model.modules() for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    )
    return any(getattr(getattr(hook, "func", hook), "__module__", "").split(".")[0] not in WITHOUT_EFFECTS for hook in hooks)


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One for all: memory of a pool is used again on its own stream alone."""
    return torch.cuda.Stream(device)


@contextmanager
def _stops_are_errors() -> Iterator[None]:
    """Within, RuntimeError where the host would wait for the device, which cannot be recorded."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _leave_capture() -> None:
    """After a failure the generator of random numbers still believes that its use is recorded."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())
