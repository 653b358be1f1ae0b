"""The CUDA kernel on a GPU, through the public API; test_cuda_emulated.py has the same cases without one."""

from dataclasses import replace

import pytest
import torch

import prefix_kernels
from prefix_kernels.backends import cuda
from support.cases import Case
from support.cuda_cases import CUDA_CASES, aligned_inputs, fitted
from support.decoding import LARGE_DECODE_CASES, check, refill

LARGE = tuple(map(fitted, LARGE_DECODE_CASES)) + tuple(
    replace(fitted(case), name=f"{case.name}, bank", prefixes=3, prefix_ids=tuple(row % 4 - 1 for row in range(case.batch)))
    for case in LARGE_DECODE_CASES
)


@pytest.fixture(autouse=True)
def built():
    missing = cuda._missing()
    if missing is not None:
        pytest.skip(missing)
    with torch.no_grad():
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32 prefix"])
@pytest.mark.parametrize("case", CUDA_CASES, ids=str)
def test_cases(case, dtype):
    check(case, dtype, "cuda", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CUDA_CASES, ids=str)
def test_aligned(case):
    check(case, "bfloat16", "cuda", "cuda", aligned_inputs(case, "bfloat16", "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_ones_give_the_same_bits(case):
    inputs = aligned_inputs(case, "bfloat16", "cuda")
    first = check(case, "bfloat16", "cuda", "cuda", inputs)
    for _ in range(20):
        for value, other in zip(inputs.call(backend="cuda", return_lse=True), first, strict=True):
            assert torch.equal(value, other)


@pytest.mark.gpu
def test_a_row_of_many_keys():
    """More than 2³¹ elements of a cache before its last row."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free GPU memory")
    q = torch.randn(3, 1, 1, 128, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.zeros(3, 1, 2**23 + 1000, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    lens = torch.tensor([5, 70, 300], device="cuda")
    k[:, :, :300].normal_(), v[:, :, :300].normal_()
    prefix = [torch.randn(1, 100, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    got = prefix_kernels.prefix_attention(q, k, v, *prefix, key_lens=lens, backend="cuda")
    whole = prefix_kernels.prefix_attention(
        q, k[:, :, :300].clone(), v[:, :, :300].clone(), *prefix, key_lens=lens, backend="cuda"
    )
    torch.testing.assert_close(got, whole, atol=1e-3, rtol=1.6e-2)  # split otherwise


def graph_of(function):
    """(graph, what it leaves): captured on a stream of its own, after a call that loads the kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        left = function()
    return graph, left


@pytest.mark.gpu
@pytest.mark.parametrize("prefix_len", [0, 16, 700])
@pytest.mark.parametrize("bank", [False, True])
def test_in_a_cuda_graph(prefix_len, bank):
    """Captured once; then fill, keys, queries and prefixes change in place. It reads nothing back from the device."""
    ids = {"prefixes": 2, "prefix_ids": (0, 0, 0, 0), "prefix_lens": (prefix_len, prefix_len)} if bank else {}
    case = Case("graph", batch=4, q_len=1, kv_len=600, prefix_len=prefix_len, head_dim=64, key_lens=(1, 1, 1, 1), **ids)
    inputs = aligned_inputs(case, "bfloat16", "cuda")
    q, k, v, *_ = inputs.tensors
    graph, captured = graph_of(lambda: inputs.call(backend="cuda", return_lse=True))
    for lengths in ([1, 2, 3, 4], [600, 64, 65, 0], [130, 599, 7, 200]):
        refill(q, k, v, lengths)
        inputs.options["key_lens"].copy_(torch.tensor(lengths))
        if bank:
            inputs.options["prefix_ids"].copy_(torch.tensor([1, -1, 0, 1]))
        for _ in range(3):
            graph.replay()
        for value, other in zip(captured, inputs.call(backend="cuda", return_lse=True), strict=True):
            assert torch.equal(value, other) and not value.isnan().any()


@pytest.mark.gpu
def test_streams_and_graphs_at_the_same_time():
    """Calls that are merged, on several streams and from a graph."""
    calls = []
    for seed in range(4):
        torch.manual_seed(seed)
        case = Case("streams", batch=16 + seed, heads=8, q_len=1, kv_len=500, prefix_len=900, head_dim=128)
        inputs = aligned_inputs(case, "bfloat16", "cuda")
        calls.append((inputs, inputs.call(backend="cuda")))
    graph, captured = graph_of(lambda: calls[0][0].call(backend="cuda"))
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.current_stream().synchronize()
    got = []
    for _ in range(30):
        graph.replay()
        for stream, (inputs, _) in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                got.append(inputs.call(backend="cuda"))
    for stream in streams:
        stream.synchronize()
    torch.cuda.current_stream().synchronize()
    for index, out in enumerate(got):
        assert torch.equal(out, calls[index % 4][1])
    assert torch.equal(captured, calls[0][1])


@pytest.mark.gpu
def test_what_it_takes_is_what_it_states():
    inputs = aligned_inputs(replace(LARGE[0], name="memory"), "float32 prefix", "cuda")
    stated = prefix_kernels.workspace_bytes(*inputs.tensors, **inputs.options, backend="cuda")["forward"]
    returned = sum(t.numel() * t.element_size() for t in inputs.call(backend="cuda", return_lse=True))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    inputs.call(backend="cuda", return_lse=True)
    assert torch.cuda.max_memory_allocated() - before <= stated + returned + 8 * 512  # the allocator rounds


@pytest.mark.gpu
def test_its_code_is_for_this_device_and_spills_nothing():
    for head_dim in cuda.HEAD_DIMS:
        for bfloat16 in (True, False):
            binary, _, registers, local_bytes, shared_bytes = cuda._operator("code")(head_dim, bfloat16)
            assert binary // 10 == torch.cuda.get_device_capability()[0]
            assert 0 < registers <= 255 and local_bytes == 0 and 0 < shared_bytes <= 99 * 1024
    assert cuda._operator("machine_code")().startswith("sm_")
