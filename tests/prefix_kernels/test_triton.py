"""The Triton backend: its kernels in Triton's interpreter, on a GPU where there is one, and what it costs where it is not used.

TRITON_INTERPRET decides what @triton.jit makes of a function, for a whole process. So the interpreted tests have their own.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prefix_kernels
from support.cases import CASES, CASES_OF_SEVERAL_BLOCKS, Case
from support.compare import DTYPES, compare, slack_of
from support.inputs import make_inputs
from support.recorded_calls import RECORDED, assert_same, repeated_calls, results

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which is not installed")

# What to run in the interpreter. Of the tests that all backends share, those that the first file has itself are left out, and
# the one over 16 384 query rows, which takes the interpreter half a minute.
INTERPRETED = {
    "case table and blocks": ("tests/prefix_kernels/triton_interpreted.py",),
    "recorded calls": ("tests/prefix_kernels/triton_recorded_interpreted.py",),
    "shared tests": (
        "tests/prefix_kernels/test_backends.py", "tests/prefix_kernels/test_ops.py",
        "-k", "triton and not test_backend[ and not same_bits and not many_rows and not not_modified",
    ),
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("tests", INTERPRETED)
def test_in_the_interpreter(tests):
    """A failing case shows with its assertion, as the inner run prints it."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *INTERPRETED[tests])
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode != 0:
        pytest.fail(f"in the interpreter:\n{run.stdout}\n{run.stderr}", pytrace=False)
    counts = dict(reversed(count) for count in re.findall(r"(\d+) (\w+)", run.stdout.splitlines()[-1]))
    assert int(counts["passed"]) > 30 and "skipped" not in counts, run.stdout


@needs_triton
def test_selecting_for_cpu_tensors_loads_no_triton():
    """Neither the import nor the choice of a backend does (torch itself does, at the first call of an operator)."""
    code = (
        "import sys, torch, prefix_kernels\n"
        "tensors = [torch.randn(1, 1, 2, 16) for _ in range(3)] + [torch.randn(1, 2, 16) for _ in range(2)]\n"
        "print(prefix_kernels.explain_backends(*tensors)['triton'])\n"
        "print('triton' in sys.modules)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    reason, loaded = run.stdout.splitlines()
    assert reason == (
        "refused: Triton compiles for CUDA devices (and runs on the CPU in its interpreter alone, TRITON_INTERPRET=1)"
    )
    assert loaded == "False"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "float64"])
@pytest.mark.parametrize("case", [*CASES, *CASES_OF_SEVERAL_BLOCKS], ids=str)
def test_on_the_gpu(case, dtype):
    compare(case, *DTYPES[dtype], "triton", device="cuda", slack=slack_of(case))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ("bfloat16", "float32 prefix"))
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_calls_on_the_gpu(name, dtype):
    from prefix_kernels.backends.triton import recorded

    for _, found, right in repeated_calls(RECORDED[name], dtype, (True,) * 5, lambda: None, device="cuda"):
        assert_same(found, right)
    assert [type(kind) for kind in recorded._kinds.values()] == [recorded.Recording] * 2  # forward, backward


@pytest.mark.gpu
@pytest.mark.parametrize("q_len", [1, 40])
def test_a_bias_in_the_dtype_of_q_on_the_gpu(q_len):
    case = Case("bias", q_len=q_len, kv_len=70, prefix_len=37, padding="left", bias=(1, 0, 0, 0), head_dim=64)
    inputs, outcomes = make_inputs(case, torch.bfloat16, device="cuda"), []
    for bias in (inputs.options["bias"].bfloat16(), inputs.options["bias"].bfloat16().float()):
        inputs.options["bias"] = bias
        outcomes.append(results(inputs))
    for value, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(value, other)


MANY_ROWS = Case("many rows", batch=8, q_len=512, kv_len=512, prefix_len=256, head_dim=64)
PACK = Case("pack", seqlens_q=(400, 300, 200, 100), parent=(-1, 0, 0, -1), prefix_len=256, head_dim=64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "float64"])
@pytest.mark.parametrize("case", [MANY_ROWS, PACK], ids=str)
def test_the_same_bits_on_the_gpu(case, dtype):
    inputs, runs = make_inputs(case, *DTYPES[dtype], device="cuda"), []
    for _ in range(2):
        out, lse = inputs.call(backend="triton", return_lse=True)
        runs.append((out, lse, *torch.autograd.grad(out.float().square().sum() + lse.sum(), inputs.tensors)))
    for value, other in zip(*runs, strict=True):
        assert torch.equal(value, other)


@pytest.mark.gpu
def test_another_length_compiles_nothing_again():
    """Of the lengths only this matters: whether 16 divides them, which Triton wants to know of lse's strides."""
    from prefix_kernels.backends.triton.forward_kernel import forward_kernel

    def compiled():
        return sum(len(cache[0]) for cache in forward_kernel.device_caches.values())

    counts = []
    for q_len, prefix_len in ((48, 32), (33, 7), (1, 1), (16, 16), (1024, 100)):
        inputs = make_inputs(Case("length", q_len=q_len, kv_len=q_len, prefix_len=prefix_len, contiguous=True), torch.bfloat16)
        tensors = [tensor.detach().cuda().contiguous() for tensor in inputs.tensors]
        prefix_kernels.prefix_attention(*tensors, backend="triton")
        counts.append(compiled())
    assert len(set(counts[1:])) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("q_len", [1, 16])
def test_more_than_2_to_the_31_elements(q_len):
    """k and v of 4.4 GB each, and their gradients: the last row is what it is alone."""
    batch, kv_heads, kv_len, head_dim = 33, 8, 2**16, 128
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    q, k, v = random(batch, kv_heads, q_len, head_dim), *(random(batch, kv_heads, kv_len, head_dim) for _ in range(2))
    prefix_k, prefix_v = random(kv_heads, 32, head_dim), random(kv_heads, 32, head_dim)
    assert k.numel() > 2**31
    results = []
    for rows in (slice(0, batch), slice(batch - 1, batch)):
        leaves = [tensor[rows].detach().requires_grad_() for tensor in (q, k, v)]
        out = prefix_kernels.prefix_attention(*leaves, prefix_k, prefix_v, backend="triton")
        grads = torch.autograd.grad(out[-1].float().sum(), leaves)
        results.append([out[-1].detach().clone(), *(grad[-1].clone() for grad in grads)])
        del leaves, out, grads
    for value, other in zip(*results, strict=True):
        torch.testing.assert_close(value, other, atol=2e-2, rtol=2e-2)
