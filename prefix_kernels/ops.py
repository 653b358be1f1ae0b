"""The torch.library operators: schema, shapes for tracing, autograd. Autograd is recorded here, once, for every backend."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import get_type_hints

import torch
from torch import Tensor

from prefix_kernels.problem import AttentionInputs, empty_token_major
from prefix_kernels.select import choose_backend, load_backend

_SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", float: "float", float | None: "float?", int | None: "SymInt?",
}  # fmt: skip
_INPUTS = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(AttentionInputs).items())
_INPUT_COUNT = len(AttentionInputs._fields)
_DIFFERENTIABLE = 5  # q, k, v, prefix_k, prefix_v: the first five inputs


def _backend_for(inputs: AttentionInputs, backend: str | None):
    return load_backend(choose_backend(inputs.problem(), backend))


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """A backend chooses its dtypes itself: autocast would round the float32 products of the reference."""
    active = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if active else nullcontext()


def _token_major(tensor: Tensor) -> Tensor:
    """The memory order that the fake implementations promise."""
    if tensor.dim() == 4:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor.contiguous()


def _forward(inputs: AttentionInputs, backend: str | None) -> tuple[Tensor, Tensor]:
    with _without_autocast(inputs.q.device):
        out, lse = _backend_for(inputs, backend).forward(inputs)
    return _token_major(out), lse.contiguous()


@torch.library.custom_op(
    "prefix_kernels::attention", mutates_args=(), schema=f"({_INPUTS}, str? backend, bool return_lse) -> (Tensor, Tensor)"
)
def attention(*args):
    """(out, lse) of one call; arguments are those of AttentionInputs, then backend, then return_lse (for the backward pass)."""
    return _forward(AttentionInputs(*args[:_INPUT_COUNT]), args[_INPUT_COUNT])


@attention.register_fake
def _(*args):
    inputs = AttentionInputs(*args[:_INPUT_COUNT])
    q, value_dim = inputs.q, inputs.v.shape[-1]
    lse_shape = (q.shape[1], q.shape[0]) if inputs.varlen else q.shape[:3]
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return empty_token_major(q, (*q.shape[:-1], value_dim)), q.new_empty(lse_shape, dtype=lse_dtype)


@torch.library.custom_op(
    "prefix_kernels::attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool[] wanted, {_INPUTS}, str? backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def attention_backward(grad_out, grad_lse, out, lse, wanted, *args):
    """Gradients of q, k, v, prefix_k, prefix_v; one that is not wanted comes back as an empty tensor and is not computed."""
    inputs = AttentionInputs(*args[:_INPUT_COUNT])
    backend = _backend_for(inputs, args[_INPUT_COUNT])
    with _without_autocast(inputs.q.device):
        grads = backend.backward(inputs, out, lse, grad_out, grad_lse, tuple(wanted))
    results = []
    for index, (grad, needed) in enumerate(zip(grads, wanted, strict=True)):
        if not needed:
            results.append(inputs.q.new_empty(0))
        else:
            results.append(_token_major(grad) if index < 3 else grad.contiguous())
    return tuple(results)


@attention_backward.register_fake
def _(grad_out, grad_lse, out, lse, wanted, *args):
    tensors = args[:_DIFFERENTIABLE]
    results = []
    for index, (tensor, needed) in enumerate(zip(tensors, wanted, strict=True)):
        if not needed:
            results.append(tensors[0].new_empty(0))
        elif index < 3:
            results.append(empty_token_major(tensor, tuple(tensor.shape)))
        else:
            results.append(tensor.new_empty(tensor.shape))
    return tuple(results)


def _setup_context(ctx, inputs, output):
    tensors = [index for index, value in enumerate(inputs) if isinstance(value, Tensor)]
    ctx.tensor_indices = tensors
    ctx.arguments = [None if index in tensors else value for index, value in enumerate(inputs)]
    ctx.save_for_backward(*(inputs[index] for index in tensors), *output)


def _backward(ctx, grad_out, grad_lse):
    *tensors, out, lse = ctx.saved_tensors
    arguments = list(ctx.arguments)
    for index, tensor in zip(ctx.tensor_indices, tensors, strict=True):
        arguments[index] = tensor
    *arguments, backend, return_lse = arguments
    wanted = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
    grads = attention_backward(grad_out, grad_lse if return_lse else None, out, lse, wanted, *arguments, backend)
    grads = [grad if needed else None for grad, needed in zip(grads, wanted, strict=True)]
    return (*grads, *[None] * (_INPUT_COUNT - _DIFFERENTIABLE + 2))


attention.register_autograd(_backward, setup_context=_setup_context)


def run(inputs: AttentionInputs, backend: str | None, return_lse: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) through the operator; directly where there is nothing to record or to trace.

    Passing through the operator takes some 15 µs, which is a good part of a small decoding step.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _plain(inputs):
        return attention(*inputs, backend, return_lse)
    return _forward(inputs, backend)


def _plain(inputs: AttentionInputs) -> bool:
    """Ordinary tensors with values: no subclass, no tracing or batching wrapper, not on the meta device."""
    if inputs.q.is_meta or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in inputs.tensors)
