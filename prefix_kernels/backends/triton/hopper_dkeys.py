"""The gradients of keys and values for Hopper (sm_90a), in Gluon: one producer warp, two consumer warpgroups, no atomics.

    weightsᵀ = exp(scale · keys · qᵀ − lse)        dvalues = weightsᵀ · dout
    dscoresᵀ = weightsᵀ ∘ (values · doutᵀ − delta)      dkeys = scale · dscoresᵀ · q

A program owns 128 keys, 64 for each warpgroup, and runs over blocks of the queries that see them: a row's own keys over the
heads of a group and the row's queries; a prefix (PREFIX) over the heads of a group and one share of all query blocks of the
batch. The producer brings q and dout of a block by TMA into a ring of STAGES tiles, and lse and delta by plain loads. Time goes
to the right; ( ) is a wait, | a wait for a product, which leaves a later one on its way:

    producer     keys values block0 block1 (block0 empty) block2 …
    warpgroup    (block0 full) S0 P0 |weights0 V0 |dscores0 K0 |(block1 full) S1 P1 |weights1 V1 |dscores1 K1 |…

    S, P, V, K   the products keys · qᵀ, values · doutᵀ, weightsᵀ · dout and dscoresᵀ · q
    full         the producer announces the bytes, TMA counts them down, and lse and delta are stored
    empty        both warpgroups have waited for the last product that reads the block, K

Nothing past an end needs a mask: TMA gives zeros there, so queries add zeros, and keys get garbage of their own, which is not
stored. Nor does a query that sees none of its row's keys (lse = −inf): only causal rows have such, and those have a mask.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from prefix_kernels.backends.triton.hopper import (
    CONSUMER_REGISTERS,
    LN_2,
    LOG2_E,
    PRODUCER_REGISTERS,
    REGISTERS,
    descriptor,
    load_tile,
    place_of,
    prefix_of,
    section_of,
    store_sums,
    tokens_of,
    wait_for_launch_before,
)  # fmt: skip
from prefix_kernels.backends.triton.launch import Call, cdiv, key_of, run
from prefix_kernels.backends.triton.rows import Operand
from prefix_kernels.backends.triton.tile_sizes import Tile
from prefix_kernels.problem import AttentionProblem

TOGETHER = 128  # the widest heads whose keys' and values' sums one program holds

LENGTHS = (
    "splits", "batch", "heads", "kv_heads", "q_len", "kv_len", "q_tokens", "k_tokens", "prefixes", "prefix_len", "lse_row",
    "lse_head", "section",
)  # fmt: skip


@gluon.jit
def share_of(
    row, result, first_key, stop_key, splits, cu_seqlens_q, prefix_ids, batch, q_len, q_tokens, prefixes, prefix_len, shift,
    PREFIX: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """(place, number of queries, begin, end): the blocks of a row's queries, [begin, end), that a program runs over."""
    place, number = tokens_of(cu_seqlens_q, row, q_len, q_tokens)
    begin, end = row * 0, gl.cdiv(number, BLOCK_M)
    if PREFIX:
        own_prefix, own_prefix_len = prefix_of(prefix_ids, row, prefixes, prefix_len)
        query_blocks = gl.cdiv(q_len, BLOCK_M)  # of the longest row
        share = gl.cdiv(batch * query_blocks, splits)
        begin = gl.maximum(result // prefixes * share - row * query_blocks, 0)
        end = gl.minimum((result // prefixes + 1) * share - row * query_blocks, end)
        end = gl.where((own_prefix[1] == result % prefixes) & (own_prefix_len > 0), end, begin)
    else:
        if CAUSAL:
            begin = gl.maximum(first_key - shift, 0) // BLOCK_M
        end = gl.where(first_key < stop_key, end, begin)
    return place, number, begin, gl.maximum(end, begin)


@gluon.jit
def load_scalars(lse, delta, query, number):
    """lse in units of log 2 and delta of some queries, of which there are `number`."""
    lse_of = gl.load(lse + query, mask=query < number, other=0.0)
    delta_of = gl.load(delta + query, mask=query < number, other=0.0)
    return lse_of * LOG2_E, delta_of


@gluon.jit
def produce(
    q, grad_out, keys, values, lse, delta, k_tiles, v_tiles, kv_full, ring, k_place, kv_head, group, rows, result, first_key,
    stop_key, splits, cu_seqlens_q, prefix_ids, batch, q_len, q_tokens, prefixes, prefix_len, shift, lse_row, lse_head, total,
    PREFIX: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """All loads of a program, in the order in which the consumers want them."""
    WARPGROUP_N: gl.constexpr = keys.block_type.shape[3]
    BLOCK_M: gl.constexpr = q.block_type.shape[3]
    LANES: gl.constexpr = gl.BlockedLayout([BLOCK_M // 32], [32], [1], [0])
    q_tiles, grad_tiles, lse_tiles, delta_tiles, full, empty = ring
    t = total * 0
    if total > 0:
        for warpgroup in gl.static_range(2):
            token = first_key + warpgroup * WARPGROUP_N
            load_tile(keys, k_place, kv_head, token, kv_full.index(warpgroup), k_tiles.index(warpgroup))
            load_tile(values, k_place, kv_head, token, kv_full.index(warpgroup), v_tiles.index(warpgroup))
        for row in range(rows[0], rows[1]):
            place, number, begin, end = share_of(
                row, result, first_key, stop_key, splits, cu_seqlens_q, prefix_ids, batch, q_len, q_tokens, prefixes,
                prefix_len, shift, PREFIX, CAUSAL, BLOCK_M,
            )  # fmt: skip
            first_token = 0
            if cu_seqlens_q is not None:
                first_token = place[1] - number
            for head in range(kv_head * group, (kv_head + 1) * group):
                start = row.to(gl.int64) * lse_row + head.to(gl.int64) * lse_head + first_token
                for block in range(begin, end):
                    stage = t % STAGES
                    query = block * BLOCK_M + gl.arange(0, BLOCK_M, layout=LANES)
                    lse_of, delta_of = load_scalars(lse + start, delta + start, query, number)  # on their way while it waits
                    mbarrier.wait(empty.index(stage), ((t // STAGES) & 1) ^ 1)
                    load_tile(q, place, head, block * BLOCK_M, full.index(stage), q_tiles.index(stage))
                    load_tile(grad_out, place, head, block * BLOCK_M, full.index(stage), grad_tiles.index(stage))
                    lse_tiles.index(stage).store(lse_of)
                    delta_tiles.index(stage).store(delta_of)
                    mbarrier.arrive(full.index(stage), count=1)
                    t += 1


@gluon.jit
def consume(
    dk, dv, k_tiles, v_tiles, kv_full, ring, first_key, stop_key, shift, begin, blocks, total, grad_token, scale,
    WARPGROUP: gl.constexpr, MASKED: gl.constexpr, STAGES: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """One warpgroup's keys: the sums over all blocks of queries, then dk and dv. WAIT: for the launch before, to write."""
    q_tiles, grad_tiles, lse_tiles, delta_tiles, full, empty = ring
    DTYPE: gl.constexpr = q_tiles.dtype
    WARPGROUP_N: gl.constexpr = k_tiles.shape[4]
    HEAD_DIM: gl.constexpr = k_tiles.shape[5]
    BLOCK_M: gl.constexpr = q_tiles.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    QUERIES: gl.constexpr = gl.SliceLayout(0, SCORES)
    first = first_key + WARPGROUP * WARPGROUP_N
    key = first + gl.arange(0, WARPGROUP_N, layout=gl.SliceLayout(1, SCORES))
    dk_sum = gl.zeros([WARPGROUP_N, HEAD_DIM], gl.float32, SUMS)
    dv_sum = gl.zeros([WARPGROUP_N, HEAD_DIM], gl.float32, SUMS)

    if total > 0:
        k_tile = k_tiles.index(WARPGROUP).reshape([WARPGROUP_N, HEAD_DIM])
        v_tile = v_tiles.index(WARPGROUP).reshape([WARPGROUP_N, HEAD_DIM])
        nothing = gl.zeros([WARPGROUP_N, BLOCK_M], gl.float32, SCORES)
        mbarrier.wait(kv_full.index(WARPGROUP), 0)
        for t in range(gl.where(first < stop_key, total, 0), total):  # no keys: nothing is computed
            mbarrier.wait(full.index(t % STAGES), (t // STAGES) & 1)
            mbarrier.arrive(empty.index(t % STAGES), count=1)
        for t in range(0, gl.where(first < stop_key, total, 0)):
            stage = t % STAGES
            q_tile = q_tiles.index(stage).reshape([BLOCK_M, HEAD_DIM])
            grad_tile = grad_tiles.index(stage).reshape([BLOCK_M, HEAD_DIM])
            mbarrier.wait(full.index(stage), (t // STAGES) & 1)
            scores = warpgroup_mma(k_tile, q_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
            if dk is not None:
                dweights = warpgroup_mma(v_tile, grad_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0 if dk is None else 1, deps=(scores,))
            lse_of = lse_tiles.index(stage).load(QUERIES)  # [BLOCK_M]
            weights = gl.exp2(scores * scale - gl.expand_dims(lse_of, 0))  # [WARPGROUP_N, BLOCK_M]
            if MASKED:
                query = (begin + t % blocks) * BLOCK_M + gl.arange(0, BLOCK_M, layout=QUERIES)
                weights = gl.where(gl.expand_dims(query + shift, 0) >= gl.expand_dims(key, 1), weights, 0.0)
            rounded = gl.convert_layout(weights.to(DTYPE), WEIGHTS, assert_trivial=True)
            dscores = rounded
            if dv is not None:
                dv_sum = warpgroup_mma(rounded, grad_tile, dv_sum, is_async=True)
            if dk is not None:
                dweights = warpgroup_mma_wait(0 if dv is None else 1, deps=(dweights,))
                delta_of = delta_tiles.index(stage).load(QUERIES)  # [BLOCK_M]
                dscores = (weights * (dweights - gl.expand_dims(delta_of, 0))).to(DTYPE)
                dscores = gl.convert_layout(dscores, WEIGHTS, assert_trivial=True)
                dk_sum = warpgroup_mma(dscores, q_tile, dk_sum, is_async=True)
            dk_sum, dv_sum, dscores, rounded = warpgroup_mma_wait(0, deps=(dk_sum, dv_sum, dscores, rounded))
            mbarrier.arrive(empty.index(stage), count=1)

    wait_for_launch_before(WAIT)
    if dk is not None:
        store_sums(dk, dk_sum * (scale * LN_2), first, stop_key, grad_token, SUMS)
    if dv is not None:
        store_sums(dv, dv_sum, first, stop_key, grad_token, SUMS)


@gluon.jit(do_not_specialize=LENGTHS)
def hopper_dkeys_kernel(
    q, grad_out, keys, values, lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, prefix_ids, splits, batch, heads, kv_heads,
    q_len, kv_len, q_tokens, k_tokens, prefixes, prefix_len, lse_row, lse_head, grad_row, grad_head, grad_token, section,
    scale, PREFIX: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr, CONSUMER: gl.constexpr, PRODUCER: gl.constexpr,
    LATE: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """dk and dv [rows, …] of own keys; PREFIX: the parts [splits · prefixes, kv_heads, prefix_len, …] of a prefix's.

    LATE: as of dprefix_kernel.
    """
    WAIT: gl.constexpr = DEPENDENT and LATE
    wait_for_launch_before(DEPENDENT and not LATE)
    DTYPE: gl.constexpr = q.dtype
    BLOCK_M: gl.constexpr = q.block_type.shape[3]
    WARPGROUP_N: gl.constexpr = keys.block_type.shape[3]
    HEAD_DIM: gl.constexpr = keys.block_type.shape[4]
    BLOCK_N: gl.constexpr = 2 * WARPGROUP_N
    SCALARS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    group = heads // kv_heads
    key_blocks = gl.cdiv(prefix_len if PREFIX else kv_len, BLOCK_N)
    # result: the row; PREFIX: split · prefixes + prefix
    key_block, kv_head, result = place_of(gl.program_id(0), gl.num_programs(0), key_blocks, kv_heads, section)
    first_key = key_block * BLOCK_N
    shift, start = result * 0, result.to(gl.int64) * grad_row
    if PREFIX:
        k_place, stop_key = (result * 0, result % prefixes, result * 0), prefix_len
        query_blocks = gl.cdiv(q_len, BLOCK_M)
        share = gl.cdiv(batch * query_blocks, splits)
        first_block = result // prefixes * share
        rows = first_block // query_blocks, gl.cdiv(gl.minimum(first_block + share, batch * query_blocks), query_blocks)
    else:
        k_place, stop_key = tokens_of(cu_seqlens_k, result, kv_len, k_tokens)
        q_place, own_q_len = tokens_of(cu_seqlens_q, result, q_len, q_tokens)
        rows = result, result + 1
        if CAUSAL:
            shift = stop_key - own_q_len  # query i stands at position i + shift
        if cu_seqlens_k is not None:
            start = (k_place[1] - stop_key).to(gl.int64) * grad_token
    start += kv_head.to(gl.int64) * grad_head
    begin, blocks, total = result * 0, result * 0, result * 0
    for row in range(rows[0], rows[1]):
        place, number, begin, end = share_of(
            row, result, first_key, stop_key, splits, cu_seqlens_q, prefix_ids, batch, q_len, q_tokens, prefixes,
            prefix_len, shift, PREFIX, CAUSAL, BLOCK_M,
        )  # fmt: skip
        blocks = end - begin
        total += blocks * group

    k_tiles = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 1, WARPGROUP_N, HEAD_DIM], keys.layout)
    v_tiles = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 1, WARPGROUP_N, HEAD_DIM], values.layout)
    q_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 1, BLOCK_M, HEAD_DIM], q.layout)
    grad_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 1, BLOCK_M, HEAD_DIM], grad_out.layout)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], SCALARS)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], SCALARS)
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(kv_full.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=3)
        mbarrier.init(empty.index(i), count=2)
    ring = (q_tiles, grad_tiles, lse_tiles, delta_tiles, full, empty)
    if dk is not None:
        dk += start
    if dv is not None:
        dv += start

    gl.warp_specialize(
        [
            (consume, (dk, dv, k_tiles, v_tiles, kv_full, ring, first_key, stop_key, shift, begin, blocks, total, grad_token,
                       scale * LOG2_E, gl.constexpr(0), CAUSAL, STAGES, WAIT)),
            (consume, (dk, dv, k_tiles, v_tiles, kv_full, ring, first_key, stop_key, shift, begin, blocks, total, grad_token,
                       scale * LOG2_E, gl.constexpr(1), CAUSAL, STAGES, WAIT)),
            (produce, (q, grad_out, keys, values, lse, delta, k_tiles, v_tiles, kv_full, ring, k_place, kv_head, group, rows,
                       result, first_key, stop_key, splits, cu_seqlens_q, prefix_ids, batch, q_len, q_tokens, prefixes,
                       prefix_len, shift, lse_row, lse_head, total, PREFIX, CAUSAL, STAGES)),
        ],
        [4, 1],
        [CONSUMER, PRODUCER],
    )  # fmt: skip


def dkeys(
    call: Call, q: Operand, k: Operand, v: Operand, dk: Operand | None, dv: Operand | None, **query_side: Operand
) -> None:
    """As dkeys_kernel of dkeys_kernels.py."""
    tile, problem = call.tile("hopper_dkeys"), call.problem
    pairs = problem.kv_heads * problem.batch
    programs, section = cdiv(problem.kv_len, tile.BLOCK_N) * pairs, section_of(problem, problem.q_len * problem.heads, pairs)
    for grads in _passes(problem, dk, dv):
        _launch(call, tile, programs, section, 1, False, q, (k, v), grads, prefix=False, **query_side)


def dprefix(
    call: Call, programs: int, splits: int, late: bool, q: Operand, prefix_k: Operand, prefix_v: Operand,
    dprefix_k: Operand | None, dprefix_v: Operand | None, **query_side: Operand,
) -> None:  # fmt: skip
    """As dprefix_kernel of dkeys_kernels.py."""
    tile = call.tile("hopper_dprefix")
    for grads in _passes(call.problem, dprefix_k, dprefix_v):
        _launch(call, tile, programs, 1, splits, late, q, (prefix_k, prefix_v), grads, prefix=True, **query_side)


def _passes(problem: AttentionProblem, dk: Operand | None, dv: Operand | None) -> list[tuple[Operand | None, Operand | None]]:
    """(dk, dv) of each launch: wide heads leave no registers for the sums of both."""
    passes = [(dk, dv)] if problem.head_dim <= TOGETHER else [(dk, None), (None, dv)]
    return [grads for grads in passes if grads != (None, None)]


def _launch(
    call: Call, tile: Tile, programs: int, section: int, splits: int, late: bool, q: Operand,
    columns: tuple[Operand, Operand], grads: tuple[Operand | None, Operand | None], grad_out: Operand, lse: Operand,
    delta: Operand, prefix: bool,
) -> None:  # fmt: skip
    if programs == 0:
        return
    problem, packed = call.problem, call.problem.varlen
    (strides,) = {grad.value[1:] for grad in grads if grad is not None}  # of both
    dk, dv = (None if grad is None else grad.value.pointer for grad in grads)
    rows = call.rows.value
    index = rows.cu_seqlens_q, None if prefix else rows.cu_seqlens_k, rows.prefix_ids if prefix else None
    q_tiles, grad_tiles = (descriptor(each.value.pointer, tile.BLOCK_M, packed) for each in (q, grad_out))
    keys, values = (descriptor(each.value.pointer, tile.BLOCK_N // 2, packed and not prefix) for each in columns)
    arguments = {
        "q": q_tiles, "grad_out": grad_tiles, "keys": keys, "values": values, "lse": lse.value.pointer,
        "delta": delta.value.pointer, "dk": dk, "dv": dv, "cu_seqlens_q": index[0], "cu_seqlens_k": index[1],
        "prefix_ids": index[2], "splits": splits, "batch": problem.batch, "heads": problem.heads, "kv_heads": problem.kv_heads,
        "q_len": problem.q_len, "kv_len": problem.kv_len, "q_tokens": problem.q_tokens, "k_tokens": problem.k_tokens,
        "prefixes": problem.prefixes, "prefix_len": problem.prefix_len, "lse_row": lse.value.batch, "lse_head": lse.value.head,
        "grad_row": strides[0], "grad_head": strides[1], "grad_token": strides[2], "section": section,
        "scale": call.lengths["scale"],
        "PREFIX": prefix, "CAUSAL": problem.causal and not prefix, "STAGES": tile.num_stages, "CONSUMER": CONSUMER_REGISTERS,
        "PRODUCER": PRODUCER_REGISTERS, "LATE": late,
    }  # fmt: skip
    key = tile, prefix, late, problem.dtype, call.key, tuple(map(key_of, (lse, delta, *grads)))
    options = {"num_warps": tile.num_warps, "maxnreg": REGISTERS}
    run(hopper_dkeys_kernel, programs, call.device, key, arguments, dependent=True, **options)
