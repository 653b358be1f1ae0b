"""Compiles the Triton kernels of the operator benchmarks on all processor cores: python benchmarks/warm_up.py

Each case runs once, which leaves its kernels in Triton's cache; a stage of run_gpu.py then spends its time on measuring.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from cases import Case, gpu_decode_cases, gpu_op_cases
from gpu_tests import MOST_PROCESSES
from measure import first_line
from rivals import make_inputs, our_way


def compile_kernels(case: Case) -> str | None:
    """Runs our Triton backend once; why not, where it does not run."""
    try:
        inputs = make_inputs(case, "cuda", torch.Generator("cuda").manual_seed(0))
        out = our_way("triton").prepare(case, "cuda")(inputs)
        if case.backward:
            torch.autograd.grad(out, inputs.leaves, inputs.grad_out)
        torch.cuda.synchronize()
    except Exception as error:
        return first_line(error)
    return None


def kinds_of(cases: list[Case]) -> dict[tuple, Case]:
    """A case for each set of kernels: a backward pass runs the forward pass's too, and lengths compile nothing."""
    kinds: dict[tuple, Case] = {}
    for case in cases:
        if case.backward or case.decode:
            size = (case.batch > 1, min(case.prefix_len, 65), case.kv_len > 256) if case.decode else (case.q_len > 128,)
            kinds.setdefault((case.heads, case.head_dim, case.dtype, case.decode, case.seqlens is None, *size), case)
    return kinds


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if not torch.cuda.is_available():
        print("warm_up: torch finds no GPU")
        return 1
    kinds = kinds_of(gpu_op_cases() + gpu_decode_cases())
    with ProcessPoolExecutor(min(os.cpu_count() or 1, MOST_PROCESSES), mp_context=get_context("spawn")) as pool:
        failed = [reason for reason in pool.map(compile_kernels, kinds.values()) if reason is not None]
    print(f"warm_up: {len(kinds)} kinds of calls, {len(failed)} failed", *failed[:3])
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
