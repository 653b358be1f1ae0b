"""PEFT's own prefix tuning on tiny models, as the rival that ours must equal."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn


def peft_model(model: nn.Module, prefix_len: int = 5, *, cartridge: bool = False, task_type: str = "CAUSAL_LM", **options):
    """`model` under PEFT's prefix tuning or cartridge, in eval mode; without a projection keys and values are from N(0, 1)."""
    import peft

    kind = peft.CartridgeConfig if cartridge else peft.PrefixTuningConfig
    torch.manual_seed(5)
    found = peft.get_peft_model(model, kind(task_type=task_type, num_virtual_tokens=prefix_len, **options)).eval()
    name_the_cache(found)
    return found


def twins(model: nn.Module, *args: Any, **options: Any):
    """(PEFT's own, another with the same parameters for accelerate_peft)."""
    return peft_model(copy.deepcopy(model), *args, **options), peft_model(copy.deepcopy(model), *args, **options)


def name_the_cache(model) -> None:
    """peft 0.21 looks for the cache under its old name alone: with transformers 5.24 it generates without its prefix, and takes
    a classifier for one that knows no cache. This hands it the names it looks for."""
    prepare = getattr(model, "base_model_prepare_inputs_for_generation", None)
    if prepare is not None:

        def prepare_inputs(*args: Any, **kwargs: Any) -> dict[str, Any]:
            inputs = prepare(*args, **kwargs)
            if "cache" in inputs:
                inputs["past_key_values"] = inputs.pop("cache")
            return inputs

        model.base_model_prepare_inputs_for_generation = prepare_inputs
    elif "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
        forward = model.base_model.forward
        model.base_model.forward = lambda past_key_values=None, **kwargs: forward(past_key_values=past_key_values, **kwargs)
