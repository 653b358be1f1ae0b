"""The CUDA branch of the sdpa backend without a GPU: torch's CUDA kernels emulated on the CPU, by the rules they check.

What remains for a GPU: that the kernels do what the emulation says, and every case on the device itself (the last test).
"""

from dataclasses import replace

import pytest
import torch

import prefix_kernels
from prefix_kernels.backends import sdpa
from prefix_kernels.select import BACKENDS
from support.cases import CASES, Case
from support.compare import DTYPES, compare
from support.emulated_cuda import EmulatedCuda
from support.inputs import make_inputs

FLASH, FLASH_BACKWARD = "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"
EFFICIENT, EFFICIENT_BACKWARD = "_efficient_attention_forward", "_efficient_attention_backward"
CUDA_DTYPES = [name for name in DTYPES if name != "float64"]


def on(monkeypatch, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@pytest.fixture
def calls(monkeypatch):
    """The sdpa backend believes its tensors to lie on an H100. Gives the calls it makes."""
    mode, why_not, forward, backward = EmulatedCuda(), sdpa.why_not, sdpa.forward, sdpa.backward

    def within(function):
        def call(*args):
            with mode:
                return function(*args)

        return call

    monkeypatch.setattr(sdpa, "why_not", lambda problem: why_not(problem._replace(device="cuda")))
    monkeypatch.setattr(sdpa, "forward", within(forward))
    monkeypatch.setattr(sdpa, "backward", within(backward))
    on(monkeypatch)
    return mode.calls


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(calls, case, dtype):
    """Outputs and gradients as good as eager attention's; what CUDA does not serve is refused."""
    compare(case, *DTYPES[dtype], "sdpa")
    refused = case.softcap is not None or case.prefixes is not None or case.seqlens_q is not None
    nothing = case.batch == 0 or case.q_len == 0 or (case.kv_len == 0 and case.prefix_len == 0)
    assert bool(calls) == (not refused and not nothing and case.name != "no keys, no prefix")


LONG = Case("long", q_len=40, kv_len=70, batch=3, prefix_len=33, heads=6, kv_heads=2)


@pytest.mark.parametrize("dtype", ["float32", "float32 prefix"])
@pytest.mark.parametrize(
    "change",
    [{}, {"padding": "left"}, {"window": 9}, {"key_lens": (70, 41, 3)}, {"causal": False}, {"bias": (0, 0, 0, 0)},
     {"head_dim": 256}, {"head_dim": 260}, {"value_dim": 40}, {"q_len": 1}, {"q_len": 1, "padding": "holes"}, {"scale": -0.2}],
    ids=str,
)  # fmt: skip
def test_more_rows_than_one_block(calls, change, dtype):
    compare(replace(LONG, **change), *DTYPES[dtype], "sdpa")
    assert calls


def run(case, dtype, with_lse=False, **options):
    inputs = make_inputs(case, *DTYPES[dtype])
    inputs.options |= options
    outputs = inputs.call(backend="sdpa", return_lse=with_lse)
    sum(output.sum() for output in (outputs if with_lse else [outputs])).backward()


def summary(call):
    causal = call.is_causal if "flash" in call.operator else bool(call.custom_mask_type)
    return call.operator, tuple(call.query.shape), tuple(call.key.shape), causal


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32 prefix"])
def test_flash_attention_in_16_bit(calls, dtype):
    """One pass over the prefix for all rows and the group's heads, one over the keys all queries see, one causal and square."""
    run(Case("chunk", batch=2, heads=4, kv_heads=2, q_len=4, kv_len=20, head_dim=32, prefix_len=5), dtype)
    passes = [
        ((2, 4, 4, 32), (2, 2, 16, 32), False), ((2, 4, 4, 32), (2, 2, 4, 32), True), ((1, 2, 16, 32), (1, 2, 5, 32), False),
    ]  # fmt: skip
    assert [summary(call) for call in calls] == [
        *((FLASH, *one) for one in passes),
        *((FLASH_BACKWARD, *one) for one in passes),
    ]
    assert all(call.scale == 32**-0.5 for call in calls)


def test_memory_efficient_attention_in_float32(calls):
    """The same passes with the heads of a group repeated for the sequence, not for the prefix."""
    run(Case("chunk", batch=2, heads=4, kv_heads=2, q_len=4, kv_len=20, head_dim=32, prefix_len=5), "float32")
    passes = [
        ((2, 4, 4, 32), (2, 16, 4, 32), False), ((2, 4, 4, 32), (2, 4, 4, 32), True), ((1, 16, 2, 32), (1, 5, 2, 32), False),
    ]  # fmt: skip
    assert [summary(call) for call in calls] == [
        *((EFFICIENT, *one) for one in passes),
        *((EFFICIENT_BACKWARD, *one) for one in passes),
    ]
    assert all(call.bias is None for call in calls)


@pytest.mark.parametrize("options", [{"padding": "left"}, {"window": 3}, {"key_lens": (9, 4)}], ids=str)
def test_a_mask_takes_the_memory_efficient_kernel_and_leaves_flash_the_prefix(calls, options):
    run(Case("masked", **options), "bfloat16")
    assert [call.operator for call in calls] == [EFFICIENT, FLASH, EFFICIENT_BACKWARD, FLASH_BACKWARD]
    assert all(call.query.dtype == torch.bfloat16 for call in calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float32_bias_is_not_rounded(calls, dtype):
    """Beside a float32 bias 16-bit inputs are widened; a bias of their own dtype keeps the fast kernel."""
    run(Case("plain"), "bfloat16", bias=torch.randn(1, 4, 9, 14, dtype=dtype))
    assert calls and {call.query.dtype for call in calls} == {dtype}
    assert {call.operator for call in calls} == {EFFICIENT, EFFICIENT_BACKWARD}


def test_a_gradient_of_lse_rides_in_one_more_value_channel(calls):
    run(Case("plain", head_dim=32), "bfloat16", with_lse=True)
    assert {(call.operator, call.query.shape[-1]) for call in calls} == {(FLASH, 32), (FLASH_BACKWARD, 40)}


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (12, 0)])
def test_flash_attention_needs_compute_capability_8(monkeypatch, calls, capability):
    on(monkeypatch, capability)
    run(Case("plain"), "float16")
    expected = {FLASH, FLASH_BACKWARD} if capability >= (8, 0) else {EFFICIENT, EFFICIENT_BACKWARD}
    assert {call.operator for call in calls} == expected


def test_deterministic_switch_is_put_back(calls):
    for before, warn_only in ((False, False), (True, True), (True, False)):
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        try:
            run(Case("plain"), "bfloat16")
            assert torch.are_deterministic_algorithms_enabled() == before
            assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_aligned_tensors_are_read_where_they_lie(calls, dtype):
    """No copy of q, k, v or the prefix that the kernels could read as they are."""
    inputs = make_inputs(Case("plain", heads=2, kv_heads=2), *DTYPES[dtype])
    inputs.tensors = tuple(tensor.detach().contiguous() for tensor in inputs.tensors)
    inputs.call(backend="sdpa")
    sequence, prefix = calls
    for call, tensors in ((sequence, inputs.tensors[:3]), (prefix, inputs.tensors[3:])):
        read = (call.query, call.key, call.value)[-len(tensors) :]
        assert [tensor.data_ptr() for tensor in read] == [tensor.data_ptr() for tensor in tensors]


def test_refusals(calls):
    expected = {
        Case("bank", prefixes=2, prefix_ids=(0, 1)): "a bank or packed sequences would need index values on the host",
        Case("varlen", seqlens_q=(3, 2)): "a bank or packed sequences would need index values on the host",
        Case("softcap", softcap=1.0): "torch's kernels know no softcap",
    }
    for case, reason in expected.items():
        inputs = make_inputs(case)
        explanation = prefix_kernels.explain_backends(*inputs.tensors, **inputs.options)
        assert explanation["sdpa"] == f"refused: {reason}"
    double = make_inputs(Case("plain"), torch.float64)
    assert prefix_kernels.explain_backends(*double.tensors)["sdpa"] == "refused: torch's CUDA kernels know no float64"
    assert not calls


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("options", [{}, {"padding": "left"}, {"q_len": 1, "kv_len": 20}], ids=str)
def test_torch_accepts_the_calls(calls, options, with_lse, dtype):
    """Every recorded call goes through the real operator's schema and shape function, and gives what the emulation gave."""
    run(Case("fake", **options), dtype, with_lse)
    assert len(calls) == 4
    for call in calls:
        operator = getattr(torch.ops.aten, call.operator)
        with pytest.raises(NotImplementedError, match=f"Could not run 'aten::{call.operator}' with arguments from the 'CPU'"):
            operator(*call.args, **call.kwargs)
        if call.operator == EFFICIENT_BACKWARD:
            continue  # torch's own shape function lacks the argument `out` (2.13)
        args = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in call.args]
        results = operator(*args, **call.kwargs)
        count = 3 if call.operator.endswith("backward") else 2
        for got, expected in zip(results[:count], call.result[:count], strict=True):
            assert (got.shape, got.dtype) == (expected.shape, expected.dtype)


GPU_SAMPLE = (
    "plain", "mha", "mqa", "head_dim 80", "head_dim 256", "value_dim above head_dim", "long prefix", "long sequence",
    "decode", "chunked prefill", "chunked prefill, padded", "left padding", "holes", "hidden row", "everything hidden",
    "not causal", "scale zero", "window", "window, padded", "sliding prefix", "softcap", "fill", "fill, ragged",
    "fill below the queries", "bias", "bias that hides", "bank", "bank, lengths", "varlen", "varlen, bank", "parent",
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in CASES if case.name in GPU_SAMPLE], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_the_gpu(backend, case, dtype):
    compare(case, *DTYPES[dtype], backend, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("options", [{}, {"padding": "left"}], ids=str)
def test_the_same_bits_on_the_gpu(options, dtype):
    case = Case("many rows", batch=8, q_len=512, kv_len=512, prefix_len=256, **options)
    inputs, runs = make_inputs(case, *DTYPES[dtype], device="cuda"), []
    for _ in range(2):
        out, lse = inputs.call(backend="sdpa", return_lse=True)
        runs.append((out, lse, *torch.autograd.grad(out.float().square().sum() + lse.sum(), inputs.tensors)))
    for value, other in zip(*runs, strict=True):
        assert torch.equal(value, other)
