"""Every backend × every case: output, log-sum-exp and five gradients against float64, through the public API."""

import pytest
import torch

import prefix_kernels
from support.cases import CASES, Case
from support.compare import BACKENDS, DTYPES, compare, serves, slack_of
from support.inputs import make_inputs

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend(backend, case, dtype):
    # Without AVX-512 exp(0) of torch's kernels for 16 bit is 3e-5 off 1; eager's is exact.
    inexact = backend == "sdpa" and dtype != "float32" and case.scale == 0
    compare(case, *DTYPES[dtype], backend, slack=slack_of(case), lse_slack=30.0 if inexact else 1.0)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_prefix_gradient_over_many_rows(backend):
    """16 384 query rows of bfloat16 add up in the prefix's gradient. Summed in 16 bit it is off by 1.5e-2 of the maximum."""
    inputs = make_inputs(Case("many rows", batch=128, kv_heads=1, q_len=32, kv_len=32, prefix_len=8), *DTYPES["float32 prefix"])
    grad_out, results = torch.randn(inputs.tensors[0].shape).bfloat16(), []
    for name, tensors in ((backend, inputs), ("reference", inputs.to(torch.float64))):
        out = tensors.call(backend=name)
        results.append(torch.autograd.grad(out, tensors.tensors[3:], grad_out.to(out.dtype)))
    for grad, expected in zip(*results, strict=True):
        assert (grad - expected).abs().max() < 5e-3 * expected.abs().max()


@pytest.mark.parametrize("case", [Case("dense"), Case("bank", prefixes=2, prefix_ids=(1, 0)), Case("varlen", seqlens_q=(4, 3))])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_a_float32_prefix_never_passes_through_16_bit(backend, case):
    inputs = make_inputs(case, *DTYPES["float32 prefix"])
    inputs.call(backend=backend).square().sum().backward()
    for tensor in inputs.tensors[3:]:
        assert (tensor.grad != tensor.grad.bfloat16()).float().mean() > 0.9


@pytest.mark.parametrize("level", [-1e9, -1e20, -6e21, -3.2e22])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_that_leaves_no_digits_of_the_scores(backend, level):
    """Of a row without a prefix whose keys all have it, as those that a model hides by a large number: the weights are equal,
    as eager attention has them. Gradients that a kernel computes from the log-sum-exp, which is rounded, are off, not large."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 8, 16, requires_grad=True) for _ in range(3))
    prefix, bias = torch.zeros(1, 0, 16), torch.zeros(1, 1, 8, 8)
    bias[:, :, 0] = level
    out = prefix_kernels.prefix_attention(q, k, v, prefix, prefix, bias=bias, causal=False, backend=backend)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    eager = (q @ k.transpose(2, 3) / 4 + bias).softmax(-1) @ v
    torch.testing.assert_close(out, eager, atol=1e-5, rtol=1e-4)
    for grad, expected in zip(grads, torch.autograd.grad(eager.sum(), (q, k, v)), strict=True):
        assert grad.abs().max() < 20
        if backend == "reference":
            torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-4)


ABSENT = [case for case in CASES if (case.key_lens or case.prefix_lens or case.padding) and case.bias is None]


@pytest.mark.parametrize("case", ABSENT, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_nobody_sees_gets_gradients_of_exactly_zero(backend, case):
    """Keys past key_lens or hidden, prefix columns past prefix_lens, prefixes without a row, queries without a key."""
    inputs = make_inputs(case)
    if not serves(backend, inputs):
        return
    out, lse = inputs.call(backend=backend, return_lse=True)
    loss = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).square().sum()
    dq, *d_keys, dprefix_k, dprefix_v = torch.autograd.grad(loss, inputs.tensors)
    blind = lse == -torch.inf if case.seqlens_q is None else -torch.inf == lse.T
    assert not out[blind].any() and not dq[blind].any()
    for grad in d_keys:
        if case.key_lens is not None:
            assert not any(grad[row, :, fill:].any() for row, fill in enumerate(case.key_lens))
        if case.padding is not None:
            assert not grad.transpose(1, 2)[~inputs.options["key_mask"]].any()
    for grad in (dprefix_k, dprefix_v):
        for index in range(case.prefixes or 0):
            length = case.prefix_len if case.prefix_lens is None else case.prefix_lens[index]
            assert not grad[index, :, length if index in case.prefix_ids else 0 :].any()


STRIDES = {
    "last stride not 1": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "last stride 2": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "last stride 0": lambda t: t[..., :1].expand(t.shape),
    "all strides 0": lambda t: t.flatten()[0].expand(t.shape),
    "first axis expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("which", range(5), ids=("q", "k", "v", "prefix_k", "prefix_v"))
@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend, layout, which):
    """The same values in another layout give the same output and gradients."""
    inputs = make_inputs(Case("strides", key_lens=(9, 9)))
    values = [tensor.detach() for tensor in inputs.tensors]
    values[which] = STRIDES[layout](values[which])
    assert values[which].stride() != inputs.tensors[which].stride()
    results = []
    for tensors in (values, [tensor.contiguous() for tensor in values]):
        inputs.tensors = tuple(tensor.detach().requires_grad_() for tensor in tensors)
        out = inputs.call(backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs.tensors)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value_dim", [16, 48])
@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_last(backend, value_dim):
    """Padding keeps that layout, in which the heads have stride 1."""
    inputs = make_inputs(Case("value_dim", value_dim=value_dim))
    tensors = [tensor.detach().clone() for tensor in inputs.tensors]
    layouts = [torch.channels_last] * 3 + [torch.contiguous_format] * 2
    results = []
    for values in (tensors, [t.contiguous(memory_format=to) for t, to in zip(tensors, layouts, strict=True)]):
        inputs.tensors = tuple(tensor.requires_grad_() for tensor in values)
        out, lse = inputs.call(backend=backend, return_lse=True)
        results.append((out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), inputs.tensors)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [Case("dense"), Case("folded one query", q_len=1), Case("varlen", seqlens_q=(4, 3))], ids=str)
@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_of_the_gradients_that_come_in(backend, layout, case, with_lse):
    inputs = make_inputs(case)
    outputs = inputs.call(backend=backend, return_lse=True)
    values = [STRIDES[layout](torch.randn(tensor.shape)) for tensor in outputs]
    count = 2 if with_lse else 1
    results = [
        torch.autograd.grad(outputs[:count], inputs.tensors, grads[:count], retain_graph=True)
        for grads in (values, [tensor.contiguous() for tensor in values])
    ]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("broken", range(5), ids=("q", "k", "v", "prefix_k", "prefix_v"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_that_is_seen_shows(backend, broken):
    """A diverged prefix or model must not vanish in the merge of the two parts.

    With fewer than 16 keys torch's own CPU kernel takes a row of NaN scores for a hidden one, and gives 0.
    """
    tensors = [tensor.detach() for tensor in make_inputs(Case("plain", causal=False, kv_len=16, prefix_len=16)).tensors]
    tensors[broken].fill_(torch.nan)
    assert prefix_kernels.prefix_attention(*tensors, causal=False, backend=backend).isnan().all()
