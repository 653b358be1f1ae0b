"""What a kernel has to know of one batch row or packed sequence: where its tokens lie and which of them see each other.

Within a row, query i stands at position i + shift. The keys that it sees are an interval [first, stop), and so are the queries
that see a key; both ends grow with the index. So of the blocks that a loop runs over, the first and the last few need a mask
and those between need none.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefix_kernels.problem import AttentionInputs

MAX_DISTANCE = 2**30  # a window that is wider hides nothing; sums of two stay below 2**31
SECTION = tl.constexpr(2**23)  # elements of two operands, of 32 MiB in 16 bits; assumed
VECTOR_BYTES = 16  # that a thread copies at a time
MAX_TOKEN_STRIDE = 2**23  # offsets within a block of up to 256 tokens are 32 bit


class Tokens(NamedTuple):
    """A tensor that is read token by token: address and strides in elements; the last stride is 1."""

    pointer: Tensor
    batch: int  # 0 for packed sequences
    head: int
    token: int


class Rows(NamedTuple):
    """Index tensors of a call; what is None does not exist in the kernel that is compiled."""

    cu_seqlens_q: Tensor | None  # [sequences + 1]
    cu_seqlens_k: Tensor | None  # [sequences + 1]
    key_lens: Tensor | None  # [batch]
    key_mask: Tensor | None  # [batch, kv_len], bytes
    parent: Tensor | None  # [sequences]
    prefix_ids: Tensor | None  # [batch]
    prefix_lens: Tensor | None  # [prefixes]


class Operand(NamedTuple):
    """An argument in three forms, made once for all the kernels of a call."""

    value: Tokens | Rows  # for Triton to compile
    addressed: tuple[int | None, ...]  # for a launch: addresses as numbers, of which the driver need not be asked
    key: Hashable  # what Triton may look at when it compiles


def _operand(tensor: Tensor, batch: int, head: int, token: int) -> Operand:
    address = tensor.data_ptr()
    strides = batch, head, token
    return Operand(Tokens(tensor, *strides), (address, *strides), (tensor.dtype, address % 16, strides))


def tokens(tensor: Tensor, varlen: bool = False) -> Operand:
    """[batch or prefixes, heads, tokens, dim], or packed [tokens, heads, dim]; copied where the strides cannot be used."""
    strides = tensor.stride()
    if strides[-1] != 1 or strides[-3 if varlen else -2] > MAX_TOKEN_STRIDE:
        tensor = tensor.contiguous()
        strides = tensor.stride()
    return _operand(tensor, 0, strides[1], strides[0]) if varlen else _operand(tensor, *strides[:3])


def scalars(tensor: Tensor, varlen: bool) -> Operand:
    """[batch, heads, tokens] or packed [heads, tokens]: one number a token (lse)."""
    tensor = tensor.contiguous()
    strides = tensor.stride()
    return _operand(tensor, 0 if varlen else strides[0], strides[-2], 1)


def bias_of(inputs: AttentionInputs, in_vectors: bool = False) -> tuple[Operand | None, int]:
    """(the bias of each row, head and query, how many columns are read at a time). Axes of one have stride 0.

    The columns of the prefix are followed by those of the keys. Both begin at a multiple of that number: in_vectors, a bias
    where they do not is copied.
    """
    if inputs.bias is None:
        return None, 1
    bias, vector = inputs.bias if inputs.bias.stride(-1) == 1 else inputs.bias.contiguous(), 1
    if in_vectors:
        vector, prefix_len = VECTOR_BYTES // bias.itemsize, inputs.prefix_k.shape[-2]
        bias = bias if lies_in_vectors(bias, prefix_len) else _put_in_vectors(bias, vector, prefix_len)
    return _operand(bias, *bias.expand(*inputs.q.shape[:3], -1).stride()[:3]), vector


def lies_in_vectors(bias: Tensor, prefix_len: int) -> bool:
    """Whether the columns of the prefix and of the keys, which lie side by side, begin at multiples of VECTOR_BYTES, and the
    last of these is wholly memory of the bias."""
    vector, sizes = VECTOR_BYTES // bias.itemsize, list(zip(bias.shape, bias.stride(), strict=True))
    strides = [stride for size, stride in sizes[:-1] if size > 1]
    if bias.data_ptr() % VECTOR_BYTES or any(number % vector for number in (prefix_len, *strides)):
        return False
    if bias.ndim > 1 and bias.shape[-2] > 1 and bias.stride(-2) > MAX_TOKEN_STRIDE:
        return False
    if bias.shape[-1] % vector == 0:
        return True
    last = sum((size - 1) * stride for size, stride in sizes)
    return (last // vector + 1) * vector <= bias.untyped_storage().nbytes() // bias.itemsize - bias.storage_offset()


def _put_in_vectors(bias: Tensor, vector: int, prefix_len: int) -> Tensor:
    """A copy with columns between those of the prefix and the keys, and behind them, that nobody sees; one entry along an axis
    where all are the same."""
    for axis in range(bias.ndim - 1):
        bias = bias if bias.stride(axis) or bias.shape[axis] < 2 else bias.narrow(axis, 0, 1)
    own_column, keys = -(-prefix_len // vector) * vector, bias.shape[-1] - prefix_len
    padded = bias.new_empty(*bias.shape[:-1], own_column + -(-keys // vector) * vector)
    padded[..., :prefix_len] = bias[..., :prefix_len]
    padded[..., own_column : own_column + keys] = bias[..., prefix_len:]
    return padded


def rows_of(inputs: AttentionInputs) -> Operand:
    """The index tensors of a call, each with stride 1."""
    key_mask = None if inputs.key_mask is None else inputs.key_mask.view(torch.uint8)
    index = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, inputs.key_lens, key_mask, inputs.parent)
    index += (inputs.prefix_ids, inputs.prefix_lens)
    rows = Rows(*[None if tensor is None else tensor.contiguous() for tensor in index])
    addressed = tuple([None if tensor is None else tensor.data_ptr() for tensor in rows])
    return Operand(rows, addressed, tuple([None if t is None else (t.dtype, t.data_ptr() % 16) for t in rows]))


def distances(inputs: AttentionInputs) -> tuple[int | None, int | None]:
    """(window, slide). Query at position t sees prefix column p of a prefix of length L if p > L + t + slide; None: all."""
    window, slide = inputs.window, None
    if window is not None and inputs.first_key_position is not None:
        slide = max(-MAX_DISTANCE, min(inputs.first_key_position - window, MAX_DISTANCE))
    return None if window is None else min(window, MAX_DISTANCE), slide


@triton.jit
def clamp(value, low, high):
    return tl.minimum(tl.maximum(value, low), high).to(tl.int32)


@triton.jit
def section_of(tokens, HEAD_DIM: tl.constexpr):
    """How many heads are a section: as many as L2 holds two operands of, with so many tokens each."""
    return tl.maximum(SECTION // HEAD_DIM // tl.maximum(tokens, 1), 1)


@triton.jit
def place_of(program, blocks, heads, section):
    """(place, head, row): the blocks of all heads of a section come by place, so that those with the most work come first."""
    every = tl.num_programs(0) // blocks  # heads of the batch
    section = tl.minimum(section, every)
    first = program // (section * blocks) * section
    number, rest = tl.minimum(section, every - first), program % (section * blocks)
    head = first + rest % number
    return rest // number, head % heads, head // heads


@triton.jit
def block_of(program, blocks, heads, kv_heads, kv_len, HEAD_DIM: tl.constexpr):
    """(block, head, row) of a block of queries; of a head the last blocks first, since causal ones have the most keys."""
    place, head, row = place_of(program, blocks, heads, heads // kv_heads * section_of(kv_len, HEAD_DIM))
    return blocks - 1 - place, head, row


@triton.jit
def packed(cu_seqlens, row, tokens):
    """(start, length) of a packed sequence."""
    start = clamp(tl.load(cu_seqlens + row), 0, tokens)
    return start, clamp(tl.load(cu_seqlens + row + 1), start, tokens) - start


@triton.jit
def queries_of(rows, row, q_len, q_tokens):
    """(start, length) of a row's queries. Dense: q_len each."""
    if rows.cu_seqlens_q is None:
        start, length = 0, q_len
    else:
        start, length = packed(rows.cu_seqlens_q, row, q_tokens)
    return start, length


@triton.jit
def keys_of(rows, row, kv_len, k_tokens):
    """(start, number, buffer length) of a row's keys: past the number there may lie NaN."""
    if rows.cu_seqlens_k is None:
        start, length = 0, kv_len
    else:
        start, length = packed(rows.cu_seqlens_k, row, k_tokens)
    number = length
    if rows.key_lens is not None:
        number = clamp(tl.load(rows.key_lens + row), 0, length)
    return start, number, length


@triton.jit
def prefix_of(rows, row, prefixes, prefix_len):
    """(prefix, its length) of a row; length 0 for an id that is no prefix."""
    prefix, length = 0, prefix_len
    if rows.prefix_ids is not None:
        wanted = tl.load(rows.prefix_ids + row)
        exists = (wanted >= 0) & (wanted < prefixes)
        prefix = tl.where(exists, wanted, 0).to(tl.int32)
        length = tl.where(exists, prefix_len, 0)
        if rows.prefix_lens is not None:
            length = clamp(tl.load(rows.prefix_lens + prefix), 0, length)
    return prefix, length


@triton.jit
def parent_of(rows, row, batch):
    """The row's parent, or −1."""
    parent = tl.load(rows.parent + row)
    return tl.where((parent >= 0) & (parent < batch), parent, -1).to(tl.int32)


@triton.jit
def shift_of(kv_len, q_len, CAUSAL: tl.constexpr):
    """Query i of a row stands at position i + shift."""
    if CAUSAL:
        shift = kv_len - q_len
    else:
        shift = 0
    return shift


@triton.jit
def keys_seen(query, shift, kv_len, window, CAUSAL: tl.constexpr):
    """[first, stop): the keys that a query sees."""
    first, stop = query * 0, query * 0 + kv_len
    if CAUSAL:
        stop = tl.maximum(tl.minimum(query + shift + 1, kv_len), 0)
    if window is not None:
        first = tl.maximum(query + shift - window + 1, 0)
        if not CAUSAL:
            stop = tl.minimum(query + window, kv_len)
    return first, stop


@triton.jit
def queries_seeing(key, shift, q_len, window, CAUSAL: tl.constexpr):
    """[first, stop): the queries that see a key. The inverse of keys_seen."""
    first, stop = key * 0, key * 0 + q_len
    if CAUSAL:
        first = tl.maximum(key - shift, 0)
    if window is not None:
        stop = tl.maximum(tl.minimum(key + window - shift, q_len), 0)
        if not CAUSAL:
            first = tl.maximum(key - window + 1, 0)
    return first, stop


@triton.jit
def columns_seen(query, shift, prefix_len, slide):
    """[first, stop): the prefix columns that a query sees."""
    first, stop = query * 0, query * 0 + prefix_len
    if slide is not None:
        first = tl.maximum(prefix_len + query + shift + slide + 1, 0)
    return first, stop


@triton.jit
def queries_seeing_column(column, shift, prefix_len, q_len, slide):
    """[first, stop): the queries that see a prefix column. The inverse of columns_seen."""
    first, stop = column * 0, column * 0 + q_len
    if slide is not None:
        stop = tl.maximum(tl.minimum(column - prefix_len - shift - slide, q_len), 0)
    return first, stop


@triton.jit
def split_range(first_low, first_high, stop_low, stop_high, BLOCK: tl.constexpr):
    """(start, full_start, full_stop, stop) of a loop in steps of BLOCK, for things that see [first, stop) each.

    first lies in [first_low, first_high], stop in [stop_low, stop_high]. Blocks in [full_start, full_stop) are seen wholly
    by all; those in [start, full_start) and [full_stop, stop) need a mask; the others are seen by none.
    """
    start = first_low // BLOCK * BLOCK
    full_start = tl.minimum(tl.cdiv(first_high, BLOCK) * BLOCK, tl.maximum(tl.cdiv(stop_high, BLOCK) * BLOCK, start))
    full_stop = tl.maximum(stop_low // BLOCK * BLOCK, full_start)
    return start, full_start, full_stop, stop_high
