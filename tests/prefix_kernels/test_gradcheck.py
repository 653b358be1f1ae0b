"""Gradients against finite differences in float64, through the public API: independent of every formula of ours."""

import pytest
import torch

from support.cases import Case
from support.inputs import make_inputs

BACKENDS = ("sdpa", "reference")  # those that compute in float64
SMALL = {"heads": 2, "kv_heads": 1, "q_len": 3, "kv_len": 4, "head_dim": 3, "prefix_len": 2}
BANK = SMALL | {"batch": 3, "prefixes": 3, "prefix_ids": (2, -1, 0), "prefix_lens": (2, 2, 1)}
PACKED = {**SMALL, "seqlens_q": (3, 1, 2), "seqlens_k": (4, 2, 2)}
GRADCHECK_CASES = (
    Case("causal", **SMALL),
    Case("not causal, value_dim", **SMALL, causal=False, value_dim=5),
    Case("scale", **SMALL, scale=-0.7),
    Case("softcap", **SMALL, softcap=1.5),
    Case("window", **SMALL, window=2),
    Case("sliding prefix", **SMALL, window=4, first_key_position=0),
    Case("hidden row", **SMALL | {"prefix_len": 0}, padding="row"),
    Case("fill", **SMALL, key_lens=(2, 4)),
    Case("bias", **SMALL, bias=(0, 0, 0, 0), bias_hides=True),
    Case("bank", **BANK),
    Case("bank, everything", **BANK, key_lens=(4, 2, 3), padding="left", bias=(0, 1, 0, 0), window=5, first_key_position=1),
    Case("softcap, bank, window", **BANK, softcap=2.0, window=2),
    Case("varlen", **PACKED),
    Case("varlen, bank, softcap", **PACKED, prefixes=2, prefix_ids=(1, -1, 1), prefix_lens=(2, 1), softcap=2.0),
    Case("parent", **SMALL, seqlens_q=(3, 2, 1), parent=(-1, 0, 0)),
)
REFUSED = {"sdpa": {case.name for case in GRADCHECK_CASES if case.softcap is not None}}


def call(case, backend):
    """The call as a function of its five tensors; lse is 0 in place of −inf, which has no difference quotient."""
    inputs = make_inputs(case, torch.float64)

    def function(*tensors):
        inputs.tensors = tensors
        out, lse = inputs.call(backend=backend, return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    return function, inputs.tensors


@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, case):
    function, tensors = call(case, backend)
    if case.name in REFUSED.get(backend, ()):
        with pytest.raises(NotImplementedError):
            function(*tensors)
        return
    assert torch.autograd.gradcheck(function, tensors, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output", [0, 1], ids=["out alone", "lse alone"])
def test_gradcheck_of_one_output(backend, output):
    function, tensors = call(Case("bias", **BANK, bias=(0, 0, 0, 0)), backend)
    assert torch.autograd.gradcheck(lambda *tensors: function(*tensors)[output], tensors, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("loss", [torch.sum, lambda out: out.square().sum()], ids=["sum", "squares"])  # its gradient has none
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_gradients_are_refused(backend, loss):
    function, tensors = call(Case("causal", **SMALL), backend)
    out = function(*tensors)[0]
    first = torch.autograd.grad(loss(out), tensors, create_graph=True)
    torch.autograd.grad(loss(function(*tensors)[0]), tensors, create_graph=True)[0].mul_(2)  # they may be changed in place
    for inputs in ([tensors[0]], [tensors[3]], None):  # named ones alone, of which no gradient may be left out in silence
        with pytest.raises(RuntimeError, match="differentiate twice"):
            (out.sum() + first[0].sum()).backward(inputs=inputs, retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.grad(out.sum() + first[0].sum(), tensors[4])
