"""One case on one backend against float64: output, log-sum-exp and five gradients, through the public API."""

from __future__ import annotations

import functools
import re

import pytest
import torch

import prefix_kernels
from support.inputs import make_inputs
from support.oracle import naive_attention
from support.tolerance import assert_close

BACKENDS = prefix_kernels.available_backends()  # what can be tested on this machine
DTYPES = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float32 prefix": (torch.bfloat16, torch.float32),
}
NAMES = ("out", "lse", "dq", "dk", "dv", "dprefix_k", "dprefix_v")


def serves(backend, inputs):
    """Whether the backend takes the call, as explain_backends says."""
    return not prefix_kernels.explain_backends(*inputs.tensors, **inputs.options)[backend].startswith("refused: ")


def slack_of(case):
    """How far eager's error may be exceeded: how scores of a bias of ±6 round depends on the processor's kernels."""
    return 1.5 if case.bias is not None else 1.0


def gradients(inputs, out, lse, grad_out, grad_lse):
    """Gradients of the five tensors for given gradients of out and lse; where lse is −inf, that of lse is 0."""
    loss = (out * grad_out.to(out.dtype)).sum() + (lse * grad_lse.to(lse.dtype)).nan_to_num(0, 0, 0).sum()
    return torch.autograd.grad(loss, inputs.tensors, allow_unused=True)


@functools.cache
def expectation(case, dtype, prefix_dtype):
    """(grad_out, grad_lse, results in float64, results of eager attention in dtype), by definition."""
    results = []
    for inputs in (make_inputs(case, dtype, prefix_dtype).to(torch.float64), make_inputs(case, dtype, prefix_dtype)):
        out, lse = naive_attention(inputs)
        generator = torch.Generator().manual_seed(1)
        grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype).double()
        grad_lse = torch.randn(lse.shape, generator=generator, dtype=torch.float64).float().double()
        grads = gradients(inputs, out, lse, grad_out, grad_lse)
        grads = [torch.zeros_like(t) if grad is None else grad for grad, t in zip(grads, inputs.tensors, strict=True)]
        results.append((out.detach(), lse.detach(), *grads))
    return grad_out, grad_lse, *results


def compare(case, dtype, prefix_dtype, backend, device="cpu", slack=1.0, lse_slack=1.0):
    """Outputs and gradients as good as eager attention's, or the refusal that explain_backends foretells."""
    inputs = make_inputs(case, dtype, prefix_dtype, device=device)
    answer = prefix_kernels.explain_backends(*inputs.tensors, **inputs.options)[backend]
    if answer.startswith("refused: "):
        with pytest.raises(NotImplementedError, match=re.escape(answer.removeprefix("refused: "))):
            inputs.call(backend=backend)
        return
    out, lse = inputs.call(backend=backend, return_lse=True)
    grad_out, grad_lse, wide, eager = expectation(case, dtype, prefix_dtype)
    grads = gradients(inputs, out, lse, grad_out.to(device), grad_lse.to(device))
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, got, expected, yardstick in zip(NAMES, (out, lse, *grads), wide, eager, strict=True):
        assert_close(got, expected, yardstick, name, slack * (lse_slack if name == "lse" else 1))
    for grad, tensor in zip(grads, inputs.tensors, strict=True):
        assert grad.dtype == tensor.dtype
