"""The whole-model measurements on tiny models: ours and PEFT's give the same losses and tokens before they are timed."""

import json
import math

import pytest
import torch

import bench_whole
import trainer_steps
from bench_whole import Ours, OursGrowing, OursKept, Peft, generate, measure_run, random_inputs, random_model
from cases import Model, Run
from prefix_tuning import Prefix
from prefix_tuning.padding_free import PaddingFreeCollator
from support.models import random_prefix, tiny_model
from support.tokenizer import tiny_tokenizer

SHAPES = {family: Model("tiny", family, 2, 64, 4, 4 if family == "gpt2" else 2, 16, 64, 128) for family in ("gpt2", "llama")}


def set_up(what, family="llama"):
    run = Run(SHAPES[family], what, 3, 5, prompt_len=4, new_tokens=6)
    model = random_model(run.model, "cpu", torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # tokens differ then, and a prefix that is missing shows
    return run, model, random_prefix(model), random_inputs(run)


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("what", ["train", "generate"])
def test_all_ways_are_right_and_timed(what, family):
    run, model, prefix, inputs = set_up(what, family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    row = measure_run(run, model, prefix, inputs, seconds=0, rounds=2)
    assert {"selected", "peft"} <= row["ways"].keys() and row["complete"]
    for name, way in row["ways"].items():
        assert way["median"] > 0, f"{name}: {way}"
        if what == "generate":
            assert way["equal_tokens"] == 1
    assert row["ratio"] > 0 and row["key"] == f"{what} tiny B3 P5"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", SHAPES)
def test_steps_in_trainer(family, monkeypatch):
    """PrefixTrainer's and PEFT's under Trainer, each on the rows of the batches in their order; the model is left as it was."""
    run, model, prefix, inputs = set_up("train", family)
    before, seen = {name: tensor.clone() for name, tensor in model.state_dict().items()}, []

    def note(collator):
        collate = collator.__call__

        def noted(self, examples):
            seen.append([len(row["input_ids"]) for row in examples])
            return collate(self, examples)

        monkeypatch.setattr(collator, "__call__", noted)

    for collator in (trainer_steps.PromptCompletionCollator, PaddingFreeCollator):
        note(collator)
    row = measure_run(run, model, prefix, inputs, seconds=0, rounds=1, trainer=True)
    for way in row["in_trainer"].values():
        assert way.get("median", 0) > 0, way
        assert way["samples"] == 3 and way["calls"] == 8
    assert row["in_trainer"].keys() == {"selected", "peft"}
    steps = trainer_steps.WARM_UP + 3 * 8
    assert len(seen) >= 2 * steps and seen[:4] == [batch["attention_mask"].sum(1).tolist() for batch in inputs]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("what", ["train", "generate"])
def test_another_prefix_is_wrong_and_not_timed(what, monkeypatch):
    run, model, prefix, inputs = set_up(what)
    right = bench_whole.Peft
    monkeypatch.setattr(bench_whole, "Peft", lambda model, prefix: right(model, Prefix.for_model(model, 5, seed=7)))
    way = measure_run(run, model, prefix, inputs, seconds=0, rounds=1)["ways"]["peft"]
    assert way["failed"].startswith("wrong: ") and "median" not in way


def checked(**found):
    made = object.__new__(bench_whole.Checked)
    vars(made).update({"losses": None, "logits": None, "tokens": None} | found)
    return made


@pytest.mark.parametrize("dtype, losses, wrong", [
    (torch.float32, [3.0, 2.0], False), (torch.float32, [3.0, 2.01], True), (torch.float32, [3.01, 2.0], True),
    (torch.bfloat16, [3.01, 2.01], False), (torch.bfloat16, [3.0, 2.5], True), (torch.bfloat16, [3.0, math.nan], True),
])  # fmt: skip
def test_losses_must_be_the_references(dtype, losses, wrong):
    found, right = {}, checked(losses=[3.0, 2.0])
    reason = checked(losses=losses).differs(right, right, dtype, found)
    assert (reason is not None) == wrong and found["losses"] == losses


@pytest.mark.parametrize("dtype, logit, token, wrong", [
    (torch.float32, 1.0, 7, None), (torch.float32, 1.1, 7, "logits"), (torch.float32, 1.0, 8, "tokens"),
    (torch.bfloat16, 1.0, 8, None), (torch.bfloat16, math.nan, 7, "logits"),
])  # fmt: skip
def test_logits_must_be_the_references_and_in_float32_the_tokens(dtype, logit, token, wrong):
    found, right = {}, checked(logits=torch.ones(1, 4), tokens=torch.full((1, 4), 7))
    one = checked(logits=torch.full((1, 4), logit), tokens=torch.tensor([[7, 7, 7, token]]))
    reason = one.differs(right, right, dtype, found)
    assert reason is None if wrong is None else wrong in reason
    assert found["equal_tokens"] == (1 if token == 7 else 0.75)


def test_a_step_trains_the_prefix_and_nothing_else():
    run, model, prefix, batches = set_up("train")
    for way in (Ours(model, prefix, None), Peft(model, prefix)):
        (parameters,) = (group["params"] for group in way.optimizer.param_groups)
        before = [parameter.clone() for parameter in parameters]
        losses = [bench_whole.train_step(way, batches[0]) for _ in range(4)]
        assert losses == sorted(losses, reverse=True) and losses[3] < losses[0]
        assert not any(torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
        assert sum(parameter.numel() for parameter in parameters) == sum(p.numel() for p in prefix.parameters())


def test_a_way_that_fails_leaves_ours(monkeypatch):
    run, model, prefix, inputs = set_up("train")
    monkeypatch.setattr(bench_whole.importlib.util, "find_spec", lambda name: None)
    row = measure_run(run, model, prefix, inputs, seconds=0, rounds=1)
    assert row["ways"]["peft"]["not_available"] == "peft is not installed" and row["ways"]["selected"]["median"] > 0


def test_peft_generates_with_its_prefix():
    run, model, prefix, prompts = set_up("generate")
    ours, peft = (generate(way, prompts, 6) for way in (Ours(model, prefix, "reference"), Peft(model, prefix)))
    without = model.generate(prompts, max_new_tokens=6, do_sample=False, pad_token_id=0)[:, prompts.shape[1] :]
    assert torch.equal(ours, peft) and not torch.equal(ours, without)


@pytest.mark.parametrize("way", (OursGrowing, lambda model, prefix: OursKept(model, prefix, 12)), ids=("growing", "kept"))
def test_caches_give_the_same_tokens(way):
    """Twice: a cache that is used again holds nothing of the first time."""
    run, model, prefix, prompts = set_up("generate")
    expected, way = generate(Ours(model, prefix), prompts, 6), way(model, prefix)
    assert torch.equal(generate(way, prompts, 6), expected) and torch.equal(generate(way, prompts, 6), expected)


def test_random_batches_have_e2es_lengths():
    run, *_ = set_up("train")
    batches = random_inputs(run)
    assert [batch["attention_mask"].sum(1).tolist() for batch in batches[:2]] == [[60, 42, 71], [62, 53, 55]]
    for batch in batches:
        targets = batch["labels"] != -100
        assert torch.equal(batch["labels"][targets], batch["input_ids"][targets])
        assert 0.4 < targets.sum() / batch["attention_mask"].sum() < 0.55 and not targets[batch["attention_mask"] == 0].any()


def test_the_command(tmp_path, monkeypatch, capsys):
    model = tiny_model("llama", max_position_embeddings=512)
    monkeypatch.setattr(bench_whole, "load_model_and_tokenizer", lambda device, dtype: (model, tiny_tokenizer()))
    output = tmp_path / "whole.json"
    runs = (Run(SHAPES["llama"], "train", 2, 4), Run(SHAPES["llama"], "generate", 2, 4, prompt_len=24, new_tokens=3))
    monkeypatch.setattr(bench_whole, "RUNS", runs)
    arguments = ["--output", str(output), "--seconds-per-row", "0", "--rounds", "1"]
    assert bench_whole.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "train tiny B2 P4: selected" in printed and "x over peft" in printed
    rows = json.loads(output.read_text())["rows"]
    assert [row["key"] for row in rows] == ["train tiny B2 P4", "generate tiny B2 P4"] and rows[1]["tokens"] == 6
    monkeypatch.setattr(bench_whole, "measure_run", lambda *arguments: pytest.fail("measured again"))
    assert bench_whole.main(arguments) == 0
    capsys.readouterr()
    assert bench_whole.main([*arguments, "--only", "generate"]) == 0
    assert "train" not in capsys.readouterr().out
