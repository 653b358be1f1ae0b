"""Scores of a model on a task, with or without a prefix attached."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from prefix_tuning.data import PromptCompletionCollator, check_row, pair_collator, tokenize_rows
from prefix_tuning.devices import execution_device
from prefix_tuning.e2e import (
    check_bleu,
    corpus_bleu,
    reference_slot_error_rate,
    slot_error_rate,
    to_examples,
)
from prefix_tuning.generate import first_line, generate_texts
from prefix_tuning.loss import encoder_decoder_loss, target_loss
from prefix_tuning.prompts import Prompt, is_conversation, prompt_of
from prefix_tuning.row_limits import longest_row
from prefix_tuning.shapes import checked_int
from prefix_tuning.task import Task, task_of
from prefix_tuning.text_cache import evaluating


def evaluate_e2e(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], **generation: Any
) -> tuple[dict[str, float], list[str]]:
    """Scores on rows of `e2e.load_e2e`, and the texts they are of: the first line of what is generated for each MR.

    bleu is without regard to case, against all references; slot_error the share of slots that the texts leave out.

    Args:
        generation: as for `generate_texts`.
    """
    check_bleu()
    prompts = [to_examples([row])[0]["prompt"] for row in rows]
    texts = [first_line(text) for text in generate_texts(model, tokenizer, prompts, **generation)]
    scores = {
        "bleu": corpus_bleu(texts, [row["references"] for row in rows]),
        "slot_error": slot_error_rate([row["mr"] for row in rows], texts),
    }
    return scores, texts


def e2e_reference_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Slot error rates of the human references themselves: of each MR's median reference, and the mean over all."""
    pairs = [(row["mr"], reference) for row in rows for reference in row["references"]]
    return {
        "slot_error_references": reference_slot_error_rate(rows),
        "slot_error_references_mean": slot_error_rate(*zip(*pairs, strict=True)),
    }


def evaluate_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    **generation: Any,
) -> tuple[dict[str, float], list[str]]:
    """Scores on rows of `data.read_rows`, and the generated texts.

    loss is the mean over all target tokens, perplexity its exponential; bleu compares what is generated with the
    completion (of a conversation: with its last turn, which must be the assistant's), without regard to case. A prompt too long
    for the model loses its beginning, as in training.
    """
    check_bleu()
    _check_some(rows)
    prompts, answers = zip(*map(split_row, rows), strict=True)
    loss, tokens = mean_loss(model, tokenizer, rows, batch_size=batch_size, max_length=max_length)
    texts = generate_texts(model, tokenizer, prompts, batch_size=batch_size, cut_prompts=True, **generation)
    texts = [text.strip() for text in texts]
    scores = {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "target_tokens": tokens,
        "bleu": corpus_bleu(texts, [[answer] for answer in answers]),
    }
    return scores, texts


def mean_loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
) -> tuple[float, int]:
    """Mean cross-entropy over all target tokens of the rows, in eval mode, and their number.

    Args:
        max_length: tokens of a row, at most as many as the model has positions for; a longer prompt loses its beginning.
    """
    _check_some(rows)
    batch_size = checked_int("batch_size", batch_size, at_least=1)
    pairs, device = task_of(model) is Task.ENCODER_DECODER, execution_device(model)
    collate = pair_collator(tokenizer) if pairs else PromptCompletionCollator(tokenizer)
    loss_of = encoder_decoder_loss if pairs else target_loss
    examples = tokenize_rows(rows, tokenizer, longest_row(model, max_length), encoder_decoder=pairs)
    examples.sort(key=lambda example: len(example["input_ids"]))
    total, tokens = 0.0, 0
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(examples), batch_size):
            batch = collate(examples[start : start + batch_size])
            loss, count, *_ = loss_of(model, **{name: tensor.to(device) for name, tensor in batch.items()})
            total, tokens = total + loss.item(), tokens + count
    return total / tokens, tokens


def _check_some(rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        raise ValueError("rows: expected at least one row, got none")


def split_row(row: Mapping[str, Any]) -> tuple[Prompt, str]:
    """What a row asks and what it answers; ValueError for what is no row or does not end with an answer."""
    check_row(row)
    if not is_conversation(row):
        return row["prompt"], row["completion"]
    *before, answer = row["messages"]
    if answer["role"] != "assistant":
        raise ValueError(f"messages: expected an assistant turn at the end to compare with, got {answer['role']!r}")
    if not isinstance(answer["content"], str):
        raise ValueError(f"messages: content of the last turn: expected a string to compare with, got {answer['content']!r}")
    return prompt_of({**row, "messages": before}), answer["content"]
