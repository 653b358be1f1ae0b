"""CUDA graphs without a GPU: a replay calls the function again and writes its results where they were recorded."""

import torch

from prefix_tuning.cuda_graphs import CaptureError


class EmulatedGraph:
    """Stands in for prefix_tuning.cuda_graphs.Graph. A replay leaves NaN in what other graphs of its pool have put out."""

    refusal = None  # why nothing can be recorded
    recorded = 0

    def __init__(self, function, pool=None):
        if self.refusal is not None:
            raise CaptureError(self.refusal)
        type(self).recorded += 1
        self.function, self.pool = function, [] if pool is None else pool
        self.pool.append(self)
        function()
        self.outputs = function()

    def replay(self):
        written = tensors(self.function())
        for graph in self.pool:
            for tensor in tensors(graph.outputs):
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)
        for tensor, now in zip(tensors(self.outputs), written, strict=True):
            tensor.copy_(now)


def tensors(outputs):
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    inner = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, (tuple, list)) else ()
    return [tensor for each in inner for tensor in tensors(each)]
