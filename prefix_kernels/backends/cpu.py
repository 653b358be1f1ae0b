"""C++ kernels for the CPU (csrc/cpu): float32 and 16 bit; AVX2, AVX-512 and, for bfloat16, AMX are chosen at run time.

Query rows lie in vector lanes; the prefix, a parent's keys and the own keys are met in one online softmax. Where a step has
few queries per row (decoding), the prefix is read once for the rows of the whole batch.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from prefix_kernels.problem import AttentionInputs, AttentionProblem, empty_token_major

LIBRARY = Path(__file__).resolve().parents[1] / "_C.so"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_LANES, MAX_PARTS = 16, 8  # as in csrc: vector lanes, and shares of a pass over one prefix
DIM_STEP, MAX_DIM = 16, 256  # kernels see heads filled up to whole vectors; a tile of 256 fits the cache


@functools.cache
def _missing() -> str | None:
    """Loads the library, once; the reason why it cannot be used, or None."""
    if not LIBRARY.exists():
        if _installed() is not None:
            return f"the C++ kernels are those of {_installed()}, which {LIBRARY.parent} hides: start Python in another folder"
        return f"the C++ kernels are not built (no {LIBRARY.name} beside the package); reinstall where a C++ compiler is found"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"the C++ kernels in {LIBRARY} cannot be loaded: {error}"
    return None


def _installed() -> Path | None:
    """Another prefix_kernels, with kernels, that the current folder hides, as a clone does from which it was installed."""
    try:
        folder = Path(importlib.metadata.distribution("prefix-kernels").locate_file("prefix_kernels"))
    except importlib.metadata.PackageNotFoundError:
        return None
    return folder if folder.resolve() != LIBRARY.parent and (folder / LIBRARY.name).exists() else None


def why_not(problem: AttentionProblem) -> str | None:
    """None where the kernels can serve the problem, else the reason."""
    if problem.device != "cpu":
        return f"it runs on the CPU, the tensors are on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"it serves float32, bfloat16 and float16, got {problem.dtype}"
    if problem.prefix_dtype not in DTYPES:
        return f"it serves prefixes in float32, bfloat16 and float16, got {problem.prefix_dtype}"
    for name in ("head_dim", "value_dim"):
        dim = getattr(problem, name)
        if not 0 < dim <= MAX_DIM:
            return f"it serves up to {MAX_DIM} as {name}, got {dim}"
    return _missing()


def _whole(dim: int) -> int:
    """Numbers in a row of gradients that are added up: whole vectors."""
    return -(-dim // DIM_STEP) * DIM_STEP


def workspace_bytes(problem: AttentionProblem) -> tuple[int, int]:
    """Most bytes that the forward and the backward pass take besides what goes in and comes out, and beside the megabyte that
    each thread keeps for its tiles."""
    indices = 8 * (6 * problem.batch + problem.prefixes + 2)  # int64 copies
    forward = indices
    group, q_len = problem.heads // problem.kv_heads, problem.q_len
    if problem.varlen:  # what is stated is a bound, and a shorter longest sequence may take more
        q_len = min(q_len, (MAX_LANES - 1) // max(1, group))
    if 0 < group * q_len < MAX_LANES:  # partial results over the prefix
        splits = min(max(1, MAX_PARTS // problem.kv_heads), max(1, problem.prefix_len // 256))
        forward += 4 * splits * problem.batch * problem.heads * q_len * (_whole(problem.value_dim) + 2)
    parts = min(-(-4 * torch.get_num_threads() // problem.kv_heads), MAX_PARTS)
    dims = _whole(problem.head_dim) + _whole(problem.value_dim)
    one_prefix = 4 * problem.kv_heads * problem.prefix_len * dims
    backward, filled_up = indices + (parts - 1) * one_prefix, dims != problem.head_dim + problem.value_dim
    if problem.dtype != torch.float32 or filled_up:  # dk and dv are summed in float32
        backward += 4 * problem.k_tokens * problem.kv_heads * dims
    if problem.prefix_dtype != torch.float32 or filled_up:
        backward += problem.prefixes * one_prefix
    return forward, backward


@functools.cache
def _operators() -> tuple[Callable, Callable, Callable]:
    """The library's forward, backward and forward_rows; looking them up at every call would take a microsecond."""
    library = torch.ops.prefix_kernels_cpu
    return library.forward.default, library.backward.default, library.forward_rows.default


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """(out, lse) of one call; out token-major in q's dtype, lse float32."""
    return _operators()[0](*_arguments(inputs))


def repeat(inputs: AttentionInputs) -> Callable[..., Tensor]:
    """A function of q, k, v, prefix_k, prefix_v, key_mask and bias that gives out as forward does, for calls that differ from
    this one in the values of those tensors and in strides alone. The prefix may be without its bank axis."""
    operator, options = _operators()[2], _options(inputs)
    return lambda *tensors: operator(*tensors, *options)


def backward(
    inputs: AttentionInputs, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, prefix_k, prefix_v; one that is not wanted is neither computed nor allocated."""
    q = empty_token_major(inputs.q, tuple(inputs.q.shape)) if wanted[0] else None
    k, v = (
        empty_token_major(tensor, (*tensor.shape[:-1], _whole(tensor.shape[-1])), torch.float32) if needed else None
        for tensor, needed in zip(inputs.tensors[1:3], wanted[1:3], strict=True)
    )
    for added_to in (k, v):
        if added_to is not None:
            added_to.zero_()
    prefix_k, prefix_v = _operators()[1](
        *_arguments(inputs), out, lse.contiguous(), grad_out,
        None if grad_lse is None else grad_lse.contiguous(), q, k, v, wanted[3], wanted[4],
    )  # fmt: skip
    dtypes = (inputs.q.dtype,) * 3 + (inputs.prefix_k.dtype,) * 2
    grads = (q, k, v, prefix_k, prefix_v)
    return tuple(
        grad[..., : tensor.shape[-1]].to(dtype) if needed else None
        for grad, tensor, dtype, needed in zip(grads, inputs.tensors, dtypes, wanted, strict=True)
    )


def _index(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.int64).contiguous()


def _arguments(inputs: AttentionInputs) -> tuple:
    """What forward and backward take first, in the order of their schema."""
    return (
        *inputs.tensors,
        inputs.key_mask,
        inputs.bias,
        _index(inputs.key_lens),
        _index(inputs.prefix_ids),
        _index(inputs.prefix_lens),
        _index(inputs.cu_seqlens_q),
        _index(inputs.cu_seqlens_k),
        _index(inputs.parent),
        *_options(inputs),
    )


def _options(inputs: AttentionInputs) -> tuple:
    """0 and −1 stand for None."""
    first_key_position = -1 if inputs.first_key_position is None else inputs.first_key_position
    return inputs.causal, inputs.scale, inputs.window or 0, inputs.softcap or 0.0, first_key_position
