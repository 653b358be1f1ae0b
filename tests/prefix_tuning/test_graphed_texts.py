"""generate_texts replays its decoding steps: batches of similar length share a cache and its graphs."""

import pytest

from prefix_tuning import accelerate_peft, attach_prefix, graphed_decoding
from prefix_tuning.generate import generate_texts
from support.generation import KINDS, attach
from support.models import random_prefix, tiny_model
from support.peft_models import peft_model
from support.tokenizer import tiny_tokenizer


def test_texts_of_a_prefix_of_peft(graphs, monkeypatch):
    """Each call of generate holds tensors of its own there, which are gone afterwards."""
    pytest.importorskip("peft")
    model, tokenizer = accelerate_peft(peft_model(tiny_model("llama"), 5)), tiny_tokenizer()
    prompts = ["abcd", "efgh", "ijkl", "mnop"]
    texts = generate_texts(model, tokenizer, prompts, max_new_tokens=18, batch_size=2)
    assert graphs.recorded == 1 + 2, "a step of each call"
    monkeypatch.setattr(graphed_decoding, "can_record", lambda model: False)
    assert texts == generate_texts(model, tokenizer, prompts, max_new_tokens=18, batch_size=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ("llama", "mistral"))
def test_batches_of_texts_share_a_cache_and_its_graphs(graphs, monkeypatch, family, kind):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    prompts = ["x", "Zz", "abc : 7", "one more", "the longest of the prompts", "y", "z"]
    names = ["short", "long", None] * 3
    attachment, _ = attach(model, kind)
    options = {"max_new_tokens": 18, "batch_size": 2} | ({} if kind == "prefix" else {"prefix_ids": names[: len(prompts)]})
    with attachment:
        texts = generate_texts(model, tokenizer, prompts, **options)
        recorded, replays = graphs.recorded, graphs.replays
        monkeypatch.setattr(graphed_decoding, "can_record", lambda model: False)
        assert texts == generate_texts(model, tokenizer, prompts, **options)
        monkeypatch.undo()
    assert recorded <= 1 + (3 if family == "llama" else 5), "of 4 batches; without padding on a CPU steps are of another kind"
    assert replays > 3 * 16


@pytest.mark.parametrize("options", ({"max_new_tokens": 15}, {"num_beams": 2, "max_new_tokens": 16}), ids=str)
def test_what_texts_are_written_without_graphs(graphs, options):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with attach_prefix(model, random_prefix(model)):
        generate_texts(model, tokenizer, ["x", "yy"], **options)
        model.generation_config.cache_implementation = "dynamic"
        generate_texts(model, tokenizer, ["x", "yy"], max_new_tokens=20)
    assert graphs.recorded == 0


@pytest.mark.gpu
@pytest.mark.parametrize("family", ("llama", "mistral", "peft"))
def test_on_a_gpu_texts_are_those_of_plain_steps(counted, monkeypatch, family):
    if family == "peft":
        pytest.importorskip("peft")
        model = accelerate_peft(peft_model(tiny_model("llama"), 5).cuda())
    else:
        model = tiny_model(family).cuda()
        attach_prefix(model, random_prefix(model))
    tokenizer = tiny_tokenizer()
    prompts = ["x", "Zz", "abc : 7", "one more", "the longest of the prompts", "y"]
    texts = generate_texts(model, tokenizer, prompts, max_new_tokens=18, batch_size=2)
    assert counted["replays"] > 3 * 12
    monkeypatch.setattr(graphed_decoding, "can_record", lambda model: False)
    assert texts == generate_texts(model, tokenizer, prompts, max_new_tokens=18, batch_size=2)
