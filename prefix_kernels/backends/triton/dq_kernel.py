"""The gradient of the queries: a program owns a block of queries of one head of one row, as in the forward pass.

    delta   = rowsum(dout ∘ out) − dlse
    weights = exp(scores − lse)
    dscores = weights ∘ (dout · valuesᵀ − delta)        dq = scale · dscores · [prefix_k ; k]

It leaves delta for the gradients of keys and prefix, or reads it where it is given no out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from prefix_kernels.backends.triton.launch import LENGTHS, Call, wait_for_launch_before
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
    visible_keys,
)  # fmt: skip
from prefix_kernels.backends.triton.rows import (
    Operand,
    block_of,
    columns_seen,
    keys_of,
    keys_seen,
    parent_of,
    prefix_of,
    queries_of,
    shift_of,
    split_range,
)  # fmt: skip


@triton.jit
def add_blocks(
    dq, q, grad_out, lse, delta, keys, values, key_stride, value_stride, stop_key, first, stop, begin, end, key_mask,
    bias, scale, softcap, MASKED: tl.constexpr, WINDOWED: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr, BIAS_VECTOR: tl.constexpr,
):  # fmt: skip
    """dq / scale after the blocks of keys in [begin, end)."""
    for start in tl.range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = load_tile(keys, key_stride, start, stop_key, MASKED, HEAD_DIM, BLOCK_N, BLOCK_DIM)  # [BLOCK_N, BLOCK_DIM]
        v = load_tile(
            values, value_stride, start, stop_key, MASKED, VALUE_DIM, BLOCK_N, BLOCK_VALUE_DIM
        )  # [BLOCK_N, BLOCK_VALUE_DIM]
        scores = scores_of(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap)  # [BLOCK_M, BLOCK_N]
        biased = scores
        if bias is not None:
            exists = bias_exists(key, stop_key, BIAS_VECTOR)[None, :]
            biased = scores + load_bias(bias[:, None] + key[None, :], exists)  # [BLOCK_M, BLOCK_N]
        weights = tl.exp2(biased - lse[:, None])
        if MASKED:
            weights = tl.where(visible_keys(key, stop_key, first, stop, key_mask, WINDOWED), weights, 0.0)
        dweights = tl.dot(grad_out, tl.trans(v), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        dscores = through_softcap(weights * (dweights - delta[:, None]), scores, softcap)
        dq = tl.dot(dscores.to(q.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def add_segment(
    dq, q, grad_out, lse, delta, keys, values, key_stride, value_stride, stop_key, first, stop, blocks, key_mask, bias,
    scale, softcap, WINDOWED: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr, BIAS_VECTOR: tl.constexpr,
):  # fmt: skip
    """dq / scale after one segment of keys, of which each query sees [first, stop): masks on edge blocks alone."""
    begin, full_begin, full_end, end = blocks
    if key_mask is not None or bias is not None:
        full_end = begin
    elif WINDOWED:
        dq = add_blocks(
            dq, q, grad_out, lse, delta, keys, values, key_stride, value_stride, stop_key, first, stop, begin, full_begin,
            key_mask, bias, scale, softcap, True, True, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_DIM, BLOCK_VALUE_DIM, BIAS_VECTOR,
        )  # fmt: skip
    if key_mask is None and bias is None:
        dq = add_blocks(
            dq, q, grad_out, lse, delta, keys, values, key_stride, value_stride, stop_key, first, stop, full_begin, full_end,
            key_mask, bias, scale, softcap, False, False, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_DIM, BLOCK_VALUE_DIM, BIAS_VECTOR,
        )  # fmt: skip
    return add_blocks(
        dq, q, grad_out, lse, delta, keys, values, key_stride, value_stride, stop_key, first, stop, full_end, end, key_mask,
        bias, scale, softcap, True, WINDOWED, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_DIM, BLOCK_VALUE_DIM, BIAS_VECTOR,
    )  # fmt: skip


@triton.jit
def delta_of_block(
    out, grad_tile, lse, grad_lse, row, head, q_start, first_query, own_q_len, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """delta of a block of queries [BLOCK_M]; one that sees nothing takes no gradient from its lse."""
    query = first_query + tl.arange(0, BLOCK_M)
    out_tile = load_tile(
        start_of(out, row, head, q_start), out.token, first_query, own_q_len, True, VALUE_DIM, BLOCK_M, BLOCK_VALUE_DIM
    )  # [BLOCK_M, BLOCK_VALUE_DIM]
    result = tl.sum(out_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)
    if grad_lse is not None:
        exists = query < own_q_len
        lse_of = tl.load(start_of(lse, row, head, q_start) + query, mask=exists, other=0.0)  # [BLOCK_M]
        grad_lse_of = tl.load(start_of(grad_lse, row, head, q_start) + query, mask=exists, other=0.0)  # [BLOCK_M]
        result = result - tl.where(lse_of == float("-inf"), 0.0, grad_lse_of)
    return result


@triton.jit(do_not_specialize=LENGTHS)
def dq_kernel(
    q, k, v, prefix_k, prefix_v, bias, out, grad_out, lse, grad_lse, delta, dq, rows, batch, heads, kv_heads, q_len, kv_len,
    q_tokens, k_tokens, prefixes, prefix_len, window, slide, scale, softcap, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BIAS_VECTOR: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_launch_before(DEPENDENT)
    block, head, row = block_of(tl.program_id(0), tl.cdiv(q_len, BLOCK_M), heads, kv_heads, kv_len, HEAD_DIM)
    kv_head = head // (heads // kv_heads)
    q_start, own_q_len = queries_of(rows, row, q_len, q_tokens)
    first_query = block * BLOCK_M
    if first_query >= own_q_len:
        return
    last_query = tl.minimum(first_query + BLOCK_M, own_q_len) - 1
    query = first_query + tl.arange(0, BLOCK_M)
    k_start, own_kv_len, _ = keys_of(rows, row, kv_len, k_tokens)
    shift = shift_of(own_kv_len, own_q_len, CAUSAL)
    q_tile = load_tile(
        start_of(q, row, head, q_start), q.token, first_query, own_q_len, True, HEAD_DIM, BLOCK_M, BLOCK_DIM
    )  # [BLOCK_M, BLOCK_DIM]
    grad_tile = load_tile(
        start_of(grad_out, row, head, q_start), grad_out.token, first_query, own_q_len, True, VALUE_DIM, BLOCK_M,
        BLOCK_VALUE_DIM,
    )  # [BLOCK_M, BLOCK_VALUE_DIM]  # fmt: skip
    lse_of = load_log2_lse(start_of(lse, row, head, q_start), query, own_q_len)  # [BLOCK_M]
    if out is None:
        delta_of = tl.load(start_of(delta, row, head, q_start) + query, mask=query < own_q_len, other=0.0)  # [BLOCK_M]
    else:
        delta_of = delta_of_block(
            out, grad_tile, lse, grad_lse, row, head, q_start, first_query, own_q_len, VALUE_DIM, BLOCK_M, BLOCK_VALUE_DIM
        )  # [BLOCK_M]
        tl.store(start_of(delta, row, head, q_start) + query, delta_of, mask=query < own_q_len)
    total = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)

    prefix, own_prefix_len = prefix_of(rows, row, prefixes, prefix_len)
    first, stop = columns_seen(query, shift, own_prefix_len, slide)
    first_low, stop_low = columns_seen(first_query, shift, own_prefix_len, slide)
    first_high, stop_high = columns_seen(last_query, shift, own_prefix_len, slide)
    total = add_segment(
        total, q_tile, grad_tile, lse_of, delta_of, start_of(prefix_k, prefix, kv_head, 0),
        start_of(prefix_v, prefix, kv_head, 0), prefix_k.token, prefix_v.token, own_prefix_len, first, stop,
        split_range(first_low, first_high, stop_low, stop_high, BLOCK_N), None,
        start_of_bias(bias, row, head, tl.minimum(query, last_query), 0, BIAS_VECTOR), scale, softcap, slide is not None,
        HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_DIM, BLOCK_VALUE_DIM, BIAS_VECTOR,
    )  # fmt: skip

    if rows.parent is not None:
        parent = parent_of(rows, row, batch)
        parent_start, parent_len, _ = keys_of(rows, tl.maximum(parent, 0), kv_len, k_tokens)
        parent_len = tl.where(parent >= 0, parent_len, 0)
        total = add_segment(
            total, q_tile, grad_tile, lse_of, delta_of, start_of(k, 0, kv_head, parent_start),
            start_of(v, 0, kv_head, parent_start), k.token, v.token, parent_len, query * 0, query * 0 + parent_len,
            split_range(0, 0, parent_len, parent_len, BLOCK_N), None, None, scale, softcap, False,
            HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_DIM, BLOCK_VALUE_DIM, BIAS_VECTOR,
        )  # fmt: skip

    key_mask = None
    if rows.key_mask is not None:
        key_mask = rows.key_mask + tl.cast(row, tl.int64) * kv_len
    first, stop = keys_seen(query, shift, own_kv_len, window, CAUSAL)
    first_low, stop_low = keys_seen(first_query, shift, own_kv_len, window, CAUSAL)
    first_high, stop_high = keys_seen(last_query, shift, own_kv_len, window, CAUSAL)
    own_column = tl.cdiv(prefix_len, BIAS_VECTOR) * BIAS_VECTOR  # of the bias
    total = add_segment(
        total, q_tile, grad_tile, lse_of, delta_of, start_of(k, row, kv_head, k_start), start_of(v, row, kv_head, k_start),
        k.token, v.token, own_kv_len, first, stop, split_range(first_low, first_high, stop_low, stop_high, BLOCK_N),
        key_mask, start_of_bias(bias, row, head, tl.minimum(query, last_query), own_column, BIAS_VECTOR), scale, softcap,
        window is not None, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_DIM, BLOCK_VALUE_DIM, BIAS_VECTOR,
    )  # fmt: skip
    store_tile(start_of(dq, row, head, q_start), dq.token, first_query, own_q_len, total * scale, HEAD_DIM, BLOCK_M, BLOCK_DIM)


def dq(
    call: Call, q: Operand, k: Operand, v: Operand, prefix_k: Operand, prefix_v: Operand, dq: Operand,
    **query_side: Operand | None,
) -> None:  # fmt: skip
    """Writes dq, and delta if `out` is not None. query_side: out, grad_out, lse, grad_lse and delta."""
    tile = call.tile("dq")
    call.launch(
        dq_kernel, tile, call.query_programs(tile), dependent=True, q=q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v,
        bias=call.bias, dq=dq, **query_side,
    )  # fmt: skip
