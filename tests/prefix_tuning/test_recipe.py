"""train_prefix: settings that complete each other, a run from rows to files and numbers, resuming, the progress bar."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import set_seed
from transformers.utils import logging

from prefix_kernels import available_backends
from prefix_tuning import Prefix, PrefixTrainer, attach_prefix, recipe
from prefix_tuning.evaluate import mean_loss
from prefix_tuning.recipe import TrainSettings, start_prefix, train_prefix, write_metrics
from support.models import tiny_model
from support.tokenizer import tiny_tokenizer

NAMES = ("Aromi", "Browns Cambridge", "Cotto", "Fitzbillies", "Green Man", "Loch Fyne", "Strada", "Wildwood")
ROWS = [{"prompt": f"name : {name}\n", "completion": f"{name} is a pub."} for name in NAMES]
KEYS = {
    "losses", "eval_losses", "seconds_per_step", "trainable_parameters", "trainable_share", "prefix_parameters", "backend",
    "steps", "settings",
}  # fmt: skip


def run(output, model=None, rows=ROWS, **changes):
    """train_prefix with small settings; (prefix, metrics). Options of its own among `changes` go to it."""
    options = {name: changes.pop(name) for name in ("eval_rows", "resume", "overwrite", "progress") if name in changes}
    defaults = {"prefix_len": 5, "hidden_size": 8, "steps": 4, "batch_size": 4}
    model = tiny_model("llama") if model is None else model
    return train_prefix(model, tiny_tokenizer(), rows, output, TrainSettings(**defaults | changes), **options)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("random", "mlp", 1e-3, None, 3.0)),
        ({"init_text": "words"}, ("text", "none", 3e-2, None, 3.0)),
        ({"init": "text", "init_text": "words"}, ("text", "none", 3e-2, None, 3.0)),
        ({"init_text": "words", "reparametrization": "mlp"}, ("text", "mlp", 1e-3, None, 3.0)),
        ({"reparametrization": "none"}, ("random", "none", 1e-3, None, 3.0)),
        ({"init": "random", "learning_rate": 0.5, "steps": 7}, ("random", "mlp", 0.5, 7, None)),
        ({"init_text": "words", "epochs": 0.5}, ("text", "none", 3e-2, None, 0.5)),
    ],
)
def test_settings_that_are_left_open(given, expected):
    settings = TrainSettings(**given).resolved()
    found = (settings.init, settings.reparametrization, settings.learning_rate, settings.steps, settings.epochs)
    assert found == expected
    assert settings.resolved() == settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 3, "epochs": 1.0}, r"steps: expected steps or epochs, got both \(3 and 1.0\)"),
        *(
            ({name: value}, f"{name}: expected at least 1, got {value}")
            for name in ("prefix_len", "hidden_size", "steps", "batch_size", "gradient_accumulation", "max_length")
            for value in (0, -1)
        ),
        *(({name: value}, f"{name}: expected more than 0, got {value}")
          for name in ("epochs", "learning_rate") for value in (0.0, -1.0)),
        *(({name: -1}, f"{name}: expected at least 0, got -1")
          for name in ("warmup", "save_steps", "patience", "weight_decay", "max_grad_norm")),
        ({"learning_rate": math.nan}, "learning_rate: expected more than 0, got nan"),
        *(({name: math.inf}, f"{name}: expected a finite number, got inf")
          for name in ("epochs", "learning_rate", "warmup", "weight_decay")),
        ({"init": "magic"}, "init: expected text or random, got 'magic'"),
        ({"reparametrization": "lstm"}, "reparametrization: expected mlp or none, got 'lstm'"),
        ({"init": "text"}, "init_text: expected the text"),
        ({"init": "random", "init_text": "words"}, "init_text: expected None beside init 'random', got 'words'"),
        ({"patience": 2}, "patience: expected save_steps .*, got 2 alone"),
        ({"report_to": "paper"}, "report_to: expected one of none, all.*got 'paper'"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_contradict_each_other(given, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**given).resolved()


def test_settings_are_numbers_of_pythons():
    """So that they can be written as JSON."""
    settings = TrainSettings(np.int64(5), batch_size=np.array(4), seed=np.uint8(3), learning_rate=np.float32(0.5), epochs=2)
    found = {
        name: getattr(settings.resolved(), name) for name in ("prefix_len", "batch_size", "seed", "learning_rate", "epochs")
    }
    assert json.dumps(found) == '{"prefix_len": 5, "batch_size": 4, "seed": 3, "learning_rate": 0.5, "epochs": 2.0}'
    for wrong, kind in (({"steps": 2.5}, "an int"), ({"batch_size": True}, "an int"), ({"learning_rate": "high"}, "a number")):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))}: expected {kind}, got"):
            TrainSettings(**wrong).resolved()


@pytest.mark.parametrize("init", ({"reparametrization": "mlp"}, {"init_text": "a pub"}, {"reparametrization": "none"}), ids=str)
def test_a_run(init, tmp_path):
    """The loss falls to the one that the saved prefix has; the numbers are those of model and prefix."""
    model = tiny_model("llama")
    prefix, metrics = run(tmp_path, model, ROWS[:4], steps=12, learning_rate=3e-2, eval_rows=ROWS[:4], **init)
    assert metrics.keys() == KEYS
    assert len(metrics["losses"]) == metrics["steps"] == 12
    assert metrics["losses"][-1] < metrics["losses"][0] - 0.1
    trained = sum(parameter.numel() for parameter in prefix.parameters())
    assert metrics["trainable_parameters"] == trained
    assert metrics["trainable_share"] == trained / (trained + sum(parameter.numel() for parameter in model.parameters()))
    assert metrics["prefix_parameters"] == 2 * 3 * 2 * 5 * 16  # keys and values, layers, kv heads, positions, head_dim
    assert 0 < metrics["seconds_per_step"] < 10
    assert metrics["backend"] == available_backends()[0]
    assert metrics["settings"] == dataclasses.asdict(
        TrainSettings(prefix_len=5, hidden_size=8, steps=12, batch_size=4, learning_rate=3e-2, **init).resolved()
    )
    assert not hasattr(model.model.layers[0].self_attn, "layer_prefix")
    assert {path.name for path in tmp_path.iterdir()} == {"prefix"}
    saved = Prefix.load(tmp_path / "prefix")
    assert saved.reparametrization is None
    with attach_prefix(model, saved):
        loss, _ = mean_loss(model, tiny_tokenizer(), ROWS[:4])
    assert metrics["eval_losses"] == [[12, pytest.approx(loss, rel=1e-5)]]
    with attach_prefix(model, prefix):
        assert mean_loss(model, tiny_tokenizer(), ROWS[:4])[0] == pytest.approx(loss, rel=1e-6)
    assert json.loads(json.dumps(metrics)) == metrics


def test_settings_reach_trainer_and_prefix(tmp_path, monkeypatch):
    made, arguments = {}, []
    for_model, train = Prefix.for_model, PrefixTrainer.train
    monkeypatch.setattr(Prefix, "for_model", lambda *args, **kwargs: made.update(kwargs) or for_model(*args, **kwargs))
    monkeypatch.setattr(PrefixTrainer, "train", lambda self, **kwargs: arguments.append(self) or train(self, **kwargs))
    settings = {
        "init_text": "a pub", "reparametrization": "mlp", "seed": 3, "steps": 2, "batch_size": 2, "gradient_accumulation": 3,
        "gradient_checkpointing": True, "warmup": 0.25, "weight_decay": 0.125, "max_grad_norm": 2.0, "max_length": 40,
        "backend": "reference", "learning_rate": 0.5,
    }  # fmt: skip
    _, metrics = run(tmp_path, **settings)
    expected = {"init": "text", "text": "a pub", "reparametrization": "mlp", "hidden_size": 8, "seed": 3}
    assert {name: made[name] for name in expected} == expected
    (trainer,) = arguments
    expected = {
        "max_steps": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "gradient_accumulation_steps": 3,
        "gradient_checkpointing": True, "warmup_steps": 0.25, "weight_decay": 0.125, "max_grad_norm": 2.0, "seed": 3,
        "learning_rate": 0.5, "report_to": [],
    }  # fmt: skip
    assert {name: getattr(trainer.args, name) for name in expected} == expected
    assert trainer.max_length == 40 and metrics["backend"] == "reference"


def test_the_same_seed_gives_the_same_run(tmp_path):
    runs = []
    for number, seed in enumerate((1, 1, 2)):
        set_seed(number)
        runs.append(run(tmp_path / str(number), seed=seed, batch_size=2)[1]["losses"])
    assert runs[0] == runs[1] != runs[2]


def test_epochs(tmp_path):
    assert run(tmp_path / "one", steps=None, epochs=1.5)[1]["steps"] == 3
    assert run(tmp_path / "three", steps=None)[1]["steps"] == 6


# Learning to write one letter makes another ever less likely: the evaluation loss is lowest at the beginning.
OPPOSED = {
    "rows": [row | {"completion": "a" * 20} for row in ROWS], "eval_rows": [row | {"completion": "Z" * 20} for row in ROWS],
    "learning_rate": 0.1,
}  # fmt: skip
SAVING = {"steps": 5, "save_steps": 2, "eval_rows": ROWS[4:], "batch_size": 2}


def test_evaluations_and_the_best_prefix(tmp_path):
    """Every other step and the last is evaluated; what is kept, returned and saved, is the best of them."""
    prefix, metrics = run(tmp_path, **SAVING | OPPOSED)
    steps, evaluated = zip(*metrics["eval_losses"], strict=True)
    assert steps == (2, 4, 5) and min(evaluated) == evaluated[0]
    best = Prefix.load(tmp_path / "checkpoint-2")
    for found in (prefix, Prefix.load(tmp_path / "prefix")):
        for pair, expected in zip(found.layers(), best.layers(), strict=True):
            assert all(map(torch.equal, pair, expected))


@pytest.mark.parametrize("patience", (1, 2))
def test_patience_ends_the_run(patience, tmp_path):
    _, metrics = run(tmp_path, patience=patience, **SAVING | OPPOSED | {"steps": 40})
    assert len(metrics["eval_losses"]) == 1 + patience
    assert len(metrics["losses"]) == metrics["steps"] == 2 * (1 + patience)


def test_resuming(tmp_path, monkeypatch):
    """An interrupted run goes on to the same end, in the same words; a finished one is left as it is."""
    whole_prefix, whole = run(tmp_path / "whole", **SAVING)
    step_end = recipe.StepClock.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    model = tiny_model("llama")
    with monkeypatch.context() as patch:
        patch.setattr(recipe.StepClock, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", model, **SAVING)
    assert not hasattr(model.model.layers[0].self_attn, "layer_prefix"), "an interrupted run leaves the prefix attached"
    assert not (tmp_path / "cut" / "prefix").exists()
    for timed in (True, False):
        prefix, metrics = run(tmp_path / "cut", model, resume=True, **SAVING)
        assert math.isfinite(metrics["seconds_per_step"]) == timed
        same = KEYS - {"seconds_per_step"}
        assert {name: metrics[name] for name in same} == {name: whole[name] for name in same}
        for tensor, expected in zip(prefix.parameters(), whole_prefix.parameters(), strict=True):
            assert torch.equal(tensor, expected)


@pytest.mark.parametrize(
    "changes", [{}, SAVING, SAVING | {"gradient_accumulation": 2, "steps": 9}], ids=("", "saved", "batches")
)
def test_losses_that_are_logged_together(changes, tmp_path, monkeypatch):
    """As on a GPU, where the host waits for what is logged: one for each step all the same, also where a step saves."""
    _, expected = run(tmp_path / "each", **changes)
    steps_end, made = recipe.StepClock.on_step_end, recipe._arguments
    monkeypatch.setattr(recipe, "_arguments", lambda *args, **options: set_logging(made(*args, **options), 5))

    def set_logging(arguments, steps):
        arguments.logging_steps = steps
        return arguments

    def check(name, **options):
        _, metrics = run(tmp_path / name, **changes, **options)
        torch.testing.assert_close(torch.tensor(metrics["losses"]), torch.tensor(expected["losses"]), atol=1e-4, rtol=0)
        assert len(metrics["losses"]) == metrics["steps"] and metrics["eval_losses"] == expected["eval_losses"]

    check("together")
    if "save_steps" in changes:

        def interrupt(self, args, state, control, **kwargs):
            steps_end(self, args, state, control, **kwargs)
            if state.global_step == changes["save_steps"] + 1:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(recipe.StepClock, "on_step_end", interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "cut", **changes)
        check("cut", resume=True)


def test_a_resumed_run_goes_on_with_its_own_learning_rate(tmp_path):
    """The optimiser has it, and what the settings said would be written down and not be so."""
    run(tmp_path, **SAVING)
    for name, value in (("learning_rate", 0.5), ("weight_decay", 0.1)):
        with pytest.raises(ValueError, match=f"{name}: expected .*, with which .*checkpoint-.* goes on, got {value}"):
            run(tmp_path, resume=True, **SAVING | {name: value})


@pytest.mark.parametrize(
    "length", [{"steps": 1}, {"steps": None, "epochs": 1.0, "batch_size": len(ROWS)}], ids=("steps", "epochs")
)
def test_a_single_step_trains(length, tmp_path):
    start = start_prefix(tiny_model("llama"), tiny_tokenizer(), TrainSettings(init_text="a pub", prefix_len=4).resolved())
    prefix, metrics = run(tmp_path, init_text="a pub", prefix_len=4, **length)
    assert metrics["steps"] == 1
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(prefix.parameters(), start.parameters(), strict=True))


def test_a_prefix_that_diverged_is_not_written(tmp_path):
    run(tmp_path)
    before = (tmp_path / "prefix" / "prefix.safetensors").read_bytes()
    model, options = tiny_model("llama"), {"learning_rate": 3e38, "max_grad_norm": 0.0, "reparametrization": "none"}
    with pytest.raises(ValueError, match=r"learning_rate: with 3e\+38 the run diverged by step [1-4]; its prefix is"):
        run(tmp_path, model, overwrite=True, **options)
    assert (tmp_path / "prefix" / "prefix.safetensors").read_bytes() == before
    assert not hasattr(model.model.layers[0].self_attn, "layer_prefix")


def test_resuming_and_overwriting_at_once(tmp_path):
    with pytest.raises(ValueError, match="resume: expected resume or overwrite, got both"):
        run(tmp_path, resume=True, overwrite=True)


def test_an_empty_folder_where_a_prefix_was_to_be_is_no_earlier_run(tmp_path):
    (tmp_path / "prefix").mkdir()
    run(tmp_path)


def test_checkpoints_missing_or_in_the_way(tmp_path):
    with pytest.raises(ValueError, match="resume: expected a checkpoint to go on from, got none in .*new"):
        run(tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()
    run(tmp_path, save_steps=2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match="holds the checkpoints and the prefix of an earlier run; resume that, overwrite it"):
        run(tmp_path, save_steps=2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": []}, "train_dataset: expected at least one row"),
        ({"eval_rows": []}, "eval_dataset: expected at least one row"),
        ({"eval_rows": [{"text": "?"}]}, r"eval_dataset: rows\[0\]: "),
        ({"max_length": 3}, r"train_dataset: rows\[0\]: max_length"),
        ({"prefix_len": 200}, "prefix: it takes 200 of the model's 128 positions"),
        ({"save_steps": 1, "patience": 1}, "patience: expected eval_rows .*, got 1 alone"),
        ({"backend": "magic"}, "magic"),
    ],
    ids=str,
)
def test_wrong_calls_leave_model_and_folder_alone(changes, message, tmp_path):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", model, **changes)
    assert not hasattr(model.model.layers[0].self_attn, "layer_prefix")
    assert not list(tmp_path.rglob("*.*"))


def test_an_output_that_cannot_be_written_to_is_no_surprise_at_the_end(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(PrefixTrainer, "train", lambda *args, **kwargs: pytest.fail("it has trained"))
    model = tiny_model("llama")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"):
            run(output, model)
    assert not hasattr(model.model.layers[0].self_attn, "layer_prefix")


def test_float16_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="dtype: expected a GPU to train in float16"):
        run(tmp_path, tiny_model("llama").half())


def test_another_gpu_than_the_first(tmp_path, monkeypatch):
    """Trainer would move the model to the first without a word."""
    model = tiny_model("llama")
    parameter = SimpleNamespace(device=torch.device("cuda:1"), dtype=torch.float32)
    monkeypatch.setattr(model, "parameters", lambda: iter([parameter]))
    with pytest.raises(
        ValueError, match="device: expected the model on .*, got it on cuda:1; choose the GPU with CUDA_VISIBLE_DEVICES"
    ):
        run(tmp_path, model)


@pytest.mark.parametrize("verbosity", (logging.WARNING, logging.ERROR))
def test_the_progress_bar_shows_the_loss_on_stderr(verbosity, tmp_path, capfd, monkeypatch):
    """Alone, whatever transformers' own verbosity, which chooses between a bar and printed lines."""
    before = logging.get_verbosity()
    monkeypatch.setattr("transformers.trainer.logging.set_verbosity", lambda level: None)
    logging.set_verbosity(verbosity)
    try:
        _, metrics = run(tmp_path / "shown", eval_rows=ROWS[4:])
        out, err = capfd.readouterr()
        run(tmp_path / "silent", eval_rows=ROWS[4:], progress=False)
    finally:
        logging.set_verbosity(before)
    assert not out and "training: 100%" in err and "4/4" in err
    assert f"loss={metrics['losses'][-1]:.3f}" in err
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("losses", ([2.0, math.nan, math.inf, -math.inf], (1.0, [math.nan])))
def test_metrics_are_valid_json(losses, tmp_path):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    path = write_metrics(tmp_path / "new", {"losses": losses, "nested": {"value": math.nan, "text": "é", "none": None}})
    assert path == tmp_path / "new" / "metrics.json"
    written = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert written["losses"] == ([2.0, None, None, None] if len(losses) == 4 else [1.0, [None]])
    assert written["nested"] == {"value": None, "text": "é", "none": None}
