"""The counts of an AttentionProblem, against counting pairs and bytes one by one."""

import pytest
import torch

from prefix_kernels import api
from support.cases import Case
from support.inputs import make_inputs


def problem_of(monkeypatch, case, *dtypes):
    seen = []
    monkeypatch.setattr(api.select, "explain", lambda problem, backend: seen.append(problem))
    inputs = make_inputs(case, *dtypes)
    api.explain_backends(*inputs.tensors, **inputs.options)
    return inputs, seen[0]


@pytest.mark.parametrize(
    "case",
    [
        Case("causal", q_len=5, kv_len=5, prefix_len=3),
        Case("chunk", q_len=3, kv_len=7, prefix_len=3, value_dim=16),
        Case("decode", q_len=1, kv_len=7),
        Case("not causal", q_len=4, kv_len=6, causal=False),
        Case("bank", prefixes=3, prefix_ids=(2, 0)),
    ],
    ids=str,
)
def test_counts(monkeypatch, case):
    inputs, problem = problem_of(monkeypatch, case, torch.bfloat16, torch.float32)
    pairs = sum(
        not case.causal or key <= query + case.kv_len - case.q_len for query in range(case.q_len) for key in range(case.kv_len)
    )
    pairs += case.q_len * case.prefix_len
    value_dim = case.value_dim or case.head_dim
    assert problem.flops() == 2 * (case.head_dim + value_dim) * case.batch * case.heads * pairs
    out, lse = inputs.call(return_lse=True)
    assert problem.bytes_moved() == sum(tensor.numel() * tensor.element_size() for tensor in (*inputs.tensors, out, lse))


def test_varlen_counts_tokens_and_bounds(monkeypatch):
    inputs, problem = problem_of(monkeypatch, Case("varlen", seqlens_q=(4, 2), seqlens_k=(5, 3), prefix_len=3), torch.float32)
    out, lse = inputs.call(return_lse=True)
    assert problem.bytes_moved() == sum(tensor.numel() * tensor.element_size() for tensor in (*inputs.tensors, out, lse))
    assert (problem.batch, problem.q_tokens, problem.k_tokens, problem.q_len, problem.kv_len) == (2, 6, 8, 5, 6)
    assert problem.flops() == 2 * 64 * 4 * 6 * (3 + 6 - 4 / 2)
