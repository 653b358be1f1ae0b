"""PrefixTrainer trains the prefix alone, as a plain loop would, and keeps what Trainer promises around the step."""

import copy
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, EarlyStoppingCallback, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from prefix_tuning import Prefix, PrefixTrainer, attach_prefix
from prefix_tuning.data import PromptCompletionCollator, tokenize_rows
from support.models import FAMILIES, random_prefix, tiny_model
from support.tokenizer import tiny_tokenizer
from support.training import CHECKPOINTING, ROWS, arguments, losses, silent_trainer

# All versions of transformers take the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")

PREFIX_LEN = 5
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def make_trainer(folder, model=None, prefix=None, rows=ROWS, options=None, **changes):
    """A silent trainer on the rows; `changes` go to TrainingArguments, `options` to PrefixTrainer."""
    model = tiny_model("llama") if model is None else model
    prefix = random_prefix(model, PREFIX_LEN) if prefix is None else prefix
    return silent_trainer(folder, model, prefix, rows, options, **changes)


def trained(folder, *args, **kwargs):
    trainer = make_trainer(folder, *args, **kwargs)
    trainer.train()
    trainer.detach()
    return trainer


def mlp_prefix(model, seed=0, **changes):
    return Prefix.for_model(model, PREFIX_LEN, reparametrization="mlp", hidden_size=8, seed=seed, **changes)


def assert_prefixes_close(actual, expected, **tolerance):
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in actual.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], **tolerance or TOLERANCE)


def assert_prefixes_equal(actual, expected):
    assert_prefixes_close(actual, expected, atol=0, rtol=0)


class Interrupt(TrainerCallback):
    """Ends training after `step` as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Draws(TrainerCallback):
    """Uses up random numbers at every step, and keeps them."""

    def __init__(self):
        self.seen = {}

    def on_step_end(self, args, state, control, **kwargs):
        self.seen[state.global_step] = (torch.rand(()).item(), random.random(), float(np.random.rand()))


@pytest.mark.parametrize("reparametrization", (None, "mlp"))
@pytest.mark.parametrize("family", (*FAMILIES, "bloom", "deepseek_v2", "qwen3_next"))
def test_the_prefix_alone_is_trained(family, reparametrization, tmp_path):
    model = tiny_model(family)
    prefix = Prefix.for_model(model, PREFIX_LEN, reparametrization=reparametrization, hidden_size=8, seed=0)
    before = copy.deepcopy(prefix)
    modes = []

    class Modes(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            modes.append(({m.training for m in model.modules()}, {m.training for m in prefix.modules()}))
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prefix.parameters())
            assert all(p.grad is None for p in model.parameters())

    trained(tmp_path, model, prefix, options={"callbacks": [Modes()]}, weight_decay=0.1)
    assert modes == [({False}, {True})] * 4
    for (name, parameter), untouched in zip(model.state_dict().items(), tiny_model(family).state_dict().values(), strict=True):
        assert torch.equal(parameter, untouched), name
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for (name, parameter), old in zip(prefix.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(parameter, old), name


def row_loss(model, prefix, tokenizer, row):
    """Summed loss of the completion and the number of its tokens, by the plain model with the prefix as its cache."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    target = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor([prompt + target])
    cache = DynamicCache(config=model.config)
    for index, (key, value) in enumerate(prefix.layers()):
        cache.update(key[None], value[None], index)
    logits = model(
        input_ids=ids, attention_mask=torch.ones(1, PREFIX_LEN + ids.shape[1], dtype=torch.long), past_key_values=cache,
        position_ids=torch.arange(ids.shape[1])[None] + PREFIX_LEN,
    ).logits  # fmt: skip
    return cross_entropy(logits[0, len(prompt) - 1 : -1], torch.tensor(target), reduction="sum"), len(target)


def train_by_hand(model, prefix, rows, steps, rate, *, warmup, weight_decay, max_grad_norm):
    """The losses of full-batch steps of torch's AdamW on the prefix, with a linear schedule; biases never decay."""
    tokenizer, seen = tiny_tokenizer(), []
    biases = [parameter for name, parameter in prefix.named_parameters() if name.endswith("bias")]
    others = [parameter for name, parameter in prefix.named_parameters() if not name.endswith("bias")]
    optimizer = torch.optim.AdamW([{"params": others, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (step / warmup if step < warmup else (steps - step) / (steps - warmup))
        sums, counts = zip(*(row_loss(model, prefix, tokenizer, row) for row in rows), strict=True)
        loss = sum(sums) / sum(counts)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(prefix.parameters(), max_grad_norm)
        optimizer.step()
        seen.append(loss.item())
    return seen


@pytest.mark.parametrize("reparametrization", (None, "mlp"))
@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_equals_a_loop_by_hand(family, reparametrization, tmp_path):
    """Padding, the loss on targets alone, the optimiser, the schedule and clipping, over six steps."""
    model, steps = tiny_model(family, max_position_embeddings=256), 6
    prefix = random_prefix(model, PREFIX_LEN) if reparametrization is None else mlp_prefix(model)
    by_hand, start = copy.deepcopy(prefix), copy.deepcopy(prefix)
    settings = {"weight_decay": 0.1, "max_grad_norm": 0.5}
    expected = train_by_hand(model, by_hand, ROWS[:4], steps, 1e-2, warmup=2, **settings)
    trainer = trained(tmp_path, model, prefix, ROWS[:4], max_steps=steps, warmup_steps=2, **settings)
    torch.testing.assert_close(torch.tensor(losses(trainer)), torch.tensor(expected), **TOLERANCE)
    assert_prefixes_close(prefix, by_hand, atol=2e-4, rtol=1e-3)
    moved = max((a - b).abs().max() for a, b in zip(prefix.parameters(), start.parameters(), strict=True))
    assert moved > 0.01, "too little to see a difference"


DROPOUT = {
    "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}, "llama": {"attention_dropout": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", (False, True), ids=("stored", "recomputed"))
@pytest.mark.parametrize("family", DROPOUT)
def test_no_dropout(family, checkpointing, tmp_path, recwarn):
    prefixes = []
    for dropout in ({name: 0.0 for name in DROPOUT[family]}, DROPOUT[family]):
        trainer = trained(tmp_path, tiny_model(family, **dropout), max_steps=2, **{CHECKPOINTING: checkpointing})
        prefixes.append(trainer.prefix)
    assert_prefixes_equal(*prefixes)
    assert not [warning for warning in recwarn if "dropout" in str(warning.message)]


def count_forwards(model):
    """How often each layer has begun to run, updated as it does; recomputation ends as early as it can."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    counts = [0] * len(layers)

    def count(index):
        def hook(module, args):
            counts[index] += 1

        return hook

    for index, layer in enumerate(layers):
        next(layer.children()).register_forward_pre_hook(count(index))
    return counts


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({CHECKPOINTING: False}, [2, 2, 2]),
        ({CHECKPOINTING: True}, [4, 4, 4]),
        ({CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False, "preserve_rng_state": False}}, [4, 4, 4]),
        ({CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"every_n_layers": 2}}, [4, 2, 4]),
    ],
    ids=("stored", "recomputed", "options", "every second layer"),
)
@pytest.mark.parametrize(("family", "reparametrization"), [("gpt2", None), ("llama", "mlp")])
def test_gradient_checkpointing_recomputes_layers_and_changes_nothing(family, reparametrization, options, expected, tmp_path):
    model = tiny_model(family)
    prefix = random_prefix(model, PREFIX_LEN) if reparametrization is None else mlp_prefix(model)
    plain = trained(tmp_path, model, copy.deepcopy(prefix), max_steps=2)
    counts = count_forwards(model)
    trainer = trained(tmp_path, model, prefix, max_steps=2, **options)
    assert counts == expected
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-6)
    assert_prefixes_close(trainer.prefix, plain.prefix, atol=1e-6, rtol=1e-5)


def test_detach_undoes_gradient_checkpointing(tmp_path):
    model = tiny_model("llama")
    layers = model.base_model.layers
    layers[1].gradient_checkpointing = False  # an own attribute, to be found again; the others have their class's
    before = [vars(layer).copy() for layer in layers]
    trainer = make_trainer(tmp_path, model, max_steps=1, **{CHECKPOINTING: True})
    trainer.train()
    trainer.train()
    assert all(layer.gradient_checkpointing for layer in layers)
    trainer.detach()
    trainer.detach()
    assert [vars(layer) for layer in layers] == before
    counts = count_forwards(model)
    ids = torch.ones(1, 4, dtype=torch.long)
    with attach_prefix(model, trainer.prefix):
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert counts == [1, 1, 1]


def test_evaluation_recomputes_nothing(tmp_path):
    model = tiny_model("llama")
    trainer = make_trainer(tmp_path, model, max_steps=1, options={"eval_dataset": ROWS[:4]}, **{CHECKPOINTING: True})
    trainer.train()
    counts = count_forwards(model)
    trainer.evaluate()
    assert counts == [1, 1, 1]
    assert not any(module.training for module in trainer.model.modules())


@pytest.mark.parametrize("reparametrization", (None, "mlp"))
def test_accumulation_equals_a_bigger_batch(reparametrization, tmp_path):
    """Rows have 15 to 60 target tokens, so a mean of means would show."""
    model = tiny_model("llama")
    prefix = random_prefix(model, PREFIX_LEN) if reparametrization is None else mlp_prefix(model)
    whole, parts = copy.deepcopy(prefix), prefix
    expected = trained(tmp_path, model, whole, ROWS[:4])
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert losses(trained(tmp_path, model, parts, ROWS[:4], **split)) == pytest.approx(losses(expected), rel=1e-5)
    assert_prefixes_close(parts, whole, atol=2e-4, rtol=1e-3)


RESUMED = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3, "warmup_steps": 2, "per_device_train_batch_size": 2}


@pytest.mark.parametrize("reparametrization", (None, "mlp"))
def test_resuming_equals_an_uninterrupted_run(reparametrization, tmp_path):
    """Bitwise, with the optimiser's moments, the schedule, the order of the rows in both epochs and all random numbers."""

    def start(folder, callbacks, seed=0):
        model = tiny_model("llama")
        prefix = Prefix.for_model(model, PREFIX_LEN, reparametrization=reparametrization, hidden_size=8, seed=seed)
        return make_trainer(tmp_path / folder, model, prefix, options={"callbacks": callbacks}, **RESUMED)

    draws, drawn_again = Draws(), Draws()
    whole = start("whole", [draws])
    whole.train()
    interrupted = start("cut", [Draws(), Interrupt(5)])
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    resumed = start("cut", [drawn_again], seed=1)
    resumed.train(resume_from_checkpoint=True)
    assert sorted(drawn_again.seen) == [4, 5, 6, 7]
    assert drawn_again.seen.items() <= draws.seen.items()
    assert losses(resumed) == losses(whole)
    rates = [[entry.get("learning_rate") for entry in run.state.log_history] for run in (resumed, whole)]
    assert rates[0] == rates[1]
    assert_prefixes_equal(resumed.prefix, whole.prefix)


def test_resuming_a_finished_run_trains_nothing(tmp_path):
    """Seven steps of two rows are not whole epochs, where Trainer itself would take an eighth step."""
    whole = trained(tmp_path, **RESUMED)
    resumed = make_trainer(tmp_path, **RESUMED)
    counts = count_forwards(resumed.model.model)
    resumed.train(resume_from_checkpoint=True)
    assert counts == [0, 0, 0] and resumed.state.global_step == 7
    assert losses(resumed) == losses(whole)
    assert_prefixes_equal(resumed.prefix, whole.prefix)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6", "checkpoint-7"}


def test_checkpoints_keep_the_reparametrisation_and_save_model_drops_it(tmp_path):
    model = tiny_model("llama")
    trainer = make_trainer(tmp_path, model, mlp_prefix(model), max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "prefix"))
    trainer.save_model()
    kept = Prefix.load(tmp_path / "checkpoint-2")
    assert_prefixes_equal(kept, trainer.prefix)
    assert not list((tmp_path / "checkpoint-2").glob("*model*")), "the model itself was saved"
    for folder in (tmp_path / "prefix", tmp_path):
        saved = Prefix.load(folder)
        assert saved.reparametrization is None
        for (key, value), (expected_key, expected_value) in zip(saved.layers(), trainer.prefix.layers(), strict=True):
            assert torch.equal(key, expected_key) and torch.equal(value, expected_value)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"reparametrization": "mlp", "hidden_size": 8}, "trained with a reparametrisation.*saved without"),
        ({"prefix_len": 6}, r"prefix_len is 5 in \S+checkpoint-2, expected 6"),
        ({"offset": 0}, r"position_offset is 5 in \S+checkpoint-2, expected 0"),
        ({"layers": 2}, r"decoder.2 is \[2, 5, 16\] in \S+checkpoint-2, expected no such tensor"),
    ],
    ids=("reparametrisation", "prefix_len", "position_offset", "layers"),
)
def test_resuming_with_another_prefix_is_refused_in_one_line(other, message, tmp_path):
    trained(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    model = tiny_model("llama", num_hidden_layers=other.pop("layers", 3))
    offset = other.pop("offset", None)
    prefix = Prefix.for_model(model, other.pop("prefix_len", PREFIX_LEN), **other)
    prefix.position_offset = prefix.prefix_len if offset is None else offset
    start = copy.deepcopy(prefix)
    trainer = make_trainer(tmp_path, model, prefix)
    with pytest.raises(ValueError, match=f"^resume_from_checkpoint: .*{message}.*$") as error:
        trainer.train(resume_from_checkpoint=True)
    assert "\n" not in str(error.value)
    assert_prefixes_equal(prefix, start)


def test_early_stopping_and_the_best_prefix(tmp_path):
    """Learning to write one letter makes another less likely in the end: the evaluation loss rises long before step 40."""
    rows, contrary = ([row | {"completion": letter * 20} for row in ROWS[:4]] for letter in "aZ")
    evaluations = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    keep_best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    model = tiny_model("llama")
    trainer = make_trainer(
        tmp_path, model, mlp_prefix(model), rows, max_steps=40, learning_rate=0.1, **evaluations, **keep_best,
        options={"eval_dataset": contrary, "callbacks": [EarlyStoppingCallback(2)]},
    )  # fmt: skip
    trainer.train()
    seen = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = seen.index(min(seen))
    assert len(seen) == best + 3 and trainer.state.global_step == 2 * len(seen) < 40
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{2 * (best + 1)}")
    assert_prefixes_equal(trainer.prefix, Prefix.load(trainer.state.best_model_checkpoint))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(seen[best], rel=1e-6)


def test_bfloat16_autocast_leaves_the_prefix_in_float32(tmp_path):
    model = tiny_model("llama")
    dtypes = set()
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    trainer = trained(tmp_path, model, bf16=True)
    assert dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.prefix.parameters()} == {torch.float32}
    exact = trained(tmp_path)
    assert losses(trainer) == pytest.approx(losses(exact), rel=0.05)
    assert losses(trainer) != losses(exact)


@pytest.mark.parametrize("reparametrization", (None, "mlp"))
def test_a_model_in_bfloat16(reparametrization, tmp_path):
    model = tiny_model("llama").bfloat16()
    prefix = Prefix.for_model(model, PREFIX_LEN, reparametrization=reparametrization, hidden_size=8, seed=0)
    trainer = trained(tmp_path, model, prefix, ROWS[:4])
    assert {parameter.dtype for parameter in prefix.parameters()} == {torch.float32}
    assert losses(trainer)[-1] < losses(trainer)[0]


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
    with pytest.raises(ValueError, match=r"train_dataset: rows\[0\]: max_length: .*got max_length 4"):
        longest(4)


def test_backend_and_window_reach_the_attention(tmp_path, monkeypatch):
    import prefix_tuning.attention

    called, original = [], prefix_tuning.attention.prefix_attention

    def spy(*args, **kwargs):
        called.append((kwargs["backend"], kwargs["first_key_position"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(prefix_tuning.attention, "prefix_attention", spy)
    trained(tmp_path, tiny_model("mistral"), max_steps=1)
    assert set(called) == {(None, None)}
    called.clear()
    trained(tmp_path, tiny_model("mistral"), max_steps=1, options={"backend": "reference", "prefix_window": "peft"})
    assert set(called) == {("reference", 0)}


def test_a_loss_function_of_the_callers(tmp_path):
    def double(outputs, labels, num_items_in_batch):
        logits = outputs["logits"][:, :-1].flatten(0, 1)
        return 2 * cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    expected = losses(trained(tmp_path, max_steps=1))
    assert losses(trained(tmp_path, max_steps=1, options={"compute_loss_func": double})) == pytest.approx([2 * expected[0]])


def test_detach_gives_back_the_plain_model(tmp_path):
    model = tiny_model("llama")
    config, ids = model.config, torch.randint(3, 100, (2, 7))
    plain = model(input_ids=ids).logits
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    assert not torch.equal(model(input_ids=ids).logits, plain)
    trainer.detach()
    assert torch.equal(model(input_ids=ids).logits, plain)
    assert model.config is config and not any(hasattr(module, "layer_prefix") for module in model.modules())


REFUSED = {
    "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0, "use_liger_kernel": True, "bf16_full_eval": True,
    "fp16_full_eval": True, "fsdp": "full_shard", "deepspeed": {"stage": 2}, "push_to_hub": True,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_for_the_frozen_model_are_refused(name, tmp_path):
    model, args = tiny_model("llama"), arguments(tmp_path)
    setattr(args, name, REFUSED[name])
    with pytest.raises(NotImplementedError, match=f"args: {name} is not served"):
        PrefixTrainer(model, random_prefix(model), args, train_dataset=ROWS, processing_class=tiny_tokenizer())


OTHERS = {
    "no tokenizer": ({"processing_class": None}, ValueError, "processing_class: expected the tokenizer, or a data_coll"),
    "rows without tokenizer": (
        {"processing_class": None, "data_collator": len}, ValueError, "processing_class: expected the tokenizer, which rows"
    ),
    "model_init": ({"model_init": lambda: None}, TypeError, "model_init: expected a model and a prefix"),
    "no rows": ({"rows": []}, ValueError, "train_dataset: expected at least one row"),
    "no rows to evaluate": ({"eval_dataset": {"a": []}}, ValueError, r"eval_dataset\['a'\]: expected at least one row"),
    "a bad row": ({"rows": [*ROWS, {"text": "?"}]}, ValueError, r"train_dataset: rows\[8\]: expected an object"),
    "no prefix": ({"prefix": "prefix"}, TypeError, "prefix: expected a Prefix, got str"),
    "a frozen prefix": ({"frozen": True}, ValueError, "prefix: none of its parameters requires a gradient"),
    "a long prefix": ({"length": 128}, ValueError, "prefix: it takes 128 of the model's 128 positions"),
    "max_length": ({"max_length": 0}, ValueError, "max_length: expected at least 1, got 0"),
    "prefix_window": ({"prefix_window": "x"}, ValueError, "prefix_window: expected 'pinned' or 'peft'"),
    "Trainer's own": ({"eval_strategy": "steps"}, ValueError, "eval_dataset"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_failing_constructor_leaves_the_model_detached(name, tmp_path):
    options, error, message = OTHERS[name]
    options = dict(options)
    model = tiny_model("llama")
    config = model.config
    prefix = options.pop("prefix", None) or random_prefix(model, options.pop("length", PREFIX_LEN))
    if options.pop("frozen", False):
        prefix.requires_grad_(False)
    rows, args = options.pop("rows", ROWS), {key: options.pop(key) for key in ("eval_strategy",) if key in options}
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, model, prefix, rows, options=options, **args)
    assert model.config is config and not any(hasattr(module, "layer_prefix") for module in model.modules())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"use_reentrant": True}, ValueError, "use_reentrant: expected False"),
        ({"every_n_layers": 0}, ValueError, "every_n_layers: expected at least 1, got 0"),
        ({"offload": True}, NotImplementedError, "offload"),
    ],
)
def test_kinds_of_checkpointing_that_are_refused(options, error, message, tmp_path):
    trainer = make_trainer(tmp_path, **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": options})
    with pytest.raises(error, match=message):
        trainer.train()


def test_uploading_is_left_to_the_prefix(tmp_path):
    with pytest.raises(NotImplementedError, match="prefix.push_to_hub"):
        make_trainer(tmp_path).push_to_hub()


def test_several_gpus_in_one_process(tmp_path, caplog):
    """One is used, with a warning; the caller's arguments stay as they are."""
    model, args = tiny_model("llama"), arguments(tmp_path)
    args._n_gpu = 2
    before = vars(args).copy()
    trainer = PrefixTrainer(model, random_prefix(model), args, train_dataset=ROWS, processing_class=tiny_tokenizer())
    assert "2 GPUs are visible and one is used; start one process for each with torchrun" in caplog.text
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == 4
    assert vars(args) == before


def test_default_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama")
    trainer = PrefixTrainer(model, random_prefix(model), processing_class=tiny_tokenizer())
    assert Path(trainer.args.output_dir).name == "prefix-trainer"


DDP = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainingArguments
from prefix_tuning import Prefix, PrefixTrainer

folder, checkpointing = sys.argv[1:]
rows = json.load(open(f"{folder}/rows.json"))
args = TrainingArguments(
    f"{folder}/run", max_steps=3, per_device_train_batch_size=1, per_device_eval_batch_size=2, gradient_accumulation_steps=2,
    learning_rate=1e-2, logging_steps=1, save_strategy="steps", save_steps=3, report_to="none", use_cpu=True,
    ddp_backend="gloo", disable_tqdm=True, dataloader_pin_memory=False, **{checkpointing: True},
)
trainer = PrefixTrainer(
    AutoModelForCausalLM.from_pretrained(f"{folder}/model"), Prefix.load(f"{folder}/prefix"), args, train_dataset=rows,
    eval_dataset=rows, processing_class=AutoTokenizer.from_pretrained(f"{folder}/model"),
)
trainer.remove_callback(PrinterCallback)
trainer.train()
loss = trainer.evaluate()["eval_loss"]
trainer.prefix.save(f"{folder}/trained{trainer.args.process_index}", keep_reparametrization=True)
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
wrapped = trainer.model_wrapped
result = {
    "processes": trainer.args.world_size, "wrapped": type(wrapped).__name__, "losses": losses, "eval_loss": loss,
    "extra work": [wrapped.find_unused_parameters, wrapped.broadcast_buffers],
}
json.dump(result, open(f"{folder}/result{trainer.args.process_index}.json", "w"))
"""


def test_two_processes_equal_one_with_their_batches_together(tmp_path):
    """Two gloo processes with two accumulated batches of one row each, with gradient checkpointing and an MLP."""
    model = tiny_model("llama")
    prefix = mlp_prefix(model)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    prefix.save(tmp_path / "prefix", keep_reparametrization=True)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:4]))
    (tmp_path / "script.py").write_text(DDP)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, tmp_path / "script.py", tmp_path, CHECKPOINTING], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)

    one = trained(tmp_path / "one", model, prefix, ROWS[:4], max_steps=3, options={"eval_dataset": ROWS[:4]})
    with attach_prefix(model, prefix):
        eval_loss = one.evaluate()["eval_loss"]
    for rank in range(2):
        result = json.loads((tmp_path / f"result{rank}.json").read_text())
        assert result["processes"] == 2 and result["wrapped"] == "DistributedDataParallel"
        assert result["extra work"] == [False, False], "of searching for unused parameters, of sending the frozen buffers"
        assert result["losses"] == pytest.approx(losses(one), rel=1e-5)
        assert result["eval_loss"] == pytest.approx(eval_loss, rel=1e-5)
        assert_prefixes_close(Prefix.load(tmp_path / f"trained{rank}"), prefix, atol=2e-4, rtol=1e-3)
    assert_prefixes_equal(Prefix.load(tmp_path / "run" / "checkpoint-3"), Prefix.load(tmp_path / "trained0"))
