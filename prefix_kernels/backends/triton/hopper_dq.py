"""The gradient of the queries for Hopper (sm_90a), in Gluon: one producer warp and two consumer warpgroups.

    delta   = rowsum(dout ∘ out) − dlse, which it leaves for the gradients of keys and prefix
    weights = exp(scale · q · [prefix_k ; k]ᵀ − lse)
    dscores = weights ∘ (dout · [prefix_v ; v]ᵀ − delta)        dq = scale · dscores · [prefix_k ; k]

A program owns 128 queries of one head of one row, 64 for each warpgroup. The producer brings blocks of keys and values by TMA
into two rings of STAGES tiles. A warpgroup computes dscores of block j while dscores · keys of block j − 1 is still on its way.
Time goes to the right; ( ) is a wait, | a wait for a product:

    S0 P0 delta |weights0 dscores0 (K1 V1 full) S1 P1 Q0 |weights1 (V2 full) |dscores1 (V2 full) |(K2 full) S2 P2 Q1 |weights2 …

    S, P, Q      the products q · keysᵀ, dout · valuesᵀ and dscores · keys
    full, empty  as in hopper_forward.py. Block j's values are given back after P, its keys with those of block j + 1 in use

V2 is waited for twice for the reason given in hopper_forward.py: no wait for a product moves across such a wait.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

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
    store_sums,
    tokens_of,
    wait_for_keys,
    wait_for_launch_before,
)  # fmt: skip
from prefix_kernels.backends.triton.launch import Call, key_of, run
from prefix_kernels.backends.triton.rows import Operand


@gluon.jit
def produce(
    q, grad_out, k, v, prefix_k, prefix_v, q_tiles, grad_tiles, q_full, k_ring, v_ring, q_place, k_place, prefix_place, head,
    kv_head, first_query, prefix_blocks, blocks, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """All loads of a program, in the order in which the consumers want them."""
    WARPGROUP_M: gl.constexpr = q.block_type.shape[3]
    if blocks > 0:
        for warpgroup in gl.static_range(2):
            token = first_query + warpgroup * WARPGROUP_M
            load_tile(q, q_place, head, token, q_full.index(warpgroup), q_tiles.index(warpgroup))
            load_tile(grad_out, q_place, head, token, q_full.index(warpgroup), grad_tiles.index(warpgroup))
        load_blocks(
            k, v, prefix_k, prefix_v, k_ring, v_ring, k_place, prefix_place, kv_head, prefix_blocks, blocks, BLOCK_N, STAGES
        )


@gluon.jit
def weights_of(scores, lse, first_key, stop, scale, MASKED: gl.constexpr, BLOCK_N: gl.constexpr, SCORES: gl.constexpr):
    """[WARPGROUP_M, BLOCK_N]: the weights of keys from `first_key` on, of which a query sees those < stop."""
    weights = gl.exp2(scores * scale - gl.expand_dims(lse, 1))
    if MASKED:
        column = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        weights = gl.where(gl.expand_dims(column, 0) < gl.expand_dims(stop - first_key, 1), weights, 0.0)
    return weights


@gluon.jit
def issue_dq(dscores, total, ring, j, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """total + dscores · keys of block j, on its way: [WARPGROUP_M, HEAD_DIM]"""
    HEAD_DIM: gl.constexpr = total.shape[1]
    return warpgroup_mma(dscores, ring[0].index(j % STAGES).reshape([BLOCK_N, HEAD_DIM]), total, is_async=True)


@gluon.jit
def add_block(
    j, blocks, first_key, stop, q_tile, grad_tile, lse, delta, dscores, total, k_ring, v_ring, scale, MASKED: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr, DSCORES: gl.constexpr,
):  # fmt: skip
    """dscores of block j ≥ 1, and dq / scale with block j − 1. On entry the keys and values of block j are there."""
    before = j - 1
    scores = issue_scores(q_tile, k_ring, j, BLOCK_N, STAGES, SCORES)
    dweights = issue_scores(grad_tile, v_ring, j, BLOCK_N, STAGES, SCORES)
    total = issue_dq(dscores, total, k_ring, before, BLOCK_N, STAGES)
    scores = warpgroup_mma_wait(2, deps=(scores,))
    weights = weights_of(scores, lse, first_key, stop, scale, MASKED, BLOCK_N, SCORES)
    wait_for_keys(v_ring, j + 1, blocks, STAGES)
    dweights, weights = warpgroup_mma_wait(1, deps=(dweights, weights))
    mbarrier.arrive(v_ring[2].index(j % STAGES), count=1)
    next_dscores = (weights * (dweights - gl.expand_dims(delta, 1))).to(q_tile.dtype)
    next_dscores = gl.convert_layout(next_dscores, DSCORES, assert_trivial=True)
    wait_for_keys(v_ring, j + 1, blocks, STAGES)
    total, dscores, next_dscores = warpgroup_mma_wait(0, deps=(total, dscores, next_dscores))
    mbarrier.arrive(k_ring[2].index(before % STAGES), count=1)
    wait_for_keys(k_ring, j + 1, blocks, STAGES)
    return next_dscores, total


@gluon.jit
def consume(
    dq, out, lse, grad_lse, delta, q_tiles, grad_tiles, q_full, k_ring, v_ring, first_query, own_q_len, shift, own_kv_len,
    prefix_len, prefix_blocks, blocks, out_token, grad_token, scale, WARPGROUP: gl.constexpr, CAUSAL: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup's queries: delta, the sum over all blocks of keys, then dq."""
    WARPGROUP_M: gl.constexpr = q_tiles.shape[4]
    HEAD_DIM: gl.constexpr = q_tiles.shape[5]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    DSCORES: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    first = first_query + WARPGROUP * WARPGROUP_M
    query = first + gl.arange(0, WARPGROUP_M, layout=gl.SliceLayout(1, SCORES))
    exists = query < own_q_len
    lse_of = gl.load(lse + query, mask=exists, other=0.0) * LOG2_E  # [WARPGROUP_M]
    delta_of = gl.zeros([WARPGROUP_M], gl.float32, gl.SliceLayout(1, SCORES))
    token = gl.expand_dims(first + gl.arange(0, WARPGROUP_M, layout=gl.SliceLayout(1, SUMS)), 1)
    dim = gl.expand_dims(gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, SUMS)), 0)
    addresses = out + token.to(gl.int64) * out_token + dim
    out_tile = gl.load(addresses, mask=(token < own_q_len) & (dim >= 0), other=0.0)  # [WARPGROUP_M, HEAD_DIM]
    prefix_stop = query * 0 + prefix_len
    if CAUSAL:
        stop = gl.minimum(query + shift + 1, own_kv_len)
        full = gl.minimum(gl.maximum(gl.minimum(first + shift + 1, own_kv_len), 0) // BLOCK_N, blocks - prefix_blocks)
    else:
        stop = query * 0 + own_kv_len
        full = own_kv_len // BLOCK_N
    total = gl.zeros([WARPGROUP_M, HEAD_DIM], gl.float32, SUMS)

    if blocks > 0:
        q_tile = q_tiles.index(WARPGROUP).reshape([WARPGROUP_M, HEAD_DIM])
        grad_tile = grad_tiles.index(WARPGROUP).reshape([WARPGROUP_M, HEAD_DIM])
        mbarrier.wait(q_full.index(WARPGROUP), 0)
        wait_for_keys(k_ring, 0, blocks, STAGES)
        scores = issue_scores(q_tile, k_ring, 0, BLOCK_N, STAGES, SCORES)
        wait_for_keys(v_ring, 0, blocks, STAGES)
        dweights = issue_scores(grad_tile, v_ring, 0, BLOCK_N, STAGES, SCORES)
        delta_of = gl.sum(out_tile.to(gl.float32) * grad_tile.load(SUMS).to(gl.float32), 1)
        delta_of = gl.convert_layout(delta_of, gl.SliceLayout(1, SCORES), assert_trivial=True)
        if grad_lse is not None:  # a query that sees nothing takes no gradient from it
            delta_of -= gl.where(lse_of == float("-inf"), 0.0, gl.load(grad_lse + query, mask=exists, other=0.0))
        scores, dweights = warpgroup_mma_wait(0, deps=(scores, dweights))
        mbarrier.arrive(v_ring[2].index(0), count=1)
        first_stop = gl.where(prefix_blocks > 0, prefix_stop, stop)
        weights = weights_of(scores, lse_of, 0, first_stop, scale, True, BLOCK_N, SCORES)
        dscores = (weights * (dweights - gl.expand_dims(delta_of, 1))).to(q_tile.dtype)
        dscores = gl.convert_layout(dscores, DSCORES, assert_trivial=True)
        wait_for_keys(k_ring, 1, blocks, STAGES)
        wait_for_keys(v_ring, 1, blocks, STAGES)
        for j in range(1, prefix_len // BLOCK_N):
            dscores, total = add_block(
                j, blocks, j * BLOCK_N, prefix_stop, q_tile, grad_tile, lse_of, delta_of, dscores, total, k_ring, v_ring,
                scale, False, BLOCK_N, STAGES, SCORES, DSCORES,
            )  # fmt: skip
        for j in range(gl.maximum(prefix_len // BLOCK_N, 1), prefix_blocks):
            dscores, total = add_block(
                j, blocks, j * BLOCK_N, prefix_stop, q_tile, grad_tile, lse_of, delta_of, dscores, total, k_ring, v_ring,
                scale, True, BLOCK_N, STAGES, SCORES, DSCORES,
            )  # fmt: skip
        for j in range(gl.maximum(prefix_blocks, 1), prefix_blocks + full):
            dscores, total = add_block(
                j, blocks, (j - prefix_blocks) * BLOCK_N, stop, q_tile, grad_tile, lse_of, delta_of, dscores, total, k_ring,
                v_ring, scale, False, BLOCK_N, STAGES, SCORES, DSCORES,
            )  # fmt: skip
        for j in range(gl.maximum(prefix_blocks + full, 1), blocks):
            dscores, total = add_block(
                j, blocks, (j - prefix_blocks) * BLOCK_N, stop, q_tile, grad_tile, lse_of, delta_of, dscores, total, k_ring,
                v_ring, scale, True, BLOCK_N, STAGES, SCORES, DSCORES,
            )  # fmt: skip
        total = issue_dq(dscores, total, k_ring, blocks - 1, BLOCK_N, STAGES)
        total, dscores = warpgroup_mma_wait(0, deps=(total, dscores))

    gl.store(delta + query, delta_of, mask=exists)
    store_sums(dq, total * (scale * LN_2), first, own_q_len, grad_token, SUMS)


@gluon.jit(do_not_specialize=LENGTHS)
def hopper_dq_kernel(
    q, grad_out, k, v, prefix_k, prefix_v, out, lse, grad_lse, delta, dq, cu_seqlens_q, cu_seqlens_k, prefix_ids, heads,
    kv_heads, q_len, kv_len, q_tokens, k_tokens, prefixes, prefix_len, lse_row, lse_head, out_row, out_head, out_token,
    grad_row, grad_head, grad_token, section, scale, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER: gl.constexpr, PRODUCER: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    wait_for_launch_before(DEPENDENT)
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
    start = row.to(gl.int64) * lse_row + head.to(gl.int64) * lse_head
    out += row.to(gl.int64) * out_row + head.to(gl.int64) * out_head
    dq += row.to(gl.int64) * grad_row + head.to(gl.int64) * grad_head
    if cu_seqlens_q is not None:
        start += q_place[1] - own_q_len
        out += (q_place[1] - own_q_len).to(gl.int64) * out_token
        dq += (q_place[1] - own_q_len).to(gl.int64) * grad_token
    if grad_lse is not None:
        grad_lse += start

    shift = own_kv_len - own_q_len  # query i stands at position i + shift
    last_stop = own_kv_len
    if CAUSAL:
        last_query = gl.minimum(first_query + BLOCK_M, own_q_len) - 1
        last_stop = gl.maximum(gl.minimum(last_query + shift + 1, own_kv_len), 0)
    prefix_blocks = gl.cdiv(own_prefix_len, BLOCK_N)
    blocks = gl.where(first_query < own_q_len, prefix_blocks + gl.cdiv(last_stop, BLOCK_N), 0)

    q_tiles = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 1, WARPGROUP_M, HEAD_DIM], q.layout)
    grad_tiles = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 1, WARPGROUP_M, HEAD_DIM], grad_out.layout)
    k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 1, BLOCK_N, HEAD_DIM], k.layout)
    v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 1, BLOCK_N, HEAD_DIM], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    k_ring, v_ring = (k_tiles, k_full, k_empty), (v_tiles, v_full, v_empty)

    gl.warp_specialize(
        [
            (consume, (dq, out, lse + start, grad_lse, delta + start, q_tiles, grad_tiles, q_full, k_ring, v_ring, first_query,
                       own_q_len, shift, own_kv_len, own_prefix_len, prefix_blocks, blocks, out_token, grad_token,
                       scale * LOG2_E, gl.constexpr(0), CAUSAL, BLOCK_N, STAGES)),
            (consume, (dq, out, lse + start, grad_lse, delta + start, q_tiles, grad_tiles, q_full, k_ring, v_ring, first_query,
                       own_q_len, shift, own_kv_len, own_prefix_len, prefix_blocks, blocks, out_token, grad_token,
                       scale * LOG2_E, gl.constexpr(1), CAUSAL, BLOCK_N, STAGES)),
            (produce, (q, grad_out, k, v, prefix_k, prefix_v, q_tiles, grad_tiles, q_full, k_ring, v_ring, q_place, k_place,
                       prefix_place, head, head // (heads // kv_heads), first_query, prefix_blocks, blocks, BLOCK_N,
                       STAGES)),
        ],
        [4, 1],
        [CONSUMER, PRODUCER],
    )  # fmt: skip


def dq(
    call: Call, q: Operand, k: Operand, v: Operand, prefix_k: Operand, prefix_v: Operand, dq: Operand, out: Operand,
    grad_lse: Operand | None, grad_out: Operand, lse: Operand, delta: Operand,
) -> None:  # fmt: skip
    """As dq_kernel of dq_kernel.py, which leaves delta behind."""
    tile, problem, rows, packed = call.tile("hopper_dq"), call.problem, call.rows.value, call.problem.varlen
    q_tiles, grad_tiles = (descriptor(each.value.pointer, tile.BLOCK_M // 2, packed) for each in (q, grad_out))
    own, prefix = ([each.value.pointer for each in pair] for pair in ((k, v), (prefix_k, prefix_v)))
    keys = key_descriptors(q.value.pointer, own, prefix, tile.BLOCK_N, packed)
    arguments = {
        "q": q_tiles, "grad_out": grad_tiles, "k": keys[0], "v": keys[1], "prefix_k": keys[2], "prefix_v": keys[3],
        "out": out.value.pointer, "lse": lse.value.pointer, "grad_lse": None if grad_lse is None else grad_lse.value.pointer,
        "delta": delta.value.pointer, "dq": dq.value.pointer, "cu_seqlens_q": rows.cu_seqlens_q,
        "cu_seqlens_k": rows.cu_seqlens_k, "prefix_ids": rows.prefix_ids, "heads": problem.heads, "kv_heads": problem.kv_heads,
        "q_len": problem.q_len, "kv_len": problem.kv_len, "q_tokens": problem.q_tokens, "k_tokens": problem.k_tokens,
        "prefixes": problem.prefixes, "prefix_len": problem.prefix_len, "lse_row": lse.value.batch, "lse_head": lse.value.head,
        "out_row": out.value.batch, "out_head": out.value.head, "out_token": out.value.token, "grad_row": dq.value.batch,
        "grad_head": dq.value.head, "grad_token": dq.value.token,
        "section": section_of(problem, problem.kv_len * problem.kv_heads, problem.heads * problem.batch),
        "scale": call.lengths["scale"],
        "CAUSAL": problem.causal, "BLOCK_N": tile.BLOCK_N, "STAGES": tile.num_stages, "CONSUMER": CONSUMER_REGISTERS,
        "PRODUCER": PRODUCER_REGISTERS,
    }  # fmt: skip
    key = tile, problem.dtype, call.key, tuple(map(key_of, (out, lse, grad_lse, delta, dq)))
    options = {"num_warps": tile.num_warps, "maxnreg": REGISTERS}
    run(hopper_dq_kernel, call.query_programs(tile), call.device, key, arguments, dependent=True, **options)
