"""generate learns one step late that all rows have ended, and leaves everything as if it had known at once."""

import contextlib
import gc
import threading
from unittest.mock import Mock

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, StaticCache, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from prefix_tuning import accelerate_peft, attach_prefix, deferred_stops
from prefix_tuning.generate import generate_texts
from support.encoder_decoders import tiny_encoder_decoder
from support.generation import CACHE, KINDS, OPTIONS, attach, ids, padded
from support.models import random_prefix, tiny_model
from support.peft_models import peft_model
from support.tokenizer import tiny_tokenizer
from support.training import DEVICES

AT_ONCE = {"disable_compile": True}
WHOLE = {"return_dict_in_generate": True, "output_logits": True}


class Tokens(BaseStreamer):
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        self.seen.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@pytest.fixture
def late(monkeypatch):
    """What each call of generate that deferred took back: 1 step or none."""
    surplus, finish = [], deferred_stops._StopCheck.finish

    def noted(self):
        surplus.append(finish(self))
        return surplus[-1]

    monkeypatch.setattr(deferred_stops._StopCheck, "finish", noted)
    return surplus


def ending(model, call, after=9):
    """A call whose rows end by themselves, the last one after so many tokens."""
    tokens = model.generate(**call, **AT_ONCE)[:, call["input_ids"].shape[1] :]
    return call | {"eos_token_id": sorted({int(tokens[0, after - 4]), *(int(row[after - 1]) for row in tokens[1:])})}


def made(family, device):
    model = tiny_model(family).to(device)
    call = {name: value.to(device) for name, value in padded().items()}
    return model, call | {"max_new_tokens": 18} | OPTIONS


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ("llama", "mistral", "gpt2"))
def test_rows_that_end_early_end_there(late, family, kind, device):
    model, call = made(family, device)
    attachment, given = attach(model, kind)
    with attachment:
        call = ending(model, call | given(2))
        expected = model.generate(**call, **AT_ONCE)
        assert not late and expected.shape[1] < 7 + 18
        assert torch.equal(model.generate(**call), expected) and late == [1]


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_a_prefix_of_peft(late, device):
    pytest.importorskip("peft")
    model, call = made("llama", device)
    model = accelerate_peft(peft_model(model, 5))
    call = ending(model, call)
    expected = model.generate(**call, **AT_ONCE)
    assert torch.equal(model.generate(**call), expected) and late == [1] and expected.shape[1] < 7 + 18


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_rows_that_end_with_the_call(late, device):
    """By their length, or at the last token there may be: then no step is one too many."""
    model, call = made("llama", device)
    with attach_prefix(model, random_prefix(model)):
        last = int(model.generate(**call, **AT_ONCE)[0, -1])
        for options in ({}, {"eos_token_id": last}, {"max_new_tokens": 16}):
            call |= options
            assert torch.equal(model.generate(**call), model.generate(**call, **AT_ONCE))
    assert late[0] == 0 and len(late) == 3


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_what_is_drawn_next_is_the_same(late, device):
    model, call = made("llama", device)
    with attach_prefix(model, random_prefix(model)):
        call |= {"do_sample": True, "eos_token_id": list(range(3, 30))}
        results = []
        for options in (AT_ONCE, {}):
            torch.manual_seed(3)
            results.append([model.generate(**call, **options) for _ in range(3)] + [torch.rand(4, device=device)])
    assert late == [1, 1, 1] and all(map(torch.equal, *results))
    assert not torch.equal(*(tokens[:, :8] for tokens in results[0][:2]))


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("options", ({}, WHOLE), ids=("tokens", "dict"))
def test_a_cache_of_the_callers_is_as_it_would_be(late, device, options):
    """Another turn goes on from it."""
    model, call = made("llama", device)
    with attach_prefix(model, random_prefix(model)):
        call, turns = ending(model, call), []
        for stop in (AT_ONCE, {}):
            cache = StaticCache(config=model.config, max_cache_len=64)
            first = model.generate(**call, **{CACHE: cache}, **stop, **options)
            tokens = first.sequences if options else first
            turns.append([tokens, int(cache.get_seq_length())])
            more = torch.cat([tokens, call["input_ids"]], 1)
            mask = torch.cat([call["attention_mask"], torch.ones_like(more[:, 7:])], 1)
            again = call | {"input_ids": more, "attention_mask": mask, "eos_token_id": None, "max_new_tokens": 5}
            turns[-1].append(model.generate(**again, **{CACHE: cache}, **stop))
            turns[-1].append(torch.stack(first.logits) if options else tokens)
    (expected, length, next_turn, logits), got = turns
    assert torch.equal(got[0], expected) and got[1] == length and torch.equal(got[2], next_turn)
    torch.testing.assert_close(got[3], logits, atol=1e-4, rtol=1e-4)
    assert late == [1, 0]


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_a_window_of_the_callers_is_not_deferred(late, device):
    """It may have dropped a token for the one too many."""
    model, call = made("mistral", device)
    with attach_prefix(model, random_prefix(model)):
        call = ending(model, call)
        cache = StaticCache(config=model.config, max_cache_len=64)
        assert torch.equal(model.generate(**call, **{CACHE: cache}), model.generate(**call, **AT_ONCE))
    assert not late


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("family", ("llama", "mistral"))
def test_texts(late, family, device):
    """Their cache is nobody's, so a window in it may be deferred, too."""
    model, tokenizer = tiny_model(family).to(device), tiny_tokenizer()
    prompts = ["x", "Zz", "abc : 7", "one more", "the longest of the prompts"]
    model.generation_config.eos_token_id = list(range(3, 30))
    with attach_prefix(model, random_prefix(model)):
        texts = generate_texts(model, tokenizer, prompts, max_new_tokens=24, batch_size=2)
        assert len(late) == 3 and 1 in late
        model.generation_config.cache_implementation = "dynamic"
        assert texts == generate_texts(model, tokenizer, prompts, max_new_tokens=24, batch_size=2)
    assert len(late) == 3


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_a_streamer_of_the_callers(late, device):
    model, call = made("llama", device)
    call = {name: value[1:] if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    with attach_prefix(model, random_prefix(model)):
        call, streamed = ending(model, call), []
        for stop in (AT_ONCE, {}):
            streamer = Tokens()
            streamed.append(model.generate(**call, **stop, streamer=streamer)[0].tolist())
            assert streamer.ended and sum(streamer.seen, []) == streamed[-1]
    assert streamed[0] == streamed[1] and len(streamed[0]) < 7 + 18
    assert late == [1]


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("kind", ("stopping_criteria", "logits_processor", "prefix_allowed_tokens_fn"))
def test_functions_of_the_callers_are_not_asked_about_a_step_too_many(late, kind, device):
    """A trie has no tokens to allow behind its end; a criterion may show what it is asked about."""
    model, call = made("llama", device)
    call, asked, answer = {**call, "input_ids": ids(1).to(device), "eos_token_id": 2}, [], [11, 12, 13, 14, 2]
    del call["attention_mask"]

    def allowed(row, tokens):
        asked.append(len(tokens))
        return answer[len(tokens) - 7 : len(tokens) - 6]

    def processed(tokens, scores):
        chosen = allowed(0, tokens[0])
        return scores.index_fill(1, torch.tensor(chosen, device=device), 1e4)

    def stops(tokens, scores, **options):
        asked.append(tokens.shape[1])
        return torch.full((len(tokens),), tokens.shape[1] >= 7 + 6, device=tokens.device)

    function = {"stopping_criteria": [stops], "logits_processor": [processed], "prefix_allowed_tokens_fn": allowed}[kind]
    lists = {"stopping_criteria": StoppingCriteriaList, "logits_processor": LogitsProcessorList}
    given = {kind: lists[kind](function) if kind in lists else function}
    with attach_prefix(model, random_prefix(model)):
        expected, before = model.generate(**call, **AT_ONCE, **given), asked.copy()
        asked.clear()
        assert torch.equal(model.generate(**call, **given), expected) and expected.shape[1] < 7 + 18
        assert asked == before and not late
        model.generate(**call)
        assert len(late) == 1, "without them it is deferred"


def test_a_full_cache_of_the_callers(graphs, late):
    """All rows end with the last token that it holds: another step would write past its end."""
    model, call = made("llama", "cpu")
    with attach_prefix(model, random_prefix(model)):
        call = ending(model, call)
        expected = model.generate(**call, **AT_ONCE)
        cache = StaticCache(config=model.config, max_cache_len=expected.shape[1] - 1)
        with pytest.raises(RuntimeError):  # a call that fails, for which the cache was large enough
            wrong = torch.ones(3, 7, dtype=torch.long)
            model.generate(**call | {"max_new_tokens": 3, "attention_mask": wrong}, **{CACHE: cache})
        cache.reset()
        assert torch.equal(model.generate(**call, **{CACHE: cache}), expected) and not late


def test_functions_of_a_call_whose_cache_is_gone():
    """As of an assistant, where the last call that this thread deferred has ended."""
    deferred_stops.expect(StaticCache(config=tiny_model("llama").config, max_cache_len=8), torch.device("cpu"))
    gc.collect()
    assert deferred_stops.Watched(dict)(stopping_criteria=[1]) == {"stopping_criteria": [1]}


def test_numbers_that_others_draw_are_not_drawn_again(graphs, late, monkeypatch):
    """The generator goes back where nobody else has used it, which several calls at the same time might have."""
    model, call = made("llama", "cpu")
    call |= {"do_sample": True, "eos_token_id": list(range(3, 30))}
    finish, drawn = deferred_stops._StopCheck.finish, []

    def others_draw(self):
        drawn.append(torch.rand(4))
        return finish(self)

    with attach_prefix(model, random_prefix(model)):
        with monkeypatch.context() as patch:
            patch.setattr(deferred_stops._StopCheck, "finish", others_draw)
            model.generate(**call)
        torch.multinomial(torch.ones(2, model.config.vocab_size), 1)  # what the step too many drew
        assert late == [1] and not torch.equal(torch.rand(4), drawn[0])
        others, states = [], []
        thread = threading.Thread(target=lambda: others.append(deferred_stops._StopCheck(call["input_ids"], 9, None, False)))
        thread.start()
        thread.join()
        for _ in range(2):
            torch.manual_seed(3)
            model.generate(**call)
            states.append(torch.get_rng_state())
            others.clear()  # another call that was under way has ended
        assert late == [1, 1, 1] and not torch.equal(*states)
        interrupted = deferred_stops._StopCheck(call["input_ids"], 9, None, False)  # as if its error were kept
        torch.manual_seed(3)
        model.generate(**call)
    assert interrupted and torch.equal(torch.get_rng_state(), states[1])


def test_events_are_recorded_on_the_device_of_the_tokens(graphs, late, monkeypatch):
    """Which need not be the current one."""
    current, recorded = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    class Event(Mock):
        def record(self):
            recorded.append(len(current))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch, "Event", Event)
    model, call = made("llama", "cpu")
    with attach_prefix(model, random_prefix(model)):
        model.generate(**call)
    assert recorded == [1] * 18


def test_encoder_decoders(graphs, late):
    model = tiny_encoder_decoder("t5")
    call = padded() | {"max_new_tokens": 18} | OPTIONS
    with attach_prefix(model, random_prefix(model)):
        tokens = model.generate(**call, **AT_ONCE)
        call |= {"eos_token_id": sorted({int(tokens[0, 4]), int(tokens[1, 6])}), "cache_implementation": "static"}
        expected = model.generate(**call, **AT_ONCE)
        assert torch.equal(model.generate(**call), expected) and late == [1]
        got = model.generate(**call, **WHOLE)
        assert torch.equal(got.sequences, expected) and late == [1], "its cache is returned"


def test_other_calls_are_as_they_were(graphs, late):
    """Caches that grow, beams, what a user has switched off, and the plain model with a cache of before."""
    model = tiny_model("llama")
    call = padded() | {"max_new_tokens": 18} | OPTIONS
    cache = StaticCache(config=model.config, max_cache_len=64)
    with attach_prefix(model, random_prefix(model)):
        for options in ({CACHE: DynamicCache(config=model.config)}, {"num_beams": 2}, AT_ONCE, {"max_new_tokens": 4}):
            model.generate(**call | options)
        assert not late
        model.generate(**call, **{CACHE: cache})
        assert late == [0]
    cache.reset()
    model.generate(**call, **{CACHE: cache}, **AT_ONCE)
    assert late == [0]
