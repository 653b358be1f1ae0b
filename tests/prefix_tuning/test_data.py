"""Rows from files into batches: what is read and refused, which tokens have a loss, what is padding."""

import gzip
import json
import os
import threading
import zlib

import numpy as np
import pytest
import torch

from prefix_tuning.data import (
    PromptCompletionCollator,
    check_row,
    is_e2e,
    read_rows,
    tokenize_example,
    tokenize_rows,
    without_idle_mask,
)
from prefix_tuning.prompts import encode_prompt, prompt_of
from support.tokenizer import CHAT_TEMPLATE, tiny_tokenizer

ROW = {"prompt": "name : Aromi\n", "completion": "Aromi is a pub."}
CHAT = {
    "messages": [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "no"},
    ]
}
E2E_JSON = '{"mr": "name[Aromi], eatType[pub]", "refs": ["Aromi is  a pub.", "A pub."]}\n'
E2E_CSV = 'mr,ref\n"name[Aromi], eatType[pub]",Aromi is  a pub.\n"name[Aromi], eatType[pub]",A pub.\n'
E2E_ROWS = [
    {"prompt": "name : Aromi | Type : pub\n", "completion": "Aromi is a pub."},
    {"prompt": "name : Aromi | Type : pub\n", "completion": "A pub."},
]
GENERATION_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['role'] == 'assistant' %}"
    "{%- generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
FORGETFUL_TEMPLATE = CHAT_TEMPLATE.replace("message['content']", "(message['content'] if loop.last else '')")
CLOSING_TEMPLATE = CHAT_TEMPLATE.replace("+ '\n'", "+ ('!' if loop.last and message['role'] == 'assistant' else '\n')")
THINKING_TEMPLATE = CHAT_TEMPLATE.replace("'assistant: ' }}{% endif", "'assistant: <think>' }}{% endif")


def write(file, content):
    content = content.encode() if isinstance(content, str) else content
    file.write_bytes(gzip.compress(content) if file.suffix.lower() == ".gz" else content)
    return file


def learnt(example, tokenizer):
    """The text of the tokens that have a loss, runs of them apart by "|"."""
    assert len(example["input_ids"]) == len(example["labels"])
    pieces, before = [], False
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (-100, token)
        if label != -100:
            pieces.append(("" if before or not pieces else "|") + tokenizer.decode([token]))
        before = label != -100
    return "".join(pieces)


# Files


@pytest.mark.parametrize("name", ("rows.jsonl", "rows.jsonl.gz", "rows.JSONL.GZ", "rows.txt"))
def test_json_lines_with_blank_lines_marks_and_line_ends(name, tmp_path):
    rows = [ROW, CHAT, {**ROW, "prompt": "Café £20\u2028", "source": 7}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file = write(tmp_path / name, "\ufeff\n  \n" + lines[0] + "\r\n\n" + lines[1] + "\n" + lines[2])
    assert read_rows(file) == read_rows(str(file)) == rows
    assert not is_e2e(file)


@pytest.mark.parametrize("mark", ("", "\ufeff"), ids=("", "bom"))
@pytest.mark.parametrize("name", ("e2e.jsonl", "e2e.jsonl.gz", "e2e.csv", "e2e.csv.gz"))
def test_e2e_files_become_prompts_and_completions(name, mark, tmp_path):
    file = write(tmp_path / name, mark + (E2E_CSV if "csv" in name else "\n" + E2E_JSON))
    assert is_e2e(file) and is_e2e(str(file))
    assert read_rows(file) == E2E_ROWS


@pytest.mark.parametrize("content", ("", "\n\n", "no json", "[1]", '{"mr": "name[Aromi]"}', json.dumps(ROW)))
def test_what_is_not_e2e(content, tmp_path):
    assert not is_e2e(write(tmp_path / "rows.jsonl", content))


CUT = gzip.compress(b"x" * 10 + json.dumps(ROW).encode())[:-12]
BROKEN = bytearray(gzip.compress(f"{json.dumps(ROW)}\n".encode() * 2000))
BROKEN[40:60] = b"\xff" * 20
LATIN = '{"prompt": "Café", "completion": "b"}'.encode("latin-1")


@pytest.mark.parametrize(
    "name, content, match",
    (
        ("a.jsonl", "", "{file}: holds no rows"),
        ("a.jsonl", "\n \n", "{file}: holds no rows"),
        (
            "a.jsonl",
            f"{json.dumps(ROW)}\n\nno json\n",
            "{file}, line 3: expected one JSON object a line, got none: Expecting value, at character 1",
        ),
        ("a.jsonl", json.dumps(ROW)[:-1], r"{file}, line 1: expected one JSON object a line, .*, at character 61"),
        ("a.json", json.dumps([ROW], indent=1), "{file}, line 1: expected one JSON object a line"),
        ("a.jsonl", f'{json.dumps(ROW)}\n{{"prompt": {"1" * 5000}}}', "{file}, line 2: "),
        ("a.jsonl", "[" * 100_000, "{file}, line 1: maximum recursion depth"),
        ("a.jsonl", f"{json.dumps(ROW)}\n[1, 2]\n", "{file}, line 2: expected an object with .*, got list"),
        ("a.jsonl", '\n{"prompt": "a"}', "{file}, line 2: expected an object with .*, got .'prompt'."),
        ("a.jsonl.gz", f"{json.dumps(ROW)}\nnull\n", "{file}, line 2: expected an object .*, got NoneType"),
        ("a.jsonl", json.dumps({**ROW, "completion": 3}), "{file}, line 1: completion: expected a string, got int"),
        ("a.jsonl", LATIN, "{file}: not a UTF-8 text file: "),
        ("a.jsonl", f"{json.dumps(ROW)}\n".encode() * 9999 + LATIN, "{file}: not a UTF-8 text file: "),
        ("a.csv", E2E_CSV.replace("Aromi is", "Café is").encode("latin-1"), "{file}: not a UTF-8 text file: "),
        ("a.csv", E2E_CSV + '"' + "x" * 200_000, "{file}, line 4: not CSV: field larger than"),
        ("a.csv", "a,b\n1,2\n", "{file}, line 1: expected the columns mr and ref of E2E data in a .csv, got a, b;"),
        ("a.csv", E2E_CSV + '"name[A], size[big]",b\n', "{file}, line 4: text: expected one of the slots .*, got 'size'"),
        ("a.jsonl", E2E_JSON + json.dumps(ROW), '{file}, line 2: expected an object with "mr"'),
    ),
)
def test_unreadable_files_are_named_with_the_line(name, content, match, tmp_path):
    file = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=match.format(file=file)):
        read_rows(file)


@pytest.mark.parametrize("name", ("a.jsonl.gz", "a.csv.gz"))
@pytest.mark.parametrize("content", (CUT, bytes(BROKEN), b"plain text"), ids=("cut", "broken", "plain"))
def test_damaged_gzip_files_are_named(name, content, tmp_path):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises({CUT: EOFError, bytes(BROKEN): zlib.error}.get(content, gzip.BadGzipFile)):
        gzip.decompress(content)
    with pytest.raises(ValueError, match=f"{file}: not a UTF-8 text file: "):
        read_rows(file)


def test_missing_files_and_folders_raise_what_the_system_says(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "missing.jsonl")
    with pytest.raises(IsADirectoryError):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    "row, match",
    (
        ("text", "expected an object with .*, got str"),
        ({"completion": "b", "x": 1}, "got .'completion', 'x'."),
        ({"prompt": None, "completion": "b"}, "prompt: expected a string, got NoneType"),
        ({"messages": "hi"}, "messages: expected a list of objects"),
        ({"messages": None}, 'expected an object with .*, or with "messages"'),
        ({"messages": 3}, "messages: expected a list of objects"),
        ({"messages": [{"role": "user"}]}, 'messages: expected a list of objects with "role" and "content"'),
        ({"messages": ["hi"]}, "messages: expected a list of objects"),
        ({"messages": []}, "messages: expected at least one assistant turn"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "messages: expected at least one assistant turn"),
        ({"messages": [{"role": "asistant", "content": "hi"}]}, "assistant turn to learn from, got 'asistant'"),
        ({"messages": [{"role": "assistant", "content": None}]}, "content of 'assistant': expected a string, got None"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "row: expected at least one token to learn from"),
        ({"prompt": "a", "completion": "b\ud83d"}, "completion: expected text, got half of a surrogate pair at character 2"),
        (
            {"messages": [{"role": "assistant", "content": "\ud83d"}]},
            "'assistant': expected text, got half of a surrogate pair",
        ),
        (CHAT | {"tools": "search"}, "tools: expected a list of objects, got 'search'"),
    ),
    ids=str,
)
def test_check_row_refuses(row, match):
    if "token to learn" not in match:
        with pytest.raises(ValueError, match=match):
            check_row(row)
    with pytest.raises(ValueError, match=match):
        tokenize_example(row, tiny_tokenizer(chat_template=CHAT_TEMPLATE))


@pytest.mark.parametrize("messages", ([], ""))
def test_a_conversation_to_answer_has_a_turn(messages):
    with pytest.raises(ValueError, match="messages: expected at least one turn, got none"):
        check_row({"messages": messages}, answered=False)


# Prompt and completion

SPECIALS = [{"bos": bos, "adds_eos": adds_eos} for bos in (False, True) for adds_eos in (False, True)]


@pytest.mark.parametrize("options", SPECIALS, ids=str)
def test_prompt_and_completion_are_tokenised_apart(options):
    """Together, "…t" and "he …" would become "th", "e"; and no special token stands between them."""
    tokenizer = tiny_tokenizer(**options)
    bare = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("say t", "he end", "say the end")}
    assert bare["say t"] + bare["he end"] != bare["say the end"]
    prompt, target = [1] * options["bos"] + bare["say t"], [*bare["he end"], tokenizer.eos_token_id]
    example = tokenize_example({"prompt": "say t", "completion": "he end"}, tokenizer)
    assert example == {"input_ids": prompt + target, "labels": [-100] * len(prompt) + target}
    assert encode_prompt("say t", tokenizer) == prompt


@pytest.mark.parametrize("options", SPECIALS, ids=str)
@pytest.mark.parametrize("prompt", ("", "a", "a</s>", "</s>", "</s></s>", "a</s>b"))
def test_only_the_closing_token_that_a_tokenizer_adds_is_taken_off(prompt, options):
    tokenizer = tiny_tokenizer(**options)
    bare = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert bare.count(tokenizer.eos_token_id) == prompt.count("</s>")
    assert encode_prompt(prompt, tokenizer) == [1] * options["bos"] + bare


def test_the_first_token_is_never_learnt():
    tokenizer = tiny_tokenizer()
    assert learnt(tokenize_example({"prompt": "", "completion": "abc"}, tokenizer), tokenizer) == "bc</s>"
    assert learnt(tokenize_example({"prompt": "", "completion": "abc"}, tiny_tokenizer(bos=True)), tokenizer) == "abc</s>"
    assert learnt(tokenize_example({"prompt": "a", "completion": ""}, tokenizer), tokenizer) == "</s>"
    with pytest.raises(ValueError, match="row: expected at least one token to learn from"):
        tokenize_example({"prompt": "", "completion": ""}, tokenizer)


def test_max_length_cuts_the_prompt_at_its_beginning_and_never_the_target():
    tokenizer = tiny_tokenizer(bos=True)
    row = {"prompt": "0123456789", "completion": "xyz"}
    whole = tokenize_example(row, tokenizer)
    assert len(whole["input_ids"]) == 15
    for max_length in (5, 6, 14, 15, 16):
        cut = tokenize_example(row, tokenizer, max_length)
        assert cut == {name: values[-max_length:] for name, values in whole.items()}
        assert learnt(cut, tokenizer) == "xyz</s>" and cut["labels"][0] == -100
    for max_length in (4, 1, 0):
        with pytest.raises(ValueError, match=f"max_length: expected at least 5, .*, got {max_length}"):
            tokenize_example(row, tokenizer, max_length)
    only_target = {"prompt": "", "completion": "xyz"}
    assert tokenize_example(only_target, tiny_tokenizer(), 4)["labels"][0] == -100


def test_what_a_tokenizer_must_have():
    with pytest.raises(ValueError, match="tokenizer: it has no end-of-text token"):
        tokenize_example(ROW, tiny_tokenizer(eos=False))
    for call in (tokenize_example, lambda row, tokenizer: encode_prompt(row["messages"], tokenizer)):
        with pytest.raises(ValueError, match="messages: the tokenizer has no chat template; give rows with prompt"):
            call(CHAT, tiny_tokenizer())


def test_tokenize_rows_names_the_row():
    tokenizer = tiny_tokenizer()
    assert tokenize_rows([ROW, ROW], tokenizer, 60) == [tokenize_example(ROW, tokenizer)] * 2
    with pytest.raises(
        ValueError, match=r"rows\[1\]: max_length: expected at least \d+, the target and the token before it, got"
    ):
        tokenize_rows([{"prompt": "a", "completion": "b"}, ROW], tokenizer, 5)
    with pytest.raises(ValueError, match=r"rows\[1\]: messages: the tokenizer has no chat template"):
        tokenize_rows([ROW, CHAT], tokenizer)


# Conversations

TEMPLATES = {
    "prefixes": CHAT_TEMPLATE,
    "generation": GENERATION_TEMPLATE,
    "several": {"default": GENERATION_TEMPLATE, "tool_use": FORGETFUL_TEMPLATE},
}


@pytest.mark.parametrize("bos", (False, True), ids=("", "bos"))
@pytest.mark.parametrize("template", TEMPLATES)
def test_only_what_the_assistant_says_is_learnt(template, bos):
    tokenizer = tiny_tokenizer(bos=bos, chat_template=TEMPLATES[template])
    example = tokenize_example(CHAT, tokenizer)
    text = "system: be kind</s>\nuser: hi</s>\nassistant: hello</s>\nuser: more</s>\nassistant: no</s>\n"
    assert example["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert learnt(example, tokenizer) == "hello</s>|no</s>"


def test_a_template_without_end_of_text_tokens_is_learnt_to_the_turns_end():
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE.replace(" + eos_token", ""))
    assert learnt(tokenize_example(CHAT, tokenizer), tokenizer) == "hello\n|no\n"


@pytest.mark.parametrize(
    "template", (FORGETFUL_TEMPLATE, THINKING_TEMPLATE, CLOSING_TEMPLATE), ids=("forgets", "thinks", "closes")
)
def test_a_template_that_rewrites_turns_is_refused(template):
    tokenizer = tiny_tokenizer(chat_template=template)
    with pytest.raises(ValueError, match="the chat template writes earlier turns otherwise once later ones follow"):
        tokenize_example(CHAT, tokenizer)


@pytest.mark.parametrize("contents", [("hello", "here"), ("he", "no"), ("no", "he")])
def test_a_turn_that_makes_one_token_with_its_opening_stands_behind_the_ids_it_is_asked_for_with(contents):
    """ "t" and "he" are "th" and "e" side by side."""
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE.replace("': '", "': t'").replace("assistant: ", "assistant: t"))
    messages = [dict(turn) for turn in CHAT["messages"]]
    messages[2]["content"], messages[4]["content"] = contents
    example = tokenize_example({"messages": messages}, tokenizer)
    assert learnt(example, tokenizer) == "{}</s>|{}</s>".format(*contents)
    asked = encode_prompt(messages[: 4 if contents[0] == "no" else 2], tokenizer)
    assert example["input_ids"][: len(asked)] == asked
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(example["input_ids"]) == text


def test_a_first_turn_that_nothing_asks_for_is_not_learnt():
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    example = tokenize_example({"messages": CHAT["messages"][2:]}, tokenizer)
    assert learnt(example, tokenizer) == "no</s>"


TOOLS = [{"type": "function", "function": {"name": "search"}}]
TOOL_TEMPLATE = "{% for tool in tools or [] %}{{ tool['function']['name'] + '\n' }}{% endfor %}"


@pytest.mark.parametrize("template", (CHAT_TEMPLATE, GENERATION_TEMPLATE), ids=("prefixes", "generation"))
def test_tools_reach_the_template(template):
    tokenizer = tiny_tokenizer(chat_template=TOOL_TEMPLATE + template)
    example, without = (tokenize_example(CHAT | tools, tokenizer) for tools in ({"tools": TOOLS}, {"tools": None}))
    assert without == tokenize_example(CHAT, tokenizer)
    assert tokenizer.decode(example["input_ids"]) == "search\n" + tokenizer.decode(without["input_ids"])
    assert learnt(example, tokenizer) == learnt(without, tokenizer)
    row = {"messages": CHAT["messages"][:-1], "tools": TOOLS}
    asked = encode_prompt(row, tokenizer)
    assert example["input_ids"][: len(asked)] == asked == encode_prompt(prompt_of(row), tokenizer)


def test_of_several_templates_the_one_for_tools_counts():
    """Of {% generation %} only one of them has."""
    for names in (("default", "tool_use"), ("tool_use", "default")):
        templates = dict(zip(names, (TOOL_TEMPLATE + CHAT_TEMPLATE, TOOL_TEMPLATE + GENERATION_TEMPLATE), strict=True))
        tokenizer = tiny_tokenizer(chat_template=templates)
        for tools in (TOOLS, None):
            assert learnt(tokenize_example(CHAT | {"tools": tools}, tokenizer), tokenizer) == "hello</s>|no</s>"
    tokenizer = tiny_tokenizer(chat_template={"tool_use": TOOL_TEMPLATE + CHAT_TEMPLATE, "rag": CHAT_TEMPLATE})
    assert learnt(tokenize_example(CHAT | {"tools": TOOLS}, tokenizer), tokenizer) == "hello</s>|no</s>"


def test_what_comes_through_a_pipe_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    lines = "".join(json.dumps(ROW | {"number": number}) + "\n" for number in range(2000))
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text(lines))
    writer.start()
    rows = read_rows(tmp_path / "pipe")
    writer.join(10)
    assert [row["number"] for row in rows] == list(range(2000))


def test_what_a_table_of_both_kinds_has_not_is_none():
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    rows = [CHAT | {"prompt": None, "completion": None, "tools": None}, ROW | {"messages": None, "tools": None}]
    assert tokenize_rows(rows, tokenizer) == tokenize_rows([CHAT, ROW], tokenizer)


@pytest.mark.parametrize("template", (CHAT_TEMPLATE, GENERATION_TEMPLATE), ids=("prefixes", "generation"))
def test_max_length_cuts_what_stands_before_the_first_answer(template):
    tokenizer = tiny_tokenizer(chat_template=template)
    whole = tokenize_example(CHAT, tokenizer)
    shortest = len(whole["labels"]) - next(i for i, label in enumerate(whole["labels"]) if label != -100) + 1
    cut = tokenize_example(CHAT, tokenizer, shortest)
    assert cut == {name: values[-shortest:] for name, values in whole.items()}
    with pytest.raises(ValueError, match=f"expected at least {shortest}, .*, got {shortest - 1}"):
        tokenize_example(CHAT, tokenizer, shortest - 1)


@pytest.mark.parametrize("options", SPECIALS, ids=str)
@pytest.mark.parametrize("row", (ROW, CHAT, {"messages": CHAT["messages"][1:3]}), ids=("text", "chat", "one turn"))
def test_the_model_is_asked_with_exactly_the_ids_it_was_trained_on(row, options):
    tokenizer = tiny_tokenizer(**options, chat_template=CHAT_TEMPLATE)
    prompt = row["prompt"] if "prompt" in row else row["messages"][:-1]
    example, asked = tokenize_example(row, tokenizer), encode_prompt(prompt, tokenizer)
    answer = row["completion"] if "prompt" in row else row["messages"][-1]["content"]
    assert example["input_ids"][: len(asked)] == asked
    assert all(label != -100 for label in example["labels"][len(asked) : len(asked) + len(answer) // 3])
    rest = {name: values[len(asked) :] for name, values in example.items()}
    assert learnt(rest, tokenizer) == answer + "</s>" and rest["labels"][0] != -100
    assert example["labels"][len(asked) - 1] == -100


# Batches


def example(ids, first_target=1):
    return {"input_ids": ids, "labels": [-100] * first_target + ids[first_target:]}


@pytest.mark.parametrize("multiple, length", ((1, 9), (3, 9), (4, 12), (8, 16)))
def test_batches_are_padded_on_the_right_to_a_multiple(multiple, length):
    long, short = example([9, 8, 7, 6, 5, 4, 3, 2, 1]), example([7, 5, 2], 2)
    batch = PromptCompletionCollator(tiny_tokenizer(), multiple)([long, short])
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()} == {
        name: ((2, length), torch.int64) for name in ("input_ids", "attention_mask", "labels")
    }
    for row, given in enumerate((long, short)):
        end = len(given["input_ids"])
        assert batch["input_ids"][row].tolist() == given["input_ids"] + [0] * (length - end)
        assert batch["attention_mask"][row].tolist() == [1] * end + [0] * (length - end)
        assert batch["labels"][row].tolist() == given["labels"] + [-100] * (length - end)


@pytest.mark.parametrize("options, pad", (({}, 0), ({"pad": False}, 2), ({"pad": False, "eos": False}, 0)), ids=str)
def test_padding_is_told_by_position_never_by_its_id(options, pad):
    """Tokens of a row that have the padding's id are real: seen, and learnt where the row says so."""
    given = [example([pad, pad, 5, pad]), example([5, 6])]
    batch = PromptCompletionCollator(tiny_tokenizer(**options), pad_to_multiple_of=6)(given)
    assert batch["input_ids"].tolist() == [[pad, pad, 5, pad, pad, pad], [5, 6, pad, pad, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, pad, 5, pad, -100, -100], [-100, 6, -100, -100, -100, -100]]


def test_collator_default_and_errors():
    assert PromptCompletionCollator(tiny_tokenizer())([example([5, 6])])["input_ids"].shape == (1, 8)
    assert PromptCompletionCollator(tiny_tokenizer(), np.int64(5))([example([5, 6])])["input_ids"].shape == (1, 5)
    with pytest.raises(ValueError, match="pad_to_multiple_of: expected at least 1, got 0"):
        PromptCompletionCollator(tiny_tokenizer(), 0)
    for wrong, got in (({"input_ids": [5, 6]}, "got input_ids"), ({}, "got no field that the model takes")):
        with pytest.raises(ValueError, match=f"examples: expected input_ids and labels, as tokenize_example .* {got}"):
            PromptCompletionCollator(tiny_tokenizer())([example([5, 6]), wrong])


@pytest.mark.parametrize("mask, idle", [
    ([[1, 1, 1], [1, 1, 0]], True), ([[1, 1, 1], [1, 1, 1]], True), ([[1, 1, 1], [0, 1, 1]], False),
    ([[1, 1, 1], [1, 0, 1]], False), ([[1, 1, 1], [0, 0, 0]], False),
])  # fmt: skip
def test_a_mask_that_hides_only_padding_on_the_right_is_left_out(mask, idle):
    batch = {"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor(mask)}
    seen = without_idle_mask(batch)
    assert seen.keys() == {"input_ids"} if idle else seen is batch
    with_positions = batch | {"position_ids": torch.zeros(2, 3)}
    assert without_idle_mask(with_positions) is with_positions and "attention_mask" in batch


@pytest.mark.parametrize("labels, idle", [
    ([[5, 6, 7], [5, 6, -100]], True), ([[-100] * 3] * 2, True), ([[5, 6, 7], [5, 6, 7]], False), ([[5, 6], [5, 6]], False),
])  # fmt: skip
def test_a_mask_with_a_label_on_what_it_hides_stays(labels, idle, monkeypatch):
    """Of a batch on a device one value is read, which the host waits for."""
    read, as_bool = [], torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: read.append(tensor) or as_bool(tensor))
    batch = {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]), "labels": torch.tensor(labels)}
    seen = without_idle_mask(batch, wait=True)
    assert seen.keys() == {"labels"} if idle else seen is batch
    assert len(read) <= 1
