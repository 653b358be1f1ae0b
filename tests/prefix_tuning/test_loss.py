"""The loss on target tokens equals the one from all logits, and logits are built for those tokens alone."""

import pytest
import torch
from torch.nn import functional

from prefix_tuning import PrefixedModel, attach_prefix
from prefix_tuning.loss import sum_loss, target_loss, targets_of
from support.models import FAMILIES, VOCABULARY, random_prefix, tiny_model

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
TARGETS = 3 + 2 + 2  # of make_batch


def make_batch():
    """Padding on the right and on the left, and a row without targets; the label of a row's first token has no meaning."""
    input_ids = torch.randint(3, 100, (4, 8), generator=torch.Generator().manual_seed(1))
    labels, mask = torch.full_like(input_ids, -100), torch.ones_like(input_ids)
    labels[0, 5:] = input_ids[0, 5:]
    labels[1, 2:4] = input_ids[1, 2:4]
    mask[1, 4:] = 0
    labels[2, 6:] = input_ids[2, 6:]
    mask[2, :4] = 0
    labels[:, 0] = input_ids[:, 0]
    return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}


def loss_of_all_logits(model, input_ids, labels, attention_mask):
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("family", FAMILIES)
def test_value_and_prefix_gradients_equal_the_loss_of_all_logits(family):
    model, batch = tiny_model(family), make_batch()
    prefix = random_prefix(model)
    with attach_prefix(model, prefix):
        expected = loss_of_all_logits(model, **batch)
        expected_grads = torch.autograd.grad(expected, list(prefix.parameters()))
        loss, tokens = target_loss(model, **batch)
        grads = torch.autograd.grad(loss, list(prefix.parameters()))
    assert tokens == TARGETS and loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, **TOLERANCE)
        assert grad.abs().max() > 1e-4


@pytest.mark.parametrize("tied", (False, True), ids=("untied", "tied"))
@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_weight_gradients_equal_also_with_tied_embeddings(family, tied):
    model, batch = tiny_model(family, tie_word_embeddings=tied), make_batch()
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    weights = list(model.parameters())
    expected = torch.autograd.grad(loss_of_all_logits(model, **batch), weights)
    for grad, expected_grad in zip(torch.autograd.grad(target_loss(model, **batch)[0], weights), expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-4, rtol=1e-4)


def test_the_head_sees_target_tokens_alone():
    model, batch, seen = tiny_model("llama"), make_batch(), []
    hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append((args[0].detach(), out.shape)))
    target_loss(model, **batch)
    (states, logits_shape), = seen  # fmt: skip
    assert states.shape == (1, TARGETS, 64) and states.is_contiguous()
    assert logits_shape == (1, TARGETS, VOCABULARY)
    torch.testing.assert_close(states[0], torch.vstack([hidden[0, 4:7], hidden[1, 1:3], hidden[2, 5:7]]))


@pytest.mark.parametrize("surplus", (-2, 0, 3))
def test_targets_of_a_given_number(surplus):
    """The first ones; those that there are not count nothing, whatever stands in the last column."""
    labels = make_batch()["labels"]
    index, targets = targets_of(labels)
    assert len(index) == TARGETS and index.tolist() == [4, 5, 6, 9, 10, 21, 22]
    assert targets.tolist() == labels.flatten()[index + 1].tolist()
    given_index, given = targets_of(labels, TARGETS + surplus)
    found = min(TARGETS, TARGETS + surplus)
    assert given.tolist() == targets.tolist()[:found] + [-100] * (len(given) - found) and len(given) == TARGETS + surplus
    assert given_index.tolist()[:found] == index.tolist()[:found] and int(given_index.max()) < labels.numel()


def test_further_arguments_reach_the_model():
    model, batch = tiny_model("llama"), make_batch()
    plain = target_loss(model, **batch)[0]
    moved = target_loss(model, **batch, position_ids=torch.arange(8)[None] * 3)[0]
    assert (plain - moved).abs() > 1e-2
    torch.testing.assert_close(target_loss(model, **batch, position_ids=torch.arange(8)[None])[0], plain)
    batch.pop("attention_mask")
    assert torch.isfinite(target_loss(model, batch["labels"], input_ids=batch["input_ids"])[0])


def test_no_targets_is_no_loss():
    model, batch = tiny_model("llama"), make_batch()
    batch["labels"][:, 1:] = -100
    prefix = random_prefix(model)
    with attach_prefix(model, prefix):
        loss, tokens = target_loss(model, **batch)
        loss.backward()
    assert (loss.item(), tokens) == (0.0, 0)
    assert all(parameter.grad.abs().max() == 0 for parameter in prefix.parameters())


def test_the_model_is_as_before_also_after_an_error():
    model, batch = tiny_model("llama"), make_batch()
    before = model(input_ids=batch["input_ids"]).logits
    target_loss(model, **batch)
    assert not model.lm_head._forward_pre_hooks
    with pytest.raises(IndexError):
        target_loss(model, batch["labels"], input_ids=batch["input_ids"] + VOCABULARY)
    assert not model.lm_head._forward_pre_hooks
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, before)


def test_labels_that_are_not_the_tokens_are_refused():
    """Of another shape they would be those of other tokens."""
    model = tiny_model("llama")
    prefix, ids = random_prefix(model), torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with attach_prefix(model, prefix):
        trained = PrefixedModel(model, prefix)
        for labels in (ids[:, :3], ids[:1], torch.cat([ids, ids], 1)):
            for options in ({}, {"return_logits": True}):
                with pytest.raises(ValueError, match=r"labels: expected one for each token, \[2, 4\], got"):
                    trained(input_ids=ids, labels=labels, **options)
        for options in ({}, {"return_logits": True}):
            kept = trained(input_ids=ids, labels=ids[:, -2:], logits_to_keep=2, **options)["loss"]
            torch.testing.assert_close(kept, model(input_ids=ids, labels=ids[:, -2:], logits_to_keep=2).loss)
        for kept, options in ((2, {}), (2, {"return_logits": True}), (torch.tensor([1, 3]), {})):
            with pytest.raises(ValueError, match=r"labels: expected one for each token, \[2, 2\], got \[2, 4\]"):
                trained(input_ids=ids, labels=ids, logits_to_keep=kept, **options)
        for name in ("use_cache", "return_dict"):
            with pytest.raises(ValueError, match=f"{name}: expected none, as a training step says it itself, got True"):
                trained(input_ids=ids, labels=ids, **{name: True})


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="model: expected one with an output embedding of its own, got LlamaModel"):
        target_loss(tiny_model("llama").model, **make_batch())


def test_half_logits_are_summed_in_float32_also_under_autocast():
    logits, targets = torch.randn(400, VOCABULARY).to(torch.bfloat16), torch.randint(0, VOCABULARY, (400,))
    expected = -torch.log_softmax(logits.double(), -1)[torch.arange(400), targets].sum()
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum_loss(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, atol=1e-3, rtol=1e-6)
    model, batch = tiny_model("llama").to(torch.bfloat16), make_batch()
    assert target_loss(model, **batch)[0].dtype == torch.float32
