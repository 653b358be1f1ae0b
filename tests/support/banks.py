"""Prefixes for a bank, and what rows with different ones must equal: each row alone with its own."""

import torch

from prefix_tuning import Prefix, attach_prefix

NAMES = ["long", None, "short"]


def prefix_of(model, prefix_len, seed, position_offset=None, **options):
    """Random keys and values, another for each seed."""
    prefix = Prefix.for_model(model, prefix_len, seed=0, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if position_offset is not None:
        prefix.position_offset = position_offset
    return prefix


def alone(model, prefixes, names, call):
    """What call(row) gives for each row with nothing but its own prefix attached."""
    results = []
    for row, name in enumerate(names):
        if name is None:
            results.append(call(row))
        else:
            with attach_prefix(model, prefixes[name]):
                results.append(call(row))
    return torch.cat(results)
