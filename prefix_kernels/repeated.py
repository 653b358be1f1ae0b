"""Calls like an earlier one, except for the values of their tensors: what was checked and chosen then holds.

The layers of a model make one such call after another. Where rows are few, checking, describing and choosing anew would take
longer than the kernel, all the more as the model's products between two layers drive the code for it out of the caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prefix_kernels import ops, select
from prefix_kernels.problem import AttentionInputs

MOST_REMEMBERED = 4096
Kernel = Callable[..., Tensor]  # from the tensors of a call to out
_kernels: dict[tuple, Kernel | None] = {}  # by kind of call; None where its backend offers no `repeat`


def find(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, key_mask: Tensor | None, bias: Tensor | None,
    *options: Any,
) -> tuple[tuple | None, Kernel | None]:  # fmt: skip
    """A new kind of call, which is all that the checks and the choice of a backend look at, or what serves a known kind.

    The arguments are all there are. Returns (None, kernel) where that is known; (kind, None) where no such call was served yet;
    (None, None) where a call has to go its whole way, because something may record, trace or change it.
    """
    if (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled() or ops.intercepted()
        or select.variable() is not None
    ):  # fmt: skip
        return None, None
    try:
        on_cpu = q.is_cpu and k.is_cpu and v.is_cpu and prefix_k.is_cpu and prefix_v.is_cpu
        kind = (
            None if on_cpu else (q.device, k.device, v.device, prefix_k.device, prefix_v.device),
            q.shape, k.shape, v.shape, prefix_k.shape, prefix_v.shape,
            q.dtype, k.dtype, v.dtype, prefix_k.dtype, prefix_v.dtype,
            q.layout, k.layout, v.layout, prefix_k.layout, prefix_v.layout,
            type(q), type(k), type(v), type(prefix_k), type(prefix_v), *options, *map(type, options),
            key_mask if key_mask is None else _look(key_mask),
            bias if bias is None else _look(bias),
        )  # fmt: skip
        known = _kernels.get(kind, False)
        return (kind, None) if known is False else (None, known)
    except (AttributeError, RuntimeError, TypeError):  # a wrong call
        return None, None


def _look(tensor: Tensor) -> tuple:
    return type(tensor), tensor.shape, tensor.dtype, tensor.layout, tensor.device


def remember(kind: tuple, inputs: AttentionInputs, backend: str | None) -> None:
    """That a call of this kind was served."""
    if len(_kernels) >= MOST_REMEMBERED:
        _kernels.clear()
    _kernels[kind] = None
    if ops.is_plain(inputs):
        module = select.load_backend(select.choose_backend(inputs.problem(False), backend))
        _kernels[kind] = module.repeat(inputs) if hasattr(module, "repeat") else None
