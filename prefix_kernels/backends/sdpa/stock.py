"""Torch's own attention kernels behind one pair of functions that take and return the log-sum-exp.

attend gives softmax(scale · q · kᵀ + mask) · v and its log-sum-exp over these keys alone. attend_backward takes the *global*
out and lse of a larger softmax: its weights exp(scores − lse) are then the global ones, so the results of several parts add
up to the exact gradient of the whole.

On CUDA a mask, float32 and heads above 256 go to the memory-efficient kernel, the rest to cuDNN's or to flash attention:
engine_of says which. Forward cuDNN's was measured 1.1 (head_dim 64) to 1.8 times as fast as torch's flash attention on an H200
(benchmarks/results/nvidia-h200/engines.json). Backward it adds up dq in any order, so flash attention runs, told to add in one:
at head_dim 128 cuDNN makes both passes 1.5 to 2.3 times as fast, any order saves flash attention up to 30 %. The CPU kernel,
flash attention and cuDNN take fewer kv heads than heads as they are; the memory-efficient kernel needs them repeated.

What they do not take (float64, bfloat16 on GPUs before 8.0) goes to composed.py, and so does all on GPUs where we have not run
them (all that are not NVIDIA's).
"""

from __future__ import annotations

import threading
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import pad

from prefix_kernels.backends.sdpa import composed
from prefix_kernels.problem import empty_token_major

aten = torch.ops.aten

CUDNN_FEWEST_QUERIES = 64  # assumed: less is decoding, where cuDNN would plan anew for every length of the cache

_CUDNN_LEAST_VERSION = 91501
_CUDNN_LARGEST_DIM = 128
_FLASH_LARGEST_DIM = 256
_CUDNN_LARGEST_TENSOR = 2**31  # elements, exclusive
_CUDA_ALIGNMENT = 16  # bytes, of every row of q, k and v
_LSE_ALIGNMENT = 32  # the memory-efficient kernel's rows of lse
_BIAS_ALIGNMENT = 16  # elements; the memory-efficient kernel's rows of the mask
_SWITCH = threading.Lock()  # torch's deterministic switch is the process's


def engine_of(q: Tensor, k: Tensor, mask: Tensor | None, backward: bool) -> str:
    """The kernel of one part: "cpu", "cudnn", "flash" or "efficient". q and k as they go in, heads of one size."""
    if q.device.type == "cpu":
        return "cpu"
    if mask is not None or not _takes_flash(q, backward):
        return "efficient"
    return "flash" if backward or not _takes_cudnn(q, k) else "cudnn"


def composes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrix products stand in for attention kernels."""
    if device.type != "cuda" or torch.version.hip is not None:
        return device.type != "cpu"
    return dtype == torch.float64 or (dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0))


def takes_fewer_kv_heads(q: Tensor, v: Tensor) -> bool:
    """Whether a part without a mask goes to a CUDA kernel that reads fewer kv heads than heads."""
    on_cuda = q.device.type != "cpu" and not composes(q.device, q.dtype)
    return on_cuda and _takes_flash(q, backward=False) and v.shape[-1] <= _FLASH_LARGEST_DIM


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out [batch, heads, q_len, value_dim], lse [batch, heads, q_len]) of one part.

    Args:
        q: [batch, heads, q_len, head_dim]; k, v: [batch or 1, kv_heads, n, ·]; none of the sizes is 0.
        mask: additive, 4 axes that broadcast to [batch, heads, q_len, n], float32 or q's dtype (on CUDA the fast one).
        causal: query i sees keys j ≤ i; needs q_len = n.

    lse is meaningless where the mask hides every key (the kernels do not agree); the caller knows those rows.
    """
    if composes(q.device, q.dtype):
        return composed.attend(q, k, v, mask, causal, scale)
    value_dim, dtype = v.shape[-1], q.dtype
    mask, (q, k, v) = _beside_mask(mask, q, k, v)
    q, scale = _positive_scale(q, scale)
    q, k, v = _same_dim(q, k, v)
    engine = engine_of(q, k, mask, backward=False)
    k, v = _for_all_rows(q, *(_repeat_heads(q.shape[1], k, v) if engine == "efficient" else (k, v)))
    if engine == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    elif engine == "cudnn":
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)[:2]
        lse = lse.view(q.shape[:3])  # [batch, heads, q_len, 1]
    elif engine == "flash":
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    else:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        bias = _efficient_bias(q, k, mask)
        out, lse = aten._efficient_attention_forward(
            q, k, v, bias, None, None, None, None, 0.0, int(causal), True, scale=scale
        )[:2]
        out, lse = out.transpose(1, 2), lse[:, :, : q.shape[1]]
    return out[..., :value_dim].to(dtype), lse


def attend_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: Tensor | None, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) of one part under the global out and lse. lse +inf marks a query that gets no gradient here.

    The kernels compute delta = rowsum(grad_out ∘ out) themselves. A gradient of lse enters as delta − grad_lse through one
    more value channel: v is 0 there, so no score sees it, out is 1 and grad_out is −grad_lse.
    """
    if composes(q.device, q.dtype):
        return composed.attend_backward(grad_out, grad_lse, q, k, v, out, lse, mask, causal, scale)
    head_dim, value_dim, kv_heads = q.shape[-1], v.shape[-1], k.shape[1]
    mask, (q, k, v, out, grad_out) = _beside_mask(mask, q, k, v, out, grad_out)
    dq_factor = 1.0 if scale > 0 else scale
    q, scale = _positive_scale(q, scale)
    if grad_lse is not None:
        v, grad_out, out = pad(v, (0, 1)), pad(grad_out, (0, 1)), pad(out, (0, 1), value=1.0)
        grad_out[..., -1] = -grad_lse
    q, k, v = _same_dim(q, k, v)
    grad_out, out = (_rows(tensor, q.shape[-1]) for tensor in (grad_out, out))
    engine = engine_of(q, k, mask, backward=True)
    k, v = _for_all_rows(q, *(_repeat_heads(q.shape[1], k, v) if engine == "efficient" else (k, v)))
    if engine == "cpu":
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse.contiguous(), 0.0, causal, attn_mask=mask, scale=scale
        )
    elif engine == "flash":
        no_dropout_state = torch.empty(2, dtype=torch.uint64, device=q.device)
        with _deterministic():
            dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
                grad_out, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal,
                no_dropout_state, no_dropout_state[:0], scale=scale,
            )  # fmt: skip
    else:
        grad_out, out, q, k, v = (tensor.transpose(1, 2) for tensor in (grad_out, out, q, k, v))
        lse = pad(lse, (0, -lse.shape[-1] % _LSE_ALIGNMENT), value=torch.inf).contiguous()
        no_dropout_state = torch.zeros((), dtype=torch.int64, device=q.device)
        out = out.contiguous()  # the kernel takes its rows to be heads · value_dim apart, whatever its strides say
        dq, dk, dv, _ = aten._efficient_attention_backward(
            grad_out, q, k, v, _efficient_bias(q, k, mask), out, None, None, q.shape[1], k.shape[1], lse, 0.0,
            no_dropout_state, no_dropout_state, int(causal), False, scale=scale, num_splits_key=1,
        )  # fmt: skip
        dq = dq.transpose(1, 2)
        dk, dv = (grad.transpose(1, 2).unflatten(1, (kv_heads, -1)).sum(2) for grad in (dk, dv))
    dq = dq if dq_factor == 1 else dq * dq_factor
    return dq[..., :head_dim], dk[..., :head_dim], dv[..., :value_dim]


def _beside_mask(mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """Mask and tensors in dtypes that a kernel takes together.

    The CPU kernel takes a float32 mask beside 16 bit, and beside float64 only float64. The memory-efficient kernel takes
    the inputs' dtype alone: beside a float32 bias they go through it in float32, since a rounded bias moves every score.
    """
    if mask is None:
        return None, tensors
    dtype = tensors[0].dtype
    if mask.device.type == "cpu":
        mask = mask.to(torch.promote_types(dtype, torch.float32))
    else:
        dtype = torch.promote_types(dtype, mask.dtype)
        tensors = tuple(tensor.to(dtype) for tensor in tensors)
    return mask if mask.stride(-1) == 1 else mask.contiguous(), tensors


def _positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The kernels multiply hidden scores, −inf, by the scale: one that is 0 or negative must go into q."""
    return (q, scale) if scale > 0 else (q * scale, 1.0)


def _takes_flash(q: Tensor, backward: bool) -> bool:
    """On CUDA, by what torch's own choice excludes."""
    if q.dtype.itemsize != 2 or q.shape[-1] > _FLASH_LARGEST_DIM:
        return False
    capability = torch.cuda.get_device_capability(q.device)
    little_shared_memory = (8, 6) <= capability <= (8, 9) or capability[0] == 12
    return capability >= (8, 0) and not (backward and little_shared_memory and 192 < q.shape[-1] <= 224)


def _takes_cudnn(q: Tensor, k: Tensor) -> bool:
    """Beside what flash attention takes, where torch would choose it by itself: older versions read past sequences that are no
    multiple of 128. cuDNN refuses a single key; its causal mask starts top left, which is square here."""
    if q.shape[-1] > _CUDNN_LARGEST_DIM or q.shape[2] < CUDNN_FEWEST_QUERIES or k.shape[2] == 1:
        return False
    if max(q.numel(), k.numel()) >= _CUDNN_LARGEST_TENSOR or max(q.shape[:2]) > 65535:
        return False
    if (torch.backends.cudnn.version() or 0) < _CUDNN_LEAST_VERSION:
        return False
    return torch.cuda.get_device_capability(q.device)[0] in (9, 10)


def _same_dim(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels want one head_dim for all three; on CUDA a multiple of 8. Zero columns change no score and no value."""
    dim = max(q.shape[-1], v.shape[-1])
    if q.device.type != "cpu":
        dim += -dim % 8
    return tuple(_rows(tensor, dim) for tensor in (q, k, v))


def _rows(tensor: Tensor, dim: int) -> Tensor:
    """`tensor` with rows of `dim` numbers that a kernel can read: last stride 1, on CUDA in steps of 16 bytes.

    A copy on CUDA is token-major, which the kernels there read without another copy.
    """
    if tensor.device.type == "cpu":
        if tensor.shape[-1] != dim:
            tensor = pad(tensor, (0, dim - tensor.shape[-1]))  # keeps channels last
        return tensor if tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)
    steps = (tensor.storage_offset(), *tensor.stride()[:-1])
    fits = tensor.stride(-1) == 1 and all(step * tensor.element_size() % _CUDA_ALIGNMENT == 0 for step in steps)
    if fits and tensor.shape[-1] == dim:
        return tensor
    rows = empty_token_major(tensor, (*tensor.shape[:-1], dim))
    rows[..., : tensor.shape[-1]] = tensor
    rows[..., tensor.shape[-1] :] = 0
    return rows


def _repeat_heads(heads: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if k.shape[1] == heads:
        return k, v
    return k.repeat_interleave(heads // k.shape[1], 1), v.repeat_interleave(heads // k.shape[1], 1)


def _for_all_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values that all rows share, as views of q's batch: at the very end, so that nothing copies them for each row."""
    return k.expand(q.shape[0], -1, -1, -1), v.expand(q.shape[0], -1, -1, -1)


def _efficient_bias(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask as the memory-efficient kernel wants it: q's dtype, all axes expanded, aligned rows.

    Args:
        q, k: [batch, len, …].
    """
    if mask is None:
        return None
    columns = k.shape[1]
    mask = pad(mask.to(q.dtype), (0, -columns % _BIAS_ALIGNMENT))[..., :columns]
    return mask.expand(q.shape[0], q.shape[2], q.shape[1], columns)


@contextmanager
def _deterministic():
    """Flash attention's backward pass orders its additions only under this global switch, and not where it only warns.

    The switch also has all new memory filled; that is left out unless the caller has it so already. Each device has a thread
    for its backward passes: of two at a time the later one would put back what the earlier one had set.
    """
    with _SWITCH:
        settings, before = torch.utils.deterministic, torch.are_deterministic_algorithms_enabled()
        warn_only, fill = torch.is_deterministic_algorithms_warn_only_enabled(), settings.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        settings.fill_uninitialized_memory = before and fill
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)
            settings.fill_uninitialized_memory = fill
