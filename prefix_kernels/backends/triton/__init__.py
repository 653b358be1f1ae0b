"""Kernels in Triton: one pass over prefix and keys forward, three kernels and no atomics backward.

Imported for every call, so it loads neither triton nor the kernels before a problem lies on a device that they serve.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys

import torch
from torch import Tensor

from prefix_kernels.problem import AttentionInputs, AttentionProblem

MAX_DIM = 256
MAX_DECODE_QUERIES = 8  # a row, of the kernel for decoding; assumed: one new token, or a few that were guessed ahead


def why_not(problem: AttentionProblem) -> str | None:
    """Why this backend refuses a problem, or None."""
    if problem.device == "cpu":
        if not _interpreting():
            return "Triton compiles for CUDA devices (and runs on the CPU in its interpreter alone, TRITON_INTERPRET=1)"
    elif problem.device != "cuda":
        return f"Triton compiles for CUDA devices, not for {problem.device}"
    else:
        missing = _missing()
        if missing is not None:
            return missing
    if problem.dtype == torch.float64:
        return "the Triton kernels accumulate in float32 and know no float64"
    if max(problem.head_dim, problem.value_dim) > MAX_DIM:
        return f"the Triton kernels hold whole heads of up to {MAX_DIM}, not {max(problem.head_dim, problem.value_dim)}"
    return None


def workspace_bytes(problem: AttentionProblem) -> tuple[int, int]:
    """Most bytes that the forward and the backward pass take besides what goes in and comes out."""
    from prefix_kernels.backends.triton import decode_kernel
    from prefix_kernels.backends.triton.backward_kernels import MAX_SPLITS

    rounded = problem.prefix_values() * problem.dtype.itemsize if problem.prefix_dtype != problem.dtype else 0
    delta = 4 * problem.q_tokens * problem.heads
    children = 24 * (problem.batch + 1) if problem.has_parent else 0
    parts = decode_kernel.part_bytes(problem) if _decodes(problem.varlen, problem.q_len) else 0
    return rounded + parts, rounded + delta + children + 4 * MAX_SPLITS * problem.prefix_values()


def fast_with_wide_heads(problem: AttentionProblem) -> bool:
    """Whether heads of more than 128 are served faster than by stock kernels: on sm_90, on tensor cores."""
    on_tensor_cores = problem.dtype in (torch.bfloat16, torch.float16)
    return on_tensor_cores and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """(out, lse) of one call."""
    from prefix_kernels.backends.triton import recorded

    given = recorded.tensors_of(inputs)
    out, lse = recorded.serve(lambda: _forward(inputs), recorded.kind_of(inputs, given), given)
    return out, lse


def _forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """By the kernel for Hopper where a measurement says so, else by one of those for every GPU."""
    from prefix_kernels.backends.triton import forward_kernel, tile_sizes

    if any(regime.covers(inputs.problem()) for regime in tile_sizes.HOPPER_REGIMES):
        from prefix_kernels.backends.triton import hopper, hopper_forward

        if hopper.why_not(inputs) is None:
            return hopper_forward.forward(inputs)
    if _decodes(inputs.varlen, inputs.q.shape[-2]):
        from prefix_kernels.backends.triton import decode_kernel

        return decode_kernel.forward(inputs)
    return forward_kernel.forward(inputs)


def backward(
    inputs: AttentionInputs, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, prefix_k, prefix_v, None where not wanted."""
    from prefix_kernels.backends.triton import backward_kernels, recorded

    given = *recorded.tensors_of(inputs), out, lse, grad_out, grad_lse
    return recorded.serve(
        lambda: backward_kernels.backward(inputs, out, lse, grad_out, grad_lse, wanted),
        recorded.kind_of(inputs, given, wanted),
        given,
    )


def _decodes(varlen: bool, q_len: int) -> bool:
    """Whether the kernel for decoding serves a call."""
    return not varlen and q_len <= MAX_DECODE_QUERIES


def _interpreting() -> bool:
    """Whether Triton is loaded and interprets its kernels."""
    knobs = getattr(sys.modules.get("triton"), "knobs", None)
    return knobs is not None and bool(knobs.runtime.interpret)


@functools.cache
def _missing() -> str | None:
    """What this machine lacks to run the kernels, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'triton>=3.6')"
    import triton

    if tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2]) < (3, 6):
        return f"it needs Triton 3.6 or newer, and finds {triton.__version__}"
    if torch.version.hip is not None:
        return "its tile sizes are for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"it needs compute capability 8.0 or newer, and the GPU has {capability[0]}.{capability[1]}"
    return None
