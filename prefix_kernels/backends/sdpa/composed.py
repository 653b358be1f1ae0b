"""One part of an attention call as matrix products, for devices whose attention kernels do not give the log-sum-exp.

    scores = (scale · q) · kᵀ + mask        lse = log Σ exp(scores)        out = exp(scores − lse) · v
    weights = exp(scores − lse)             dscores = weights ∘ (grad_out · vᵀ − rowsum(grad_out ∘ out) + grad_lse)

16 bit goes through it in float32. Queries of the heads that share a kv head are rows of one product, and those of all batch
rows where all of them share the keys, so that no key is copied. Scores are there for a block of query positions at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prefix_kernels.problem import empty_token_major

SCORES = 2**24  # of a block of query positions; assumed: 64 MB in float32 are enough to fill a chip


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """As stock.attend."""
    rows, dtype = _Rows(q, k), torch.promote_types(q.dtype, torch.float32)
    k, v = _by_head(k, dtype), _by_head(v, dtype)
    out = empty_token_major(q, (*q.shape[:3], v.shape[-1]))
    lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    for queries, columns in _blocks(q, k, causal):
        q_rows = rows.fold(q[:, :, queries].to(dtype) * scale)  # [batch or 1, kv_heads, rows, head_dim]
        scores = rows.scores(q_rows, k, mask, causal, queries, columns)
        largest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(largest).exp_()
        total = weights.sum(-1, keepdim=True)
        out[:, :, queries] = rows.unfold((weights @ v[:, :, columns]).div_(total))
        lse[:, :, queries] = rows.unfold(total.log_().add_(largest))[..., 0]
    return out, lse


def attend_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: Tensor | None, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As stock.attend_backward, all three in float32 or float64; dk and dv have k's batch size."""
    rows, dtype = _Rows(q, k), torch.promote_types(q.dtype, torch.float32)
    k, v = _by_head(k, dtype), _by_head(v, dtype)
    dq, dk, dv = empty_token_major(q, tuple(q.shape), dtype), torch.zeros_like(k), torch.zeros_like(v)
    delta = (grad_out.to(dtype) * out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    for queries, columns in _blocks(q, k, causal):
        q_rows = rows.fold(q[:, :, queries].to(dtype) * scale)  # [batch or 1, kv_heads, rows, head_dim]
        grad_rows = rows.fold(grad_out[:, :, queries].to(dtype))  # [batch or 1, kv_heads, rows, value_dim]
        lse_rows, delta_rows = (rows.fold(tensor[:, :, queries, None]) for tensor in (lse, delta))
        weights = rows.scores(q_rows, k, mask, causal, queries, columns).sub_(lse_rows).exp_()
        dv[:, :, columns] += weights.transpose(2, 3) @ grad_rows
        dscores = (grad_rows @ v[:, :, columns].transpose(2, 3)).sub_(delta_rows).mul_(weights)
        dk[:, :, columns] += dscores.transpose(2, 3) @ q_rows
        dq[:, :, queries] = rows.unfold(dscores @ k[:, :, columns]).mul_(scale)
    return dq, dk, dv


def _by_head(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As a batch of matrices, which products would otherwise make of it one by one."""
    return tensor.to(dtype, memory_format=torch.contiguous_format).contiguous()


def _blocks(q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Query positions, and the columns that they see: all, or causal up to the last of the positions."""
    batch, heads, q_len, _ = q.shape
    step = max(1, SCORES // (batch * heads * k.shape[2]))
    for start in range(0, q_len, step):
        stop = min(start + step, q_len)
        yield slice(start, stop), slice(0, stop if causal else k.shape[2])


class _Rows:
    """Queries as rows of a product with their keys: [batch, kv_heads, group · q_len, …], where all batch rows share the keys
    [1, kv_heads, batch · group · q_len, …]."""

    def __init__(self, q: Tensor, k: Tensor):
        self.batch, self.kv_heads, self.group = q.shape[0], k.shape[1], q.shape[1] // k.shape[1]
        self.shared = k.shape[0] < self.batch

    def fold(self, tensor: Tensor) -> Tensor:
        """[batch, heads, q_len, …] as rows."""
        tensor = tensor.unflatten(1, (self.kv_heads, self.group))
        return tensor.transpose(0, 1).flatten(1, 3)[None] if self.shared else tensor.flatten(2, 3)

    def unfold(self, rows: Tensor) -> Tensor:
        """The inverse."""
        return self._by_row(rows).flatten(1, 2)

    def scores(self, q_rows: Tensor, k: Tensor, mask: Tensor | None, causal: bool, queries: slice, columns: slice) -> Tensor:
        """Masked scores of these rows, those of the query positions `queries`, with these columns."""
        scores = q_rows @ k[:, :, columns].transpose(2, 3)
        by_row = self._by_row(scores)  # a view
        if mask is not None:
            mask = mask[:, :, queries if mask.shape[2] > 1 else slice(None), columns]
            heads = (self.kv_heads, self.group) if mask.shape[1] > 1 else (1, 1)
            by_row += mask.unflatten(1, heads)
        if causal:
            positions = torch.arange(queries.start, queries.stop, device=k.device)
            hidden = torch.arange(columns.stop, device=k.device) > positions[:, None]
            by_row.masked_fill_(hidden, -torch.inf)
        return scores

    def _by_row(self, rows: Tensor) -> Tensor:
        """Rows as [batch, kv_heads, group, q_len, …]."""
        if self.shared:
            return rows[0].unflatten(1, (self.batch, self.group, -1)).transpose(0, 1)
        return rows.unflatten(2, (self.group, -1))
