"""PrefixTrainer: only the prefix learns, exactly as a plain loop would teach it, and everything around the step works."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import EarlyStoppingCallback, TrainingArguments

import prefix_kernels
import prefix_tuning.attach
from prefix_tuning import Prefix, PrefixTrainer, attach_prefix
from prefix_tuning.data import PromptCompletionCollator, tokenize_rows
from support.models import random_prefix, tiny_model
from support.tokenizer import tiny_tokenizer

ROWS = [
    {"prompt": "name : Aromi\n", "completion": "Aromi."},
    {"prompt": "name : Browns | area : riverside\n", "completion": "Browns is a pub by the river."},
    {"prompt": "name : Cotto\n", "completion": "There is a place, Cotto, that serves tea."},
    {"prompt": "food : Thai\n", "completion": "Thai."},
]
RECOMPUTE = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name))


def arguments(folder, **changes):
    options = {
        "max_steps": 3, "learning_rate": 0.1, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant",
        "report_to": "none", "save_strategy": "no", "logging_steps": 1, "use_cpu": True, "dataloader_pin_memory": False,
        "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
    return TrainingArguments(str(folder), **options | changes)


def make_trainer(folder, *, model=None, prefix=None, rows=ROWS, others=None, **changes):
    model = model or tiny_model("llama")
    prefix = prefix or random_prefix(model)
    return PrefixTrainer(
        model, prefix, arguments(folder, **changes), train_dataset=rows, processing_class=tiny_tokenizer(), **others or {}
    )


def mlp_prefix(model):
    return Prefix.for_model(model, 5, reparametrization="mlp", hidden_size=8, seed=0)


def values(prefix):
    return [tensor.detach().clone() for pair in prefix.layers() for tensor in pair]


def assert_equal(prefix, expected, **tolerance):
    for tensor, wanted in zip(values(prefix), expected, strict=True):
        torch.testing.assert_close(tensor, wanted, **tolerance)


def batch():
    return PromptCompletionCollator(tiny_tokenizer())(tokenize_rows(ROWS, tiny_tokenizer()))


def plain_loss(model, inputs):
    """Mean cross-entropy of the labelled tokens, from all logits."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("reparametrized", (False, True))
def test_equals_a_plain_loop(tmp_path, reparametrized):
    model = tiny_model("llama")
    prefix = mlp_prefix(model) if reparametrized else random_prefix(model)
    optimizer = torch.optim.AdamW(prefix.parameters(), lr=0.1, weight_decay=0.0)
    losses = []
    with attach_prefix(model, prefix):
        for _ in range(3):
            optimizer.zero_grad()
            loss = plain_loss(model, batch())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(prefix.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
    trained = mlp_prefix(model) if reparametrized else random_prefix(model)
    trainer = make_trainer(tmp_path, prefix=trained)
    trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == pytest.approx(losses, rel=1e-4)
    assert_equal(trained, values(prefix), atol=2e-3, rtol=1e-3)  # Adam's first steps turn rounding into steps of lr
    assert any((a - b).abs().max() > 0.05 for a, b in zip(values(trained), values(random_prefix(model)), strict=True))


def test_only_the_prefix_changes(tmp_path):
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prefix = random_prefix(model)
    start = values(prefix)
    trainer = make_trainer(tmp_path, model=model, prefix=prefix)
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert names and all(name.startswith("prefix.") for name in names)
    trainer.train()
    trainer.detach()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(torch.equal(old, new) for old, new in zip(start, values(prefix), strict=True))
    input_ids = batch()["input_ids"]
    torch.testing.assert_close(model(input_ids=input_ids).logits, tiny_model("llama")(input_ids=input_ids).logits)


@pytest.mark.parametrize("recompute", (False, True))
def test_no_dropout_even_when_layers_are_recomputed(tmp_path, recompute):
    dropout = {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
    with_dropout = tiny_model("gpt2", **dropout)
    prefix, expected = random_prefix(with_dropout), random_prefix(with_dropout)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_trainer(tmp_path, model=with_dropout, prefix=prefix, **{RECOMPUTE: recompute}).train()
    make_trainer(tmp_path, model=tiny_model("gpt2", **dict.fromkeys(dropout, 0.0)), prefix=expected).train()
    assert_equal(prefix, values(expected), atol=1e-4, rtol=1e-4)
    assert not any(module.training for module in with_dropout.modules())


@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_layers_are_recomputed_and_nothing_else_changes(tmp_path, monkeypatch, family):
    calls, original = [], prefix_tuning.attach.prefix_attention
    monkeypatch.setattr(prefix_tuning.attach, "prefix_attention", lambda *a, **k: calls.append(1) or original(*a, **k))
    results = []
    for recompute in (False, True):
        model = tiny_model(family)
        prefix = random_prefix(model)
        trainer = make_trainer(tmp_path, model=model, prefix=prefix, max_steps=2, **{RECOMPUTE: recompute})
        calls.clear()
        trainer.train()
        results.append((len(calls), values(prefix)))
        trainer.detach()
        layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        assert layers and not any(layer.gradient_checkpointing for layer in layers)
    assert results[1][0] == 2 * results[0][0] == 2 * 2 * 3
    assert_equal(prefix, results[0][1], atol=1e-4, rtol=1e-4)


def test_accumulated_steps_equal_one_big_batch(tmp_path):
    """Rows of unequal numbers of targets, so a mean of means would differ."""
    results = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        prefix = random_prefix(tiny_model("llama"))
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = make_trainer(tmp_path, prefix=prefix, optim="sgd", max_grad_norm=0.0, learning_rate=1.0, **changes)
        trainer.train()
        results.append(values(prefix))
    for other in results[1:]:
        for tensor, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(tensor, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reparametrized", (False, True))
def test_resumed_equals_uninterrupted(tmp_path, reparametrized):
    make = mlp_prefix if reparametrized else random_prefix
    changes = {
        "max_steps": 6, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3,
        "lr_scheduler_type": "linear",
    }  # fmt: skip
    whole = make_trainer(tmp_path, prefix=make(tiny_model("llama")), **changes)
    whole.train()
    again = make_trainer(tmp_path, prefix=make(tiny_model("llama")), **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 6
    for name, tensor in again.prefix.state_dict().items():
        assert torch.equal(tensor, whole.prefix.state_dict()[name]), name


def test_checkpoints_keep_the_mlp_and_save_model_drops_it(tmp_path):
    trainer = make_trainer(tmp_path, prefix=mlp_prefix(tiny_model("llama")), max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    kept, final = Prefix.load(tmp_path / "checkpoint-2"), Prefix.load(tmp_path / "final")
    assert kept.reparametrization is not None and final.reparametrization is None
    assert_equal(final, values(trainer.prefix))
    assert_equal(kept, values(trainer.prefix))
    assert not list((tmp_path / "checkpoint-2").glob("model*")), "the frozen model was saved"


def test_resuming_another_kind_of_prefix_is_refused(tmp_path):
    changes = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, prefix=mlp_prefix(tiny_model("llama")), **changes).train()
    for prefix, message in (
        (random_prefix(tiny_model("llama")), "without a reparametrisation"),
        (Prefix.for_model(tiny_model("llama"), 4, reparametrization="mlp", hidden_size=8), "expected 4"),
    ):
        with pytest.raises(ValueError, match=f"resume_from_checkpoint: .*{message}"):
            make_trainer(tmp_path, prefix=prefix, **changes).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_best_prefix_is_loaded_after_stopping_early(tmp_path):
    changes = {
        "max_steps": 30, "learning_rate": 3.0, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps",
        "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False,
    }  # fmt: skip
    others = {"eval_dataset": ROWS[:2], "callbacks": [EarlyStoppingCallback(2)]}
    trainer = make_trainer(tmp_path, others=others, **changes)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert trainer.state.global_step == best + 2 < 30
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert_equal(trainer.prefix, values(Prefix.load(tmp_path / f"checkpoint-{best}")))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


def test_bf16_autocast_leaves_the_prefix_in_float32(tmp_path):
    model = tiny_model("llama")
    exact, rounded = random_prefix(model), random_prefix(model)
    make_trainer(tmp_path, prefix=exact, max_steps=1, optim="sgd", learning_rate=1.0).train()
    trainer = make_trainer(tmp_path, prefix=rounded, max_steps=1, optim="sgd", learning_rate=1.0, bf16=True)
    trainer.train()
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.float32}
    difference = max((a - b).abs().max() for a, b in zip(values(exact), values(rounded), strict=True))
    assert 0 < difference < 0.05


def test_evaluation_with_and_without_predictions(tmp_path):
    shapes = []

    def compute_metrics(prediction):
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"rows": len(prediction.label_ids)}

    model = tiny_model("llama")
    prefix = random_prefix(model)
    with attach_prefix(model, prefix), torch.no_grad():
        expected = plain_loss(model, batch()).item()
    length = batch()["input_ids"].shape[1]
    trainer = make_trainer(
        tmp_path, prefix=prefix, others={"eval_dataset": {"all": ROWS, "two": ROWS[:2]}}, per_device_eval_batch_size=4
    )
    results = trainer.evaluate()
    assert results["eval_all_loss"] == pytest.approx(expected, rel=1e-5) and "eval_two_loss" in results
    trainer.compute_metrics = compute_metrics
    results = trainer.evaluate(trainer.eval_dataset["all"])
    assert results["eval_rows"] == 4 and results["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert shapes == [((4, length, 128), (4, length))]


SGD = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1}
TWO_PROCESSES = """
import sys
sys.path.insert(0, {tests!r})
import conftest
sys.path[0] = {here!r}
import test_train as t

changes = t.SGD | {{"per_device_train_batch_size": 2, "ddp_backend": "gloo"}}
trainer = t.make_trainer({folder!r}, prefix=t.mlp_prefix(t.tiny_model("llama")), **changes)
trainer.train()
trainer.save_model()
"""


def test_two_processes_equal_one(tmp_path):
    here = Path(__file__).resolve().parent
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES.format(tests=str(here.parent), here=str(here), folder=str(tmp_path / "two")))
    packages = [str(Path(package.__file__).resolve().parents[1]) for package in (prefix_kernels, prefix_tuning)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(packages)}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one = make_trainer(tmp_path / "one", prefix=mlp_prefix(tiny_model("llama")), **SGD)
    one.train()
    assert_equal(Prefix.load(tmp_path / "two"), values(one.prefix), atol=1e-4, rtol=1e-4)


def test_long_prompts_lose_their_beginning(tmp_path):
    rows = [{"prompt": "a b c d " * 40, "completion": "end"}]
    trainer = make_trainer(tmp_path, rows=rows)  # 128 positions, of which the prefix takes 5
    (example,) = trainer.train_dataset
    assert len(example["input_ids"]) == 123
    trainer.detach()
    (shorter,) = make_trainer(tmp_path, rows=rows, others={"max_length": 16}).train_dataset
    assert shorter["input_ids"] == example["input_ids"][-16:]


def test_tokenised_rows_are_taken_as_they_are(tmp_path):
    model = tiny_model("llama")
    results = []
    for rows in (ROWS, tokenize_rows(ROWS, tiny_tokenizer())):
        trainer = make_trainer(tmp_path, model=model, prefix=random_prefix(model), rows=rows)
        trainer.train()
        trainer.detach()
        results.append(values(trainer.prefix))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


REFUSED = {
    "label_smoothing_factor": ({"label_smoothing_factor": 0.1}, {}, NotImplementedError, "label_smoothing_factor"),
    "neftune": ({"neftune_noise_alpha": 1.0}, {}, NotImplementedError, "neftune_noise_alpha"),
    "model_init": ({}, {"model_init": lambda: None}, TypeError, "model_init"),
    "no tokenizer": ({}, {"processing_class": None}, ValueError, "processing_class: expected the tokenizer"),
    "window": ({}, {"prefix_window": "loose"}, ValueError, "prefix_window"),
    "row": ({}, {"train_dataset": [{"text": "a"}]}, ValueError, "prompt"),
    "long target": ({}, {"max_length": 3}, ValueError, r"rows\[0\]: max_length"),
    "reentrant": (
        {RECOMPUTE: True, f"{RECOMPUTE}_kwargs": {"use_reentrant": True}}, {}, ValueError, "use_reentrant: expected False"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_and_leaves_the_model_alone(tmp_path, name):
    changes, others, error, message = REFUSED[name]
    model = tiny_model("llama")
    options = {"train_dataset": ROWS, "processing_class": tiny_tokenizer()} | others
    with pytest.raises(error, match=message):
        PrefixTrainer(model, random_prefix(model), arguments(tmp_path, **changes), **options).train()
    if name != "reentrant":  # refused when training starts
        assert not hasattr(model.model.layers[0].self_attn, "layer_prefix")


def test_a_prefix_that_fills_every_position_is_refused(tmp_path):
    model = tiny_model("gpt2", n_positions=8)
    with pytest.raises(ValueError, match="8 of the model's 8 positions"):
        make_trainer(tmp_path, model=model, prefix=random_prefix(model, 8))


def test_state_is_written_for_trainers_own_tools(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and len([entry for entry in state["log_history"] if "loss" in entry]) == 2
