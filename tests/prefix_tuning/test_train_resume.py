"""Checkpoints of PrefixTrainer: a run that was interrupted goes on as if it never was, the best prefix is kept."""

import copy
import random
import shutil

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from prefix_tuning import Prefix
from prefix_tuning.checkpoints import load_checkpoint
from prefix_tuning.data import tokenize_rows
from support.models import tiny_model
from support.prefixes import mlp_prefix
from support.tokenizer import tiny_tokenizer
from support.training import (
    PREFIX_LEN,
    ROWS,
    assert_prefixes_equal,
    count_forwards,
    losses,
    make_trainer,
    trained,
)


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


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path):
    """Killed while it saved: the prefix of step 6 is there, the state of the run is not."""
    whole = trained(tmp_path, **RESUMED)
    for path in tmp_path.glob("checkpoint-*/trainer_state.json"):
        if path.parent.name != "checkpoint-3":
            path.unlink()
    (tmp_path / "checkpoint-7" / "prefix_config.json").unlink()
    resumed = make_trainer(tmp_path, **RESUMED)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert_prefixes_equal(resumed.prefix, whole.prefix)
    (tmp_path / "none" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(ValueError, match="resume_from_checkpoint: expected a whole checkpoint, got none in .*none"):
        make_trainer(tmp_path / "none").train(resume_from_checkpoint=True)


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


def test_resuming_a_finished_run_on_a_stream_ends(tmp_path):
    """A stream has no length, so that Trainer counts no epochs."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from tokenize_rows(ROWS, tiny_tokenizer())

    class Epochs(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            assert not begun, "one epoch after the other"
            begun.append(state.global_step)

    begun = []
    whole = trained(tmp_path, rows=Stream(), **RESUMED)
    resumed = make_trainer(tmp_path, rows=Stream(), options={"callbacks": [Epochs()]}, **RESUMED)
    resumed.train(resume_from_checkpoint=True)
    assert begun == [7] and losses(resumed) == losses(whole)


def test_only_what_is_named_by_its_step_is_a_checkpoint(tmp_path):
    whole = trained(tmp_path, **RESUMED)
    (tmp_path / "checkpoint-3").rename(tmp_path / "checkpoint-best")
    for name in ("checkpoint-6", "checkpoint-7"):
        shutil.rmtree(tmp_path / name)
    resumed = make_trainer(tmp_path, **RESUMED)
    with pytest.raises(ValueError, match="resume_from_checkpoint: expected a whole checkpoint, got none in"):
        resumed.train(resume_from_checkpoint=True)
    shutil.copytree(tmp_path / "checkpoint-best", tmp_path / "checkpoint-3")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)


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
        (
            {"reparametrization": "mlp", "hidden_size": 8},
            r"expected a prefix with a reparametrisation.*, got one without in \S+checkpoint-2",
        ),
        ({"prefix_len": 6}, r"prefix_len: expected 6 .*, got 5 in \S+checkpoint-2"),
        ({"offset": 0}, r"position_offset: expected 0 .*, got 5 in \S+checkpoint-2"),
        ({"layers": 2}, r"decoder.2: expected no such tensor .*, got \[2, 5, 16\] in \S+checkpoint-2"),
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


def test_what_is_no_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="^resume_from_checkpoint: expected a folder, got latest$"):
        load_checkpoint(Prefix.for_model(tiny_model("llama"), PREFIX_LEN), "latest")


def test_a_checkpoint_of_another_model_is_told(tmp_path, caplog):
    prefix = Prefix.for_model(tiny_model("llama"), PREFIX_LEN)
    for name, told in (("some/model", False), ("a/model", False), ("some/other", True)):
        prefix.base_model = name
        prefix.save(tmp_path)
        prefix.base_model = "/models/model"
        caplog.clear()
        load_checkpoint(prefix, str(tmp_path))
        assert ("was trained for the model some/other, this one is for /models/model" in caplog.text) == told


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
