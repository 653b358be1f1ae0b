"""What was made or done within torch.inference_mode serves outside of it too, where autograd saves it."""

import pytest
import torch

from prefix_tuning import Prefix, accelerate_peft, attach_prefix
from support.encoder_decoders import source, tiny_encoder_decoder
from support.generation import ids
from support.models import random_prefix, tiny_model
from support.peft_models import KINDS, peft_model


def test_a_prefix_that_is_made_there(tmp_path):
    model = tiny_model("llama")
    random_prefix(model).save(tmp_path)
    with torch.inference_mode():
        made = [random_prefix(model), Prefix.from_text(model, None, input_ids=[4, 5, 6]), Prefix.load(tmp_path)]
    for prefix in made:
        with attach_prefix(model, prefix):
            model(input_ids=ids(), labels=ids()).loss.backward()
        assert all((parameter.grad is not None) is parameter.requires_grad for parameter in prefix.parameters())


@pytest.mark.parametrize("reparametrization", (None, "mlp"))
def test_a_prefix_that_is_switched_off_or_its_layers_were_made_there(reparametrization):
    model = tiny_model("llama")
    model(input_ids=ids(), labels=ids()).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    prefix = Prefix.for_model(model, 4, reparametrization=reparametrization, hidden_size=8, seed=1)
    for inside in (True, False):
        model.zero_grad()
        with attach_prefix(model, prefix) as attachment:
            with torch.inference_mode():
                model(input_ids=ids())
                if inside:
                    attachment.enable(False)
            attachment.enable(False)
            model(input_ids=ids(), labels=ids()).loss.backward()
        grads = [parameter.grad for parameter in model.parameters()]
        torch.testing.assert_close(grads, expected, atol=5e-5, rtol=1e-5)  # with AVX-512 they round apart


def test_an_encoder_decoder_with_one_part():
    model = tiny_encoder_decoder("bart")
    prefix = Prefix.for_model(model, 4, parts=("decoder",), seed=1)
    with torch.inference_mode():
        attachment = attach_prefix(model, prefix)
    model.requires_grad_(True)
    with attachment:
        model(**source(model), labels=ids(2, 5).clamp(max=90)).loss.backward()
    assert all(parameter.grad is not None for parameter in prefix.parameters())


@pytest.mark.parametrize("kind", ("flat", "projection"))
def test_a_model_under_an_accelerated_one(kind):
    model = accelerate_peft(peft_model(tiny_model("llama"), **KINDS[kind]))
    with torch.inference_mode():
        model(input_ids=ids())
    under = model.get_base_model().requires_grad_(True)
    under(input_ids=ids(), labels=ids()).loss.backward()
    assert all(parameter.grad is not None for parameter in under.parameters())
