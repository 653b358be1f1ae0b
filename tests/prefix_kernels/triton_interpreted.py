"""The Triton kernels on the CPU, in Triton's interpreter. test_triton.py runs this file with TRITON_INTERPRET=1."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

import prefix_kernels
from prefix_kernels.backends.triton import backward_kernels, launch, rows, tile_sizes
from prefix_kernels.backends.triton.online_softmax import start_of, tile_pointers
from prefix_kernels.backends.triton.rows import Tokens
from prefix_kernels.backends.triton.tile_sizes import Tile
from support.cases import CASES, CASES_OF_SEVERAL_BLOCKS, Case
from support.compare import DTYPES, compare, slack_of
from support.inputs import make_inputs

SIXTEEN_BIT = ("bfloat16", "float16", "float32 prefix")


pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")


@pytest.fixture
def small_blocks(monkeypatch):
    """Loops of several blocks; prefix gradients of three parts, so that a part has more than one row and ends within one."""
    monkeypatch.setattr(tile_sizes, "find", lambda *key: Tile(16, 16, 4, 1, "for loops of several blocks"))
    monkeypatch.setattr(backward_kernels, "MAX_SPLITS", 3)
    monkeypatch.setattr(backward_kernels, "FEW_BLOCKS", 0)


def test_the_backend_serves_the_interpreter():
    assert "triton" in prefix_kernels.available_backends()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case):
    compare(case, *DTYPES["float32"], "triton", slack=slack_of(case))


@pytest.mark.parametrize("splits", [1, 2, 32])
@pytest.mark.parametrize("name", ["blocks, four rows", "blocks, bank"])
def test_any_number_of_splits(small_blocks, monkeypatch, name, splits):
    monkeypatch.setattr(backward_kernels, "MAX_SPLITS", splits)
    (case,) = (case for case in CASES_OF_SEVERAL_BLOCKS if case.name == name)
    compare(case, *DTYPES["float32"], "triton")


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("case", CASES[::9], ids=str)
def test_16_bit(case, dtype):
    compare(case, *DTYPES[dtype], "triton", slack=slack_of(case))


@pytest.mark.parametrize("case", CASES_OF_SEVERAL_BLOCKS, ids=str)
def test_several_blocks(small_blocks, case):
    compare(case, *DTYPES["float32"], "triton", slack=slack_of(case))


def test_sections_of_heads(small_blocks, monkeypatch):
    """Programs in an order by sections of two heads, the last of one."""
    case = Case("", batch=1, heads=5, kv_heads=5, head_dim=16, q_len=40, kv_len=40, prefix_len=20)
    monkeypatch.setattr(rows, "SECTION", tl.constexpr(2 * case.head_dim * case.q_len))
    compare(case, *DTYPES["float32"], "triton")


def results(inputs):
    """out, lse and the gradients of all five tensors."""
    out, lse = inputs.call(backend="triton", return_lse=True)
    loss = out.float().square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
    return out, lse, *torch.autograd.grad(loss, inputs.tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bias that hides", "bias, decode"])
def test_a_bias_in_the_dtype_of_q(name, dtype):
    """It is widened as it is read."""
    inputs, outcomes = make_inputs(next(case for case in CASES if case.name == name), dtype), []
    for bias in (inputs.options["bias"].to(dtype), inputs.options["bias"].to(dtype).float()):
        inputs.options["bias"] = bias
        outcomes.append(results(inputs))
    for value, other in zip(*outcomes, strict=True):
        assert torch.equal(value, other)


SMALL = {"heads": 2, "kv_heads": 1, "head_dim": 16, "prefix_len": 20}
BANK = Case("bank", **SMALL, batch=3, q_len=20, kv_len=20, prefixes=2, prefix_ids=(1, 0, 1))
PARENT = Case("parent", **SMALL, seqlens_q=(20, 17, 9, 5), parent=(-1, 0, -1, 0))


@pytest.mark.parametrize("dtype", ["float32", "float32 prefix"])
@pytest.mark.parametrize("case", [BANK, PARENT], ids=str)
def test_the_same_bits(small_blocks, case, dtype):
    inputs = make_inputs(case, *DTYPES[dtype])
    for value, other in zip(results(inputs), results(inputs), strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("wanted", [(0, 0, 0, 1, 1), (1, 0, 0, 0, 0), (0, 0, 1, 0, 0), (0, 1, 0, 1, 0), (0, 0, 0, 0, 1)])
def test_only_what_feeds_a_wanted_gradient_runs(monkeypatch, wanted):
    inputs, kernels, launched = make_inputs(BANK), [], launch.Call.launch
    expected = results(inputs)[2:]

    def launch_and_note(call, kernel, *arguments, **more):
        kernels.append(kernel.fn.__name__)
        launched(call, kernel, *arguments, **more)

    monkeypatch.setattr(launch.Call, "launch", launch_and_note)
    inputs.tensors = tuple(t.detach().requires_grad_(bool(w)) for t, w in zip(inputs.tensors, wanted, strict=True))
    out, lse = inputs.call(backend="triton", return_lse=True)
    (out.square().sum() + lse.sum()).backward()
    names = {
        "forward_kernel": True, "delta_kernel": True, "dq_kernel": wanted[0],
        "dkeys_kernel": wanted[1] or wanted[2], "dprefix_kernel": wanted[3] or wanted[4],
    }  # fmt: skip
    assert kernels == [name for name, needed in names.items() if needed]
    for tensor, grad, needed in zip(inputs.tensors, expected, wanted, strict=True):
        assert torch.equal(tensor.grad, grad) if needed else tensor.grad is None


@pytest.mark.parametrize(
    ("wanted", "kv_len", "late"), [((1, 1, 1), 20, 1), ((1, 0, 1), 20, 1), ((1, 0, 0), 20, 0), ((1, 1, 1), 0, 0)]
)
def test_the_prefix_computes_beside_the_keys_alone(monkeypatch, wanted, kv_len, late):
    """What the gradients of the prefix read must be there before the launch before: if that computes dq or delta, it is not."""
    inputs, found, launched = make_inputs(replace(BANK, q_len=5, kv_len=kv_len, causal=False)), {}, launch.Call.launch

    def launch_and_note(call, kernel, *arguments, **more):
        found[kernel.fn.__name__] = more.get("LATE")
        launched(call, kernel, *arguments, **more)

    monkeypatch.setattr(launch.Call, "launch", launch_and_note)
    inputs.tensors = tuple(t.detach().requires_grad_(bool(w)) for t, w in zip(inputs.tensors, (*wanted, 1, 1), strict=True))
    inputs.call(backend="triton").square().sum().backward()
    assert found["dprefix_kernel"] == bool(late)


def test_the_gradient_of_a_lse_of_minus_infinity_counts_for_nothing():
    """What a loss makes of −inf may be NaN; a query that sees nothing has gradient 0."""
    inputs = make_inputs(Case("hidden row", padding="row", prefix_len=0))
    out, lse = inputs.call(backend="triton", return_lse=True)
    grad_lse = torch.where(lse == -torch.inf, torch.nan, 1.0)
    assert grad_lse.isnan().any()
    for grad in torch.autograd.grad((out, lse), inputs.tensors, (torch.ones_like(out), grad_lse)):
        assert grad.isfinite().all()


INDEX_VALUES = [  # on the left what a device may hold, on the right what it acts as
    (Case("fill", key_lens=(9, 0)), {"key_lens": (99, -5)}, {"key_lens": (9, 0)}),
    (BANK, {"prefix_ids": (2, -7, 2**32 + 1)}, {"prefix_ids": (-1, -1, -1)}),
    (BANK, {"prefix_lens": (99, -4)}, {"prefix_lens": (20, 0)}),
    (PARENT, {"parent": (-1, 2**32, 4, -9)}, {"parent": (-1, -1, -1, -1)}),
]


@pytest.mark.parametrize(("case", "outside", "inside"), INDEX_VALUES)
def test_index_values_out_of_range(monkeypatch, case, outside, inside):
    """As on a device, where they are not checked: ids out of range are none, lengths are clamped."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    inputs, outcomes = make_inputs(case), []
    for values in (outside, inside):
        inputs.options |= {name: torch.tensor(value, dtype=torch.int64) for name, value in values.items()}
        outcomes.append(results(inputs))
    for value, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=0)


def test_partial_sums_have_a_bound():
    """However large batch and prefix are, the partial gradients hold at most 264 blocks, or one part for each owner."""
    for owners in (1, 7, 264, 10**6):
        for query_blocks in (0, 1, 40, 10**6):
            splits = backward_kernels.splits_of(owners, query_blocks)
            assert 1 <= splits <= max(1, min(query_blocks, backward_kernels.MAX_SPLITS))
            assert splits == 1 or splits * owners <= backward_kernels.PROGRAMS


REFUSED = [
    (Case("plain"), torch.float64, "the Triton kernels accumulate in float32 and know no float64"),
    (Case("wide", head_dim=257), torch.float32, "the Triton kernels hold whole heads of up to 256, not 257"),
    (Case("wide", value_dim=300), torch.float32, "the Triton kernels hold whole heads of up to 256, not 300"),
]


@pytest.mark.parametrize(("case", "dtype", "reason"), REFUSED, ids=str)
def test_refusals(case, dtype, reason):
    inputs = make_inputs(case, dtype)
    assert prefix_kernels.explain_backends(*inputs.tensors, **inputs.options)["triton"] == f"refused: {reason}"
    with pytest.raises(NotImplementedError, match=reason):
        inputs.call(backend="triton")


@triton.jit
def write_addresses(tensor, addresses, row, head, token, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr):
    pointers = tile_pointers(start_of(tensor, row, head, token), tensor.token, token, BLOCK, BLOCK_DIM)
    place = tl.arange(0, BLOCK)[:, None] * BLOCK_DIM + tl.arange(0, BLOCK_DIM)[None, :]
    tl.store(addresses + place, pointers.to(tl.int64))


@pytest.mark.parametrize("strides, row, head, token", [
    ((2**31, 2**20, 128), 3, 5, 7), ((2**28, 2**31 + 8, 128), 9, 2, 7), ((2**28, 2**30, 2**23), 3, 5, 1000),
    ((2**27, 2**24, 128), 40, 3, 100_000),
])  # fmt: skip
def test_addresses_past_2_to_the_31_elements(strides, row, head, token):
    """Pointer arithmetic alone: nothing is read there."""
    base, addresses = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(16, 16, dtype=torch.int64)
    write_addresses[(1,)](Tokens(base, *strides), addresses, row, head, token, 16, 16)
    index = torch.arange(16)
    elements = row * strides[0] + head * strides[1] + (2 * token + index[:, None]) * strides[2] + index
    assert elements.max() > 2**31 and torch.equal(addresses, base.data_ptr() + 2 * elements)
