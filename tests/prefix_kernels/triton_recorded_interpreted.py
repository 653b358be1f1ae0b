"""Calls that are repeated from a recording, in Triton's interpreter. test_triton.py runs this file with TRITON_INTERPRET=1."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from prefix_kernels import prefix_attention
from prefix_kernels.backends import triton
from prefix_kernels.backends.triton import backward_kernels, recorded, tile_sizes
from prefix_kernels.backends.triton.recorded import Recording
from prefix_kernels.backends.triton.tile_sizes import Tile
from support.cases import Case
from support.compare import DTYPES
from support.compiled_kernels import leave_compiled_kernels
from support.inputs import make_inputs
from support.recorded_calls import RECORDED, SHAPE, assert_same, repeated_calls, results

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")
NOT_RECORDED = {
    "parent": Case("parent", **SHAPE, seqlens_q=(5, 3, 2), parent=(-1, 0, 0)),
    "bias of queries": Case("bias of queries", **SHAPE, bias=(0, 1, 0, 1)),  # is copied
    "no prefix": Case("no prefix", **SHAPE, prefix_len=0),
    "no rows": Case("no rows", **SHAPE, batch=0),
    "no queries": Case("no queries", **SHAPE | {"q_len": 0}),
}


@pytest.fixture(autouse=True)
def long_ways(monkeypatch):
    """Compiled kernels; counts the calls that are not repeated from a recording."""
    ways = []
    leave_compiled_kernels(monkeypatch)
    monkeypatch.setattr(recorded, "_kinds", {})
    for module, name in ((triton, "_forward"), (backward_kernels, "backward")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, function=function, name=name: ways.append(name) or function(*args))
    return ways


def check(case, dtype, long_ways, wanted=(True,) * 5, repeated=True):
    for number, found, right in repeated_calls(case, dtype, wanted, long_ways.clear):
        assert bool(long_ways) == (number < 2 or not repeated), (number, long_ways)
        assert_same(found, right)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float32 prefix"))
@pytest.mark.parametrize("name", RECORDED)
def test_repeated_calls(long_ways, name, dtype):
    check(RECORDED[name], dtype, long_ways)


def test_packs_whose_ends_are_one_tensor(long_ways):
    """As a model has them; a call with two tensors is of another kind."""
    for number in range(4):
        inputs = make_inputs(RECORDED["packed"], seed=number)
        if number < 3:
            inputs.options["cu_seqlens_k"] = inputs.options["cu_seqlens_q"]
        long_ways.clear()
        found = results(inputs)
        assert bool(long_ways) == (number != 2)
        recorded._kinds, kinds = {}, recorded._kinds
        assert_same(found, results(inputs))
        recorded._kinds = kinds


@pytest.mark.parametrize("name", NOT_RECORDED)
def test_what_is_not_recorded(long_ways, name):
    check(NOT_RECORDED[name], "float32", long_ways, repeated=False)


@pytest.mark.parametrize("wanted", [
    (True, False, False, False, False), (False, True, False, False, False), (False, False, True, True, False),
    (False, False, False, False, True), (False,) * 5,
])  # fmt: skip
def test_some_gradients(long_ways, wanted):
    check(RECORDED["dense"], "float32 prefix", long_ways, wanted)


def test_shares_of_the_prefix_gradient(long_ways, monkeypatch):
    """Several launches write parts, and a last one adds them up."""
    monkeypatch.setattr(tile_sizes, "find", lambda *key: Tile(16, 16, 4, 1, "for several blocks"))
    monkeypatch.setattr(backward_kernels, "FEW_BLOCKS", 0)
    check(Case("", **SHAPE | {"q_len": 20, "kv_len": 20}, prefix_len=20), "float32 prefix", long_ways)


def call(tensors):
    return prefix_attention(*tensors, backend="triton", return_lse=True)


def test_what_makes_another_kind():
    """Of calls with the same shapes and options."""
    tensors = [tensor.detach().contiguous() for tensor in make_inputs(RECORDED["dense"]).tensors]
    shifted = torch.cat([torch.zeros(1), tensors[0].flatten()])[1:].view(tensors[0].shape)
    scattered = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)
    others = [tensors, [shifted, *tensors[1:]], [scattered, *tensors[1:]], [t.bfloat16() for t in tensors]]
    for number, each in enumerate(others, start=1):
        call(each)
        assert len(recorded._kinds) == number
    for each in others:
        call(each)
        call(each)
    assert len(recorded._kinds) == 4 and all(type(found) is Recording for found in recorded._kinds.values())


def test_a_bias_that_ends_with_its_memory_is_another_kind():
    """It is copied, where one that lies alike but has memory behind it is read where it lies."""
    tensors = [torch.randn(2, 2, 5, 16) for _ in range(3)] + [torch.randn(2, 4, 16) for _ in range(2)]
    longer = torch.randn(5 * 12)
    biases = [longer.as_strided((1, 1, 5, 9), (60, 60, 12, 1)), longer[:57].clone().as_strided((1, 1, 5, 9), (60, 60, 12, 1))]
    for bias in biases * 3:
        out, right = (prefix_attention(*tensors, bias=bias, backend=name) for name in ("triton", "reference"))
        torch.testing.assert_close(out, right)
    assert [type(found) for found in recorded._kinds.values()] == [Recording] * 2


def test_a_bias_of_another_shape_is_another_kind():
    """Though its strides are the same: one for all rows, and one for each."""
    tensors = [tensor.detach() for tensor in make_inputs(Case("one head", **SHAPE | {"heads": 1})).tensors]
    biases = [torch.randn(rows, 1, 1, 12) for rows in (1, 2)]
    assert biases[0].stride() == biases[1].stride()
    for bias in biases * 3:
        out, right = (prefix_attention(*tensors, bias=bias, backend=name) for name in ("triton", "reference"))
        torch.testing.assert_close(out, right)
    assert [type(found) for found in recorded._kinds.values()] == [Recording] * 2


def test_other_gradients_are_another_kind(long_ways):
    """Of calls that are alike but for what is wanted."""
    inputs = make_inputs(RECORDED["dense"])
    expected = results(inputs)
    for _ in range(3):
        results(inputs)
        out, lse, dprefix_v = results(inputs, (False,) * 4 + (True,))
    assert torch.equal(dprefix_v, expected[-1]) and len(recorded._kinds) == 3  # forward, and two backward


def test_what_does_more_than_launch_is_not_recorded():
    given = [torch.ones(3)]

    def function():
        calls.append(1)
        return (given[0].new_empty(3).fill_(1),)

    calls = []
    for _ in range(4):
        assert torch.equal(recorded.serve(function, "kind", given)[0], given[0])
    assert len(calls) == 4


@pytest.mark.parametrize("compiled, argument, complete", [
    ("a kernel", 5, True), (None, 5, False), ("a kernel", "a word", False),
])  # fmt: skip
def test_launches_that_cannot_be_repeated(compiled, argument, complete):
    """Of an interpreted kernel, or with an argument that is neither a number nor a tensor."""
    recorder = recorded._Recorder([torch.ones(3)])
    recorder.launched(compiled, 1, [argument])
    assert (recorder.recording([None]) is not None) == complete


def test_tensors_at_one_address_are_not_recorded(long_ways):
    """Which is meant could not be told; a recording of others serves them."""
    q, k, v, *prefix = [tensor.detach().contiguous() for tensor in make_inputs(RECORDED["dense"]).tensors]
    expected = call((q, k, k, *prefix))[0]
    for _ in range(3):
        call((q, k, k, *prefix))
    assert long_ways == ["_forward"] * 4
    call((q, k, v, *prefix))
    long_ways.clear()
    assert torch.equal(call((q, k, k, *prefix))[0], expected) and not long_ways


def test_a_recording_keeps_no_tensor():
    inputs = make_inputs(RECORDED["packed"], *DTYPES["float32 prefix"])
    for _ in range(3):
        found = results(inputs)
    watched = [weakref.ref(tensor) for tensor in (*inputs.tensors, *found)]
    del inputs, found
    gc.collect()
    assert not any(reference() is not None for reference in watched)


def test_the_number_of_kinds_is_bounded(monkeypatch):
    monkeypatch.setattr(recorded, "MOST_KINDS", 3)
    for length in range(2, 12):
        q, prefix = torch.zeros(1, 1, length, 16), torch.zeros(1, 3, 16)
        call((q, q + 1, q + 2, prefix, prefix + 1))
        assert len(recorded._kinds) <= 3


def test_a_call_that_fails_while_it_is_recorded_is_recorded_later(long_ways, monkeypatch):
    tensors = [tensor.detach() for tensor in make_inputs(RECORDED["dense"]).tensors]
    expected = call(tensors)
    with monkeypatch.context() as patch:
        patch.setattr(triton, "_forward", lambda inputs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(tensors)
    call(tensors)
    long_ways.clear()
    assert torch.equal(call(tensors)[0], expected[0]) and not long_ways


def test_threads_repeat_one_recording(long_ways):
    """Each with tensors of its own."""
    inputs = [make_inputs(RECORDED["dense"], seed=seed) for seed in range(4)]
    expected = [results(each) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(results, inputs * 3), expected * 3, strict=True):
            assert all(map(torch.equal, found, right))
