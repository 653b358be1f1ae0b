"""What PrefixTrainer trains and evaluates on: rows of text, conversations, tokenised data sets, streams."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from prefix_tuning.data import PromptCompletionCollator, tokenize_rows
from prefix_tuning.padding_free import PaddingFreeCollator
from prefix_tuning.recipe import TrainSettings, train_prefix
from support.models import tiny_model
from support.tokenizer import tiny_tokenizer
from support.training import PREFIX_LEN, ROWS, assert_prefixes_close, losses, make_trainer, row_loss, trained


def test_evaluation_without_predictions_and_with(tmp_path):
    """The same loss; compute_metrics gets logits [rows, tokens, vocabulary] that give that loss, and the labels."""
    model = tiny_model("llama")
    expected = make_trainer(tmp_path, model, options={"eval_dataset": ROWS[:4]})
    plain = expected.evaluate()["eval_loss"]
    expected.detach()
    seen = []

    def compute_metrics(result):
        seen.append(result)
        return {"rows": len(result.predictions)}

    options = {"eval_dataset": ROWS[:4], "compute_metrics": compute_metrics}
    trainer = make_trainer(tmp_path, model, options=options)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(plain, rel=1e-6) and metrics["eval_rows"] == 4
    logits, labels = torch.tensor(seen[0].predictions), torch.tensor(seen[0].label_ids)
    batch = PromptCompletionCollator(tiny_tokenizer())(tokenize_rows(ROWS[:4], tiny_tokenizer()))
    assert torch.equal(labels, batch["labels"])
    assert logits.shape == (*labels.shape, model.config.vocab_size)
    assert cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item() == pytest.approx(plain, rel=1e-5)
    sums, counts = zip(*(row_loss_attached(trainer, row) for row in ROWS[:4]), strict=True)
    assert plain == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    trainer.detach()


def row_loss_attached(trainer, row):
    loss, count = row_loss(tiny_model("llama"), trainer.prefix, tiny_tokenizer(), row)
    return loss.item(), count


def test_evaluate_and_predict_take_rows_of_text(tmp_path):
    trainer = make_trainer(tmp_path, options={"eval_dataset": ROWS[:4]})
    expected = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(ROWS[:4])["eval_loss"] == expected
    assert trainer.evaluate(tokenize_rows(ROWS[:4], tiny_tokenizer()))["eval_loss"] == expected
    two = trainer.evaluate({"a": ROWS[:4], "b": ROWS[4:]})
    assert two["eval_a_loss"] == expected != two["eval_b_loss"]
    output = trainer.predict(ROWS[:4])
    assert output.predictions.shape == (*output.label_ids.shape, 128) and output.metrics["test_loss"] == expected
    with pytest.raises(ValueError, match=r"test_dataset: rows\[1\]: "):
        trainer.predict([*ROWS[:1], {"text": "?"}])


def test_eval_datasets_by_name(tmp_path):
    sets = {"a": ROWS[:4], "b": tokenize_rows(ROWS[4:], tiny_tokenizer())}
    trainer = make_trainer(tmp_path, options={"eval_dataset": sets}, max_steps=1, eval_strategy="steps", eval_steps=1)
    trainer.train()
    (a,), (b,) = ([e[f"eval_{name}_loss"] for e in trainer.state.log_history if f"eval_{name}_loss" in e] for name in sets)
    assert a != b
    assert trainer.evaluate(ROWS[:4])["eval_loss"] == a and trainer.evaluate(ROWS[4:])["eval_loss"] == b


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        return iter(self.examples)


@pytest.mark.parametrize("kind", ("list", "with more columns", "stream"))
def test_tokenised_datasets(kind, tmp_path):
    """As they are, without a tokenizer; a label on a row's first token counts nowhere."""
    examples = tokenize_rows(ROWS[:4], tiny_tokenizer())
    expected = trained(tmp_path / "text", rows=ROWS[:4])
    for example in examples:
        example["labels"][0] = example["input_ids"][0]
    if kind == "with more columns":
        examples = [example | {"prompt": "text", "weight": 1.0} for example in examples]
    dataset = Stream(examples * 4) if kind == "stream" else examples
    options = {"processing_class": None, "data_collator": PromptCompletionCollator(tiny_tokenizer())}
    trainer = trained(tmp_path / "ids", rows=dataset, options=options)
    assert losses(trainer) == pytest.approx(losses(expected), rel=1e-5)
    assert_prefixes_close(trainer.prefix, expected.prefix, atol=2e-4, rtol=1e-3)


def test_tensors_as_examples(recwarn):
    """As a data set in torch's format has them."""
    collate, examples = PromptCompletionCollator(tiny_tokenizer()), tokenize_rows(ROWS[:2], tiny_tokenizer())
    tensors = [{name: torch.tensor(ids) for name, ids in example.items()} for example in examples]
    batch, expected = collate(tensors), collate(examples)
    assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)
    assert not recwarn.list


IDS = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
UNUSABLE = {
    "few labels": ({"labels": [-100, 6]}, "expected labels as long as input_ids, got 2 and 3"),
    "many labels": ({"labels": [-100, 6, 7, 8]}, "expected labels as long as input_ids, got 4 and 3"),
    "no token": ({"input_ids": [], "labels": []}, "expected at least one token, got none"),
    "no labels": ({"labels": None}, "expected input_ids and labels, .* got input_ids; text is tokenised in a sequence of rows"),
    "a batch": ({"input_ids": torch.tensor([[5, 6, 7]])}, r"expected input_ids of one dimension, \[tokens\], got \[1, 3\]"),
    "a short mask": ({"attention_mask": [1, 1]}, "expected attention_mask as long as input_ids, got 2 and 3"),
    "a hidden target": ({"attention_mask": [1, 1, 0]}, "expected -100 as the label of every token whose attention_mask is 0"),
    "all hidden": ({"attention_mask": [0] * 3, "labels": [-100] * 3}, "expected at least one token, got none"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_examples_that_cannot_be_used(name):
    change, message = UNUSABLE[name]
    for collator in (PromptCompletionCollator(tiny_tokenizer()), PaddingFreeCollator()):
        with pytest.raises(ValueError, match=f"examples: {message}"):
            collator([IDS, IDS | change])


@pytest.mark.parametrize("free", (True, False))
def test_tokens_that_an_attention_mask_hides_are_left_out(free, tmp_path):
    """Padded on either side, or with a hole; with a teacher for what is left."""

    def padded(example, before, behind, value):
        return {name: [value.get(name, 0)] * before + ids + [value.get(name, 0)] * behind for name, ids in example.items()}

    plain = tokenize_rows(ROWS[:3], tiny_tokenizer())
    masked = [example | {"attention_mask": [1] * len(example["input_ids"])} for example in plain]
    value = {"labels": -100, "input_ids": 3}
    masked = [padded(masked[0], 30, 0, value), padded(masked[1], 0, 20, value), {**masked[2], "attention_mask": None}]
    hole = {"input_ids": [5, 3, 6, 7], "attention_mask": [1, 0, 1, 1], "labels": [-100, -100, 6, 7]}
    runs = [
        losses(trained(tmp_path, rows=rows, options={"padding_free": free}, max_steps=2))
        for rows in ([*plain, IDS], [*masked, hole])
    ]
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)
    taught = [row | {"teacher_ids": torch.ones(2, 4), "teacher_probs": torch.ones(2, 4)} for row in (IDS, hole)]
    for collator in (PromptCompletionCollator(tiny_tokenizer()), PaddingFreeCollator()):
        one, other = (collator([row]) for row in taught)
        assert one.keys() == other.keys() and all(torch.equal(torch.as_tensor(one[n]), torch.as_tensor(other[n])) for n in one)


class Indexed(torch.utils.data.Dataset):
    """Has a length and rows by index, for any index, and no iterator."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        assert index < len(self), "a row behind the last one"
        return self.rows[index]


def test_a_data_set_without_an_iterator(tmp_path):
    expected = losses(trained(tmp_path / "list"))
    for rows in (ROWS, tokenize_rows(ROWS, tiny_tokenizer())):
        assert losses(trained(tmp_path / "indexed", rows=Indexed(rows))) == expected
    settings = TrainSettings(prefix_len=3, steps=1, batch_size=2, learning_rate=1e-2)
    train_prefix(tiny_model("llama"), tiny_tokenizer(), Indexed(rows), tmp_path / "recipe", settings, progress=False)


@pytest.mark.parametrize("unused", (True, False), ids=("columns of the model", "all columns"))
def test_a_collator_of_ones_own_gets_what_is_no_text(unused, tmp_path):
    """Rows of text too where all columns are kept: what stands beside the text, such as an image, is for the collator."""

    def collate(rows):
        seen.extend(rows)
        return PromptCompletionCollator(tiny_tokenizer())([IDS for _ in rows])

    with_images, seen = [row | {"image": 1} for row in ROWS], []
    options = {"data_collator": collate, "processing_class": None}
    for rows in ([{"label": 1, "labels": 2}] * 4, [("a", "b")] * 4, *([] if unused else [with_images])):
        trainer = make_trainer(tmp_path, rows=rows, options=options, max_steps=1, remove_unused_columns=unused)
        for use, given in ((trainer.train, ()), (trainer.evaluate, (rows,)), (trainer.predict, (rows,))):
            seen.clear()
            use(*given)
            assert seen and all(row in rows for row in seen)
        trainer.detach()
    if unused:
        trainer = make_trainer(tmp_path, rows=with_images, options={"data_collator": collate})
        assert trainer.train_dataset == tokenize_rows(ROWS, tiny_tokenizer())


def test_embeddings_in_place_of_ids(tmp_path):
    model, examples = tiny_model("llama"), tokenize_rows(ROWS[:4], tiny_tokenizer())
    expected = trained(tmp_path / "ids", model, rows=examples)

    def embedded(examples):
        batch = PromptCompletionCollator(tiny_tokenizer())(examples)
        return {"inputs_embeds": model.get_input_embeddings()(batch.pop("input_ids")).detach(), **batch}

    got = trained(tmp_path / "embedded", model, rows=examples, options={"data_collator": embedded})
    assert losses(got) == pytest.approx(losses(expected), rel=1e-5)


def test_a_batch_without_any_target_trains_nothing(tmp_path):
    """Cut conversations leave such rows; the mean over no token would make everything NaN from there on."""
    lost, row = ({"input_ids": [5, 6, 7], "labels": labels} for labels in ([-100] * 3, [-100, 6, 7]))
    options = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 1, "logging_nan_inf_filter": False}
    trainer = trained(tmp_path, rows=[lost, row], max_steps=1, **options)
    start = make_trainer(tmp_path, rows=[row])
    assert losses(trainer) == [0.0]
    assert_prefixes_close(trainer.prefix, start.prefix, atol=0, rtol=0)
    start.detach()
    seen = losses(trained(tmp_path, rows=[lost, row], max_steps=4, **options))
    assert seen[0] == seen[2] == 0 < seen[3] < seen[1]


@pytest.mark.parametrize("rows", ([[5, 6], [5, 6, 7]], [[5, 6]] * 4), ids=str)
def test_tokenised_rows_without_any_target_are_refused(rows, tmp_path):
    rows = [{"input_ids": ids, "labels": [-100] * len(ids)} for ids in rows]
    with pytest.raises(ValueError, match="train_dataset: expected labels to learn from, got -100 for every token of every row"):
        make_trainer(tmp_path, rows=rows)
    with pytest.raises(ValueError, match="train_dataset: expected labels to learn from"):
        make_trainer(tmp_path, rows=[{name: torch.tensor(ids) for name, ids in row.items()} for row in rows])
    trainer = make_trainer(tmp_path)
    assert trainer.predict(rows).predictions.shape[0] == len(rows)
    trainer.detach()
    rows[-1]["labels"][-1] = 6
    make_trainer(tmp_path, rows=rows).detach()


def test_text_that_is_not_given_as_a_sequence_is_refused(tmp_path):
    """A stream of it, and a data set that is set later."""
    message = "examples: expected input_ids and labels, .* got no field that the model takes; text is tokenised in a sequence"
    later = make_trainer(tmp_path)
    later.train_dataset = ROWS
    later.detach()
    for trainer in (make_trainer(tmp_path, rows=Stream(ROWS)), later):
        with pytest.raises(ValueError, match=message):
            trainer.train()


def test_conversations_are_trained_on(tmp_path):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}" \
        "{% if add_generation_prompt %}assistant: {% endif %}"  # fmt: skip
    talks = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in ROWS[:4]
    ]
    trainer = trained(tmp_path, rows=talks, options={"processing_class": tiny_tokenizer(chat_template=template)})
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_rows_are_cut_to_the_positions_that_the_prefix_leaves(tmp_path):
    model = tiny_model("gpt2")
    rows = [{"prompt": "word " * 60, "completion": "abc"}, {"prompt": "x", "completion": "abc"}]

    def longest(max_length):
        options = {"max_length": max_length, "eval_dataset": rows}
        trainer = make_trainer(tmp_path, model, rows=rows, options=options, max_steps=1)
        trainer.train()
        trainer.detach()
        lengths = [[len(example["input_ids"]) for example in data] for data in (trainer.train_dataset, trainer.eval_dataset)]
        assert lengths[0] == lengths[1]
        return max(lengths[0])

    left = model.config.n_positions - PREFIX_LEN
    assert [longest(max_length) for max_length in (None, 1000, 20)] == [left, left, 20]
    with pytest.raises(ValueError, match=r"train_dataset: rows\[0\]: max_length: expected .*, got 4"):
        longest(4)
