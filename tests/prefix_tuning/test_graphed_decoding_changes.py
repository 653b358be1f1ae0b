"""Recorded decoding steps see what changes between steps and between calls: prefix, bank, cache, arguments. None is stale."""

import copy

import pytest
import torch
from transformers import LogitsProcessor, StaticCache

from prefix_tuning import attach_prefix
from support.generation import CACHE, OPTIONS, STATIC, bank_of, ids, on_gpu, other_prefix, padded
from support.models import random_prefix, tiny_model


class AtStep(LogitsProcessor):
    """Does something in the middle of a call of generate, after so many tokens."""

    def __init__(self, step, action):
        self.step, self.action, self.calls = step, action, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == self.step:
            self.action()
        return scores


def test_calls_of_other_sizes_and_prefixes(graphs):
    model = tiny_model("llama")
    for prefix, batch, length, steps in ((random_prefix(model), 2, 7, 9), (other_prefix(model), 3, 5, 6)):
        call = padded(batch, length) | {"max_new_tokens": steps} | OPTIONS
        with attach_prefix(model, prefix):
            expected = model.generate(**call)
            assert torch.equal(model.generate(**call, **STATIC), expected)
            assert torch.equal(model.generate(**call, **STATIC), expected)
    assert graphs.replays == 2 * (9 - 2) + 2 * (6 - 2) + 2, "later calls of a kind replay their first step too"


def test_rows_choose_other_prefixes_in_the_next_call(graphs):
    model = tiny_model("llama")
    bank = bank_of(model, default="short", capacity=4, max_prefix_len=8)
    call = padded() | {"max_new_tokens": 6} | OPTIONS
    given = [{}, {"prefix_ids": None}, {"prefix_ids": ["long", "short"]}, {"prefix_ids": bank.ids([None, "long"])}]
    with attach_prefix(model, bank):
        for chosen in given:
            assert torch.equal(model.generate(**call, **chosen, **STATIC), model.generate(**call, **chosen))
    assert graphs.replays == len(given) * 4 + 2


def test_kept_graphs_under_autocast_read_the_weights_themselves(graphs):
    """The copies that torch.autocast makes of weights with gradients are freed as its block ends."""
    if CACHE == "past_key_values":
        pytest.skip("before transformers 5.24 a static cache takes no values of another dtype than its keys")
    model = tiny_model("llama").requires_grad_(True).bfloat16().float()
    call = padded() | {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True} | OPTIONS
    cache = StaticCache(config=model.config, max_cache_len=32)

    def logits(**options):
        cache.reset()
        with torch.autocast("cpu", torch.bfloat16):
            return torch.stack(model.generate(**call, **{CACHE: cache}, **options).logits)

    with attach_prefix(model, random_prefix(model)) as attachment, attachment.keep_graphs():
        first = logits()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.down_proj.weight.mul_(2)
        expected = logits(disable_compile=True)
        assert (first - expected).abs().max() > 1e-2
        replays = graphs.replays
        torch.testing.assert_close(logits(), expected)
        assert graphs.replays == replays + 5


def switched_off(attachment, bank):
    attachment.enable(False)


def added(attachment, bank):
    bank.remove("short")
    bank.add("short", bank.added)


def grown(attachment, bank):
    bank.add("longer", bank.longer)
    bank.remove("short")
    bank.add("short", bank.added)


def check_change_is_seen(action, device="cpu"):
    """After some steps of a call the prefix is switched off or another one; a call without that gives other tokens."""
    model = tiny_model("llama").to(device)
    given = {} if action is switched_off else {"prefix_ids": ["short", "long"]}
    tokens = []
    for options in ({}, STATIC):
        bank = bank_of(model)
        bank.added, bank.longer = other_prefix(model, 3), random_prefix(model, 9)
        attachment = attach_prefix(model, random_prefix(model) if action is switched_off else bank)
        processor = AtStep(7, lambda attachment=attachment, bank=bank: action(attachment, bank))
        call = padded() | {"max_new_tokens": 14} | given | OPTIONS
        call = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in call.items()}
        with attachment:
            unchanged = model.generate(**call)
            tokens.append(model.generate(**call, **options, logits_processor=[processor]))
    assert torch.equal(*tokens)
    assert not torch.equal(tokens[0], unchanged)


@pytest.mark.parametrize("action", (switched_off, added, grown))
def test_what_changes_between_steps_is_seen(graphs, action):
    check_change_is_seen(action)
    assert graphs.replays == (12 if action is added else 10)


def test_tensors_of_the_cache_that_are_replaced_are_seen(graphs):
    """As beams and callers may do. The cache's old tensors are kept, and are not what a later step may read."""
    model = tiny_model("llama")
    cache = StaticCache(config=model.config, max_cache_len=30)
    call = padded() | {"max_new_tokens": 14} | OPTIONS

    def replace():
        for layer in cache.layers:
            layer.keys, layer.values, layer.before = layer.keys.clone(), layer.values.clone(), (layer.keys, layer.values)

    with attach_prefix(model, random_prefix(model)):
        expected = model.generate(**call)
        got = model.generate(**call, **{CACHE: cache}, logits_processor=[AtStep(7, replace)])
        for layer in cache.layers:
            assert not torch.equal(layer.keys, layer.before[0])
    assert torch.equal(got, expected)
    assert graphs.replays == 5 + 6


def test_switched_off_between_calls_and_detached(graphs):
    model = tiny_model("llama")
    call = padded() | {"max_new_tokens": 6} | OPTIONS
    plain = model.generate(**call)
    with attach_prefix(model, random_prefix(model)) as attachment:
        expected = model.generate(**call)
        assert torch.equal(model.generate(**call, **STATIC), expected)
        attachment.enable(False)
        assert torch.equal(model.generate(**call, **STATIC), plain)
        attachment.enable(True)
        assert torch.equal(model.generate(**call, **STATIC), expected)
    assert not torch.equal(plain, expected)
    assert graphs.replays == 3 * 4 + 1
    assert "get_compiled_call" not in vars(model)


def test_steps_of_other_arguments_are_recorded_apart(graphs):
    """Called by hand as generate calls it: other shapes, other outputs, gradients."""
    model = tiny_model("llama")
    caches = [StaticCache(config=model.config, max_cache_len=30) for _ in range(2)]
    with attach_prefix(model, random_prefix(model)):
        with torch.no_grad():
            for cache in caches:
                model(input_ids=ids(), **{CACHE: cache})
            steps = model.get_compiled_call(None)
            for step in range(12):
                positions = torch.full((2 if step % 2 else 1, 1), 7 + step)
                call = {"input_ids": ids(2, 1, step), "position_ids": positions, "output_hidden_states": step % 4 > 1}
                expected, got = model(**call, **{CACHE: caches[0]}), steps(**call, **{CACHE: caches[1]})
                torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-4)
                assert (got.hidden_states is None) == (expected.hidden_states is None)
        assert graphs.recorded == 1 + 4 and graphs.replays == 5
        assert steps(**call, **{CACHE: caches[1]}).logits.requires_grad


def test_a_copy_of_an_attached_model_records_its_own_steps(graphs):
    model = tiny_model("llama")
    call = padded() | {"max_new_tokens": 6} | OPTIONS
    with attach_prefix(model, random_prefix(model)):
        expected = model.generate(**call, **STATIC)
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(copied.generate(**call, **STATIC), expected)
    assert graphs.replays == 2 * 4


def test_calls_that_keep_their_graphs(graphs):
    """Under changes of the prefix and of a bank, also by training, which has the prefix rounded anew."""
    model = tiny_model("llama")
    cache = StaticCache(config=model.config, max_cache_len=30)
    call = padded() | {"max_new_tokens": 6} | OPTIONS
    prefix = random_prefix(model)
    with attach_prefix(model, prefix) as attachment, attachment.keep_graphs():

        def same():
            expected = model.generate(**call)
            assert torch.equal(model.generate(**call, **{CACHE: cache}), expected)
            cache.reset()

        same()
        with torch.no_grad():
            for parameter in prefix.parameters():
                parameter.mul_(2)
        same()
        assert graphs.recorded == 1 + 1 and graphs.replays == 4 + 5
        for parameter in prefix.parameters():
            parameter.data = parameter.data.flip(-1)
        same()
        prefix.position_offset += 3
        same()
        attachment.enable(False)
        same()
        attachment.enable(True)
        same()
    assert graphs.recorded == 1 + 1 + 3, "of each change the second step was recorded"
    with attach_prefix(model, bank_of(model)) as attachment, attachment.keep_graphs():
        for names in (["short", "long"], ["long", None]):
            expected = model.generate(**call, prefix_ids=names)
            assert torch.equal(model.generate(**call, **{CACHE: cache}, prefix_ids=names), expected)
            cache.reset()
    assert graphs.recorded == 1 + 1 + 3 + 2


@pytest.mark.gpu
def test_on_a_gpu_rows_choose_and_prefixes_are_added(counted):
    model = tiny_model("llama").cuda()
    bank = bank_of(model, default="short", capacity=4, max_prefix_len=8)
    call = on_gpu(padded()) | {"max_new_tokens": 6} | OPTIONS
    with attach_prefix(model, bank):
        for chosen in ({}, {"prefix_ids": None}, {"prefix_ids": ["long", "short"]}, {"prefix_ids": torch.tensor([-1, 1])}):
            assert torch.equal(model.generate(**call, **chosen, **STATIC), model.generate(**call, **chosen))
    assert counted["replays"] >= 4 * 4
    for action in (switched_off, added, grown):
        check_change_is_seen(action, "cuda")


@pytest.mark.gpu
def test_on_a_gpu_calls_that_keep_their_graphs(counted):
    model = tiny_model("llama").to("cuda", torch.bfloat16)
    cache = StaticCache(config=model.config, max_cache_len=30)
    call = on_gpu(padded()) | {"max_new_tokens": 6} | OPTIONS
    prefix = random_prefix(model)  # float32
    with attach_prefix(model, prefix) as attachment, attachment.keep_graphs():
        for enabled in (True, False):
            attachment.enable(enabled)
            for factor in (1, 2):
                with torch.no_grad():
                    for parameter in prefix.parameters():
                        parameter.mul_(factor)
                plain = StaticCache(config=model.config, max_cache_len=30)
                expected = model.generate(**call, **{CACHE: plain}, disable_compile=True)
                assert torch.equal(model.generate(**call, **{CACHE: cache}), expected)
                cache.reset()
    assert counted["made"] == 1 + 2 and counted["replays"] >= 4 + 5 + 3 + 5


@pytest.mark.gpu
def test_on_a_gpu_memory_does_not_grow_from_call_to_call(counted):
    model = tiny_model("llama").cuda()
    call = on_gpu(padded()) | {"max_new_tokens": 6} | OPTIONS | STATIC
    with attach_prefix(model, random_prefix(model)):
        held = []
        for _ in range(6):
            model.generate(**call)
            held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[2:] == [held[2]] * 4
