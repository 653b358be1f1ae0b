"""What is called in a test: the operators, the backends."""

import pytest

from prefix_kernels import ops, select
from prefix_kernels.backends import reference, sdpa

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
