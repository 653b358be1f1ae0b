"""Every backend × every case: output, log-sum-exp and five gradients against float64, through the public API."""

import functools

import pytest
import torch

import prefix_kernels
from prefix_kernels.select import BACKENDS
from support.cases import CASES
from support.inputs import make_inputs
from support.oracle import naive_attention
from support.tolerance import assert_close

DTYPES = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float32 prefix": (torch.bfloat16, torch.float32),
}
NAMES = ("out", "lse", "dq", "dk", "dv", "dprefix_k", "dprefix_v")


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def gradients(inputs, out, lse, grad_out, grad_lse):
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


def compare(case, dtype, prefix_dtype, backend, device="cpu"):
    inputs = make_inputs(case, dtype, prefix_dtype, device=device)
    refusal = prefix_kernels.explain_backends(*inputs.tensors, **inputs.options)[backend]
    if refusal.startswith("refused"):
        with pytest.raises(NotImplementedError, match=refusal.removeprefix("refused: ")[:40].replace("(", ".")):
            inputs.call(backend=backend)
        return
    out, lse = inputs.call(backend=backend, return_lse=True)
    grad_out, grad_lse, wide, eager = expectation(case, dtype, prefix_dtype)
    grads = gradients(inputs, out, lse, grad_out.to(device), grad_lse.to(device))
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, got, expected, yardstick in zip(NAMES, (out, lse, *grads), wide, eager, strict=True):
        assert_close(got, expected, yardstick, name)
    for grad, tensor in zip(grads, inputs.tensors, strict=True):
        assert grad.dtype == tensor.dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend(backend, case, dtype):
    compare(case, *DTYPES[dtype], backend)
