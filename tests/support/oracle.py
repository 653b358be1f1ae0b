"""Attention by definition, written apart from the package: visibility column by column in plain Python, then autograd.

In float64 it is the expected value; in a lower dtype it is the eager yardstick of the tolerance: concatenation, products in
the input dtype, scores and softmax in float32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from support.inputs import Inputs


def naive_attention(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(out, lse) of a case, differentiable by torch's autograd."""
    q, k, v, prefix_k, prefix_v = inputs.tensors
    options = {n: value.tolist() if n in _LISTS and value is not None else value for n, value in inputs.options.items()}
    if prefix_k.dim() == 3:
        prefix_k, prefix_v = prefix_k[None], prefix_v[None]
    prefix_k, prefix_v = prefix_k.to(q.dtype), prefix_v.to(q.dtype)
    if "cu_seqlens_q" in options:
        return _packed(q, k, v, prefix_k, prefix_v, options)
    rows = [_row(q[b], k[b], v[b], prefix_k, prefix_v, b, options) for b in range(q.shape[0])]
    if not rows:
        return q.new_zeros(*q.shape[:3], v.shape[-1]) + 0 * q.sum(), q.sum(-1).to(_score_dtype(q))
    return torch.stack([out for out, _ in rows]), torch.stack([lse for _, lse in rows])


_LISTS = ("key_mask", "prefix_ids", "prefix_lens", "key_lens", "cu_seqlens_q", "cu_seqlens_k", "parent")


def _score_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _packed(q, k, v, prefix_k, prefix_v, options):
    outs, lses = [], []
    starts_q, starts_k = options["cu_seqlens_q"], options["cu_seqlens_k"]
    for s in range(len(starts_q) - 1):
        own = list(range(starts_k[s], starts_k[s + 1]))
        parent = -1 if options["parent"] is None else options["parent"][s]
        seen = list(range(starts_k[parent], starts_k[parent + 1])) if parent >= 0 else []
        out, lse = _row(
            q[starts_q[s] : starts_q[s + 1]].transpose(0, 1), k[seen + own].transpose(0, 1), v[seen + own].transpose(0, 1),
            prefix_k, prefix_v, s, options, parent_keys=len(seen),
        )  # fmt: skip
        outs.append(out.transpose(0, 1))
        lses.append(lse)
    if not outs:
        return q.new_zeros(0, q.shape[1], v.shape[-1]) + 0 * q.sum(), q.sum(-1).transpose(0, 1).to(_score_dtype(q))
    return torch.cat(outs), torch.cat(lses, dim=1)


def _row(q, k, v, prefix_k, prefix_v, row, options, parent_keys=0):
    """One batch row or sequence: q [heads, q_len, dim], k and v [kv_heads, kv_len, dim]."""
    prefix = 0 if options["prefix_ids"] is None else options["prefix_ids"][row]
    length = 0 if prefix < 0 else prefix_k.shape[2] if options["prefix_lens"] is None else options["prefix_lens"][prefix]
    fill = k.shape[1] if options.get("key_lens") is None else options["key_lens"][row]
    padded_len = prefix_k.shape[2]
    prefix_keys, prefix_values = prefix_k[max(prefix, 0), :, :length], prefix_v[max(prefix, 0), :, :length]
    keys, values = torch.cat([prefix_keys, k[:, :fill]], 1), torch.cat([prefix_values, v[:, :fill]], 1)
    group = q.shape[0] // k.shape[0]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scale = q.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
    scores = (q @ keys.transpose(-1, -2)).to(_score_dtype(q)) * scale
    if options["softcap"] is not None:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    if options.get("bias") is not None:
        columns = [*range(length), *range(padded_len, padded_len + fill)]
        bias = options["bias"].to(scores.dtype).expand(-1, -1, -1, padded_len + k.shape[1])
        scores = scores + bias[min(row, bias.shape[0] - 1)][..., columns]
    mask = None if options.get("key_mask") is None else tuple(options["key_mask"][row])
    visible = _visible(
        q.shape[1], fill, length, parent_keys, options["causal"], options["window"], options.get("first_key_position"), mask
    )
    scores = scores.masked_fill(~visible, -torch.inf)
    anything = (scores > -torch.inf).any(-1, keepdim=True)
    if scores.shape[-1] == 0:
        return q * 0 @ k.new_zeros(q.shape[0], q.shape[2], v.shape[-1]), scores.new_full(scores.shape[:2], -torch.inf)
    safe = torch.where(anything, scores, 0.0)
    weights = torch.where(anything, safe.softmax(-1), 0.0)
    lse = torch.where(anything[..., 0], torch.logsumexp(safe, -1), -torch.inf)
    return weights.to(q.dtype) @ values, lse


@functools.cache
def _visible(q_len, fill, length, parent_keys, causal, window, first, mask):
    """Bool [q_len, length + fill], one comparison at a time, as the argument list of prefix_attention reads."""
    own = fill - parent_keys
    table = torch.zeros(q_len, length + fill, dtype=torch.bool)
    for i in range(q_len):
        position = i + own - q_len if causal else i
        for p in range(length):
            distance = length + (first or 0) + position - p
            table[i, p] = window is None or first is None or distance < window
        for column in range(fill):
            j = column - parent_keys
            seen = mask is None or j < 0 or mask[j]
            if j >= 0 and causal:
                seen = seen and j <= position and (window is None or j > position - window)
            elif j >= 0 and window is not None:
                seen = seen and abs(i - j) < window
            table[i, length + column] = seen
    return table
