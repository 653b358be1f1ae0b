"""Splits one call into passes that a stock kernel can run: which queries, which columns, which mask.

The prefix is read by folding the batch, and the heads that share a kv head, into query rows,
[1, kv_heads, group · batch · q_len, head_dim] against [1, kv_heads, prefix_len, head_dim]: it is never expanded, and its
gradient is summed where the kernel sums over rows, in float32. Only a mask over the prefix (a bias, or a window that slides
over it) forbids the folding; then all rows read the one prefix (a view), except for gradients of a long one, where each row is
a pass of its own, since a row's dprefix takes memory.

Where a CUDA kernel takes fewer kv heads than heads, the batch alone is folded, [1, heads, batch · q_len, head_dim]: of
token-major memory that is a view. Its backward kernels give a block of keys of one head to one program (the memory-efficient
one all keys of a head), so a short prefix leaves most of the chip idle; it is expanded instead, and the rows' gradients are
summed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prefix_kernels.backends.sdpa.stock import composes, takes_fewer_kv_heads
from prefix_kernels.problem import AttentionInputs

GROUP_UP_TO = 8  # queries a row; assumed: when decoding, rows of one kv head in one block save more than copying q costs
EXPAND_BELOW = 132  # programs of a backward pass over the folded prefix; measured on an H200, 1.0 to 2.4 times as fast as 0
EXPAND_KEYS = 128  # of one head that a program of the backward kernels owns
EXPAND_UP_TO = 4  # prefix keys a query; assumed: beyond it the rows' gradients outweigh q, out and their gradients


@dataclass(frozen=True)
class Selection:
    """Some queries of [batch, heads, q_len, …]: batch rows, or query positions, or all. `fold`: heads to fold them to."""

    rows: Tensor | slice | None = None
    positions: Tensor | slice | None = None
    fold: int | None = None

    @property
    def everything(self) -> bool:
        return self.rows is None and self.positions is None

    def select(self, tensor: Tensor) -> Tensor:
        """The selected queries, unfolded."""
        if self.rows is not None:
            return tensor[self.rows]
        return tensor if self.positions is None else tensor[:, :, self.positions]

    def take(self, tensor: Tensor) -> Tensor:
        """The selected queries as the kernels see them."""
        tensor = self.select(tensor)
        return tensor.unflatten(1, (self.fold, -1)).movedim(0, 2).flatten(1, 3)[None] if self.fold else tensor

    def unfold(self, tensor: Tensor, heads: int, q_len: int) -> Tensor:
        """The inverse of folding."""
        if not self.fold:
            return tensor
        return tensor[0].unflatten(1, (heads // self.fold, -1, q_len)).movedim(2, 0).flatten(1, 2)

    def put(self, target: Tensor, value: Tensor) -> None:
        """Write values back to where select found them."""
        if self.rows is not None:
            target[self.rows] = value
        else:
            target[:, :, self.positions] = value


@dataclass(frozen=True)
class Pass:
    """One run of a stock kernel. `prefix` is the bank index of the prefix it reads, or None for the sequence's keys."""

    queries: Selection
    prefix: int | None
    columns: slice  # of the prefix, or of the keys
    mask: Tensor | None = None  # additive
    causal: bool = False
    hidden: Tensor | None = None  # bool, broadcasts to the queries [batch, heads, q_len]: sees no column of this pass


def plan(inputs: AttentionInputs, backward: bool = False) -> tuple[AttentionInputs, list[Pass]]:
    """The passes of a call, forward or backward, and the inputs that they refer to.

    Varlen becomes one batch row of tokens; keys past key_lens become 0, so that NaN there cannot reach a product.
    """
    if inputs.varlen:
        return inputs, [*_packed_prefix_passes(inputs), *_packed_passes(inputs)]
    inputs, passes = _sequence_passes(inputs)
    return inputs, [*passes, *_prefix_passes(inputs, backward)]


def _row_groups(ids: Tensor | None, inputs: AttentionInputs) -> Iterator[tuple[int, Tensor | None, int]]:
    """(prefix, its rows — None: all —, its length) for every prefix that a row uses. Reads ids, and waits for their device."""
    prefixes, _, prefix_len, _ = inputs.prefix_k.shape
    if ids is None:
        if prefix_len:
            yield 0, None, prefix_len
        return
    lens = [prefix_len] * prefixes if inputs.prefix_lens is None else inputs.prefix_lens.clamp(0, prefix_len).tolist()
    for prefix in ids.unique().tolist():
        if 0 <= prefix < prefixes and lens[prefix]:
            rows = (ids == prefix).nonzero()[:, 0]
            yield prefix, None if rows.shape[0] == ids.shape[0] else rows, lens[prefix]


def expands_prefix(heads: int, q_len: int, prefix_len: int, splits_keys: bool = True) -> bool:
    """Whether the backward pass over a prefix without a mask expands it over the batch, on CUDA.

    Args:
        splits_keys: blocks of a head's keys have programs of their own, as in all kernels but the memory-efficient one.
    """
    programs = heads * (-(-prefix_len // EXPAND_KEYS) if splits_keys else 1)
    return programs < EXPAND_BELOW and prefix_len <= EXPAND_UP_TO * q_len


def expands_masked_prefix(q_len: int, prefix_len: int) -> bool:
    """Whether the backward pass over a prefix with a mask expands it over the batch, rather than take row after row."""
    return prefix_len <= EXPAND_UP_TO * q_len


def _folded_heads(inputs: AttentionInputs, length: int, backward: bool) -> int | None:
    """Heads that the queries of a pass over the prefix are folded to; None: the prefix is expanded over the batch."""
    (heads, q_len), splits_keys = inputs.q.shape[1:3], takes_fewer_kv_heads(inputs.q, inputs.v)
    folded = heads if splits_keys and q_len > GROUP_UP_TO else inputs.k.shape[1]
    if q_len <= GROUP_UP_TO or inputs.q.device.type == "cpu" or composes(inputs.q.device, inputs.q.dtype):
        return folded
    return None if backward and expands_prefix(folded, q_len, length, splits_keys) else folded


def _prefix_passes(inputs: AttentionInputs, backward: bool) -> Iterator[Pass]:
    batch, _, q_len, _ = inputs.q.shape
    slides = inputs.window is not None and inputs.first_key_position is not None
    for prefix, rows, length in _row_groups(inputs.prefix_ids, inputs):
        columns = slice(0, length)
        if inputs.bias is None and not slides:
            yield Pass(Selection(rows, fold=_folded_heads(inputs, length, backward)), prefix, columns)
            continue
        together = composes(inputs.q.device, inputs.q.dtype) or not backward or expands_masked_prefix(q_len, length)
        if rows is None and together:
            selections = [slice(None)]
        else:
            selections = [slice(row, row + 1) for row in (range(batch) if rows is None else rows.tolist())]
        for selected in selections:
            mask = _prefix_mask(inputs, selected, length, slides)
            queries = Selection() if selected == slice(None) else Selection(selected)
            yield Pass(queries, prefix, columns, mask=mask, hidden=_hidden(mask, False))


def _prefix_mask(inputs: AttentionInputs, rows: slice, length: int, slides: bool) -> Tensor:
    """Of these rows over the prefix's columns, additive: [rows or 1, heads or 1, q_len or 1, length]."""
    mask = inputs.q.new_zeros((1, 1, 1, length))
    if inputs.bias is not None:
        mask = inputs.bias[rows if inputs.bias.shape[0] > 1 else slice(None), ..., :length]
    if not slides:
        return mask
    q_len, kv_len = inputs.q.shape[2], inputs.k.shape[2]
    fill = kv_len if inputs.key_lens is None else inputs.key_lens[rows, None, None, None].clamp(0, kv_len)
    query = torch.arange(q_len, device=inputs.q.device)[:, None]
    position = length + inputs.first_key_position + query + (fill - q_len if inputs.causal else 0)  # [rows or 1, 1, q_len, 1]
    return mask.masked_fill(torch.arange(length, device=inputs.q.device) <= position - inputs.window, -torch.inf)


def _sequence_passes(inputs: AttentionInputs) -> tuple[AttentionInputs, list[Pass]]:
    q_len, kv_len = inputs.q.shape[2], inputs.k.shape[2]
    fill = None  # int [batch], where rows differ or may differ
    if inputs.key_lens is not None:
        lens = inputs.key_lens.clamp(0, kv_len)
        alike = lens.device.type == "cpu" and bool((lens == lens[:1]).all())
        length = int(lens[0]) if alike and lens.numel() else 0
        if alike and not (inputs.causal and q_len > length):
            kv_len = length
        else:  # ragged, or queries that stand before the first key
            fill = lens
            past = (torch.arange(kv_len, device=fill.device) >= fill[:, None])[:, None, :, None]
            inputs = inputs._replace(k=inputs.k.masked_fill(past, 0), v=inputs.v.masked_fill(past, 0))
    if kv_len == 0:
        return inputs, []
    mask = None
    if inputs.bias is not None:
        mask = inputs.bias[..., inputs.prefix_k.shape[2] :][..., :kv_len]
    if inputs.key_mask is not None:
        visible = inputs.key_mask[:, None, None, :kv_len]
        mask = _restrict(mask, visible, inputs.q.dtype)
    windowed = inputs.window is not None and not (inputs.causal and inputs.window >= kv_len)
    if fill is not None or windowed:
        mask = _restrict(mask, _band(inputs, q_len, kv_len, fill), inputs.q.dtype)
        return inputs, [_sequence_pass(slice(0, kv_len), mask, False)]
    if not inputs.causal or q_len == 1:
        return inputs, [_sequence_pass(slice(0, kv_len), mask, False)]
    before = kv_len - q_len  # keys that every query sees
    passes = []
    for columns, causal in ((slice(0, before), False), (slice(before, kv_len), True)):
        if columns.start < columns.stop:
            passes.append(_sequence_pass(columns, None if mask is None else mask[..., columns], causal))
    return inputs, passes


def _sequence_pass(columns: slice, mask: Tensor | None, causal: bool) -> Pass:
    hidden = None if mask is None else _hidden(mask, causal)
    return Pass(Selection(), None, columns, mask=mask, causal=causal, hidden=hidden)


def _band(inputs: AttentionInputs, q_len: int, kv_len: int, fill: Tensor | None) -> Tensor:
    """Bool [batch or 1, 1, q_len, kv_len]: causality, window and fill."""
    query = torch.arange(q_len, device=inputs.q.device)[:, None]
    key = torch.arange(kv_len, device=inputs.q.device)[None, :]
    stop = kv_len if fill is None else fill[:, None, None, None]
    position = query + stop - q_len if inputs.causal else query
    visible = key <= position if inputs.causal else key < stop
    if inputs.window is not None:
        visible = visible & (key > position - inputs.window)
        if not inputs.causal:
            visible = visible & (key < position + inputs.window)
    return visible if visible.dim() == 4 else visible[None, None]


def _restrict(mask: Tensor | None, visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Adds −inf to an additive mask where nothing may be seen; a new one has `dtype`."""
    if mask is None:
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
    return mask.masked_fill(~visible, -torch.inf)


def _hidden(mask: Tensor, causal: bool) -> Tensor:
    """Bool [batch or 1, heads or 1, q_len or 1]: queries whose every column is −inf."""
    visible = mask > -torch.inf
    if not causal:
        return ~visible.any(-1)
    if visible.shape[2] == 1:  # one row for all queries: query i sees what lies up to column i
        return ~visible[:, :, 0].cummax(-1).values
    return ~visible.tril().any(-1)


def _packed_prefix_passes(inputs: AttentionInputs) -> Iterator[Pass]:
    ids = inputs.prefix_ids
    if ids is not None:
        ids = ids.repeat_interleave(inputs.cu_seqlens_q.diff(), output_size=inputs.q.shape[2])
    for prefix, tokens, length in _row_groups(ids, inputs):
        yield Pass(Selection(positions=tokens), prefix, slice(0, length))


def _packed_passes(inputs: AttentionInputs) -> Iterator[Pass]:
    """One pass a sequence over its own keys, and one over its parent's.

    Args:
        inputs: tokens as one batch row.
    """
    by_token = inputs._replace(q=inputs.q[0].transpose(0, 1), k=inputs.k[0].transpose(0, 1))
    for queries, keys, parent_keys in by_token.sequences():
        start, stop = keys.start, keys.stop
        q_len, kv_len = queries.stop - queries.start, stop - start
        if q_len == 0:
            continue
        if parent_keys is not None and parent_keys.start < parent_keys.stop:
            yield Pass(Selection(positions=queries), None, parent_keys)
        if kv_len == 0:
            continue
        if inputs.causal and q_len > kv_len:  # those in front of the first key see none
            queries, q_len = slice(queries.stop - kv_len, queries.stop), kv_len
        selection = Selection(positions=queries)
        if inputs.window is not None and not (inputs.causal and inputs.window >= kv_len):
            mask = _restrict(None, _band(inputs, q_len, kv_len, None), inputs.q.dtype)
            yield Pass(selection, None, slice(start, stop), mask=mask, hidden=_hidden(mask, False))
        elif not inputs.causal or q_len == 1:
            yield Pass(selection, None, slice(start, stop))
        else:
            before = stop - q_len
            if start < before:
                yield Pass(selection, None, slice(start, before))
            yield Pass(selection, None, slice(before, stop), causal=True)
