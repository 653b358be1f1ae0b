"""Texts and conversations as the ids that a model is given before it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Prompt = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]  # a text, messages, or {"messages", "tools"}


def is_conversation(row: Mapping[str, Any]) -> bool:
    """Whether a row has messages rather than prompt and completion; a table of both kinds has None for what a row has not."""
    return row.get("messages") is not None


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """What a row of text, or of messages up to an answer, asks, with the tools that the answer may call."""
    if not is_conversation(row):
        return row["prompt"]
    tools = row.get("tools")
    return row["messages"] if tools is None else {"messages": row["messages"], "tools": tools}


def check_text(name: str, text: str) -> None:
    """ValueError for half of a surrogate pair, which JSON can write and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected text, got half of a surrogate pair at character {error.start + 1}") from None


def encode_prompt(prompt: Prompt, tokenizer, *, special_tokens: bool = True) -> list[int]:
    """The ids a model is given before it answers: of a text, or of the messages of a conversation up to the answer.

    Args:
        special_tokens: whether a text gets those that the tokenizer opens texts with; one that would close it is left out. A
            conversation has those of its template.

    Raises ValueError for messages where the tokenizer has no chat template.
    """
    if not isinstance(prompt, str):
        row = prompt if isinstance(prompt, Mapping) else {"messages": prompt}
        return encode_conversation(row["messages"], tokenizer, tools=row.get("tools"), add_generation_prompt=True)
    check_text("prompt", prompt)
    ids = list(tokenizer(prompt, add_special_tokens=special_tokens)["input_ids"])
    if special_tokens and ids and ids[-1] == tokenizer.eos_token_id:
        bare = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if ids[len(ids) - 1 - len(bare) : -1] == bare:  # this tokenizer closes every text, and the answer is still to come
            return ids[:-1]
    return ids


def encode_conversation(messages: Sequence[Mapping[str, Any]], tokenizer, **options: Any) -> list[int]:
    """The ids of a conversation.

    Args:
        options: as for the tokenizer's apply_chat_template.
    """
    return list(render(messages, tokenizer, **options)["input_ids"])


def encode_beginning(messages: Sequence[Mapping[str, Any]], tokenizer) -> list[int]:
    """The ids of turns that longer conversations begin with; ValueError where the template changes them once a turn follows."""
    if not messages:
        raise ValueError("messages: expected at least one turn, got none")
    ids = encode_conversation(messages, tokenizer)
    further = {"role": "assistant" if messages[-1].get("role") in ("user", "tool") else "user", "content": "Yes."}
    try:
        longer = encode_conversation([*messages, further], tokenizer)
    except ValueError:  # a template that takes no such turn
        return ids
    if longer[: len(ids)] != ids:
        raise ValueError(
            "messages: expected turns that stay as they are, such as the system message alone, got some that the chat template "
            "shows otherwise once another follows, so that no conversation begins with their ids"
        )
    return ids


def render(
    messages: Sequence[Mapping[str, Any]], tokenizer, tokenize: bool = True, **options: Any
) -> Mapping[str, list[int]] | str:
    """What the tokenizer's chat template gives for a conversation, ids and masks or, with tokenize=False, the text; ValueError
    where it has none or does not take this one."""
    chat_template(tokenizer, options.get("tools"))
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=tokenize, return_dict=tokenize, **options)
    except Exception as error:  # a template is a program of the model's authors; many refuse what they do not expect
        raise ValueError(f"messages: the chat template does not take this conversation: {error}") from error


def chat_template(tokenizer, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
    """The tokenizer's chat template, of several the one for tools where there are some; ValueError where it has none."""
    if not tokenizer.chat_template:
        raise ValueError("messages: the tokenizer has no chat template; give rows with prompt and completion instead")
    return tokenizer.get_chat_template(tools=tools)


def check_closes_texts(tokenizer) -> None:
    """ValueError for a tokenizer without an end-of-text token."""
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: it has no end-of-text token (eos_token), which closes every completion")


def padding_id(tokenizer) -> int:
    """What fills up rows: the tokenizer's token for that, else the one that ends texts, else 0."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
