"""The sdpa backend where torch has no attention kernels for it: tensors on the CPU that say they lie elsewhere.

What remains for such a device: that its matrix products do what the CPU's do.
"""

from dataclasses import replace

import pytest
import torch

from prefix_kernels import select
from prefix_kernels.backends import sdpa
from prefix_kernels.backends.sdpa import composed, stock
from support.allocations import allocations
from support.cases import CASES, Case
from support.compare import DTYPES, compare, serves
from support.inputs import make_inputs

NOT_REFUSED = [case for case in CASES if case.softcap is None]
READ = [case for case in NOT_REFUSED if case.prefixes is not None or case.seqlens_q is not None]


@pytest.mark.parametrize("scores", [composed.SCORES, 50], ids=["whole", "in blocks"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float32 prefix"])
@pytest.mark.parametrize("case", NOT_REFUSED, ids=str)
def test_elsewhere(monkeypatch, elsewhere, case, dtype, scores):
    """Outputs and gradients as good as eager attention's, without a kernel that such a device would not have."""
    monkeypatch.setattr(composed, "SCORES", scores)
    calls = elsewhere("mps")
    assert serves("sdpa", make_inputs(case, *DTYPES[dtype]))
    compare(case, *DTYPES[dtype], "sdpa")
    assert not calls


@pytest.mark.parametrize("case", NOT_REFUSED, ids=str)
def test_gpus_that_are_called_cuda_but_are_not_nvidias(monkeypatch, elsewhere, case):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    calls = elsewhere("cuda")
    assert serves("sdpa", make_inputs(case, *DTYPES["bfloat16"])) == (case not in READ)
    compare(case, *DTYPES["bfloat16"], "sdpa")
    assert not calls


@pytest.mark.parametrize("case", NOT_REFUSED, ids=str)
def test_float64_on_a_gpu(elsewhere, case):
    calls = elsewhere("cuda")
    compare(case, *DTYPES["float64"], "sdpa")
    assert not calls


MASKED = {"bias": Case("bias", bias=(1, 1, 0, 0)), "window": Case("window", window=30, first_key_position=0)}


@pytest.mark.parametrize("case", MASKED, ids=str)
@pytest.mark.parametrize("q_len", [1, 40])
def test_a_masked_prefix_is_read_by_all_rows_at_once(monkeypatch, elsewhere, case, q_len):
    """Also for its gradient, and a long one: its keys are copied for no row."""
    elsewhere("mps")
    parts = []
    monkeypatch.setattr(stock.composed, "_Rows", lambda q, k, rows=composed._Rows: parts.append(k.shape[0]) or rows(q, k))
    case = replace(MASKED[case], batch=3, q_len=q_len, kv_len=q_len, prefix_len=300)
    compare(case, *DTYPES["float32"], "sdpa")
    assert sorted(parts) == [1, 1, 3, 3]


def test_memory_is_bounded_by_blocks(monkeypatch, elsewhere):
    """Scores of a long prefix would take 38 MB."""
    elsewhere("mps")
    inputs = make_inputs(Case("long", batch=4, heads=8, kv_heads=2, q_len=300, kv_len=300, prefix_len=1000, head_dim=16))
    monkeypatch.setattr(composed, "SCORES", 2**16)
    monkeypatch.setattr(sdpa, "SCORES", 2**16)
    out = inputs.call(backend="sdpa")
    for run in (lambda: inputs.call(backend="sdpa"), lambda: torch.autograd.grad(out.sum(), inputs.tensors, retain_graph=True)):
        assert allocations(run)[0] < 8 * 2**20


def test_it_comes_before_the_reference():
    for device in ("mps", "xpu"):
        problem = select._small_problem(device, torch.bfloat16)
        usable = [name for name in select.preferred(problem) if select.load_backend(name).why_not(problem) is None]
        assert usable == ["sdpa", "reference"]
