"""Where a module computes: accelerate may keep its weights elsewhere (device_map, offloading) and bring them for each call."""

from __future__ import annotations

import itertools

import torch
from torch import nn


def execution_device(module: nn.Module) -> torch.device:
    """The device that accelerate's hooks bring the module's inputs and weights to; without hooks that of its weights, and the
    CPU where it has none, as where torch has packed them (quantize_dynamic)."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((device for device in devices if device is not None), None)
    if device is None:
        weight = next(itertools.chain(module.parameters(), module.buffers()), None)
        device = "cpu" if weight is None else weight.device
    return torch.device(device)


def is_spread(model: nn.Module) -> bool:
    """Whether accelerate keeps parts of a model in several places, or on disk: then it cannot be moved as a whole."""
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    return len(places) > 1 or "disk" in places
