"""Random shapes and flags against float64, and what must hold whatever they are; hypothesis draws the same cases every time."""

import dataclasses

import pytest
import torch

pytest.importorskip("hypothesis", reason="needs hypothesis, which is not installed")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prefix_kernels
from support.cases import Case
from support.compare import BACKENDS, NAMES, expectation, gradients, serves
from support.inputs import make_inputs

drawn = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, print_blob=False,
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.function_scoped_fixture),
)  # fmt: skip
on_gpu = pytest.mark.gpu
DEVICES = [("cpu", name) for name in BACKENDS]
DEVICES += [pytest.param("cuda", "sdpa", marks=on_gpu)]  # Triton compiles four kernels for each kind of call: minutes


@st.composite
def cases(draw, packed=None, bias=True):
    """Any call that validation lets pass, small."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    dims = st.sampled_from((16, 32, 48, 80))
    head_dim = draw(dims)
    causal, window = draw(st.booleans()), draw(st.none() | st.integers(1, 12))
    fields = {
        "heads": kv_heads * group, "kv_heads": kv_heads, "head_dim": head_dim, "value_dim": draw(st.none() | dims),
        "prefix_len": draw(st.sampled_from((0, 1, 3, 17, 33))), "causal": causal, "window": window,
        "softcap": draw(st.none() | st.sampled_from((1.0, 20.0))), "scale": draw(st.none() | st.sampled_from((-0.2, 0.5))),
    }  # fmt: skip
    if draw(st.booleans()) if packed is None else packed:
        seqlens_q = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
        least = seqlens_q if causal else [0] * len(seqlens_q)
        fields |= {"seqlens_q": tuple(seqlens_q), "seqlens_k": tuple(n + draw(st.integers(0, 5)) for n in least)}
        rows = len(seqlens_q)
        if window is None and draw(st.booleans()):
            roots = [draw(st.booleans()) or row == 0 for row in range(rows)]
            parents = [-1 if root else draw(st.sampled_from([r for r in range(row) if roots[r]]))
                       for row, root in enumerate(roots)]  # fmt: skip
            fields["parent"] = tuple(parents)
    else:
        rows, q_len = draw(st.integers(1, 4)), draw(st.integers(1, 12))
        kv_len = draw(st.integers(q_len if causal else 0, 24))
        fields |= {
            "batch": rows, "q_len": q_len, "kv_len": kv_len, "contiguous": draw(st.booleans()),
            "key_lens": draw(st.none() | st.tuples(*[st.integers(0, kv_len)] * rows)),
            "padding": draw(st.none() | st.sampled_from(("left", "right", "holes", "row"))),
            "first_key_position": draw(st.none() | st.integers(0, 4)),
            "bias": draw(st.none() | st.tuples(*[st.integers(0, 1)] * 3, st.just(0))) if bias else None,
        }  # fmt: skip
    if fields.get("parent") is None and draw(st.booleans()):
        prefixes = draw(st.integers(1, 3))
        fields |= {
            "prefixes": prefixes, "prefix_ids": draw(st.tuples(*[st.integers(-1, prefixes - 1)] * rows)),
            "prefix_lens": draw(st.none() | st.tuples(*[st.integers(0, fields["prefix_len"])] * prefixes)),
        }  # fmt: skip
    return Case("drawn", **fields)


@pytest.mark.parametrize("device, backend", DEVICES)
@given(case=cases())
@drawn
def test_any_call(device, backend, case):
    """In float32 with a fixed bound: what rounds how well is tested case by case, here wrong sums and masks shall show."""
    inputs = make_inputs(case, device=device)
    if not serves(backend, inputs):
        return
    grad_out, grad_lse, expected, _ = expectation(case, torch.float32, torch.float32)
    out, lse = inputs.call(backend=backend, return_lse=True)
    found = out, lse, *gradients(inputs, out, lse, grad_out.to(device), grad_lse.to(device))
    for name, value, right in zip(NAMES, found, expected, strict=True):
        torch.testing.assert_close(value.cpu().double(), right, atol=1e-4, rtol=1e-4, msg=lambda text, of=name: f"{of}: {text}")


def call(backend, case, tensors, options, **changes):
    """(out, lse) of a call in float64 or float32, as `backend` takes it."""
    function = prefix_kernels.prefix_attention if case.seqlens_q is None else prefix_kernels.prefix_attention_varlen
    return function(*tensors, **options | changes, backend=backend, return_lse=True)


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(packed=False, bias=False), order=st.randoms(use_true_random=False))
@drawn
def test_rows_in_another_order_give_the_same_rows(backend, case, order):
    inputs = make_inputs(case)
    if not serves(backend, inputs):
        return
    rows = list(range(case.batch))
    order.shuffle(rows)
    q, k, v, *prefix = inputs.tensors
    of_rows = {name: inputs.options[name] for name in ("key_mask", "key_lens", "prefix_ids")}
    changes = {name: value if value is None else value[rows] for name, value in of_rows.items()}
    out, lse = call(backend, case, inputs.tensors, inputs.options)
    shuffled = call(backend, case, (q[rows], k[rows], v[rows], *prefix), inputs.options, **changes)
    close(shuffled[0], out[rows])
    close(shuffled[1], lse[rows])


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(packed=False, bias=False))
@drawn
def test_a_prefix_is_keys_in_front(backend, case):
    """A pinned prefix of a causal call without a window is what the first keys of every row are."""
    case = dataclasses.replace(case, prefixes=None, prefix_ids=None, prefix_lens=None, causal=True, window=None,
                               first_key_position=None, q_len=min(case.q_len, case.kv_len), key_lens=None)  # fmt: skip
    inputs = make_inputs(case)
    if not serves(backend, inputs) or case.kv_len == 0:
        return
    q, k, v, prefix_k, prefix_v = inputs.tensors
    keys, values = (torch.cat([p.expand(case.batch, -1, -1, -1), t], 2) for p, t in ((prefix_k, k), (prefix_v, v)))
    mask = inputs.options["key_mask"]
    if mask is not None:
        mask = torch.cat([mask.new_ones(case.batch, case.prefix_len), mask], 1)
    out, lse = call(backend, case, inputs.tensors, inputs.options)
    whole = call(backend, case, (q, keys, values, prefix_k[:, :0], prefix_v[:, :0]), inputs.options, key_mask=mask)
    close(out, whole[0])
    close(lse, whole[1])


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(packed=False, bias=False), cut=st.floats(0, 1))
@drawn
def test_a_prefix_in_two_parts_merges_by_log_sum_exp(backend, case, cut):
    """[prefix ; keys] = [first part] + [second part ; keys], weighted by what each lse says."""
    case = dataclasses.replace(case, prefixes=None, prefix_ids=None, prefix_lens=None, first_key_position=None)
    inputs = make_inputs(case)
    if not serves(backend, inputs):
        return
    q, k, v, prefix_k, prefix_v = inputs.tensors
    at = int(cut * case.prefix_len)
    out, lse = call(backend, case, inputs.tensors, inputs.options)
    rest = call(backend, case, (q, k, v, prefix_k[:, at:], prefix_v[:, at:]), inputs.options)
    alone = {"key_mask": None, "key_lens": None, "causal": False, "window": None}
    first = call(backend, case, (q, k[:, :, :0], v[:, :, :0], prefix_k[:, :at], prefix_v[:, :at]), inputs.options, **alone)
    both = torch.logaddexp(first[1], rest[1])
    weights = [torch.where(both == -torch.inf, 0, (part[1] - both).exp())[..., None] for part in (first, rest)]
    close(both, lse)
    close(weights[0] * first[0] + weights[1] * rest[0], out)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(packed=True))
@drawn
def test_packed_sequences_are_padded_rows(backend, case):
    case = dataclasses.replace(case, parent=None)
    inputs = make_inputs(case)
    if not serves(backend, inputs):
        return
    q, k, v, *prefix = inputs.tensors
    out, lse = call(backend, case, inputs.tensors, inputs.options)
    names = ("causal", "scale", "window", "softcap")
    options = {name: inputs.options[name] for name in names}
    start_q = start_k = 0
    for row, (q_len, kv_len) in enumerate(zip(case.seqlens_q, case.seqlens_k, strict=True)):
        own_q, own_k = slice(start_q, start_q + q_len), slice(start_k, start_k + kv_len)
        alone = [tensor[part].transpose(0, 1)[None] for tensor, part in ((q, own_q), (k, own_k), (v, own_k))]
        bank = {} if case.prefixes is None else {
            "prefix_ids": inputs.options["prefix_ids"][row : row + 1], "prefix_lens": inputs.options["prefix_lens"]
        }  # fmt: skip
        row_out, row_lse = prefix_kernels.prefix_attention(*alone, *prefix, **options, **bank, backend=backend, return_lse=True)
        close(out[own_q].transpose(0, 1), row_out[0])
        close(lse[:, own_q], row_lse[0])
        start_q, start_k = start_q + q_len, start_k + kv_len
