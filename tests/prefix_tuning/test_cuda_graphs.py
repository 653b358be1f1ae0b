"""Recorded kernels on a GPU: a replay does what the function does, and a recording that fails leaves nothing behind."""

import threading

import pytest
import torch

from prefix_tuning import cuda_graphs

pytestmark = pytest.mark.gpu


def test_a_replay_reads_and_writes_the_same_tensors():
    x = torch.arange(4.0, device="cuda")
    graph = cuda_graphs.Graph(lambda: x * 2)
    x += 1
    graph.replay()
    assert graph.outputs.tolist() == [2, 4, 6, 8]


def waits(x):
    return x * x.sum().item()


def gives_up(x):
    y = x * 2
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("of its own")
    return y


@pytest.mark.parametrize("large", (True, False))
@pytest.mark.parametrize(("function", "says"), ((waits, "captur"), (gives_up, "of its own")))
def test_what_cannot_be_recorded_leaves_the_device_as_it_was(function, says, large):
    x = torch.ones(2**20, device="cuda")
    kept, reserved = cuda_graphs.Graph(x.clone), []
    for _ in range(5):
        with pytest.raises(cuda_graphs.CaptureError, match=says):
            cuda_graphs.Graph(lambda: function(x), large=large)
        assert not torch.cuda.is_current_stream_capturing()
        assert torch.ones(5).pin_memory().sum() == 5
        torch.manual_seed(0)
        drawn = torch.rand(5, device="cuda")
        torch.manual_seed(0)
        assert torch.equal(torch.rand(5, device="cuda"), drawn)
        graph = cuda_graphs.Graph(lambda: (x + 1, torch.rand(5, device="cuda")), kept.pool, large)
        graph.replay()
        assert graph.outputs[0].sum().item() == 2**21
        first = graph.outputs[1].clone()
        graph.replay()
        assert not torch.equal(graph.outputs[1], first)
        del graph
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[1]


def test_what_was_loaded_is_recorded_without_a_call_before():
    x, calls = torch.ones(3, device="cuda"), []

    def add():
        calls.append(1)
        x.add_(1)
        return x * 2

    first = cuda_graphs.Graph(add)
    second = cuda_graphs.Graph(add, first.pool, loaded=True)
    assert len(calls) == 3 and x.tolist() == [2, 2, 2]
    second.replay()
    assert second.outputs.tolist() == [6, 6, 6]


def test_other_threads_may_wait_for_the_device_meanwhile():
    x, stop, errors = torch.ones(1000, device="cuda"), threading.Event(), []

    def wait_again_and_again():
        try:
            while not stop.is_set():
                x.sum().item()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=wait_again_and_again)
    thread.start()
    for _ in range(20):
        graph = cuda_graphs.Graph(lambda: x * 3, large=False)
        graph.replay()
        assert graph.outputs.sum().item() == 3000
    stop.set()
    thread.join()
    assert not errors
