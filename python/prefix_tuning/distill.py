"""A long text into a prefix: trained to predict what the frozen model predicts that has the text in front of it.

Context distillation (Snell et al. 2022, arXiv 2209.15189) of a text into a prefix that is shorter than it, as in Cartridges
(Eyuboglu et al. 2025, arXiv 2506.06266): the prefix starts from the keys and values of the text's first tokens and is
trained on conversations about the text (self_study.py). The teacher's probabilities are computed once, with the text read once
for all conversations about it; the student sees the conversation alone.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefix_tuning.attach import attach_prefix
from prefix_tuning.checkpoints import checkpoints
from prefix_tuning.data import IGNORED, PromptCompletionCollator, check_row, read_rows, tokenize_example
from prefix_tuning.devices import execution_device
from prefix_tuning.files import check_writable, write_json_lines
from prefix_tuning.loss import distillation_loss, logits_at, targets_of
from prefix_tuning.prefix import Prefix
from prefix_tuning.prompts import check_closes_texts, check_text, encode_prompt, is_conversation, prompt_of
from prefix_tuning.recipe import TrainSettings, check_run, start_prefix, train_prefix
from prefix_tuning.row_limits import row_limit, tokens_left
from prefix_tuning.self_study import SourceText, answered, behind, common_prefix, questions, with_text
from prefix_tuning.shapes import checked_int, checked_number
from prefix_tuning.task import Task, task_of
from prefix_tuning.text_cache import evaluating

CONVERSATIONS_FILE = "conversations.jsonl"


@dataclass(frozen=True)
class DistillSettings(TrainSettings):
    """How a text is distilled; the rest is how the prefix is trained (TrainSettings, whose init is the text's own beginning).

    Attributes:
        conversations: how many the model has with itself about the text, unless prompts are given.
        chunk_tokens: tokens of the text that are read at a time; a longer text is read in chunks drawn at random.
        max_new_tokens: longest answer.
        top_k: probabilities of the teacher that are kept of each token; the rest of the vocabulary counts as one.
        held_out: share of the conversations that is not trained on, but measured; with save_steps they also choose the
            checkpoint that is kept.
    """

    prefix_len: int = 128
    conversations: int = 256
    chunk_tokens: int = 2048
    max_new_tokens: int = 128
    top_k: int = 20
    held_out: float = 0.1

    def resolved(self) -> DistillSettings:
        names = ("conversations", "chunk_tokens", "max_new_tokens", "top_k")
        ints = {name: checked_int(name, getattr(self, name), at_least=1) for name in names}
        held_out = checked_number("held_out", self.held_out)
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out: expected a share of at least 0 and below 1, got {held_out}")
        return dataclasses.replace(super().resolved(), held_out=held_out, **ints)


def distill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    output: str | Path,
    settings: DistillSettings,
    *,
    prompts: Sequence[Mapping[str, Any]] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> tuple[Prefix, dict[str, Any]]:
    """Trains a prefix that stands for `text`. `output` gets it as prefix, and conversations.jsonl, which it learnt from.

    Args:
        model: a causal model whose cache holds keys and values alone (as for Prefix.from_text), without a prefix attached.
        text: of any length; what is read of it at a time, settings.chunk_tokens, must fit the model with a conversation.
        prompts: rows of data.py to learn from in place of the model's own questions. Those without a completion, or an
            assistant's turn at the end, are answered by the model. They are about the whole text, which is then read at once.
        resume: go on with the conversations in `output`, and from its last checkpoint where there is one.
        overwrite: as for train_prefix, and the conversations too.

    Returns the prefix and its numbers: those of train_prefix, conversations (how many) and divergences: of the held-out ones
    the mean divergence from the teacher in nats a token, with no prefix, with the prefix that training starts from and with the
    trained one; empty where none is held out.

    Raises ValueError for wrong arguments and a text that does not fit; NotImplementedError for other models and for several
    processes; OSError, before the model writes anything, for an output that cannot be written to.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text: expected some words, got {text!r}")
    settings, output = dataclasses.replace(settings, init="text", init_text=text).resolved(), Path(output)
    if task_of(model) is not Task.CAUSAL:
        raise NotImplementedError(f"model: expected a causal model for a text to be distilled, got {type(model).__name__}")
    if PartialState().num_processes > 1:
        raise NotImplementedError(f"processes: expected one, got {PartialState().num_processes}")
    check_text("text", text)
    prompts = None if prompts is None else list(prompts)
    if not tokenizer.chat_template:
        check_closes_texts(tokenizer)
    source = SourceText(text, tokenizer)
    if len(source) <= settings.prefix_len:
        raise ValueError(
            f"prefix_len: expected less than the {len(source)} tokens of the text, which Prefix.from_text has as they are, got "
            f"{settings.prefix_len}"
        )
    _check_top_k(model, settings.top_k)
    if prompts is None and tokenizer.chat_template:  # refuses a template that turns cannot be found in
        tokenize_example({"messages": [{"role": role, "content": role} for role in ("user", "assistant")]}, tokenizer)
    file, shown = output / CONVERSATIONS_FILE, progress or None
    resume_training = resume and bool(checkpoints(output))
    replaced = overwrite or (resume and not resume_training)
    check_run(model, output, settings, resume_training, replaced, evaluate=settings.held_out > 0)
    if file.exists() and not resume and not overwrite:
        raise ValueError(f"output: {file} is of an earlier run; resume that, overwrite it or take another folder")
    prefix = start_prefix(model, tokenizer, settings)
    check_writable(output)
    if resume:
        rows = _read_conversations(file, source)
    else:
        rows = _held_out(_conversations(model, tokenizer, source, settings, prompts, shown), settings)
        rows = [{**row, "text": source.digest} for row in rows]
        write_json_lines(file, rows)
    examples = teacher_examples(
        model, tokenizer, rows, source, top_k=settings.top_k, batch_size=settings.batch_size,
        max_length=row_limit(model, settings.prefix_len, settings.max_length), progress=shown and "reading",
    )  # fmt: skip
    trained, measured = (
        [example for row, example in zip(rows, examples, strict=True) if row["held_out"] is out] for out in (False, True)
    )
    divergences: dict[str, float] = {}

    def measure(name: str, attached: Prefix | None) -> None:
        if measured:
            with nullcontext() if attached is None else attach_prefix(model, attached, backend=settings.backend):
                divergences[name] = mean_divergence(model, tokenizer, measured, settings.batch_size)

    measure("no_prefix", None)
    measure("start", prefix)
    _, metrics = train_prefix(
        model, tokenizer, trained, output, settings, eval_rows=measured or None, prefix=prefix, resume=resume_training,
        overwrite=replaced, progress=progress,
    )  # fmt: skip
    measure("distilled", prefix)
    return prefix, {**metrics, "conversations": len(rows), "divergences": divergences}


def teacher_examples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    text: SourceText,
    *,
    top_k: int = 20,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: str | None = None,
) -> list[dict[str, Any]]:
    """Each row as `tokenize_example` makes it, with what the model predicts for its targets with the row's chunk of the text in
    front: teacher_ids int64 and teacher_probs float32, both [targets, top_k]. The text is not in the row.

    Raises ValueError naming the row for one that is none, whose answer is tokenised otherwise behind the text, or that does not
    fit the model together with it.
    """
    _check_top_k(model, top_k)
    positions, pairs = tokens_left(model, 0), []
    for index, row in enumerate(rows):
        try:
            alone = tokenize_example(row, tokenizer, max_length)
            joined = tokenize_example(with_text(row, text.chunk(*row["chunk"])), tokenizer)
        except ValueError as error:
            raise ValueError(f"rows[{index}]: {error}") from None
        if _targets(alone) != _targets(joined):
            raise ValueError(
                f"rows[{index}]: expected an answer of the same tokens with the text in front, got others: its prompt has "
                "none, or the chat template writes it otherwise"
            )
        if positions is not None and len(joined["input_ids"]) > positions:
            raise ValueError(
                f"rows[{index}]: expected at most the model's {positions} positions with the text in front, got "
                f"{len(joined['input_ids'])} tokens; take smaller chunk_tokens"
            )
        pairs.append((row["chunk"], alone, joined))
    collate = PromptCompletionCollator(tokenizer)
    with tqdm(total=len(rows), desc=progress, unit="row", disable=progress is None) as bar:
        for _, alike in groupby(pairs, key=lambda pair: pair[0]):
            alike = sorted(alike, key=lambda pair: len(pair[2]["input_ids"]))
            begins = [joined["input_ids"][: _first_target(joined) - 1] for _, _, joined in alike]
            shared = common_prefix(begins)
            with torch.no_grad(), evaluating(model), behind(model, begins[0][:shared]):
                for start in range(0, len(alike), batch_size):
                    some = alike[start : start + batch_size]
                    rest = [{name: ids[shared:] for name, ids in joined.items()} for _, _, joined in some]
                    probs = _probabilities(model, collate(rest)).topk(top_k)
                    sizes = [len(_targets(alone)) for _, alone, _ in some]
                    split = zip(some, probs.indices.cpu().split(sizes), probs.values.cpu().split(sizes), strict=True)
                    for (_, alone, _), ids, values in split:
                        alone |= {"teacher_ids": ids, "teacher_probs": values}
                    bar.update(len(some))
    return [alone for _, alone, _ in pairs]


@torch.no_grad()
def mean_divergence(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Mapping[str, Any]], batch_size: int = 8
) -> float:
    """Mean divergence of the model, with whatever is attached to it, from the teacher of the examples: nats a target."""
    device, collator, total, tokens = execution_device(model), PromptCompletionCollator(tokenizer), 0.0, 0
    with evaluating(model):
        for start in range(0, len(examples), batch_size):
            batch = collator(examples[start : start + batch_size])
            loss, count = distillation_loss(model, **{name: tensor.to(device) for name, tensor in batch.items()})
            total, tokens = total + loss.item(), tokens + count
    return total / tokens


def _conversations(
    model: nn.Module, tokenizer, text: SourceText, settings: DistillSettings, prompts: Sequence[Mapping[str, Any]] | None,
    progress: bool | None,
) -> list[dict[str, Any]]:  # fmt: skip
    options = {"batch_size": settings.batch_size}
    if prompts is None:
        chunks = text.chunks(settings.conversations, settings.chunk_tokens, settings.seed)
        rows = questions(model, tokenizer, text, chunks, seed=settings.seed, progress=progress and "asking", **options)
    else:
        if len(text) > settings.chunk_tokens:
            raise ValueError(
                f"chunk_tokens: expected at least the text's {len(text)} tokens, as prompts are about all of it, got "
                f"{settings.chunk_tokens}"
            )
        if not prompts:
            raise ValueError("prompts: expected at least one row, got none")
        for index, row in enumerate(prompts):
            try:
                check_row(row, answered=False)
                json.dumps(row)
                if not is_conversation(row) and not encode_prompt(prompt_of(row), tokenizer):
                    raise ValueError(f"prompt: expected at least one token, got {row['prompt']!r}")
                with_text(row, text.text)
            except (TypeError, ValueError) as error:
                raise ValueError(f"prompts[{index}]: {error}") from None
        rows = [{**row, "chunk": [0, len(text)]} for row in prompts]
    options |= {"max_new_tokens": settings.max_new_tokens, "progress": progress and "answering"}
    return answered(model, tokenizer, text, rows, **options)


def _held_out(rows: Sequence[Mapping[str, Any]], settings: DistillSettings) -> list[dict[str, Any]]:
    """The rows, each but once, with "held_out": whether it is measured instead of trained on."""
    distinct = list({json.dumps({**row, "chunk": None}, sort_keys=True): row for row in reversed(rows)}.values())[::-1]
    count = max(1, round(settings.held_out * len(distinct))) if settings.held_out else 0
    chosen = random.Random(settings.seed).sample(range(len(distinct)), min(count, len(distinct) - 1))
    return [{**row, "held_out": index in chosen} for index, row in enumerate(distinct)]


def _read_conversations(file: Path, text: SourceText) -> list[dict[str, Any]]:
    """What an earlier run wrote; ValueError where that was about another text."""
    rows = read_rows(file)
    for index, row in enumerate(rows):
        known = row.get("text") == text.digest and isinstance(row.get("held_out"), bool)
        if not known or not _is_chunk(row.get("chunk"), len(text)):
            raise ValueError(f"resume: rows[{index}] of {file} is not of a run with this text")
    return rows


def _is_chunk(value: Any, tokens: int) -> bool:
    numbers = isinstance(value, list) and len(value) == 2 and all(type(place) is int for place in value)
    return numbers and 0 <= value[0] < value[1] <= tokens


def _check_top_k(model: nn.Module, top_k: int) -> None:
    vocabulary = model.get_output_embeddings().weight.shape[0]
    if not 1 <= top_k < vocabulary:
        raise ValueError(f"top_k: expected 1 … {vocabulary - 1}, got {top_k}")


def _probabilities(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Of each labelled token of the batch what the model predicts, float32 [targets, vocabulary]."""
    batch = {name: tensor.to(execution_device(model)) for name, tensor in batch.items()}
    index, _ = targets_of(batch.pop("labels"))
    return logits_at(model, index, **batch).float().softmax(-1)


def _targets(example: Mapping[str, list[int]]) -> list[int]:
    return [label for label in example["labels"] if label != IGNORED]


def _first_target(example: Mapping[str, list[int]]) -> int:
    return next(i for i, label in enumerate(example["labels"]) if label != IGNORED)
