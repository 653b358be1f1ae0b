"""What a GPU's time in one call goes to: its kernels, by what they compute."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch

# The first that a kernel's name matches; the names are ours, torch's, cuBLAS's and cuDNN's.
KINDS = {
    "attention": r"forward_kernel|dq_kernel|dkeys_kernel|dprefix_kernel|delta_kernel|sum_splits_kernel|decode_kernel|"
    r"merge_kernel|hopper_(?:dq_|dkeys_)?kernel|flash|fmha|sdpa",
    "concatenation": r"CatArray",
    "products": r"gemm|gemv|nvjet|cutlass|cublas|splitK",
    "loss": r"softmax|nll_loss",
    "optimiser": r"multi_tensor_apply",  # and what else works on lists of tensors
}
REST = "rest"
RANGE = re.compile(r"[\w.]+#[\w.]+")  # "Optimizer.step#AdamW.step": a range of several; "…{lambda(float)#1}…" is a kernel


def device_profile(call: Callable[[], Any]) -> dict[str, float]:
    """Device seconds of each kind in KINDS and REST, and the number of "kernels"."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return by_kind((event.name, event.self_device_time_total * 1e-6) for event in on_device)


def by_kind(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """kernels: (name, seconds); RANGE is not one."""
    seconds: Counter[str] = Counter(dict.fromkeys((*KINDS, REST), 0.0))
    count = 0
    for name, each in kernels:
        if not RANGE.fullmatch(name):
            kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), REST)
            seconds[kind] += each
            count += 1
    return {kind: float(f"{each:.4g}") for kind, each in seconds.items()} | {"kernels": count}
