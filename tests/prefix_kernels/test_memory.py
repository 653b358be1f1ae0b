"""Peak memory of the sdpa backend: nothing of size batch × prefix, in either direction, seen by torch's own allocator."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import prefix_kernels

BATCH, HEADS, HEAD_DIM, LONG, SHORT = 32, 8, 64, 512, 16
DTYPES = {"float32": (torch.float32, torch.float32), "float32 prefix": (torch.bfloat16, torch.float32)}
LAYOUTS = {  # kv_heads, q_len, prefixes
    "mha": (8, 16, None), "gqa": (2, 16, None), "decode": (2, 1, None), "bank": (8, 16, 2), "bank, decode, gqa": (2, 1, 2),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """The kernels' scratch memory grows with the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def allocations(function):
    """(peak, largest) bytes that `function` allocates on the CPU, the kernels' own scratch memory included."""
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert sizes, "the profiler saw no allocation"
    held = torch.tensor(sizes).cumsum(0)
    return int(held.max()), max(sizes)


def measure(backend, layout, dtype, prefix_len):
    """{"forward": (peak, largest), "backward": …} of one call."""
    kv_heads, q_len, prefixes = LAYOUTS[layout]
    dtype, prefix_dtype = DTYPES[dtype]
    prefix_shape = (kv_heads, prefix_len, HEAD_DIM) if prefixes is None else (prefixes, kv_heads, prefix_len, HEAD_DIM)
    q = torch.randn(BATCH, HEADS, q_len, HEAD_DIM, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(BATCH, kv_heads, 16, HEAD_DIM, dtype=dtype, requires_grad=True) for _ in range(2))
    prefix_k, prefix_v = (torch.randn(prefix_shape, dtype=prefix_dtype, requires_grad=True) for _ in range(2))
    ids = None if prefixes is None else torch.arange(BATCH) % (prefixes + 1) - 1

    def forward():
        return prefix_kernels.prefix_attention(q, k, v, prefix_k, prefix_v, prefix_ids=ids, backend=backend)

    out, grad_out = forward(), torch.randn(q.shape, dtype=dtype)

    def backward():
        torch.autograd.grad(out, (q, k, v, prefix_k, prefix_v), grad_out, retain_graph=True)

    return {"forward": allocations(forward), "backward": allocations(backward)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_nothing_of_size_batch_times_prefix(backend, layout, dtype):
    short, long = (measure(backend, layout, dtype, prefix_len) for prefix_len in (SHORT, LONG))
    # one copy of the keys per row, for the columns by which the two prefixes differ
    copy = BATCH * LAYOUTS[layout][0] * (LONG - SHORT) * HEAD_DIM * DTYPES[dtype][0].itemsize
    for direction in ("forward", "backward"):
        growth, largest = long[direction][0] - short[direction][0], long[direction][1]
        print(backend,layout,dtype,direction, growth/copy, largest/copy)
