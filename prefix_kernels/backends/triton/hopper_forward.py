"""The forward pass for Hopper (sm_90a), in Gluon: one producer warp, two consumer warpgroups, one online softmax.

    scores = scale · q · [prefix_k ; k]ᵀ → −inf where hidden
    lse    = log Σ exp(scores)        out = exp(scores − lse) · [prefix_v ; v]

A program owns 128 queries of one head of one row: 64 for each warpgroup. The producer brings blocks of keys and values by TMA
into two rings of STAGES tiles, first the prefix's, then the row's own up to the last that a query sees. A warpgroup computes
the softmax of block j while weights · values of block j − 1 is still on its way, and beside the products of the other warpgroup
(ping-pong). Time goes to the right; ( ) is a wait:

    producer      K0 V0 K1 V1 (K0 empty) K2 (V0 empty) V2 (K1 empty) K3 …
    warpgroup 0   (K0 full) QK0 ~softmax0~ (turn) QK1 PV0 |~softmax1~ (K2 full) (PV0 done) |(turn) QK2 PV1 |~softmax2~ …
    warpgroup 1   (K0 full) QK0 ~softmax0~ ···················(turn) QK1 PV0 |~softmax1~ ···· |·············(turn) QK2 PV1 …

    full     the producer announces the bytes, TMA counts them down       the consumers wait
    empty    both consumers have read the tile                            the producer waits before the next load into it
    turn     a warpgroup has issued its products                          the other waits before it issues its own

A tile is read until the wait for its product returns, so "empty" comes after that wait. The wait for the next K tile stands
between the softmax and the wait for PV: the assembler cannot move the latter above the softmax across it, and otherwise does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)  # fmt: skip

from prefix_kernels.backends.triton import tile_sizes
from prefix_kernels.backends.triton.hopper import (
    CONSUMER_REGISTERS,
    LENGTHS,
    LN_2,
    LOG2_E,
    PRODUCER_REGISTERS,
    REGISTERS,
    descriptor,
    issue_scores,
    key_descriptors,
    load_blocks,
    load_tile,
    place_of,
    prefix_of,
    section_of,
    tokens_of,
    wait_for_keys,
)  # fmt: skip
from prefix_kernels.backends.triton.launch import cdiv, key_of, rounded_prefix, run
from prefix_kernels.backends.triton.rows import rows_of
from prefix_kernels.problem import AttentionInputs, empty_token_major

tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global  # renamed as load is, in hopper.py
HIDDEN = gl.constexpr(float("-inf"))


@gluon.jit
def produce(
    q, k, v, prefix_k, prefix_v, q_tiles, q_full, k_ring, v_ring, q_place, k_place, prefix_place, head, kv_head, first_query,
    prefix_blocks, blocks, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """All loads of a program, in the order in which the consumers want them."""
    WARPGROUP_M: gl.constexpr = q.block_type.shape[3]
    if blocks > 0:
        for warpgroup in gl.static_range(2):
            token = first_query + warpgroup * WARPGROUP_M
            load_tile(q, q_place, head, token, q_full.index(warpgroup), q_tiles.index(warpgroup))
        load_blocks(
            k, v, prefix_k, prefix_v, k_ring, v_ring, k_place, prefix_place, kv_head, prefix_blocks, blocks, BLOCK_N, STAGES
        )


@gluon.jit
def issue_sums(weights, sums, ring, j, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """sums + weights · values of block j, on its way: [WARPGROUP_M, HEAD_DIM]"""
    HEAD_DIM: gl.constexpr = sums.shape[1]
    tiles, full, _ = ring
    mbarrier.wait(full.index(j % STAGES), (j // STAGES) & 1)
    return warpgroup_mma(weights, tiles.index(j % STAGES).reshape([BLOCK_N, HEAD_DIM]), sums, is_async=True)


@gluon.jit
def softmax_step(
    scores, largest, total, first_key, stop, scale, MASKED: gl.constexpr, BLOCK_N: gl.constexpr, SCORES: gl.constexpr
):
    """(weights, largest, total, correction) after the scores of keys from `first_key` on, of which a query sees those < stop.

    largest and total are in units of log 2; correction is what earlier sums are to be multiplied with.
    """
    if MASKED:
        column = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        scores = gl.where(gl.expand_dims(column, 0) < gl.expand_dims(stop - first_key, 1), scores, HIDDEN)
    now_largest = gl.maximum(largest, gl.max(scores, 1) * scale)
    subtract = now_largest
    if MASKED:
        subtract = gl.where(now_largest == HIDDEN, 0.0, now_largest)
    weights = gl.exp2(scores * scale - gl.expand_dims(subtract, 1))
    correction = gl.exp2(largest - subtract)
    return weights, now_largest, total * correction + gl.sum(weights, 1), correction


@gluon.jit
def attend_block(
    j, blocks, first_key, stop, q_tile, weights, sums, largest, total, k_ring, v_ring, turns, scale,
    WARPGROUP: gl.constexpr, MASKED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr,
    SUMS: gl.constexpr, WEIGHTS: gl.constexpr,
):  # fmt: skip
    """The softmax of block j ≥ 1, and the sums of block j − 1. On entry the keys of block j are there."""
    before = j - 1
    mbarrier.wait(turns.index(WARPGROUP), (before & 1) ^ (1 - WARPGROUP))
    scores = issue_scores(q_tile, k_ring, j, BLOCK_N, STAGES, SCORES)
    sums = issue_sums(weights, sums, v_ring, before, BLOCK_N, STAGES)
    mbarrier.arrive(turns.index(1 - WARPGROUP), count=1)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(k_ring[2].index(j % STAGES), count=1)
    next_weights, largest, total, correction = softmax_step(
        scores, largest, total, first_key, stop, scale, MASKED, BLOCK_N, SCORES
    )
    next_weights = gl.convert_layout(next_weights.to(q_tile.dtype), WEIGHTS, assert_trivial=True)
    wait_for_keys(k_ring, j + 1, blocks, STAGES)
    sums, weights, next_weights, correction, total = warpgroup_mma_wait(
        0, deps=(sums, weights, next_weights, correction, total)
    )
    mbarrier.arrive(v_ring[2].index(before % STAGES), count=1)
    correction = gl.convert_layout(correction, gl.SliceLayout(1, SUMS), assert_trivial=True)
    return next_weights, sums * gl.expand_dims(correction, 1), largest, total


@gluon.jit
def consume(
    out, lse, q_tiles, q_full, k_ring, v_ring, turns, q_place, head, first_query, own_q_len, shift, own_kv_len, prefix_len,
    prefix_blocks, blocks, scale, WARPGROUP: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup's queries: the softmax over all blocks, then out and lse."""
    DTYPE: gl.constexpr = q_tiles.dtype
    WARPGROUP_M: gl.constexpr = q_tiles.shape[4]
    HEAD_DIM: gl.constexpr = q_tiles.shape[5]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    first = first_query + WARPGROUP * WARPGROUP_M
    query = first + gl.arange(0, WARPGROUP_M, layout=gl.SliceLayout(1, SCORES))
    prefix_stop = query * 0 + prefix_len
    if CAUSAL:
        stop = gl.minimum(query + shift + 1, own_kv_len)
        full = gl.minimum(gl.maximum(gl.minimum(first + shift + 1, own_kv_len), 0) // BLOCK_N, blocks - prefix_blocks)
    else:
        stop = query * 0 + own_kv_len
        full = own_kv_len // BLOCK_N
    largest = gl.full([WARPGROUP_M], HIDDEN, gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([WARPGROUP_M], gl.float32, gl.SliceLayout(1, SCORES))
    sums = gl.zeros([WARPGROUP_M, HEAD_DIM], gl.float32, SUMS)

    if blocks > 0:
        q_tile = q_tiles.index(WARPGROUP).reshape([WARPGROUP_M, HEAD_DIM])
        mbarrier.wait(q_full.index(WARPGROUP), 0)
        wait_for_keys(k_ring, 0, blocks, STAGES)
        scores = issue_scores(q_tile, k_ring, 0, BLOCK_N, STAGES, SCORES)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(k_ring[2].index(0), count=1)
        first_stop = gl.where(prefix_blocks > 0, prefix_stop, stop)
        weights, largest, total, _ = softmax_step(scores, largest, total, 0, first_stop, scale, True, BLOCK_N, SCORES)
        weights = gl.convert_layout(weights.to(DTYPE), WEIGHTS, assert_trivial=True)
        wait_for_keys(k_ring, 1, blocks, STAGES)
        for j in range(1, prefix_len // BLOCK_N):
            weights, sums, largest, total = attend_block(
                j, blocks, j * BLOCK_N, prefix_stop, q_tile, weights, sums, largest, total, k_ring, v_ring, turns, scale,
                WARPGROUP, False, BLOCK_N, STAGES, SCORES, SUMS, WEIGHTS,
            )  # fmt: skip
        for j in range(gl.maximum(prefix_len // BLOCK_N, 1), prefix_blocks):
            weights, sums, largest, total = attend_block(
                j, blocks, j * BLOCK_N, prefix_stop, q_tile, weights, sums, largest, total, k_ring, v_ring, turns, scale,
                WARPGROUP, True, BLOCK_N, STAGES, SCORES, SUMS, WEIGHTS,
            )  # fmt: skip
        for j in range(gl.maximum(prefix_blocks, 1), prefix_blocks + full):
            weights, sums, largest, total = attend_block(
                j, blocks, (j - prefix_blocks) * BLOCK_N, stop, q_tile, weights, sums, largest, total, k_ring, v_ring, turns,
                scale, WARPGROUP, False, BLOCK_N, STAGES, SCORES, SUMS, WEIGHTS,
            )  # fmt: skip
        for j in range(gl.maximum(prefix_blocks + full, 1), blocks):
            weights, sums, largest, total = attend_block(
                j, blocks, (j - prefix_blocks) * BLOCK_N, stop, q_tile, weights, sums, largest, total, k_ring, v_ring, turns,
                scale, WARPGROUP, True, BLOCK_N, STAGES, SCORES, SUMS, WEIGHTS,
            )  # fmt: skip
        sums = issue_sums(weights, sums, v_ring, blocks - 1, BLOCK_N, STAGES)
        sums, weights = warpgroup_mma_wait(0, deps=(sums, weights))

    share = gl.convert_layout(gl.where(total == 0.0, 0.0, 1.0 / total), gl.SliceLayout(1, SUMS), assert_trivial=True)
    result = (sums * gl.expand_dims(share, 1)).to(DTYPE)
    tile = q_tiles.index(WARPGROUP)  # its last product is done
    tile.reshape([WARPGROUP_M, HEAD_DIM]).store(result)
    fence_async_shared()
    outer, inner, offset = q_place
    tma_store(out, [outer, inner, head, offset + first, 0], tile)
    gl.store(lse + query, (largest + gl.log2(total)) * LN_2, mask=query < own_q_len)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=LENGTHS)
def hopper_kernel(
    q, k, v, prefix_k, prefix_v, out, lse, cu_seqlens_q, cu_seqlens_k, prefix_ids, heads, kv_heads, q_len, kv_len, q_tokens,
    k_tokens, prefixes, prefix_len, lse_row, lse_head, section, scale, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, CONSUMER: gl.constexpr, PRODUCER: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = q.dtype
    WARPGROUP_M: gl.constexpr = q.block_type.shape[3]
    HEAD_DIM: gl.constexpr = q.block_type.shape[4]
    BLOCK_M: gl.constexpr = 2 * WARPGROUP_M
    query_blocks = gl.cdiv(q_len, BLOCK_M)
    place, head, row = place_of(gl.program_id(0), gl.num_programs(0), query_blocks, heads, section)
    first_query = (query_blocks - 1 - place) * BLOCK_M
    q_place, own_q_len = tokens_of(cu_seqlens_q, row, q_len, q_tokens)
    k_place, own_kv_len = tokens_of(cu_seqlens_k, row, kv_len, k_tokens)
    prefix_place, own_prefix_len = prefix_of(prefix_ids, row, prefixes, prefix_len)
    lse += row.to(gl.int64) * lse_row + head.to(gl.int64) * lse_head
    if cu_seqlens_q is not None:
        lse += q_place[1] - own_q_len

    shift = own_kv_len - own_q_len  # query i stands at position i + shift
    last_stop = own_kv_len
    if CAUSAL:
        last_query = gl.minimum(first_query + BLOCK_M, own_q_len) - 1
        last_stop = gl.maximum(gl.minimum(last_query + shift + 1, own_kv_len), 0)
    prefix_blocks = gl.cdiv(own_prefix_len, BLOCK_N)
    blocks = gl.where(first_query < own_q_len, prefix_blocks + gl.cdiv(last_stop, BLOCK_N), 0)

    q_tiles = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 1, WARPGROUP_M, HEAD_DIM], q.layout)
    k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 1, BLOCK_N, HEAD_DIM], k.layout)
    v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 1, BLOCK_N, HEAD_DIM], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    k_ring, v_ring = (k_tiles, k_full, k_empty), (v_tiles, v_full, v_empty)

    gl.warp_specialize(
        [
            (consume, (out, lse, q_tiles, q_full, k_ring, v_ring, turns, q_place, head, first_query, own_q_len, shift,
                       own_kv_len, own_prefix_len, prefix_blocks, blocks, scale * LOG2_E, gl.constexpr(0), CAUSAL, BLOCK_N,
                       STAGES)),
            (consume, (out, lse, q_tiles, q_full, k_ring, v_ring, turns, q_place, head, first_query, own_q_len, shift,
                       own_kv_len, own_prefix_len, prefix_blocks, blocks, scale * LOG2_E, gl.constexpr(1), CAUSAL, BLOCK_N,
                       STAGES)),
            (produce, (q, k, v, prefix_k, prefix_v, q_tiles, q_full, k_ring, v_ring, q_place, k_place, prefix_place, head,
                       head // (heads // kv_heads), first_query, prefix_blocks, blocks, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [CONSUMER, PRODUCER],
    )  # fmt: skip


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call that `why_not` has nothing against; out token-major in q's dtype, lse float32."""
    q, packed, problem = inputs.q, inputs.varlen, inputs.problem()
    out = empty_token_major(q, tuple(q.shape))
    lse = q.new_empty((problem.heads, problem.q_tokens) if packed else q.shape[:3], dtype=torch.float32)
    tile = tile_sizes.find("hopper", q.device, q.dtype, problem.head_dim)
    programs = cdiv(problem.q_len, tile.BLOCK_M) * problem.heads * problem.batch
    if q.numel() == 0 or programs == 0:
        return out, lse
    prefix = [tensor.contiguous() for tensor in rounded_prefix(inputs)]
    keys = key_descriptors(q, (inputs.k, inputs.v), prefix, tile.BLOCK_N, packed)
    rows = descriptor(q, tile.BLOCK_M // 2, packed), descriptor(out, tile.BLOCK_M // 2, packed)
    index = rows_of(inputs).value
    values = {
        "q": rows[0], "k": keys[0], "v": keys[1], "prefix_k": keys[2], "prefix_v": keys[3], "out": rows[1], "lse": lse,
        "cu_seqlens_q": index.cu_seqlens_q, "cu_seqlens_k": index.cu_seqlens_k, "prefix_ids": index.prefix_ids,
        "heads": problem.heads, "kv_heads": problem.kv_heads, "q_len": problem.q_len, "kv_len": problem.kv_len,
        "q_tokens": problem.q_tokens, "k_tokens": problem.k_tokens, "prefixes": problem.prefixes,
        "prefix_len": problem.prefix_len, "lse_row": 0 if packed else lse.stride(0), "lse_head": lse.stride(-2),
        "section": section_of(problem, problem.kv_len * problem.kv_heads, problem.heads * problem.batch),
        "scale": inputs.scale, "CAUSAL": problem.causal, "BLOCK_N": tile.BLOCK_N, "STAGES": tile.num_stages,
        "CONSUMER": CONSUMER_REGISTERS, "PRODUCER": PRODUCER_REGISTERS,
    }  # fmt: skip
    key = (
        tile, q.dtype, problem.head_dim, packed, problem.causal, *map(key_of, index), lse.stride(0), lse.stride(-2),
        max(problem.q_tokens, problem.k_tokens) >> 31,
    )  # fmt: skip
    run(hopper_kernel, programs, q.device, key, values, num_warps=tile.num_warps, maxnreg=REGISTERS)
    return out, lse
