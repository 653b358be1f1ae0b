"""A model whose layers lie on two GPUs, or which lies on the second one, against the same model on the CPU.

Run by test_pretended_gpus.py, where tensors say they lie on GPUs (support/pretended_gpus.py).
"""

import copy
import traceback

import pytest
import torch
from accelerate import dispatch_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from prefix_tuning import Prefix, PrefixBank, PrefixedModel, accelerate_peft, attach_prefix
from prefix_tuning.generate import generate_texts
from prefix_tuning.recipe import TrainSettings, train_prefix
from support.emulated_graphs import READ_BY_THE_HOST, EmulatedGraph
from support.encoder_decoders import source, tiny_encoder_decoder
from support.generation import bank_of, padded
from support.models import random_prefix, tiny_model
from support.peft_models import peft_model
from support.tokenizer import tiny_tokenizer
from support.training import ROWS, batch_of, losses, make_trainer

aten = torch.ops.aten
NAMES = ["long", None, "short"]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def on_two_gpus(model):
    """A copy, its first layer on the first GPU, the others on the second."""
    around = {f"model.{name}": 0 for name, _ in model.model.named_children() if name != "layers"}
    layers = {f"model.layers.{index}": min(index, 1) for index in range(len(model.model.layers))}
    return dispatch_model(copy.deepcopy(model), device_map=around | layers | {"lm_head": 1}, force_hooks=True)


def on_the_second_gpu(model):
    return copy.deepcopy(model).to("cuda:1")


def both(model, place):
    """(model, its device, …) on the CPU and elsewhere."""
    elsewhere = place(model)
    return ((model, "cpu"), (elsewhere, next(elsewhere.parameters()).device))


def placed(call, device):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in call.items()}


def assert_same(got, expected):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu(), **TOLERANCE)


@pytest.mark.parametrize("kind", ["prefix", "bank"])
@pytest.mark.parametrize(
    ("family", "place"),
    [
        ("llama", on_the_second_gpu),
        ("llama", on_two_gpus),
        ("ministral3", on_two_gpus),  # scales queries by their positions
        ("bamba", on_two_gpus),  # its attention is on the second GPU alone
    ],
)
def test_logits_and_tokens(family, place, kind):
    model, results = tiny_model(family), []
    call = padded(3) | ({"prefix_ids": NAMES} if kind == "bank" else {})
    for where, device in both(model, place):
        given = placed(call, device)
        with attach_prefix(where, bank_of(model) if kind == "bank" else random_prefix(model)):
            outputs = [where(**given).logits]
            for options in ({}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": place is on_two_gpus}):
                outputs.append(where.generate(**given, max_new_tokens=12, do_sample=False, **options))
        results.append(outputs)
    assert_same(*results)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_bank_for_an_encoder_decoder(family):
    """The decoder's layers on the second GPU, all else on the first."""
    model, results = tiny_encoder_decoder(family), []
    inside = "" if family == "t5" else "model."
    places = {f"{inside}shared": 0, f"{inside}encoder": 0, "lm_head": 0, "final_logits_bias": 0}
    for name, _ in model.base_model.decoder.named_children():
        places[f"{inside}decoder.{name}"] = int(name in ("block", "layers"))
    elsewhere = dispatch_model(copy.deepcopy(model), device_map=places, force_hooks=True)
    for where, device in ((model, "cpu"), (elsewhere, torch.device("cuda:0"))):
        given = placed(source(model, batch=3, side="left"), device)
        with attach_prefix(where, bank_of(model)) as attachment:
            outputs = [where(**given, decoder_input_ids=given["input_ids"], prefix_ids=NAMES).logits]
            for options in ({}, {"num_beams": 2}):
                options = options | {"max_new_tokens": 8, "do_sample": False}
                outputs.append(where.generate(**given, prefix_ids=NAMES, **options))
            devices = [place.index for place in attachment.prefix.devices]
        results.append(outputs)
    assert_same(*results)
    assert set(devices) == {0, 1}


def test_a_bank_has_each_layer_s_tensors_where_it_computes():
    model, results = tiny_model("mistral"), []
    for where, device in both(model, on_two_gpus):
        bank = bank_of(model)
        with attach_prefix(where, bank, prefix_window="peft"):
            bank.add("longer", random_prefix(model, 12))
            call = placed(padded(3), device)
            outputs = [where(**call, prefix_ids=["longer", None, "short"]).logits]
            bank.remove("long")
            outputs.append(where(**call, prefix_ids=bank.ids(["longer", None, "short"])).logits)
        results.append(outputs)
    assert_same(*results)
    assert [device.index for device in bank.devices] == [0, 1, 1]


@pytest.mark.parametrize(("family", "window"), [("gpt2", "pinned"), ("mistral", "peft")])
def test_ids_that_nobody_reads_are_none_s(family, window):
    model = tiny_model(family).to("cuda")
    ids, bank = torch.ones(3, 12, dtype=torch.long, device="cuda"), bank_of(model)
    with attach_prefix(model, bank, prefix_window=window):
        got, expected = (
            model(input_ids=ids, prefix_ids=torch.tensor(given, device="cuda")).logits for given in ([0, 99, -7], [0, -1, -1])
        )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("reparametrization", [None, "mlp"])
@pytest.mark.parametrize("options", [{}, {"padding_free": True}])
def test_training(tmp_path, options, reparametrization):
    results = []
    for where, device in both(tiny_model("llama"), on_two_gpus):
        prefix = Prefix.for_model(where, 5, seed=0, reparametrization=reparametrization)
        trainer = make_trainer(tmp_path / str(device), where, prefix, options=options, use_cpu=device == "cpu")
        trainer.train()
        trainer.detach()
        results.append((torch.tensor(losses(trainer)), *(tensor for pair in prefix.layers() for tensor in pair)))
    assert_same(*results)


def test_a_loop_of_one_s_own_on_the_second_gpu_is_recorded(monkeypatch):
    monkeypatch.setattr(EmulatedGraph, "replays", 0)
    results = []
    for where, device in both(tiny_model("llama"), on_the_second_gpu):
        prefix, found = random_prefix(where), []
        with attach_prefix(where, prefix):
            trained = PrefixedModel(where, prefix)
            for seed in range(3):
                loss = trained(**batch_of(3, 9, 3 * seed, device))["loss"]
                loss.backward()
                found.append(loss.detach())
        results.append((*found, *(parameter.grad for parameter in prefix.parameters())))
    assert_same(*results)
    assert EmulatedGraph.replays > 0


class Waits(TorchDispatchMode):
    """What has the host wait for a GPU in the block, as (operator, the file that calls for it): reading its values, and copies
    to it that are not said to go on by themselves, which wait for all that it was asked to do before."""

    def __enter__(self):
        self.found = []
        return super().__enter__()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        trees = (args, kwargs), result
        given, made = ({leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)} for tree in trees)
        reads = operator in READ_BY_THE_HOST and "cuda" in given
        makes = operator is aten.lift_fresh.default and "cuda" in made  # torch.tensor(…, device="cuda")
        copies = operator in (aten._to_copy.default, aten.copy_.default) and len(given | made) > 1
        if reads or makes or (copies and True not in (*args[2:], (kwargs or {}).get("non_blocking"))):
            files = [frame.filename for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
            self.found.append((str(operator), files[-2]))
        return result


@pytest.mark.parametrize("options", [{}, {"padding_free": True}], ids=["padded", "padding free"])
def test_a_trainer_s_steps_wait_for_nothing(tmp_path, options):
    """Recorded and replayed ones, from the first one's beginning to the last one's end; none is logged in between."""
    waits, steps = Waits(), 6

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                waits.__enter__()

        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == steps - 1:
                waits.__exit__(None, None, None)

    changes = {"max_steps": steps, "logging_steps": 100, "use_cpu": False, "dataloader_pin_memory": True}
    trainer = make_trainer(tmp_path, options=options | {"callbacks": [Watch()]}, **changes)
    trainer.train()
    trainer.detach()
    assert not waits.found, waits.found


def test_a_run_writes_down_the_loss_of_each_step(tmp_path):
    """Which are read together here, in front of each checkpoint and after ten steps."""
    settings = TrainSettings(prefix_len=5, hidden_size=8, steps=13, batch_size=4, save_steps=11)
    losses = []
    for device in ("cpu", "cuda"):
        model = tiny_model("llama").to(device)
        _, metrics = train_prefix(model, tiny_tokenizer(), ROWS, tmp_path / device, settings, progress=False)
        losses.append(torch.tensor(metrics["losses"]))
    assert losses[0].shape == (13,)
    torch.testing.assert_close(*losses, atol=1e-3, rtol=0)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"prefix_ids": NAMES}], ids=["greedy", "sampled", "bank"])
def test_generation_waits_for_no_token(options):
    """What it waits for at its beginning and end does not depend on how many tokens there are."""
    model, found = tiny_model("llama").to("cuda"), []
    call = placed(padded(3), "cuda") | options
    with attach_prefix(model, bank_of(model) if "prefix_ids" in options else random_prefix(model)):
        for new_tokens in (16, 20):
            with Waits() as waits:
                model.generate(**call, max_new_tokens=new_tokens)
            found.append(waits.found)
    assert found[0] == found[1] and len(found[0]) < 16


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"disable_compile": True}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_prompts_that_are_left_on_the_cpu(family, options, monkeypatch):
    """generate brings them to the model step by step; the CPU has no events."""
    there = torch.Event
    monkeypatch.setattr(
        torch, "Event", lambda device, **more: (there if device.type == "cuda" else torch._C.Event)(device, **more)
    )
    model, results = tiny_model(family), []
    for where, _ in both(model, on_the_second_gpu):
        with attach_prefix(where, random_prefix(model)):
            results.append(where.generate(**padded(), max_new_tokens=18, do_sample=False, eos_token_id=None, **options))
    assert results[1].device.type == "cpu" and torch.equal(*results)


def test_a_text_as_a_prefix():
    model, tokenizer, results = tiny_model("llama"), tiny_tokenizer(), []
    for where, _ in both(model, on_two_gpus):
        prefix = Prefix.from_text(where, tokenizer, "a pub by the river\n")
        with attach_prefix(where, prefix):
            texts = generate_texts(where, tokenizer, ["name : Aromi\n", "x"], max_new_tokens=5)
        with attach_prefix(where, PrefixBank({"text": prefix}, "text")):
            assert generate_texts(where, tokenizer, ["name : Aromi\n", "x"], max_new_tokens=5) == texts
        results.append((list(prefix.parameters()), texts))
    assert_same(results[1][0], results[0][0])
    assert results[0][1] == results[1][1]


def test_an_accelerated_peft_model():
    results, state = [], None
    for where, device in both(tiny_model("llama"), on_two_gpus):
        model = peft_model(where, 5)
        state = state or copy.deepcopy(model.prompt_encoder.state_dict())
        model.prompt_encoder.load_state_dict(state)
        model = accelerate_peft(model)
        batch = batch_of(3, 9, device=device)
        loss = model(**batch).loss
        loss.backward()
        tokens = model.generate(input_ids=batch["input_ids"], max_new_tokens=5, do_sample=False)
        results.append((loss, model.prompt_encoder["default"].embedding.weight.grad, tokens))
    assert_same(*results)
