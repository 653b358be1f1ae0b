"""The CUDA branch of the sdpa backend without a GPU: torch's CUDA kernels emulated on the CPU, by the rules they check.

What remains for a GPU: that the kernels do what the emulation says, and every case on the device itself (the last tests).
"""

import threading
from dataclasses import replace

import pytest
import torch

import prefix_kernels
from prefix_kernels.backends import sdpa
from prefix_kernels.backends.sdpa import passes, stock
from prefix_kernels.select import BACKENDS
from support.cases import CASES, Case
from support.compare import DTYPES, compare
from support.emulated_cuda import EmulatedCuda
from support.inputs import make_inputs

FLASH, FLASH_BACKWARD = "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"
CUDNN = "_scaled_dot_product_cudnn_attention"
EFFICIENT, EFFICIENT_BACKWARD = "_efficient_attention_forward", "_efficient_attention_backward"
CUDA_DTYPES = [name for name in DTYPES if name != "float64"]


def on(monkeypatch, capability=(9, 0), cudnn=91900):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)


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
    monkeypatch.setattr(sdpa, "_merge_kernel", lambda: None)
    on(monkeypatch)
    return mode.calls


FORWARD_ENGINES = {"flash": 2**31, "cudnn": 1}  # the fewest queries that go to cuDNN
FOLDS = {"batch": {"EXPAND_BELOW": 0}, "expanded": {"EXPAND_UP_TO": 10**6}, "group": {"GROUP_UP_TO": 10**6}}


def choose(monkeypatch, engine, fold="batch"):
    """The engine of the forward pass; how the queries of a pass over the prefix are folded."""
    monkeypatch.setattr(stock, "CUDNN_FEWEST_QUERIES", FORWARD_ENGINES[engine])
    for name, value in FOLDS[fold].items():
        monkeypatch.setattr(passes, name, value)


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(calls, case, dtype):
    """Outputs and gradients as good as eager attention's; what CUDA does not serve is refused."""
    compare(case, *DTYPES[dtype], "sdpa")
    refused = case.softcap is not None or case.prefixes is not None or case.seqlens_q is not None
    nothing = case.batch == 0 or case.q_len == 0 or (case.kv_len == 0 and case.prefix_len == 0)
    assert bool(calls) == (not refused and not nothing and case.name != "no keys, no prefix")


SQUARE = (2, 4, 64, 128)


@pytest.mark.parametrize(("engine", "q", "k", "cudnn"), [
    ("cudnn", SQUARE, SQUARE, 91501), ("flash", SQUARE, SQUARE, 91500), ("flash", SQUARE, SQUARE, None),
    ("flash", (2, 4, 63, 128), SQUARE, 91501),
    ("flash", SQUARE, (2, 4, 1, 128), 91501), ("cudnn", SQUARE, (2, 4, 2, 128), 91501),
    ("flash", (2, 4, 64, 136), (2, 4, 64, 136), 91501), ("efficient", (2, 4, 64, 264), (2, 4, 64, 264), 91501),
    ("cudnn", (65535, 1, 64, 64), (65535, 1, 64, 64), 91501), ("flash", (65536, 1, 64, 64), (65536, 1, 64, 64), 91501),
    ("cudnn", (1, 65535, 64, 64), (1, 1, 64, 64), 91501), ("flash", (1, 65536, 64, 64), (1, 1, 64, 64), 91501),
    ("cudnn", (1, 64, 2**18 - 1, 128), SQUARE, 91501), ("flash", (1, 64, 2**18, 128), SQUARE, 91501),
    ("flash", SQUARE, (1, 64, 2**18, 128), 91501),
])  # fmt: skip
def test_what_goes_to_cudnn(monkeypatch, engine, q, k, cudnn):
    on(monkeypatch, cudnn=cudnn)
    q, k = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in (q, k))
    assert stock.engine_of(q, k, None, backward=False) == engine
    assert stock.engine_of(q, k, None, backward=True) == ("flash" if engine == "cudnn" else engine)


SERVED = [
    case for case in CASES
    if case.softcap is None and case.prefixes is None and case.seqlens_q is None and case.batch and case.q_len and case.kv_len
]  # fmt: skip
WITHOUT_MASK = [
    case for case in SERVED
    if case.padding is None and case.key_lens is None and case.bias is None and case.window is None
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("engine", FORWARD_ENGINES)
@pytest.mark.parametrize("case", WITHOUT_MASK, ids=str)
def test_engines(monkeypatch, calls, case, engine, fold, dtype):
    """Every combination of an engine and a folding gives every result."""
    choose(monkeypatch, engine, fold)
    compare(case, *DTYPES[dtype], "sdpa")
    used = {call.operator for call in calls}
    assert used & {FLASH, CUDNN} and used <= {
        FLASH, FLASH_BACKWARD if case.head_dim < 256 else EFFICIENT_BACKWARD,  # one more channel, for the gradient of lse
        CUDNN if engine == "cudnn" and case.head_dim <= 128 else FLASH,
    }  # fmt: skip


@pytest.mark.parametrize("case", [case for case in SERVED if case not in WITHOUT_MASK], ids=str)
def test_engines_beside_masks(monkeypatch, calls, case):
    choose(monkeypatch, "cudnn", "expanded")
    compare(case, *DTYPES["bfloat16"], "sdpa")
    assert any(call.operator == EFFICIENT for call in calls) or case.name == "window wider than the keys"


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


@pytest.mark.parametrize(
    "change",
    [{}, {"q_len": 33, "kv_len": 70}, {"q_len": 33, "kv_len": 70, "contiguous": True}, {"prefix_len": 0}, {"head_dim": 128}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("engine", FORWARD_ENGINES)
def test_engines_over_more_rows_than_one_block(monkeypatch, calls, engine, fold, change):
    choose(monkeypatch, engine, fold)
    compare(replace(LONG, **change), *DTYPES["bfloat16"], "sdpa")
    assert calls


def run(case, dtype, with_lse=False, **options):
    inputs = make_inputs(case, *DTYPES[dtype])
    inputs.options |= options
    outputs = inputs.call(backend="sdpa", return_lse=with_lse)
    sum(output.sum() for output in (outputs if with_lse else [outputs])).backward()


def summary(call):
    causal = bool(call.custom_mask_type) if "efficient" in call.operator else call.is_causal
    return call.operator, tuple(call.query.shape), tuple(call.key.shape), causal


def results_without_lse(case, dtype, backend, device="cpu"):
    """out and five gradients, where lse has none."""
    inputs = make_inputs(case, dtype, device=device)
    out = inputs.call(backend=backend)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype).to(device)
    return out.detach(), *torch.autograd.grad(out, inputs.tensors, grad_out)


def compare_without_lse(case, device):
    """In bfloat16 against the reference backend."""
    got = results_without_lse(case, torch.bfloat16, "sdpa", device)
    for value, expected in zip(got, results_without_lse(case, torch.bfloat16, "reference", device), strict=True):
        assert (value - expected).float().norm() <= 0.02 * expected.float().norm()
    return got


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("engine", FORWARD_ENGINES)
def test_engines_without_a_gradient_of_lse(monkeypatch, calls, engine, fold):
    choose(monkeypatch, engine, fold)
    compare_without_lse(LONG, "cpu")
    assert {call.query.shape[-1] for call in calls} == {LONG.head_dim}


def test_the_memory_efficient_kernel_gets_a_short_prefix_row_by_row(calls):
    """In the backward pass, where it has one program for a head of a row."""
    case = Case("chunk", batch=2, heads=4, kv_heads=2, q_len=12, kv_len=20, head_dim=32, prefix_len=5)
    for prefix_len, passes_over_all_rows in ((4 * 12, 0), (4 * 12 + 1, 1)):
        calls.clear()
        compare(replace(case, prefix_len=prefix_len), *DTYPES["float32"], "sdpa")
        rows = [call.query.shape[0] for call in calls if call.operator == EFFICIENT_BACKWARD]
        assert rows.count(1) == passes_over_all_rows and rows.count(2) > 0


@pytest.mark.parametrize(
    "options", [{"bias": (0, 0, 0, 0)}, {"bias": (1, 0, 0, 0)}, {"window": 30, "first_key_position": 0}], ids=str
)
def test_a_masked_prefix_is_one_pass_but_for_gradients_of_a_long_one(calls, options):
    case = Case("masked", batch=3, q_len=12, kv_len=12, **options)
    for prefix_len, single_rows in ((4 * 12, 0), (4 * 12 + 1, 3)):
        calls.clear()
        compare(replace(case, prefix_len=prefix_len), *DTYPES["float32"], "sdpa")
        rows = {
            name: [call.query.shape[0] for call in calls if call.operator == name] for name in (EFFICIENT, EFFICIENT_BACKWARD)
        }
        assert set(rows[EFFICIENT]) == {3} and rows[EFFICIENT_BACKWARD].count(1) == single_rows


CHUNK = Case("chunk", batch=2, heads=4, kv_heads=2, q_len=12, kv_len=20, head_dim=32, prefix_len=5)
PREFIX_PASS = {
    "batch": ((1, 4, 24, 32), (1, 2, 5, 32), False), "expanded": ((2, 4, 12, 32), (2, 2, 5, 32), False),
    "group": ((1, 2, 48, 32), (1, 2, 5, 32), False),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32 prefix"])
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("engine", FORWARD_ENGINES)
def test_passes_in_16_bit(monkeypatch, calls, engine, fold, dtype):
    """One pass over the keys all queries see, one causal and square, one over the prefix: expanded backward alone."""
    choose(monkeypatch, engine, fold)
    run(CHUNK, dtype)
    own = [((2, 4, 12, 32), (2, 2, 8, 32), False), ((2, 4, 12, 32), (2, 2, 12, 32), True)]
    forward, prefix_forward = {"cudnn": CUDNN, "flash": FLASH}[engine], PREFIX_PASS["batch" if fold == "expanded" else fold]
    assert [summary(call) for call in calls] == [
        *((forward, *one) for one in [*own, prefix_forward]),
        *((FLASH_BACKWARD, *one) for one in [*own, PREFIX_PASS[fold]]),
    ]
    assert all(call.scale == 32**-0.5 for call in calls)


def test_decoding_folds_the_group(calls):
    run(replace(CHUNK, q_len=1), "bfloat16")
    assert [summary(call) for call in calls[1::2]] == [
        (FLASH, (1, 2, 4, 32), (1, 2, 5, 32), False), (FLASH_BACKWARD, (1, 2, 4, 32), (1, 2, 5, 32), False),
    ]  # fmt: skip


def test_choice_of_engine(monkeypatch, calls):
    """What cuDNN does not take, or not in one order, goes to flash attention."""
    for change, forward in (({}, CUDNN), ({"q_len": 63}, FLASH), ({"head_dim": 136}, FLASH)):
        calls.clear()
        run(Case("engine", **{"q_len": 64, "kv_len": 80, "prefix_len": 20} | change), "bfloat16")
        assert calls[0].operator == forward and calls[-3].operator == FLASH_BACKWARD
    for chip in (((8, 9), 91900), ((12, 0), 91900), ((9, 0), 91002), ((9, 0), None)):
        on(monkeypatch, *chip)
        calls.clear()
        run(Case("engine", q_len=64, kv_len=64), "bfloat16")
        assert {call.operator for call in calls} == {FLASH, FLASH_BACKWARD}


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_gradients_of_wide_heads_where_shared_memory_is_small(monkeypatch, calls, capability):
    """Flash attention's backward pass has no room for 192 < head_dim <= 224 there, and raises."""
    on(monkeypatch, capability)
    small = capability in ((8, 6), (8, 9), (12, 0))
    for head_dim, fits in ((192, True), (200, False), (224, False), (232, True)):
        calls.clear()
        run(Case("wide", head_dim=head_dim), "bfloat16")
        assert {call.operator for call in calls} == {FLASH, FLASH_BACKWARD if fits or not small else EFFICIENT_BACKWARD}


@pytest.mark.parametrize("engine", FORWARD_ENGINES)
@pytest.mark.parametrize("fold", ["batch", "expanded"])
def test_token_major_queries_are_not_copied(monkeypatch, calls, engine, fold):
    """The passes over prefix and sequence read the same q, and out and its gradient, where they lie."""
    choose(monkeypatch, engine, fold)
    inputs = make_inputs(Case("aligned", q_len=16, kv_len=16), *DTYPES["bfloat16"])
    q, k, v = (tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in inputs.tensors[:3])
    inputs.tensors = (q, k, v, *(tensor.detach().contiguous().requires_grad_() for tensor in inputs.tensors[3:]))
    out = inputs.call(backend="sdpa")
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    assert len(calls) == 4
    assert {call.query.data_ptr() for call in calls} == {q.data_ptr()}
    assert {(call.out.data_ptr(), call.grad_out.data_ptr()) for call in calls[2:]} == {(out.data_ptr(), grad_out.data_ptr())}


def test_memory_efficient_attention_in_float32(calls):
    """The same passes with the heads of a group repeated for the sequence, not for the prefix."""
    run(replace(CHUNK, q_len=4), "float32")
    expected = [
        ((2, 4, 4, 32), (2, 16, 4, 32), False), ((2, 4, 4, 32), (2, 4, 4, 32), True), ((1, 16, 2, 32), (1, 5, 2, 32), False),
    ]  # fmt: skip
    assert [summary(call) for call in calls] == [
        *((EFFICIENT, *one) for one in expected),
        *((EFFICIENT_BACKWARD, *one) for one in expected),
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


@pytest.mark.parametrize("options", [{}, {"padding": "left"}, {"bias": (1, 0, 0, 0)}, {"q_len": 1}], ids=str)
def test_bfloat16_before_compute_capability_8(monkeypatch, calls, options):
    """No kernel of torch's takes it there."""
    on(monkeypatch, (7, 5))
    monkeypatch.setattr(sdpa, "_merge_kernel", lambda: pytest.fail("Triton compiles for 8.0 and newer"))
    compare(Case("old", **options), *DTYPES["bfloat16"], "sdpa")
    assert not calls
    compare(Case("old", **options), *DTYPES["float16"], "sdpa")
    assert calls


def test_flash_backward_adds_up_in_one_order(calls):
    """The switch for it fills no memory: nobody asked for that."""
    run(Case("plain"), "bfloat16")
    backward = [call for call in calls if call.operator == FLASH_BACKWARD]
    assert [(call.deterministic, call.fills) for call in backward] == [(True, False)] * 2


def test_deterministic_switch_is_put_back(calls):
    for before, warn_only in ((False, False), (True, True), (True, False)):
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        try:
            run(Case("plain"), "bfloat16")
            assert torch.are_deterministic_algorithms_enabled() == before
            assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
            assert torch.utils.deterministic.fill_uninitialized_memory
        finally:
            torch.use_deterministic_algorithms(False)


def test_deterministic_switch_of_two_threads():
    """Each device has its own thread for backward passes. The second one to come is the last to leave."""
    first_is_in, second_is_in, first_may_leave = (threading.Event() for _ in range(3))

    def first():
        with stock._deterministic():
            first_is_in.set()
            first_may_leave.wait(10)

    def second():
        with stock._deterministic():
            second_is_in.set()
            threads[0].join()

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    first_is_in.wait(10)
    threads[1].start()
    second_is_in.wait(0.2)
    first_may_leave.set()
    threads[1].join()
    try:
        assert second_is_in.is_set() and not torch.are_deterministic_algorithms_enabled()
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
    assert not calls


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("options", [{}, {"padding": "left"}, {"q_len": 1, "kv_len": 20}], ids=str)
def test_torch_accepts_the_calls(monkeypatch, calls, options, with_lse, dtype):
    """Every recorded call goes through the real operator's schema and shape function, and gives what the emulation gave."""
    for engine in FORWARD_ENGINES:
        choose(monkeypatch, engine)
        run(Case("fake", **options), dtype, with_lse)
    assert len(calls) == 8
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


STOCK_SLACK = 1.5  # docs/numerics.md
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
    compare(case, *DTYPES[dtype], backend, device="cuda", slack=STOCK_SLACK if backend == "sdpa" else 1.0)


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


GPU_SHAPES = (
    Case("wide", batch=4, heads=8, kv_heads=2, q_len=256, kv_len=256, head_dim=128, prefix_len=200),
    Case("narrow", batch=8, heads=4, kv_heads=4, q_len=128, kv_len=128, head_dim=64, prefix_len=50),
    Case("chunk", batch=2, heads=8, kv_heads=2, q_len=64, kv_len=300, head_dim=64, prefix_len=100),
    Case("head-major", batch=3, heads=4, kv_heads=2, q_len=100, kv_len=100, head_dim=64, prefix_len=33, contiguous=True),
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in (*WITHOUT_MASK, LONG) if case.name in GPU_SAMPLE or case is LONG], ids=str)
@pytest.mark.parametrize("fold", ["batch", "expanded"])
@pytest.mark.parametrize("engine", FORWARD_ENGINES)
def test_engines_on_the_gpu(monkeypatch, engine, fold, case):
    choose(monkeypatch, engine, fold)
    compare(case, *DTYPES["bfloat16"], "sdpa", device="cuda", slack=STOCK_SLACK)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("engine", FORWARD_ENGINES)
def test_engines_without_a_gradient_of_lse_on_the_gpu(monkeypatch, engine, fold, case):
    """Twice, the same bits: cuDNN finds its plans by shapes and strides, so the second call meets the first one's."""
    choose(monkeypatch, engine, fold)
    first, second = compare_without_lse(case, "cuda"), compare_without_lse(case, "cuda")
    for value, other in zip(first, second, strict=True):
        assert torch.equal(value, other)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("engine", FORWARD_ENGINES)
def test_a_graph_captures_forward_and_backward_on_the_gpu(monkeypatch, engine, case):
    choose(monkeypatch, engine, "expanded")
    inputs = make_inputs(case, torch.bfloat16, device="cuda")

    def step():
        out = inputs.call(backend="sdpa")
        return out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs.tensors)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for value, other in zip(captured, expected, strict=True):
        assert (value - other).float().norm() <= 0.01 * other.float().norm()
