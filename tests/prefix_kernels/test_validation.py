"""Wrong calls: the exception, naming the argument, what was expected and what came, before anything runs."""

import ast
import traceback
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import prefix_kernels
from prefix_kernels import api, ops, prefix_attention, validate

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def rand(*shape, dtype=F32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def ints(*values, dtype=torch.int32, device="cpu"):
    return torch.tensor(values, dtype=dtype, device=device)


DENSE = {
    "q": rand(2, 4, 5, 8), "k": rand(2, 2, 7, 8), "v": rand(2, 2, 7, 6), "prefix_k": rand(2, 3, 8), "prefix_v": rand(2, 3, 6),
}  # fmt: skip
BANK = DENSE | {"prefix_k": rand(3, 2, 3, 8), "prefix_v": rand(3, 2, 3, 6), "prefix_ids": ints(0, -1)}
PACKED = {
    "q": rand(6, 4, 8), "k": rand(9, 2, 8), "v": rand(9, 2, 6), "prefix_k": rand(2, 3, 8), "prefix_v": rand(2, 3, 6),
    "cu_seqlens_q": ints(0, 2, 5, 6), "cu_seqlens_k": ints(0, 4, 8, 9), "max_seqlen_q": 3, "max_seqlen_k": 4,
}  # fmt: skip
NOTHING_PACKED = {name: PACKED[name][:0] for name in ("q", "k", "v")} | {
    "cu_seqlens_q": ints(0), "cu_seqlens_k": ints(0), "max_seqlen_q": 0, "max_seqlen_k": 0,
}  # fmt: skip
PACKED_BANK = PACKED | {"prefix_k": BANK["prefix_k"], "prefix_v": BANK["prefix_v"], "prefix_ids": ints(0, 0, -1)}


@dataclass
class Wrong:
    """A call that differs from a right one (`base`) by `change`, and the exception it raises."""

    base: dict = field(repr=False)
    change: dict
    error: type
    message: str

    def call(self):
        function = prefix_kernels.prefix_attention_varlen if "cu_seqlens_q" in self.base else prefix_kernels.prefix_attention
        return function(**self.base | self.change)


def narrow(base, **dtypes):
    """The base with its float tensors in bfloat16, some of them in another dtype."""
    return {n: base[n].to(dtypes.get(n, BF16)) for n in ("q", "k", "v", "prefix_k", "prefix_v")}


def each(names, change, error, message, base=DENSE):
    return [Wrong(base, {name: change}, error, message.format(name)) for name in names]


TENSORS = [
    *each(DENSE, [1.0], TypeError, "{}: expected a tensor, got list"),
    *each(DENSE, None, TypeError, "{}: expected a tensor, got NoneType", PACKED),
    *(Wrong(base, {name: base[name].to_sparse()}, TypeError, f"{name}: expected a dense tensor, got torch.sparse_coo")
      for base in (DENSE, PACKED) for name in DENSE),
    Wrong(DENSE, {"k": torch.nested.nested_tensor([rand(2, 7, 8), rand(2, 3, 8)], layout=torch.strided)}, TypeError,
          "k: expected a dense tensor, got a nested one"),
    Wrong(DENSE, {"q": rand(4, 5, 8)}, ValueError, "q: expected [batch, heads, q_len, head_dim], got shape [4, 5, 8]"),
    *each("kv", rand(2, 2, 1, 7, 8), ValueError, "{}: expected [batch, kv_heads, kv_len, head_dim], got shape [2, 2, 1, 7, 8]"),
    Wrong(PACKED, {"q": rand(1, 6, 4, 8)}, ValueError, "q: expected [tokens, heads, head_dim], got shape [1, 6, 4, 8]"),
    *each("kv", rand(9, 8), ValueError, "{}: expected [tokens, kv_heads, head_dim], got shape [9, 8]", PACKED),
    *each(
        ("prefix_k", "prefix_v"), rand(3, 8), ValueError,
        "{}: expected [kv_heads, prefix_len, head_dim] or [prefixes, kv_heads, prefix_len, head_dim], got shape [3, 8]",
    ),
    *each(
        ("prefix_k", "prefix_v"), rand(0, 2, 3, 8), ValueError,
        "{}: expected a bank of at least one prefix, got shape [0, 2, 3, 8]", BANK,
    ),
    Wrong(DENSE, {"q": rand(2, 4, 5, 8, dtype=torch.int32)}, TypeError,
          "q: expected dtype float16, bfloat16, float32 or float64, got torch.int32"),
    Wrong(DENSE, {"k": rand(2, 2, 7, 8, dtype=F64)}, TypeError, "k: expected dtype torch.float32 as q, got torch.float64"),
    Wrong(DENSE, {"v": rand(2, 2, 7, 6, dtype=BF16)}, TypeError, "v: expected dtype torch.float32 as q, got torch.bfloat16"),
    Wrong(DENSE, {"prefix_k": rand(2, 3, 8, dtype=F16)}, TypeError,
          "prefix_k: expected dtype torch.float32 beside q of torch.float32, got torch.float16"),
    Wrong(DENSE, narrow(DENSE, prefix_k=F16), TypeError,
          "prefix_k: expected dtype torch.bfloat16 or torch.float32 beside q of torch.bfloat16, got torch.float16"),
    Wrong(DENSE, narrow(DENSE, prefix_k=F64, prefix_v=F64), TypeError,
          "prefix_k: expected dtype torch.bfloat16 or torch.float32 beside q of torch.bfloat16, got torch.float64"),
    Wrong(DENSE, narrow(DENSE, q=F64, k=F64, v=F64, prefix_k=F32), TypeError,
          "prefix_k: expected dtype torch.float64 beside q of torch.float64, got torch.float32"),
    Wrong(DENSE, narrow(DENSE, prefix_k=F32), TypeError,
          "prefix_v: expected dtype torch.float32 as prefix_k, got torch.bfloat16"),
    *(Wrong(DENSE, {name: DENSE[name].to("meta")}, ValueError, f"{name}: expected device cpu as q, got meta")
      for name in ("k", "v", "prefix_k", "prefix_v")),
    Wrong(DENSE, {"k": rand(3, 2, 7, 8)}, ValueError, "k: expected batch 2 as in q, got shape [3, 2, 7, 8]"),
    Wrong(DENSE, {"v": rand(2, 2, 6, 6)}, ValueError,
          "v: expected k's shape [2, 2, 7, 8] up to the last axis, got [2, 2, 6, 6]"),
    Wrong(PACKED, {"v": rand(8, 2, 6)}, ValueError, "v: expected k's shape [9, 2, 8] up to the last axis, got [8, 2, 6]"),
    Wrong(DENSE, {"k": rand(2, 2, 7, 6)}, ValueError, "k: expected head_dim 8 as in q, got shape [2, 2, 7, 6]"),
    Wrong(DENSE, {"q": rand(2, 4, 5, 0), "k": rand(2, 2, 7, 0)}, ValueError,
          "q: expected a head_dim of at least 1, got shape [2, 4, 5, 0]"),
    Wrong(DENSE, {"v": rand(2, 2, 7, 0)}, ValueError, "v: expected a head_dim of at least 1, got shape [2, 2, 7, 0]"),
    Wrong(DENSE, {"q": rand(2, 3, 5, 8)}, ValueError, "k: expected a number of kv_heads that divides q's 3 heads, got 2"),
    Wrong(DENSE, {"k": rand(2, 0, 7, 8), "v": rand(2, 0, 7, 6)}, ValueError,
          "k: expected a number of kv_heads that divides q's 4 heads, got 0"),
    Wrong(DENSE, {"prefix_k": rand(4, 3, 8)}, ValueError,
          "prefix_k: expected kv_heads 2 and head_dim 8 as in k and v, got shape [4, 3, 8]"),
    Wrong(DENSE, {"prefix_v": rand(2, 3, 8)}, ValueError,
          "prefix_v: expected kv_heads 2 and head_dim 6 as in k and v, got shape [2, 3, 8]"),
    Wrong(DENSE, {"prefix_v": rand(2, 4, 6)}, ValueError,
          "prefix_v: expected prefix_k's shape [2, 3, 8] up to the last axis, got [2, 4, 6]"),
    Wrong(BANK, {"prefix_v": rand(2, 3, 6)}, ValueError,
          "prefix_v: expected prefix_k's shape [3, 2, 3, 8] up to the last axis, got [2, 3, 6]"),
    Wrong(DENSE, {"k": rand(2, 2, 4, 8), "v": rand(2, 2, 4, 6)}, ValueError,
          "q: expected q_len <= kv_len in causal attention, got q_len 5 and kv_len 4"),
]  # fmt: skip

OPTIONS = [
    *(Wrong(base, {"causal": value}, TypeError, f"causal: expected a bool, got {kind}")
      for base in (DENSE, PACKED)
      for value, kind in ((None, "NoneType"), (1, "int"), (np.True_, f"numpy.{type(np.True_).__name__}"))),
    *(Wrong(base, {name: value}, TypeError, f"{name}: expected a number or None, got {kind}")
      for base in (DENSE, PACKED) for name in ("scale", "softcap") for value, kind in (("1", "str"), (True, "bool"))),
    *(Wrong(DENSE, {"scale": value}, ValueError, f"scale: expected 0, 1e-30 to 1e+30, either sign, or None, got {value}")
      for value in (float("nan"), float("inf"), -float("inf"), 1e39, -1e-46, 10**400)),
    *(Wrong(base, {"softcap": value}, ValueError, f"softcap: expected 1e-30 to 1e+30 or None, got {value}")
      for base in (DENSE, PACKED) for value in (0, -1.5, float("nan"), float("inf"), 3e38, 1e-300, 10**400)),
    *(Wrong(base, {"window": value}, TypeError, f"window: expected an int or None, got {kind}")
      for base in (DENSE, PACKED)
      for value, kind in ((2.0, "float"), (True, "bool"), ("3", "str"), (np.float32(3), "numpy.float32"),
                          (torch.tensor(3), "torch.Tensor"))),
    *(Wrong(base, {"window": value}, ValueError, f"window: expected at least 1 or None, got {value}")
      for base in (DENSE, PACKED) for value in (0, -1)),
    *(Wrong(base, {"window": 2**31}, ValueError, "window: expected at most 2147483647 or None, got 2147483648")
      for base in (DENSE, PACKED)),
    Wrong(DENSE, {"first_key_position": 2**63}, ValueError,
          "first_key_position: expected at most 2147483647 or None, got 9223372036854775808"),
    Wrong(DENSE, {"first_key_position": 1.0}, TypeError, "first_key_position: expected an int or None, got float"),
    Wrong(DENSE, {"first_key_position": -1}, ValueError, "first_key_position: expected at least 0 or None, got -1"),
    *(Wrong(base, {"backend": 3}, TypeError, "backend: expected a name or None, got int") for base in (DENSE, PACKED)),
    *(Wrong(base, {"return_lse": 1}, TypeError, "return_lse: expected a bool, got int") for base in (DENSE, PACKED)),
]  # fmt: skip

MASKS = [
    Wrong(DENSE, {"key_mask": [True] * 7}, TypeError, "key_mask: expected a bool tensor, got list"),
    Wrong(DENSE, {"key_mask": rand(2, 7)}, TypeError, "key_mask: expected dtype bool, got torch.float32"),
    *(Wrong(DENSE, {"key_mask": rand(*shape, dtype=torch.bool)}, ValueError,
            f"key_mask: expected shape [2, 7] (batch, kv_len), got {list(shape)}") for shape in ((2, 5), (1, 7), (2, 1, 7))),
    Wrong(DENSE, {"key_mask": rand(2, 7, dtype=torch.bool, device="meta")}, ValueError,
          "key_mask: expected device cpu as q, got meta"),
    *(Wrong(DENSE, {name: tensor.to_sparse()}, TypeError, f"{name}: expected a dense tensor, got torch.sparse_coo")
      for name, tensor in (("key_mask", rand(2, 7, dtype=torch.bool)), ("key_lens", ints(7, 7)), ("bias", rand(5, 10)))),
    Wrong(DENSE, {"key_lens": [7, 7]}, TypeError, "key_lens: expected an integer tensor, got list"),
    Wrong(DENSE, {"key_lens": ints(7, 7, dtype=torch.int16)}, TypeError,
          "key_lens: expected dtype int32 or int64, got torch.int16"),
    Wrong(DENSE, {"key_lens": ints(7, 7, 7)}, ValueError, "key_lens: expected shape [2] (batch), got [3]"),
    Wrong(DENSE, {"key_lens": ints([7], [7])}, ValueError, "key_lens: expected shape [2] (batch), got [2, 1]"),
    Wrong(DENSE, {"key_lens": ints(7, 7, device="meta")}, ValueError, "key_lens: expected device cpu as q, got meta"),
    Wrong(DENSE, {"key_lens": ints(8, 2)}, ValueError, "key_lens: expected values from 0 to 7, got 2 to 8"),
    Wrong(DENSE, {"key_lens": ints(-1, 2)}, ValueError, "key_lens: expected values from 0 to 7, got -1 to 2"),
    Wrong(DENSE, {"bias": 1.0}, TypeError, "bias: expected a tensor, got float"),
    Wrong(DENSE, {"bias": rand(5, 10, dtype=BF16)}, TypeError,
          "bias: expected dtype float32 or q's torch.float32, got torch.bfloat16"),
    Wrong(DENSE, narrow(DENSE) | {"bias": rand(5, 10, dtype=F16)}, TypeError,
          "bias: expected dtype float32 or q's torch.bfloat16, got torch.float16"),
    Wrong(DENSE, {"bias": rand(5, 10, device="meta")}, ValueError, "bias: expected device cpu as q, got meta"),
    *(Wrong(DENSE, {"bias": rand(*shape)}, ValueError,
            "bias: expected a shape that broadcasts to [2, 4, 5, 10] (batch, heads, q_len, prefix_len + kv_len), "
            f"got {list(shape)}") for shape in ((5, 7), (3, 4, 5, 10), (2, 5, 10), (1, 2, 4, 5, 10), (4, 1, 4, 10))),
    Wrong(DENSE, {"bias": rand(5, 10).requires_grad_()}, ValueError,
          "bias: expected a tensor without gradient, got one with requires_grad=True; pass bias.detach()"),
]  # fmt: skip

PREFIXES = [
    *(Wrong(base, {name: ints(*values)}, ValueError,
            f"{name}: expected None beside one shared prefix, or prefix_k of [prefixes, kv_heads, prefix_len, head_dim], "
            "got prefix_k of shape [2, 3, 8]")
      for base, name, values in (
          (DENSE, "prefix_ids", (0, 0)), (DENSE, "prefix_lens", (3,)), (PACKED, "prefix_ids", (0, 0, 0)))),
    Wrong(BANK, {"prefix_ids": None}, ValueError,
          "prefix_ids: expected int [2] beside a bank of prefixes [3, 2, 3, 8], got None"),
    Wrong(PACKED_BANK, {"prefix_ids": None}, ValueError,
          "prefix_ids: expected int [3] beside a bank of prefixes [3, 2, 3, 8], got None"),
    Wrong(BANK, {"prefix_ids": ["name", None]}, TypeError, "prefix_ids: expected an integer tensor, got list"),
    Wrong(BANK, {"prefix_ids": ints(0, 1, 2)}, ValueError, "prefix_ids: expected shape [2] (batch), got [3]"),
    Wrong(PACKED_BANK, {"prefix_ids": ints(0, 1)}, ValueError, "prefix_ids: expected shape [3] (sequences), got [2]"),
    Wrong(BANK, {"prefix_ids": ints(0, 3)}, ValueError, "prefix_ids: expected values from -1 to 2, got 0 to 3"),
    Wrong(PACKED_BANK, {"prefix_ids": ints(0, -2, 1)}, ValueError, "prefix_ids: expected values from -1 to 2, got -2 to 1"),
    Wrong(BANK, {"prefix_lens": ints(3, 3)}, ValueError, "prefix_lens: expected shape [3] (prefixes), got [2]"),
    Wrong(BANK, {"prefix_lens": ints(3, 4, 0)}, ValueError, "prefix_lens: expected values from 0 to 3, got 0 to 4"),
    Wrong(BANK, {"prefix_lens": rand(3)}, TypeError, "prefix_lens: expected dtype int32 or int64, got torch.float32"),
]  # fmt: skip

PACKS = [
    *each(("cu_seqlens_q", "cu_seqlens_k"), [0, 2], TypeError, "{}: expected an integer tensor, got list", PACKED),
    *each(("cu_seqlens_k",), None, TypeError, "{}: expected an integer tensor, got NoneType", PACKED),
    *each(("cu_seqlens_q", "cu_seqlens_k"), ints([0, 6]), ValueError, "{}: expected shape [sequences + 1], got [1, 2]", PACKED),
    *each(("cu_seqlens_q", "cu_seqlens_k"), ints(), ValueError, "{}: expected shape [sequences + 1], got [0]", PACKED),
    *each(("cu_seqlens_q", "cu_seqlens_k"), rand(4), TypeError, "{}: expected dtype int32 or int64, got torch.float32", PACKED),
    *each(("cu_seqlens_q", "cu_seqlens_k"), ints(0, 6, device="meta"), ValueError, "{}: expected device cpu as q, got meta",
          PACKED),
    *(Wrong(PACKED, {name: value}, TypeError, f"{name}: expected an int, got {kind}")
      for name in ("max_seqlen_q", "max_seqlen_k") for value, kind in ((None, "NoneType"), (3.0, "float"), (True, "bool"))),
    *(Wrong(PACKED, {"cu_seqlens_q": ints(*values)}, ValueError,
            f"cu_seqlens_q: expected values that start at 0, never fall and end at 6 tokens, got {list(values)}")
      for values in ((1, 2, 5, 6), (0, 5, 2, 6), (0, 2, 5, 7), (0, 2, 5, 5))),
    Wrong(PACKED, {"cu_seqlens_k": ints(0, 4, 8, 10)}, ValueError,
          "cu_seqlens_k: expected values that start at 0, never fall and end at 9 tokens, got [0, 4, 8, 10]"),
    *(Wrong(PACKED, {name: longest - 1}, ValueError,
            f"{name}: expected at least the longest sequence, {longest}, got {longest - 1}")
      for name, longest in (("max_seqlen_q", 3), ("max_seqlen_k", 4))),
    Wrong(PACKED, {"cu_seqlens_k": ints(0, 4, 9), "max_seqlen_k": 5}, ValueError,
          "cu_seqlens_k: expected shape [4] as cu_seqlens_q, got [3]"),
    Wrong(PACKED, {"cu_seqlens_k": ints(0, 4, 6, 9)}, ValueError,
          "cu_seqlens_q: expected q_len <= kv_len in each causal sequence, got q_len 3 and kv_len 2 in sequence 1"),
    Wrong(PACKED, {"parent": [-1, 0, 0]}, TypeError, "parent: expected an integer tensor, got list"),
    Wrong(PACKED, {"parent": ints(-1, 0)}, ValueError, "parent: expected shape [3] (sequences), got [2]"),
    Wrong(PACKED, {"parent": ints(-1, 0, -1), "window": 2}, ValueError,
          "parent: expected None beside a window, got a parent tensor and window=2"),
    *(Wrong(PACKED, {"parent": ints(*values)}, ValueError,
            f"parent: expected -1 or an earlier sequence for sequence {child}, got {values[child]}")
      for child, values in ((0, (1, -1, -1)), (1, (-1, 1, -1)), (2, (-1, 0, -2)), (2, (-1, -1, 3)))),
    Wrong(PACKED, {"parent": ints(-1, 0, 1)}, ValueError,
          "parent: expected a sequence without a parent for sequence 2, got 1, which has one itself"),
    Wrong(PACKED_BANK, {"parent": ints(-1, -1, 1)}, ValueError,
          "parent: expected one of prefix id -1 for sequence 2, got 1 of prefix id 0"),
]  # fmt: skip

TABLE = [*TENSORS, *OPTIONS, *MASKS, *PREFIXES, *PACKS]


def name_of(wrong):
    return wrong.message[:90] if isinstance(wrong, Wrong) else None


@pytest.fixture
def operator_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(ops, "attention", lambda *args: calls.append(args))
    return calls


@pytest.mark.parametrize("wrong", TABLE, ids=name_of)
def test_wrong_call(operator_calls, wrong):
    with pytest.raises(wrong.error) as error:
        wrong.call()
    assert (type(error.value), str(error.value)) == (wrong.error, wrong.message)
    assert not operator_calls
    options = {name: value for name, value in (wrong.base | wrong.change).items() if name not in DENSE}
    tensors = [(wrong.base | wrong.change)[name] for name in DENSE]
    with pytest.raises(wrong.error) as error:
        prefix_kernels.explain_backends(*tensors, **options)
    assert str(error.value) == wrong.message


@pytest.mark.parametrize("base", [DENSE, BANK, PACKED, PACKED_BANK], ids=["dense", "bank", "packed", "packed bank"])
def test_the_calls_that_the_wrong_ones_differ_from_are_right(base):
    Wrong(base, {}, ValueError, "").call()


def test_every_check_is_in_the_table():
    """Each `raise` of validate.py and api.py is where some wrong call ends."""
    raised = set()
    for wrong in TABLE:
        with pytest.raises(wrong.error) as error:
            wrong.call()
        last = traceback.extract_tb(error.value.__traceback__)[-1]
        raised.add((last.filename, last.lineno))
    for module in (validate, api):
        tree = ast.parse(Path(module.__file__).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise):
                lines = {(module.__file__, line) for line in range(node.lineno, node.end_lineno + 1)}
                assert lines & raised, f"{module.__name__}, line {node.lineno}: no wrong call of the table ends here"


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (DENSE, {"scale": 0, "window": 1, "softcap": 1, "first_key_position": 0}),
        (DENSE, {"key_lens": ints(0, 7, dtype=torch.int64), "key_mask": rand(2, 7, dtype=torch.bool)}),
        (DENSE, {"causal": False, "k": rand(2, 2, 4, 8), "v": rand(2, 2, 4, 6)}),
        (DENSE, {"k": rand(2, 2, 5, 8), "v": rand(2, 2, 5, 6), "causal": True}),
        (DENSE, {"prefix_k": rand(2, 0, 8), "prefix_v": rand(2, 0, 6)}),
        (DENSE, narrow(DENSE, prefix_k=F32, prefix_v=F32) | {"bias": rand(1)}),
        (DENSE, {name: tensor.half() for name, tensor in DENSE.items()} | {"bias": rand(2, 4, 5, 10, dtype=F16)}),
        (DENSE, {name: tensor.double() for name, tensor in DENSE.items()} | {"bias": rand(4, 1, 10)}),
        (BANK, {"prefix_ids": ints(-1, 2, dtype=torch.int64), "prefix_lens": ints(0, 3, 1)}),
        (PACKED, {"max_seqlen_q": 99, "max_seqlen_k": 99, "parent": ints(-1, 0, 0), "cu_seqlens_q": ints(0, 2, 5, 6).long()}),
        (PACKED, {"causal": False, "cu_seqlens_k": ints(0, 0, 0, 9), "max_seqlen_k": 9}),
        (PACKED, NOTHING_PACKED),
        (PACKED_BANK, {"parent": ints(-1, 0, -1), "prefix_ids": ints(2, 2, -1)}),
    ],
)  # fmt: skip
def test_right_calls_at_the_edges(base, change):
    assert Wrong(base, change, ValueError, "").call().isfinite().all()


INTS = (np.int64, np.uint8, np.array)


@pytest.mark.parametrize("kind", INTS, ids=lambda kind: kind.__name__)
def test_what_can_be_an_index_is_an_int(kind):
    dense = api._dense_inputs(**DENSE, window=kind(2), first_key_position=kind(1))
    packed = api._varlen_inputs(**PACKED | {name: kind(PACKED[name]) for name in ("max_seqlen_q", "max_seqlen_k")})
    found = [dense.window, dense.first_key_position, packed.max_seqlen_q, packed.max_seqlen_k]
    assert found == [2, 1, 3, 4] and {type(value) for value in found} == {int}


@pytest.mark.parametrize("number", (np.float32(0.5), np.float16(0.5), np.float64(0.5), Fraction(1, 2)), ids=repr)
def test_any_real_number_is_one(number):
    inputs = api._dense_inputs(**DENSE, scale=number, softcap=number)
    assert [type(value) for value in (inputs.scale, inputs.softcap)] == [float, float]
    assert (inputs.scale, inputs.softcap) == (0.5, 0.5)
    assert api._dense_inputs(**DENSE, scale=np.int64(2)).scale == 2.0


def test_a_bias_that_wants_a_gradient_is_fine_where_none_is_recorded():
    with torch.no_grad():
        prefix_kernels.prefix_attention(**DENSE, bias=rand(5, 10).requires_grad_())


@pytest.mark.parametrize("wrong", [wrong for wrong in TENSORS if wrong.base is DENSE], ids=name_of)
def test_autocast_hides_no_wrong_tensor(operator_calls, wrong):
    """A wrong shape, device or type stays wrong; a dtype that autocast changes does not."""
    floats = {F16, BF16, F32}
    changed = [tensor.dtype for tensor in wrong.change.values() if isinstance(tensor, torch.Tensor)]
    if "dtype" in wrong.message and set(changed) <= floats:
        return
    with torch.autocast("cpu", BF16), pytest.raises(wrong.error, match="^" + wrong.message.split(" ")[0]):
        wrong.call()
    assert not operator_calls


def test_compiled_wrong_calls_raise_too():
    compiled = torch.compile(prefix_kernels.prefix_attention, backend="aot_eager")
    with pytest.raises(ValueError, match="^k: expected head_dim 8 as in q"):
        compiled(**DENSE | {"k": rand(2, 2, 7, 6)})


OUT_OF_RANGE = [  # on the left what is out of range, on the right what it acts as
    (DENSE, {"key_lens": ints(99, -5)}, {"key_lens": ints(7, 0)}),
    (BANK, {"prefix_ids": ints(3, -7)}, {"prefix_ids": ints(-1, -1)}),
    (BANK, {"prefix_ids": ints(1, 2), "prefix_lens": ints(3, -4, 9)}, {"prefix_ids": ints(1, 2), "prefix_lens": ints(3, 0, 3)}),
]


@pytest.mark.parametrize("backend", prefix_kernels.available_backends())
@pytest.mark.parametrize(("base", "outside", "inside"), OUT_OF_RANGE)
def test_index_values_are_not_read_under_compile(backend, base, outside, inside):
    """There they are taken as on a device: ids out of range as −1, lengths clamped."""
    base = base | {name: torch.randn(*base[name].shape[:-1], 16) for name in DENSE}  # every backend serves 16
    with pytest.raises(ValueError, match="expected values from"):
        prefix_kernels.prefix_attention(**base | outside, backend=backend)
    torch.compiler.reset()
    compiled = torch.compile(prefix_kernels.prefix_attention, backend="aot_eager", fullgraph=True)
    got = compiled(**base | outside, backend=backend)
    assert torch.equal(got, prefix_kernels.prefix_attention(**base | inside, backend=backend))


PACKED_OUT_OF_RANGE = [
    (PACKED, {"cu_seqlens_k": ints(0, 4, 8, 10**9)}, "cu_seqlens_k: expected values that start at 0"),
    (PACKED, {"cu_seqlens_k": ints(0, 4, 3, 9)}, "cu_seqlens_k: expected values that start at 0"),
    (PACKED, {"cu_seqlens_q": ints(-5, 2, 5, 6)}, "cu_seqlens_q: expected values that start at 0"),
    (PACKED, {"cu_seqlens_q": ints(0, 2, 5, 5)}, "cu_seqlens_q: expected values that start at 0"),
    (PACKED, {"parent": ints(-1, 10**6, -1)}, "parent: expected an earlier sequence"),
    (PACKED, {"parent": ints(1, -1, -1)}, "parent: expected an earlier sequence"),
    (PACKED, {"parent": ints(-1, 0, 1)}, "parent: expected an earlier sequence"),
    (PACKED_BANK, {"parent": ints(-1, -1, 1)}, "parent: expected an earlier sequence"),
]


ON_THE_HOST = [name for name in ("cpu", "sdpa", "reference") if name in prefix_kernels.available_backends()]


@pytest.mark.parametrize("backend", ON_THE_HOST)
@pytest.mark.parametrize(("base", "outside", "message"), PACKED_OUT_OF_RANGE)
def test_packs_that_lie_outside_of_their_tensors_are_refused_under_compile(base, outside, message, backend):
    """They would read and write what belongs to others, or end the process."""
    base = base | {name: torch.randn(*base[name].shape[:-1], 16, requires_grad=True) for name in DENSE}
    torch.compiler.reset()
    compiled = torch.compile(prefix_kernels.prefix_attention_varlen, backend="aot_eager", fullgraph=True)
    compiled(**base, backend=backend).sum().backward()
    with pytest.raises((RuntimeError, ValueError), match=message):
        compiled(**base | outside, backend=backend).sum().backward()


@pytest.mark.parametrize("backend", ON_THE_HOST)
def test_more_queries_than_keys_under_compile(backend):
    """The queries in front of the first key see the prefix alone, and no sequence sees another one's keys."""
    torch.manual_seed(0)
    base = PACKED | {name: torch.randn(*PACKED[name].shape[:-1], 16, requires_grad=True) for name in DENSE}
    ends = {"cu_seqlens_q": ints(0, 3, 3, 6), "cu_seqlens_k": ints(0, 1, 8, 9), "max_seqlen_k": 7}
    torch.compiler.reset()
    compiled = torch.compile(prefix_kernels.prefix_attention_varlen, backend="aot_eager", fullgraph=True)
    out = compiled(**base | ends, backend=backend)
    out.square().sum().backward()
    expected = []
    seen = ((slice(2), slice(0, 0)), (slice(2, 3), slice(0, 1)), (slice(3, 5), slice(8, 8)), (slice(5, 6), slice(8, 9)))
    for queries, keys in seen:
        own = {name: base[name][keys].transpose(0, 1)[None] for name in ("k", "v")}
        row = base["q"][queries].transpose(0, 1)[None]
        found = prefix_kernels.prefix_attention(row, **own, prefix_k=base["prefix_k"], prefix_v=base["prefix_v"], causal=False)
        expected.append(found[0].transpose(0, 1))
    torch.testing.assert_close(out, torch.cat(expected))
    grads = [base[name].grad for name in DENSE]
    right = torch.autograd.grad(torch.cat(expected).square().sum(), [base[name] for name in DENSE])
    for grad, other in zip(grads, right, strict=True):
        torch.testing.assert_close(grad, other, atol=1e-5, rtol=1e-4)


INDEXED = [
    (DENSE, {"key_lens": ints(7, 3)}), (BANK, {"prefix_lens": ints(1, 2, 3)}), (PACKED_BANK, {"parent": ints(-1, 0, -1)}),
]  # fmt: skip


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize(("base", "change"), INDEXED)
def test_index_values_are_not_read_while_something_traces(base, change, mode):
    arguments = base | change
    expected = Wrong(base, change, ValueError, "").call()
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}

    def function(*values):
        return Wrong(arguments, dict(zip(tensors, values, strict=True)), ValueError, "").call()

    traced = make_fx(function, tracing_mode=mode)(*tensors.values())
    assert torch.equal(traced(*tensors.values()), expected)
    with FakeTensorMode() as fakes:
        assert function(*map(fakes.from_tensor, tensors.values())).shape == expected.shape


def test_index_values_are_not_read_while_something_maps():
    lens = ints([7, 3], [2, 0], [5, 6])
    base = DENSE | {name: torch.randn(tensor.shape) for name, tensor in DENSE.items()}
    mapped = torch.func.vmap(lambda lens: prefix_attention(**base, key_lens=lens))(lens)
    assert torch.equal(mapped, torch.stack([prefix_attention(**base, key_lens=row) for row in lens]))


@pytest.mark.parametrize("wrong", [wrong for wrong in TABLE if "expected values" in wrong.message], ids=name_of)
def test_index_values_are_not_read_from_a_device(wrong):
    arguments = wrong.base | wrong.change
    arguments = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    assert Wrong(wrong.base, arguments, ValueError, "").call().is_meta


@pytest.mark.parametrize("inference", [False, True])
def test_index_values_that_passed_are_looked_at_again_when_they_change(inference):
    q, prefix = torch.zeros(2, 1, 1, 16), torch.zeros(3, 1, 4, 16)
    with torch.inference_mode(inference), torch.no_grad():
        ids, lens = torch.tensor([2, 0]), torch.tensor([4, 4, 4])
        call = {"prefix_ids": ids, "prefix_lens": lens}
        for _ in range(2):
            prefix_attention(q, q, q, prefix, prefix, **call)
        with pytest.raises(ValueError, match="prefix_ids: expected values from -1 to 1, got 0 to 2"):
            prefix_attention(q, q, q, prefix[:2], prefix[:2], prefix_ids=ids)
        ids[0] = 3
        with pytest.raises(ValueError, match="prefix_ids: expected values from -1 to 2, got 0 to 3"):
            prefix_attention(q, q, q, prefix, prefix, **call)
        with pytest.raises(ValueError, match="prefix_ids: expected values from -1 to 2, got 5 to 5"):
            prefix_attention(q, q, q, prefix, prefix, prefix_ids=torch.tensor([5, 5]), prefix_lens=lens)


def test_shapes_that_passed_are_not_what_others_pass_by():
    q, prefix = torch.zeros(2, 2, 3, 16), torch.zeros(2, 4, 16)
    prefix_attention(q, q, q, prefix, prefix)
    prefix_attention(q, q, q, prefix, prefix)
    with pytest.raises(TypeError, match="k: expected dtype torch.float32 as q, got torch.float16"):
        prefix_attention(q, q.half(), q, prefix, prefix)
    with pytest.raises(TypeError, match="v: expected a tensor, got ndarray"):
        prefix_attention(q, q, q.numpy(), prefix, prefix)
    with pytest.raises(ValueError, match="k: expected device cpu as q, got meta"):
        prefix_attention(q, q.to("meta"), q, prefix, prefix)
