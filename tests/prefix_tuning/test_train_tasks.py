"""PrefixTrainer for encoder-decoders, classification and question answering: what a plain loop gives, heads included."""

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import T5Config, T5ForConditionalGeneration

import prefix_kernels
from prefix_tuning import Prefix, attach_prefix
from prefix_tuning.cli import main
from prefix_tuning.data import tokenize_pair, tokenize_rows
from prefix_tuning.e2e import ATTRIBUTES, load_e2e, parse_mr
from prefix_tuning.evaluate import mean_loss
from prefix_tuning.generate import generate_texts
from support.encoder_decoders import tiny_encoder_decoder
from support.encoders import tiny_encoder
from support.models import random_prefix, tiny_model
from support.tokenizer import tiny_tokenizer
from support.training import CHECKPOINTING, ROWS, losses, silent_trainer

ROOT = Path(__file__).resolve().parents[2]
PREFIX_LEN = 5


def make_trainer(folder, model, prefix, rows, options=None, **changes):
    return silent_trainer(folder, model, prefix, rows, options, lr_scheduler_type="constant", **changes)


def tiny_t5(**changes):
    return tiny_encoder_decoder("t5", vocab_size=128, **changes)


def test_pairs_are_tokenised_as_the_tokenizer_does_it():
    tokenizer = tiny_tokenizer(adds_eos=True)
    row = {"prompt": "to the end", "completion": "here"}
    example = tokenize_pair(row, tokenizer)
    assert example == {"input_ids": tokenizer("to the end")["input_ids"], "labels": tokenizer("here")["input_ids"]}
    assert example["input_ids"][-1] == example["labels"][-1] == tokenizer.eos_token_id
    assert tokenize_pair(row, tiny_tokenizer())["labels"] == example["labels"]
    assert len(tokenize_pair(row, tokenizer, 5)["input_ids"]) == 5
    with pytest.raises(ValueError, match=r"max_length: expected at least \d, .*, got 2"):
        tokenize_pair(row, tokenizer, 2)
    with pytest.raises(ValueError, match=r'rows\[1\]: messages: expected "prompt" and "completion"'):
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        tokenize_rows([row, {"messages": messages}], tokenizer, encoder_decoder=True)
    with pytest.raises(ValueError, match="no end-of-text token"):
        tokenize_pair(row, tiny_tokenizer(eos=False))


@pytest.mark.parametrize("family", ("bart", "t5"))
def test_an_encoder_decoder_is_trained_as_a_plain_loop_trains_it(family, tmp_path):
    model = tiny_encoder_decoder(family, vocab_size=128)
    state = copy.deepcopy(model.state_dict())
    prefix = random_prefix(model, PREFIX_LEN)
    plain, tokenizer = copy.deepcopy(prefix), tiny_tokenizer()
    trainer = make_trainer(
        tmp_path, model, prefix, ROWS, train_sampling_strategy="sequential", optim="adamw_torch", weight_decay=0.0,
        max_grad_norm=0, gradient_accumulation_steps=2, per_device_train_batch_size=2,
    )  # fmt: skip
    assert trainer.label_names == ["labels"]
    trainer.train()
    trainer.detach()
    optimizer, expected = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0), []
    with attach_prefix(model, plain):
        for step in range(4):
            rows = (ROWS + ROWS)[4 * (step % 2) : 4 * (step % 2) + 4]
            logits, targets = [], []
            for row in rows:  # one by one: no padding anywhere
                example = tokenize_pair(row, tokenizer)
                labels = torch.tensor([example["labels"]])
                logits.append(model(input_ids=torch.tensor([example["input_ids"]]), labels=labels).logits[0])
                targets.append(labels[0])
            loss = cross_entropy(torch.cat(logits), torch.cat(targets))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
    np.testing.assert_allclose(losses(trainer), expected, atol=2e-4)
    for name, tensor in prefix.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], atol=1e-4, rtol=1e-3)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_an_encoder_decoder_is_evaluated_predicted_checkpointed_and_resumed(tmp_path):
    def run(folder, steps, **options):
        model = tiny_t5()
        prefix = Prefix.for_model(model, PREFIX_LEN, reparametrization="mlp", hidden_size=8, seed=0)
        trainer = make_trainer(
            folder, model, prefix, ROWS, options={"eval_dataset": ROWS[:4]}, max_steps=steps, save_strategy="steps",
            save_steps=2, **{CHECKPOINTING: True},
        )  # fmt: skip
        trainer.train(**options)
        return trainer

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2).detach()
    resumed = run(tmp_path / "parts", 4, resume_from_checkpoint=True)
    for name, tensor in resumed.prefix.state_dict().items():
        torch.testing.assert_close(tensor, whole.prefix.state_dict()[name], atol=1e-6, rtol=1e-5)
    evaluated = whole.evaluate()["eval_loss"]
    predicted = whole.predict(ROWS[:4])
    assert predicted.metrics["test_loss"] == pytest.approx(evaluated, rel=1e-5)
    assert predicted.predictions.shape[:1] + predicted.predictions.shape[-1:] == (4, 128)
    whole.save_model(str(tmp_path / "saved"))
    assert set(Prefix.load(tmp_path / "saved").parts) == {"encoder", "decoder", "cross"}


def test_padding_changes_nothing_for_an_encoder_decoder(tmp_path):
    trainer = make_trainer(tmp_path, tiny_t5(), random_prefix(tiny_t5(), PREFIX_LEN), ROWS, per_device_eval_batch_size=1)
    alone = trainer.evaluate(ROWS[:3] * 2)["eval_loss"]
    expected = [trainer.evaluate([row])["eval_loss"] for row in ROWS[:3]]
    assert alone == pytest.approx(sum(expected) / 3, rel=1e-5)
    trainer.args.per_device_eval_batch_size = 6
    counts = [len(tokenize_pair(row, tiny_tokenizer())["labels"]) for row in ROWS[:3]]
    together = trainer.evaluate(ROWS[:3] * 2)["eval_loss"]
    assert together == pytest.approx(np.average(expected, weights=counts), rel=1e-5)


def classified(task, length=(4, 9)):
    """Rows a tiny encoder can learn: the class is that of the first token, alone or of each."""
    drawn, rows = random.Random(0), []
    for _ in range(24):
        ids = [drawn.randrange(3, 90) for _ in range(drawn.randrange(*length))]
        row = {"input_ids": ids, "token_type_ids": [0] * len(ids)}
        if task == "SequenceClassification":
            row["label"] = ids[0] % 3
        elif task == "TokenClassification":
            row["labels"] = [token % 3 for token in ids]
        else:
            row |= {"start_positions": ids.index(max(ids)), "end_positions": ids.index(max(ids))}
        rows.append(row)
    return rows


@pytest.mark.parametrize("family, task", [
    ("bert", "SequenceClassification"), ("bert", "TokenClassification"), ("bert", "QuestionAnswering"),
    ("modernbert", "SequenceClassification"), ("distilbert", "TokenClassification"), ("roberta", "QuestionAnswering"),
])  # fmt: skip
def test_heads_and_prefix_are_trained_together(family, task, tmp_path):
    model = tiny_encoder(family, task)
    state = copy.deepcopy(model.state_dict())
    rows = [{k: v for k, v in row.items() if k != "token_type_ids" or family == "bert"} for row in classified(task)]
    prefix = Prefix.for_model(model, PREFIX_LEN, seed=0)
    before = copy.deepcopy(prefix.state_dict())
    trainer = make_trainer(
        tmp_path, model, prefix, rows, {"eval_dataset": rows}, max_steps=40, learning_rate=2e-2, logging_steps=5,
        save_strategy="steps", save_steps=20, **{CHECKPOINTING: True},
    )  # fmt: skip
    started = trainer.evaluate()["eval_loss"]
    trainer.train()
    predicted = trainer.predict(rows)
    assert trainer.evaluate()["eval_loss"] < 0.8 * started
    if task == "SequenceClassification":
        assert predicted.predictions.shape == (len(rows), 3) and predicted.label_ids.shape == (len(rows),)
    elif task == "QuestionAnswering":
        assert [p.shape[0] for p in predicted.predictions] == [p.shape[0] for p in predicted.label_ids] == [len(rows)] * 2
    trainer.detach()
    changed = {name for name, tensor in prefix.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any("_heads" in name for name in changed) and changed == set(before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "checkpoint-40"):
        loaded = Prefix.load(folder)
        assert all(torch.equal(tensor, prefix.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_what_the_model_takes_reaches_it(tmp_path):
    """Trainer drops columns that forward does not name; those of the model inside must stay."""
    model = tiny_encoder("bert")
    prefix = random_prefix(model, PREFIX_LEN)
    rows = [{"input_ids": [5, 6, 7], "token_type_ids": [0, 1, 1], "labels": 1, "unused": "text"}] * 2
    trainer = make_trainer(tmp_path, model, prefix, rows)
    got = trainer.evaluate(rows)["eval_loss"]
    expected = model(
        input_ids=torch.tensor([[5, 6, 7]]), token_type_ids=torch.tensor([[0, 1, 1]]), labels=torch.tensor([1])
    ).loss.item()
    assert got == pytest.approx(expected, rel=1e-5)


def test_a_causal_classifier_is_trained(tmp_path):
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_model("llama", num_labels=3).config).eval()
    rows = [{name: row[name] for name in ("input_ids", "label")} for row in classified("SequenceClassification")]
    prefix = Prefix.for_model(model, PREFIX_LEN, seed=0)
    trainer = make_trainer(tmp_path, model, prefix, rows, {"eval_dataset": rows}, max_steps=30, learning_rate=2e-2)
    started = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * started


def test_a_classifier_equals_a_plain_loop(tmp_path):
    model = tiny_encoder("bert")
    rows = [{name: row[name] for name in ("input_ids", "label")} for row in classified("SequenceClassification", (6, 7))]
    prefix = random_prefix(model, PREFIX_LEN)
    plain = copy.deepcopy(prefix)
    trainer = make_trainer(
        tmp_path, model, prefix, rows, train_sampling_strategy="sequential", optim="sgd", learning_rate=0.3,
        max_grad_norm=0, gradient_accumulation_steps=3, per_device_train_batch_size=2,
    )  # fmt: skip
    trainer.train()
    trainer.detach()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.3)
    with attach_prefix(model, plain):
        for step in range(4):
            batch = rows[6 * step : 6 * step + 6]
            ids, labels = torch.tensor([row["input_ids"] for row in batch]), torch.tensor([row["label"] for row in batch])
            optimizer.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
    for name, tensor in prefix.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], atol=1e-4, rtol=1e-3)


def test_rows_for_a_collator_of_ones_own_go_on_as_they_are(tmp_path):
    model, rows = tiny_encoder("bert"), [{"prompt": "a pub", "completion": "x", "label": 1}]
    trainer = make_trainer(tmp_path, model, random_prefix(model, PREFIX_LEN), rows, {"data_collator": len})
    assert trainer.train_dataset is rows


def test_wrong_rows_and_prefixes_are_refused(tmp_path):
    model = tiny_encoder("bert")
    prefix = random_prefix(model, PREFIX_LEN)
    with pytest.raises(ValueError, match="train_dataset: expected tokenised rows with input_ids"):
        make_trainer(tmp_path, model, prefix, ROWS)
    with pytest.raises(TypeError, match="prefix: expected a Prefix, got dict"):
        make_trainer(tmp_path, model, {}, ROWS)
    assert not any(hasattr(module, "layer_prefix") for module in model.modules())


# A small real task: the meanings of E2E, said in one order or in the other.

MEANINGS = [parse_mr(row["mr"]) for row in load_e2e(ROOT / "benchmarks" / "data" / "e2e" / "dev.jsonl.gz")]
WORDS = ["<pad>", "</s>", "in order", "in reverse", *ATTRIBUTES, *sorted({v for mr in MEANINGS for v in mr.values()})]
IDS = {word: i for i, word in enumerate(WORDS)}


def listing(meaning, way, drawn, told):
    """From attributes and values in any order, the values in the order of ATTRIBUTES or in reverse, with or without a word
    that says which."""
    slots = [IDS[word] for name in drawn.sample(list(meaning), len(meaning)) for word in (name, meaning[name])]
    values = [IDS[meaning[name]] for name in ATTRIBUTES if name in meaning]
    return {
        "input_ids": [IDS[way]] * told + slots + [1],
        "labels": (values if way == "in order" else values[::-1]) + [1],
    }


def batch_of(rows):
    padded = {
        name: torch.nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value)
        for name, value in (("input_ids", 0), ("labels", -100))
    }
    return padded | {"attention_mask": (padded["input_ids"] != 0).long()}


def model_that_lists(meanings, drawn):
    """A tiny T5 trained whole until it lists either way on a word."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(
        vocab_size=len(WORDS), d_model=64, d_kv=16, num_heads=2, d_ff=128, num_layers=2, dropout_rate=0.0, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, relative_attention_num_buckets=16, relative_attention_max_distance=32,
    ))  # fmt: skip
    optimizer, steps = torch.optim.AdamW(model.parameters()), 150
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        rows = [listing(mr, drawn.choice(("in order", "in reverse")), drawn, True) for mr in drawn.sample(meanings, 64)]
        loss = model(**batch_of(rows)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def test_three_prefixes_take_the_place_of_an_instruction(tmp_path):
    """The frozen model that was told which way to list is not told any more: prefixes must do it, on meanings not seen."""
    drawn = random.Random(0)
    meanings = drawn.sample(MEANINGS, len(MEANINGS))
    seen, unseen = meanings[:450], meanings[450:]
    model = model_that_lists(seen, drawn)
    told, untold = ([listing(mr, "in reverse", drawn, way) for mr in unseen] for way in (True, False))
    with torch.no_grad():
        told_loss, untold_loss = (model(**batch_of(rows)).loss.item() for rows in (told, untold))
    assert told_loss < 0.5 < untold_loss
    prefix = Prefix.for_model(model, 4, reparametrization="mlp", hidden_size=64, seed=0)
    rows = [listing(mr, "in reverse", drawn, False) for mr in seen * 4]
    trainer = make_trainer(
        tmp_path, model, prefix, rows, {"data_collator": batch_of, "eval_dataset": untold}, max_steps=60,
        learning_rate=5e-3, per_device_train_batch_size=32, per_device_eval_batch_size=100,
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < min(1.3 * told_loss, 0.4 * untold_loss)
    trainer.save_model()
    trainer.detach()
    inputs = batch_of(untold)
    with attach_prefix(model, Prefix.load(tmp_path)):
        generated = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], num_beams=2, max_new_tokens=10
        )
    right = [row["labels"] == ids[1 : len(row["labels"]) + 1] for row, ids in zip(untold, generated.tolist(), strict=True)]
    assert np.mean(right) > 0.7


def test_sound_and_classes_of_encoder_decoders_are_trained(tmp_path):
    from transformers import BartForSequenceClassification

    model = tiny_encoder_decoder("whisper")
    generator = torch.Generator().manual_seed(0)
    sounds = [{"input_features": torch.randn(8, 24, generator=generator), "labels": [5 + i, 9, 7, 2]} for i in range(4)]

    def collate(rows):
        return {"input_features": torch.stack([torch.as_tensor(row["input_features"]) for row in rows]),
                "labels": torch.tensor([row["labels"] for row in rows])}  # fmt: skip

    trainer = make_trainer(
        tmp_path, model, Prefix.for_model(model, PREFIX_LEN, seed=0), sounds, {"data_collator": collate}, max_steps=8,
        learning_rate=3e-2,
    )  # fmt: skip
    trainer.train()
    trainer.detach()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]

    config = tiny_encoder_decoder("bart").config
    config.num_labels = 3
    model = BartForSequenceClassification(config).eval()
    rows = [{"input_ids": [10 + i, 20, 2], "label": i % 3} for i in range(4)]
    prefix = Prefix.for_model(model, PREFIX_LEN, seed=0)
    assert list(prefix.heads) == ["classification_head"]
    trainer = make_trainer(tmp_path, model, prefix, rows, max_steps=8)
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]


@pytest.mark.parametrize("family", ("bart", "t5"))
def test_an_encoder_decoder_from_the_command_line(family, tmp_path, capsys):
    model = tiny_encoder_decoder(family, vocab_size=128)
    model.config.num_beams = None
    model.save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer(adds_eos=True)
    tokenizer.save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    shared = ["--model", str(tmp_path / "model"), "--quiet", "--device", "cpu"]
    run = ["train", "--train-file", str(rows), "--output", str(tmp_path / "run"), "--steps", "3", "--prefix-len", "4", *shared]
    assert main(run) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    prefix = Prefix.load(tmp_path / "run" / "prefix")
    assert set(prefix.parts) == {"encoder", "decoder", "cross"}
    assert metrics["prefix_parameters"] == sum(parameter.numel() for parameter in prefix.parameters())
    assert metrics["backend"] == prefix_kernels.available_backends()[0]
    attached = ["--prefix", str(tmp_path / "run" / "prefix"), *shared]
    assert main(["evaluate", "--file", str(rows), "--max-new-tokens", "5", *attached]) == 0
    capsys.readouterr()
    prompts = [ROWS[0]["prompt"], ROWS[1]["prompt"]]
    generate = ["generate", "--prompt", prompts[0], "--prompt", prompts[1], "--max-new-tokens", "6", "--num-beams", "2"]
    assert main([*generate, *attached]) == 0
    shown = capsys.readouterr().out.splitlines()
    with attach_prefix(model, prefix):
        loss, tokens = mean_loss(model, tokenizer, ROWS)
        alone = []
        for prompt in prompts:
            ids = model.generate(
                input_ids=tokenizer(prompt, return_tensors="pt")["input_ids"], max_new_tokens=6, num_beams=2, do_sample=False,
                eos_token_id=2, forced_eos_token_id=None, no_repeat_ngram_size=0,
            )  # fmt: skip
            alone.append(tokenizer.decode(ids[0], skip_special_tokens=True))
        one_by_one = [model(**batch_of([tokenize_pair(row, tokenizer)])).loss for row in ROWS]
    assert shown == "\n".join(alone).splitlines()
    counts = [len(tokenize_pair(row, tokenizer)["labels"]) for row in ROWS]
    assert (loss, tokens) == (pytest.approx(np.average([x.item() for x in one_by_one], weights=counts), rel=1e-5), sum(counts))
    with pytest.raises(ValueError, match="prompts: expected texts for an encoder-decoder"):
        generate_texts(model, tokenizer, [[{"role": "user", "content": "a"}]])
