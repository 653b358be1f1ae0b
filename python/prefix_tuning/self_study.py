"""Conversations about a text, written by the model that reads it: what a prefix that stands for the text is trained on.

Self-study (Eyuboglu et al. 2025, Cartridges, arXiv 2506.06266, section 4): with a chunk of the text in front of it the model
asks something that the chunk answers, in one of several kinds, and answers it. A row holds the conversation alone, as for
training (data.py), and "chunk", the tokens [begin, end] of the text that were in front.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any

from torch import nn

from prefix_tuning.attach import attach_prefix
from prefix_tuning.data import check_row
from prefix_tuning.generate import first_line, generate_ids, progress_bar
from prefix_tuning.prefix import Prefix
from prefix_tuning.prompts import encode_prompt, is_conversation, prompt_of
from prefix_tuning.row_limits import tokens_left
from prefix_tuning.text_cache import evaluating

# What the model is asked to write, in turn. A model without a chat template goes on after "Question:" instead.
KINDS = (
    "Write a question about one fact that stands in the text above. Name what it is about. Write only the question.",
    "Write a question that the text above answers, about how or why something in it is so. Write only the question.",
    "Write a request to summarise one part of the text above, naming the part. Write only the request.",
    "Write a request to list things that the text above tells of, naming them as a group. Write only the request.",
    "Write a task that somebody can do who knows the text above, naming what it is about. Write only the task.",
)
QUESTION, ANSWER = "Question:", "Answer:"
LONGEST_QUESTION = 64  # tokens
CLOSING = 16  # tokens that may follow an answer in a row, or come of tokenising its text anew
ROWS_OF_A_CHUNK = 16  # conversations about the same chunk of a text that has several


class SourceText:
    """A text, tokenised once; the length is its number of tokens.

    Raises ValueError for one without tokens.
    """

    def __init__(self, text: str, tokenizer):
        self.text, self._tokenizer = text, tokenizer
        self._ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not self._ids:
            raise ValueError(f"text: expected one token or more, got {text!r}")

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def digest(self) -> str:
        """Tells this text from others."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def chunk(self, begin: int, end: int) -> str:
        """The tokens begin … end − 1 as text."""
        return self.text if (begin, end) == (0, len(self)) else self._tokenizer.decode(self._ids[begin:end])

    def chunks(self, count: int, chunk_tokens: int, seed: int) -> list[list[int]]:
        """For each of `count` conversations the tokens [begin, end] that it is about: all where the text has no more than
        chunk_tokens, else those of a chunk that is drawn anew for every ROWS_OF_A_CHUNK conversations."""
        draw, last = random.Random(seed), max(0, len(self) - chunk_tokens)
        begins = [draw.randint(0, last) for _ in range(0, count, ROWS_OF_A_CHUNK)]
        return [[begin, min(begin + chunk_tokens, len(self))] for begin in begins for _ in range(ROWS_OF_A_CHUNK)][:count]


def with_text(row: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The row with the text in front of its prompt, or of what its first message that is the user's says."""
    if not is_conversation(row):
        return {**row, "prompt": f"{text}\n\n{row['prompt']}"}
    messages = [dict(turn) for turn in row["messages"]]
    asked = next((turn for turn in messages if turn["role"] == "user"), None)
    if asked is None:
        raise ValueError("messages: expected a turn of the user's for the text to stand in, got none")
    if isinstance(asked["content"], str):
        asked["content"] = f"{text}\n\n{asked['content']}"
    elif isinstance(asked["content"], list):  # of parts
        asked["content"] = [{"type": "text", "text": f"{text}\n\n"}, *asked["content"]]
    else:
        raise ValueError(f"messages: expected a text or a list of parts as content, got {type(asked['content']).__name__}")
    return {**row, "messages": messages}


def questions(
    model: nn.Module, tokenizer, text: SourceText, chunks: Sequence[list[int]], **generation: Any
) -> list[dict[str, Any]]:
    """A question about each chunk as a row without an answer; those are left out for which the model wrote nothing.

    Args:
        generation: batch_size, seed and progress, as for `generate_ids`.
    """
    chat = bool(tokenizer.chat_template)
    asked = [{"messages": [{"role": "user", "content": KINDS[i % len(KINDS)]}]} if chat else {"prompt": QUESTION}
             for i in range(len(chunks))]  # fmt: skip
    written = _written(
        model, tokenizer, text, [{**row, "chunk": chunk} for row, chunk in zip(asked, chunks, strict=True)],
        max_new_tokens=LONGEST_QUESTION, sample=True, **generation,
    )  # fmt: skip
    rows = []
    for question, chunk in zip(map(first_line, written), chunks, strict=True):
        if question:
            row = {"messages": [{"role": "user", "content": question}]} if chat else {
                "prompt": f"{QUESTION} {question}\n{ANSWER}"}  # fmt: skip
            rows.append({**row, "chunk": chunk})
    if not rows:
        raise ValueError(f"text: the model asked nothing about it in {len(chunks)} tries; give prompts of your own")
    return rows


def answered(
    model: nn.Module, tokenizer, text: SourceText, rows: Sequence[Mapping[str, Any]], **generation: Any
) -> list[dict[str, Any]]:
    """The rows with an answer, which the model gives with the row's chunk of the text in front; what has one stays as it is.

    Args:
        generation: max_new_tokens, batch_size and progress, as for `generate_ids`.
    """
    open_rows = [row for row in rows if not _is_answered(row)]
    answers = iter(_written(model, tokenizer, text, open_rows, **generation))
    found = []
    for row in rows:
        if not _is_answered(row):
            answer = next(answers)
            if is_conversation(row):
                row = {**row, "messages": [*row["messages"], {"role": "assistant", "content": answer.strip()}]}
            elif row["prompt"].endswith(ANSWER):  # a model that was taught no turns goes on with further questions
                row = {**row, "completion": f" {first_line(answer)}"}
            else:
                row = {**row, "completion": answer.rstrip()}
        check_row(row)
        found.append(dict(row))
    return found


def behind(model: nn.Module, ids: Sequence[int]) -> AbstractContextManager:
    """The model with these ids in front of every row, read once; without any ids the model as it is."""
    if not ids:
        return nullcontext()
    return attach_prefix(model, Prefix.from_text(model, None, input_ids=ids), prefix_window="peft")


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many ids all rows begin with alike."""
    return len(os.path.commonprefix([list(ids) for ids in rows]))


def _written(
    model: nn.Module,
    tokenizer,
    text: SourceText,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int,
    seed: int | None = None,
    progress: str | None = None,
    **generation: Any,
) -> list[str]:
    """What the model writes after each row's prompt with its chunk in front, which is read once for all rows that follow each
    other with the same one. ValueError where that takes more tokens than the model has positions."""
    positions, texts = tokens_left(model, 0), []
    with progress_bar(progress, len(rows)) as bar:
        for chunk, alike in groupby(rows, key=lambda row: row["chunk"]):
            read = text.chunk(*chunk)
            prompts = [with_text(row, read) for row in alike]
            encoded = [encode_prompt(prompt_of(row), tokenizer) for row in prompts]
            longest = max(map(len, encoded)) + max_new_tokens + CLOSING
            if positions is not None and longest > positions:
                raise ValueError(
                    f"chunk_tokens: expected conversations of at most the model's {positions} positions, got {longest} tokens "
                    f"with {chunk[1] - chunk[0]} of the text"
                )
            shared = min(common_prefix(encoded), min(map(len, encoded)) - 1)
            with evaluating(model), behind(model, encoded[0][:shared]):
                answers = generate_ids(
                    model, tokenizer, [ids[shared:] for ids in encoded], max_new_tokens=max_new_tokens, progress=bar,
                    seed=None if seed is None else seed + len(texts), **generation,
                )  # fmt: skip
            texts += [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    return texts


def _is_answered(row: Mapping[str, Any]) -> bool:
    return row["messages"][-1]["role"] == "assistant" if is_conversation(row) else row.get("completion") is not None
