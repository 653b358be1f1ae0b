"""The kernel for decoding on the CPU, in Triton's interpreter. test_triton_decode.py runs this file with TRITON_INTERPRET=1."""

import pytest
import torch

import prefix_kernels
from prefix_kernels import api
from prefix_kernels.backends.triton import decode_kernel, tile_sizes
from prefix_kernels.backends.triton.tile_sizes import Tile
from support.allocations import allocations
from support.cases import Case
from support.decoding import DECODE_CASES, check
from support.inputs import make_inputs

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")


@pytest.fixture(params=["as chosen", "many splits"])
def splits(request, monkeypatch):
    """The splits as they are chosen, and blocks so small that every case has several, and several blocks of queries."""
    if request.param == "many splits":
        monkeypatch.setattr(tile_sizes, "find", lambda *key: Tile(16, 16, 4, 1, "for many splits"))
        for name, value in (("LEAST_COLUMNS", 16), ("LEAST_SHARED_COLUMNS", 16), ("SHORT_ROW", 0), ("SHORT_PREFIX", 3)):
            monkeypatch.setattr(decode_kernel, name, value)


@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_float32(splits, case):
    check(case, "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32 prefix"])
@pytest.mark.parametrize("case", DECODE_CASES[::5], ids=str)
def test_16_bit(splits, case, dtype):
    check(case, dtype)


PLANS = [  # on the right: splits of a shared prefix, splits of a row
    (Case("short", q_len=1, kv_len=90, prefix_len=16), (0, 1)),
    (Case("no prefix", q_len=1, kv_len=90, prefix_len=0), (0, 1)),
    (Case("shared", q_len=1, kv_len=64, prefix_len=700), (6, 1)),
    (Case("one row", batch=1, q_len=1, kv_len=64, prefix_len=700), (0, 12)),
    (Case("bank", q_len=1, kv_len=64, prefix_len=700, prefixes=2, prefix_ids=(1, 0)), (0, 12)),
    (Case("window", q_len=1, kv_len=4000, prefix_len=700, window=100), (6, 2)),
    (Case("many rows", batch=300, q_len=1, kv_len=4000, prefix_len=700, head_dim=16), (6, 1)),
    (Case("bounded", batch=1, heads=1, kv_heads=1, q_len=1, kv_len=9000, prefix_len=0, head_dim=16), (0, 64)),
]


@pytest.mark.parametrize(("case", "splits"), PLANS, ids=str)
def test_plan(case, splits):
    inputs = make_inputs(case)
    problem = api._dense_inputs(*inputs.tensors, **inputs.options).problem()
    plan = decode_kernel.plan_of(problem, tile_sizes.INTERPRETER)
    assert (plan.shared_splits, plan.splits) == splits


def test_what_is_short_takes_one_kernel(monkeypatch):
    monkeypatch.setattr(decode_kernel, "merge_kernel", None)
    check(Case("short", q_len=1, kv_len=90, prefix_len=16), "float32")


def test_the_same_bits(splits):
    inputs = make_inputs(Case("bits", batch=4, q_len=2, kv_len=40, prefix_len=90, key_lens=(40, 3, 0, 17)))
    runs = [inputs.call(backend="triton", return_lse=True) for _ in range(2)]
    for value, other in zip(*runs, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("case", DECODE_CASES[:2], ids=str)
def test_workspace(splits, case):
    """What lies between the two kernels is what is stated."""
    inputs = make_inputs(case)
    stated = prefix_kernels.workspace_bytes(*inputs.tensors, **inputs.options, backend="triton")["forward"]
    returned = sum(t.numel() * t.element_size() for t in inputs.call(backend="triton", return_lse=True))
    _, largest, _ = allocations(lambda: inputs.call(backend="triton", return_lse=True))
    assert largest <= max(stated, returned) + 4096
    assert stated == 0 or largest >= stated
