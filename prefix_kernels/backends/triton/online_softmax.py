"""Tiles, scores, and the online softmax over a range of keys.

    scores  = scale · q · keysᵀ → softcap → + bias
    largest = the greatest score so far        total = Σ exp(scores − largest)        sums = Σ exp(scores − largest) · values

and lse = largest + log total, out = sums / total. Inside the kernels scores are in units of log 2, so that exp is exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def start_of(tensor, row, head, token):
    """The address of one token, in 64 bit."""
    offset = tl.cast(row, tl.int64) * tensor.batch + tl.cast(head, tl.int64) * tensor.head
    return tensor.pointer + offset + tl.cast(token, tl.int64) * tensor.token


@triton.jit
def start_of_bias(bias, row, head, query, column, BIAS_VECTOR: tl.constexpr):
    """The address of a query's bias, or each one's, of one column, a multiple of BIAS_VECTOR; None without a bias."""
    if bias is None:
        pointers = None
    else:
        first = tl.cast(row, tl.int64) * bias.batch + tl.cast(head, tl.int64) * bias.head
        pointers = bias.pointer + tl.multiple_of(first + tl.cast(query, tl.int64) * bias.token, BIAS_VECTOR) + column
    return pointers


@triton.jit
def tile_pointers(start, stride, token, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """[BLOCK, BLOCK_DIM]: the addresses of `token` … `token` + BLOCK − 1."""
    offset = tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, BLOCK_DIM)[None, :]
    return start + tl.cast(token, tl.int64) * stride + offset


@triton.jit
def tile_mask(token, stop, MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """[BLOCK, BLOCK_DIM], or broadcasting to it: what exists; None if everything does."""
    rows = (token + tl.arange(0, BLOCK) < stop)[:, None]
    dims = (tl.arange(0, BLOCK_DIM) < DIM)[None, :]
    if MASKED:
        if DIM == BLOCK_DIM:
            mask = rows
        else:
            mask = rows & dims
    elif DIM == BLOCK_DIM:
        mask = None
    else:
        mask = dims
    return mask


@triton.jit
def load_tile(
    start, stride, token, stop, MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """[BLOCK, BLOCK_DIM]: tokens from `token` on; MASKED: 0 from `stop` on."""
    pointers = tile_pointers(start, stride, token, BLOCK, BLOCK_DIM)
    mask = tile_mask(token, stop, MASKED, DIM, BLOCK, BLOCK_DIM)
    if mask is None:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def store_tile(start, stride, token, stop, tile, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """tile [BLOCK, BLOCK_DIM] to tokens `token` … `stop` − 1, rounded to their dtype."""
    pointers = tile_pointers(start, stride, token, BLOCK, BLOCK_DIM)
    mask = tile_mask(token, stop, True, DIM, BLOCK, BLOCK_DIM)
    tl.store(pointers, tile.to(start.dtype.element_ty), mask=mask)


@triton.jit
def tanh(x):
    """To 1e-7 relative: a polynomial near 0, where 1 − 2 / (exp(2x) + 1) cancels."""
    square = x * x
    small = x * (1 + square * (-0.33333334 + square * (0.13333334 - 0.053968254 * square)))
    return tl.where(tl.abs(x) < 0.15, small, 1 - 2 / (tl.exp2(x * (2 * LOG2_E)) + 1))


@triton.jit
def scores_of(products, scale, softcap):
    """Scores, in units of log 2, from q · keysᵀ."""
    if softcap is None:
        scores = products * (scale * LOG2_E)
    else:
        scores = tanh(products * (scale / softcap)) * (softcap * LOG2_E)
    return scores


@triton.jit
def load_bias(pointers, exists):
    """The bias at `pointers`, in units of log 2; 0 where there is none."""
    return tl.load(pointers, mask=exists, other=0.0).to(tl.float32) * LOG2_E


@triton.jit
def bias_exists(column, stop, BIAS_VECTOR: tl.constexpr):
    """Whether there is a bias of a column to read: up to `stop`, and to the end of the vector that has it."""
    return column // BIAS_VECTOR * BIAS_VECTOR < stop


@triton.jit
def through_softcap(dscores, scores, softcap):
    """The gradient before the softcap: its slope is 1 − tanh². scores: without a bias."""
    if softcap is not None:
        capped = scores * (LN_2 / softcap)
        dscores = dscores * (1 - capped * capped)
    return dscores


@triton.jit
def lse_of(largest, total):
    """The log-sum-exp in natural units; −inf where nothing was seen."""
    return (largest + tl.log2(total)) * LN_2


@triton.jit
def load_log2_lse(lse, query, stop):
    """lse in units of log 2; +inf, which makes every weight 0, where there is no query and where a query sees nothing."""
    value = tl.load(lse + query, mask=query < stop, other=float("inf"))
    return tl.where(value == float("-inf"), float("inf"), value) * LOG2_E


@triton.jit
def visible_keys(key, stop_key, first, stop, key_mask, WINDOWED: tl.constexpr):
    """[queries, keys] for keys [BLOCK] and each query's [first, stop); key_mask: bytes, 0 hides a key."""
    visible = key[None, :] < stop[:, None]
    if WINDOWED:
        visible = visible & (key[None, :] >= first[:, None])
    if key_mask is not None:
        visible = visible & (tl.load(key_mask + key, mask=key < stop_key, other=0) != 0)[None, :]
    return visible
