"""Gradient checkpointing in tests: switched on without any dropout, and the attention calls counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch import nn

import prefix_tuning.attention

DROPOUTS = ("p", "dropout", "activation_dropout", "attention_dropout", "layerdrop")


def enable_checkpointing(model: nn.Module, use_reentrant: bool = False) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # until 5.23
    enable({"use_reentrant": use_reentrant})
    model.train()


def train_with_checkpointing(model: nn.Module) -> None:
    """Training mode and gradient checkpointing, without any dropout."""
    enable_checkpointing(model)
    for module in model.modules():
        for name in DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@contextmanager
def counted_attention() -> Iterator[list]:
    """A list that grows with every call of prefix_attention by a patched module."""
    calls, original = [], prefix_tuning.attention.prefix_attention

    def counting(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    with mock.patch.object(prefix_tuning.attention, "prefix_attention", counting):
        yield calls
