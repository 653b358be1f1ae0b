"""The kernel for decoding: in Triton's interpreter (test_triton.py says why in a process of its own) and on a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prefix_kernels
from support.cases import Case
from support.decoding import DECODE_CASES, LARGE_DECODE_CASES, check, refill
from support.inputs import make_inputs

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which is not installed")

# Steps of a growing cache: the kernels compiled on the way, for sm_90.
LENGTHS = """
import sys
sys.path.insert(0, "tools")
import torch
import compile_kernels
from compile_kernels import HEADS, KV_HEADS, api, compile_kernel, empty, index

seen, counts = set(), []
for step in range(20):
    batch, kv_len, prefix_len = 5 + step % 3, 129 + 37 * step, 131 + 77 * step
    q = empty(batch, HEADS, 1, 64, dtype=torch.bfloat16)
    k, v = (empty(batch, KV_HEADS, kv_len, 64, dtype=torch.bfloat16) for _ in range(2))
    prefix = [empty(KV_HEADS, prefix_len, 64, dtype=torch.bfloat16) for _ in range(2)]
    inputs = api._dense_inputs(q, k, v, *prefix, key_lens=index(batch), window=prefix_len + 7)
    seen.update(map(id, compile_kernel("decode", 90, inputs)))
    counts.append(len(seen))
print(*counts)
"""


MERGE = """
import sys

sys.path.insert(0, "tools")
import torch
from compile_kernels import FORWARD, compile_kernel, decode_kernel, dense

FORWARD["merge"] = decode_kernel
for dim in (64, 256):
    for q_len in (1, 16):
        for compiled in compile_kernel("merge", 90, dense(dim, torch.float32, q_len=q_len)):
            print(compiled.asm["ptx"].count("fma.rn.f32"))
"""


def run_apart(command, **environment):
    """Standard output of a process with the kernels' own environment."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}"} | environment
    run = subprocess.run((sys.executable, *command), cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode != 0:
        pytest.fail(f"{run.stdout}\n{run.stderr}", pytrace=False)
    return run.stdout


@needs_triton
def test_in_the_interpreter():
    """A failing case shows with its assertion, as the inner run prints it."""
    file = "tests/prefix_kernels/triton_decode_interpreted.py"
    output = run_apart(("-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", file), TRITON_INTERPRET="1")
    counts = dict(reversed(count) for count in re.findall(r"(\d+) (\w+)", output.splitlines()[-1]))
    assert int(counts["passed"]) > 100 and "skipped" not in counts, output


@needs_triton
def test_a_growing_cache_compiles_nothing_again():
    counts = [int(word) for word in run_apart(("-c", LENGTHS)).split()]
    assert len(counts) == 20 and counts[-1] == 1, counts


def test_no_product_is_fused_into_a_sum_of_splits():
    """Threads that sum the same splits beginning with different ones would differ, and which is kept is not defined."""
    assert run_apart(("-c", MERGE)).split() == ["0"] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float32 prefix"])
@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_on_the_gpu(case, dtype):
    check(case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", LARGE_DECODE_CASES, ids=str)
def test_large_ones_on_the_gpu(case, dtype):
    check(case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE_DECODE_CASES, ids=str)
def test_the_same_bits_on_the_gpu(case):
    inputs = make_inputs(case, torch.bfloat16, device="cuda")
    runs = [inputs.call(backend="triton", return_lse=True) for _ in range(3)]
    for run in runs[1:]:
        for value, other in zip(runs[0], run, strict=True):
            assert torch.equal(value, other)


@pytest.mark.gpu
@pytest.mark.parametrize("prefix_len", [16, 700])
def test_in_a_cuda_graph(prefix_len):
    """Captured once; then fill, keys and queries change in place. It reads no length back from the device."""
    case = Case("graph", batch=4, q_len=1, kv_len=600, prefix_len=prefix_len, key_lens=(1, 1, 1, 1), contiguous=True)
    inputs = make_inputs(case, torch.bfloat16, device="cuda")
    q, k, v, prefix_k, prefix_v = (tensor.detach() for tensor in inputs.tensors)
    key_lens = inputs.options["key_lens"]

    def decode(lens):
        with torch.no_grad():
            return prefix_kernels.prefix_attention(
                q, k, v, prefix_k, prefix_v, key_lens=lens, backend="triton", return_lse=True
            )

    decode(key_lens)  # compiles
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        decode(key_lens)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode(key_lens)
    for lengths in ([1, 2, 3, 4], [600, 64, 65, 0], [130, 599, 7, 200]):
        refill(q, k, v, lengths)
        key_lens.copy_(torch.tensor(lengths))
        graph.replay()
        for value, other in zip(captured, decode(key_lens.clone()), strict=True):
            assert torch.equal(value, other) and not value.isnan().any()


@pytest.mark.gpu
def test_a_growing_cache_compiles_nothing_again_on_the_gpu():
    from prefix_kernels.backends.triton.decode_kernel import decode_kernel

    counts = []
    for step in range(6):
        case = Case("step", batch=4, q_len=1, kv_len=130 + 111 * step, prefix_len=200 + 3 * step, contiguous=True)
        tensors = [tensor.detach().contiguous() for tensor in make_inputs(case, torch.bfloat16, device="cuda").tensors]
        prefix_kernels.prefix_attention(*tensors, backend="triton")
        counts.append(sum(len(cache[0]) for cache in decode_kernel.device_caches.values()))
    assert len(set(counts)) == 1
