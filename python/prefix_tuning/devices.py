"""Where a module computes: accelerate may keep its weights elsewhere (device_map, offloading) and bring them for each call."""

from __future__ import annotations

import torch
from torch import nn


def execution_device(module: nn.Module) -> torch.device:
    """The device that accelerate's hooks bring the module's inputs and weights to; without hooks that of its weights."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((device for device in devices if device is not None), None)
    return next(module.parameters()).device if device is None else torch.device(device)


def is_spread(model: nn.Module) -> bool:
    """Whether accelerate keeps parts of a model in several places, or on disk: then it cannot be moved as a whole."""
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    return len(places) > 1 or "disk" in places
