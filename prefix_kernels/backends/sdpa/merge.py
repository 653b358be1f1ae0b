"""Merges two softmaxes over disjoint sets of columns, in one pass over memory.

    lse = log(exp(lse₁) + exp(lse₂))        out = out₁ · exp(lse₁ − lse) + out₂ · exp(lse₂ − lse)

Either set may be empty for a query (lse −inf): its out is not looked at. Both empty: lse −inf, out 0.
A program owns a block of rows; a row is one query of one head. Rows are counted as out lies in memory: batch, query, head.
"""

from __future__ import annotations

import torch
import triton  # noqa: TID253 — this file is imported on CUDA alone
import triton.language as tl  # noqa: TID253
from torch import Tensor

from prefix_kernels.problem import empty_token_major

BLOCK_VALUES = 4096  # assumed: 32 values a thread, enough loads in flight to keep memory busy
NUM_WARPS = 4
# Run-time values: another length never compiles the kernel again.
LENGTHS = ("rows", "heads", "q_len", "lse_batch", "lse_head", "part_lse_batch", "part_lse_head")


@triton.jit
def load_rows(pointer, batch, head, query, batch_stride, head_stride, query_stride, used, dim):
    """Rows of values in float32; 0 where they are not used."""
    offset = batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride + query.to(tl.int64) * query_stride
    return tl.load(pointer + offset[:, None] + dim, mask=used, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=LENGTHS)
def merge_kernel(  # noqa: PLR0913
    out, lse, part, part_lse, merged, merged_lse, rows, heads, q_len, out_batch, out_head, out_query, part_batch, part_head,
    part_query, lse_batch, lse_head, part_lse_batch, part_lse_head, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    head, query, batch = row % heads, row // heads % q_len, row // heads // q_len
    first = tl.load(lse + batch.to(tl.int64) * lse_batch + head * lse_head + query, row < rows, float("-inf"))  # [BLOCK_ROWS]
    second = tl.load(
        part_lse + batch.to(tl.int64) * part_lse_batch + head * part_lse_head + query, row < rows, float("-inf")
    )  # [BLOCK_ROWS]
    largest = tl.maximum(first, second)
    subtract = tl.where(largest == float("-inf"), 0.0, largest)
    first, second = tl.exp(first - subtract), tl.exp(second - subtract)
    total = first + second
    tl.store(merged_lse + (batch.to(tl.int64) * heads + head) * q_len + query, subtract + tl.log(total), row < rows)
    factor = tl.where(total > 0, 1 / total, 0.0)
    inside = (row < rows)[:, None] & (dim < VALUE_DIM)
    first_out = load_rows(
        out, batch, head, query, out_batch, out_head, out_query, inside & (first > 0)[:, None], dim
    )  # [BLOCK_ROWS, BLOCK_DIM]
    second_out = load_rows(
        part, batch, head, query, part_batch, part_head, part_query, inside & (second > 0)[:, None], dim
    )  # [BLOCK_ROWS, BLOCK_DIM]
    values = first_out * (first * factor)[:, None] + second_out * (second * factor)[:, None]
    tl.store(merged + row.to(tl.int64)[:, None] * VALUE_DIM + dim, values.to(merged.dtype.element_ty), inside)


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) over both sets of columns, out token-major and in the memory of out where that is, lse contiguous and new.

    lse is read by several threads, of which one may be late: it cannot be overwritten.

    Args:
        out, part: [batch, heads, q_len, value_dim], 16 bit or float32.
        lse, part_lse: float32 [batch, heads, q_len].
    """
    batch, heads, q_len, value_dim = out.shape
    out, part = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (out, part))
    lse, part_lse = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (lse, part_lse))
    merged = out if out.transpose(1, 2).is_contiguous() else empty_token_major(out, tuple(out.shape))
    merged_lse = torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
    rows, block_dim = batch * heads * q_len, 1 << (value_dim - 1).bit_length()  # Triton's own helpers are slow on the host
    block_rows = max(1, BLOCK_VALUES // block_dim)
    with torch.cuda.device_of(out):  # Triton launches on the current device; a CPU tensor (in the interpreter) has none
        merge_kernel[(-(-rows // block_rows),)](
            out, lse, part, part_lse, merged, merged_lse, rows, heads, q_len, *out.stride()[:3], *part.stride()[:3],
            *lse.stride()[:2], *part_lse.stride()[:2], VALUE_DIM=value_dim, BLOCK_DIM=block_dim, BLOCK_ROWS=block_rows,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return merged, merged_lse
