"""What the command generate is asked: prompts from arguments, files and stdin, and the prefix that each goes with."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from prefix_tuning.data import check_row, first_object, is_e2e, parse_rows
from prefix_tuning.e2e import linearize, load_e2e
from prefix_tuning.files import open_text
from prefix_tuning.prompts import Prompt, is_conversation, prompt_of

DEFAULT_PREFIX = ""  # the name of the one prefix that is given without a name


def prefix_folders(values: Sequence[str]) -> dict[str, str]:
    """Folders or hub ids by name from values of --prefix, NAME=FOLDER or, for what names no other, FOLDER."""
    folders: dict[str, str] = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals or Path(value).exists():
            name, folder = DEFAULT_PREFIX, value
        elif not (name and folder):
            raise ValueError(f"--prefix: expected FOLDER or NAME=FOLDER, got {value}")
        if name in folders:
            raise ValueError(f"--prefix: two {f'are named {name}' if name else 'have no name'}: {folders[name]} and {folder}")
        folders[name] = folder
    return folders


def read_requests(path: str | None, prefixes: Collection[str]) -> tuple[list[Prompt], list[str | None]]:
    """The prompts of a file, or of stdin where path is None, and of each the name of its prefix.

    JSON lines are told by their first, which is an object, or by the file's name; E2E files as by read_rows. Of anything else
    each line is a prompt, without its line end.

    Args:
        prefixes: the names there are. A line of JSON chooses one by its field "prefix", null for none; what has no such field
            gets DEFAULT_PREFIX if it is among them, else none.

    Raises ValueError naming file and line.
    """
    default, source = DEFAULT_PREFIX if DEFAULT_PREFIX in prefixes else None, path or "stdin"
    if path is not None and is_e2e(path):
        check_unnamed(prefixes, path)
        prompts = [linearize(row["mr"]) + "\n" for row in load_e2e(path)]
        return prompts, [default] * len(prompts)
    try:
        with open_text(path) if path else nullcontext(sys.stdin) as file:
            lines = [line.rstrip("\r\n") for line in file]
    except UnicodeDecodeError as error:  # open_text names its file
        raise ValueError(f"stdin: not a {error.encoding} text: {error}") from None
    lines[:1] = [line.removeprefix("\ufeff") for line in lines[:1]]  # a byte order mark, which open_text takes off a file
    if first_object(lines) or ".jsonl" in Path(source.lower()).suffixes:
        rows = parse_rows(lines, source, partial(_check_request, prefixes=prefixes))
        prompts = [_unanswered(row) for row in rows]
        return prompts, [row.get("prefix", default) for row in rows]
    check_unnamed(prefixes, source)
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{source}: holds no prompts")
    return prompts, [default] * len(prompts)


def answer_rows(prompts: Sequence[Prompt], names: Sequence[str | None] | None, texts: Sequence[str]) -> list[dict[str, Any]]:
    """What was asked and what was written, a row each, with the name of its prefix (null for none) where lines choose one."""
    rows: list[dict[str, Any]] = [
        dict(prompt) if isinstance(prompt, Mapping) else {"prompt" if isinstance(prompt, str) else "messages": prompt}
        for prompt in prompts
    ]
    for row, name, text in zip(rows, names or [DEFAULT_PREFIX] * len(rows), texts, strict=True):
        row |= ({} if name == DEFAULT_PREFIX else {"prefix": name}) | {"text": text}
    return rows


def check_unnamed(prefixes: Collection[str], source: str) -> None:
    """ValueError for prefixes with names where no prompt can choose one."""
    if set(prefixes) - {DEFAULT_PREFIX}:
        raise ValueError(f'--prefix: a NAME=FOLDER is chosen by the field "prefix" of JSON lines, which {source} has not')


def parse_conversation(text: str) -> Prompt:
    """The messages that `text` holds as JSON, less an answer at their end; ValueError for anything else."""
    try:
        row = {"messages": json.loads(text)}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--messages: not JSON: {error}") from None
    if row["messages"] is None:
        raise ValueError('--messages: expected a list of objects with "role" and "content", got null')
    try:
        check_row(row, answered=False)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    return _unanswered(row)


def _check_request(row: Any, prefixes: Collection[str]) -> None:
    check_row(row, answered=False)
    name = row.get("prefix")
    named = sorted(set(prefixes) - {DEFAULT_PREFIX})
    if name is not None and name not in named:
        known = ", ".join(named) or "none"
        raise ValueError(f"prefix: expected null or the name of a --prefix NAME=FOLDER ({known}), got {name!r}")


def _unanswered(row: Mapping[str, Any]) -> Prompt:
    """What a row asks: of a conversation all but its last turn where that is the assistant's."""
    if is_conversation(row) and len(row["messages"]) > 1 and row["messages"][-1]["role"] == "assistant":
        row = {**row, "messages": row["messages"][:-1]}
    return prompt_of(row)
