"""The backward pass, through the global out and lse: dq and delta, the keys' gradients, the prefix's gradients.

Only kernels that feed a wanted gradient run. The prefix's gradients are summed over the batch in float32: a program sums one
share of the query blocks, and a last kernel adds the shares in order. Their number depends on sizes alone and has a bound.

Launches are dependent where the GPU knows such (launch.py): each kernel waits until the one before is done, then lets the next
begin. So when a kernel begins, all is done but the work of the one before. If that is dkeys, dprefix needs no more to read: it
waits before it writes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefix_kernels.backends.triton import dkeys_kernels, dq_kernel, tile_sizes
from prefix_kernels.backends.triton.dq_kernel import delta_of_block
from prefix_kernels.backends.triton.launch import LENGTHS, Call, cdiv, key_of, run, wait_for_launch_before
from prefix_kernels.backends.triton.online_softmax import load_tile, start_of
from prefix_kernels.backends.triton.rows import Operand, block_of, queries_of, scalars, tokens
from prefix_kernels.problem import AttentionInputs, empty_token_major

PROGRAMS = 264  # of the prefix kernel: two for each multiprocessor of a large GPU
HOPPER_PROGRAMS = 132  # of the one for Hopper: one has all registers of a multiprocessor
MAX_SPLITS = 32
FEW_BLOCKS = 8  # of queries, that a program goes through sooner than the shares of several are summed; assumed
SUM_BLOCK, AT_ONCE = 256, tl.constexpr(8)  # elements of a program, and parts whose loads do not wait for each other


@triton.jit(do_not_specialize=LENGTHS)
def delta_kernel(
    out, grad_out, lse, grad_lse, delta, rows, heads, kv_heads, q_len, kv_len, q_tokens, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """delta where no dq is wanted: a block of queries of one head of one row."""
    wait_for_launch_before(DEPENDENT)
    block, head, row = block_of(tl.program_id(0), tl.cdiv(q_len, BLOCK_M), heads, kv_heads, kv_len, HEAD_DIM)
    q_start, own_q_len = queries_of(rows, row, q_len, q_tokens)
    first_query = block * BLOCK_M
    if first_query >= own_q_len:
        return
    query = first_query + tl.arange(0, BLOCK_M)
    grad_tile = load_tile(
        start_of(grad_out, row, head, q_start), grad_out.token, first_query, own_q_len, True, VALUE_DIM, BLOCK_M,
        BLOCK_VALUE_DIM,
    )  # [BLOCK_M, BLOCK_VALUE_DIM]  # fmt: skip
    result = delta_of_block(
        out, grad_tile, lse, grad_lse, row, head, q_start, first_query, own_q_len, VALUE_DIM, BLOCK_M, BLOCK_VALUE_DIM
    )  # [BLOCK_M]
    tl.store(start_of(delta, row, head, q_start) + query, result, mask=query < own_q_len)


@triton.jit
def sum_block(parts, total, splits, numel, BLOCK: tl.constexpr):
    """One block of total [numel]: the sum of parts [splits, numel]; of the program's number all but the last bit counts."""
    index = tl.cast(tl.program_id(0) // 2, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    result = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, splits, AT_ONCE):
        split = first + tl.arange(0, AT_ONCE)[:, None]
        exists = (split < splits) & (index < numel)[None, :]
        part = tl.load(parts + tl.cast(split, tl.int64) * numel + index[None, :], mask=exists, other=0.0)  # [AT_ONCE, BLOCK]
        result += tl.sum(part, 0)
    tl.store(total + index, result.to(total.dtype.element_ty), mask=index < numel)


@triton.jit(do_not_specialize=["splits", "k_numel", "v_numel"])
def sum_splits_kernel(
    k_parts, v_parts, k_total, v_total, splits, k_numel, v_numel, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    """total [numel] = Σ parts [splits, numel], in order: keys in even programs, values in odd ones; None is not wanted."""
    wait_for_launch_before(DEPENDENT)
    if tl.program_id(0) % 2 == 0:
        if k_parts is not None:
            sum_block(k_parts, k_total, splits, k_numel, BLOCK)
    elif v_parts is not None:
        sum_block(v_parts, v_total, splits, v_numel, BLOCK)


def backward(
    inputs: AttentionInputs, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, prefix_k, prefix_v, None where not wanted."""
    call, varlen, hopper = Call(inputs, bias_in_vectors=True), inputs.varlen, hopper_launches(inputs)
    launches = {"dq": dq_kernel.dq, "dkeys": dkeys_kernels.dkeys, "dprefix": dkeys_kernels.dprefix} | hopper
    q, k, v, prefix_k, prefix_v = call.tensors
    if hopper:
        from prefix_kernels.backends.triton.hopper import readable

        grad_out = readable(grad_out)  # else a copy would stand between the launches
    grads = [
        empty_token_major(tensor, tuple(tensor.shape)) if needed else None
        for tensor, needed in zip((inputs.q, inputs.k, inputs.v), wanted, strict=False)
    ]
    dq, dk, dv = (None if grad is None else tokens(grad, varlen) for grad in grads)
    query_side = {"grad_out": tokens(grad_out, varlen), "lse": scalars(lse, varlen)}
    for_delta = {"out": tokens(out, varlen), "grad_lse": None if grad_lse is None else scalars(grad_lse, varlen)}
    # dq leaves delta behind, but for float32: there one more tile spills.
    if dq is None or call.problem.dtype == torch.float32:
        query_side["delta"] = _delta(call, **for_delta, **query_side)
        for_delta = {"out": None, "grad_lse": None}
    else:
        query_side["delta"] = _empty_delta(call, lse)
    if dq is not None:
        launches["dq"](call, q, k, v, prefix_k, prefix_v, dq, **for_delta, **query_side)
    if dk is not None or dv is not None:
        launches["dkeys"](call, q, k, v, dk, dv, **query_side)
    late = (dk is not None or dv is not None) and call.problem.kv_len * call.problem.batch > 0  # right after dkeys
    return *grads, *_prefix_gradients(call, inputs, wanted[3:], query_side, launches["dprefix"], late, "dprefix" in hopper)


def hopper_launches(inputs: AttentionInputs) -> dict[str, Callable]:
    """The launches for Hopper by the kernels that they replace: those that a measurement says are faster."""
    problem, regimes = inputs.problem(), tile_sizes.HOPPER_BACKWARD_REGIMES
    names = [name for name in regimes if any(regime.covers(problem) for regime in regimes[name])]
    if not names or not inputs.q.numel():
        return {}
    from prefix_kernels.backends.triton import hopper, hopper_dkeys, hopper_dq

    if hopper.why_not(inputs) is not None:
        return {}
    launches = {"dq": hopper_dq.dq, "dkeys": hopper_dkeys.dkeys, "dprefix": hopper_dkeys.dprefix}
    return {name: launches[name] for name in names}


def _delta(call: Call, lse: Operand, **operands: Operand | None) -> Operand:
    """delta by a kernel of its own."""
    delta, tile = _empty_delta(call, lse.value.pointer), call.tile("delta")
    call.launch(delta_kernel, tile, call.query_programs(tile), dependent=True, lse=lse, delta=delta, **operands)
    return delta


def _empty_delta(call: Call, lse: Tensor) -> Operand:
    return scalars(torch.empty_like(lse, memory_format=torch.contiguous_format), call.problem.varlen)


def _prefix_gradients(
    call: Call, inputs: AttentionInputs, wanted: tuple[bool, ...], query_side: dict[str, Operand], dprefix: Callable,
    late: bool, hopper: bool,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of prefix_k and prefix_v, in the prefix's dtype; hopper: `dprefix` launches the kernel for Hopper."""
    problem, tile = call.problem, call.tile("hopper_dprefix" if hopper else "dprefix")
    q, _, _, prefix_k, prefix_v = call.tensors
    owners = cdiv(problem.prefix_len, tile.BLOCK_N) * problem.kv_heads * problem.prefixes
    query_blocks = cdiv(problem.q_len, tile.BLOCK_M) * problem.batch
    few = query_blocks * problem.heads // problem.kv_heads <= FEW_BLOCKS
    splits = 1 if few else splits_of(owners, query_blocks, HOPPER_PROGRAMS if hopper else PROGRAMS)
    grads = [
        prefix.new_empty(prefix.shape) if needed else None
        for prefix, needed in zip((inputs.prefix_k, inputs.prefix_v), wanted, strict=True)
    ]
    parts = grads
    if splits > 1:
        parts = [
            None if grad is None else grad.new_empty((splits * grad.shape[0], *grad.shape[1:]), dtype=torch.float32)
            for grad in grads
        ]
    dprefix_k, dprefix_v = (None if part is None else tokens(part) for part in parts)
    if dprefix_k is not None or dprefix_v is not None:
        dprefix(call, owners * splits, splits, late, q, prefix_k, prefix_v, dprefix_k, dprefix_v, **query_side)
    if splits > 1:
        numels = [0 if grad is None else grad.numel() for grad in grads]
        values = {
            "k_parts": parts[0], "v_parts": parts[1], "k_total": grads[0], "v_total": grads[1], "splits": splits,
            "k_numel": numels[0], "v_numel": numels[1], "BLOCK": SUM_BLOCK,
        }  # fmt: skip
        key = tuple(map(key_of, (*parts, *grads))), max(numels) >> 31
        run(sum_splits_kernel, 2 * cdiv(max(numels), SUM_BLOCK), call.device, key, values, dependent=True)
    return grads


def splits_of(owners: int, query_blocks: int, programs: int = PROGRAMS) -> int:
    """Into how many shares the query blocks of the batch are split, so that there is work for a whole GPU."""
    return max(1, min(MAX_SPLITS, query_blocks, programs // max(owners, 1)))
