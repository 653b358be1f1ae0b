"""Prefix.from_text: the keys and values that the model caches for a text."""

import pytest
import torch

from prefix_tuning import Prefix, attach_prefix
from support.models import FAMILIES, random_prefix, tiny_model
from support.prefixes import TOLERANCE, assert_layers, cached
from support.tokenizer import CHAT_TEMPLATE, tiny_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize("family", FAMILIES)
def test_from_text_gives_what_the_model_caches(family):
    model, tokenizer = tiny_model(family), tiny_tokenizer(bos=True, chat_template=CHAT_TEMPLATE)
    text = "longer than a window"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and len(ids) > 8
    expected = cached(model, ids)
    for prefix in (
        Prefix.from_text(model, tokenizer, text),
        Prefix.from_text(model, None, input_ids=ids),
        Prefix.from_text(model, tokenizer, input_ids=torch.tensor(ids)),
        Prefix.from_text(model, tokenizer, input_ids=torch.tensor([ids], dtype=torch.int32)),
    ):
        assert_layers(prefix.layers(), expected, **TOLERANCE)
        assert prefix.prefix_len == prefix.position_offset == len(ids)
        assert not any(p.requires_grad for p in prefix.parameters())


def test_from_text_of_messages_has_no_generation_prompt():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(bos=True, chat_template=CHAT_TEMPLATE)
    ids = tokenizer("user: hi</s>\nassistant: yes</s>\n", add_special_tokens=False)["input_ids"]
    assert_layers(Prefix.from_text(model, tokenizer, messages=MESSAGES).layers(), cached(model, ids), **TOLERANCE)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
def test_from_text_keeps_the_models_dtype_and_name(dtype):
    model = tiny_model("qwen3").to(dtype)
    model.config.name_or_path = "someone/tiny"
    prefix = Prefix.from_text(model, None, input_ids=[5, 6, 7])
    assert {p.dtype for p in prefix.parameters()} == {dtype} and prefix.base_model == "someone/tiny"
    assert_layers(prefix.layers(), cached(model, [5, 6, 7]))


def test_from_text_runs_without_dropout_and_restores_every_mode(monkeypatch):
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    expected = cached(model, [5, 6, 7])
    model.train()
    model.transformer.h[1].mlp.eval()
    modes = [module.training for module in model.modules()]
    assert_layers(Prefix.from_text(model, None, input_ids=[5, 6, 7]).layers(), expected, **TOLERANCE)
    assert [module.training for module in model.modules()] == modes

    def fail(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(model.transformer.h[2], "forward", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        Prefix.from_text(model, None, input_ids=[5, 6, 7])
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v3"])
def test_autocast_rounds_nothing(family):
    model = tiny_model(family)

    def made():
        start = Prefix.for_model(model, 4, init="text", text="name", tokenizer=tiny_tokenizer())
        return start.layers() + Prefix.from_text(model, None, input_ids=[5, 6, 7]).layers()

    expected = made()
    with torch.autocast("cpu", torch.bfloat16):
        assert_layers(made(), expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    "options, match",
    (
        ({}, "text, messages, input_ids: expected exactly one, got none"),
        ({"text": "a", "messages": MESSAGES}, "expected exactly one, got text and messages"),
        ({"text": "a", "input_ids": [5]}, "expected exactly one, got text and input_ids"),
        ({"text": "a", "tokenizer": None}, "tokenizer: expected the one for text, got None"),
        ({"messages": MESSAGES, "tokenizer": None}, "tokenizer: expected the one for messages, got None"),
        ({"text": ""}, "text: expected one token or more, got ''"),
        ({"text": ["a", "b"]}, "text: expected one text, got list"),
        ({"input_ids": []}, "of shape \\[0\\]"),
        ({"input_ids": [[5, 6], [7, 8]]}, "of shape \\[2, 2\\]"),
        ({"input_ids": [5.0]}, "got torch.float32"),
        ({"input_ids": [True, False]}, "got torch.bool"),
        ({"input_ids": [5, 128]}, "expected 0 … 127, got 5 … 128: is it another tokenizer's"),
        ({"input_ids": [-1, 5]}, "expected 0 … 127, got -1 … 5"),
        ({"input_ids": [5] * 65}, "expected at most the model's 64 positions, got 65 tokens"),
    ),
    ids=str,
)
def test_from_text_refuses(options, match):
    with pytest.raises((TypeError, ValueError), match=match):
        Prefix.from_text(tiny_model("gpt2"), **{"tokenizer": tiny_tokenizer(), **options})


def test_an_attached_prefix_would_be_seen_by_the_text():
    model = tiny_model("llama")
    with attach_prefix(model, random_prefix(model)):
        with pytest.raises(ValueError, match="model: it has a prefix attached"):
            Prefix.from_text(model, None, input_ids=[5, 6, 7])
        with pytest.raises(ValueError, match="model: it has a prefix attached"):
            Prefix.for_model(model, 3, init="text", text="words", tokenizer=tiny_tokenizer())
    assert_layers(Prefix.from_text(model, None, input_ids=[5, 6, 7]).layers(), cached(model, [5, 6, 7]))


def test_a_model_that_caches_other_shapes_than_its_config_says():
    model = tiny_model("llama")
    model.config.num_key_value_heads = 4
    with pytest.raises(ValueError, match="model: expected 3 cached tokens, 3 layers, 4 kv_heads.*, got 3 tokens, 3 layers, 2"):
        Prefix.from_text(model, None, input_ids=[5, 6, 7])
