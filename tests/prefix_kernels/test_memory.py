"""Memory of the fast backends: nothing of size batch × prefix, in either direction, seen by torch's own allocator.

Whatever depends on the batch alone, or on the prefix alone, cancels in a difference of differences. What is left grows with
batch × prefix: a copy of the prefix per row, scores, a mask. (The two batches are near each other: torch's CPU kernel takes
larger blocks, and more scratch memory, from 192 and from 768 query rows on.)
"""

import pytest
import torch

import prefix_kernels
from support.allocations import allocations

FAST = [name for name in prefix_kernels.available_backends() if name != "reference"]
BATCHES, HEADS, HEAD_DIM, LONG, SHORT = (40, 32), 8, 64, 512, 32
DTYPES = {
    "float32": (torch.float32, torch.float32), "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32 prefix": (torch.bfloat16, torch.float32),
}  # fmt: skip
LAYOUTS = {  # kv_heads, q_len, prefixes
    "mha": (8, 16, None), "gqa": (2, 16, None), "decode": (2, 1, None), "bank": (8, 24, 2), "bank, decode, gqa": (2, 1, 2),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """The kernels' scratch memory grows with the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measure(backend, layout, dtype, batch, prefix_len):
    """Allocations of the forward and of the backward pass of one call."""
    kv_heads, q_len, prefixes = LAYOUTS[layout]
    dtype, prefix_dtype = DTYPES[dtype]
    prefix_shape = (kv_heads, prefix_len, HEAD_DIM) if prefixes is None else (prefixes, kv_heads, prefix_len, HEAD_DIM)
    q = torch.randn(batch, HEADS, q_len, HEAD_DIM, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(batch, kv_heads, 24, HEAD_DIM, dtype=dtype, requires_grad=True) for _ in range(2))
    prefix_k, prefix_v = (torch.randn(prefix_shape, dtype=prefix_dtype, requires_grad=True) for _ in range(2))
    ids = None if prefixes is None else torch.arange(batch) % (prefixes + 1) - 1

    def forward():
        return prefix_kernels.prefix_attention(q, k, v, prefix_k, prefix_v, prefix_ids=ids, backend=backend)

    out, grad_out = forward(), torch.randn(q.shape, dtype=dtype)

    def backward():
        torch.autograd.grad(out, (q, k, v, prefix_k, prefix_v), grad_out, retain_graph=True)

    return torch.stack([allocations(forward), allocations(backward)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("backend", "dtype"), [*((name, dtype) for name in FAST for dtype in DTYPES), ("reference", "float32")]
)
def test_nothing_of_size_batch_times_prefix(backend, dtype, layout):
    """The reference backend, which concatenates, shows that the measurement sees it."""
    growth = [measure(backend, layout, dtype, batch, LONG) - measure(backend, layout, dtype, batch, SHORT) for batch in BATCHES]
    product = growth[0] - growth[1]  # [forward and backward, (peak, largest, all together)]
    one_byte_per_row_and_column = (BATCHES[0] - BATCHES[1]) * (LONG - SHORT)
    one_copy = one_byte_per_row_and_column * LAYOUTS[layout][0] * HEAD_DIM * DTYPES[dtype][0].itemsize
    if backend in FAST:
        assert product.max() < one_byte_per_row_and_column
    else:
        assert product[:, [0, 2]].min() >= one_copy
