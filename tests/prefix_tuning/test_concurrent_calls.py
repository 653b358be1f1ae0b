"""Calls that overlap give what each gives alone: in threads, and where a backward pass recomputes what was computed earlier."""

import sys
import threading

import pytest
import torch
from transformers import StoppingCriteria
from transformers.modeling_layers import GradientCheckpointingLayer

from prefix_tuning import Prefix, PrefixBank, accelerate_peft, attach_prefix
from support.checkpointing import train_with_checkpointing
from support.encoder_decoders import PARTS, labels, source, tiny_encoder_decoder
from support.generation import OPTIONS, attach, ids
from support.models import random_prefix, tiny_model

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@torch.no_grad()
def amid(model, call, other):
    """What call() gives if other() runs from beginning to end, in another thread, while call() is at each second layer."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)][1::2]

    def before(module, args):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=torch.no_grad()(other))
            thread.start()
            thread.join()

    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    try:
        return call()
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", ["bart", "t5", "t5gemma"])
def test_encoder_decoders(family):
    model = tiny_encoder_decoder(family)
    calls = [
        lambda: model(**source(model, side="left"), decoder_input_ids=labels(length=4).clamp(min=0), use_cache=False).logits,
        lambda: model(**source(model, length=9), decoder_input_ids=labels(length=6).clamp(min=0), use_cache=False).logits,
    ]
    with attach_prefix(model, random_prefix(model, parts=PARTS)):
        expected = calls[0]()
        assert torch.equal(amid(model, *calls), expected)


@pytest.mark.parametrize("window", ["pinned", "peft"])
@pytest.mark.parametrize("kind", ["prefix", "bank"])
@pytest.mark.parametrize("family", ["llama", "llama4_temperature", "mistral"])
def test_causal_models(family, kind, window):
    model = tiny_model(family)
    attachment, chosen = attach(model, kind, prefix_window=window)
    other = {"prefix_ids": ["short", "short"]} if kind == "bank" else {}
    with attachment:
        expected = model(ids(length=12), **chosen(2)).logits
        got = amid(model, lambda: model(ids(length=12), **chosen(2)).logits, lambda: model(ids(length=12, seed=2), **other))
    assert torch.equal(got, expected)


class AtStep(StoppingCriteria):
    """Calls `action` behind one step of generate."""

    def __init__(self, step, action):
        self.left, self.action = step, action

    def __call__(self, input_ids, scores, **kwargs):
        self.left -= 1
        if self.left == 0:
            self.action()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_a_prefix_of_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = accelerate_peft(peft.get_peft_model(tiny_model("llama"), config)).eval()
    expected = model.generate(input_ids=ids(), max_new_tokens=8, **OPTIONS)
    started, both_run = threading.Event(), threading.Event()

    def first_call():
        criteria = [AtStep(1, lambda: (started.set(), both_run.wait()))]
        model.generate(input_ids=ids(), max_new_tokens=2, stopping_criteria=criteria, **OPTIONS)

    def end_the_first():
        both_run.set()
        thread.join()

    thread = threading.Thread(target=first_call)
    thread.start()
    started.wait()
    got = model.generate(input_ids=ids(), max_new_tokens=8, stopping_criteria=[AtStep(2, end_the_first)], **OPTIONS)
    assert torch.equal(got, expected)
    plain = model.base_model.generate(input_ids=ids(), max_new_tokens=8, **OPTIONS)
    assert not torch.equal(plain, expected), "the model underneath has the prefix after both calls"


def test_prefixes_added_at_once_have_a_place_each(monkeypatch):
    """A thread adds one while another is in the middle of adding one."""
    model = tiny_model("llama")
    first, second = random_prefix(model, 3), random_prefix(model, 4)
    bank = PrefixBank({"old": random_prefix(model, 3)}, capacity=4, max_prefix_len=4)
    layers, threads = Prefix.layers, []

    def slow(self, part="decoder"):
        if self is first:
            threads.append(threading.Thread(target=bank.add, args=("second", second)))
            threads[0].start()
            threads[0].join(timeout=0.5)
        return layers(self, part)

    monkeypatch.setattr(Prefix, "layers", slow)
    bank.add("first", first)
    threads[0].join()
    assert bank.ids(["old", "first", "second"]).tolist() == [0, 1, 2]
    assert bank.storage.prefix_lens.tolist() == [3, 3, 4, 0]


@pytest.mark.parametrize("window", ["pinned", "peft"])
def test_a_bank_that_grows_while_calls_run(window):
    model = tiny_model("mistral")
    prefixes = {"short": random_prefix(model, 3), "long": random_prefix(model, 5)}
    bank, wrong, ended = PrefixBank(prefixes), [], threading.Event()

    @torch.no_grad()
    def logits():
        return model(ids(length=12), prefix_ids=["short", "long"]).logits

    def call():
        while not ended.is_set():
            try:
                torch.testing.assert_close(logits(), expected, **TOLERANCE)
            except Exception as error:
                wrong.append(error)

    interval = sys.getswitchinterval()
    with attach_prefix(model, bank, prefix_window=window):
        expected = logits()
        threads = [threading.Thread(target=call) for _ in range(2)]
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads:
                thread.start()
            for i in range(60):
                bank.add(f"{i}", random_prefix(model, 6 + i))
        finally:
            ended.set()
            sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    assert not wrong, wrong[0]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_recomputed_layers_see_what_they_saw_first(family):
    """Two forward passes, then one backward pass with gradient checkpointing."""
    if family == "t5":
        model, parts = tiny_encoder_decoder("t5"), {"parts": PARTS}
        batches = [source(model, side="left"), source(model)]
        batches = [batch | {"labels": labels(), "use_cache": False} for batch in batches]
    else:
        model, parts = tiny_model("llama").requires_grad_(False), {}
        batches = [{"input_ids": ids(seed=seed), "labels": ids(seed=seed), "use_cache": False} for seed in (1, 2)]
    prefix = random_prefix(model, **parts)
    with attach_prefix(model, prefix):
        expected = torch.autograd.grad(sum(model(**batch).loss for batch in batches), list(prefix.parameters()))
        train_with_checkpointing(model)
        grads = torch.autograd.grad(sum(model(**batch).loss for batch in batches), list(prefix.parameters()))
    torch.testing.assert_close(grads, expected, **TOLERANCE)
