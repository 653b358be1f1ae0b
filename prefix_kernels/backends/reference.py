"""The specification: eager attention over the concatenation, every option, any dtype.

    scores  = scale · q · [prefix_k ; k]ᵀ → softcap → + bias → −inf where hidden
    lse     = log Σ exp(scores)                weights = softmax(scores), 0 where nothing is visible
    out     = weights · [prefix_v ; v]
    dscores = weights ∘ (dout · valuesᵀ − rowsum(dout ∘ out) + dlse)

16-bit inputs are computed in float32, float64 in float64. Memory is quadratic and the prefix is copied per row: this
backend says what is right, the others are fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefix_kernels.problem import AttentionInputs, AttentionProblem


def why_not(problem: AttentionProblem) -> str | None:
    """None: it serves everything."""
    return None


def workspace_bytes(problem: AttentionProblem) -> tuple[int, int]:
    """Most bytes that the forward and the backward pass take besides what goes in and comes out: quadratic, and P per row."""
    size = 8 if problem.dtype == torch.float64 else 4
    rows = 1 if problem.varlen else problem.batch  # packed sequences are computed one by one
    kv_len = 2 * problem.kv_len if problem.has_parent else problem.kv_len
    columns = problem.prefix_len + kv_len
    scores = rows * problem.heads * problem.q_len * columns
    concatenated = rows * problem.kv_heads * columns * (problem.head_dim + problem.value_dim)
    queries = (
        problem.query_values() if not problem.varlen else problem.heads * problem.q_len * (problem.head_dim + problem.value_dim)
    )
    forward = size * (5 * scores + 4 * concatenated + 2 * queries) + 4 * rows * problem.q_len * columns
    gradients = problem.query_values() + problem.key_values() + problem.prefix_values() if problem.varlen else 0
    return forward, forward + size * (3 * scores + 3 * concatenated + 3 * queries + problem.prefix_values() + gradients)


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """(out, lse) of one call."""
    if not inputs.varlen:
        return _dense_forward(inputs)
    out = inputs.q.new_zeros(*inputs.q.shape[:2], inputs.v.shape[-1])
    lse = inputs.q.new_zeros(inputs.q.shape[1], inputs.q.shape[0], dtype=_compute_dtype(inputs))
    for queries, keys, row in _sequences(inputs):
        row_out, row_lse = _dense_forward(_one_sequence(inputs, queries, keys, row))
        out[queries], lse[:, queries] = row_out[0].transpose(0, 1), row_lse[0]
    return out, lse


def backward(
    inputs: AttentionInputs, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, wanted: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, prefix_k, prefix_v. All five are computed: this is the specification, not the fast path."""
    if not inputs.varlen:
        grads = _dense_backward(inputs, out, lse, grad_out, grad_lse)
    else:
        grads = [torch.zeros_like(tensor, dtype=_compute_dtype(inputs)) for tensor in inputs.tensors]
        for queries, keys, row in _sequences(inputs):
            sequence = _one_sequence(inputs, queries, keys, row)
            row_grads = _dense_backward(
                sequence,
                out[queries].transpose(0, 1)[None],
                lse[None, :, queries],
                grad_out[queries].transpose(0, 1)[None],
                None if grad_lse is None else grad_lse[None, :, queries],
            )
            grads[0][queries] = row_grads[0][0].transpose(0, 1)
            for index in (1, 2):
                grads[index].index_add_(0, keys, row_grads[index][0].transpose(0, 1))
            for index in (3, 4):
                grads[index] += row_grads[index]
    dtypes = (inputs.q.dtype,) * 3 + (inputs.prefix_k.dtype,) * 2
    return tuple(grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))


def _compute_dtype(inputs: AttentionInputs) -> torch.dtype:
    return torch.float64 if inputs.q.dtype == torch.float64 else torch.float32


def _sequences(inputs: AttentionInputs):
    """(query indices, key indices — the parent's first —, sequence index) of every packed sequence."""

    def indices(*places: slice) -> Tensor:
        return torch.cat([torch.arange(place.start, place.stop, device=inputs.q.device) for place in places])

    for row, (queries, keys, parent_keys) in enumerate(inputs.sequences()):
        yield indices(queries), indices(*([] if parent_keys is None else [parent_keys]), keys), row


def _one_sequence(inputs: AttentionInputs, queries: Tensor, keys: Tensor, row: int) -> AttentionInputs:
    """Sequence `row` as a dense batch of one. A causal child sees its parent wholly: the parent's keys come first."""
    ids = inputs.prefix_ids
    return inputs._replace(
        q=inputs.q[queries].transpose(0, 1)[None],
        k=inputs.k[keys].transpose(0, 1)[None],
        v=inputs.v[keys].transpose(0, 1)[None],
        prefix_ids=None if ids is None else ids[row : row + 1],
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        parent=None,
    )


def _row_prefixes(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """The bank's prefix of each row [batch] (0 where there is none) and each row's prefix length [batch] (0 there)."""
    batch, (prefixes, _, prefix_len, _) = inputs.q.shape[0], inputs.prefix_k.shape
    device = inputs.q.device
    if inputs.prefix_ids is None:
        return torch.zeros(batch, dtype=torch.int64, device=device), torch.full((batch,), prefix_len, device=device)
    ids = inputs.prefix_ids.long()
    has_prefix = (ids >= 0) & (ids < prefixes)
    ids = torch.where(has_prefix, ids, 0)
    if inputs.prefix_lens is None:
        lens = torch.full_like(ids, prefix_len)
    else:
        lens = inputs.prefix_lens.long()[ids].clamp(0, prefix_len)
    return ids, torch.where(has_prefix, lens, 0)


def visible_columns(inputs: AttentionInputs) -> Tensor:
    """Bool [batch, q_len, prefix_len + kv_len]: which columns of [prefix ; keys] each query may attend to."""
    (batch, _, q_len, _), kv_len, prefix_len = inputs.q.shape, inputs.k.shape[2], inputs.prefix_k.shape[2]
    device = inputs.q.device
    _, row_prefix_len = _row_prefixes(inputs)
    fill = torch.full((batch,), kv_len, device=device)
    if inputs.key_lens is not None:
        fill = inputs.key_lens.long().clamp(0, kv_len)
    query = torch.arange(q_len, device=device)[None, :, None]  # raw index [1, q_len, 1]
    key = torch.arange(kv_len, device=device)[None, None, :]  # [1, 1, kv_len]
    column = torch.arange(prefix_len, device=device)[None, None, :]  # [1, 1, prefix_len]
    position = query + fill[:, None, None] - q_len if inputs.causal else query  # [batch or 1, q_len, 1]
    keys = key < fill[:, None, None]
    if inputs.key_mask is not None:
        keys = keys & inputs.key_mask[:, None, :]
    if inputs.causal:
        keys = keys & (key <= position)
    if inputs.window is not None:
        keys = keys & (key > position - inputs.window)
        if not inputs.causal:
            keys = keys & (key < position + inputs.window)
    prefix = column < row_prefix_len[:, None, None]
    if inputs.window is not None and inputs.first_key_position is not None:
        position = row_prefix_len[:, None, None] + inputs.first_key_position + position
        prefix = prefix & (column > position - inputs.window)
    return torch.cat([prefix.expand(batch, q_len, prefix_len), keys.expand(batch, q_len, kv_len)], dim=2)


def _columns(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """[prefix ; keys] and [prefix ; values] per row, in the compute dtype; what does not exist is 0, so NaN cannot leak."""
    dtype = _compute_dtype(inputs)
    ids, row_prefix_len = _row_prefixes(inputs)
    no_prefix = torch.arange(inputs.prefix_k.shape[2], device=ids.device) >= row_prefix_len[:, None]
    sides = []
    for prefix, own in ((inputs.prefix_k, inputs.k), (inputs.prefix_v, inputs.v)):
        prefix = prefix.to(inputs.q.dtype)[ids].masked_fill(no_prefix[:, None, :, None], 0)
        if inputs.key_lens is not None:
            no_key = torch.arange(own.shape[2], device=ids.device) >= inputs.key_lens[:, None]
            own = own.masked_fill(no_key[:, None, :, None], 0)
        sides.append(torch.cat([prefix, own], dim=2).to(dtype))
    return sides[0], sides[1]


def _scores(inputs: AttentionInputs, columns: Tensor) -> tuple[Tensor, Tensor | None]:
    """Masked scores [batch, kv_heads, group, q_len, columns] and, with a softcap, its derivative."""
    batch, heads, q_len, head_dim = inputs.q.shape
    kv_heads = columns.shape[1]
    q = inputs.q.to(columns.dtype).reshape(batch, kv_heads, heads // kv_heads, q_len, head_dim)
    scores = torch.einsum("bhgqd,bhkd->bhgqk", q, columns) * inputs.scale
    slope = None
    if inputs.softcap is not None:
        capped = torch.tanh(scores / inputs.softcap)
        scores, slope = inputs.softcap * capped, 1 - capped.square()
    if inputs.bias is not None:
        bias = inputs.bias.to(scores.dtype).expand(-1, heads, -1, -1)
        scores = scores + bias.unflatten(1, (kv_heads, heads // kv_heads))
    return scores.masked_fill(~visible_columns(inputs)[:, None, None], -torch.inf), slope


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """The softmax, and 0 for queries that see nothing (lse −inf). exp(scores − lse) would lose all digits of a large lse."""
    hidden = (lse == -torch.inf)[..., None]
    return torch.softmax(scores.masked_fill(hidden, 0.0), dim=-1).masked_fill(hidden, 0.0)


def _dense_forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    keys, values = _columns(inputs)
    scores, _ = _scores(inputs, keys)
    if scores.shape[-1] == 0:
        return inputs.q.new_zeros(*inputs.q.shape[:3], values.shape[-1]), scores.new_full(inputs.q.shape[:3], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    out = torch.einsum("bhgqk,bhkd->bhgqd", _weights(scores, lse), values)
    return out.flatten(1, 2).to(inputs.q.dtype), lse.flatten(1, 2)


def _dense_backward(
    inputs: AttentionInputs, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, ...]:
    keys, values = _columns(inputs)
    kv_heads, dtype = keys.shape[1], keys.dtype
    scores, slope = _scores(inputs, keys)

    def group(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).unflatten(1, (kv_heads, -1))

    q, grad_out = group(inputs.q), group(grad_out)
    weights = _weights(scores, group(lse))
    delta = (grad_out * group(out)).sum(-1)
    if grad_lse is not None:
        delta = delta - group(torch.where(lse == -torch.inf, 0.0, grad_lse))
    dscores = weights * (torch.einsum("bhgqd,bhkd->bhgqk", grad_out, values) - delta[..., None])
    if slope is not None:
        dscores = dscores * slope
    dq = torch.einsum("bhgqk,bhkd->bhgqd", dscores, keys).flatten(1, 2) * inputs.scale
    dkeys = torch.einsum("bhgqk,bhgqd->bhkd", dscores, q) * inputs.scale
    dvalues = torch.einsum("bhgqk,bhgqd->bhkd", weights, grad_out)
    prefix_len = inputs.prefix_k.shape[2]
    ids, _ = _row_prefixes(inputs)
    of_prefix = torch.nn.functional.one_hot(ids, max(inputs.prefix_k.shape[0], 1)).to(dtype)  # rows without one add 0
    dprefix = [torch.einsum("bn,bhpd->nhpd", of_prefix, side[:, :, :prefix_len]) for side in (dkeys, dvalues)]
    return dq, dkeys[:, :, prefix_len:], dvalues[:, :, prefix_len:], *dprefix
