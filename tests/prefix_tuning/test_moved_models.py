"""A model that is moved or converted while a prefix is attached, as Trainer moves one; "meta" stands for a GPU."""

from contextlib import nullcontext

import pytest
import torch

from prefix_tuning import Prefix, PrefixedModel, accelerate_peft, attach_prefix
from prefix_tuning.attach import Attachment
from support.encoder_decoders import tiny_encoder_decoder
from support.encoders import inputs_of, logits_of, tiny_encoder
from support.models import random_prefix, tiny_model
from support.peft_models import peft_model
from support.training import losses, make_trainer

PREFIX_LEN = 5


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # torch has none for "meta"


@pytest.fixture
def parameters_stay_the_same():
    """As they do on the way to a GPU; otherwise torch makes new ones for "meta"."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def tokens():
    return torch.ones(2, 4, dtype=torch.long, device="meta")


def moved(model, prefix):
    attachment = attach_prefix(model, prefix)
    PrefixedModel(model, prefix).to("meta")
    return attachment


@pytest.mark.parametrize("reparametrization", (None, "mlp"))
def test_the_prefix_is_where_the_model_is(reparametrization):
    model = tiny_model("llama")
    prefix = Prefix.for_model(model, PREFIX_LEN, reparametrization=reparametrization, seed=0)
    with moved(model, prefix):
        assert model(input_ids=tokens()).logits.is_meta


def test_attention_beside_a_prefix_is_where_the_model_is():
    model = tiny_encoder_decoder("bart")
    with moved(model, random_prefix(model, PREFIX_LEN, parts=("decoder",))):
        assert model(input_ids=tokens(), decoder_input_ids=tokens()).logits.is_meta


def test_a_rounded_prefix_is_where_the_model_is(monkeypatch, parameters_stay_the_same):
    monkeypatch.setattr(Attachment, "_rounds", lambda self: not torch.is_grad_enabled())
    model = tiny_model("llama").bfloat16()
    prefix = random_prefix(tiny_model("llama"), PREFIX_LEN)
    attachment = attach_prefix(model, prefix)
    with attachment, torch.no_grad():
        model(input_ids=torch.ones(2, 4, dtype=torch.long))
        PrefixedModel(model, prefix).to("meta")
        assert model(input_ids=tokens()).logits.is_meta
        held = attachment._layers["decoder"][0].key
        assert held.is_meta and held.dtype == torch.bfloat16


def test_a_peft_model_that_is_moved():
    pytest.importorskip("peft")
    model = accelerate_peft(peft_model(tiny_model("llama"), PREFIX_LEN)).to("meta")
    assert model(input_ids=tokens(), attention_mask=tokens()).logits.is_meta


def test_the_models_own_head_comes_along():
    model = tiny_encoder("bert")
    moved(model, Prefix.for_model(model, PREFIX_LEN)).detach()
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_models_own_head_has_the_models_dtype():
    """Not the dtype of the head in its place, which is float32 beside 16 bit."""
    model = tiny_encoder("bert").bfloat16()
    inputs, prefix = inputs_of(model), Prefix.for_model(model, PREFIX_LEN)
    with attach_prefix(model, prefix):
        assert {model.classifier.weight.dtype, model.classifier.bias.dtype} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with attach_prefix(model, prefix):
        model.float()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert logits_of(model(**inputs)).isfinite().all()


def test_what_is_done_to_the_model_is_not_done_to_the_head_in_its_place(tmp_path):
    model = tiny_encoder("bert")
    inputs, prefix = inputs_of(model), Prefix.for_model(model, PREFIX_LEN)
    with torch.no_grad():
        for parameter in prefix.heads["classifier"].values():
            parameter += 1 / 3
    before, own = ({name: p.clone() for name, p in of.items()} for of in (prefix.state_dict(), model.state_dict()))
    with attach_prefix(model, prefix):
        model.requires_grad_(False)
        model.load_state_dict({name: tensor / 2 for name, tensor in model.state_dict().items()})
        model.bfloat16()
        assert model.state_dict().keys() == own.keys()
        model(**inputs).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in prefix.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in prefix.state_dict().items())
    assert torch.equal(model.classifier.weight, (own["classifier.weight"] / 2).bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("name, parts", [("llama", None), ("bart", ("encoder", "cross"))])
def test_a_trainer_takes_the_model_along(name, parts, tmp_path):
    """From the CPU, where it was when the trainer was made; the MLP's keys and values and the parts left out come, too."""
    runs = []
    for on in ("cpu", "cuda"):
        model = tiny_model(name) if parts is None else tiny_encoder_decoder(name, vocab_size=128)
        prefix = Prefix.for_model(model, PREFIX_LEN, parts=parts, reparametrization="mlp", seed=0)
        trainer = make_trainer(tmp_path / on, model, prefix, use_cpu=on == "cpu")
        trainer.train()
        trainer.detach()
        assert {parameter.device.type for parameter in (*model.parameters(), *prefix.parameters())} == {on}
        runs.append(losses(trainer))
    torch.testing.assert_close(*map(torch.tensor, runs), atol=1e-3, rtol=1e-3)
