"""A copy of a model with a prefix attached, also one that was pickled, is a model of its own with its prefix attached."""

import copy
import pickle

import pytest
import torch
from transformers import LlamaForSequenceClassification

from prefix_tuning import attach_prefix, detach_prefix
from support.encoder_decoders import PARTS, labels, source, tiny_encoder_decoder
from support.generation import OPTIONS, attach, ids
from support.models import random_prefix, tiny_model

WAYS = {"copied": copy.deepcopy, "pickled": lambda model: pickle.loads(pickle.dumps(model))}


def ruin(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["prefix", "bank"])
def test_a_copy_calls_nothing_of_the_original(kind, way):
    model = tiny_model("llama")
    attachment, chosen = attach(model, kind)
    with torch.no_grad(), attachment:
        logits = model(ids(), **chosen(2)).logits
        tokens = model.generate(ids(), max_new_tokens=5, **OPTIONS, **chosen(2))
        copied = WAYS[way](model)
    ruin(model)
    assert torch.equal(copied(ids(), **chosen(2)).logits, logits)
    assert torch.equal(copied.generate(ids(), max_new_tokens=5, **OPTIONS, **chosen(2)), tokens)
    detach_prefix(copied)
    plain = tiny_model("llama")
    assert torch.equal(copied(ids()).logits, plain(ids()).logits)
    assert torch.equal(copied.generate(ids(), max_new_tokens=5, **OPTIONS), plain.generate(ids(), max_new_tokens=5, **OPTIONS))
    attach(copied, kind)[0].detach()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["bart", "t5", "whisper"])
def test_encoder_decoders(family, way):
    model = tiny_encoder_decoder(family)
    prefix = random_prefix(model, parts=PARTS)
    prefix.position_offset = 0 if family == "whisper" else 3
    inputs = source(model) | {"decoder_input_ids": labels().clamp(min=0)}
    with torch.no_grad(), attach_prefix(model, prefix) as attachment:
        expected = model(**inputs).logits
        copied = WAYS[way](model)
        attachment.enable(False)
        assert torch.equal(copied(**inputs).logits, expected)


@pytest.mark.parametrize("way", WAYS)
def test_heads(way):
    model = LlamaForSequenceClassification(tiny_model("llama").config).eval()
    with torch.no_grad(), attach_prefix(model, random_prefix(model)):
        expected = model(ids()).logits
        copied = WAYS[way](model)
    ruin(model)
    assert torch.equal(copied(ids()).logits, expected)
