"""Arguments of PrefixTrainer: defaults, what is refused, and that a refusal leaves the model as it was."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import Trainer

from prefix_tuning import Prefix, PrefixTrainer, attach_prefix
from support.models import random_prefix, tiny_model
from support.tokenizer import tiny_tokenizer
from support.training import PREFIX_LEN, ROWS, arguments, make_trainer

REFUSED = {
    "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0, "use_liger_kernel": True, "bf16_full_eval": True,
    "fp16_full_eval": True, "fsdp": "full_shard", "deepspeed": {"stage": 2}, "push_to_hub": True,
    "parallelism_config": object(),
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
    "model_init": ({"model_init": lambda: None}, TypeError, "model_init: expected none, but a model and a prefix"),
    "no rows": ({"rows": []}, ValueError, "train_dataset: expected at least one row"),
    "an iterator": ({"rows": iter(ROWS)}, TypeError, "train_dataset: expected a sequence of rows .*, got list_iterator"),
    "no rows to evaluate": ({"eval_dataset": {"a": []}}, ValueError, r"eval_dataset\['a'\]: expected at least one row"),
    "a bad row": ({"rows": [*ROWS, {"text": "?"}]}, ValueError, r"train_dataset: rows\[8\]: expected an object"),
    "no prefix": ({"prefix": "prefix"}, TypeError, "prefix: expected a Prefix, got str"),
    "a frozen prefix": ({"frozen": True}, ValueError, "prefix: expected parameters that require a gradient, got none"),
    "a long prefix": ({"length": 128}, ValueError, "prefix: it takes 128 of the model's 128 positions"),
    "max_length": ({"max_length": 0}, ValueError, "max_length: expected at least 1, got 0"),
    "max_length of another type": ({"max_length": "9"}, TypeError, "max_length: expected an int, got '9'"),
    "one row": ({"rows": ROWS[0]}, TypeError, "train_dataset: expected a sequence of rows or a data set, got dict"),
    "a file": ({"rows": "rows.jsonl"}, TypeError, "train_dataset: expected a sequence of rows or a data set, got str"),
    "a table": (
        {"rows": SimpleNamespace(iloc=None)}, TypeError, r"train_dataset: .*got a SimpleNamespace; its to_dict\(.records.\)"
    ),
    "a tokenizer by name": ({"processing_class": "gpt2"}, TypeError, "processing_class: expected a tokenizer, got str"),
    "a file by name": (
        {"eval_dataset": {"a": "rows.jsonl"}}, TypeError, r"eval_dataset\['a'\]: expected a sequence of rows .*, got str"
    ),
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
    ("method", "message"),
    [
        ("push_to_hub", "prefix.push_to_hub"), ("create_model_card", "the frozen model"),
        ("hyperparameter_search", "for each trial"),
    ],
)  # fmt: skip
def test_what_trainer_does_with_whole_models_is_refused(method, message, tmp_path):
    with pytest.raises(NotImplementedError, match=f"{method}: .*{message}"):
        getattr(make_trainer(tmp_path), method)()


@pytest.mark.parametrize("name", ("FSDP", "DeepSpeed", "parallelism_config"))
def test_what_accelerate_launch_asks_for_is_refused(name, tmp_path, monkeypatch):
    """It comes by the environment. On a CPU accelerate does not heed it, so Trainer is told here that it does."""
    found = Trainer.create_accelerator_and_postprocess

    def told(self):
        found(self)
        if name == "parallelism_config":
            monkeypatch.setattr(type(self.accelerator), name, SimpleNamespace(sp_backend=None))
        else:
            setattr(self, f"is_{name.lower()}_enabled", True)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", told)
    model = tiny_model("llama")
    with pytest.raises(NotImplementedError, match=f"accelerate: {name} would split the model"):
        make_trainer(tmp_path, model)
    assert not any(hasattr(module, "layer_prefix") for module in model.modules())


def test_a_name_instead_of_a_model(tmp_path):
    prefix = random_prefix(tiny_model("llama"))
    options = {"train_dataset": ROWS, "processing_class": tiny_tokenizer()}
    for call in (
        lambda: PrefixTrainer("gpt2", prefix, arguments(tmp_path), **options), lambda: attach_prefix("gpt2", prefix),
        lambda: Prefix.for_model("gpt2", 4),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="model: expected a transformers model, got str"):
            call()
    with pytest.raises(TypeError, match="args: expected TrainingArguments, got dict"):
        PrefixTrainer(tiny_model("llama"), prefix, {"max_steps": 1}, **options)


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
