"""Encoder-decoders with prefixes of encoder, decoder and cross-attention equal their eager attention over expanded prefixes."""


import pytest
import torch

from prefix_tuning import Prefix, attach_prefix
from support.encoder_decoders import FAMILIES, PARTS, labels, parts_of, source, tiny_encoder_decoder
from support.expanded_prefix import expanded_prefix
from support.models import randomize

PREFIX_LEN = 5
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
SUBSETS = (*((part,) for part in PARTS), PARTS)
# Random models repeat themselves; where no token may come twice, each of the eight tells something.
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "no_repeat_ngram_size": 1}


def random_parts(model, parts=PARTS, **options):
    return randomize(Prefix.for_model(model, PREFIX_LEN, parts=parts, seed=0, **options))


def with_positions(model, inputs):
    """Where a family takes positions, attached prefixes count padded rows from their first token; the reference is told."""
    if model.config.model_type != "t5gemma":
        return inputs
    return inputs | {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny_encoder_decoder(request.param)


@pytest.mark.parametrize("parts", SUBSETS, ids="-".join)
def test_logits_loss_and_gradients_equal_expanded_prefixes(model, parts):
    prefix = random_parts(model, parts)
    assert (set(prefix.parts), prefix.position_offset) == (set(parts), 0)
    for side in (None,) if model.config.model_type == "whisper" else (None, "left", "right"):
        inputs = source(model, side=side) | {"labels": labels()}
        with expanded_prefix(model, prefix, parts_of(model)):
            expected = model(**with_positions(model, inputs))
            expected_grads = torch.autograd.grad(expected.loss, list(prefix.parameters()))
        with attach_prefix(model, prefix):
            got = model(**inputs)
            grads = torch.autograd.grad(got.loss, list(prefix.parameters()))
            torch.testing.assert_close(got.logits, expected.logits, **TOLERANCE)
        torch.testing.assert_close(got.loss, expected.loss, **TOLERANCE)
        torch.testing.assert_close(grads, expected_grads, atol=1e-6, rtol=1e-4)
        assert min(grad.abs().max() for grad in grads) > 1e-4


def test_each_part_alone_is_seen_and_detach_restores(model):
    prefix, inputs = random_parts(model), source(model, side="right") | {"labels": labels()}
    modules = {module for modules in parts_of(model).values() for module in modules}
    configs = {module: module.config for module in model.modules() if hasattr(module, "config")}
    before = model(**inputs).logits
    with attach_prefix(model, prefix):
        whole = model(**inputs).logits
        for part in PARTS:
            saved = {name: parameter.clone() for name, parameter in prefix.named_parameters()}
            with torch.no_grad():
                for pair in prefix.layers(part):
                    for tensor in pair:
                        tensor.zero_()
            assert (model(**inputs).logits - whole).abs().max() > 1e-2, part
            prefix.load_state_dict(saved)
        assert torch.equal(model(**inputs).logits, whole)
    assert (whole - before).abs().max() > 1e-2
    assert all(module.config is config for module, config in configs.items())
    assert not any("layer_prefix" in vars(module) for module in modules)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("options", ({}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}), ids=str)
def test_generated_tokens_equal_expanded_prefixes(model, options):
    prefix, inputs = random_parts(model), source(model, side="right")
    eager = {name: value for name, value in options.items() if name == "num_beams"}
    with expanded_prefix(model, prefix, parts_of(model)):
        expected = model.generate(**inputs, **GREEDY, **eager)
    with attach_prefix(model, prefix):
        got = model.generate(**inputs, **GREEDY, **options)
    assert torch.equal(got, expected)
    assert len(got[0].unique()) >= 8


@pytest.mark.parametrize("parts", (("encoder",), ("cross",)), ids="-".join)
def test_each_subset_generates(model, parts):
    prefix, inputs = random_parts(model, parts), source(model)
    with expanded_prefix(model, prefix, parts_of(model)):
        expected = model.generate(**inputs, **GREEDY, num_beams=2)
    with attach_prefix(model, prefix):
        got = model.generate(**inputs, **GREEDY, num_beams=2)
    assert torch.equal(got, expected)
