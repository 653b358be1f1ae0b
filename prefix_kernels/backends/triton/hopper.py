"""What the kernels for Hopper (sm_90a) share, in Gluon: descriptors of tensors, loads by TMA, products and places.

Packed sequences: the tensors get two more dimensions, by which address arithmetic wraps around 2^64 and the end of a sequence
falls on the end of a dimension. So TMA itself reads zeros past a sequence and writes nothing there (triton.tools.ragged_tma).
Descriptors cost tens of microseconds a call in Python, so these kernels are for large calls.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from prefix_kernels.problem import AttentionInputs, AttentionProblem

# Renamed in Triton 3.8; where the new name exists, the old one may exist too and raise.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
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
def wait_for_keys(ring, j, blocks, STAGES: gl.constexpr):
    """Until block j is there, if there is one. Where this stands, wgmma's wait cannot be moved across: hopper_forward.py."""
    mbarrier.wait(ring[1].index(j % STAGES), (j // STAGES) & 1, pred=j < blocks)


@gluon.jit
def issue_scores(q_tile, ring, j, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr):
    """q · keysᵀ of block j, on its way: [WARPGROUP_M, BLOCK_N]"""
    WARPGROUP_M: gl.constexpr = q_tile.shape[0]
    HEAD_DIM: gl.constexpr = q_tile.shape[1]
    keys = ring[0].index(j % STAGES).reshape([BLOCK_N, HEAD_DIM]).permute((1, 0))
    nothing = gl.zeros([WARPGROUP_M, BLOCK_N], gl.float32, SCORES)
    return warpgroup_mma(q_tile, keys, nothing, use_acc=False, is_async=True)


@gluon.jit
def store_sums(grad, sums, first, stop, stride, SUMS: gl.constexpr):
    """sums [tokens, HEAD_DIM] to tokens from `first` on, those < stop, rounded to their dtype."""
    token = gl.expand_dims(first + gl.arange(0, sums.shape[0], layout=gl.SliceLayout(1, SUMS)), 1)
    dim = gl.expand_dims(gl.arange(0, sums.shape[1], layout=gl.SliceLayout(0, SUMS)), 0)
    gl.store(grad + token.to(gl.int64) * stride + dim, sums, mask=(token < stop) & (dim >= 0))


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


def readable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that TMA can read."""
    return tensor if _readable(tensor) else tensor.clone(memory_format=torch.contiguous_format)


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


def key_descriptors(
    q: Tensor, columns: Iterable[Tensor], prefix: Iterable[Tensor], rows: int, packed: bool
) -> list[TensorDescriptor]:
    """Of a row's own keys and values, then of the prefix's. Nothing is read of an empty tensor, but a descriptor cannot be
    empty: q stands in."""
    each = [*((tensor, packed) for tensor in columns), *((tensor, False) for tensor in prefix)]
    return [descriptor(tensor, rows, of_row) if tensor.numel() else descriptor(q, rows, packed) for tensor, of_row in each]


def section_of(problem: AttentionProblem, tokens: int, heads: int) -> int:
    """How many of the batch's `heads` are a section: as many as L2 holds two operands of, with q's heads × tokens for all."""
    operands = 2 * tokens * problem.head_dim * problem.dtype.itemsize * problem.batch
    return max(min(SECTION_BYTES * heads // max(operands, 1), heads), 1)
