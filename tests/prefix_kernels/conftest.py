"""What is called in a test, operators and backends; and where its tensors say that they lie."""

import pytest
import torch

from prefix_kernels import ops, select
from prefix_kernels.backends import reference, sdpa
from support.emulated_cuda import EmulatedCuda

MODULES = {"reference": reference, "sdpa": sdpa}


@pytest.fixture
def operator_calls(monkeypatch):
    """{"attention": [arguments, …], "attention_backward": [arguments, …]} of the calls in this test."""
    calls = {"attention": [], "attention_backward": []}

    def spied(operator, seen):
        def call(*args):
            seen.append(args)
            return operator(*args)

        return call

    for name, seen in calls.items():
        monkeypatch.setattr(ops, name, spied(getattr(ops, name), seen))
    return calls


@pytest.fixture
def backend_calls(monkeypatch):
    """[(backend, "forward" or "backward", wanted or None), …] in order, where there are two backends."""
    calls = []
    monkeypatch.setattr(select, "BACKENDS", ("sdpa", "reference"))

    def spied(name, direction, function):
        def call(*args):
            calls.append((name, direction, args[5] if direction == "backward" else None))
            return function(*args)

        return call

    for name, module in MODULES.items():
        for direction in ("forward", "backward"):
            monkeypatch.setattr(module, direction, spied(name, direction, getattr(module, direction)))
    return calls


@pytest.fixture
def elsewhere(monkeypatch):
    """Puts the sdpa backend on a device, by its type, that is neither a CPU nor NVIDIA's; gives the attention kernels of
    NVIDIA's that it calls. Tensors lie on the CPU and say that they lie there."""
    forward, backward, why_not, workspace_bytes = sdpa.forward, sdpa.backward, sdpa.why_not, sdpa.workspace_bytes

    def put(device):
        mode = EmulatedCuda(torch.device(device, 0))

        def within(function):
            def call(*args):
                with mode:
                    return function(*args)

            return call

        monkeypatch.setattr(sdpa, "forward", within(forward))
        monkeypatch.setattr(sdpa, "backward", within(backward))
        monkeypatch.setattr(sdpa, "why_not", lambda problem: why_not(problem._replace(device=device)))
        monkeypatch.setattr(sdpa, "workspace_bytes", lambda problem: workspace_bytes(problem._replace(device=device)))
        monkeypatch.setattr(sdpa, "_merge_kernel", lambda: pytest.fail("a Triton kernel"))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: pytest.fail("NVIDIA's versions"))
        return mode.calls

    return put
