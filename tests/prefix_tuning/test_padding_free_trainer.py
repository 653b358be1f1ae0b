"""PrefixTrainer's batches without padding, in training and evaluation: where they are made, and that nothing else changes."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import IterableDataset

from prefix_tuning import PrefixTrainer
from prefix_tuning.data import PromptCompletionCollator, tokenize_rows
from prefix_tuning.recipe import TrainSettings, train_prefix
from support.models import random_prefix, tiny_model
from support.tokenizer import tiny_tokenizer
from support.training import ALIKE, CHECKPOINTING, ROWS, arguments, losses, make_trainer, trained


@pytest.mark.parametrize("changes", ({}, {"gradient_accumulation_steps": 2}, {CHECKPOINTING: True}, {"bf16": True}), ids=str)
@pytest.mark.parametrize("family", ("llama", "mistral"))
def test_training_is_that_of_padded_rows(family, changes, tmp_path):
    runs = [
        trained(tmp_path / str(free), tiny_model(family), rows=[*ALIKE, *ROWS], options={"padding_free": free}, **changes)
        for free in (True, False)
    ]
    close = {"rel": 0.02} if "bf16" in changes else {"rel": 2e-5}
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), **close)
    if "bf16" not in changes:
        for one, other in zip(*(run.prefix.parameters() for run in runs), strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def batches(trainer):
    return [set(batch) for batch in trainer.get_train_dataloader()], [set(batch) for batch in trainer.get_eval_dataloader()]


def test_what_is_left_out_by_itself(tmp_path):
    """On a CPU training and evaluation read no padding where they need not."""
    free = {"input_ids", "labels", "position_ids", "cu_seqlens", "max_seqlen", "num_targets"}
    padded = {"input_ids", "labels"}
    for options, expected in (({}, free), ({"padding_free": False}, padded), ({"padding_free": True}, free)):
        trainer = make_trainer(tmp_path, options=options | {"eval_dataset": ROWS[:4]})
        training, evaluation = batches(trainer)
        trainer.detach()
        assert all(names - {"parent"} == expected for names in training + evaluation)
    needed = (("bloom", {}), ("bamba", {}), ("mistral", {"prefix_window": "peft"}), ("llama", {"backend": "sdpa"}))
    for family, options in needed:
        trainer = make_trainer(tmp_path, tiny_model(family), options=options | {"eval_dataset": ROWS[:4]})
        assert trainer._padding_free() is None and not any("cu_seqlens" in kind[0] for kind in batches(trainer))
        trainer.detach()


class Rows(IterableDataset):
    def __iter__(self):
        yield from tokenize_rows(ROWS, tiny_tokenizer())


def evaluated(folder, kind=PrefixTrainer, **options):
    """The loss of batches of four rows, the last of fewer, and what the model is given."""
    model, seen = tiny_model("llama"), []
    options = {"eval_dataset": [*ALIKE, *ROWS], "processing_class": tiny_tokenizer(), **options}
    trainer = kind(model, random_prefix(model), arguments(folder, per_device_eval_batch_size=4), **options)
    hook = trainer.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    found = trainer.evaluate()
    hook.remove()
    trainer.detach()
    assert len({"cu_seqlens" in names for names in seen}) == 1
    return found, "cu_seqlens" in seen[0]


def test_an_evaluation_is_that_of_padded_rows(tmp_path):
    (padded, packs), (free, packs_free) = (evaluated(tmp_path, padding_free=free) for free in (False, True))
    assert packs_free and not packs and len([*ALIKE, *ROWS]) % 4
    assert free["eval_loss"] == pytest.approx(padded["eval_loss"], rel=1e-6)
    metrics, packs = evaluated(tmp_path, padding_free=True, compute_metrics=lambda found: {"rows": len(found.predictions)})
    assert not packs and metrics["eval_rows"] == len([*ALIKE, *ROWS])
    assert metrics["eval_loss"] == pytest.approx(padded["eval_loss"], rel=1e-6)


def test_an_evaluation_by_code_of_the_users_reads_padded_rows(tmp_path):
    class Looks(PrefixTrainer):
        def prediction_step(self, model, inputs, *args, **kwargs):
            assert "cu_seqlens" not in inputs
            return super().prediction_step(model, inputs, *args, **kwargs)

    expected, _ = evaluated(tmp_path, padding_free=False)
    found, packs = evaluated(tmp_path, Looks)
    assert not packs and found["eval_loss"] == expected["eval_loss"]
    streamed, packs = evaluated(tmp_path, eval_dataset=Rows())  # rows are counted by what a batch holds
    rows, _ = evaluated(tmp_path, eval_dataset=ROWS)
    assert not packs and streamed["eval_loss"] == pytest.approx(rows["eval_loss"], rel=1e-6)


def test_a_collator_or_an_iterable_data_set_stays_as_it_is(tmp_path):
    collator = PromptCompletionCollator(tiny_tokenizer())
    expected = losses(trained(tmp_path / "rows", max_steps=2, options={"padding_free": False, "data_collator": collator}))
    assert losses(trained(tmp_path / "collator", max_steps=2, options={"data_collator": collator})) == expected
    with pytest.raises(ValueError, match="padding_free: expected no data_collator"):
        make_trainer(tmp_path, options={"padding_free": True, "data_collator": collator})
    streamed = make_trainer(tmp_path / "stream", rows=Rows())
    assert streamed._padding_free() is None
    streamed.detach()
    asked = make_trainer(tmp_path / "asked", rows=Rows(), options={"padding_free": True}, max_steps=2)
    asked.train()
    asked.detach()
    assert len(losses(asked)) == 2


def test_code_of_the_users_own_gets_padded_rows(tmp_path):
    class Weighted(PrefixTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(set(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    model, seen = tiny_model("llama"), []
    given = {"train_dataset": ROWS, "processing_class": tiny_tokenizer()}
    trainer = Weighted(model, random_prefix(model), arguments(tmp_path, max_steps=1), **given)
    trainer.train()
    trainer.detach()
    assert seen and all("cu_seqlens" not in names for names in seen)
    trainer = make_trainer(tmp_path, options={"compute_loss_func": lambda outputs, labels, num_items_in_batch: 0})
    assert trainer._padding_free() is None
    trainer.detach()
    for name in ("compute_loss", "training_step", "_prepare_inputs", "get_batch_samples", "compute_loss_func"):
        trainer = make_trainer(tmp_path)
        assert trainer._padding_free() is not None
        setattr(trainer, name, lambda *args: None)
        assert trainer._padding_free() is None
        trainer.detach()
        if name != "compute_loss_func":
            kind = type("Own", (PrefixTrainer,), {name: lambda self, *args: None})
            own = kind(model, random_prefix(model), arguments(tmp_path), **given)
            assert own._padding_free() is None
            own.detach()
    trainer = make_trainer(tmp_path)
    trainer.data_collator = PromptCompletionCollator(tiny_tokenizer())
    assert all("cu_seqlens" not in batch for batch in trainer.get_train_dataloader())
    trainer.detach()


def test_layers_that_are_compiled_later_get_padded_rows(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    for layer in trainer.model.model.model.layers:
        layer.compile(backend="eager")
    trainer.train()
    assert len(losses(trainer)) == 1
    trainer.detach()


@pytest.mark.parametrize("free", (None, True))
def test_batches_that_one_process_hands_out_are_padded(free, tmp_path):
    """It cuts one batch for all processes into parts."""
    config = {"dispatch_batches": True}
    trainer = make_trainer(tmp_path, options={"padding_free": free}, max_steps=1, accelerator_config=config)
    trainer.train()
    assert trainer._padding_free() is not None
    trainer.args = SimpleNamespace(world_size=2, accelerator_config=trainer.args.accelerator_config, fp16=False)
    if free:
        with pytest.raises(NotImplementedError, match="padding_free: several processes need .* without dispatch_batches"):
            trainer._padding_free()
    else:
        assert trainer._padding_free() is None


@pytest.mark.parametrize("free", (True, False))
def test_the_tokens_seen_are_those_of_the_rows(free, tmp_path):
    """Also the end of a row, which has the id of padding here."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    options = {"padding_free": free, "processing_class": tokenizer}
    trainer = trained(tmp_path, options=options, max_steps=2, include_num_input_tokens_seen="non_padding")
    rows = tokenize_rows(ROWS, tokenizer)
    assert trainer.state.num_input_tokens_seen == sum(len(row["input_ids"]) for row in rows)


@pytest.mark.parametrize("value", (0, 1, "no"))
def test_another_value_is_a_mistake(value, tmp_path):
    with pytest.raises(TypeError, match="padding_free: expected True, False or None, got"):
        make_trainer(tmp_path, options={"padding_free": value})


def test_refusals_leave_the_model_alone(tmp_path):
    model = tiny_model("bloom")
    with pytest.raises(NotImplementedError, match="padding_free: BloomForCausalLM needs padded rows: its attention has ALiBi"):
        PrefixTrainer(model, random_prefix(model), train_dataset=ROWS, processing_class=tiny_tokenizer(), padding_free=True)
    assert not any(hasattr(module, "layer_prefix") for module in model.modules())


def test_the_settings_reach_the_trainer(tmp_path):
    model, found = tiny_model("llama"), []
    for free in (True, False, None):
        settings = TrainSettings(prefix_len=3, steps=2, batch_size=4, padding_free=free, learning_rate=1e-2)
        _, numbers = train_prefix(model, tiny_tokenizer(), [*ALIKE, *ROWS], tmp_path / str(free), settings, progress=False)
        found.append(numbers["losses"])
    assert found[0] == found[2] == pytest.approx(found[1], rel=2e-5)
