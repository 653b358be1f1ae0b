"""The gradients of keys and values. A program owns a block of them and runs over the queries that see it; nothing is added
to memory by two programs, so the same call gives the same bits.

    weightsᵀ = exp(keys · qᵀ − lse)                dvalues = weightsᵀ · dout
    dscoresᵀ = weightsᵀ ∘ (values · doutᵀ − delta)      dkeys = scale · dscoresᵀ · q

dkeys_kernel: a row's own keys, over the heads of a group, the row's queries and its children's.
dprefix_kernel: a prefix, over the heads of a group and one share of all query blocks of the batch, summed in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefix_kernels.backends.triton.launch import LENGTHS, Call, cdiv, wait_for_launch_before
from prefix_kernels.backends.triton.online_softmax import (
    bias_exists,
    load_bias,
    load_log2_lse,
    load_tile,
    scores_of,
    start_of,
    start_of_bias,
    store_tile,
    through_softcap,
)  # fmt: skip
from prefix_kernels.backends.triton.rows import (
    Operand,
    clamp,
    keys_of,
    place_of,
    prefix_of,
    queries_of,
    queries_seeing,
    queries_seeing_column,
    section_of,
    shift_of,
)  # fmt: skip


@triton.jit
def add_queries(
    dk, dv, k, v, q, grad_out, lse, delta, bias, column, exists, row, first_head, group, q_start, q_len, first, stop, begin,
    end, scale, softcap, FIRST: tl.constexpr, STOP: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr, BIAS_VECTOR: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv after a row's queries in [begin, end), of all heads of the group.

    column, exists: each key's column of the bias, and whether there is one to read.
    FIRST, STOP: each key is seen by queries [first, stop) alone. One loop for edge blocks and whole ones: a copy without masks
    costs more registers than there are.
    """
    for head in tl.range(first_head, first_head + group):
        queries, grads = start_of(q, row, head, q_start), start_of(grad_out, row, head, q_start)
        lses, deltas = start_of(lse, row, head, q_start), start_of(delta, row, head, q_start)
        for start in tl.range(begin, end, BLOCK_M):
            query = start + tl.arange(0, BLOCK_M)
            q_tile = load_tile(queries, q.token, start, q_len, True, HEAD_DIM, BLOCK_M, BLOCK_DIM)  # [BLOCK_M, BLOCK_DIM]
            grad_tile = load_tile(
                grads, grad_out.token, start, q_len, True, VALUE_DIM, BLOCK_M, BLOCK_VALUE_DIM
            )  # [BLOCK_M, BLOCK_VALUE_DIM]
            scores = scores_of(tl.dot(k, tl.trans(q_tile), input_precision="ieee"), scale, softcap)  # [BLOCK_N, BLOCK_M]
            biased = scores
            if bias is not None:
                offset = tl.minimum(tl.arange(0, BLOCK_M), q_len - 1 - start) * bias.token
                offset = tl.multiple_of(offset, BIAS_VECTOR)[None, :] + column[:, None]
                biased = scores + load_bias(
                    start_of_bias(bias, row, head, start, 0, BIAS_VECTOR) + offset, exists[:, None]
                )  # [BLOCK_N, BLOCK_M]
            weights = tl.exp2(biased - load_log2_lse(lses, query, q_len)[None, :])
            if FIRST:
                weights = tl.where(query[None, :] >= first[:, None], weights, 0.0)
            if STOP:
                weights = tl.where(query[None, :] < stop[:, None], weights, 0.0)
            if WANT_DV:
                dv = tl.dot(weights.to(q_tile.dtype), grad_tile, dv, input_precision="ieee")
            if WANT_DK:
                delta_of = tl.load(deltas + query, mask=query < q_len, other=0.0)  # [BLOCK_M]
                dweights = tl.dot(v, tl.trans(grad_tile), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
                dscores = through_softcap(weights * (dweights - delta_of[None, :]), scores, softcap)
                dk = tl.dot(dscores.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def dkeys_kernel(
    q, k, v, bias, grad_out, lse, delta, dk, dv, children, first_child, rows, heads, kv_heads, q_len, kv_len, q_tokens,
    k_tokens, prefix_len, window, scale, softcap, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BIAS_VECTOR: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of a row's keys, of one kv head. children: the rows in the order of their parents."""
    wait_for_launch_before(DEPENDENT)
    blocks, group = tl.cdiv(kv_len, BLOCK_N), heads // kv_heads
    block, kv_head, row = place_of(tl.program_id(0), blocks, kv_heads, section_of(group * q_len, HEAD_DIM))
    k_start, own_kv_len, buffer_len = keys_of(rows, row, kv_len, k_tokens)
    first_key = block * BLOCK_N
    if first_key >= buffer_len:
        return
    key = first_key + tl.arange(0, BLOCK_N)
    k_tile = load_tile(
        start_of(k, row, kv_head, k_start), k.token, first_key, own_kv_len, True, HEAD_DIM, BLOCK_N, BLOCK_DIM
    )  # [BLOCK_N, BLOCK_DIM]
    v_tile = load_tile(
        start_of(v, row, kv_head, k_start), v.token, first_key, own_kv_len, True, VALUE_DIM, BLOCK_N, BLOCK_VALUE_DIM
    )  # [BLOCK_N, BLOCK_VALUE_DIM]
    dk_sum = tl.zeros([BLOCK_N, BLOCK_DIM], tl.float32)
    dv_sum = tl.zeros([BLOCK_N, BLOCK_VALUE_DIM], tl.float32)

    q_start, own_q_len = queries_of(rows, row, q_len, q_tokens)
    shift = shift_of(own_kv_len, own_q_len, CAUSAL)
    last_key = tl.minimum(first_key + BLOCK_N, own_kv_len) - 1
    first, stop = queries_seeing(key, shift, own_q_len, window, CAUSAL)
    begin, _ = queries_seeing(first_key, shift, own_q_len, window, CAUSAL)
    _, end = queries_seeing(last_key, shift, own_q_len, window, CAUSAL)
    end = tl.where(last_key < first_key, 0, end)
    own_column = tl.cdiv(prefix_len, BIAS_VECTOR) * BIAS_VECTOR  # of the bias
    dk_sum, dv_sum = add_queries(
        dk_sum, dv_sum, k_tile, v_tile, q, grad_out, lse, delta, bias, own_column + key,
        bias_exists(key, own_kv_len, BIAS_VECTOR), row, kv_head * group, group, q_start, own_q_len, first, stop,
        begin // BLOCK_M * BLOCK_M, end, scale, softcap, CAUSAL or window is not None, window is not None, dk is not None,
        dv is not None, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_DIM, BLOCK_VALUE_DIM, BIAS_VECTOR,
    )  # fmt: skip

    if children is not None:
        for index in tl.range(tl.load(first_child + row), tl.load(first_child + row + 1)):
            child = tl.load(children + index)
            q_start, own_q_len = queries_of(rows, child, q_len, q_tokens)
            dk_sum, dv_sum = add_queries(
                dk_sum, dv_sum, k_tile, v_tile, q, grad_out, lse, delta, None, None, None, child, kv_head * group, group,
                q_start, own_q_len, first, stop, 0, own_q_len, scale, softcap, False, False, dk is not None, dv is not None,
                HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_DIM, BLOCK_VALUE_DIM, BIAS_VECTOR,
            )  # fmt: skip

    exists = key < own_kv_len
    if rows.key_mask is not None:
        mask = rows.key_mask + tl.cast(row, tl.int64) * kv_len
        exists = exists & (tl.load(mask + key, mask=exists, other=0) != 0)
    if dk is not None:
        store_tile(
            start_of(dk, row, kv_head, k_start), dk.token, first_key, buffer_len,
            tl.where(exists[:, None], dk_sum * scale, 0.0), HEAD_DIM, BLOCK_N, BLOCK_DIM,
        )  # fmt: skip
    if dv is not None:
        store_tile(
            start_of(dv, row, kv_head, k_start), dv.token, first_key, buffer_len,
            tl.where(exists[:, None], dv_sum, 0.0), VALUE_DIM, BLOCK_N, BLOCK_VALUE_DIM,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*LENGTHS, "splits"])
def dprefix_kernel(
    q, prefix_k, prefix_v, bias, grad_out, lse, delta, dprefix_k, dprefix_v, splits, rows, batch, heads, kv_heads, q_len,
    kv_len, q_tokens, k_tokens, prefixes, prefix_len, slide, scale, softcap, CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS_VECTOR: tl.constexpr, DEPENDENT: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """dprefix_k and dprefix_v [splits · prefixes, kv_heads, prefix_len, …]: the sums over each split's share of the queries.

    LATE: what it reads was there before the launch before began, so it computes beside that, and waits before it writes.
    """
    if not LATE:
        wait_for_launch_before(DEPENDENT)
    blocks, group = tl.cdiv(prefix_len, BLOCK_N), heads // kv_heads
    program = tl.program_id(0)
    first_column, kv_head = program % blocks * BLOCK_N, program // blocks % kv_heads
    result = program // blocks // kv_heads  # split · prefixes + prefix
    split, prefix = result // prefixes, result % prefixes
    column = first_column + tl.arange(0, BLOCK_N)
    length = prefix_len
    if rows.prefix_lens is not None:
        length = clamp(tl.load(rows.prefix_lens + prefix), 0, prefix_len)
    k_tile = load_tile(
        start_of(prefix_k, prefix, kv_head, 0), prefix_k.token, first_column, length, True, HEAD_DIM, BLOCK_N, BLOCK_DIM
    )  # [BLOCK_N, BLOCK_DIM]
    v_tile = load_tile(
        start_of(prefix_v, prefix, kv_head, 0), prefix_v.token, first_column, length, True, VALUE_DIM, BLOCK_N,
        BLOCK_VALUE_DIM,
    )  # [BLOCK_N, BLOCK_VALUE_DIM]  # fmt: skip
    dk_sum = tl.zeros([BLOCK_N, BLOCK_DIM], tl.float32)
    dv_sum = tl.zeros([BLOCK_N, BLOCK_VALUE_DIM], tl.float32)

    query_blocks = tl.maximum(tl.cdiv(q_len, BLOCK_M), 1)  # of a row
    share = tl.cdiv(batch * query_blocks, splits)
    share_start = split * share
    share_stop = tl.minimum(share_start + share, batch * query_blocks)
    for row in tl.range(share_start // query_blocks, tl.cdiv(share_stop, query_blocks)):
        own_prefix, own_prefix_len = prefix_of(rows, row, prefixes, prefix_len)
        q_start, own_q_len = queries_of(rows, row, q_len, q_tokens)
        _, own_kv_len, _ = keys_of(rows, row, kv_len, k_tokens)
        shift = shift_of(own_kv_len, own_q_len, CAUSAL)
        first, stop = queries_seeing_column(column, shift, length, own_q_len, slide)
        _, end = queries_seeing_column(first_column + BLOCK_N - 1, shift, length, own_q_len, slide)
        begin = tl.maximum(share_start - row * query_blocks, 0) * BLOCK_M
        end = tl.minimum(tl.minimum(share_stop - row * query_blocks, query_blocks) * BLOCK_M, end)
        end = tl.where((own_prefix == prefix) & (own_prefix_len > 0), end, begin)
        dk_sum, dv_sum = add_queries(
            dk_sum, dv_sum, k_tile, v_tile, q, grad_out, lse, delta, bias, column,
            bias_exists(column, length, BIAS_VECTOR), row, kv_head * group, group, q_start, own_q_len, first, stop, begin, end,
            scale, softcap, False, slide is not None, dprefix_k is not None, dprefix_v is not None, HEAD_DIM, VALUE_DIM,
            BLOCK_M, BLOCK_DIM, BLOCK_VALUE_DIM, BIAS_VECTOR,
        )  # fmt: skip

    if LATE:
        wait_for_launch_before(DEPENDENT)
    exists = (column < length)[:, None]
    if dprefix_k is not None:
        store_tile(
            start_of(dprefix_k, result, kv_head, 0), dprefix_k.token, first_column, prefix_len,
            tl.where(exists, dk_sum * scale, 0.0), HEAD_DIM, BLOCK_N, BLOCK_DIM,
        )  # fmt: skip
    if dprefix_v is not None:
        store_tile(
            start_of(dprefix_v, result, kv_head, 0), dprefix_v.token, first_column, prefix_len,
            tl.where(exists, dv_sum, 0.0), VALUE_DIM, BLOCK_N, BLOCK_VALUE_DIM,
        )  # fmt: skip


def dkeys(
    call: Call, q: Operand, k: Operand, v: Operand, dk: Operand | None, dv: Operand | None, **query_side: Operand
) -> None:
    """Writes dk and dv, those that are not None. query_side: grad_out, lse and delta."""
    tile, problem = call.tile("dkeys"), call.problem
    children, first_child = _children(call.rows.value.parent)
    call.launch(
        dkeys_kernel, tile, cdiv(problem.kv_len, tile.BLOCK_N) * problem.kv_heads * problem.batch, dependent=True,
        q=q, k=k, v=v, bias=call.bias, dk=dk, dv=dv, children=children, first_child=first_child, **query_side,
    )  # fmt: skip


def _children(parent: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Sequences sorted by parent, and where the children of each begin among them; nothing is read back from the device."""
    if parent is None:
        return None, None
    by_parent, children = parent.sort(stable=True)
    row = torch.arange(parent.shape[0] + 1, dtype=by_parent.dtype, device=by_parent.device)
    return children, torch.searchsorted(by_parent, row)


def dprefix(
    call: Call, programs: int, splits: int, late: bool, q: Operand, prefix_k: Operand, prefix_v: Operand,
    dprefix_k: Operand | None, dprefix_v: Operand | None, **query_side: Operand,
) -> None:  # fmt: skip
    """Writes the parts [splits · prefixes, kv_heads, prefix_len, …] of dprefix_k and dprefix_v, those that are not None.

    late: the launch before was dkeys', of which this one reads nothing. query_side: grad_out, lse and delta.
    """
    call.launch(
        dprefix_kernel, call.tile("dprefix"), programs, dependent=True, q=q, prefix_k=prefix_k, prefix_v=prefix_v,
        bias=call.bias, dprefix_k=dprefix_k, dprefix_v=dprefix_v, splits=splits, LATE=late, **query_side,
    )  # fmt: skip
