"""What torch allocates on the CPU while a function runs."""

import torch
from torch.profiler import ProfilerActivity, profile


def allocations(function):
    """Bytes that `function` allocates on the CPU, the kernels' own scratch memory included: peak, largest, all together."""
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    assert len(sizes), "the profiler saw no allocation"
    return torch.stack([sizes.cumsum(0).max(), sizes.max(), sizes.clamp(min=0).sum()])
