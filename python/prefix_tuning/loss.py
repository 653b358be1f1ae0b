"""The loss on target tokens, with logits computed for those alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prefix_tuning.data import IGNORED


def target_loss(
    model: nn.Module, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None, **inputs: Any
) -> tuple[Tensor, int]:
    """Cross-entropy of the labelled tokens of a causal language model, each predicted from the tokens before it.

    Args:
        model: a transformers model with an output embedding, called without a cache.
        input_ids, labels, attention_mask: int [batch, length]; labels −100 where there is no loss. The first token of a
            row is never predicted.
        inputs: further arguments of the model.

    Returns:
        (the sum over tokens, float32 scalar; the number of tokens).

    The output embedding sees only the hidden states that predict a target, as one contiguous block: its logits, the
    largest tensor of a step, are never built for prompts and padding.
    """
    wanted = labels[:, 1:] != IGNORED
    targets = labels[:, 1:][wanted]
    head = model.get_output_embeddings()
    if head is None or head is model.get_input_embeddings():
        raise ValueError(f"model: expected one with an output embedding of its own, got {type(model).__name__}")
    selected = head.register_forward_pre_hook(lambda module, args: (args[0][:, :-1][wanted].unsqueeze(0), *args[1:]))
    try:
        logits = model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True, **inputs
        ).logits
    finally:
        selected.remove()
    return sum_loss(logits[0], targets), targets.numel()


def encoder_decoder_loss(model: nn.Module, labels: Tensor, **inputs: Any) -> tuple[Tensor, int, Tensor]:
    """Cross-entropy of an encoder-decoder's labelled tokens.

    Args:
        model: called without a cache; it makes its decoder's input from the labels.
        labels: int [batch, length], −100 where there is no loss. inputs: the model's other arguments.

    Returns:
        (the sum over tokens, float32 scalar; the number of tokens; logits [batch, length, vocabulary]).
    """
    logits = model(labels=labels, use_cache=False, return_dict=True, **inputs).logits
    wanted = labels != IGNORED
    return sum_loss(logits[wanted], labels[wanted]), int(wanted.sum()), logits


def sum_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of logits [tokens, vocabulary], in float32, against targets [tokens]."""
    with torch.autocast(logits.device.type, enabled=False):
        return functional.cross_entropy(logits.float(), targets, reduction="sum")
