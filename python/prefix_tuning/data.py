"""Rows of text into batches: reading files, tokenising with the loss on the target alone, padding.

A row is {"prompt": str, "completion": str} or {"messages": [{"role", "content"}, ...]}, with "tools" beside the messages if
the chat template takes them. Prompt and completion are tokenised separately and their ids joined, followed by an end-of-text
token. So the model trains on exactly the prompt ids it gets when it generates, which tokenising the joined text would not
guarantee.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from tqdm import tqdm
from transformers import (
    DataCollator,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from prefix_tuning.e2e import load_e2e, to_examples
from prefix_tuning.files import json_lines, open_text
from prefix_tuning.prompts import (
    chat_template,
    check_closes_texts,
    check_text,
    encode_conversation,
    encode_prompt,
    is_conversation,
    padding_id,
    render,
)
from prefix_tuning.shapes import checked_int
from prefix_tuning.task import Task

IGNORED = -100  # the label of a token without loss


def read_rows(path: str | Path, check: Callable[[Any], None] | None = None) -> list[dict[str, Any]]:
    """The rows of a JSON lines file, or of an E2E file as prompts and completions; both may be gzipped (.gz).

    Args:
        check: raises ValueError for what is no row; check_row if not given.

    Raises ValueError naming file and line for a line that is no JSON object or no row, OSError for a file that can't be read.
    """
    if is_e2e(path):
        return to_examples(load_e2e(path))
    with open_text(path) as file:
        return parse_rows(file, path, check or check_row)


def parse_rows(lines: Iterable[str], source: str | Path, check: Callable[[Any], None]) -> list[dict[str, Any]]:
    """The rows that lines of JSON hold, blank ones left out; ValueError naming the source and the line, as for read_rows."""
    rows = []
    for line, row in json_lines(lines, source):
        try:
            check(row)
        except ValueError as error:
            raise ValueError(f"{source}, line {line}: {error}") from None
        rows.append(row)
    if not rows:
        raise ValueError(f"{source}: holds no rows")
    return rows


def is_e2e(path: str | Path) -> bool:
    """Whether the file has the form of the E2E data: a CSV file, or JSON lines whose first row has "mr" and "refs"."""
    if Path(path).name.lower().endswith((".csv", ".csv.gz")):
        return True
    if not os.path.isfile(path) and os.path.exists(path):  # a pipe, of which the rows would be gone
        return False
    with open_text(path) as file:
        return {"mr", "refs"} <= first_object(file).keys()


def first_object(lines: Iterable[str]) -> dict[str, Any]:
    """The JSON object on the first line that is not blank, empty where there is no such."""
    try:
        row = json.loads(next((text for text in lines if text.strip()), ""))
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def check_row(row: Any, answered: bool = True) -> None:
    """ValueError for what is neither {"prompt", "completion"} nor {"messages"} with an assistant's turn.

    Args:
        answered: False where completion and assistant's turn are not needed.
    """
    fields = ("prompt", "completion") if answered else ("prompt",)
    if not _is_text(row, fields):
        shown = sorted(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        wanted = " and ".join(f'"{name}"' for name in fields)
        raise ValueError(f'expected an object with {wanted}, or with "messages", got {shown}')
    if not is_conversation(row):
        for name in fields:
            if not isinstance(row[name], str):
                raise ValueError(f"{name}: expected a string, got {type(row[name]).__name__}")
            check_text(name, row[name])
        return
    messages = row["messages"]
    if not isinstance(messages, Sequence) or not all(
        isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in messages
    ):
        raise ValueError(f'messages: expected a list of objects with "role" and "content", got {messages!r:.99}')
    for turn in messages:
        if not isinstance(turn["content"], str | list) and not turn.get("tool_calls"):
            raise ValueError(f"messages: content of {turn['role']!r}: expected a string, got {turn['content']!r}")
        if isinstance(turn["content"], str):
            check_text(f"messages: content of {turn['role']!r}", turn["content"])
    tools = row.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise ValueError(f"tools: expected a list of objects, got {tools!r}")
    if answered and not any(turn["role"] == "assistant" for turn in messages):
        roles = ", ".join(repr(turn["role"]) for turn in messages) or "no turn"
        raise ValueError(f"messages: expected at least one assistant turn to learn from, got {roles}")
    if not messages:
        raise ValueError("messages: expected at least one turn, got none")


def _is_text(row: Any, fields: Sequence[str] = ("prompt", "completion")) -> bool:
    return isinstance(row, Mapping) and (is_conversation(row) or set(fields) <= row.keys())


def iter_rows(rows: Any) -> Iterator[Any]:
    """The rows of a sequence or data set; one that has but a length and rows by index may never raise IndexError."""
    return iter(rows) if hasattr(rows, "__iter__") else (rows[index] for index in range(len(rows)))


def tokenize_example(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> dict[str, list[int]]:
    """A row as {"input_ids", "labels"}, lists of one length; labels are −100 where there is no loss.

    prompt and completion: loss on the completion and the end-of-text token behind it. messages: loss on what the
    assistant says, up to the end-of-text token that closes a turn, except for a first turn, which nothing asks for. The first
    token of a row has no loss: nothing predicts it. max_length cuts the prompt at its beginning and never the target.

    Raises ValueError for a row that is none, a target that does not fit max_length with one token before it, a tokenizer
    without an end-of-text token, and messages where there is no chat template or one that rewrites earlier turns.
    """
    check_row(row)
    if is_conversation(row):
        input_ids, labels = _tokenize_messages(row["messages"], tokenizer, row.get("tools"))
    else:
        check_closes_texts(tokenizer)
        prompt = encode_prompt(row["prompt"], tokenizer)
        target = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        input_ids, labels = prompt + target, [IGNORED] * len(prompt) + target
    labels[0] = IGNORED
    first_target = next((i for i, label in enumerate(labels) if label != IGNORED), None)
    if first_target is None:
        raise ValueError("row: expected at least one token to learn from, got none")
    surplus = 0 if max_length is None else max(0, len(input_ids) - max_length)
    if surplus >= first_target:
        raise ValueError(
            f"max_length: expected at least {len(input_ids) - first_target + 1}, the target and the token before it, got "
            f"{max_length}"
        )
    return {"input_ids": input_ids[surplus:], "labels": labels[surplus:]}


def tokenize_pair(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> dict[str, list[int]]:
    """A row of prompt and completion for an encoder-decoder: {"input_ids", "labels"}, the prompt and the completion.

    Each is tokenised as the tokenizer does it, special tokens included; an end-of-text token closes the completion.
    max_length cuts the prompt where the tokenizer truncates, and never the completion.

    Raises ValueError for another row, a tokenizer without an end-of-text token and a completion longer than max_length.
    """
    check_row(row)
    if is_conversation(row):
        raise ValueError('messages: expected "prompt" and "completion" for an encoder-decoder, got a conversation')
    check_closes_texts(tokenizer)
    input_ids = list(tokenizer(row["prompt"], truncation=max_length is not None, max_length=max_length)["input_ids"])
    labels = list(tokenizer(text_target=row["completion"])["input_ids"])
    if not labels or labels[-1] != tokenizer.eos_token_id:
        labels.append(tokenizer.eos_token_id)
    if not input_ids:
        raise ValueError("prompt: expected at least one token, got none")
    if max_length is not None and len(labels) > max_length:
        raise ValueError(f"max_length: expected at least {len(labels)}, the tokens of the completion, got {max_length}")
    return {"input_ids": input_ids, "labels": labels}


def tokenize_rows(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    *,
    encoder_decoder: bool = False,
) -> list[dict[str, list[int]]]:
    """`tokenize_example`, or `tokenize_pair`, of every row; ValueError naming the row (from 0) where one cannot be used."""
    tokenize = tokenize_pair if encoder_decoder else tokenize_example
    examples = []
    bar = tqdm(iter_rows(rows), total=len(rows), desc="tokenising", unit="row", delay=2, disable=None)
    for index, row in enumerate(bar):
        try:
            examples.append(tokenize(row, tokenizer, max_length))
        except ValueError as error:
            raise ValueError(f"rows[{index}]: {error}") from None
    return examples


def tokenized(
    name: str, dataset: Any, tokenizer: PreTrainedTokenizerBase | None, *, task: Task, max_length: int | None,
    own_collator: bool = False, all_columns: bool = False,
) -> Any:  # fmt: skip
    """Rows of text as examples; what is tokenised already or no map-style data set goes on as it is. An eval_dataset may be
    several by name, or one of these names.

    Args:
        own_collator: a collator of the user's own makes the batches, so that rows that are not text go on as they are, and rows
            of text too where it sees all columns.
    """
    options = {"task": task, "max_length": max_length, "own_collator": own_collator, "all_columns": all_columns}
    if isinstance(dataset, Mapping) and name == "eval_dataset":
        return {part: tokenized(f"{name}[{part!r}]", rows, tokenizer, **options) for part, rows in dataset.items()}
    named = isinstance(dataset, str) and name == "eval_dataset"
    if dataset is None or named or isinstance(dataset, IterableDataset):
        return dataset
    expected = f"{name}: expected a sequence of rows or a data set"
    if hasattr(dataset, "iloc"):
        raise TypeError(f'{expected}, got a {type(dataset).__name__}; its to_dict("records") makes rows')
    if isinstance(dataset, Mapping | str) or not hasattr(dataset, "__len__"):
        raise TypeError(f"{expected}, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"{name}: expected at least one row, got none")
    first = dataset[0]
    if isinstance(first, Mapping) and first.keys() & {"input_ids", "inputs_embeds", "input_features"}:
        if name == "train_dataset" and not own_collator and not any(map(_has_target, iter_rows(dataset))):
            raise ValueError(f"{name}: expected labels to learn from, got {IGNORED} for every token of every row")
        return dataset
    if own_collator and (all_columns or task is Task.OWN_LOSS or not _is_text(first)):
        return dataset
    if task is Task.OWN_LOSS:
        raise ValueError(f"{name}: expected tokenised rows with input_ids and what the model learns from, got {first!r}")
    if tokenizer is None:
        raise ValueError("processing_class: expected the tokenizer, which rows of text need, got None")
    try:
        return tokenize_rows(dataset, tokenizer, max_length, encoder_decoder=task is Task.ENCODER_DECODER)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _has_target(row: Mapping[str, Any]) -> bool:
    """Whether something can be learnt from a tokenised row, or its labels are not known here."""
    labels = row.get("labels")
    labels = labels.tolist() if hasattr(labels, "tolist") else labels
    return not isinstance(labels, list) or not labels or any(label != IGNORED for label in labels)


class PromptCompletionCollator:
    """Examples of `tokenize_example` -> a batch, padded on the right to the next multiple of pad_to_multiple_of.

    Returns input_ids, attention_mask (1 = a token of the row) and labels (−100 on padding), each int64 [batch, length], and
    `teacher_targets`. Padding is told by position, never by its id: in many models it is the end-of-text token, which is to be
    learnt.

    Tokens whose attention_mask is 0 in an example are left out. ValueError as `tokens_and_labels`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int = 8):
        self.multiple = checked_int("pad_to_multiple_of", pad_to_multiple_of, at_least=1)
        self.pad_id = padding_id(tokenizer)

    def __call__(self, examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        rows = tokens_and_labels(examples)
        length = -(-max(len(ids) for ids, _ in rows) // self.multiple) * self.multiple
        shape = (len(rows), length)
        input_ids = torch.full(shape, self.pad_id)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED)
        for i, (ids, learnt) in enumerate(rows):
            input_ids[i, : len(ids)] = ids
            attention_mask[i, : len(ids)] = 1
            labels[i, : len(ids)] = learnt
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **teacher_targets(examples)}


def tokens_and_labels(examples: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor, Tensor]]:
    """input_ids and labels of examples of `tokenize_example`, int [tokens], without the tokens whose attention_mask is 0.

    ValueError for an example without them, with more dimensions, with none or of different lengths, and with a label on a token
    that its attention_mask hides.
    """
    return [_tokens_and_labels(example) for example in examples]


def _tokens_and_labels(example: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    given = [name for name in example if example[name] is not None]
    if not {"input_ids", "labels"} <= set(given):
        raise ValueError(
            "examples: expected input_ids and labels, as tokenize_example makes of a row of text, got "
            f"{', '.join(given) or 'no field that the model takes'}; text is tokenised in a sequence of rows that is given to "
            "PrefixTrainer, evaluate or predict"
        )
    names = [name for name in ("input_ids", "labels", "attention_mask") if name in given]
    fields = {name: torch.as_tensor(example[name]) for name in names}
    ids, labels = fields["input_ids"], fields["labels"]
    for name, tensor in fields.items():
        if tensor.dim() != 1:
            raise ValueError(f"examples: expected {name} of one dimension, [tokens], got {list(tensor.shape)}")
        if len(tensor) != len(ids):
            raise ValueError(f"examples: expected {name} as long as input_ids, got {len(tensor)} and {len(ids)}")
    if "attention_mask" in fields:
        real = fields["attention_mask"].bool()
        if (labels[~real] != IGNORED).any():
            raise ValueError(f"examples: expected {IGNORED} as the label of every token whose attention_mask is 0, got another")
        ids, labels = ids[real], labels[real]
    if not len(ids):
        raise ValueError("examples: expected at least one token, got none")
    return ids, labels


def teacher_targets(examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """teacher_ids and teacher_probs, [targets of all examples, top_k], where `distill.teacher_examples` made the examples."""
    names = ("teacher_ids", "teacher_probs")
    return {name: torch.cat([example[name] for example in examples]) for name in names if name in examples[0]}


def pair_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Examples of `tokenize_pair` -> a batch, padded as the tokenizer pads, with labels −100 on padding."""
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)


def default_collator(model: nn.Module, task: Task, tokenizer: PreTrainedTokenizerBase) -> DataCollator:
    """What pads the examples of a model for its task."""
    if task is Task.CAUSAL:
        return PromptCompletionCollator(tokenizer)
    if task is Task.ENCODER_DECODER:
        return pair_collator(tokenizer)
    if "TokenClassification" in type(model).__name__:
        return DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)
    return DataCollatorWithPadding(tokenizer)


def without_idle_mask(batch: dict[str, Tensor], wait: bool = False) -> dict[str, Tensor]:
    """A batch for a causal model, without its attention mask if that hides nothing but padding on the right without labels.

    Causal attention keeps such padding from every token by itself, and without a mask every layer can run its fastest kernel.
    A label on padding is predicted from padding, at positions that the mask decides. A batch on a device stays as it is unless
    the host may wait, which it does once, for what the mask and the labels say together.
    """
    mask = batch.get("attention_mask")
    if "position_ids" in batch or not isinstance(mask, Tensor) or mask.dim() != 2 or not (wait or mask.device.type == "cpu"):
        return batch
    labels, padded = batch.get("labels"), ~mask.bool()
    heeded = padded[:, 0].any() | (padded[:, :-1] & ~padded[:, 1:]).any()
    if labels is not None:
        if not isinstance(labels, Tensor) or labels.shape != mask.shape:
            return batch
        heeded |= (padded & (labels.to(mask.device) != IGNORED)).any()
    if bool(heeded):
        return batch
    return {name: value for name, value in batch.items() if name != "attention_mask"}


def _tokenize_messages(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, tools: Sequence[Mapping[str, Any]] | None
) -> tuple[list[int], list[int]]:
    """Ids of a whole conversation, and labels on the assistant's turns.

    A template with {% generation %} marks them itself. Of any other, the conversation up to a turn, with the opening of
    an answer, and up to the turn's end must each be a beginning of the whole: what lies between is the turn.
    """
    if re.search(r"{%-?\s*generation\b", chat_template(tokenizer, tools)):
        encoded = render(messages, tokenizer, tools=tools, return_assistant_tokens_mask=True)
        ids, said = list(encoded["input_ids"]), encoded["assistant_masks"]
        return ids, [token if spoken else IGNORED for token, spoken in zip(ids, said, strict=True)]
    turns = [i for i, turn in enumerate(messages) if turn["role"] == "assistant" and i > 0]
    ids = encode_conversation(messages, tokenizer, tools=tools)
    places = _turn_places(ids, turns, partial(encode_conversation, tokenizer=tokenizer, tools=tools), messages)
    if places is None:  # an opening and what follows it make one token
        ids, places = _tokenize_apart(messages, turns, tokenizer, tools)
    labels = [IGNORED] * len(ids)
    for start, end in places:
        turn_ids = ids[start:end]
        if tokenizer.eos_token_id in turn_ids:  # what follows the end of a turn is never generated
            end = start + turn_ids.index(tokenizer.eos_token_id) + 1
        labels[start:end] = ids[start:end]
    return ids, labels


def _turn_places(
    whole: Any, turns: Sequence[int], render_part: Callable[..., Any], messages: Sequence[Mapping[str, Any]]
) -> list[tuple[int, int]] | None:
    """Where each of these turns begins and ends in `whole`, ids or text of the messages that render_part gives of some of them
    alike; None where those of the first messages are no beginning of it."""
    places = []
    for turn in turns:
        before, after = render_part(messages[:turn], add_generation_prompt=True), render_part(messages[: turn + 1])
        if whole[: len(before)] != before or whole[: len(after)] != after:
            return None
        places.append((len(before), len(after)))
    return places


def _tokenize_apart(messages, turns: Sequence[int], tokenizer, tools) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a conversation and the places of these turns, each of them and what lies between tokenised by itself: the first
    that merges stands behind the ids that it is asked for with. ValueError where the template's text has no such places."""
    render_text = partial(render, tokenizer=tokenizer, tokenize=False, tools=tools)
    text = render_text(messages)
    spans = _turn_places(text, turns, render_text, messages)
    if spans is None:
        raise ValueError(
            "messages: the chat template writes earlier turns otherwise once later ones follow, or opens an answer with "
            "what the turn itself has not (<think>), so the assistant's turns cannot be found; make one row of each turn, "
            "or use a template with {% generation %}"
        )
    ids: list[int] = []
    ends = []
    for begin, end in itertools.pairwise([0, *itertools.chain(*spans), len(text)]):
        ids += tokenizer(text[begin:end], add_special_tokens=False)["input_ids"]
        ends.append(len(ids))
    return ids, list(zip(ends[0:-1:2], ends[1::2], strict=True))
