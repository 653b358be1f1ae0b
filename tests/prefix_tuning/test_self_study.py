"""Conversations of a model with itself about a text: which chunks, what is in front, what is kept."""

import pytest
import torch

from prefix_tuning import self_study
from prefix_tuning.generate import first_line, generate_ids, generate_texts
from prefix_tuning.self_study import KINDS, ROWS_OF_A_CHUNK, SourceText, answered, common_prefix, questions, with_text
from support.models import tiny_model
from support.tokenizer import CHAT_TEMPLATE, tiny_tokenizer

TEXT = "The tower of Marrow Point was built in 1871 of grey granite. It has 203 steps, and its light flashes three times."
IDS = tiny_tokenizer()(TEXT)["input_ids"]
SOURCE = SourceText(TEXT, tiny_tokenizer())


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", max_position_embeddings=512)


def test_a_short_text_is_one_chunk():
    assert SOURCE.chunks(20, len(IDS), seed=0) == [[0, len(IDS)]] * 20
    assert SOURCE.chunk(0, len(IDS)) == TEXT and len(SOURCE) == len(IDS)
    with pytest.raises(ValueError, match="text: expected one token or more, got ''"):
        SourceText("", tiny_tokenizer())


def test_chunks_of_a_long_text_are_drawn_from_all_of_it():
    chunks = SOURCE.chunks(40 * ROWS_OF_A_CHUNK + 3, 30, seed=0)
    assert len(chunks) == 40 * ROWS_OF_A_CHUNK + 3
    assert all(end - begin == 30 and end <= len(IDS) for begin, end in chunks)
    assert len({begin for begin, _ in chunks}) > 20 and len(set(map(tuple, chunks[:ROWS_OF_A_CHUNK]))) == 1
    assert 0 <= min(chunks)[0] < 10 and max(chunks)[1] > len(IDS) - 10
    again, other = (SOURCE.chunks(len(chunks), 30, seed) for seed in (0, 1))
    assert chunks == again != other
    assert SOURCE.chunk(4, 9) == tiny_tokenizer().decode(IDS[4:9])


def test_the_text_stands_in_front_of_the_first_thing_the_user_says():
    assert with_text({"prompt": "p", "completion": "c"}, "t") == {"prompt": "t\n\np", "completion": "c"}
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    row = {"messages": turns, "chunk": [0, 1]}
    expected = [turns[0], {"role": "user", "content": "t\n\nuser"}, *turns[2:]]
    assert with_text(row, "t") == {"messages": expected, "chunk": [0, 1]}
    assert turns[1]["content"] == "user"  # a copy
    parts = [{"type": "text", "text": "user"}]
    joined = with_text({"messages": [{"role": "user", "content": parts}]}, "t")["messages"][0]["content"]
    assert joined == [{"type": "text", "text": "t\n\n"}, *parts]
    with pytest.raises(ValueError, match="messages: expected a text or a list of parts as content, got int"):
        with_text({"messages": [{"role": "user", "content": 3}]}, "t")
    with pytest.raises(ValueError, match="messages: expected a turn of the user's"):
        with_text({"messages": turns[2:3]}, "t")


@pytest.mark.parametrize(("rows", "shared"), [([[1, 2, 3], [1, 2, 4, 5]], 2), ([[1, 2]], 2), ([[1], [2]], 0)])
def test_common_prefix(rows, shared):
    assert common_prefix(rows) == shared


@pytest.mark.parametrize("chat", [True, False])
def test_questions_and_answers_are_what_the_model_writes_behind_the_chunk(model, chat):
    """Greedy, against generation from the whole prompt, where the text is read anew for each row."""
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE if chat else None)
    rows = [{"prompt": f"Question: {question}\nAnswer:", "chunk": [0, 50]} for question in ("a", "bc", "a much longer one")]
    rows += [{"prompt": "Question: d\nAnswer:", "chunk": [20, 60]}]
    if chat:
        rows = [{"messages": [{"role": "user", "content": row["prompt"]}], "chunk": row["chunk"]} for row in rows]
    found = answered(model, tokenizer, SOURCE, rows, max_new_tokens=9, batch_size=2)
    prompts = [with_text(row, SOURCE.chunk(*row["chunk"])) for row in rows]
    texts = generate_texts(model, tokenizer, [row.get("messages") or row["prompt"] for row in prompts], max_new_tokens=9)
    said = [row["messages"][-1]["content"] if chat else row["completion"] for row in found]
    assert said == [text.strip() if chat else f" {first_line(text)}" for text in texts] and any(said)
    assert answered(model, tokenizer, SOURCE, found, max_new_tokens=9) == found  # nothing is open any more


def test_every_chunk_is_asked_about_by_numbers_of_its_own_under_one_bar(model, capsys):
    tokenizer, chunks = tiny_tokenizer(), [[0, 30]] * 2 + [[10, 40]] * 2 + [[0, 30]] * 2
    first, again, other = (questions(model, tokenizer, SOURCE, chunks, seed=seed, progress="asking") for seed in (0, 0, 1))
    assert first == again != other
    assert [row["prompt"] for row in first[:2]] != [row["prompt"] for row in first[-2:]]  # the same chunk, drawn later
    bars = capsys.readouterr().err
    assert bars.count("\n") == 3 and bars.count("0/6") == 3


def test_a_prompt_of_the_users_own_is_gone_on_with_as_the_model_does(model, monkeypatch):
    monkeypatch.setattr(self_study, "_written", lambda *args, **options: [" on\nand on \n"])
    (row,) = answered(model, tiny_tokenizer(), SOURCE, [{"prompt": "go", "chunk": [0, 5]}])
    assert row["completion"] == " on\nand on"


@pytest.mark.parametrize("chat", [True, False])
def test_each_kind_of_question_is_asked_in_turn(model, chat, monkeypatch):
    tokenizer, asked = tiny_tokenizer(chat_template=CHAT_TEMPLATE if chat else None), []

    def write(model, tokenizer, text, rows, **generation):
        asked.extend(rows)
        assert generation == {"sample": True, "max_new_tokens": 64, "batch_size": 2, "seed": 3}
        return [f"\n q{i}\nmore" if i != 1 else " \n" for i in range(len(rows))]

    monkeypatch.setattr(self_study, "_written", write)
    rows = questions(model, tokenizer, SOURCE, [[0, 5]] * 7, batch_size=2, seed=3)
    prompts = [f"q{i}" if chat else f"Question: q{i}\nAnswer:" for i in (0, 2, 3, 4, 5, 6)]  # nothing came of the second
    assert [row["messages"][0]["content"] if chat else row["prompt"] for row in rows] == prompts
    assert all(row["chunk"] == [0, 5] for row in rows)
    expected = [*KINDS, *KINDS][:7] if chat else ["Question:"] * 7
    assert [row["messages"][0]["content"] if chat else row["prompt"] for row in asked] == expected


def test_a_model_that_asks_nothing(model, monkeypatch):
    monkeypatch.setattr(self_study, "_written", lambda *args, **options: ["", " "])
    with pytest.raises(ValueError, match="text: the model asked nothing about it in 2 tries"):
        questions(model, tiny_tokenizer(), SOURCE, [[0, 5]] * 2)


def test_ids_are_what_texts_are_made_of(model):
    tokenizer, prompts = tiny_tokenizer(), ["one", "two, three"]
    ids = generate_ids(model, tokenizer, [tokenizer(prompt)["input_ids"] for prompt in prompts], max_new_tokens=6)
    assert [tokenizer.decode(answer, skip_special_tokens=True) for answer in ids] == generate_texts(
        model, tokenizer, prompts, max_new_tokens=6
    )
    sampled = [generate_ids(model, tokenizer, [[5, 6]], sample=True, seed=seed, max_new_tokens=6) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert torch.initial_seed() == 0
