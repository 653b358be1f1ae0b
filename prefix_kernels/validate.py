"""Argument checks: a wrong call raises before any kernel starts, naming the argument, what was expected and what came.

Values of index tensors (ids, lengths, cu_seqlens, parent) are read only for CPU tensors that nothing traces or maps; elsewhere
a backend treats ids out of range as −1 and clamps lengths, and the C++ kernels refuse cu_seqlens and parents that are wrong.
"""

from __future__ import annotations

import numbers
import operator
import weakref
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
LARGEST_POSITION = 2**31 - 1  # so that no sum of positions is beyond 64 bit
SMALLEST, LARGEST = 1e-30, 1e30  # of scale and softcap, so that what float32 makes of them is neither 0 nor infinite

MOST_PASSED = 4096
_passed: set[tuple] = set()  # shapes, dtypes and devices that check_tensors has found right
_in_range: dict[str, tuple[weakref.ref, tuple]] = {}  # by argument: the last tensor that check_range found right, as it was


def shape_of(tensor: Tensor) -> str:
    return f"{list(tensor.shape)}"


def kind_of(value) -> str:
    """The name of its type, told apart from those of Python: numpy has a bool, too."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def to_int(name: str, value: Any, expected: str = "an int") -> int:
    """Whatever can be an index, as an int (a SymInt stays one), but no bool and no tensor: reading it may stop a device."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value
    try:
        return operator.index(None if isinstance(value, (bool, Tensor)) else value)
    except TypeError:
        raise TypeError(f"{name}: expected {expected}, got {kind_of(value)}") from None


def to_number(name: str, value: Any) -> int | float:
    """A real number as Python's, but no bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name}: expected a number or None, got {kind_of(value)}")
    return value if isinstance(value, (int, float)) else float(value)


def check_tensors(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, varlen: bool) -> None:
    """Ranks, dtypes, devices and the sizes that q, k, v and the prefix must agree on: looked at once, then remembered."""
    if torch.compiler.is_compiling():
        return _check_tensors(q, k, v, prefix_k, prefix_v, varlen)
    try:
        key = (varlen, *[(type(t), t.layout, t.shape, t.dtype, t.device) for t in (q, k, v, prefix_k, prefix_v)])
        if key in _passed:
            return
    except (AttributeError, RuntimeError, TypeError):  # no tensor; one without sizes (nested); traced ones, which have no hash
        return _check_tensors(q, k, v, prefix_k, prefix_v, varlen)
    _check_tensors(q, k, v, prefix_k, prefix_v, varlen)
    if len(_passed) >= MOST_PASSED:
        _passed.clear()
    _passed.add(key)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, varlen: bool) -> None:
    layout = "[tokens, {heads}, head_dim]" if varlen else "[batch, {heads}, {length}, head_dim]"
    for name, tensor in (("q", q), ("k", k), ("v", v), ("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        check_dense(name, tensor)
    for name, tensor, rank in (("q", q, 3 if varlen else 4), ("k", k, 3 if varlen else 4), ("v", v, 3 if varlen else 4)):
        if tensor.dim() != rank:
            words = {"heads": "heads" if name == "q" else "kv_heads", "length": "q_len" if name == "q" else "kv_len"}
            raise ValueError(f"{name}: expected {layout.format(**words)}, got shape {shape_of(tensor)}")
    for name, tensor in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if tensor.dim() not in (3, 4):
            raise ValueError(
                f"{name}: expected [kv_heads, prefix_len, head_dim] or [prefixes, kv_heads, prefix_len, head_dim], "
                f"got shape {shape_of(tensor)}"
            )
        if tensor.dim() == 4 and tensor.shape[0] == 0:
            raise ValueError(f"{name}: expected a bank of at least one prefix, got shape {shape_of(tensor)}")
    _check_dtypes(q, k, v, prefix_k, prefix_v)
    for name, tensor in (("k", k), ("v", v), ("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as q, got {tensor.device}")
    if not varlen and k.shape[0] != q.shape[0]:
        raise ValueError(f"k: expected batch {q.shape[0]} as in q, got shape {shape_of(k)}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v: expected k's shape {shape_of(k)} up to the last axis, got {shape_of(v)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: expected head_dim {q.shape[-1]} as in q, got shape {shape_of(k)}")
    for name, tensor in (("q", q), ("v", v)):
        if tensor.shape[-1] == 0:
            raise ValueError(f"{name}: expected a head_dim of at least 1, got shape {shape_of(tensor)}")
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"k: expected a number of kv_heads that divides q's {heads} heads, got {kv_heads}")
    for name, tensor, dim in (("prefix_k", prefix_k, k.shape[-1]), ("prefix_v", prefix_v, v.shape[-1])):
        if tensor.shape[-3] != kv_heads or tensor.shape[-1] != dim:
            raise ValueError(
                f"{name}: expected kv_heads {kv_heads} and head_dim {dim} as in k and v, got shape {shape_of(tensor)}"
            )
    if prefix_v.shape[:-1] != prefix_k.shape[:-1]:
        raise ValueError(
            f"prefix_v: expected prefix_k's shape {shape_of(prefix_k)} up to the last axis, got {shape_of(prefix_v)}"
        )


def check_dense(name: str, tensor: Tensor) -> None:
    """Neither sparse nor nested."""
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got {'a nested one' if tensor.is_nested else tensor.layout}")


def _check_dtypes(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> None:
    if q.dtype not in DTYPES:
        raise TypeError(f"q: expected dtype float16, bfloat16, float32 or float64, got {q.dtype}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected dtype {q.dtype} as q, got {tensor.dtype}")
    allowed = {q.dtype, torch.float32} if q.dtype.itemsize == 2 else {q.dtype}
    if prefix_k.dtype not in allowed:
        raise TypeError(
            f"prefix_k: expected dtype {' or '.join(map(str, sorted(allowed, key=str)))} beside q of {q.dtype}, "
            f"got {prefix_k.dtype}"
        )
    if prefix_v.dtype != prefix_k.dtype:
        raise TypeError(f"prefix_v: expected dtype {prefix_k.dtype} as prefix_k, got {prefix_v.dtype}")


def check_options(
    causal: bool, scale: float | None, window: int | None, softcap: float | None, first_key_position: int | None
) -> tuple[float | None, int | None, float | None, int | None]:
    """scale, window, softcap and first_key_position as Python's numbers."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected a bool, got {kind_of(causal)}")
    scale = None if scale is None else to_number("scale", scale)
    softcap = None if softcap is None else to_number("softcap", softcap)
    if scale is not None and scale != 0 and not SMALLEST <= abs(scale) <= LARGEST:
        raise ValueError(f"scale: expected 0, {SMALLEST} to {LARGEST}, either sign, or None, got {scale}")
    if softcap is not None and not SMALLEST <= softcap <= LARGEST:
        raise ValueError(f"softcap: expected {SMALLEST} to {LARGEST} or None, got {softcap}")
    window = _position("window", window, 1)
    return scale, window, softcap, _position("first_key_position", first_key_position, 0)


def _position(name: str, value: Any, least: int) -> int | None:
    if value is None:
        return None
    value = to_int(name, value, "an int or None")
    if value < least:
        raise ValueError(f"{name}: expected at least {least} or None, got {value}")
    if value > LARGEST_POSITION:
        raise ValueError(f"{name}: expected at most {LARGEST_POSITION} or None, got {value}")
    return value


def check_call(backend, return_lse) -> None:
    """What does not concern the attention itself. Whether the backend exists and serves the call, select says."""
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend: expected a name or None, got {type(backend).__name__}")
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse: expected a bool, got {kind_of(return_lse)}")


def check_index(name: str, tensor: Tensor | None, length: int, of: str, device: torch.device) -> None:
    """An index tensor: int32 or int64, one axis of `length` (`of` says of what), on q's device."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected an integer tensor, got {type(tensor).__name__}")
    check_dense(name, tensor)
    if tensor.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name}: expected dtype int32 or int64, got {tensor.dtype}")
    if tensor.dim() != 1 or tensor.shape[0] != length:
        raise ValueError(f"{name}: expected shape [{length}] ({of}), got {shape_of(tensor)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device} as q, got {tensor.device}")


def may_read(tensor: Tensor | None) -> bool:
    """Whether the values may be read here: they are there, and reading them stops no device and breaks no graph or map."""
    if tensor is None or tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if type(tensor) not in (Tensor, torch.nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None  # that of make_fx


def check_range(name: str, tensor: Tensor | None, low: int, high: int) -> None:
    """Every value within low … high. The layers of a model share their index tensors: the last ones that passed are known."""
    if not may_read(tensor) or tensor.numel() == 0:
        return
    seen = None if tensor.is_inference() else (tensor._version, low, high)
    known, as_it_was = _in_range.get(name, (None, None))
    if seen is not None and known is not None and known() is tensor and as_it_was == seen:
        return
    smallest, largest = int(tensor.min()), int(tensor.max())
    if smallest < low or largest > high:
        raise ValueError(f"{name}: expected values from {low} to {high}, got {smallest} to {largest}")
    if seen is not None:
        _in_range[name] = weakref.ref(tensor), seen


def check_prefix_index(prefix_k: Tensor, prefix_ids: Tensor | None, prefix_lens: Tensor | None, rows: int, of: str) -> None:
    """prefix_ids and prefix_lens belong to a bank of prefixes, and a bank needs prefix_ids."""
    if prefix_k.dim() == 3:
        for name, tensor in (("prefix_ids", prefix_ids), ("prefix_lens", prefix_lens)):
            if tensor is not None:
                raise ValueError(
                    f"{name}: expected None beside one shared prefix, or prefix_k of [prefixes, kv_heads, prefix_len, "
                    f"head_dim], got prefix_k of shape {shape_of(prefix_k)}"
                )
        return
    if prefix_ids is None:
        raise ValueError(f"prefix_ids: expected int [{rows}] beside a bank of prefixes {shape_of(prefix_k)}, got None")
    check_index("prefix_ids", prefix_ids, rows, of, prefix_k.device)
    check_index("prefix_lens", prefix_lens, prefix_k.shape[0], "prefixes", prefix_k.device)
    check_range("prefix_ids", prefix_ids, -1, prefix_k.shape[0] - 1)
    check_range("prefix_lens", prefix_lens, 0, prefix_k.shape[2])


def check_key_mask(key_mask: Tensor | None, batch: int, kv_len: int, device: torch.device) -> None:
    """Checks which keys may be attended.

    Args:
        key_mask: bool [batch, kv_len].
    """
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor):
        raise TypeError(f"key_mask: expected a bool tensor, got {type(key_mask).__name__}")
    check_dense("key_mask", key_mask)
    if key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask: expected dtype bool, got {key_mask.dtype}")
    if tuple(key_mask.shape) != (batch, kv_len):
        raise ValueError(f"key_mask: expected shape [{batch}, {kv_len}] (batch, kv_len), got {shape_of(key_mask)}")
    if key_mask.device != device:
        raise ValueError(f"key_mask: expected device {device} as q, got {key_mask.device}")


def check_bias(bias: Tensor | None, q: Tensor, columns: int) -> None:
    """Checks what is added to the scores.

    Args:
        bias: broadcastable to [batch, heads, q_len, prefix_len + kv_len], without gradient.
    """
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias: expected a tensor, got {type(bias).__name__}")
    check_dense("bias", bias)
    if bias.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"bias: expected dtype float32 or q's {q.dtype}, got {bias.dtype}")
    if bias.device != q.device:
        raise ValueError(f"bias: expected device {q.device} as q, got {bias.device}")
    full = (*q.shape[:3], columns)
    fits = bias.dim() <= 4 and all(
        size in (1, wanted) for size, wanted in zip(reversed(bias.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(
            f"bias: expected a shape that broadcasts to {list(full)} (batch, heads, q_len, prefix_len + kv_len), "
            f"got {shape_of(bias)}"
        )
    if bias.requires_grad and torch.is_grad_enabled():
        raise ValueError("bias: expected a tensor without gradient, got one with requires_grad=True; pass bias.detach()")


def check_cu_seqlens(name: str, cu_seqlens: Tensor, tokens: int, max_name: str, max_seqlen: int, device) -> int:
    """Checks where packed sequences begin and end; returns max_seqlen as an int.

    Args:
        cu_seqlens: int [sequences + 1], from 0, never falling, ending at the token count.
        max_seqlen: an upper bound.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name}: expected an integer tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name}: expected shape [sequences + 1], got {shape_of(cu_seqlens)}")
    check_index(name, cu_seqlens, cu_seqlens.shape[0], "sequences + 1", device)
    max_seqlen = to_int(max_name, max_seqlen)
    if not may_read(cu_seqlens):
        return max_seqlen
    lengths = cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != tokens or bool((lengths < 0).any()):
        raise ValueError(
            f"{name}: expected values that start at 0, never fall and end at {tokens} tokens, got {cu_seqlens.tolist()[:16]}"
        )
    longest = int(lengths.max()) if lengths.numel() else 0
    if longest > max_seqlen:
        raise ValueError(f"{max_name}: expected at least the longest sequence, {longest}, got {max_seqlen}")
    return max_seqlen


def check_causal_lengths(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    """Causal varlen: no sequence has more queries than keys."""
    if not (may_read(cu_seqlens_q) and may_read(cu_seqlens_k)):
        return
    too_long = (cu_seqlens_q.diff() > cu_seqlens_k.diff()).nonzero()
    if too_long.numel():
        index = int(too_long[0])
        raise ValueError(
            "cu_seqlens_q: expected q_len <= kv_len in each causal sequence, got q_len "
            f"{int(cu_seqlens_q.diff()[index])} and kv_len {int(cu_seqlens_k.diff()[index])} in sequence {index}"
        )


def check_parent(parent: Tensor | None, prefix_ids: Tensor | None, sequences: int, window, device) -> None:
    """Checks whose keys packed sequences see besides their own.

    Args:
        parent: −1 or an earlier sequence that has no parent itself and the same prefix; not together with a window.
    """
    if parent is None:
        return
    check_index("parent", parent, sequences, "sequences", device)
    if window is not None:
        raise ValueError(f"parent: expected None beside a window, got a parent tensor and window={window}")
    if not may_read(parent):
        return
    ids = prefix_ids.tolist() if prefix_ids is not None else [0] * sequences
    parents = parent.tolist()
    for child, own_parent in enumerate(parents):
        if own_parent == -1:
            continue
        if not -1 <= own_parent < child:
            raise ValueError(f"parent: expected -1 or an earlier sequence for sequence {child}, got {own_parent}")
        if parents[own_parent] != -1:
            raise ValueError(
                f"parent: expected a sequence without a parent for sequence {child}, got {own_parent}, which has one itself"
            )
        if ids[own_parent] != ids[child]:
            raise ValueError(
                f"parent: expected one of prefix id {ids[child]} for sequence {child}, got {own_parent} of prefix id "
                f"{ids[own_parent]}"
            )
