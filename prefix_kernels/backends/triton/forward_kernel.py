"""The forward pass: one kernel, one online softmax over the prefix, the parent's keys and the row's own keys.

    scores = scale · q · [prefix_k ; k]ᵀ → softcap → + bias → −inf where hidden
    lse    = log Σ exp(scores)        out = exp(scores − lse) · [prefix_v ; v]

A program owns a block of queries of one head of one row. The prefix has no batch axis and is read where it lies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefix_kernels.backends.triton.launch import LENGTHS, Call
from prefix_kernels.backends.triton.online_softmax import (
    bias_exists,
    load_bias,
    load_tile,
    lse_of,
    scores_of,
    start_of,
    start_of_bias,
    store_tile,
    visible_keys,
)  # fmt: skip
from prefix_kernels.backends.triton.rows import (
    block_of,
    columns_seen,
    keys_of,
    keys_seen,
    parent_of,
    prefix_of,
    queries_of,
    scalars,
    shift_of,
    split_range,
    tokens,
)  # fmt: skip
from prefix_kernels.problem import AttentionInputs, empty_token_major


@triton.jit
def attend_blocks(
    sums, largest, total, q, keys, values, key_stride, value_stride, stop_key, first, stop, begin, end, key_mask, bias,
    scale, softcap, MASKED: tl.constexpr, WINDOWED: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr, BIAS_VECTOR: tl.constexpr,
):  # fmt: skip
    """The softmax state after the blocks of keys in [begin, end)."""
    for start in tl.range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = load_tile(keys, key_stride, start, stop_key, MASKED, HEAD_DIM, BLOCK_N, BLOCK_DIM)
        scores = scores_of(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap)  # [BLOCK_M, BLOCK_N]
        if bias is not None:
            exists = bias_exists(key, stop_key, BIAS_VECTOR)[None, :]
            scores += load_bias(bias[:, None] + key[None, :], exists)  # [BLOCK_M, BLOCK_N]
        if MASKED:
            scores = tl.where(visible_keys(key, stop_key, first, stop, key_mask, WINDOWED), scores, float("-inf"))
        now_largest = tl.maximum(largest, tl.max(scores, 1))
        if MASKED:
            subtract = tl.where(now_largest == float("-inf"), 0.0, now_largest)
        else:
            subtract = now_largest
        weights = tl.exp2(scores - subtract[:, None])
        correction = tl.exp2(largest - subtract)
        total = total * correction + tl.sum(weights, 1)
        v = load_tile(values, value_stride, start, stop_key, MASKED, VALUE_DIM, BLOCK_N, BLOCK_VALUE_DIM)
        sums = tl.dot(weights.to(q.dtype), v, sums * correction[:, None], input_precision="ieee")
        largest = now_largest
    return sums, largest, total


@triton.jit
def attend(
    sums, largest, total, q, keys, values, key_stride, value_stride, stop_key, first, stop, blocks, key_mask, bias, scale,
    softcap, WINDOWED: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr, BIAS_VECTOR: tl.constexpr,
):  # fmt: skip
    """The softmax state after one segment of keys, of which each query sees [first, stop): masks on edge blocks alone."""
    begin, full_begin, full_end, end = blocks
    if key_mask is not None or bias is not None:
        full_begin, full_end = begin, begin
    elif WINDOWED:
        sums, largest, total = attend_blocks(
            sums, largest, total, q, keys, values, key_stride, value_stride, stop_key, first, stop, begin, full_begin,
            key_mask, bias, scale, softcap, True, True, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_DIM, BLOCK_VALUE_DIM, BIAS_VECTOR,
        )  # fmt: skip
    if key_mask is None and bias is None:
        sums, largest, total = attend_blocks(
            sums, largest, total, q, keys, values, key_stride, value_stride, stop_key, first, stop, full_begin, full_end,
            key_mask, bias, scale, softcap, False, False, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_DIM, BLOCK_VALUE_DIM, BIAS_VECTOR,
        )  # fmt: skip
    return attend_blocks(
        sums, largest, total, q, keys, values, key_stride, value_stride, stop_key, first, stop, full_end, end, key_mask, bias,
        scale, softcap, True, WINDOWED, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_DIM, BLOCK_VALUE_DIM, BIAS_VECTOR,
    )  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    q, k, v, prefix_k, prefix_v, bias, out, lse, rows, batch, heads, kv_heads, q_len, kv_len, q_tokens, k_tokens, prefixes,
    prefix_len, window, slide, scale, softcap, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BIAS_VECTOR: tl.constexpr,
):  # fmt: skip
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
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_VALUE_DIM], tl.float32)

    prefix, own_prefix_len = prefix_of(rows, row, prefixes, prefix_len)
    first, stop = columns_seen(query, shift, own_prefix_len, slide)
    first_low, stop_low = columns_seen(first_query, shift, own_prefix_len, slide)
    first_high, stop_high = columns_seen(last_query, shift, own_prefix_len, slide)
    sums, largest, total = attend(
        sums, largest, total, q_tile, start_of(prefix_k, prefix, kv_head, 0), start_of(prefix_v, prefix, kv_head, 0),
        prefix_k.token, prefix_v.token, own_prefix_len, first, stop,
        split_range(first_low, first_high, stop_low, stop_high, BLOCK_N), None,
        start_of_bias(bias, row, head, tl.minimum(query, last_query), 0, BIAS_VECTOR), scale, softcap, slide is not None,
        HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_DIM, BLOCK_VALUE_DIM, BIAS_VECTOR,
    )  # fmt: skip

    if rows.parent is not None:
        parent = parent_of(rows, row, batch)
        parent_start, parent_len, _ = keys_of(rows, tl.maximum(parent, 0), kv_len, k_tokens)
        parent_len = tl.where(parent >= 0, parent_len, 0)
        sums, largest, total = attend(
            sums, largest, total, q_tile, start_of(k, 0, kv_head, parent_start), start_of(v, 0, kv_head, parent_start),
            k.token, v.token, parent_len, query * 0, query * 0 + parent_len,
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
    sums, largest, total = attend(
        sums, largest, total, q_tile, start_of(k, row, kv_head, k_start), start_of(v, row, kv_head, k_start),
        k.token, v.token, own_kv_len, first, stop,
        split_range(first_low, first_high, stop_low, stop_high, BLOCK_N), key_mask,
        start_of_bias(bias, row, head, tl.minimum(query, last_query), own_column, BIAS_VECTOR), scale, softcap,
        window is not None, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_DIM, BLOCK_VALUE_DIM, BIAS_VECTOR,
    )  # fmt: skip

    result = sums / tl.where(total == 0, 1.0, total)[:, None]
    store_tile(
        start_of(out, row, head, q_start), out.token, first_query, own_q_len, result, VALUE_DIM, BLOCK_M, BLOCK_VALUE_DIM
    )
    pointers = start_of(lse, row, head, q_start) + query
    tl.store(pointers, lse_of(largest, total), mask=query < own_q_len)


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """(out, lse) of one call; out token-major in q's dtype, lse float32."""
    q, varlen = inputs.q, inputs.varlen
    out = empty_token_major(q, (*q.shape[:-1], inputs.v.shape[-1]))
    lse = q.new_empty((q.shape[1], q.shape[0]) if varlen else q.shape[:3], dtype=torch.float32)
    call = Call(inputs, bias_in_vectors=True)
    tile = call.tile("forward")
    q, k, v, prefix_k, prefix_v = call.tensors
    call.launch(
        forward_kernel, tile, call.query_programs(tile), q=q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v, bias=call.bias,
        out=tokens(out, varlen), lse=scalars(lse, varlen),
    )  # fmt: skip
    return out, lse
