"""The CUDA branch of a backend on a machine without CUDA.

Inside `EmulatedCuda` every tensor says that it lies on cuda, factories that are asked for cuda memory give CPU memory, and
the six CUDA-only attention operators are computed here by what they document and check (flash_api.cpp, MHA.cpp, attention.cu,
attention_backward.cu and the headers of the memory-efficient kernel in torch). Reading a value back is an error, as
are arguments that the kernels reject, or read wrongly without a word.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique", "numpy", "cpu")


class EmulatedCuda(TorchFunctionMode):
    """Records in `calls` the arguments of every emulated call, its `operator` and its `result`.

    Args:
        device: another one that has no attention kernels, whose values may be read.
    """

    def __init__(self, device: torch.device = CUDA):
        super().__init__()
        self.device = device
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return self.device
        name = getattr(func, "__name__", "")
        assert self.device != CUDA or name not in READS, f"{name} reads a value back from the device"
        assert not name.endswith("_for_cpu") and not name.endswith("_for_cpu_backward"), f"{name} on cuda"
        if kwargs.get("device") is not None:
            assert torch.device(kwargs["device"]).type == self.device.type, f"{name} makes a tensor on {kwargs['device']}"
            kwargs["device"] = "cpu"
        if func not in OPERATORS:
            return func(*args, **kwargs)
        call = _by_name(func, args, kwargs)
        self.calls.append(call)
        call.result = OPERATORS[func](call)
        return call.result


def _by_name(packet, args, kwargs) -> SimpleNamespace:
    arguments = packet.default._schema.arguments
    names = [argument.name for argument in arguments]
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    given = dict(zip(names, args, strict=False)) | kwargs
    assert set(defaults | given) == set(names), f"{packet}: {sorted(given)} given"
    return SimpleNamespace(operator=packet.__name__, args=args, kwargs=kwargs, **defaults | given)


def _aligned(tensor: Tensor, name: str) -> None:
    """Rows are read in steps of 16 bytes."""
    assert tensor.stride(-1) == 1, f"{name}: last stride {tensor.stride(-1)}"
    for step in (tensor.storage_offset(), *tensor.stride()[:-1]):
        assert step * tensor.element_size() % 16 == 0, f"{name}: strides {tensor.stride()}, offset {tensor.storage_offset()}"


def _check_common(q, k, v, dropout_p):
    assert q.dim() == k.dim() == v.dim() == 4 and q.dtype == k.dtype == v.dtype and dropout_p == 0
    assert all(q.shape) and all(k.shape) and all(v.shape), "the kernels are not called for nothing"
    assert q.shape[0] == k.shape[0] == v.shape[0]
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _aligned(tensor, name)


def _scores(q, k, mask, shift, scale):
    """Float32 scores [batch, heads, q_len, n]; with `shift`, query i sees keys j ≤ i + shift."""
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask.float()
    if shift is not None:
        columns, rows = torch.arange(k.shape[2]), torch.arange(q.shape[2])
        scores = scores.masked_fill(columns > rows[:, None] + shift, -torch.inf)
    return scores


def _forward(q, k, v, mask, shift, scale):
    scores = _scores(q, k, mask, shift, scale)
    largest = scores.max(-1, keepdim=True).values
    weights = torch.exp(scores - largest.clamp(min=-1e30))
    total = weights.sum(-1, keepdim=True)
    out = weights.to(v.dtype).float() @ v.float() / total  # fully masked rows: NaN, nobody may read them
    return out.to(q.dtype), (largest + total.log())[..., 0]


def _backward(grad_out, q, k, v, out, lse, mask, shift, scale):
    """(dq, dk, dv), the latter per query head, in q's dtype."""
    weights = torch.exp(_scores(q, k, mask, shift, scale) - lse[..., None])
    grad_out, dtype = grad_out.float(), q.dtype
    delta = (grad_out * out.float()).sum(-1, keepdim=True)
    dscores = (weights * (grad_out @ v.float().transpose(-1, -2) - delta)).to(dtype).float()
    dq, dk = dscores @ k.float() * scale, dscores.transpose(-1, -2) @ q.float() * scale
    dv = weights.to(dtype).float().transpose(-1, -2) @ grad_out
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _grouped(q, tensor):
    return tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1)


def _check_flash(call):
    """(q, k, v, shift), k and v with a head for each of q. Flash attention aligns its causal mask at the bottom right."""
    q, k, v = call.query, call.key, call.value
    _check_common(q, k, v, call.dropout_p)
    assert q.dtype in (torch.float16, torch.bfloat16), "flash: 16 bit only"
    assert q.shape[3] == k.shape[3] == v.shape[3] and q.shape[3] % 8 == 0 and q.shape[3] <= 256
    assert k.shape[:3] == v.shape[:3] and q.shape[1] % k.shape[1] == 0
    shift = k.shape[2] - q.shape[2] if call.is_causal and q.shape[2] > 1 else None
    return q, _grouped(q, k), _grouped(q, v), shift


def flash(call):
    q, k, v, shift = _check_flash(call)
    assert not call.return_debug_mask
    out, lse = _forward(q, k, v, None, shift, call.scale)
    out = torch.empty_like(q.transpose(1, 2)).transpose(1, 2).copy_(out)
    return out, lse, None, None, q.shape[2], k.shape[2], torch.empty(2), torch.empty(()), torch.empty(0)


def flash_backward(call):
    q, k, v, shift = _check_flash(call)
    call.deterministic = (
        torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    )
    call.fills = call.deterministic and torch.utils.deterministic.fill_uninitialized_memory
    assert call.cum_seq_q is None and call.cum_seq_k is None and (call.max_q, call.max_k) == (q.shape[2], k.shape[2])
    assert call.grad_out.shape == call.out.shape == q.shape and call.grad_out.dtype == call.out.dtype == q.dtype
    lse = call.logsumexp
    assert lse.shape == q.shape[:3] and lse.dtype == torch.float32 and lse.is_contiguous()
    assert isinstance(call.philox_seed, Tensor) and isinstance(call.philox_offset, Tensor)
    dq, dk, dv = _backward(call.grad_out, q, k, v, call.out, lse, None, shift, call.scale)
    groups = (call.key.shape[1], -1)
    return dq, *(grad.unflatten(1, groups).float().sum(2).to(grad.dtype) for grad in (dk, dv))


def cudnn(call):
    """k and v get a head for each of q. cuDNN aligns its causal mask at the top left."""
    q, k, v = call.query, call.key, call.value
    _check_common(q, k, v, call.dropout_p)
    assert q.dtype in (torch.float16, torch.bfloat16), "cuDNN: 16 bit only"
    assert q.shape[3] == k.shape[3] and all(tensor.shape[3] % 8 == 0 and tensor.shape[3] <= 128 for tensor in (q, v))
    assert k.shape[:3] == v.shape[:3] and q.shape[1] % k.shape[1] == 0 and k.shape[2] > 1
    assert not call.is_causal or q.shape[2] == k.shape[2], "one alignment's causal mask is not the other's"
    assert call.attn_bias is None
    k, v, shift = _grouped(q, k), _grouped(q, v), 0 if call.is_causal else None
    assert call.compute_log_sumexp and not call.return_debug_mask
    out, lse = _forward(q, k, v, None, shift, call.scale)
    out, seed = torch.empty_like(q).copy_(out), torch.empty((), dtype=torch.int64)
    return out, lse[..., None], None, None, q.shape[2], k.shape[2], seed, seed, None


def _check_efficient(call):
    """(q, k, v, shift) in the layout [batch, heads, len, dim]; the kernel's is [batch, len, heads, dim]. No grouped heads."""
    q, k, v, bias = call.query, call.key, call.value, call.bias
    _check_common(q, k, v, call.dropout_p)
    assert call.cu_seqlens_q is None and call.cu_seqlens_k is None and call.window_size is None
    assert q.dtype in (torch.float16, torch.bfloat16, torch.float32)
    assert q.shape[2] == k.shape[2] == v.shape[2] and k.shape[:2] == v.shape[:2]
    assert q.shape[3] == k.shape[3] and q.shape[3] % 8 == 0 and v.shape[3] % 8 == 0
    if bias is not None:
        assert bias.dtype == q.dtype and bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        _aligned(bias, "bias")
    shift = (None, 0, k.shape[1] - q.shape[1])[call.custom_mask_type]  # none, causal from top left, from bottom right
    return *(tensor.transpose(1, 2) for tensor in (q, k, v)), shift


def efficient(call):
    q, k, v, shift = _check_efficient(call)
    assert call.compute_log_sumexp and call.max_seqlen_q is None and call.max_seqlen_k is None and call.seqlen_k is None
    out, lse = _forward(q, k, v, call.bias, shift, call.scale)
    padded = torch.full((*lse.shape[:2], math.ceil(q.shape[2] / 32) * 32), torch.inf)
    padded[:, :, : q.shape[2]] = lse
    return out.transpose(1, 2).contiguous(), padded, torch.empty(()), torch.empty(()), q.shape[2], k.shape[2]


def efficient_backward(call):
    q, k, v, shift = _check_efficient(call)
    assert not call.bias_requires_grad and not call.shared_storage_dqdkdv
    assert (call.max_seqlen_q, call.max_seqlen_k) == (q.shape[2], k.shape[2])
    assert call.num_splits_key == 1, "more than one key split adds up in any order"
    grad_out, out, lse = call.grad_out_, call.out, call.logsumexp
    assert grad_out.shape == out.shape == (*call.query.shape[:3], v.shape[3]) and grad_out.dtype == out.dtype == q.dtype
    # The kernel computes the row stride of out, heads · value_dim, and does not look at the tensor's.
    assert out.stride(-1) == 1 and (out.shape[1] == 1 or out.stride(1) == out.shape[2] * out.shape[3]), out.stride()
    assert lse.shape == (*q.shape[:2], math.ceil(q.shape[2] / 32) * 32) and lse.dtype == torch.float32
    assert lse.is_contiguous() and bool((lse[:, :, q.shape[2] :] == torch.inf).all())
    grad_out, out, lse = grad_out.transpose(1, 2), out.transpose(1, 2), lse[:, :, : q.shape[2]]
    grads = _backward(grad_out, q, k, v, out, lse, call.bias, shift, call.scale)
    return *(grad.transpose(1, 2).contiguous() for grad in grads), torch.empty(())


OPERATORS = {
    aten._scaled_dot_product_cudnn_attention: cudnn,
    aten._scaled_dot_product_flash_attention: flash,
    aten._scaled_dot_product_flash_attention_backward: flash_backward,
    aten._efficient_attention_forward: efficient,
    aten._efficient_attention_backward: efficient_backward,
}
