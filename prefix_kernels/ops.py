"""The torch.library operators: schema, shapes for tracing, autograd. Autograd is recorded here, once, for every backend.

Eager calls on ordinary tensors pass the operators by: they cost some 250 µs a recorded call, more than many a kernel.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from prefix_kernels.problem import AttentionInputs, empty_token_major
from prefix_kernels.select import choose_backend, load_backend

_SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", float: "float", float | None: "float?", int | None: "SymInt?",
}  # fmt: skip
_INPUTS = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(AttentionInputs).items())
_INPUT_COUNT = len(AttentionInputs._fields)
_DIFFERENTIABLE = 5  # q, k, v, prefix_k, prefix_v: the first five inputs


def _backend_for(inputs: AttentionInputs, backend: str | None, gradients: bool) -> ModuleType:
    return load_backend(choose_backend(inputs.problem(gradients), backend))


def autocasts(device: str) -> bool:
    """Whether torch.autocast is on for this type of device."""
    if not torch._C._is_any_autocast_enabled():
        return False
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """A backend chooses its dtypes itself: autocast would round the float32 products of the reference."""
    return torch.autocast(device.type, enabled=False) if autocasts(device.type) else nullcontext()


def _token_major(tensor: Tensor) -> Tensor:
    """The memory order that the fake implementations promise."""
    if tensor.dim() != 4:
        return tensor.contiguous()
    by_token = tensor.transpose(1, 2)
    return tensor if by_token.is_contiguous() else by_token.contiguous().transpose(1, 2)


def _forward(inputs: AttentionInputs, backend: ModuleType) -> tuple[Tensor, Tensor]:
    with _without_autocast(inputs.q.device):
        out, lse = backend.forward(inputs)
    return _token_major(out), lse.contiguous()


@torch.library.custom_op(
    "prefix_kernels::attention", mutates_args=(), schema=f"({_INPUTS}, str? backend, bool return_lse) -> (Tensor, Tensor)"
)
def attention(*args):
    """(out, lse) of one call; arguments are those of AttentionInputs, then backend, then return_lse (for the backward pass)."""
    _refuse_forward_mode()
    inputs = AttentionInputs(*args[:_INPUT_COUNT])
    gradients = any(tensor.requires_grad for tensor in inputs.tensors)
    return _forward(inputs, _backend_for(inputs, args[_INPUT_COUNT], gradients))


@attention.register_fake
def _(*args):
    _refuse_forward_mode()
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
    grads = _gradients(inputs, _backend_for(inputs, args[_INPUT_COUNT], True), out, lse, grad_out, grad_lse, wanted)
    return tuple(inputs.q.new_empty(0) if grad is None else grad for grad in grads)


def _gradients(inputs: AttentionInputs, backend: ModuleType, out, lse, grad_out, grad_lse, wanted) -> list[Tensor | None]:
    with _without_autocast(inputs.q.device):
        grads = backend.backward(inputs, out, lse, grad_out, grad_lse, tuple(wanted))
    own = [_token_major(grad) if needed else None for grad, needed in zip(grads[:3], wanted[:3], strict=True)]
    return own + [grad.contiguous() if needed else None for grad, needed in zip(grads[3:], wanted[3:], strict=True)]


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


def _saved(ctx) -> tuple[AttentionInputs, str | None, bool, Tensor, Tensor, list[bool]]:
    """What _setup_context kept: inputs, backend, return_lse, out, lse; and which gradients are wanted."""
    *tensors, out, lse = ctx.saved_tensors
    arguments = list(ctx.arguments)
    for index, tensor in zip(ctx.tensor_indices, tensors, strict=True):
        arguments[index] = tensor
    *arguments, backend, return_lse = arguments
    return AttentionInputs(*arguments), backend, return_lse, out, lse, list(ctx.needs_input_grad[:_DIFFERENTIABLE])


def _backward(ctx, grad_out, grad_lse):
    inputs, backend, return_lse, out, lse, wanted = _saved(ctx)
    grads = attention_backward(grad_out, grad_lse if return_lse else None, out, lse, wanted, *inputs, backend)
    grads = [grad if needed else None for grad, needed in zip(grads, wanted, strict=True)]
    return (*grads, *[None] * (_INPUT_COUNT - _DIFFERENTIABLE + 2))


attention.register_autograd(_backward, setup_context=_setup_context)


class _Recorded(torch.autograd.Function):
    """The operator's autograd without the operator."""

    @staticmethod
    def forward(ctx, *args):
        inputs = AttentionInputs(*args[:_INPUT_COUNT])
        ctx.backend = _backend_for(inputs, args[_INPUT_COUNT], True)
        output = _forward(inputs, ctx.backend)
        _setup_context(ctx, args, output)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        inputs, _, return_lse, out, lse, wanted = _saved(ctx)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        if _is_batched(grad_out) or _is_batched(grad_lse):
            return _backward(ctx, grad_out, grad_lse)
        grad_lse = grad_lse if return_lse else None
        with torch.no_grad():
            grads = _gradients(inputs, ctx.backend, out, lse, grad_out, grad_lse, wanted)
        if torch.is_grad_enabled():  # create_graph=True
            grads = _differentiable_once(grads, (*inputs.tensors, grad_out, grad_lse))
        return (*grads, *[None] * (_INPUT_COUNT - _DIFFERENTIABLE + 2))


def _is_batched(grad: Tensor | None) -> bool:
    """Whether it stands for several, as with is_grads_batched=True; torch runs an operator for one after the other."""
    return grad is not None and (
        torch._C._functorch.is_batchedtensor(grad) or torch._C._functorch.is_legacy_batchedtensor(grad)
    )


def _differentiable_once(grads: list[Tensor | None], sources: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Gradients that raise RuntimeError where they are differentiated by any of their sources; torch's once_differentiable
    lets those pass as constants that come from a grad_out without a gradient, as that of a sum."""
    tensors = [tensor for tensor in (*grads, *sources) if tensor is not None]
    message = "prefix_attention: trying to differentiate twice, which is not served"
    handed = iter(torch._C._functions.DelayedError(message, len(tensors))(*tensors))
    return [None if grad is None else next(handed) for grad in grads]


def run(inputs: AttentionInputs, backend: str | None, return_lse: bool) -> tuple[Tensor, Tensor]:
    """(out, lse); through the operator where something traces, counts or transforms what is called."""
    compiling = torch.compiler.is_compiling()
    if compiling or not is_plain(inputs):
        tracked = () if compiling else filter(torch._C._functorch.is_gradtrackingtensor, inputs.tensors)
        if any(tensor.requires_grad for tensor in tracked):
            raise NotImplementedError("torch.func.grad, vjp and what is built on them are not served: use torch.autograd")
        if not torch.is_grad_enabled():  # inside the operator it never is: there the tensors say whether gradients are wanted
            inputs = inputs._replace(**{name: getattr(inputs, name).detach() for name in inputs._fields[:_DIFFERENTIABLE]})
        return attention(*inputs, backend, return_lse)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs.tensors):
        return _Recorded.apply(*inputs, backend, return_lse)
    return _forward(inputs, _backend_for(inputs, backend, False))


def is_plain(inputs: AttentionInputs) -> bool:
    """Ordinary tensors with values: no subclass, no tracing or batching wrapper, no dispatch mode, not on the meta device."""
    if inputs.q.is_meta or intercepted():
        return False
    return all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in inputs.tensors)


def intercepted() -> bool:
    """Whether what is called now is transformed or counted."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
    )  # fmt: skip


def _refuse_forward_mode() -> None:
    """An operator has no rule for it: torch would go on with tangents of 0, without a word."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            "forward-mode differentiation (torch.autograd.forward_ad, torch.func.jvp, jacfwd) is not served: "
            "use reverse mode, or call this outside of dual_level()"
        )
