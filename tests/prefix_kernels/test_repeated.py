"""Calls like an earlier one: they reach the kernel at once, give what the whole way gives, and pass nothing by that matters."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import prefix_kernels
from prefix_kernels import api, prefix_attention, repeated

pytestmark = pytest.mark.skipif("cpu" not in prefix_kernels.available_backends(), reason="the C++ kernels are not built")


@pytest.fixture(autouse=True)
def nothing_served_yet(monkeypatch):
    monkeypatch.delenv("PREFIX_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(repeated, "_kernels", {})


@pytest.fixture
def whole_ways(monkeypatch):
    """Of every call that is checked, its q."""
    seen, inputs = [], api._dense_inputs
    monkeypatch.setattr(api, "_dense_inputs", lambda q, *args, **options: seen.append(q) or inputs(q, *args, **options))
    return seen


def make(dtype=torch.float32, prefix_dtype=None, q_len=2, kv_len=7):
    """q, k, v, prefix_k, prefix_v: 4 heads, 2 kv heads, head_dim 16, a prefix of 5."""
    shapes = (3, 4, q_len, 16), (3, 2, kv_len, 16), (3, 2, kv_len, 16), (2, 5, 16), (2, 5, 16)
    dtypes = (dtype,) * 3 + (prefix_dtype or dtype,) * 2
    return [torch.randn(shape).to(kind) for shape, kind in zip(shapes, dtypes, strict=True)]


OPTIONS = (
    {}, {"causal": False}, {"scale": 0.3}, {"window": 3}, {"window": 3, "first_key_position": 1}, {"softcap": 2.0},
    {"key_mask": torch.arange(7).expand(3, 7) > torch.tensor([[0], [-1], [2]])}, {"backend": "cpu"},
    {"bias": torch.randn(3, 1, 2, 12)},
)  # fmt: skip


@pytest.mark.parametrize("dtypes", [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "plain")
def test_the_same_bits_as_the_whole_way(whole_ways, options, dtypes):
    calls = [make(*dtypes) for _ in range(3)]
    calls[2] = [torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in calls[2]]  # gaps in the last axis
    calls.append([tensor.transpose(-3, -2).contiguous().transpose(-3, -2) for tensor in calls[2]])
    expected = [prefix_attention(*tensors, **options) for tensors in calls]  # gradients might be recorded
    whole_ways.clear()
    with torch.no_grad():
        got = [prefix_attention(*tensors, **options) for tensors in calls]
    assert len(whole_ways) == 1 and whole_ways[0] is calls[0][0]
    for value, right in zip(got, expected, strict=True):
        assert torch.equal(value, right) and value.stride() == right.stride() and value.dtype == right.dtype


def test_every_call_has_its_own_bias(whole_ways):
    """Of any strides; one that is broadcast along the columns goes the whole way each time."""
    tensors, shapes = make(), [(3, 4, 2, 12), (3, 4, 2, 12), (1, 4, 1, 12), (3, 4, 2, 1), (3, 4, 2, 1), (12,), (12,)]
    biases = [torch.randn(shape) for shape in shapes]
    biases[1] = biases[1].transpose(0, 2).contiguous().transpose(0, 2)
    expected = [prefix_attention(*tensors, bias=bias, backend="reference") for bias in biases]
    whole_ways.clear()
    with torch.no_grad():
        got = [prefix_attention(*tensors, bias=bias) for bias in biases]
    assert len(whole_ways) == 6
    for value, right in zip(got, expected, strict=True):
        torch.testing.assert_close(value, right)


@pytest.mark.parametrize("change", [
    {"q_len": 1}, {"kv_len": 8}, {"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "prefix_dtype": torch.float32},
], ids=str)  # fmt: skip
def test_other_shapes_and_dtypes_are_other_kinds(whole_ways, change):
    with torch.no_grad():
        for arguments in ({}, change, {}, change):
            prefix_attention(*make(**arguments))
    assert len(whole_ways) == 2 == len(repeated._kernels)


def test_other_options_are_other_kinds(whole_ways):
    tensors, more = make(), ({"scale": 0.4}, {"window": 2}, {"softcap": 3.0}, {"window": 3, "first_key_position": 2})
    with torch.no_grad():
        for options in (*OPTIONS, *more) * 2:
            prefix_attention(*tensors, **options)
    assert len(whole_ways) == len(OPTIONS) + len(more) == len(repeated._kernels)


@pytest.mark.parametrize(("wrong", "error"), [
    ({"causal": 1}, TypeError), ({"scale": True}, TypeError), ({"window": True}, TypeError), ({"softcap": True}, TypeError),
    ({"first_key_position": False}, TypeError), ({"return_lse": 0}, TypeError), ({"backend": 5}, TypeError),
    ({"key_mask": torch.ones(3, 7)}, TypeError), ({"key_mask": torch.ones(3, 7).bool().to_sparse()}, TypeError),
    ({"bias": torch.ones(3, 1, 2, 12).to_sparse()}, TypeError), ({"window": [1]}, TypeError), ({"backend": "sdp"}, ValueError),
])  # fmt: skip
def test_what_is_wrong_stays_wrong(wrong, error):
    """Also where it is equal to something right, as 1 is to True, or looks like it."""
    tensors = make()
    with torch.no_grad():
        for right in ({}, {"scale": 1.0}, {"window": 1}, {"softcap": 1.0}, {"first_key_position": 0}, *OPTIONS[-3:]):
            prefix_attention(*tensors, **right)
        with pytest.raises(error, match=f"^{next(iter(wrong))}: "):
            prefix_attention(*tensors, **wrong)
        for index, name in enumerate(("q", "k", "v", "prefix_k", "prefix_v")):
            others = (tensors[index].numpy(), tensors[index].double(), tensors[index][..., :8], None)
            for other in (*others, tensors[index].to_sparse(), tensors[index].to_mkldnn()):
                with pytest.raises((TypeError, ValueError)):
                    prefix_attention(*tensors[:index], other, *tensors[index + 1 :])
            if name != "q":
                with pytest.raises(ValueError, match=f"{name}: expected device cpu as q, got meta"):
                    prefix_attention(*tensors[:index], tensors[index].to("meta"), *tensors[index + 1 :])


def test_gradients_are_recorded(whole_ways):
    tensors = make()
    with torch.no_grad():
        expected = prefix_attention(*tensors)
    tensors[3].requires_grad_()
    out = prefix_attention(*tensors)
    out.sum().backward()
    assert torch.equal(out, expected) and tensors[3].grad.abs().sum() > 0 and len(whole_ways) == 2


@pytest.mark.parametrize("state", ["autocast", "flops", "vmap", "variable", "return_lse", "key_lens", "subclass"])
def test_the_whole_way_is_gone(monkeypatch, whole_ways, state):
    class Subclass(torch.Tensor):
        pass

    tensors = make()
    with torch.no_grad():
        first = prefix_attention(*tensors)
        if state == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                assert prefix_attention(*tensors).dtype == torch.bfloat16
        elif state == "flops":
            with FlopCounterMode(display=False):
                prefix_attention(*tensors)
        elif state == "vmap":
            torch.vmap(prefix_attention, in_dims=(0, None, None, None, None))(tensors[0][None], *tensors[1:])
        elif state == "variable":
            monkeypatch.setenv("PREFIX_KERNELS_BACKEND", "flashy")
            with pytest.raises(ValueError, match="^PREFIX_KERNELS_BACKEND: "):
                prefix_attention(*tensors)
        elif state == "return_lse":
            assert torch.equal(prefix_attention(*tensors, return_lse=True)[0], first)
        elif state == "key_lens":
            assert not torch.equal(prefix_attention(*tensors, key_lens=torch.tensor([3, 4, 5])), first)
        else:
            for _ in range(2):
                prefix_attention(tensors[0].as_subclass(Subclass), *tensors[1:])
    assert len(whole_ways) == (3 if state == "subclass" else 2)


def test_a_backend_that_cannot_repeat_is_chosen_once_for_that(monkeypatch, whole_ways):
    kinds, remember = [], repeated.remember
    monkeypatch.setattr(repeated, "remember", lambda kind, *args: kinds.append(kind) or remember(kind, *args))
    tensors = make()
    with torch.no_grad():
        outputs = [prefix_attention(*tensors, backend="sdpa") for _ in range(3)]
    assert len(whole_ways) == 3 and len(kinds) == 1 and torch.equal(outputs[0], outputs[2])


def test_what_is_remembered_has_a_bound(monkeypatch):
    monkeypatch.setattr(repeated, "MOST_REMEMBERED", 3)
    with torch.no_grad():
        for kv_len in range(2, 12):
            prefix_attention(*make(kv_len=kv_len))
            assert 1 <= len(repeated._kernels) <= 3
