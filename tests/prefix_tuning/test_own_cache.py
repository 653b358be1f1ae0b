"""generate makes itself a static cache, whose steps are replayed, where nobody can tell but by the time it takes."""

import threading

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

from prefix_tuning import accelerate_peft, attach_prefix, own_cache
from prefix_tuning.own_cache import LEAST_REPLAYED, OwnCache
from support.encoder_decoders import tiny_encoder_decoder
from support.generation import CACHE, KINDS, OPTIONS, STATIC, attach, ids, on_gpu, padded
from support.models import random_prefix, tiny_model
from support.peft_models import peft_model

TOKENS = 18
GROWING = {"cache_implementation": "dynamic"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ("gpt2", "llama", "mistral", "gemma2", "gemma4"))
def test_tokens_are_those_of_a_cache_that_grows(graphs, family, kind):
    model = tiny_model(family)
    attachment, given = attach(model, kind)
    call = padded() | {"max_new_tokens": TOKENS} | given(2) | OPTIONS
    with attachment:
        expected = model.generate(**call, **GROWING)
        assert graphs.recorded == 0
        got = model.generate(**call)
    assert torch.equal(got, expected)
    assert graphs.replays >= TOKENS - 6


def test_samples_are_those_of_a_cache_that_grows(graphs):
    model = tiny_model("llama")
    call = padded() | {"max_length": 7 + TOKENS} | OPTIONS | {"do_sample": True, "num_return_sequences": 3}
    with attach_prefix(model, random_prefix(model)):
        torch.manual_seed(1)
        expected = model.generate(**call, **GROWING)
        torch.manual_seed(1)
        assert torch.equal(model.generate(**call), expected)
    assert len(expected) == 6 and graphs.replays == TOKENS - 2


@pytest.mark.parametrize(
    "options",
    (
        {"max_new_tokens": LEAST_REPLAYED - 1}, {"num_beams": 2}, {"disable_compile": True}, {"use_cache": False},
        {"compile_config": CompileConfig()}, {"prompt_lookup_num_tokens": 2},
    ),
    ids=str,
)  # fmt: skip
def test_calls_that_gain_nothing_keep_a_cache_that_grows(graphs, monkeypatch, options):
    made = []
    prepare = OwnCache.__call__

    def seen(self, config, kwargs, *args):
        prepare(self, config, kwargs, *args)
        made.append(kwargs.get(CACHE))

    monkeypatch.setattr(OwnCache, "__call__", seen)
    model = tiny_model("llama")
    call = {"input_ids": ids(1)} | {"max_new_tokens": TOKENS} | OPTIONS
    with attach_prefix(model, random_prefix(model)):
        model.generate(**call | options)
    assert made and not any(isinstance(cache, StaticCache) for cache in made)
    assert graphs.recorded == 0


def test_what_is_given_and_what_is_returned_stays_a_cache_that_grows(graphs):
    model = tiny_model("llama")
    call = padded() | {"max_new_tokens": TOKENS} | OPTIONS
    cache = DynamicCache(config=model.config)
    with attach_prefix(model, random_prefix(model)):
        model.generate(**call, **{CACHE: cache})
        returned = model.generate(**call, return_dict_in_generate=True)[CACHE]
    assert cache.get_seq_length() == 7 + TOKENS - 1
    assert type(returned) is DynamicCache
    assert graphs.recorded == 0


@pytest.mark.parametrize("family", ("bloom", "mpt", "qwen3_next", "bart"))
def test_models_whose_steps_are_not_replayed_keep_a_cache_that_grows(graphs, family):
    model = tiny_encoder_decoder(family) if family == "bart" else tiny_model(family)
    with attach_prefix(model, random_prefix(model)):
        model.generate(**padded(), max_new_tokens=TOKENS, **OPTIONS)
    assert graphs.recorded == 0


def test_a_cache_that_would_fill_the_memory_grows_instead(graphs, monkeypatch):
    model = tiny_model("llama")
    call = {"input_ids": ids(3), "max_new_tokens": TOKENS} | OPTIONS
    config = model.config
    size = 3 * (7 + TOKENS - 1) * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    with attach_prefix(model, random_prefix(model)):
        for free, least in ((2 * size - 1, 0), (2 * size, TOKENS - 3)):
            monkeypatch.setattr(own_cache, "free_bytes", lambda device, free=free: free)
            model.generate(**call)
            assert graphs.replays >= least and bool(graphs.replays) == bool(least)


def test_rows_that_might_become_very_long_keep_a_cache_that_grows(graphs, monkeypatch):
    model = tiny_model("llama")
    call = {"input_ids": ids(), "max_new_tokens": TOKENS} | OPTIONS
    with attach_prefix(model, random_prefix(model)):
        for longest, least in ((7 + TOKENS - 2, 0), (7 + TOKENS - 1, TOKENS - 3)):
            monkeypatch.setattr(own_cache, "LONGEST", longest)
            model.generate(**call)
            assert graphs.replays >= least and bool(graphs.replays) == bool(least)


def test_detached_and_hooked_models_keep_a_cache_that_grows(graphs):
    model = tiny_model("llama")
    call = {"input_ids": ids(), "max_new_tokens": TOKENS} | OPTIONS
    seen = []
    with attach_prefix(model, random_prefix(model)):
        hook = model.model.layers[1].register_forward_hook(lambda *args: seen.append(args))
        model.generate(**call)
        hook.remove()
    assert len(seen) == TOKENS
    model.generate(**call)
    assert "_prepare_cache_for_generation" not in vars(model)
    assert graphs.recorded == 0


def test_a_prefix_of_peft(graphs):
    pytest.importorskip("peft")
    model = accelerate_peft(peft_model(tiny_model("llama"), 5))
    call = padded() | {"max_new_tokens": TOKENS} | OPTIONS
    expected = model.generate(**call, **GROWING)
    assert graphs.recorded == 0
    assert torch.equal(model.generate(**call), expected)
    assert graphs.replays == TOKENS - 2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ("gpt2", "llama", "mistral", "gemma2"))
def test_on_a_gpu_tokens_are_those_of_a_cache_that_grows(counted, family, kind):
    model = tiny_model(family).cuda()
    attachment, given = attach(model, kind)
    call = on_gpu(padded()) | {"max_new_tokens": TOKENS} | given(2) | OPTIONS
    with attachment:
        expected = model.generate(**call, **GROWING)
        assert counted["made"] == 0
        assert torch.equal(model.generate(**call), expected)
    assert counted["replays"] >= TOKENS - 6


@pytest.mark.gpu
def test_on_a_gpu_threads_generate_at_the_same_time(counted):
    model = tiny_model("llama").cuda()
    calls = [{"input_ids": ids(2, 5 + seed, seed).cuda(), "max_new_tokens": 40} | OPTIONS for seed in range(4)]
    got = [[] for _ in calls]
    with attach_prefix(model, random_prefix(model)):
        expected = [model.generate(**call, **GROWING) for call in calls]

        def generate(index):
            for _ in range(4):
                got[index].append(model.generate(**calls[index]))

        threads = [threading.Thread(target=generate, args=(index,)) for index in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, tokens in enumerate(expected):
        assert len(got[index]) == 4 and all(torch.equal(each, tokens) for each in got[index])
    assert counted["replays"] > 4 * 4 * 30


@pytest.mark.gpu
def test_on_a_gpu_free_memory_counts_what_the_allocator_holds():
    held = torch.empty(2**26, dtype=torch.uint8, device="cuda")
    before = own_cache.free_bytes(held.device)
    del held
    assert abs(own_cache.free_bytes(torch.device("cuda")) - before - 2**26) < 2**23


def test_a_static_cache_asked_for_is_made_by_the_model(graphs):
    model = tiny_model("llama")
    with attach_prefix(model, random_prefix(model)):
        model.generate(input_ids=ids(), max_new_tokens=5, **OPTIONS, **STATIC)
    assert graphs.replays >= 2
