"""Scores against numbers worked out by hand."""

import math
import sys
from contextlib import nullcontext

import pytest
import sacrebleu
import torch

from prefix_tuning import attach_prefix, evaluate
from prefix_tuning.data import tokenize_example
from prefix_tuning.evaluate import e2e_reference_scores, evaluate_e2e, evaluate_rows, mean_loss
from prefix_tuning.generate import first_line, generate_texts
from support.models import random_prefix, tiny_model
from support.tokenizer import CHAT_TEMPLATE, tiny_tokenizer

ROWS = [
    {"prompt": "ask ", "completion": "a b c d f"},
    {"prompt": "a rather long question about many things which ", "completion": "yes"},
    {"prompt": "", "completion": "much longer than the others are"},
]
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
E2E_ROWS = [
    {"mr": "name[Aromi], eatType[pub]", "references": ["A pub is Aromi.", "Aromi is  a pub ."]},
    {"mr": "name[Zizzi], area[riverside]", "references": ["Zizzi is a bar near the riverside ."]},
]


@pytest.fixture
def written(monkeypatch):
    """Makes `generate_texts` give these texts instead of the model's; what it was called with is noted in the list."""

    def write(*texts):
        calls = []
        monkeypatch.setattr(
            evaluate, "generate_texts", lambda model, tokenizer, prompts, **o: calls.append((list(prompts), o)) or list(texts)
        )
        return calls

    return write


def losses_by_hand(model, tokenizer, rows, max_length=None):
    """The loss of each target token of each row, run alone and without padding."""
    losses = []
    for row in rows:
        example = tokenize_example(row, tokenizer, max_length)
        ids, labels = torch.tensor(example["input_ids"]), example["labels"]
        with torch.no_grad():
            logs = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)
        losses += [-logs[at - 1, label].item() for at, label in enumerate(labels) if label != -100]
    return losses


@pytest.mark.parametrize("batch_size", (1, 2, 8))
@pytest.mark.parametrize("max_length", (None, 30))
def test_mean_loss_is_the_mean_over_tokens(batch_size, max_length):
    """Not over batches or rows, which have different numbers of target tokens; nothing records gradients."""
    model, tokenizer, recorded = tiny_model("llama"), tiny_tokenizer(bos=True), []
    model.register_forward_hook(lambda _, args, out: recorded.append(out.logits.requires_grad))
    plain = losses_by_hand(model, tokenizer, ROWS, max_length)
    assert (plain == losses_by_hand(model, tokenizer, ROWS)) == (max_length is None)
    recorded.clear()
    options = {"batch_size": batch_size, "max_length": max_length}
    loss, tokens = mean_loss(model, tokenizer, ROWS, **options)
    assert loss == pytest.approx(sum(plain) / len(plain), rel=1e-4) and tokens == len(plain) == 37
    assert recorded == [False] * math.ceil(len(ROWS) / batch_size)
    with attach_prefix(model, random_prefix(model)):
        shifted = losses_by_hand(model, tokenizer, ROWS, max_length)
        loss, tokens = mean_loss(model, tokenizer, ROWS, **options)
    assert loss == pytest.approx(sum(shifted) / len(shifted), rel=1e-4) and tokens == len(plain)
    assert abs(sum(shifted) - sum(plain)) > 1


def test_the_loss_is_of_rows_as_they_are_trained_on():
    """Cut to the positions that the model has, behind a prefix if there is one."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    rows, positions = [{"prompt": "Z" * 300, "completion": "yes"}], model.config.max_position_embeddings
    for prefix in (None, random_prefix(model, 7)):
        with nullcontext() if prefix is None else attach_prefix(model, prefix):
            limit = positions if prefix is None else positions - 7
            expected = losses_by_hand(model, tokenizer, rows, limit)
            assert mean_loss(model, tokenizer, rows)[0] == pytest.approx(sum(expected) / len(expected), rel=1e-4)
            assert mean_loss(model, tokenizer, rows, max_length=limit + 9) == mean_loss(model, tokenizer, rows)
            assert mean_loss(model, tokenizer, rows, max_length=20) != mean_loss(model, tokenizer, rows)


def test_scores_need_sacrebleu(monkeypatch):
    """Which is said before the model runs."""
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    monkeypatch.setattr(evaluate, "generate_texts", lambda *_, **__: pytest.fail("it has generated"))
    for call, rows in ((evaluate_rows, ROWS), (evaluate_e2e, E2E_ROWS)):
        with pytest.raises(ImportError, match="BLEU needs sacrebleu: pip install sacrebleu"):
            call(tiny_model("llama"), tiny_tokenizer(), rows)


def test_evaluate_rows_on_a_tiny_model():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(chat_template=CHAT_TEMPLATE, bos=True)
    rows = [*ROWS, CHAT]
    scores, texts = evaluate_rows(model, tokenizer, rows, batch_size=2, max_length=30, max_new_tokens=5)
    losses = losses_by_hand(model, tokenizer, rows, 30)
    prompts = [*(row["prompt"] for row in ROWS), CHAT["messages"][:1]]
    assert texts == [text.strip() for text in generate_texts(model, tokenizer, prompts, max_new_tokens=5)]
    assert scores["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert scores["target_tokens"] == len(losses)
    assert set(scores) == {"loss", "perplexity", "target_tokens", "bleu"}


def test_evaluate_rows_compares_with_the_completion_without_regard_to_case(written):
    """Of "a b c d e" against "a b c d f" 4 of 5 words, 3 of 4 pairs, 2 of 3 triples and 1 of 2 quadruples are right."""
    calls = written("  A b C d e\n")
    scores, texts = evaluate_rows(tiny_model("llama"), tiny_tokenizer(), ROWS[:1], batch_size=3, max_new_tokens=9, num_beams=2)
    assert texts == ["A b C d e"]
    assert scores["bleu"] == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert calls == [(["ask "], {"batch_size": 3, "max_new_tokens": 9, "num_beams": 2, "cut_prompts": True})]


def test_evaluate_rows_of_a_conversation_asks_for_its_last_turn(written):
    calls = written("hello you there now")
    messages = [*CHAT["messages"], {"role": "user", "content": "more"}, {"role": "assistant", "content": "Hello you there now"}]
    scores, _ = evaluate_rows(tiny_model("llama"), tiny_tokenizer(chat_template=CHAT_TEMPLATE), [{"messages": messages}])
    assert calls[0][0] == [messages[:-1]] and scores["bleu"] == pytest.approx(100)
    with pytest.raises(ValueError, match="messages: expected an assistant turn at the end to compare with, got 'user'"):
        evaluate_rows(tiny_model("llama"), tiny_tokenizer(chat_template=CHAT_TEMPLATE), [{"messages": messages[:-1]}])
    parts = {"role": "assistant", "content": [{"type": "text", "text": "hello"}]}
    with pytest.raises(ValueError, match="messages: content of the last turn: expected a string to compare with, got .*text"):
        evaluate_rows(tiny_model("llama"), tiny_tokenizer(chat_template=CHAT_TEMPLATE), [{"messages": [*messages[:-1], parts]}])


def test_a_loss_too_large_for_a_perplexity(written, monkeypatch):
    written("text")
    monkeypatch.setattr(evaluate, "mean_loss", lambda *_, **__: (800.0, 3))
    scores, _ = evaluate_rows(tiny_model("llama"), tiny_tokenizer(), ROWS[:1])
    assert scores["perplexity"] == math.inf and scores["loss"] == 800.0


def test_mean_loss_is_without_dropout():
    model = tiny_model("gpt2", embd_pdrop=0.5)
    expected = mean_loss(model, tiny_tokenizer(), ROWS)
    assert mean_loss(model.train(), tiny_tokenizer(), ROWS) == expected and model.training


@pytest.mark.parametrize("call", (evaluate_rows, mean_loss))
def test_no_rows_are_refused(call):
    with pytest.raises(ValueError, match="rows: expected at least one row"):
        call(tiny_model("llama"), tiny_tokenizer(), [])


@pytest.mark.parametrize("call", (evaluate_rows, mean_loss))
def test_what_is_no_row_is_refused(call):
    with pytest.raises(ValueError, match="expected an object with .prompt. and .completion., .*, got .'text'."):
        call(tiny_model("llama"), tiny_tokenizer(), [*ROWS, {"text": "?"}])


@pytest.mark.parametrize("call", (evaluate_rows, mean_loss))
def test_batches_have_a_row(call):
    for batch_size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size: expected at least 1, got {batch_size}"):
            call(tiny_model("llama"), tiny_tokenizer(), ROWS, batch_size=batch_size)


def test_evaluate_e2e_scores_the_first_line(written):
    """Four slots, of which the second text leaves out the area; every text equals one of its references."""
    calls = written("\nAROMI is a pub .\nNo more of it.", "Zizzi is a bar .")
    rows = [E2E_ROWS[0], {**E2E_ROWS[1], "references": ["Zizzi is a bar .", "By the riverside ."]}]
    scores, texts = evaluate_e2e(tiny_model("llama"), tiny_tokenizer(), rows, max_new_tokens=7)
    assert texts == ["AROMI is a pub .", "Zizzi is a bar ."]
    assert calls == [(["name : Aromi | Type : pub\n", "name : Zizzi | area : riverside\n"], {"max_new_tokens": 7})]
    assert scores == {"bleu": pytest.approx(100), "slot_error": 1 / 4}


def test_evaluate_e2e_on_a_tiny_model():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    scores, texts = evaluate_e2e(model, tokenizer, E2E_ROWS, max_new_tokens=8, batch_size=1)
    prompts = ["name : Aromi | Type : pub\n", "name : Zizzi | area : riverside\n"]
    assert texts == [first_line(text) for text in generate_texts(model, tokenizer, prompts, max_new_tokens=8)]
    references = [["A pub is Aromi.", "Zizzi is a bar near the riverside ."], ["Aromi is  a pub .", None]]
    assert scores == {"bleu": sacrebleu.corpus_bleu(texts, references, lowercase=True).score, "slot_error": 1.0}


def test_scores_of_the_references_themselves():
    """Of three slots the references leave out 0, 2 and 1; of two slots the only one leaves out 1."""
    rows = [
        {
            "mr": "name[Aromi], eatType[pub], area[riverside]",
            "references": ["Aromi is a pub by the riverside.", "Aromi.", "Aromi is a pub."],
        },
        {"mr": "name[Zizzi], eatType[pub]", "references": ["Zizzi is there."]},
    ]
    assert e2e_reference_scores(rows) == {
        "slot_error_references": pytest.approx((1 + 1) / (3 + 2)),
        "slot_error_references_mean": pytest.approx((0 + 2 + 1 + 1) / (3 * 3 + 2)),
    }
