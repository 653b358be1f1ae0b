"""CUDA C++ kernels (csrc/cuda) for decoding: a few queries a row, forward only.

Where a row has few queries of a kv head, and the L2 cache can give each row the prefix anew, keys and values go from memory
straight into the registers of warps that have nothing in common. Else queries of many rows meet a shared prefix together on the
tensor cores. What is split is merged within clusters of thread blocks, by the thread block that has its beginning, or by a
second kernel, which starts while the first one ends. Their memory depends on shapes alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from prefix_kernels.problem import AttentionInputs, AttentionProblem

LIBRARY = Path(__file__).resolve().parents[1] / "_C_cuda.so"
DEVICE, OPERATORS = "cuda", "prefix_kernels_cuda"
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 80, 96, 128, 256)  # as in csrc/cuda/decode_launch.h
MAX_QUERIES = 8  # a row: one new token, or a few that were guessed ahead
# As in csrc/cuda, tile_sizes.h and schedule.h:
FEW_HEAD_DIMS, FEW_QUERIES = (64, 128), 8  # of a row and kv head
READ_AGAIN, CACHED = 48 * 2**20, 24 * 2**20  # bytes


@functools.cache
def _missing() -> str | None:
    """Loads the library, once; the reason why it cannot be used, or None."""
    if not LIBRARY.exists():
        return f"the CUDA kernels are not built (no {LIBRARY.name} beside the package); reinstall with nvcc at hand"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"the CUDA kernels in {LIBRARY} cannot be loaded: {error}"
    try:
        machine_code()
    except RuntimeError as error:
        return str(error).splitlines()[0].split(", ", 2)[-1]  # less the place in the source
    return None


def machine_code() -> str:
    """What the GPU runs of the library: code for its architecture, or PTX for an older one that its driver compiles."""
    return _operator("machine_code")()


def why_not(problem: AttentionProblem) -> str | None:
    """None where the kernel can serve the problem, else the reason."""
    if problem.device != DEVICE:
        return f"it runs on CUDA devices, the tensors are on {problem.device}"
    if problem.varlen or problem.q_len > MAX_QUERIES:
        return f"it decodes batches of rows with up to {MAX_QUERIES} queries each"
    if problem.gradients:
        return "it has no backward pass, and a gradient may be asked for (torch.no_grad() says that none will be)"
    if problem.dtype not in DTYPES:
        return f"it serves bfloat16 and float16, got {problem.dtype}"
    if problem.has_bias:
        return "it takes no bias"
    if problem.head_dim not in HEAD_DIMS or problem.value_dim != problem.head_dim:
        dims = ", ".join(map(str, HEAD_DIMS))
        return f"it serves head_dim {dims} with value_dim the same, got {problem.head_dim} and {problem.value_dim}"
    return _missing()


def each_row_reads_the_prefix(problem: AttentionProblem) -> bool:
    """Whether the kernel for few queries does all the work: has_few_queries and shares_prefix in csrc/cuda/schedule.h."""
    if problem.head_dim not in FEW_HEAD_DIMS or problem.q_len * problem.heads > FEW_QUERIES * problem.kv_heads:
        return False
    columns = problem.kv_len
    if problem.window is not None:
        columns = min(columns, (1 if problem.causal else 2) * problem.window + problem.q_len)
    token = problem.kv_heads * problem.head_dim * 4  # bytes
    again = problem.batch * token * (2 * problem.prefix_len - columns)
    return problem.batch == 1 or (token * problem.prefix_len <= CACHED and again <= 2 * READ_AGAIN)


def workspace_bytes(problem: AttentionProblem) -> tuple[int, int]:
    """Most bytes that the forward pass takes besides what goes in and comes out; there is no backward pass."""
    rounded = problem.prefix_values() * problem.dtype.itemsize if problem.prefix_dtype != problem.dtype else 0
    values = _operator("part_values")(
        problem.batch, problem.heads, problem.kv_heads, problem.q_len, problem.kv_len, problem.head_dim, problem.prefixes,
        problem.prefix_len, problem.window or 0, problem.causal, problem.has_prefix_ids,
    )  # fmt: skip
    return rounded + 4 * values, 0


@functools.cache
def _operator(name: str) -> Callable:
    """One of the library's; looking it up at every call would take a microsecond."""
    return getattr(getattr(torch.ops, OPERATORS), name).default


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """(out, lse) of one call; out token-major in q's dtype, lse float32."""
    tensors = *_rounded(*inputs.tensors), inputs.key_mask, inputs.key_lens, inputs.prefix_ids, inputs.prefix_lens
    return _operator("decode")(*tensors, *_options(inputs))


def repeat(inputs: AttentionInputs) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """A function of q, k, v, prefix_k, prefix_v and key_mask that gives out as forward does, for calls that differ from this
    one in the values of those tensors and in strides alone. The prefix may be without its bank axis."""
    operator, options = _operator("decode"), (None, None, None, *_options(inputs))
    return lambda *tensors: operator(*_rounded(*tensors[:5]), tensors[5], *options)[0]


def _rounded(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> tuple[Tensor, ...]:
    """The tensors of a call with its prefix in q's dtype: rounded once, and not by every block that reads it."""
    if prefix_k.dtype == q.dtype:
        return q, k, v, prefix_k, prefix_v
    return q, k, v, prefix_k.to(q.dtype), prefix_v.to(q.dtype)


def _options(inputs: AttentionInputs) -> tuple:
    """The arguments of the operator that are no tensors; 0 and −1 stand for None."""
    start = -1 if inputs.first_key_position is None else inputs.first_key_position
    return inputs.causal, inputs.scale, inputs.window or 0, inputs.softcap or 0.0, start


def backward(
    inputs: AttentionInputs, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Never called: why_not refuses whatever may need a gradient."""
    raise NotImplementedError("the CUDA kernels have no backward pass")
