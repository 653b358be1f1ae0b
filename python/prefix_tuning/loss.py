"""The loss on target tokens, with logits computed for those alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prefix_tuning.data import IGNORED


def target_loss(
    model: nn.Module, labels: Tensor, attention_mask: Tensor | None = None, *, num_targets: int | None = None, **inputs: Any
) -> tuple[Tensor, int]:
    """Cross-entropy of the labelled tokens of a causal language model, each predicted from the tokens before it.

    Args:
        model: a transformers model with an output embedding, called without a cache.
        labels, attention_mask: int [batch, length]; labels −100 where there is no loss. The first token of a row is never
            predicted.
        num_targets: as for `targets_of`.
        inputs: further arguments of the model: input_ids [batch, length] or inputs_embeds, and others.

    Returns:
        (the sum over tokens, float32 scalar; the number of tokens).

    The output embedding sees only the hidden states that predict a target, as one contiguous block: its logits, the
    largest tensor of a step, are never built for prompts and padding.
    """
    index, targets = targets_of(labels, num_targets)
    return loss_at(model, index, targets, attention_mask=attention_mask, **inputs), len(targets)


def targets_of(labels: Tensor, num_targets: int | None = None) -> tuple[Tensor, Tensor]:
    """Of labels [batch, length]: for each labelled token that is predicted the place of the token before it among all
    batch · length, and its label, both int [targets].

    Args:
        num_targets: how many to give, the first ones; where there are fewer, with IGNORED as label. None: all, for whose
            number the host waits.
    """
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    if num_targets is None:
        index = (following != IGNORED).nonzero()[:, 0]
    else:
        number = torch.arange(1, num_targets + 1, device=labels.device)
        index = torch.searchsorted((following != IGNORED).cumsum(0), number).clamp(max=len(following) - 1)
    return index, following[index]


def count_targets(labels: Tensor) -> int:
    """How many labelled tokens of a causal model are predicted. Waits for the device.

    Args:
        labels: int [batch, length].
    """
    return int((labels[:, 1:] != IGNORED).sum())


def loss_at(model: nn.Module, index: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
    """Summed cross-entropy of `targets`, predicted by the tokens at `index`; what is IGNORED among them counts nothing."""
    return sum_loss(logits_at(model, index, **inputs), targets)


def logits_at(model: nn.Module, index: Tensor, **inputs: Any) -> Tensor:
    """The model's logits [tokens, vocabulary] for the tokens at `index` among all batch · length."""
    head = model.get_output_embeddings()
    if head is None or head is model.get_input_embeddings():
        raise ValueError(f"model: expected one with an output embedding of its own, got {type(model).__name__}")

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0].flatten(0, 1)  # of a model on several devices on the last
        return hidden.index_select(0, index.to(hidden.device)).unsqueeze(0), *args[1:]

    selected = head.register_forward_pre_hook(select)
    try:
        return model(use_cache=False, return_dict=True, **inputs).logits[0]
    finally:
        selected.remove()


def distillation_loss(
    model: nn.Module, labels: Tensor, teacher_ids: Tensor, teacher_probs: Tensor, *, num_targets: int | None = None,
    **inputs: Any,
) -> tuple[Tensor, int]:  # fmt: skip
    """How far a causal model's predictions of the labelled tokens are from a teacher's.

    Args:
        model, labels, num_targets, inputs: as for `target_loss`; which tokens the labels name does not matter.
        teacher_ids: int [targets, k], the teacher's likeliest tokens at each labelled token, in the order of the labels.
        teacher_probs: float [targets, k], the probabilities that it gives them.

    Returns:
        (the sum over targets of the Kullback-Leibler divergence of the model from the teacher in nats, float32 scalar; the
        number of targets). All tokens but the k count as one, so it is at most the divergence over the whole vocabulary.
    """
    index, targets = targets_of(labels, num_targets)
    check_teacher(len(targets), teacher_ids, teacher_probs)
    return divergences(logits_at(model, index, **inputs), teacher_ids, teacher_probs).sum(), len(targets)


def check_teacher(targets: int, teacher_ids: Tensor, teacher_probs: Tensor) -> None:
    """ValueError for what is not one row for each target."""
    if teacher_ids.dim() != 2 or teacher_ids.shape != teacher_probs.shape or len(teacher_ids) != targets:
        shapes = f"{list(teacher_ids.shape)} and {list(teacher_probs.shape)}"
        raise ValueError(f"teacher_ids, teacher_probs: expected [{targets}, k], one row for each target, got {shapes}")


ROUNDING = 1e-5  # of a sum of probabilities in float32


def divergences(logits: Tensor, teacher_ids: Tensor, teacher_probs: Tensor) -> Tensor:
    """float32 [targets]: the divergence from the teacher of each row of logits [targets, vocabulary]."""
    with torch.autocast(logits.device.type, enabled=False):
        log_probs = functional.log_softmax(logits.float(), dim=-1)
        ids, probs = teacher_ids.to(logits.device), teacher_probs.to(logits.device, torch.float32)
        left = (1 - probs.sum(1)).clamp(min=0)
        named = log_probs.gather(1, ids)
        rest = log_probs.scatter(1, ids, -torch.inf)
        all_named = rest.max(1).values == -torch.inf  # of what the model has not ruled out; what is left may be rounding alone
        others = rest.masked_fill(all_named[:, None], 0).logsumexp(1)
        others = torch.where(all_named, torch.where(left < ROUNDING, 0.0, -torch.inf), others)
        named = torch.special.xlogy(probs, probs) - torch.where(probs > 0, probs * named, 0)
        return named.sum(1) + torch.special.xlogy(left, left) - left * others


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
    """Summed cross-entropy of logits [tokens, vocabulary], in float32, against targets [tokens] that are not IGNORED."""
    with torch.autocast(logits.device.type, enabled=False):
        return functional.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORED)
