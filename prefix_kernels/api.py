"""The public calls: prefix_attention (a batch of rows) and prefix_attention_varlen (packed sequences).

    out = softmax(scale · q · [prefix_k ; k]ᵀ + mask) · [prefix_v ; v]        (Li & Liang 2021, equation 3)

from one copy of the prefix, which has no batch axis and is never concatenated with the keys.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from prefix_kernels import ops, repeated, select, validate
from prefix_kernels.problem import AttentionInputs, AttentionProblem


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *, causal: bool = True,
    scale: float | None = None, key_mask: Tensor | None = None, key_lens: Tensor | None = None,
    window: int | None = None, softcap: float | None = None, bias: Tensor | None = None,
    prefix_ids: Tensor | None = None, prefix_lens: Tensor | None = None, first_key_position: int | None = None,
    backend: str | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of a batch of rows over a shared prefix and each row's own keys. Differentiable in q, k, v and the prefix, once
    and by torch.autograd: neither forward-mode nor torch.func.grad.

    All tensors are on one device. Index tensors are int32 or int64. Their values are checked on the CPU; on CUDA, and where a
    call is traced (torch.compile), they are not read: ids out of range count as −1, lengths are clamped. Under torch.autocast
    q, k and v take its dtype. The same call on the same device, with the same number of threads, gives the same bits.

    Args:
        q: [batch, heads, q_len, head_dim], float16, bfloat16, float32 or float64.
        k: [batch, kv_heads, kv_len, head_dim], q's dtype; kv_heads divides heads.
        v: [batch, kv_heads, kv_len, value_dim], q's dtype.
        prefix_k: [kv_heads, prefix_len, head_dim] shared by all rows, or a bank [prefixes, kv_heads, prefix_len, head_dim]
            with prefix_ids. q's dtype, or float32 beside 16-bit q: its gradient is then float32, summed over the batch in
            float32.
        prefix_v: as prefix_k, with v's value_dim.
        causal: with n = key_lens[b] (else kv_len), query i stands at position i + n − q_len and sees keys up to it. Queries
            at negative positions see the prefix alone. The prefix is visible to every query. Needs q_len ≤ kv_len.
        scale: factor of the scores; default head_dim ** −0.5.
        key_mask: bool [batch, kv_len], True where a key may be attended, in any pattern. Hides keys, never shifts positions.
        key_lens: int [batch]: only the first key_lens[b] keys exist (a preallocated cache with its fill). What lies past
            them may be NaN.
        window: 1 to 2^31 − 1. causal: the query at position t sees keys t − window < j ≤ t; else |i − j| < window. The prefix
            stays visible.
        softcap: c > 0: scores become c · tanh(score / c), prefix columns included.
        bias: broadcastable to [batch, heads, q_len, prefix_len + kv_len], float32 or q's dtype, added after the softcap; −inf
            hides. It gets no gradient: one that requires it is a ValueError. Refused by cuda.
        prefix_ids: int [batch], the prefix of each row, −1 for none. Only and always with a bank.
        prefix_lens: int [prefixes], the valid length of each prefix of a bank. What lies past it may be NaN.
        first_key_position: f, 0 to 2^31 − 1: key j stands at position L + f + j behind its row's prefix of length L, and the
            window slides over the prefix too; a query at a negative position still sees the columns ahead of it. None pins the
            prefix; without a window it makes no difference.
        backend: one of cpu, cuda, triton, sdpa and reference, which then runs or raises; None picks one for the call, by
            PREFIX_KERNELS_BACKEND where that is set.
        return_lse: also return the log-sum-exp of each query's scores.

    Returns:
        out [batch, heads, q_len, value_dim] in q's dtype; with return_lse also lse [batch, heads, q_len], natural logarithm,
        float32 (float64 for float64), differentiable. A query that sees nothing has out 0 and lse −inf.

    Raises:
        ValueError, TypeError: a wrong argument. NotImplementedError: the backend asked for cannot serve the call, or no
        backend can (forward-mode differentiation, torch.func.grad and vjp).
    """
    kind = None
    if return_lse is False and key_lens is None and prefix_ids is None and prefix_lens is None:
        kind, kernel = repeated.find(
            q, k, v, prefix_k, prefix_v, key_mask, bias, causal, scale, window, softcap, first_key_position, backend
        )
        if kernel is not None:
            return kernel(q, k, v, prefix_k, prefix_v, key_mask, bias)
    inputs = _dense_inputs(
        q, k, v, prefix_k, prefix_v, causal=causal, scale=scale, key_mask=key_mask, key_lens=key_lens, window=window,
        softcap=softcap, bias=bias, prefix_ids=prefix_ids, prefix_lens=prefix_lens, first_key_position=first_key_position,
    )  # fmt: skip
    result = _run(inputs, backend, return_lse)
    if kind is not None and (bias is None or bias.shape == inputs.bias.shape):  # a kernel reads it as it was given
        repeated.remember(kind, inputs, backend)
    return result


def prefix_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool = True, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, prefix_ids: Tensor | None = None, prefix_lens: Tensor | None = None,
    parent: Tensor | None = None, backend: str | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of packed sequences, each over its prefix and its own keys only. Differentiable as prefix_attention is.

    Args:
        q: [tokens, heads, head_dim]; k, v: [tokens, kv_heads, head_dim or value_dim], where k and v may have other tokens than
            q. prefix_k, prefix_v and dtypes as for prefix_attention.
        cu_seqlens_q, cu_seqlens_k: int [sequences + 1], from 0, never falling, ending at the token count.
        max_seqlen_q, max_seqlen_k: upper bounds of the sequences' lengths; one that is too small is a ValueError on the CPU.
        causal, scale, window, softcap: as prefix_attention, in each sequence (q_len ≤ kv_len in each where causal).
        prefix_ids: int [sequences], with a bank; prefix_lens: int [prefixes].
        parent: int [sequences], −1 or an earlier sequence whose keys this one sees wholly besides its own: one source
            encoded once for several targets. One level; child and parent share their prefix id; not with a window.
        backend, return_lse: as prefix_attention.

    Returns:
        out [tokens, heads, value_dim]; with return_lse also lse [heads, tokens].

    Raises:
        ValueError, TypeError: a wrong argument. NotImplementedError: the backend asked for cannot serve the call.
    """
    inputs = _varlen_inputs(
        q, k, v, prefix_k, prefix_v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, causal=causal, scale=scale, window=window, softcap=softcap, prefix_ids=prefix_ids,
        prefix_lens=prefix_lens, parent=parent,
    )  # fmt: skip
    return _run(inputs, backend, return_lse)


def explain_backends(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *, backend: str | None = None, **options: Any
) -> dict[str, str]:
    """What prefix_attention (or, with cu_seqlens_q, prefix_attention_varlen) would run for these arguments, and why.

    Args:
        q, k, v, prefix_k, prefix_v, backend: as for the call.
        options: any further keyword argument of the call.

    Returns:
        Of each backend "chosen", "not chosen: …" or "refused: …". Nothing is computed.

    Raises:
        ValueError, TypeError: a wrong argument, as from the call.
    """
    return select.explain(_problem(q, k, v, prefix_k, prefix_v, backend, options), backend)


def workspace_bytes(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *, backend: str | None = None, **options: Any
) -> dict[str, int]:
    """How much memory the chosen backend takes for these arguments, besides the tensors that go in and come out.

    Args: as for explain_backends.

    Returns:
        {"forward": bytes, "backward": bytes}, upper bounds. Copies of tensors whose last stride is not 1 are not counted, nor
        that of a bias in which the columns of the prefix or of the keys begin at no multiple of 16 bytes ("triton").

    Raises:
        As prefix_attention. Nothing is computed.
    """
    return select.workspace_bytes(_problem(q, k, v, prefix_k, prefix_v, backend, options), backend)


def _problem(q, k, v, prefix_k, prefix_v, backend: str | None, options: dict[str, Any]) -> AttentionProblem:
    """What a call with these arguments would be, checked as the call checks them."""
    validate.check_call(backend, options.pop("return_lse", False))
    packed = options.get("cu_seqlens_q") is not None
    inspect.signature(prefix_attention_varlen if packed else prefix_attention).bind(q, k, v, prefix_k, prefix_v, **options)
    build = _varlen_inputs if packed else _dense_inputs
    return build(q, k, v, prefix_k, prefix_v, **options).problem()


def _dense_inputs(
    q, k, v, prefix_k, prefix_v, *, causal=True, scale=None, key_mask=None, key_lens=None, window=None, softcap=None,
    bias=None, prefix_ids=None, prefix_lens=None, first_key_position=None,
) -> AttentionInputs:  # fmt: skip
    q, k, v = _autocast(q, k, v)
    validate.check_tensors(q, k, v, prefix_k, prefix_v, varlen=False)
    scale, window, softcap, first_key_position = validate.check_options(causal, scale, window, softcap, first_key_position)
    batch, _, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    if causal and q_len > kv_len:
        raise ValueError(f"q: expected q_len <= kv_len in causal attention, got q_len {q_len} and kv_len {kv_len}")
    validate.check_key_mask(key_mask, batch, kv_len, q.device)
    validate.check_index("key_lens", key_lens, batch, "batch", q.device)
    validate.check_range("key_lens", key_lens, 0, kv_len)
    validate.check_bias(bias, q, prefix_k.shape[-2] + kv_len)
    validate.check_prefix_index(prefix_k, prefix_ids, prefix_lens, batch, "batch")
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
        bias = bias.expand(*bias.shape[:3], prefix_k.shape[-2] + kv_len)
    return AttentionInputs(
        q, k, v, _bank(prefix_k), _bank(prefix_v), key_mask, key_lens, bias, prefix_ids, prefix_lens, None, None, None,
        causal, _float(scale, head_dim**-0.5), window, _float(softcap), first_key_position, None, None,
    )  # fmt: skip


def _varlen_inputs(
    q, k, v, prefix_k, prefix_v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=True, scale=None,
    window=None, softcap=None, prefix_ids=None, prefix_lens=None, parent=None,
) -> AttentionInputs:  # fmt: skip
    q, k, v = _autocast(q, k, v)
    validate.check_tensors(q, k, v, prefix_k, prefix_v, varlen=True)
    scale, window, softcap, _ = validate.check_options(causal, scale, window, softcap, None)
    max_seqlen_q = validate.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[0], "max_seqlen_q", max_seqlen_q, q.device)
    max_seqlen_k = validate.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[0], "max_seqlen_k", max_seqlen_k, q.device)
    sequences = cu_seqlens_q.shape[0] - 1
    if cu_seqlens_k.shape[0] != sequences + 1:
        raise ValueError(
            f"cu_seqlens_k: expected shape [{sequences + 1}] as cu_seqlens_q, got {validate.shape_of(cu_seqlens_k)}"
        )
    if causal:
        validate.check_causal_lengths(cu_seqlens_q, cu_seqlens_k)
    validate.check_prefix_index(prefix_k, prefix_ids, prefix_lens, sequences, "sequences")
    validate.check_parent(parent, prefix_ids, sequences, window, q.device)
    return AttentionInputs(
        q, k, v, _bank(prefix_k), _bank(prefix_v), None, None, None, prefix_ids, prefix_lens, cu_seqlens_q, cu_seqlens_k,
        parent, causal, _float(scale, q.shape[-1] ** -0.5), window, _float(softcap), None, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip


def _float(value: float | None, default: float | None = None) -> float | None:
    """An int becomes a float: Triton would compile it in, and 1 and 1.0 are one key of a dictionary."""
    return default if value is None else float(value)


def _bank(prefix: Tensor) -> Tensor:
    return prefix.unsqueeze(0) if prefix.dim() == 3 else prefix


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under torch.autocast q, k and v take its dtype, as torch's own attention does; the prefix keeps float32."""
    device = q.device.type if isinstance(q, Tensor) else "cpu"
    if not ops.autocasts(device):
        return q, k, v
    dtype, floats = torch.get_autocast_dtype(device), (torch.float16, torch.bfloat16, torch.float32)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in floats else t for t in (q, k, v))


def _run(inputs: AttentionInputs, backend: str | None, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    validate.check_call(backend, return_lse)
    if backend is not None:
        select.requested_backend(backend)
    out, lse = ops.run(inputs, backend, return_lse)
    return (out, lse) if return_lse else out
