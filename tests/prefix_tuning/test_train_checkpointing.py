"""Gradient checkpointing under PrefixTrainer recomputes layers, changes nothing and is undone."""

import copy

import pytest
import torch

from prefix_tuning import PrefixedModel, attach_prefix
from support.models import random_prefix, tiny_model
from support.prefixes import mlp_prefix
from support.training import (
    CHECKPOINTING,
    PREFIX_LEN,
    ROWS,
    assert_prefixes_close,
    count_forwards,
    losses,
    make_trainer,
    trained,
)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({CHECKPOINTING: False}, [2, 2, 2]),
        ({CHECKPOINTING: True}, [4, 4, 4]),
        ({CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False, "preserve_rng_state": False}}, [4, 4, 4]),
        ({CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"every_n_layers": 2}}, [4, 2, 4]),
    ],
    ids=("stored", "recomputed", "options", "every second layer"),
)
@pytest.mark.parametrize(("family", "reparametrization"), [("gpt2", None), ("llama", "mlp")])
def test_gradient_checkpointing_recomputes_layers_and_changes_nothing(family, reparametrization, options, expected, tmp_path):
    model = tiny_model(family)
    prefix = random_prefix(model, PREFIX_LEN) if reparametrization is None else mlp_prefix(model)
    plain = trained(tmp_path, model, copy.deepcopy(prefix), max_steps=2)
    counts = count_forwards(model)
    trainer = trained(tmp_path, model, prefix, max_steps=2, **options)
    assert counts == expected
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-6)
    assert_prefixes_close(trainer.prefix, plain.prefix, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("between", ["model", "trained", "generate", "enable"])
@pytest.mark.parametrize("make", [random_prefix, mlp_prefix])
@pytest.mark.parametrize("family", ["llama", "llama4_temperature"])
def test_a_pass_without_gradients_before_the_backward_pass_changes_nothing(family, make, between):
    """Layers are recomputed with what the prefix was for the pass that is differentiated."""
    ids, grads = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), []
    for comes in (False, True):
        model = tiny_model(family)
        prefix = make(model)
        with attach_prefix(model, prefix) as attachment:
            trained = PrefixedModel(model, prefix)
            trained.activation_checkpointing_enable()
            loss = trained.train()(input_ids=ids, labels=ids)["loss"]
            with torch.no_grad():
                if comes and between == "model":
                    model(ids + 1)
                elif comes and between == "trained":
                    trained(input_ids=ids + 1, labels=ids)
                elif comes and between == "generate":
                    model.generate(ids, max_new_tokens=3, pad_token_id=0)
                elif comes:
                    attachment.enable(False)
                    model(ids + 1)
                    attachment.enable(True)
            loss.backward()
        grads.append([parameter.grad for parameter in prefix.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_a_pass_that_failed_leaves_nothing_behind():
    model = tiny_model("llama")
    prefix, ids = random_prefix(model), torch.tensor([[5, 6, 7]])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = model(ids).logits
    with attach_prefix(model, prefix) as attachment, torch.no_grad():
        with pytest.raises(RuntimeError):
            model(ids, position_ids=torch.zeros(1, 2, dtype=torch.long))
        assert not attachment._passes_beside
        attachment.enable(False)
        for _ in range(2):
            torch.testing.assert_close(model(ids).logits, expected)


def test_compiled_where_checkpointing_is_on():
    model = tiny_model("llama")
    ids = torch.tensor([[5, 6, 7]])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with attach_prefix(model, random_prefix(model)), torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)


def test_detach_undoes_gradient_checkpointing(tmp_path):
    model = tiny_model("llama")
    layers = model.base_model.layers
    layers[1].gradient_checkpointing = False  # an own attribute, to be found again; the others have their class's
    before = [vars(layer).copy() for layer in layers]
    trainer = make_trainer(tmp_path, model, max_steps=1, **{CHECKPOINTING: True})
    trainer.train()
    trainer.train()
    assert all(layer.gradient_checkpointing for layer in layers)
    trainer.detach()
    trainer.detach()
    assert [vars(layer) for layer in layers] == before
    counts = count_forwards(model)
    ids = torch.ones(1, 4, dtype=torch.long)
    with attach_prefix(model, trainer.prefix):
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert counts == [1, 1, 1]


def test_evaluation_recomputes_nothing(tmp_path):
    model = tiny_model("llama")
    trainer = make_trainer(tmp_path, model, max_steps=1, options={"eval_dataset": ROWS[:4]}, **{CHECKPOINTING: True})
    trainer.train()
    counts = count_forwards(model)
    trainer.evaluate()
    assert counts == [1, 1, 1]
    assert not any(module.training for module in trainer.model.modules())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"use_reentrant": True}, ValueError, "use_reentrant: expected False"),
        ({"every_n_layers": 0}, ValueError, "every_n_layers: expected at least 1, got 0"),
        ({"offload": True}, NotImplementedError, "offload"),
    ],
)
def test_kinds_of_checkpointing_that_are_refused(options, error, message, tmp_path):
    trainer = make_trainer(tmp_path, **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": options})
    with pytest.raises(error, match=message):
        trainer.train()
