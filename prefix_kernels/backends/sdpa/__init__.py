"""Stock torch kernels, composed exactly: a pass over the prefix, passes over the sequence, merged by log-sum-exp.

    lse = log(exp(lse₁) + exp(lse₂))        out = out₁ + (out₂ − out₁) · sigmoid(lse₂ − lse₁)

Backward: each pass runs the stock backward kernel with the global out and lse, so its weights are the global ones; the
dq of the passes add up, and dprefix arrives summed over the batch because the batch was folded into query rows.
16-bit inputs on the CPU: the backward pass runs in float32, since that kernel adds up dk and dv in the inputs' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefix_kernels.backends.sdpa.passes import Pass, plan
from prefix_kernels.backends.sdpa.stock import attend, attend_backward
from prefix_kernels.problem import AttentionInputs, AttentionProblem, empty_token_major

KERNEL_SCRATCH = 2**20  # bytes a thread: torch's CPU kernel keeps a block of scores and one of outputs


def why_not(problem: AttentionProblem) -> str | None:
    """Why this backend refuses a problem, or None."""
    if problem.device not in ("cpu", "cuda"):
        return f"torch's kernels return the log-sum-exp on cpu and cuda, not on {problem.device}"
    if problem.softcap is not None:
        return "torch's kernels know no softcap"
    if problem.device == "cuda" and problem.dtype == torch.float64:
        return "torch's CUDA kernels know no float64"
    if problem.device == "cuda" and (problem.has_prefix_ids or problem.varlen):
        return "a bank or packed sequences would need index values on the host"
    return None


def workspace_bytes(problem: AttentionProblem) -> tuple[int, int]:
    """Most bytes that the forward and the backward pass take besides what goes in and comes out.

    What torch's kernels take themselves is counted as measured on the CPU; on CUDA it was not measured.
    """
    size, wide = problem.dtype.itemsize, max(4, problem.dtype.itemsize)
    queries, keys, prefix = problem.query_values(), problem.key_values(), problem.prefix_values()
    lse = wide * problem.q_tokens * problem.heads
    scratch = torch.get_num_threads() * KERNEL_SCRATCH * (1 + problem.value_dim // 128)
    masks = 0
    if problem.window or problem.has_key_mask or problem.has_key_lens or problem.has_bias or problem.varlen:
        rows = problem.batch if problem.has_key_mask or problem.has_key_lens or problem.has_bias else 1
        masks = 4 * wide * rows * problem.q_len * problem.kv_len
        if problem.has_bias or problem.first_key_position is not None:
            heads = problem.heads if problem.has_bias else 1
            masks += 4 * wide * heads * problem.q_len * problem.prefix_len
    copies = size * (keys if problem.has_key_lens else 0) + (size * prefix if problem.prefix_dtype != problem.dtype else 0)
    forward = (size + 2 * wide) * queries + 6 * lse + masks + copies + scratch
    backward = 5 * wide * queries + 4 * wide * (keys + prefix) + 6 * lse + masks + copies + scratch
    return forward, backward


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """(out, lse) of one call."""
    dense, passes = plan(_as_batch(inputs))
    out, lse = _merge_passes(dense, passes)
    return (out[0].transpose(0, 1), lse[0]) if inputs.varlen else (out, lse)


def backward(
    inputs: AttentionInputs, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, prefix_k, prefix_v, None where not wanted. A pass that feeds no wanted gradient is not run."""
    varlen, dtypes = inputs.varlen, (inputs.q.dtype,) * 3 + (inputs.prefix_k.dtype,) * 2
    dense = _as_batch(inputs)
    if varlen:
        out, grad_out, lse = out.transpose(0, 1)[None], grad_out.transpose(0, 1)[None], lse[None]
        grad_lse = None if grad_lse is None else grad_lse[None]
    if dense.q.device.type == "cpu" and dense.q.dtype.itemsize == 2:
        names = ("q", "k", "v", "prefix_k", "prefix_v")
        dense = dense._replace(**{name: getattr(dense, name).float() for name in names})
        out, grad_out = out.float(), grad_out.float()
    dense, passes = plan(dense)
    nothing_visible = lse == -torch.inf
    lse = lse.masked_fill(nothing_visible, torch.inf)  # exp(scores − inf) = 0: no weight, no gradient
    if grad_lse is not None:
        grad_lse = grad_lse.masked_fill(nothing_visible, 0)
    grads = _sum_passes(dense, passes, out, lse, grad_out, grad_lse, wanted)
    if varlen:
        grads[:3] = [None if grad is None else grad[0].transpose(0, 1) for grad in grads[:3]]
    return tuple(None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))


def _as_batch(inputs: AttentionInputs) -> AttentionInputs:
    """The prefix in q's dtype; packed tokens as one batch row [1, heads, tokens, head_dim]."""
    dtype = inputs.q.dtype
    inputs = inputs._replace(prefix_k=inputs.prefix_k.to(dtype), prefix_v=inputs.prefix_v.to(dtype))
    if not inputs.varlen:
        return inputs
    return inputs._replace(**{name: getattr(inputs, name).transpose(0, 1)[None] for name in ("q", "k", "v")})


def _columns_of(inputs: AttentionInputs, one: Pass) -> tuple[Tensor, Tensor]:
    """The keys and values that a pass reads, as views."""
    if one.prefix is None:
        return inputs.k[:, :, one.columns], inputs.v[:, :, one.columns]
    return inputs.prefix_k[one.prefix, None, :, one.columns], inputs.prefix_v[one.prefix, None, :, one.columns]


def _merge_passes(inputs: AttentionInputs, passes: list[Pass]) -> tuple[Tensor, Tensor]:
    heads, q_len = inputs.q.shape[1:3]
    out = lse = None
    for one in passes if inputs.q.numel() else ():
        part, part_lse = attend(one.queries.take(inputs.q), *_columns_of(inputs, one), one.mask, one.causal, inputs.scale)
        part, part_lse = (one.queries.unfold(tensor, heads, q_len) for tensor in (part, part_lse))
        if one.hidden is not None:
            part_lse = part_lse.masked_fill(one.hidden, -torch.inf)
            part = part.masked_fill(one.hidden[..., None], 0)
        if out is None and one.queries.everything:
            out, lse = part, part_lse
            continue
        if out is None:
            out, lse = _nothing(inputs)
        merged = _merge(one.queries.select(out), one.queries.select(lse), part, part_lse)
        if one.queries.everything:
            out, lse = merged
        else:
            one.queries.put(out, merged[0])
            one.queries.put(lse, merged[1])
    return (out, lse) if out is not None else _nothing(inputs)


def _nothing(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """out and lse of queries that have seen no column yet."""
    shape = inputs.q.shape[:3]
    lse_dtype = torch.float64 if inputs.q.dtype == torch.float64 else torch.float32
    out = empty_token_major(inputs.q, (*shape, inputs.v.shape[-1])).zero_()
    return out, inputs.q.new_full(shape, -torch.inf, dtype=lse_dtype)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax over two disjoint sets of columns from the softmax over each; either set may be empty (lse −inf)."""
    weight = torch.sigmoid(part_lse - lse).nan_to_num_(0)[..., None]  # both −inf: keep out, which is 0
    merged = torch.lerp(out.to(weight.dtype), part.to(weight.dtype), weight).to(out.dtype)
    return merged, torch.logaddexp(lse, part_lse)


def _sum_passes(inputs, passes, out, lse, grad_out, grad_lse, wanted) -> list[Tensor | None]:
    """The five gradients, each the sum of what the passes give, in float32 or float64."""
    want_q, want_keys, want_prefix = wanted[0], any(wanted[1:3]), any(wanted[3:5])
    tensors = (inputs.q, inputs.k, inputs.v, inputs.prefix_k, inputs.prefix_v)
    dtype = torch.promote_types(inputs.q.dtype, torch.float32)
    grads = [
        empty_token_major(tensor, tuple(tensor.shape), dtype).zero_() if needed else None
        for tensor, needed in zip(tensors, wanted, strict=True)
    ]
    heads, q_len = inputs.q.shape[1:3]
    for one in passes if inputs.q.numel() else ():
        if not (want_q or (want_keys if one.prefix is None else want_prefix)):
            continue
        take = one.queries.take
        dq, dk, dv = attend_backward(
            take(grad_out), None if grad_lse is None else take(grad_lse), take(inputs.q), *_columns_of(inputs, one),
            take(out), take(lse), one.mask, one.causal, inputs.scale,
        )  # fmt: skip
        _add(grads[0], (one.queries.rows, slice(None), one.queries.positions), one.queries.unfold(dq, heads, q_len))
        first = 1 if one.prefix is None else 3
        rows = None if one.prefix is None else slice(one.prefix, one.prefix + 1)
        _add(grads[first], (rows, slice(None), one.columns), dk)
        _add(grads[first + 1], (rows, slice(None), one.columns), dv)
    return grads


def _add(total: Tensor | None, index: tuple, value: Tensor) -> None:
    """total[index] += value, where a total is wanted; no index repeats."""
    if total is not None:
        total[tuple(slice(None) if part is None else part for part in index)] += value
