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

Packed sequences: the tensors get two more dimensions, by which address arithmetic wraps around 2^64 and the end of a sequence
falls on the end of a dimension. So TMA itself reads zeros past a sequence and writes nothing there (triton.tools.ragged_tma).
Six descriptors cost tens of microseconds a call in Python, so it is for large calls.
"""

from __future__ import annotations

import functools

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from prefix_kernels.backends.triton import tile_sizes
from prefix_kernels.backends.triton.launch import cdiv, key_of, rounded_prefix, run
from prefix_kernels.backends.triton.rows import rows_of
from prefix_kernels.problem import AttentionInputs, AttentionProblem, empty_token_major

# Renamed in Triton 3.8; where the new names exist, the old ones may exist too and raise.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
HIDDEN = gl.constexpr(float("-inf"))
RAGGED = gl.constexpr(2**30)  # the length of a packed dimension: sequences end where it ends
FAR = 0x7FFF0000  # the length of the two dimensions in front of it
WRAP = 2**34  # elements; 2^30 times this is a multiple of 2^64 bytes
LAYOUT_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
HEAD_DIMS = (64, 128, 256)
SECTION_BYTES = 2**25  # of 50 MiB of L2; assumed
NOT_SERVED = ("window", "softcap", "key_mask", "key_lens", "bias", "prefix_lens", "parent")
REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS = 168, 240, 24  # at the start, and after they are handed out anew
LENGTHS = (
    "heads", "kv_heads", "q_len", "kv_len", "q_tokens", "k_tokens", "prefixes", "prefix_len", "lse_row", "lse_head",
    "section",
)  # fmt: skip


@gluon.jit
def wait_for_launch_before(DEPENDENT: gl.constexpr):
    """As in launch.py."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


@gluon.jit
def place_of(program, programs, blocks, heads, section):
    """(place, head, row): the blocks of all heads of a section come by place, so that those with the most work come first."""
    first = program // (section * blocks) * section  # head of the batch
    number, rest = gl.minimum(section, programs // blocks - first), program % (section * blocks)
    head = first + rest % number
    return rest // number, head % heads, head // heads


@gluon.jit
def tokens_of(cu_seqlens, row, length, tokens):
    """(place, number) of a row's tokens. place: the first two coordinates, and what to add to an index for the fourth."""
    if cu_seqlens is None:
        place, number = (row * 0, row, row * 0), length
    else:
        start = gl.minimum(gl.maximum(gl.load(cu_seqlens + row), 0), tokens).to(gl.int32)
        stop = gl.minimum(gl.maximum(gl.load(cu_seqlens + row + 1), start), tokens).to(gl.int32)
        number = stop - start
        place = (row * 0 + RAGGED, stop, RAGGED - number)
    return place, number


@gluon.jit
def prefix_of(prefix_ids, row, prefixes, prefix_len):
    """(place, length) of a row's prefix; length 0 for an id that is no prefix."""
    prefix, length = row * 0, prefix_len
    if prefix_ids is not None:
        wanted = gl.load(prefix_ids + row)
        exists = (wanted >= 0) & (wanted < prefixes)
        prefix = gl.where(exists, wanted, 0).to(gl.int32)
        length = gl.where(exists, prefix_len, 0)
    return (row * 0, prefix, row * 0), length


@gluon.jit
def load_tile(tensor, place, head, token, full, tile):
    """Tokens from `token` on, into a tile [1, 1, 1, rows, HEAD_DIM]; `full` completes when they have arrived."""
    outer, inner, offset = place
    mbarrier.expect(full, tensor.block_type.nbytes)
    tma_load(tensor, [outer, inner, head, offset + token, 0], full, tile)


@gluon.jit
def load_block(tensor, place, head, token, ring, j, STAGES: gl.constexpr):
    """Block j of the ring, once both consumers have read what was in its tile."""
    tiles, full, empty = ring
    mbarrier.wait(empty.index(j % STAGES), ((j // STAGES) & 1) ^ 1)
    load_tile(tensor, place, head, token, full.index(j % STAGES), tiles.index(j % STAGES))


@gluon.jit
def load_blocks(
    k, v, prefix_k, prefix_v, k_ring, v_ring, k_place, prefix_place, kv_head, prefix_blocks, blocks, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """All blocks of keys and values: the prefix's, then the row's own."""
    for j in range(0, prefix_blocks):
        load_block(prefix_k, prefix_place, kv_head, j * BLOCK_N, k_ring, j, STAGES)
        load_block(prefix_v, prefix_place, kv_head, j * BLOCK_N, v_ring, j, STAGES)
    for j in range(prefix_blocks, blocks):
        load_block(k, k_place, kv_head, (j - prefix_blocks) * BLOCK_N, k_ring, j, STAGES)
        load_block(v, k_place, kv_head, (j - prefix_blocks) * BLOCK_N, v_ring, j, STAGES)


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
def issue_scores(q_tile, ring, j, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr):
    """q · keysᵀ of block j, on its way: [WARPGROUP_M, BLOCK_N]"""
    WARPGROUP_M: gl.constexpr = q_tile.shape[0]
    HEAD_DIM: gl.constexpr = q_tile.shape[1]
    keys = ring[0].index(j % STAGES).reshape([BLOCK_N, HEAD_DIM]).permute((1, 0))
    nothing = gl.zeros([WARPGROUP_M, BLOCK_N], gl.float32, SCORES)
    return warpgroup_mma(q_tile, keys, nothing, use_acc=False, is_async=True)


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
def wait_for_keys(ring, j, blocks, STAGES: gl.constexpr):
    """Until block j is there, if there is one. Where this stands, wgmma's wait cannot be moved across: see above."""
    mbarrier.wait(ring[1].index(j % STAGES), (j // STAGES) & 1, pred=j < blocks)


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


def why_not(inputs: AttentionInputs) -> str | None:
    """Why this kernel does not serve a call, or None: only then may `forward` be called."""
    if inputs.q.device.type != "cuda" or torch.cuda.get_device_capability(inputs.q.device) != (9, 0):
        return "it is for GPUs of compute capability 9.0"
    return why_not_on_hopper(inputs)


def why_not_on_hopper(inputs: AttentionInputs) -> str | None:
    """The reason that lies in the call itself, or None."""
    q, head_dim, value_dim = inputs.q, inputs.q.shape[-1], inputs.v.shape[-1]
    given = [name for name in NOT_SERVED if getattr(inputs, name) is not None]
    if given:
        return f"it knows no {' and no '.join(given)}"
    if q.dtype not in LAYOUT_DTYPES:
        return f"it computes in bfloat16 and float16, not in {str(q.dtype).removeprefix('torch.')}"
    if head_dim != value_dim or head_dim not in HEAD_DIMS:
        return f"heads and values have 64, 128 or 256 dimensions alike, not {head_dim} and {value_dim}"
    if not inputs.scale > 0:
        return f"scale is positive, not {inputs.scale}"
    for name in ("q", "k", "v", "prefix_k", "prefix_v"):
        tensor = getattr(inputs, name)
        if tensor.dtype == q.dtype and not _readable(tensor):
            return f"{name}'s address and strides are multiples of 16 bytes, its last stride 1; {name} has {tensor.stride()}"
    return None


def _readable(tensor: Tensor) -> bool:
    """Whether TMA can read it."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    aligned = tensor.data_ptr() % 16 == 0 and all(s > 0 and s * tensor.element_size() % 16 == 0 for s in strides[:-1])
    return tensor.numel() == 0 or (tensor.stride(-1) == 1 and aligned)


@functools.cache
def _tile_layout(rows: int, head_dim: int, dtype: torch.dtype):
    return gl.NVMMASharedLayout.get_default_for([1, 1, 1, rows, head_dim], LAYOUT_DTYPES[dtype])


def descriptor(tensor: Tensor, rows: int, packed: bool) -> TensorDescriptor:
    """[batch or prefixes, heads, tokens, dim], or packed [tokens, heads, dim], in tiles of `rows` tokens; five dimensions.

    Packed, the element at coordinates (RAGGED, stop, head, RAGGED − number + t, d) of a sequence that ends at `stop` lies at
    RAGGED · (WRAP − stride) + stop · stride + (RAGGED − number + t) · stride ≡ (stop − number + t) · stride, modulo 2^64 bytes.
    """
    strides = [8 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    if packed:
        (token, head, last), (_, heads, head_dim) = strides, tensor.shape
        shape, strides = (FAR, FAR, heads, RAGGED.value, head_dim), (WRAP - token, token, head, token, last)
    else:
        shape, strides = (1, *tensor.shape), (8, *strides)
    layout = _tile_layout(rows, shape[-1], tensor.dtype)
    return TensorDescriptor(tensor, shape, strides, [1, 1, 1, rows, shape[-1]], layout)


def readable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that TMA can read."""
    return tensor if _readable(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def section_of(problem: AttentionProblem, tokens: int, heads: int) -> int:
    """How many of the batch's `heads` are a section: as many as L2 holds two operands of, with q's heads × tokens for all."""
    operands = 2 * tokens * problem.head_dim * problem.dtype.itemsize * problem.batch
    return max(min(SECTION_BYTES * heads // max(operands, 1), heads), 1)


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call that `why_not` has nothing against; out token-major in q's dtype, lse float32."""
    q, packed, problem = inputs.q, inputs.varlen, inputs.problem()
    out = empty_token_major(q, tuple(q.shape))
    lse = q.new_empty((problem.heads, problem.q_tokens) if packed else q.shape[:3], dtype=torch.float32)
    tile = tile_sizes.find("hopper", q.device, q.dtype, problem.head_dim)
    programs = cdiv(problem.q_len, tile.BLOCK_M) * problem.heads * problem.batch
    if q.numel() == 0 or programs == 0:
        return out, lse
    prefix = (tensor.contiguous() for tensor in rounded_prefix(inputs))
    keys = [(inputs.k, packed), (inputs.v, packed), *((tensor, False) for tensor in prefix)]
    # Nothing is read of an empty tensor, but a descriptor cannot be empty: q stands in.
    keys = [descriptor(*((t, tile.BLOCK_N, p) if t.numel() else (q, tile.BLOCK_N, packed))) for t, p in keys]
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
