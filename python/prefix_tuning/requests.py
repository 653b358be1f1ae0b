"""What the command generate is asked: prompts from arguments, files and stdin, and the prefix that each goes with."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from prefix_tuning.data import check_row, is_e2e, read_rows
from prefix_tuning.e2e import linearize, load_e2e
from prefix_tuning.files import open_text
from prefix_tuning.generate import Prompt

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

    prefixes: the names there are. A line of JSON chooses one by its field "prefix", null for none; what has no such field
    gets DEFAULT_PREFIX if it is among them, else none.

    Raises ValueError naming file and line.
    """
    default = DEFAULT_PREFIX if DEFAULT_PREFIX in prefixes else None
    structured = path is not None and any(suffix in (".jsonl", ".csv") for suffix in Path(path).suffixes)
    if structured and not is_e2e(path):
        rows = read_rows(path, partial(_check_request, prefixes=prefixes))
        prompts = [_asked(row["messages"]) if "messages" in row else row["prompt"] for row in rows]
        return prompts, [row.get("prefix", default) for row in rows]
    check_unnamed(prefixes, path or "stdin")
    if structured:
        prompts = [linearize(row["mr"]) + "\n" for row in load_e2e(path)]
    else:
        with open_text(path) if path else nullcontext(sys.stdin) as lines:
            prompts = [line for line in lines.read().splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"{path or 'stdin'}: holds no prompts")
    return prompts, [default] * len(prompts)


def check_unnamed(prefixes: Collection[str], source: str) -> None:
    """ValueError for prefixes with names where no prompt can choose one."""
    if set(prefixes) - {DEFAULT_PREFIX}:
        raise ValueError(f'--prefix: a NAME=FOLDER is chosen by the field "prefix" of a .jsonl file, which {source} has not')


def parse_conversation(text: str) -> Prompt:
    """The messages that `text` holds as JSON; ValueError for anything else."""
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--messages: not JSON: {error}") from None
    if not (
        isinstance(messages, list)
        and messages
        and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in messages)
    ):
        raise ValueError(f'--messages: expected a list of objects with "role" and "content", got {text}')
    return messages


def _check_request(row: Any, prefixes: Collection[str]) -> None:
    check_row(row, answered=False)
    name = row.get("prefix")
    named = sorted(set(prefixes) - {DEFAULT_PREFIX})
    if name is not None and name not in named:
        known = ", ".join(named) or "none"
        raise ValueError(f"prefix: expected null or the name of a --prefix NAME=FOLDER ({known}), got {name!r}")


def _asked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation without its last turn where that is the assistant's: what there is to answer."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages
