"""Decoding, the forward pass of a few queries a row: the columns are split among programs, a second kernel merges.

    of each split   largest = max scores      total = Σ exp(scores − largest)      sums = Σ exp(scores − largest) · values
    merged          lse = log Σ exp(largest) · total                               out = Σ exp(largest − lse) · sums

A prefix that all rows share is read once for a block of queries from many rows, not once a row. The queries of a kv head are
counted row by row, then query by query, then head by head. What is too short to be split is done by one kernel alone.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefix_kernels.backends.triton import tile_sizes
from prefix_kernels.backends.triton.forward_kernel import attend
from prefix_kernels.backends.triton.launch import LENGTHS, Call, cdiv, next_power_of_2, run
from prefix_kernels.backends.triton.online_softmax import lse_of, start_of, start_of_bias
from prefix_kernels.backends.triton.rows import (
    clamp,
    columns_seen,
    keys_of,
    keys_seen,
    prefix_of,
    shift_of,
    split_range,
)  # fmt: skip
from prefix_kernels.backends.triton.tile_sizes import Tile
from prefix_kernels.problem import AttentionInputs, AttentionProblem, empty_token_major

# All assumed: decoding was timed with these alone (benchmarks/results/nvidia-h200).
SHORT_PREFIX = 64  # columns: one block, which costs a row's own program less than another split costs the merge
SHORT_ROW = 256  # columns that a row's program reads alone sooner than others help and a second kernel merges
LEAST_COLUMNS = 64  # of a row that are worth a program: one block
LEAST_SHARED_COLUMNS = 128  # of a shared prefix that are worth a program
MAX_SPLITS = 64  # of each kind: bounds the memory of their results
PROGRAMS = 2  # wanted on a multiprocessor
FEW_SPLITS = 4  # that a program of the merge takes of several queries at once


@triton.jit
def load_queries(q, row, head, query, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """[BLOCK, BLOCK_DIM]: the queries that three index vectors (or numbers) name."""
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    pointers = start_of(q, row, head, query)[:, None] + dim
    if HEAD_DIM == BLOCK_DIM:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=dim < HEAD_DIM, other=0.0)
    return tile


@triton.jit
def nothing_seen(BLOCK: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr):
    """sums, largest and total of an online softmax before its first key."""
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    return tl.zeros([BLOCK, BLOCK_VALUE_DIM], tl.float32), largest, tl.zeros([BLOCK], tl.float32)


@triton.jit
def columns_in(blocks, BLOCK_N: tl.constexpr):
    """How many columns the loop over the ranges `blocks` (split_range) passes: whole blocks."""
    return tl.cdiv(tl.maximum(blocks[3] - blocks[0], 0), BLOCK_N) * BLOCK_N


@triton.jit
def share_of(blocks, begin, end, BLOCK_N: tl.constexpr):
    """Of the ranges `blocks` (split_range) what is within its columns `begin` … `end` − 1, multiples of BLOCK_N."""
    columns = columns_in(blocks, BLOCK_N)
    low, high = blocks[0] + clamp(begin, 0, columns), blocks[0] + clamp(end, 0, columns)
    return clamp(blocks[0], low, high), clamp(blocks[1], low, high), clamp(blocks[2], low, high), clamp(blocks[3], low, high)


@triton.jit
def split_size(columns, splits, BLOCK_N: tl.constexpr):
    """Columns of a split: whole blocks."""
    return tl.cdiv(tl.cdiv(columns, splits), BLOCK_N) * BLOCK_N


@triton.jit
def store_part(
    parts, place, places, exists, sums, largest, total, VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """The softmax state of one split: sums [places, VALUE_DIM], left as they lie where nothing was seen; largest; total."""
    dim = tl.arange(0, BLOCK_VALUE_DIM)[None, :]
    tl.store(parts + place[:, None] * VALUE_DIM + dim, sums, mask=(exists & (total != 0))[:, None] & (dim < VALUE_DIM))
    tl.store(parts + places * VALUE_DIM + place, largest, mask=exists)
    tl.store(parts + places * (VALUE_DIM + 1) + place, total, mask=exists)


@triton.jit
def store_result(
    out, lse, row, head, query, heads, q_len, exists, sums, largest, total, VALUE_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """out [batch, q_len, heads, VALUE_DIM], its memory order, and lse [batch, heads, q_len]."""
    dim = tl.arange(0, BLOCK_VALUE_DIM)[None, :]
    row = tl.cast(row, tl.int64)
    result = sums / tl.where(total == 0, 1.0, total)[:, None]
    pointers = out + (((row * q_len + query) * heads + head) * VALUE_DIM)[:, None] + dim
    tl.store(pointers, result.to(out.dtype.element_ty), mask=exists[:, None] & (dim < VALUE_DIM))
    tl.store(lse + (row * heads + head) * q_len + query, lse_of(largest, total), mask=exists)


@triton.jit(do_not_specialize=(*LENGTHS, "shared_splits", "splits"))
def decode_kernel(
    q, k, v, prefix_k, prefix_v, bias, out, lse, parts, rows, batch, heads, kv_heads, q_len, kv_len, k_tokens,
    prefixes, prefix_len, window, slide, scale, softcap, shared_splits, splits, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_ROW: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """SHARED: the first programs own a block of BLOCK_M queries of many rows and a split of the prefix. The other programs own
    up to BLOCK_ROW queries of one row and a split of its keys, or without SHARED of its prefix and its keys in a row.

    Without `parts` a row's only program writes the result itself."""
    program = tl.program_id(0)
    group = heads // kv_heads
    row_queries = q_len * group
    queries = batch * row_queries
    places = tl.cast(shared_splits + splits, tl.int64) * kv_heads * queries
    if SHARED:
        blocks = tl.cdiv(queries, BLOCK_M)
        shared_programs = blocks * shared_splits * kv_heads
        if program < shared_programs:
            block, split, kv_head = program % blocks, program // blocks % shared_splits, program // blocks // shared_splits
            number = block * BLOCK_M + tl.arange(0, BLOCK_M)
            index = tl.minimum(number, queries - 1)
            row, query, head = index // row_queries, index // group % q_len, kv_head * group + index % group
            q_tile = load_queries(q, row, head, query, HEAD_DIM, BLOCK_DIM)  # [BLOCK_M, BLOCK_DIM]
            _, own_kv_len, _ = keys_of(rows, row, kv_len, k_tokens)
            first, stop = columns_seen(query, shift_of(own_kv_len, q_len, CAUSAL), prefix_len, slide)
            seen = split_range(tl.min(first), tl.max(first), prefix_len, prefix_len, BLOCK_N)
            size = split_size(columns_in(seen, BLOCK_N), shared_splits, BLOCK_N)
            sums, largest, total = nothing_seen(BLOCK_M, BLOCK_VALUE_DIM)
            sums, largest, total = attend(
                sums, largest, total, q_tile, start_of(prefix_k, 0, kv_head, 0), start_of(prefix_v, 0, kv_head, 0),
                prefix_k.token, prefix_v.token, prefix_len, first, stop,
                share_of(seen, split * size, split * size + size, BLOCK_N), None,
                start_of_bias(bias, row, head, query, 0, 1), scale, softcap, slide is not None,
                HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_DIM, BLOCK_VALUE_DIM, 1,
            )  # fmt: skip
            place = tl.cast(split * kv_heads + kv_head, tl.int64) * queries + index
            store_part(parts, place, places, number < queries, sums, largest, total, VALUE_DIM, BLOCK_VALUE_DIM)
            return
        program -= shared_programs

    blocks = tl.cdiv(row_queries, BLOCK_ROW)
    block, split = program % blocks, program // blocks % splits
    kv_head, row = program // blocks // splits % kv_heads, program // blocks // splits // kv_heads
    number = block * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    index = tl.minimum(number, row_queries - 1)
    query, head = index // group, kv_head * group + index % group
    first_query, last_query = block * BLOCK_ROW // group, (tl.minimum((block + 1) * BLOCK_ROW, row_queries) - 1) // group
    q_tile = load_queries(q, row, head, query, HEAD_DIM, BLOCK_DIM)  # [BLOCK_ROW, BLOCK_DIM]
    sums, largest, total = nothing_seen(BLOCK_ROW, BLOCK_VALUE_DIM)
    _, own_kv_len, _ = keys_of(rows, row, kv_len, k_tokens)
    shift = shift_of(own_kv_len, q_len, CAUSAL)
    first, stop = keys_seen(query, shift, own_kv_len, window, CAUSAL)
    first_low, stop_low = keys_seen(first_query, shift, own_kv_len, window, CAUSAL)
    first_high, stop_high = keys_seen(last_query, shift, own_kv_len, window, CAUSAL)
    seen = split_range(first_low, first_high, stop_low, stop_high, BLOCK_N)
    if SHARED:
        size = split_size(columns_in(seen, BLOCK_N), splits, BLOCK_N)
        begin = split * size
    else:
        prefix, own_prefix_len = prefix_of(rows, row, prefixes, prefix_len)
        first_column, stop_column = columns_seen(query, shift, own_prefix_len, slide)
        first_low, stop_low = columns_seen(first_query, shift, own_prefix_len, slide)
        first_high, stop_high = columns_seen(last_query, shift, own_prefix_len, slide)
        prefix_seen = split_range(first_low, first_high, stop_low, stop_high, BLOCK_N)
        size = split_size(columns_in(prefix_seen, BLOCK_N) + columns_in(seen, BLOCK_N), splits, BLOCK_N)
        sums, largest, total = attend(
            sums, largest, total, q_tile, start_of(prefix_k, prefix, kv_head, 0), start_of(prefix_v, prefix, kv_head, 0),
            prefix_k.token, prefix_v.token, own_prefix_len, first_column, stop_column,
            share_of(prefix_seen, split * size, split * size + size, BLOCK_N), None,
            start_of_bias(bias, row, head, query, 0, 1), scale, softcap, slide is not None,
            HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_DIM, BLOCK_VALUE_DIM, 1,
        )  # fmt: skip
        begin = split * size - columns_in(prefix_seen, BLOCK_N)
    key_mask = None
    if rows.key_mask is not None:
        key_mask = rows.key_mask + tl.cast(row, tl.int64) * kv_len
    sums, largest, total = attend(
        sums, largest, total, q_tile, start_of(k, row, kv_head, 0), start_of(v, row, kv_head, 0), k.token, v.token,
        own_kv_len, first, stop, share_of(seen, begin, begin + size, BLOCK_N), key_mask,
        start_of_bias(bias, row, head, query, prefix_len, 1), scale, softcap, window is not None,
        HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_DIM, BLOCK_VALUE_DIM, 1,
    )  # fmt: skip
    if parts is None:
        store_result(
            out, lse, row, head, query, heads, q_len, number < row_queries, sums, largest, total, VALUE_DIM, BLOCK_VALUE_DIM
        )
    else:
        place = tl.cast((shared_splits + split) * kv_heads + kv_head, tl.int64) * queries + row * row_queries + index
        store_part(parts, place, places, number < row_queries, sums, largest, total, VALUE_DIM, BLOCK_VALUE_DIM)


@triton.jit(do_not_specialize=("splits", "batch", "heads", "kv_heads", "q_len"))
def merge_kernel(
    parts, out, lse, splits, batch, heads, kv_heads, q_len, VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK queries: their splits in order, BLOCK_SPLITS at a time."""
    group = heads // kv_heads
    queries = batch * q_len * group  # of a kv head
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = number < kv_heads * queries
    places = tl.cast(splits, tl.int64) * kv_heads * queries
    dim = tl.arange(0, BLOCK_VALUE_DIM)[None, None, :]
    sums, largest, total = nothing_seen(BLOCK, BLOCK_VALUE_DIM)
    for start in tl.range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        place = tl.cast(split, tl.int64)[None, :] * kv_heads * queries + number[:, None]
        there = (split < splits)[None, :] & exists[:, None]
        part_largest = tl.load(parts + places * VALUE_DIM + place, mask=there, other=float("-inf"))  # [BLOCK, BLOCK_SPLITS]
        part_total = tl.load(parts + places * (VALUE_DIM + 1) + place, mask=there, other=0.0)  # [BLOCK, BLOCK_SPLITS]
        now_largest = tl.maximum(largest, tl.max(part_largest, 1))
        subtract = tl.where(now_largest == float("-inf"), 0.0, now_largest)
        weights = tl.exp2(part_largest - subtract[:, None])
        correction = tl.exp2(largest - subtract)
        part_sums = tl.load(
            parts + place[:, :, None] * VALUE_DIM + dim, mask=(part_total != 0)[:, :, None] & (dim < VALUE_DIM), other=0.0
        )  # [BLOCK, BLOCK_SPLITS, BLOCK_VALUE_DIM]
        total = total * correction + tl.sum(weights * part_total, 1)
        sums = sums * correction[:, None] + tl.sum(weights[:, :, None] * part_sums, 1)
        largest = now_largest
    kv_head, index = number // queries, number % queries
    row, query, head = index // (q_len * group), index // group % q_len, kv_head * group + index % group
    store_result(out, lse, row, head, query, heads, q_len, exists, sums, largest, total, VALUE_DIM, BLOCK_VALUE_DIM)


class Plan(NamedTuple):
    """How the work of one call is split; it depends on sizes alone."""

    tile: Tile  # BLOCK_M queries of many rows
    block_row: int  # queries of one row
    shared_splits: int  # of the prefix by programs that serve many rows; 0: each row's programs read it
    splits: int  # of what a row's programs read
    programs: int

    def part_values(self, problem: AttentionProblem) -> int:
        """How many float32 numbers the programs leave for the merge."""
        splits = self.shared_splits + self.splits
        return 0 if splits == 1 else splits * problem.batch * problem.heads * problem.q_len * (problem.value_dim + 2)


def plan_of(problem: AttentionProblem, tile: Tile) -> Plan:
    """Splits enough to occupy the device, as far as there are columns worth a program."""
    row_queries = problem.q_len * problem.heads // problem.kv_heads
    block_row, block_shared = (_block(queries, tile) for queries in (row_queries, row_queries * problem.batch))
    columns, shared_splits, shared_programs = problem.kv_len, 0, 0
    if problem.window is not None:
        columns = min(columns, (1 if problem.causal else 2) * problem.window + problem.q_len)
    if problem.has_prefix_ids or problem.batch == 1 or problem.prefix_len <= SHORT_PREFIX:
        columns += problem.prefix_len
    else:
        shared_programs = cdiv(row_queries * problem.batch, block_shared) * problem.kv_heads
        shared_splits = _splits(problem, problem.prefix_len, LEAST_SHARED_COLUMNS, shared_programs)
    row_programs = cdiv(row_queries, block_row) * problem.kv_heads * problem.batch
    one_kernel = shared_splits == 0 and columns <= SHORT_ROW
    splits = 1 if one_kernel else _splits(problem, columns, LEAST_COLUMNS, row_programs)
    tile = Tile(block_shared, tile.BLOCK_N, tile.num_warps, tile.num_stages, tile.reason)
    return Plan(tile, block_row, shared_splits, splits, shared_programs * shared_splits + row_programs * splits)


def _block(queries: int, tile: Tile) -> int:
    """The smallest block that holds so many queries: a product needs 16, and no more than the tile's fit."""
    return max(16, min(next_power_of_2(queries), tile.BLOCK_M))


def _splits(problem: AttentionProblem, columns: int, least: int, programs: int) -> int:
    """Into how many splits `programs` programs go that read so many columns."""
    wanted = cdiv(PROGRAMS * _multiprocessors(problem.device), max(programs, 1))
    return max(1, min(MAX_SPLITS, wanted, cdiv(columns, least)))


@functools.cache
def _multiprocessors(device: str) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device == "cuda" else 132


def part_bytes(problem: AttentionProblem) -> int:
    """The memory that a call takes between its two kernels."""
    dim = max(problem.head_dim, problem.value_dim)
    tile = tile_sizes.find("decode", torch.device(problem.device), problem.dtype, dim, problem.has_bias)
    return 4 * plan_of(problem, tile).part_values(problem)


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """(out, lse) of one dense call with few queries; out token-major in q's dtype, lse float32."""
    q, call = inputs.q, Call(inputs)
    problem, plan = call.problem, plan_of(call.problem, call.tile("decode"))
    out = empty_token_major(q, (*q.shape[:3], inputs.v.shape[-1]))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    values = plan.part_values(problem)
    parts = q.new_empty(values, dtype=torch.float32) if values else None
    q, k, v, prefix_k, prefix_v = call.tensors
    call.launch(
        decode_kernel, plan.tile, plan.programs, q=q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v, bias=call.bias,
        out=out, lse=lse, parts=parts, shared_splits=plan.shared_splits, splits=plan.splits, BLOCK_ROW=plan.block_row,
        SHARED=plan.shared_splits > 0,
    )  # fmt: skip
    if parts is not None:
        splits, queries = plan.shared_splits + plan.splits, problem.batch * problem.heads * problem.q_len
        block, block_splits = (8, FEW_SPLITS) if splits <= FEW_SPLITS else (1, 32)
        values = {
            "parts": parts, "out": out, "lse": lse, "splits": splits, "batch": problem.batch, "heads": problem.heads,
            "kv_heads": problem.kv_heads, "q_len": problem.q_len, "VALUE_DIM": problem.value_dim,
            "BLOCK_VALUE_DIM": call.constants["BLOCK_VALUE_DIM"], "BLOCK": block, "BLOCK_SPLITS": block_splits,
        }  # fmt: skip
        # Several threads sum the same splits, each beginning with another; products fused into the sums would round differently
        # in each, and which of them is kept when layouts change is not defined.
        run(
            merge_kernel, cdiv(queries, block), call.device, (call.key, out.dtype, block, block_splits), values,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out, lse
