"""Puts the tensors of a prefix, or of a bank, where the layers of a model compute."""

from __future__ import annotations

from torch import nn

from prefix_tuning.bank import PrefixBank
from prefix_tuning.devices import execution_device
from prefix_tuning.encoder_families import ENCODER_DECODERS
from prefix_tuning.families import FAMILIES
from prefix_tuning.patched_attention import replacement
from prefix_tuning.prefix import Prefix
from prefix_tuning.stacks import Stack, text_config


def place(prefix: Prefix, every: list[Stack]) -> None:
    """Moves each layer's keys and values to where that layer computes."""
    modules = {part: modules for stack in every for part, modules in stack.attention.items() if part in prefix.parts}
    devices = {part: [execution_device(module) for module in layers] for part, layers in modules.items()}
    prefix.to(next(iter(devices.values()))[0])
    if prefix.reparametrization is None:
        for part in devices:
            for pair, device in zip(prefix.layers(part), devices[part], strict=True):
                for parameter in pair:
                    parameter.data = parameter.data.to(device)


def place_bank(bank: PrefixBank, model: nn.Module, every: list[Stack]) -> None:
    """Moves each layer's tensors of a bank to where it computes; NotImplementedError for a model that cannot have one."""
    attention = {part: modules for stack in every for part, modules in stack.attention.items()}
    family = FAMILIES.get(text_config(model.config).model_type)
    if (family is not None and not family.hands_on) or any(replacement(m) for modules in attention.values() for m in modules):
        raise NotImplementedError(
            f"model: a bank is not served, as {type(model).__name__} hands no further arguments to its attention modules"
        )
    pair = ENCODER_DECODERS.get(model.config.model_type)
    if pair is not None and pair.own_generate:
        name = type(model).__name__
        raise NotImplementedError(f"model: a bank is not served, as generate of {name} goes through rows by itself")
    bank.check_fits(model)
    for stack in every:
        if stack.positions == "embeddings" and stack.self_attention in bank.parts:
            bank.let_rows_stand_alike(type(stack.module).__name__)
    bank.place([execution_device(module) for part in bank.parts for module in attention[part]], model.dtype)
