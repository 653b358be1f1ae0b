"""The Triton kernel by which the sdpa backend merges its parts, in the interpreter and on a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # read when @triton.jit is: the kernel has a process of its own
MERGE_SHAPES = [(2, 3, 5, 8), (1, 4, 200, 64), (3, 2, 1, 80), (2, 1, 37, 256)]


def kernel_test(function):
    """Runs in the interpreter, and on a GPU."""
    return function if INTERPRETING else pytest.mark.gpu(function)


@kernel_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", MERGE_SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["token-major", "folded", "padded"])
def test_merge_kernel(layout, shape, dtype):
    """In place where out is token-major, else anew; what a part does not see is not looked at."""
    from prefix_kernels.backends.sdpa.merge import merge

    device = "cpu" if INTERPRETING else "cuda"
    batch, heads, q_len, dim = shape

    def random(*size):
        return torch.randn(size).to(dtype).to(device)

    out, lse = random(batch, q_len, heads, dim).transpose(1, 2), torch.randn(batch, heads, q_len, device=device) * 3
    part = random(heads, batch, q_len, dim).transpose(0, 1)
    part_lse = (torch.randn(heads, batch, q_len, device=device) * 3).transpose(0, 1)
    if layout == "folded":
        out, part = part, out
    elif layout == "padded":
        out, lse = (
            random(batch, heads, q_len, dim + 8)[..., :dim],
            torch.randn(batch, heads, q_len + 7, device=device)[..., :q_len],
        )
    lse[0, 0, 0], part_lse[-1, -1, -1] = -torch.inf, -torch.inf
    if shape[:3] != (1, 4, 200):
        lse[-1, -1, -1] = -torch.inf
    out[lse == -torch.inf], part[part_lse == -torch.inf] = torch.nan, torch.nan
    values = torch.stack([out, part]).double().nan_to_num()
    weights = torch.stack([lse, part_lse]).double().softmax(0).nan_to_num()
    expected, expected_lse = (values * weights[..., None]).sum(0), torch.logaddexp(lse.double(), part_lse.double())
    merged, merged_lse = merge(out, lse, part, part_lse)
    assert merged.transpose(1, 2).is_contiguous() and merged_lse.is_contiguous()
    assert (merged.data_ptr() == out.data_ptr()) == out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(merged, expected.to(dtype), atol=1e-5, rtol={torch.float32: 1e-5}.get(dtype, 2**-7))
    torch.testing.assert_close(merged_lse, expected_lse.float())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which is not installed")
def test_merge_kernel_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options = ("-q", "-p", "no:cacheprovider", "--tb=short", "-k", "test_merge_kernel[")
    command = (sys.executable, "-m", "pytest", __file__, *options)
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and re.search(r"\b36 passed", run.stdout), f"{run.stdout}\n{run.stderr}"
