"""workspace_bytes against what torch's allocator sees: never less than is taken, and not many times more."""

import pytest
import torch

import prefix_kernels
from support.allocations import allocations
from support.cases import CASES, Case
from support.compare import BACKENDS, DTYPES, serves
from support.inputs import make_inputs

LARGE = (
    Case("training", batch=8, q_len=64, kv_len=64, prefix_len=300),
    Case("training, padded", batch=8, q_len=64, kv_len=64, prefix_len=100, padding="left", window=50),
    Case("decode", batch=32, q_len=1, kv_len=100, prefix_len=600, kv_heads=1),
    Case("decode, fill", batch=32, q_len=1, kv_len=100, prefix_len=600, key_lens=(60, *range(31))),
    Case("bank", batch=8, q_len=32, kv_len=32, prefix_len=200, prefixes=4, prefix_ids=(0, 1, 2, 3, 0, 1, -1, 2)),
    Case("packed", seqlens_q=(60, 70, 50, 64), prefix_len=128),
    Case("parent", seqlens_q=(60, 30, 50, 64), parent=(-1, 0, 0, -1), prefix_len=128),
)

UNEQUAL = (  # what the smaller dimension's tensors are padded to counts
    Case("values wider than keys", batch=8, q_len=1, kv_len=2000, head_dim=16, value_dim=256),
    Case(
        "values narrower than keys, bias",
        batch=64,
        q_len=1,
        kv_len=20,
        prefix_len=1500,
        head_dim=64,
        bias=(0, 0, 0, 0),
        value_dim=32,
    ),
    Case(
        "values narrower than keys, sliding prefix",
        batch=64,
        q_len=1,
        kv_len=20,
        prefix_len=1500,
        head_dim=64,
        value_dim=32,
        window=30,
        first_key_position=0,
    ),
    Case("packed, values wider than keys", seqlens_q=(900,), seqlens_k=(900,), head_dim=16, value_dim=256),
    Case("a long prefix for few queries", batch=64, heads=8, kv_heads=8, q_len=1, kv_len=300, prefix_len=4000, head_dim=128),
    Case("keys wider than values", batch=2, q_len=200, kv_len=400, head_dim=256, value_dim=16, causal=False),
)

SMALL = 4096  # bytes: index tensors and the like
# What is stated is at most LOOSE times what is taken plus SCRATCH: parts that a bank leaves empty, kernels' own buffers.
LOOSE = {"cpu": 3, "sdpa": 6, "reference": 6}
SCRATCH = {"cpu": 2**19, "sdpa": 2**23, "reference": 2**16}


def taken(inputs, backend):
    """Bytes of the forward and the backward pass at their peak, less what they return."""
    out, lse = inputs.call(backend=backend, return_lse=True)
    grads = [torch.randn(tensor.shape).to(tensor.dtype) for tensor in (out, lse)]
    returned = [sum(t.numel() * t.element_size() for t in tensors) for tensors in ((out, lse), inputs.tensors)]
    forward = allocations(lambda: inputs.call(backend=backend, return_lse=True))[0]
    backward = allocations(lambda: torch.autograd.grad((out, lse), inputs.tensors, grads, retain_graph=True))[0]
    return int(forward) - returned[0], int(backward) - returned[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float32 prefix"])
@pytest.mark.parametrize("case", CASES + LARGE + UNEQUAL, ids=str)
@pytest.mark.parametrize("backend", (*BACKENDS, "sdpa on mps"))
def test_bound(elsewhere, backend, case, dtype):
    backend, _, device = backend.partition(" on ")
    if device:
        elsewhere(device)
    inputs = make_inputs(case, *DTYPES[dtype])
    if not serves(backend, inputs):
        return
    stated = prefix_kernels.workspace_bytes(*inputs.tensors, **inputs.options, backend=backend)
    if not inputs.tensors[0].numel():
        return
    for name, bytes_taken in zip(("forward", "backward"), taken(inputs, backend), strict=True):
        assert bytes_taken <= stated[name] + SMALL, name
        if case in LARGE:
            assert stated[name] <= LOOSE[backend] * bytes_taken + SCRATCH[backend], name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("longest", [1, 2, 4, 64])
def test_the_longest_sequence_may_be_shorter_than_stated(backend, longest):
    inputs = make_inputs(Case("packed", seqlens_q=(1,) * 300 + (longest,), prefix_len=300, heads=8))
    inputs.options["max_seqlen_q"] = 64
    stated = prefix_kernels.workspace_bytes(*inputs.tensors, **inputs.options, backend=backend)
    for name, bytes_taken in zip(("forward", "backward"), taken(inputs, backend), strict=True):
        assert bytes_taken <= stated[name] + SMALL, name


def test_it_answers_for_the_backend_that_would_run():
    inputs = make_inputs(Case("plain"))
    chosen = next(name for name, line in prefix_kernels.explain_backends(*inputs.tensors).items() if line == "chosen")
    assert prefix_kernels.workspace_bytes(*inputs.tensors) == prefix_kernels.workspace_bytes(*inputs.tensors, backend=chosen)
    assert prefix_kernels.workspace_bytes(*inputs.tensors).keys() == {"forward", "backward"}
    softcap = make_inputs(Case("softcap", softcap=2.0))
    with pytest.raises(NotImplementedError, match="softcap"):
        prefix_kernels.workspace_bytes(*softcap.tensors, **softcap.options, backend="sdpa")
