"""PEFT's own prefix tuning on tiny models, as the rival that ours must equal."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn

PREFIX_LEN = 5
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
KINDS = {
    "flat": {},
    "projection": {"prefix_projection": True, "encoder_hidden_size": 24},
    "cartridge": {"cartridge": True, "num_frozen_tokens": 2},
}


def ids(batch: int = 2, length: int = 7, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(side: str = "left") -> torch.Tensor:
    """The mask of two rows of 7, the first with three tokens of padding."""
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, slice(3) if side == "left" else slice(-3, None)] = 0
    return mask


def generated(model: nn.Module, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """ids() and 6 tokens more, the likeliest if the options don't say otherwise."""
    mask = torch.ones_like(ids()) if mask is None else mask
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(input_ids=ids(), attention_mask=mask, **options)


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


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of all that is trained, by name."""
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    return grads


def assert_same_gradients(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(expected)
    assert any(grad.abs().max() > 1e-4 for grad in expected.values())
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


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
