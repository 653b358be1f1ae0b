"""The operators under torch's machinery: opcheck, compile, autocast, transforms; what is computed at all, and its bits."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import prefix_kernels
from prefix_kernels import ops
from prefix_kernels.backends import sdpa
from support.cases import CASES, Case
from support.compare import BACKENDS, DTYPES, gradients, serves
from support.inputs import make_inputs
from support.oracle import naive_attention

SAMPLE = (
    "plain", "mqa", "value_dim above head_dim", "no prefix", "decode", "batch of one", "empty batch", "no queries",
    "left padding", "scale", "window, padded", "sliding prefix, fill", "softcap", "fill, ragged", "bias, bank",
    "bank, lengths", "varlen", "varlen, bank", "varlen, no sequence", "parent",
)  # fmt: skip
SAMPLE_CASES = [case for case in CASES if case.name in SAMPLE]
assert len(SAMPLE_CASES) == len(SAMPLE)
COMPILED_CASES = [case for case in SAMPLE_CASES if case.name not in ("empty batch", "no queries", "varlen, no sequence")]
BANK = Case("bank", prefixes=2, batch=3, prefix_ids=(1, -1, 0), prefix_lens=(3, 5))
PACKED = Case("varlen", seqlens_q=(5, 3))


def of(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


def public(inputs):
    dense = "cu_seqlens_q" not in inputs.options
    return prefix_kernels.prefix_attention if dense else prefix_kernels.prefix_attention_varlen


def fixed_gradients(out, lse):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype) for tensor in (out, lse)]


def run(inputs, function=None, **more):
    """(out, lse, five gradients) with fixed random gradients of out and lse."""
    function = function or public(inputs)
    out, lse = function(*inputs.tensors, **inputs.options, return_lse=True, **more)
    return out.detach(), lse.detach(), *gradients(inputs, out, lse, *fixed_gradients(out, lse))


@pytest.fixture
def through_the_operator(monkeypatch):
    monkeypatch.setattr(ops, "is_plain", lambda inputs: False)


def opcheck(name, arguments, differentiable, **tolerance):
    arguments = [value.detach() if isinstance(value, torch.Tensor) else value for value in arguments]
    arguments = [  # opcheck cannot represent an empty slice of something larger
        value.new_empty(value.shape) if isinstance(value, torch.Tensor) and not value.numel() else value for value in arguments
    ]
    if differentiable:
        arguments[:5] = [tensor.requires_grad_() for tensor in arguments[:5]]
    torch.library.opcheck(getattr(torch.ops.prefix_kernels, name), tuple(arguments), **tolerance)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, "float32") for case in SAMPLE_CASES),
        *((case, "float32 prefix") for case in SAMPLE_CASES if case.name in ("mqa", "bank, lengths", "varlen, bank")),
    ],
    ids=str,
)
def test_opcheck(operator_calls, through_the_operator, case, dtype):
    """Schema, fake implementation, autograd and dispatch of both operators, on the arguments that a public call gives them."""
    inputs = make_inputs(case, *DTYPES[dtype])
    if case.key_lens or case.prefix_lens:  # what may be NaN is not equal to itself
        inputs.tensors = tuple(tensor.detach().nan_to_num().requires_grad_() for tensor in inputs.tensors)
    run(inputs)
    (forward,), (backward,) = (tuple(calls) for calls in operator_calls.values())
    tolerance = {} if dtype == "float32" else {"rtol": 1e-2, "atol": 1e-2}
    opcheck("attention", forward, True, **tolerance)
    opcheck("attention_backward", backward, False, **tolerance)


@pytest.mark.parametrize("wanted", [(True, False, False, True, True), (False, False, True, False, True)])
def test_opcheck_of_some_gradients(operator_calls, through_the_operator, wanted):
    inputs = make_inputs(BANK)
    inputs.tensors = tuple(t.detach().nan_to_num().requires_grad_(w) for t, w in zip(inputs.tensors, wanted, strict=True))
    inputs.call().sum().backward()
    (backward,) = tuple(operator_calls["attention_backward"])
    opcheck("attention_backward", backward, False)


@pytest.mark.parametrize("backend", BACKENDS)
@of(SAMPLE_CASES)
def test_memory_order(backend, case):
    """Outputs and gradients lie token by token, as the output projection of a model reads them, and alias nothing."""
    inputs = make_inputs(case)
    if not serves(backend, inputs):
        return
    out, lse, *grads = run(inputs, backend=backend)
    for tensor in (out, *grads[:3]):
        assert (tensor.transpose(1, 2) if tensor.dim() == 4 else tensor).is_contiguous()
    assert all(tensor.is_contiguous() for tensor in (lse, *grads[3:]))
    storages = [t.untyped_storage().data_ptr() for t in (*inputs.tensors, out, lse, *grads) if t.numel()]
    assert len(set(storages)) == len(storages)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in (out, lse, *grads))  # keeps alive nothing but itself


@of(COMPILED_CASES)
def test_compiled_equals_eager(case):
    inputs = make_inputs(case)
    expected = run(inputs)
    torch.compiler.reset()
    compiled = torch.compile(public(inputs), backend="aot_eager", fullgraph=True)
    got = run(inputs, function=compiled)
    for value, other in zip(got, expected, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("dtype", ["float32", "float32 prefix"])
def test_compiled_once_for_many_lengths(dtype):
    """Batch, queries, keys and prefix may all be dynamic: one graph forward and one backward."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(prefix_kernels.prefix_attention, backend=counter, fullgraph=True)
    for batch, q_len, kv_len, prefix_len in ((2, 5, 7, 3), (3, 9, 16, 8), (4, 2, 6, 150), (2, 6, 8, 4)):
        inputs = make_inputs(
            Case("lengths", batch=batch, q_len=q_len, kv_len=kv_len, prefix_len=prefix_len, contiguous=True), *DTYPES[dtype]
        )
        inputs.tensors = tuple(tensor.detach().contiguous().requires_grad_() for tensor in inputs.tensors)
        inputs.options |= {"key_mask": torch.ones(batch, kv_len, dtype=torch.bool)}
        expected = run(inputs)
        for tensor, axes in zip(inputs.tensors, ((0, 2), (0, 2), (0, 2), (1,), (1,)), strict=True):
            torch._dynamo.mark_dynamic(tensor, axes)
        torch._dynamo.mark_dynamic(inputs.options["key_mask"], (0, 1))
        for value, other in zip(run(inputs, function=compiled), expected, strict=True):
            assert torch.equal(value, other)
    assert counter.frame_count == 1


def test_compiled_once_for_many_packs():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(prefix_kernels.prefix_attention_varlen, backend=counter, fullgraph=True)
    for seqlens in ((4, 3), (2, 6, 3), (9, 1, 5, 5)):
        inputs = make_inputs(Case("pack", seqlens_q=seqlens))
        inputs.tensors = tuple(tensor.detach().contiguous().requires_grad_() for tensor in inputs.tensors)
        inputs.options |= {"max_seqlen_q": 16, "max_seqlen_k": 16}
        expected = run(inputs)
        for tensor in (*inputs.tensors[:3], inputs.options["cu_seqlens_q"], inputs.options["cu_seqlens_k"]):
            torch._dynamo.mark_dynamic(tensor, 0)
        for value, other in zip(run(inputs, function=compiled), expected, strict=True):
            assert torch.equal(value, other)
    assert counter.frame_count == 1


def test_compiled_once_for_many_windows():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(prefix_kernels.prefix_attention, backend=counter, fullgraph=True, dynamic=True)
    inputs = make_inputs(Case("plain"))
    for window in (2, 3, 4):
        options = {"window": window, "first_key_position": window + 1}
        assert torch.equal(compiled(*inputs.tensors, **options), prefix_kernels.prefix_attention(*inputs.tensors, **options))
    assert counter.frame_count == 1


def test_compiled_with_numbers_of_numpy():
    torch.compiler.reset()
    compiled = torch.compile(prefix_kernels.prefix_attention, backend="aot_eager")
    inputs = make_inputs(Case("plain"))
    out = compiled(*inputs.tensors, window=np.int64(2), scale=np.float32(0.5))
    assert torch.equal(out, prefix_kernels.prefix_attention(*inputs.tensors, window=2, scale=0.5))


def test_a_backend_is_chosen_when_a_compiled_call_runs(monkeypatch, backend_calls):
    """Neither the variable nor a backend's limits become part of the graph."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(prefix_kernels.prefix_attention, backend=counter, fullgraph=True)
    inputs = make_inputs(Case("plain"))
    for name in ("reference", "sdpa"):
        monkeypatch.setenv("PREFIX_KERNELS_BACKEND", name)
        compiled(*inputs.tensors).sum().backward()
        assert [call[:2] for call in backend_calls] == [(name, "forward"), (name, "backward")]
        backend_calls.clear()
    assert counter.frame_count == 1


@pytest.mark.parametrize("case", [Case("plain"), PACKED], ids=str)
def test_shapes_on_the_meta_device(case):
    inputs = make_inputs(case, device="meta")
    outputs = inputs.call(return_lse=True)
    grads = torch.autograd.grad(outputs, inputs.tensors, [torch.empty_like(tensor) for tensor in outputs])
    for got, expected in zip((*outputs, *grads), run(make_inputs(case)), strict=True):
        assert got.is_meta and (got.shape, got.stride(), got.dtype) == (expected.shape, expected.stride(), expected.dtype)


WANTED = [
    (False, False, False, True, True), (False, False, False, True, False), (False, True, True, False, False),
    (True, False, False, False, False), (True, False, False, True, True), (True, True, True, True, True),
]  # fmt: skip


@pytest.mark.parametrize("case", [Case("dense", q_len=4, kv_len=12), BANK, PACKED], ids=str)
@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_gradients_that_nobody_needs_are_not_computed(monkeypatch, backend_calls, case, wanted):
    """The backend hears what is wanted; a pass over the prefix or the sequence that feeds none of it is not run."""
    inputs, prefix_passes, attend_backward = make_inputs(case), [], sdpa.attend_backward
    expected = run(inputs, backend="reference")[2:]

    def spy(grad_out, grad_lse, q, k, *more):
        prefix_passes.append(k.untyped_storage().data_ptr() == inputs.tensors[3].untyped_storage().data_ptr())
        return attend_backward(grad_out, grad_lse, q, k, *more)

    monkeypatch.setattr(sdpa, "attend_backward", spy)
    backend_calls.clear()
    for tensor, needed in zip(inputs.tensors, wanted, strict=True):
        tensor.requires_grad_(needed)
    outputs = inputs.call(return_lse=True, backend="sdpa")
    torch.autograd.backward(outputs, fixed_gradients(*outputs))
    assert [call[2] for call in backend_calls] == [None, wanted]
    assert any(prefix_passes) == (wanted[0] or any(wanted[3:]))
    assert all(prefix_passes) == (not wanted[0] and not any(wanted[1:3]))
    for tensor, needed, grad in zip(inputs.tensors, wanted, expected, strict=True):
        assert (tensor.grad is not None) == needed
        if needed:
            torch.testing.assert_close(tensor.grad, grad, rtol=1e-4, atol=1e-5)


def test_no_gradient_no_backward(backend_calls):
    inputs = make_inputs(Case("plain"))
    with torch.no_grad():
        assert not inputs.call().requires_grad
    inputs.tensors = tuple(tensor.detach() for tensor in inputs.tensors)
    assert not inputs.call().requires_grad
    assert [call[1] for call in backend_calls] == ["forward", "forward"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [Case("plain"), Case("hidden row", padding="row", prefix_len=0), BANK, PACKED], ids=str)
def test_gradient_through_lse_alone(backend, case):
    inputs = make_inputs(case)
    lse = inputs.call(backend=backend, return_lse=True)[1]
    grads = torch.autograd.grad(lse.masked_fill(lse == -torch.inf, 0).square().sum(), inputs.tensors)
    lse = naive_attention(inputs)[1]
    expected = torch.autograd.grad(lse.masked_fill(lse == -torch.inf, 0).square().sum(), inputs.tensors, allow_unused=True)
    for grad, value in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, torch.zeros_like(grad) if value is None else value, rtol=1e-4, atol=1e-5)
    assert grads[0].abs().max() > 0.1 and not grads[2].any() and not grads[4].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_sinks_need_nothing_but_lse(backend):
    """out · sigmoid(lse − sink) is a softmax with one more column, of score `sink` and value 0: a prefix position."""
    inputs = make_inputs(Case("sink", prefix_len=3, head_dim=16))
    q, k, v, prefix_k, prefix_v = inputs.tensors
    out, lse = inputs.call(backend=backend, return_lse=True)
    sunk = out * torch.sigmoid(lse + 0.3)[..., None]
    bias = torch.zeros(1, 1, 1, 4 + k.shape[2])
    bias[..., 3] = -0.3
    column = prefix_k.new_zeros(2, 1, 16)
    expected = prefix_kernels.prefix_attention(
        q, k, v, torch.cat([prefix_k, column], 1), torch.cat([prefix_v, column], 1), bias=bias, backend="reference"
    )
    torch.testing.assert_close(sunk, expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(sunk.square().sum(), inputs.tensors)
    for grad, value in zip(grads, torch.autograd.grad(expected.square().sum(), inputs.tensors), strict=True):
        torch.testing.assert_close(grad, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [Case("plain"), BANK, PACKED], ids=str)
def test_autocast(backend, case):
    """q, k and v take autocast's dtype, the prefix keeps float32 and so does its gradient; nothing else changes inside."""
    inputs = make_inputs(case)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse, *grads = run(inputs, backend=backend)
    narrow = make_inputs(case)
    narrow.tensors = (*(t.detach().bfloat16().requires_grad_() for t in narrow.tensors[:3]), *narrow.tensors[3:])
    expected = run(narrow, backend=backend)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert [grad.dtype for grad in grads] == [torch.float32] * 5
    for value, other in zip((out, lse, *grads), expected, strict=True):
        assert torch.equal(value, other.to(value.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert inputs.to(torch.float64).call().dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert inputs.call(backend=backend).dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "float32 prefix"])
@pytest.mark.parametrize("backend", BACKENDS)
@of(SAMPLE_CASES)
def test_the_same_call_gives_the_same_bits(backend, case, dtype):
    inputs = make_inputs(case, *DTYPES[dtype])
    if not serves(backend, inputs):
        return
    for value, other in zip(run(inputs, backend=backend), run(inputs, backend=backend), strict=True):
        assert torch.equal(value, other)


def test_many_rows_give_the_same_bits():
    inputs = make_inputs(Case("many rows", batch=16, q_len=64, kv_len=64, prefix_len=40))
    for value, other in zip(run(inputs, backend="sdpa"), run(inputs, backend="sdpa"), strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("backend", BACKENDS)
@of(SAMPLE_CASES)
def test_inputs_are_not_modified(backend, case):
    inputs = make_inputs(case)
    if not serves(backend, inputs):
        return
    tensors = [*inputs.tensors, *(value for value in inputs.options.values() if isinstance(value, torch.Tensor))]
    before, versions = [tensor.detach().clone() for tensor in tensors], [tensor._version for tensor in tensors]
    run(inputs, backend=backend)
    assert [tensor._version for tensor in tensors] == versions
    for tensor, copy in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor.detach(), copy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", [Case("plain"), BANK, PACKED], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_eager_calls_pass_the_operator_by(operator_calls, monkeypatch, backend, case):
    """It costs more than a small step. Whatever traces, counts or wraps still goes through it."""
    inputs = make_inputs(case)
    past = run(inputs, backend=backend)
    assert not any(operator_calls.values())
    with monkeypatch.context() as patched:
        patched.setattr(ops, "is_plain", lambda inputs: False)
        through = run(inputs, backend=backend)
    assert all(operator_calls.values())
    operator_calls["attention"].clear()
    with torch.no_grad():
        past += inputs.call(return_lse=True, backend=backend)
        assert not operator_calls["attention"]
    for value, other in zip(past, [*through, *through[:2]], strict=True):
        assert torch.equal(value, other) and value.stride() == other.stride()
    assert not past[-1].requires_grad
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        inputs.call(backend=backend)
    assert operator_calls["attention"]
    operator_calls["attention"].clear()
    meta = make_inputs(case, device="meta")
    with torch.no_grad():
        assert meta.call().is_meta and meta.call(backend=backend).is_meta and operator_calls["attention"]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "enable_grad"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_is_refused(backend, grad):
    """torch drops the tangents of an operator that has no rule for them, and torch.func.jvp makes zeros of that."""
    q, *others = (tensor.detach() for tensor in make_inputs(Case("plain")).tensors)

    def function(q):
        return prefix_kernels.prefix_attention(q, *others, backend=backend)

    with torch.set_grad_enabled(grad):
        for _ in range(2):
            function(q)  # a call like an earlier one
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="^forward-mode differentiation"):
            function(forward_ad.make_dual(q, q))
        for transformed in (lambda: torch.func.jvp(function, (q,), (q,)), lambda: torch.func.jacfwd(function)(q)):
            with pytest.raises(NotImplementedError, match="^forward-mode differentiation"):
                transformed()
        torch.compiler.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="forward-mode differentiation"):
            torch.compile(lambda q: torch.func.jvp(function, (q,), (q,)), backend="eager", fullgraph=True)(q)


def test_reverse_mode_of_torch_func_is_refused():
    q, *others = (tensor.detach() for tensor in make_inputs(Case("plain")).tensors)
    with pytest.raises(NotImplementedError, match="^torch.func.grad, vjp and what is built on them are not served"):
        torch.func.grad(lambda q: prefix_kernels.prefix_attention(q, *others).sum())(q)
    out = prefix_kernels.prefix_attention(q, *others)
    factor, grad = torch.ones(()), torch.func.grad(lambda factor: (prefix_kernels.prefix_attention(q, *others) * factor).sum())
    torch.testing.assert_close(grad(factor), out.sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_several_vectors_at_once(backend):
    inputs = make_inputs(Case("plain"))
    out, lse = inputs.call(backend=backend, return_lse=True)
    many = [torch.randn(3, *tensor.shape) for tensor in (out, lse)]
    for outputs, vectors in (((out, lse), many), ((out,), many[:1]), ((lse,), many[1:])):
        batched = torch.autograd.grad(outputs, inputs.tensors, vectors, is_grads_batched=True, retain_graph=True)
        for i in range(3):
            grads = torch.autograd.grad(outputs, inputs.tensors, [vector[i] for vector in vectors], retain_graph=True)
            assert all(torch.equal(several[i], grad) for several, grad in zip(batched, grads, strict=True))
    batched = torch.autograd.grad(out, inputs.tensors[:1], many[0], is_grads_batched=True, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(batched[0].sum(), inputs.tensors[:1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap(backend):
    """One call after the other, gradients too."""
    q, *others = make_inputs(Case("plain")).tensors
    many = torch.stack([q.detach(), 2 * q.detach()]).requires_grad_()
    results = []
    for out in (
        torch.vmap(lambda q: prefix_kernels.prefix_attention(q, *others, backend=backend))(many),
        torch.stack([prefix_kernels.prefix_attention(q, *others, backend=backend) for q in many]),
    ):
        results.append((out, *torch.autograd.grad(out.square().sum(), (many, *others))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_lse_alone(backend):
    inputs = make_inputs(Case("plain"))
    lses = [inputs.call(return_lse=True, backend=name)[1] for name in (backend, "reference")]
    for value, other in zip(*(torch.autograd.grad(lse.sum(), inputs.tensors) for lse in lses), strict=True):
        torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-4)
