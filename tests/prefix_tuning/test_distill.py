"""A text distilled into a prefix: the teacher's probabilities against the joined text, and a run from text to files."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from torch.nn import functional

from prefix_tuning import Prefix, PrefixedModel, attach_prefix, cli, distill, row_limits
from prefix_tuning.data import IGNORED, PromptCompletionCollator, tokenize_example
from prefix_tuning.distill import DistillSettings, mean_divergence, teacher_examples
from prefix_tuning.loss import distillation_loss, divergences
from prefix_tuning.padding_free import padding_free_collator
from prefix_tuning.self_study import SourceText, with_text
from support.encoder_decoders import tiny_encoder_decoder
from support.models import random_prefix, tiny_model
from support.tokenizer import CHAT_TEMPLATE, tiny_tokenizer

TEXT = "The tower of Marrow Point was built in 1871 of grey granite. It has 203 steps, and its light flashes three times."
ALL = [0, len(tiny_tokenizer()(TEXT)["input_ids"])]
PLAIN = [
    {"prompt": "Question: how many steps?\nAnswer:", "completion": " 203", "chunk": ALL},
    {"prompt": "Question: of what?\nAnswer:", "completion": " grey granite", "chunk": ALL},
    {"prompt": "Built?\n", "completion": "1871", "chunk": [10, 60]},
]
CHAT = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], "chunk": chunk}
    for q, a, chunk in (("how many steps?", "203", ALL), ("of what?", "of granite", [3, 40]), ("when?", "in 1871", [3, 40]))
]
TURNS = [{"messages": [*CHAT[0]["messages"], *CHAT[1]["messages"]], "chunk": ALL}]
SMALL = DistillSettings(
    prefix_len=8, conversations=10, chunk_tokens=60, max_new_tokens=12, top_k=5, held_out=0.2, steps=12, batch_size=4,
    learning_rate=0.1,
)  # fmt: skip


def model_and_tokenizer(family="llama", chat=False, **options):
    return tiny_model(family, max_position_embeddings=512), tiny_tokenizer(
        chat_template=CHAT_TEMPLATE if chat else None, **options
    )


def chunk(row):
    ids = tiny_tokenizer()(TEXT)["input_ids"]
    return tiny_tokenizer().decode(ids[slice(*row["chunk"])])


LONG = {name: {"n_positions" if name == "gpt2" else "max_position_embeddings": 512} for name in ("llama", "mistral", "gpt2")}


@pytest.mark.parametrize("family", LONG)  # mistral's window is 8 tokens
@pytest.mark.parametrize(("rows", "chat", "bos"), [(PLAIN, False, False), (PLAIN, False, True), (CHAT, True, False),
                                                   (TURNS, True, True)])  # fmt: skip
def test_the_teacher_has_the_text_in_front(family, rows, chat, bos):
    model = tiny_model(family, **LONG[family])
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE if chat else None, bos=bos)
    examples = teacher_examples(model, tokenizer, rows, SourceText(TEXT, tokenizer), top_k=7, batch_size=2)
    assert len(examples) == len(rows)
    for row, example in zip(rows, examples, strict=True):
        joined = tokenize_example(with_text(row, chunk(row)), tokenizer)
        with torch.no_grad():
            probs = model(torch.tensor([joined["input_ids"]])).logits[0].softmax(-1)
        targets = [i for i, label in enumerate(joined["labels"]) if label != IGNORED]
        expected = probs[[i - 1 for i in targets]].topk(7)
        assert torch.allclose(example["teacher_probs"], expected.values, atol=1e-5)
        assert torch.equal(example["teacher_ids"], expected.indices)
        alone = tokenize_example({name: value for name, value in row.items() if name != "chunk"}, tokenizer)
        assert {name: example[name] for name in alone} == alone


def labelled(rows=2, length=6):
    torch.manual_seed(1)
    model = tiny_model("llama")
    input_ids = torch.randint(3, 128, (rows, length))
    labels = input_ids.masked_fill(torch.rand(rows, length) < 0.4, IGNORED)
    return model, input_ids, labels, (labels[:, 1:] != IGNORED)


def test_the_divergence_is_that_of_the_teachers_distribution():
    model, input_ids, labels, wanted = labelled()
    logits = model(input_ids).logits[:, :-1][wanted].double()
    teacher = torch.randn_like(logits).softmax(-1)
    probs, ids = teacher.topk(9)
    loss, count = distillation_loss(model, labels, ids, probs, input_ids=input_ids)

    def grouped(distribution):
        named = distribution.gather(1, ids)
        return torch.cat([named, 1 - named.sum(1, keepdim=True)], dim=1)

    expected = functional.kl_div(grouped(logits.softmax(-1)).log(), grouped(teacher), reduction="sum")
    assert count == len(ids) and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    every, ids = teacher.topk(127)
    loss, _ = distillation_loss(model, labels, ids, every, input_ids=input_ids)
    assert loss.item() == pytest.approx(functional.kl_div(logits.log_softmax(-1), teacher, reduction="sum").item(), rel=1e-5)


def test_tokens_that_the_model_rules_out():
    """All but those that the teacher names, whose probabilities add up to less than 1 in float32."""
    logits = torch.full((2, 8), -torch.inf)
    logits[:, :3] = torch.randn(2, 3)
    logits[1, 3] = 0.5
    logits.requires_grad_()
    ids, probs = torch.tensor([[0, 1, 2]] * 2), torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.1]])
    divergence = divergences(logits, ids, probs)
    (grad,) = torch.autograd.grad(divergence.sum(), logits)
    assert divergence.isfinite().all() and grad.isfinite().all() and (divergence >= -1e-6).all()
    expected = functional.kl_div(logits[0, :3].log_softmax(-1), probs[0], reduction="sum")
    torch.testing.assert_close(divergence[0], expected)
    assert divergences(logits[:1], ids[:1], probs[:1] / 2).item() == torch.inf  # what is left the model rules out


def test_probabilities_of_0_and_such_as_add_up_to_more_than_1():
    logits, ids = torch.randn(2, 4), torch.tensor([[0, 1, 2]] * 2)
    teacher = torch.tensor([[0.6, 0.4 + 1e-7, 0, 0], [0.5, 0, 0.25, 0.25]])
    assert 0 < teacher[0].sum() - 1 < 1e-6
    logits[1, 1] = -torch.inf
    expected = functional.kl_div(logits.log_softmax(-1).clamp(min=-1e3), teacher, reduction="none").sum(1)
    torch.testing.assert_close(divergences(logits, ids, teacher[:, :3]), expected)


def test_the_teacher_itself_diverges_by_nothing_and_has_no_gradient():
    model, input_ids, labels, wanted = labelled()
    prefix = random_prefix(model, 3)
    with attach_prefix(model, prefix):
        probs, ids = model(input_ids).logits[:, :-1][wanted].softmax(-1).detach().topk(20)
        loss, _ = distillation_loss(model, labels, ids, probs, input_ids=input_ids)
        loss.backward()
        certain = torch.zeros_like(probs)
        certain[:, 0] = 1  # a teacher that has no doubt
        doubted, _ = distillation_loss(model, labels, ids, certain, input_ids=input_ids)
    assert abs(loss.item()) < 1e-4 and torch.isfinite(doubted)
    assert all(parameter.grad.abs().max() < 1e-4 for parameter in prefix.parameters())


def test_with_logits_the_loss_is_the_same():
    model, input_ids, labels, wanted = labelled()
    probs, ids = torch.randn(int(wanted.sum()), 128).softmax(-1).topk(9)
    prefix = random_prefix(model)
    with attach_prefix(model, prefix):
        trained = PrefixedModel(model, prefix)
        batch = {"input_ids": input_ids, "labels": labels, "teacher_ids": ids, "teacher_probs": probs}
        alone, beside = trained(**batch), trained(**batch, return_logits=True)
    assert list(alone) == ["loss"] and beside["logits"].shape == (2, 6, 128)
    torch.testing.assert_close(alone["loss"], beside["loss"])


def test_a_teacher_of_other_targets_is_refused():
    model, input_ids, labels, wanted = labelled()
    ids = torch.zeros(int(wanted.sum()) + 1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"teacher_ids, teacher_probs: expected \[{len(ids) - 1}, k\]"):
        distillation_loss(model, labels, ids, ids.float(), input_ids=input_ids)


@pytest.mark.parametrize("chat", [True, False])
def test_a_text_becomes_a_prefix(chat, tmp_path):
    model, tokenizer = model_and_tokenizer(chat=chat)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prefix, metrics = distill.distill(model, tokenizer, TEXT, tmp_path, SMALL, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    rows = [json.loads(line) for line in (tmp_path / "conversations.jsonl").read_text().splitlines()]
    assert metrics["conversations"] == len(rows) <= 10 and metrics["steps"] == 12
    assert all(end - begin == 60 for begin, end in (row["chunk"] for row in rows))
    divergences = metrics["divergences"]
    assert list(divergences) == ["no_prefix", "start", "distilled"]
    assert sum(metrics["losses"][-4:]) < sum(metrics["losses"][:4]) and divergences["distilled"] < divergences["start"]

    loaded = Prefix.load(tmp_path / "prefix")
    assert loaded.prefix_len == 8 and torch.equal(loaded.layers()[0][0], prefix.layers()[0][0])
    start = Prefix.for_model(model, 8, init="text", text=TEXT, tokenizer=tokenizer)
    examples = teacher_examples(model, tokenizer, rows, SourceText(TEXT, tokenizer), top_k=5)
    everywhere = []
    for attached in (start, loaded):
        with attach_prefix(model, attached):
            everywhere.append(mean_divergence(model, tokenizer, examples, 3))
    assert everywhere[1] < 0.9 * everywhere[0]


@pytest.mark.parametrize("family", LONG)
@pytest.mark.parametrize("rows", [PLAIN[:2], [*PLAIN[1::-1], {**PLAIN[0], "completion": " 203 grey"}]], ids=["apart", "shared"])
def test_rows_without_padding_have_the_teacher_beside_their_targets(rows, family):
    """Also where rows that begin alike come in another order than they were given."""
    model, tokenizer = tiny_model(family, **LONG[family]), tiny_tokenizer()
    examples = teacher_examples(model, tokenizer, rows, SourceText(TEXT, tokenizer), top_k=7)
    prefix, outcomes = random_prefix(model), []
    for collator in (PromptCompletionCollator(tokenizer), padding_free_collator(model, True)):
        with attach_prefix(model, prefix):
            loss = PrefixedModel(model, prefix)(**collator(examples))["loss"]
            outcomes.append((loss, *torch.autograd.grad(loss, list(prefix.parameters()))))
    for padded, without in zip(*outcomes, strict=True):
        torch.testing.assert_close(without, padded, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("max_length", "longest"), [(40, 40), (None, 512 - 8)])
def test_what_is_held_out_is_not_trained_on_and_rows_fit(max_length, longest, tmp_path, monkeypatch):
    model, tokenizer = model_and_tokenizer()
    given = {}

    def train(model, tokenizer, rows, output, settings, **options):
        given.update(rows=rows, **options)
        return Prefix.for_model(model, 8), {}

    monkeypatch.setattr(distill, "train_prefix", train)
    prompts = [{"prompt": f"{i}" * (600 if i == 0 else 50), "completion": "c"} for i in range(10)]
    settings = dataclasses.replace(SMALL, chunk_tokens=512, max_length=max_length)
    short = "Behind a prompt of 600 tokens there is no room for the text."
    with pytest.raises(ValueError, match=r"rows\[0\]: expected .* with the text in front, got \d+ tokens"):
        distill.distill(model, tokenizer, short, tmp_path, settings, prompts=prompts, progress=False)
    roomy = tiny_model("llama", max_position_embeddings=1024)
    for module in (distill, row_limits):
        monkeypatch.setattr(module, "tokens_left", lambda asked, offset: (1024 if offset == 0 else 512) - offset)
    distill.distill(roomy, tokenizer, short, tmp_path / "roomy", settings, prompts=prompts, progress=False)
    trained, measured = ([example["input_ids"] for example in given[name]] for name in ("rows", "eval_rows"))
    assert (len(trained), len(measured)) == (8, 2) and not any(ids in trained for ids in measured)
    assert max(map(len, trained + measured)) == longest


def test_a_run_goes_on_with_its_conversations(tmp_path, monkeypatch):
    model, tokenizer = model_and_tokenizer()
    settings = dataclasses.replace(SMALL, save_steps=3, steps=6)
    whole, metrics = distill.distill(model, tokenizer, TEXT, tmp_path / "whole", settings, progress=False)
    interrupted = dataclasses.replace(settings, conversations=10)
    folder = tmp_path / "interrupted"
    distill.distill(model, tokenizer, TEXT, folder, interrupted, progress=False)
    (folder / "checkpoint-6" / "trainer_state.json").unlink()  # as if killed while it was written
    monkeypatch.setattr(distill, "questions", None)
    resumed, further = distill.distill(model, tokenizer, TEXT, folder, settings, resume=True, progress=False)
    assert further["conversations"] == metrics["conversations"]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_prompts_of_the_users_own(tmp_path):
    model, tokenizer = model_and_tokenizer(chat=True)
    asked = [{"messages": CHAT[0]["messages"][:1]}, {"messages": CHAT[1]["messages"]}, {"prompt": "when\n"}]
    settings = dataclasses.replace(SMALL, chunk_tokens=512, held_out=0.0, steps=2)
    _, metrics = distill.distill(model, tokenizer, TEXT, tmp_path, settings, prompts=asked, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "conversations.jsonl").read_text().splitlines()]
    assert metrics["divergences"] == {} and metrics["conversations"] == 3
    assert [row["chunk"] for row in rows] == [ALL] * 3
    assert rows[0]["messages"][-1]["role"] == "assistant" and "completion" in rows[2]
    assert rows[1]["messages"] == CHAT[1]["messages"]  # answered already
    with pytest.raises(ValueError, match=f"chunk_tokens: expected at least the text's {ALL[1]} tokens, .*, got 60"):
        distill.distill(model, tokenizer, TEXT, tmp_path / "new", SMALL, prompts=asked, progress=False)


def test_a_run_over_checkpoints_leaves_the_conversations(tmp_path):
    model, tokenizer = model_and_tokenizer()
    settings = dataclasses.replace(SMALL, save_steps=2, steps=2)
    distill.distill(model, tokenizer, TEXT, tmp_path, settings, progress=False)
    before = (tmp_path / "conversations.jsonl").read_text()
    with pytest.raises(ValueError, match="holds the checkpoints and the prefix of an earlier run"):
        distill.distill(model, tokenizer, TEXT, tmp_path, dataclasses.replace(settings, seed=5), progress=False)
    with pytest.raises(ValueError, match=r"resume: rows\[0\] of .* is not of a run with this text"):
        distill.distill(model, tokenizer, TEXT + " More.", tmp_path, settings, resume=True, progress=False)
    assert (tmp_path / "conversations.jsonl").read_text() == before
    rows = [json.loads(line) for line in before.splitlines()]
    assert sum(row["held_out"] for row in rows) == round(0.2 * len(rows))  # and not drawn anew with another seed
    distill.distill(model, tokenizer, TEXT + " More.", tmp_path, settings, overwrite=True, progress=False)
    assert (tmp_path / "conversations.jsonl").read_text() != before


def test_a_run_over_conversations_alone_leaves_them(tmp_path):
    """As of a run that was interrupted before its first checkpoint."""
    model, tokenizer = model_and_tokenizer()
    file = tmp_path / "conversations.jsonl"
    file.write_text("{}\n")
    with pytest.raises(ValueError, match="output: .*conversations.jsonl is of an earlier run; resume that, overwrite it"):
        distill.distill(model, tokenizer, TEXT, tmp_path, SMALL, progress=False)
    assert file.read_text() == "{}\n" and list(tmp_path.iterdir()) == [file]


def test_equal_conversations_are_one(tmp_path):
    rows = [PLAIN[0], PLAIN[1] | {"chunk": [1, 2]}, PLAIN[0], PLAIN[1], PLAIN[2]]
    kept = distill._held_out(rows, SMALL)
    assert [row["prompt"] for row in kept] == [row["prompt"] for row in PLAIN] and sum(row["held_out"] for row in kept) == 1
    assert [row["held_out"] for row in distill._held_out(PLAIN[:1], SMALL)] == [False]
    assert not any(row["held_out"] for row in distill._held_out(PLAIN, dataclasses.replace(SMALL, held_out=0.0)))


@pytest.mark.parametrize("mlp", [None, "mlp"])
def test_without_training_nothing_is_gained(mlp, tmp_path):
    """Also where the model has dropout and is in training mode, which it is again afterwards."""
    model, tokenizer = tiny_model("gpt2", n_positions=512, resid_pdrop=0.5, attn_pdrop=0.5).train(), tiny_tokenizer()
    settings = dataclasses.replace(SMALL, learning_rate=1e-12, steps=1, reparametrization=mlp, hidden_size=8)
    rows = [row | {"chunk": ALL} for row in PLAIN]
    once, twice = (teacher_examples(model, tokenizer, rows, SourceText(TEXT, tokenizer)) for _ in range(2))
    assert all(torch.equal(a["teacher_probs"], b["teacher_probs"]) for a, b in zip(once, twice, strict=True))
    assert model.training
    _, metrics = distill.distill(model, tokenizer, TEXT, tmp_path, settings, progress=False)
    assert metrics["divergences"]["distilled"] == pytest.approx(metrics["divergences"]["start"], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"patience": 1, "save_steps": 1, "held_out": 0.0}, {}, "patience: expected eval_rows .*, got 1 alone"),
        ({"backend": "magic"}, {}, "backend: expected one of .*, got 'magic'"),
        ({"top_k": 128}, {}, "top_k: "),
        ({"chunk_tokens": 512}, {"prompts": []}, "prompts: expected at least one row, got none"),
        ({"chunk_tokens": 512}, {"prompts": [{"prompt": "p"}, {"foo": 1}]}, r"prompts\[1\]: expected an object with"),
        ({"chunk_tokens": 512}, {"prompts": [{"messages": []}]}, r"prompts\[0\]: messages: expected at least one turn"),
        ({"chunk_tokens": 512}, {"prompts": [{"prompt": "p", "tags": {1}}]}, r"prompts\[0\]: Object of type set is not JSON"),
        ({"chunk_tokens": 512}, {"prompts": [{"prompt": ""}]}, r"prompts\[0\]: prompt: expected at least one token, got ''"),
        ({"chunk_tokens": 512}, {"prompts": [{"messages": [{"role": "tool", "content": "a"}]}]}, r"prompts\[0\]: messages:"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_before_the_model_writes(changes, options, message, tmp_path):
    model, tokenizer = model_and_tokenizer()
    with pytest.raises(ValueError, match=message):
        distill.distill(model, tokenizer, TEXT, tmp_path, dataclasses.replace(SMALL, **changes), progress=False, **options)
    assert not (tmp_path / "conversations.jsonl").exists()


def test_prompts_may_be_made_one_by_one(tmp_path):
    model, tokenizer = model_and_tokenizer()
    prompts = ({"prompt": f"{letter} ?"} for letter in "abcd")
    distill.distill(
        model, tokenizer, TEXT, tmp_path, dataclasses.replace(SMALL, chunk_tokens=512), prompts=prompts, progress=False
    )
    assert len((tmp_path / "conversations.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("chunk", [None, "x", [0], [0.5, 2], [5, 3], [-3, 4], [0, 10**6]], ids=str)
def test_conversations_about_no_part_of_the_text_are_not_gone_on_with(chunk, tmp_path):
    model, tokenizer = model_and_tokenizer()
    row = PLAIN[0] | {"completion": "x", "text": SourceText(TEXT, tokenizer).digest, "held_out": False, "chunk": chunk}
    (tmp_path / "conversations.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"resume: rows\[0\] of .* is not of a run with this text"):
        distill.distill(model, tokenizer, TEXT, tmp_path, SMALL, resume=True, progress=False)


def test_a_template_that_answers_cannot_be_found_in_is_refused_first(tmp_path):
    thinking = CHAT_TEMPLATE.replace("{{ 'assistant: ' }}", "{{ 'assistant: <think>' }}")
    with pytest.raises(ValueError, match="opens an answer with what the turn itself has not"):
        tokenizer = tiny_tokenizer(chat_template=thinking)
        distill.distill(tiny_model("llama", max_position_embeddings=512), tokenizer, TEXT, tmp_path, SMALL, progress=False)
    assert not (tmp_path / "conversations.jsonl").exists()


def test_a_teacher_needs_ids_and_probabilities_and_a_causal_model():
    model, input_ids, labels, wanted = labelled()
    prefix, ids = random_prefix(model), torch.zeros(int(wanted.sum()), 4, dtype=torch.int64)
    with attach_prefix(model, prefix):
        trained = PrefixedModel(model, prefix)
        for given in ({"teacher_ids": ids}, {"teacher_probs": ids.float()}):
            with pytest.raises(ValueError, match="teacher_ids, teacher_probs: expected both or neither"):
                trained(input_ids=input_ids, labels=labels, **given)


def test_settings_are_numbers_of_pythons():
    settings = distill.DistillSettings(top_k=np.int64(3), held_out=np.float32(0.5), init_text="words").resolved()
    assert [(type(value), value) for value in (settings.top_k, settings.held_out)] == [(int, 3), (float, 0.5)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": 1.0}, "held_out: expected a share of at least 0 and below 1, got 1.0"),
        ({"conversations": 0}, "conversations: expected at least 1, got 0"),
        ({"chunk_tokens": 0}, "chunk_tokens: expected at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"top_k": 128}, r"top_k: expected 1 … 127, got 128"),
        ({"prefix_len": ALL[1]}, f"prefix_len: expected less than the {ALL[1]} tokens of the text.*got {ALL[1]}"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
    ],
)
def test_wrong_settings(changes, message, tmp_path):
    model, tokenizer = model_and_tokenizer()
    settings = dataclasses.replace(SMALL, **changes)
    with pytest.raises(ValueError, match=message):
        distill.distill(model, tokenizer, TEXT, tmp_path, settings, progress=False)


@pytest.mark.parametrize("text", ["", " \n", None])
def test_a_text_without_words(text, tmp_path):
    with pytest.raises(ValueError, match="text: expected some words, got"):
        distill.distill(*model_and_tokenizer(), text, tmp_path / "new", SMALL, progress=False)
    assert not (tmp_path / "new").exists()


def test_what_is_refused(tmp_path, monkeypatch):
    model, tokenizer = model_and_tokenizer()
    with pytest.raises(NotImplementedError, match="model: expected a causal model .*, got T5"):
        distill.distill(tiny_encoder_decoder("t5"), tokenizer, TEXT, tmp_path, SMALL, progress=False)
    with attach_prefix(model, random_prefix(model)), pytest.raises(ValueError, match="model: it has a prefix attached"):
        distill.distill(model, tokenizer, TEXT, tmp_path, SMALL, progress=False)
    short = tiny_model("llama", max_position_embeddings=64)
    with pytest.raises(ValueError, match=r"chunk_tokens: expected .* the model's 64 positions, got .* with 60 of the text"):
        distill.distill(short, tokenizer, TEXT, tmp_path, SMALL, progress=False)
    with pytest.raises(ValueError, match=r"rows\[0\]: expected at most the model's 64 positions .*, got \d+ tokens"):
        teacher_examples(short, tokenizer, PLAIN, SourceText(TEXT, tokenizer))
    with pytest.raises(ValueError, match=r"rows\[1\]: expected an object with"):
        teacher_examples(model, tokenizer, [PLAIN[0], {"chunk": ALL}], SourceText(TEXT, tokenizer))
    monkeypatch.setattr(distill, "PartialState", lambda: type("Two", (), {"num_processes": 2}))
    with pytest.raises(NotImplementedError, match="processes: expected one, got 2"):
        distill.distill(model, tokenizer, TEXT, tmp_path, SMALL, progress=False)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    model, tokenizer = model_and_tokenizer(chat=True)
    expected = teacher_examples(model, tokenizer, CHAT, SourceText(TEXT, tokenizer), top_k=5)
    found = teacher_examples(model.cuda(), tokenizer, CHAT, SourceText(TEXT, tokenizer), top_k=5)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours["teacher_probs"], theirs["teacher_probs"], atol=1e-4)
    prefix, metrics = distill.distill(model, tokenizer, TEXT, tmp_path, SMALL, progress=False)
    assert next(prefix.parameters()).is_cuda
    assert sum(metrics["losses"][-4:]) < sum(metrics["losses"][:4])


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Runs the command beside a model and the text; (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = model_and_tokenizer(chat=True)
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    (tmp_path / "text.txt").write_text(TEXT)

    def run(*more):
        given = ("distill", "--model", "model", "--text-file", "text.txt", "--output", "out", "--device", "cpu", "--quiet",
                 "--prefix-len", 8, "--steps", 2, "--batch-size", 4, "--max-new-tokens", 6)  # fmt: skip
        status = cli.main([str(argument) for argument in (*given, *more)])
        return status, *capsys.readouterr()

    return run


def test_from_the_shell(run, tmp_path):
    status, out, err = run("--conversations", 10, "--chunk-tokens", 60, "--held-out", 0.3, "--seed", 1)
    assert status == 0, err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["settings"]["chunk_tokens"] == 60 and metrics["settings"]["held_out"] == 0.3 and metrics["model"] == "model"
    assert metrics["settings"]["learning_rate"] == 0.03 and metrics["steps"] == 2 and metrics["settings"]["seed"] == 1
    for name in ("no_prefix", "start", "distilled"):
        assert f"divergence, {name.replace('_', ' ')}" in out and f"{metrics['divergences'][name]:.4g}" in out
    assert "written: out/prefix, out/metrics.json" in out
    assert Prefix.load(tmp_path / "out" / "prefix").prefix_len == 8
    status, again, err = run("--resume")  # without a checkpoint: with the conversations, from the first step on
    assert status == 0 and "asking" not in err
    assert [line for line in again.splitlines() if "div" in line] == [line for line in out.splitlines() if "div" in line]


def test_prompts_from_a_file(run, tmp_path):
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"messages": row["messages"][:1]}) + "\n" for row in CHAT))
    status, out, err = run("--prompts-file", "asked.jsonl", "--chunk-tokens", 300, "--held-out", 0)
    assert status == 0 and re.search(r"conversations +3\n", out) and "divergence" not in out
    (tmp_path / "asked.jsonl").write_text('{"completion": "c"}\n')
    status, out, err = run("--prompts-file", "asked.jsonl")
    assert status == 2 and 'asked.jsonl, line 1: expected an object with "prompt", or with "messages"' in err


def test_what_is_wrong_is_said_before_the_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "load_model_and_tokenizer", None)
    status, _, err = run("--held-out", 2)
    assert status == 2 and err.endswith("error: held_out: expected a share of at least 0 and below 1, got 2.0\n")
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe\x00")
    status, _, err = run()
    assert status == 2 and "text.txt: not a UTF-8 text file" in err
