"""Lengths are run-time values: calls of many lengths compile a kernel once per alignment class of their strides, no more."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys
sys.path.insert(0, "tools")
import torch
import compile_kernels
from compile_kernels import HEADS, KV_HEADS, api, compile_kernel, empty, index

def dense(batch, q_len, kv_len, prefix_len):
    q, k, v = (empty(batch, n, heads, 64, dtype=torch.bfloat16).transpose(1, 2)
               for n, heads in ((q_len, HEADS), (kv_len, KV_HEADS), (kv_len, KV_HEADS)))
    prefix = [empty(KV_HEADS, prefix_len, 64, dtype=torch.bfloat16) for _ in range(2)]
    return api._dense_inputs(q, k, v, *prefix, key_lens=index(batch), window=prefix_len + 7)

kernel, seen, counts = sys.argv[1], set(), []
for step in range(20):
    q_len = 17 + 22 * step  # odd and even, never a multiple of 16
    inputs = dense(2 + step % 5, q_len, q_len + 3 * step, 1 + 13 * step)
    compile_kernels.BATCH, compile_kernels.LENGTH = inputs.q.shape[0], q_len
    seen.update(map(id, compile_kernel(kernel, 90, inputs)))
    counts.append(len(seen))
print(*counts)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which is not installed")
@pytest.mark.parametrize("kernel", ["forward", "dprefix"])
def test_twenty_lengths(kernel):
    """What is left to specialize on are the strides of lse: head stride q_len, row stride heads · q_len, by 16 or not."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}"}
    run = subprocess.run([sys.executable, "-c", CODE, kernel], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    counts = [int(word) for word in run.stdout.split()]
    assert len(counts) == 20 and counts[-1] <= 2, counts
