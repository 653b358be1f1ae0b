"""Stock torch kernels, put together exactly: a pass over the prefix, passes over the sequence, merged by log-sum-exp.

    lse = log(exp(lse₁) + exp(lse₂))        out = out₁ + (out₂ − out₁) · sigmoid(lse₂ − lse₁)

Backward: each pass runs the stock backward kernel with the global out and lse, so its weights are the global ones; the
dq of the passes add up, and dprefix arrives summed over the batch where the batch was folded into query rows.
16-bit inputs on the CPU: the backward pass runs in float32, since that kernel adds up dk and dv in the inputs' dtype.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from prefix_kernels.backends.sdpa.composed import SCORES
from prefix_kernels.backends.sdpa.passes import Pass, expands_masked_prefix, expands_prefix, plan
from prefix_kernels.backends.sdpa.stock import attend, attend_backward, composes
from prefix_kernels.problem import AttentionInputs, AttentionProblem, empty_token_major

KERNEL_SCRATCH = 2**20  # bytes a thread: torch's CPU kernel keeps a block of scores and one of outputs


def why_not(problem: AttentionProblem) -> str | None:
    """Why this backend refuses a problem, or None."""
    if problem.softcap is not None:
        return "torch's kernels know no softcap"
    if problem.device == "cuda" and (problem.has_prefix_ids or problem.varlen):
        return "a bank or packed sequences would need index values on the host"
    return None


def workspace_bytes(problem: AttentionProblem) -> tuple[int, int]:
    """Most bytes that the forward and the backward pass take besides what goes in and comes out.

    What torch's kernels take themselves is counted as measured on the CPU; on other devices it was not measured.
    """
    composed = composes(torch.device(problem.device), problem.dtype)
    size, wide = problem.dtype.itemsize, max(4, problem.dtype.itemsize)
    queries, keys, prefix = problem.query_values(), problem.key_values(), problem.prefix_values()
    lse = wide * problem.q_tokens * problem.heads
    scratch = torch.get_num_threads() * KERNEL_SCRATCH * (1 + problem.value_dim // 128)
    masks = 0
    if problem.window or problem.has_key_mask or problem.has_key_lens or problem.has_bias or problem.varlen:
        rows = problem.batch if problem.has_key_mask or problem.has_key_lens or problem.has_bias else 1
        masks = 4 * wide * rows * problem.q_len * problem.kv_len
    masks_prefix, group = problem.has_bias or problem.first_key_position is not None, problem.heads // problem.kv_heads
    if masks_prefix:
        heads = problem.heads if problem.has_bias else 1
        masks += 4 * wide * problem.batch * heads * problem.q_len * problem.prefix_len
    padded = 0
    if problem.head_dim != problem.value_dim:  # the kernels want one for both
        dims, larger = problem.head_dim + problem.value_dim, 2 * max(problem.head_dim, problem.value_dim)
        queries, keys, prefix = (values * larger // dims for values in (queries, keys, prefix))
        padded = (queries + keys + prefix) // 2
    if problem.device == "cpu" and problem.dtype == torch.bfloat16:  # matrix units get keys and values in an order of their own
        scratch += size * max(keys, prefix)
    copies = size * (keys if problem.has_key_lens else 0) + (size * prefix if problem.prefix_dtype != problem.dtype else 0)
    if masks_prefix and problem.device == "cuda" and not composed:  # the memory-efficient kernel wants it by head
        copies += wide * prefix * group
    forward = (size + 2 * wide) * queries + 6 * lse + masks + copies + size * padded + scratch
    backward = 5 * wide * queries + 4 * wide * (keys + prefix) + 6 * lse + masks + copies + wide * padded + scratch
    if composed:
        rows, columns = problem.q_tokens * problem.heads, max(problem.kv_len, problem.prefix_len)
        scores = wide * min(rows * columns, max(SCORES, problem.batch * problem.heads * columns))
        return forward + wide * (keys + prefix) + scores, backward + 2 * scores
    splits_keys = problem.dtype.itemsize == 2
    heads = problem.heads if splits_keys else problem.kv_heads
    if masks_prefix and expands_masked_prefix(problem.q_len, problem.prefix_len):
        backward += wide * problem.batch * prefix * (1 + 2 * group)
    elif problem.device == "cuda" and expands_prefix(heads, problem.q_len, problem.prefix_len, splits_keys):
        # A row's dprefix, by head; the memory-efficient kernel wants the prefix by head, too.
        backward += size * problem.batch * prefix * (1 + group * (1 if splits_keys else 2))
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
    elif dense.q.device.type != "cpu" and not composes(dense.q.device, dense.q.dtype):
        # As out lies; folding one that lies otherwise would copy it once more.
        grad_out = grad_out.transpose(1, 2).contiguous().transpose(1, 2)
    if not _all_see_something(dense):
        nothing_visible = lse == -torch.inf
        lse = lse.masked_fill(nothing_visible, torch.inf)  # exp(scores − inf) = 0: no weight, no gradient
        if grad_lse is not None:
            grad_lse = grad_lse.masked_fill(nothing_visible, 0)
    dense, passes = plan(dense, backward=True)
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


def _all_see_something(inputs: AttentionInputs) -> bool:
    """Whether the options alone promise every query a column."""
    if inputs.bias is not None:
        return False
    slides = inputs.window is not None and inputs.first_key_position is not None
    if inputs.prefix_k.shape[2] and inputs.prefix_ids is None and not slides:
        return True
    hides = (inputs.key_mask, inputs.key_lens, inputs.window, inputs.cu_seqlens_q)
    q_len, kv_len = inputs.q.shape[-2], inputs.k.shape[-2]
    return all(option is None for option in hides) and kv_len >= (q_len if inputs.causal else 1)


def _columns_of(inputs: AttentionInputs, one: Pass) -> tuple[Tensor, Tensor]:
    """The keys and values that a pass reads, as views: of each row of the batch, or one for all rows."""
    if one.prefix is None:
        return inputs.k[:, :, one.columns], inputs.v[:, :, one.columns]
    return inputs.prefix_k[one.prefix, None, :, one.columns], inputs.prefix_v[one.prefix, None, :, one.columns]


def _merge_passes(inputs: AttentionInputs, passes: list[Pass]) -> tuple[Tensor, Tensor]:
    heads, q_len = inputs.q.shape[1:3]
    out = lse = None
    eager = inputs.q.device.type == "cpu" or composes(inputs.q.device, inputs.q.dtype)
    merge = _merge if eager or torch.cuda.get_device_capability(inputs.q.device) < (8, 0) else _merge_kernel() or _merge
    for one in passes if inputs.q.numel() else ():
        q = one.queries.take(inputs.q)
        part, part_lse = attend(q, *_columns_of(inputs, one), one.mask, one.causal, inputs.scale)
        part, part_lse = (one.queries.unfold(tensor, heads, q_len) for tensor in (part, part_lse))
        if one.hidden is not None:
            part_lse = part_lse.masked_fill(one.hidden, -torch.inf)
            part = part.masked_fill(one.hidden[..., None], 0)
        if out is None and one.queries.everything:
            out, lse = part, part_lse
            continue
        if out is None:
            out, lse = _nothing(inputs)
        merged = merge(one.queries.select(out), one.queries.select(lse), part, part_lse)
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


@functools.cache
def _merge_kernel() -> Callable | None:
    """_merge as one kernel where Triton is installed, for GPUs that it compiles for."""
    if importlib.util.find_spec("triton") is None:
        return None
    from prefix_kernels.backends.sdpa.merge import merge

    return merge


def _sum_passes(inputs, passes, out, lse, grad_out, grad_lse, wanted) -> list[Tensor | None]:
    """The five gradients, each the sum of what the passes give."""
    want_q, want_keys, want_prefix = wanted[0], any(wanted[1:3]), any(wanted[3:5])
    sums = [_Sum(tensor) if needed else None for tensor, needed in zip(inputs.tensors, wanted, strict=True)]
    heads, q_len = inputs.q.shape[1:3]
    for one in passes if inputs.q.numel() else ():
        if not (want_q or (want_keys if one.prefix is None else want_prefix)):
            continue
        take = one.queries.take
        q = take(inputs.q)
        dq, dk, dv = attend_backward(
            take(grad_out), None if grad_lse is None else take(grad_lse), q, *_columns_of(inputs, one),
            take(out), take(lse), one.mask, one.causal, inputs.scale,
        )  # fmt: skip
        queries = (one.queries.rows, slice(None), one.queries.positions)
        first, rows = 1, None
        if one.prefix is not None:
            first, rows = 3, slice(one.prefix, one.prefix + 1)
            if dk.shape[0] > 1:  # expanded over the batch
                dtype = torch.promote_types(dk.dtype, torch.float32)
                dk, dv = (grad.sum(0, keepdim=True, dtype=dtype) for grad in (dk, dv))
        keys = (rows, slice(None), one.columns)
        values = (one.queries.unfold(dq, heads, q_len), dk, dv)
        for total, index, value in zip((sums[0], *sums[first : first + 2]), (queries, keys, keys), values, strict=True):
            if total is not None:
                total.add(index, value)
    return [None if total is None else total.result() for total in sums]


class _Sum:
    """A gradient as the sum of parts. One or two parts are taken as they are, more are added up in float32 or float64."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.parts: list[tuple[tuple, Tensor]] = []
        self.total: Tensor | None = None

    def add(self, index: tuple, value: Tensor) -> None:
        """gradient[index] += value, None for a whole axis; no index repeats."""
        self.parts.append((index, value))
        if self.total is not None or len(self.parts) > 2:
            self._add_up()

    def result(self) -> Tensor:
        """The gradient."""
        whole = all(value.shape == self.tensor.shape for _, value in self.parts)
        if self.total is None and self.parts and whole:
            value = self.parts[0][1]
            return value if len(self.parts) == 1 else value.add_(self.parts[1][1])
        if self.total is None and self._side_by_side():
            total = empty_token_major(self.tensor, tuple(self.tensor.shape), self.parts[0][1].dtype)
            for (_, _, columns), value in self.parts:
                total[:, :, columns] = value
            return total
        self._add_up()
        return self.total

    def _side_by_side(self) -> bool:
        """Whether two parts are all columns before one column and all from it on."""
        if len(self.parts) != 2 or any(rows is not None or not isinstance(s, slice) for (rows, _, s), _ in self.parts):
            return False
        (_, _, left), (_, _, right) = (index for index, _ in self.parts)
        return (left.start, left.stop, right.stop) == (0, right.start, self.tensor.shape[2])

    def _add_up(self) -> None:
        if self.total is None:
            dtype = torch.promote_types(self.tensor.dtype, torch.float32)
            self.total = empty_token_major(self.tensor, tuple(self.tensor.shape), dtype).zero_()
        for index, value in self.parts:
            self.total[tuple(slice(None) if part is None else part for part in index)] += value
        self.parts.clear()
