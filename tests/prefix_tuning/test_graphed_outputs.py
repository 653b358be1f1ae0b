"""An accelerated PeftModel's replayed training steps give the loss, logits and gradients of the steps as they are."""

import copy
import itertools
import pickle

import pytest
import torch
import transformers

from prefix_tuning import accelerate_peft, restore_peft
from prefix_tuning.data import IGNORED
from support.models import tiny_model
from support.peft_models import KINDS, PREFIX_LEN, twins
from support.training import DEVICES, ROWS, arguments, batch_of, losses

peft = pytest.importorskip("peft")
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
ON_A_GPU = 1e-3  # of ‖difference‖ / ‖expected‖: other kernels than the twin's, and every step carries their rounding on


def accelerated(family="llama", device="cpu", **kind):
    """(one whose steps are replayed, its twin, which runs them as they are)."""
    pair = twins(tiny_model(family).to(device), PREFIX_LEN, **kind)
    return tuple(accelerate_peft(model, cuda_graphs=graphed) for model, graphed in zip(pair, (True, False), strict=True))


def step(model, batch):
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return out, [parameter.grad for parameter in model.prompt_encoder.parameters() if parameter.requires_grad]


def assert_step(model, twin, batch):
    (out, grads), (expected, expected_grads) = step(model, batch), step(twin, batch)
    assert type(out) is type(expected) and out.logits.shape == expected.logits.shape and not out.logits.isnan().any()
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    assert len(grads) == len(expected_grads) > 0
    pairs = [(out.loss, expected.loss), (out.logits[real], expected.logits[real]), *zip(grads, expected_grads, strict=True)]
    for value, right in pairs:
        if out.logits.is_cuda:
            assert (value - right).norm() <= ON_A_GPU * right.norm()
        else:
            torch.testing.assert_close(value, right, **TOLERANCE)


def right_padding(batch):
    """A mask that hides the end of the second row, where no label stands any more."""
    mask = torch.ones_like(batch["input_ids"])
    mask[1, -3:] = 0
    return batch | {"attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, IGNORED)}


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ("llama", "gpt2", "gemma2", "opt"))
def test_steps_equal(device, family, kind):
    """Batches of several lengths, padded on the right, with and without a number of items, and an optimiser's steps."""
    model, twin = accelerated(family, device, **KINDS[kind])
    optimizers = [torch.optim.SGD(side.prompt_encoder.parameters(), lr=0.3) for side in (model, twin)]
    given = ({}, {"num_items_in_batch": 9}, {"num_items_in_batch": torch.tensor(7, device=device), "use_cache": False})
    for number, length in enumerate((13, 13, 15, 9, 13, 14, 13, 15, 10)):
        batch = right_padding(batch_of(4, length, number, device)) | given[number % 3]
        assert_step(model, twin, batch)
        for optimizer in optimizers:
            optimizer.step()
    graphs = model._prefix_tuning._graphs
    assert len(graphs._steps) == 2 and not graphs._refused


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_labels_on_padding_are_learnt_from_padding(device):
    """As where labels are input_ids: the mask and the positions of padding decide the loss, so the mask is part of the step."""
    model, twin = accelerated("gpt2", device)
    batch = right_padding(batch_of(4, 13, device=device))
    for labels in (batch["labels"], batch["input_ids"]):
        for _ in range(3):
            assert_step(model, twin, batch | {"labels": labels})
    assert [step.rows.attention_mask is None for step in model._prefix_tuning._graphs._steps.values()] == [True, False]


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("family", ("llama", "gpt2", "opt"))
def test_rows_padded_on_the_left(device, family):
    """Loss, logits and gradients, each batch with a mask of its own, of other lengths."""
    model, twin = accelerated(family, device)
    for number, length in enumerate((13, 15, 10, 13)):
        batch = batch_of(3, length, number, device)
        first = torch.tensor([[number % 4], [0], [2 + number % 3]], device=device)
        mask = (torch.arange(length, device=device) >= first).long()
        batch |= {"attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, IGNORED)}
        assert_step(model, twin, batch)
        assert_step(model, twin, batch)
    assert all(step.rows.attention_mask is not None for step in model._prefix_tuning._graphs._steps.values())
    assert model._prefix_tuning._graphs._steps and not model._prefix_tuning._graphs._refused


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_dropout_is_drawn_anew_and_follows_the_modules_modes(device):
    model, _ = accelerated("gpt2", device)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    batch = batch_of(4, 13, device=device)

    def different_losses(steps):  # but for rounding: a step that is not recorded has other lengths
        losses = sorted(step(model, batch)[0].loss.item() for _ in range(steps))
        return 1 + sum(larger - smaller > 1e-5 for smaller, larger in itertools.pairwise(losses))

    assert different_losses(4) == 1
    model.train()
    assert different_losses(4) == 4
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    assert different_losses(4) == 1
    assert len(model._prefix_tuning._graphs._steps) == 3


def test_a_second_backward_pass_needs_the_gradients_kept(graphs):
    model, _ = accelerated()
    batches = [batch_of(4, 13, seed) for seed in range(3)]
    first = [step(model, batch)[1] for batch in batches][-1]
    model.zero_grad()
    loss = model(**batches[-1]).loss
    loss.backward(retain_graph=True)
    loss.backward()
    for parameter, grad in zip(model.prompt_encoder.parameters(), first, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * grad, **TOLERANCE)
    with pytest.raises(RuntimeError, match="needs retain_graph=True"):
        loss.backward()
    assert graphs.replays == 3


def test_what_is_recorded(graphs):
    model, _ = accelerated()
    for number, length in enumerate((13, 15, 9, 13)):
        step(model, batch_of(4, length, number))
        assert graphs.recorded == min(number, 1)
    assert graphs.replays == 3


def test_outputs_that_are_still_held(graphs):
    """Several batches before their backward passes, which come in any order."""
    model, twin = accelerated()
    batches = [batch_of(4, 13, seed) for seed in (0, 0, 3, 6)]
    held, expected = ([side(**batch) for batch in batches] for side in (model, twin))
    assert graphs.replays == 3
    for out, right in zip(reversed(held), reversed(expected), strict=True):
        torch.testing.assert_close((out.loss, out.logits), (right.loss, right.logits), **TOLERANCE)
        out.loss.backward()
        right.loss.backward()
    for parameter, right in zip(model.prompt_encoder.parameters(), twin.prompt_encoder.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, right.grad, **TOLERANCE)


def test_labels_of_another_length_are_the_error_that_they_are(graphs):
    model, _ = accelerated()
    batch = batch_of(4, 13)
    for _ in range(2):
        step(model, batch)
    with pytest.raises(ValueError, match="batch_size"):
        model(input_ids=batch["input_ids"], labels=batch["labels"][:, 1:])


def test_only_the_loss_has_a_gradient(graphs):
    model, twin = accelerated()
    batch = batch_of(4, 13)
    for _ in range(2):
        out = model(**batch)
    assert graphs.recorded == 1
    assert (out.logits.argmax(-1) == twin(**batch).logits.argmax(-1)).all()
    with pytest.raises(NotImplementedError, match="logits: .* cuda_graphs=False"):
        (out.loss + out.logits.logsumexp(-1).mean()).backward()


NOT_RECORDED = (
    "no_grad", "positions", "dense mask", "cache", "tuple", "no labels", "hidden states", "embeddings", "head trained",
    "checkpointing", "hooks", "off", "float16", "no gradient",
)  # fmt: skip


@pytest.mark.parametrize("why", NOT_RECORDED)
def test_steps_that_are_not_recorded(graphs, why):
    model, twin = accelerated()
    batch = batch_of(4, 13)
    if why == "positions":
        batch["position_ids"] = torch.arange(13).expand(4, -1)
    elif why == "dense mask":
        batch["attention_mask"] = torch.ones(4, 1, 13, 13, dtype=torch.bool).tril()
    elif why in ("cache", "tuple", "hidden states"):
        batch[{"cache": "use_cache", "tuple": "return_dict", "hidden states": "output_hidden_states"}[why]] = why != "tuple"
    elif why == "no labels":
        del batch["labels"]
    elif why == "embeddings":
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    elif why == "head trained":
        model.base_model.lm_head.requires_grad_(True)
    elif why == "checkpointing":
        model.train().base_model.gradient_checkpointing_enable({"use_reentrant": False})
    elif why == "hooks":
        model.base_model.model.layers[0].register_forward_hook(lambda *args: None)
    elif why == "float16":
        model.base_model.half()
    elif why == "no gradient":
        model.prompt_encoder.requires_grad_(False)
    with torch.set_grad_enabled(why != "no_grad"):
        for _ in range(3):
            (twin if why == "off" else model)(**batch)
    assert graphs.recorded == 0


def test_a_model_with_further_outputs_runs_as_it_is(graphs, caplog):
    """A mixture of experts with a loss of its router."""
    model, twin = accelerated("mixtral")
    for side in (model, twin):
        side.config.output_router_logits = side.base_model.config.output_router_logits = True
    for _ in range(3):
        out, expected = model(**batch_of(4, 13)), twin(**batch_of(4, 13))
        torch.testing.assert_close(out.aux_loss, expected.aux_loss)
    assert graphs.recorded == 0 and len(caplog.records) == 1


def test_adapters_and_weights_that_change(graphs):
    """Another adapter, parameters elsewhere in memory and a disabled adapter: each gives what it gives without graphs."""
    model, twin = accelerated()
    batch = batch_of(4, 13)
    for side in (model, twin):
        torch.manual_seed(7)
        side.add_adapter("other", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for name in ("default", "other", "default"):
        for side in (model, twin):
            side.set_adapter(name)
        for _ in range(3):
            assert_step(model, twin, batch)
    assert graphs.recorded == 3
    with model.disable_adapter(), twin.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, twin(**batch).loss)
    for side in (model, twin):
        weight = side.prompt_encoder["default"].embedding.weight
        weight.data = weight.data * 2
    for _ in range(3):
        assert_step(model, twin, batch)
    assert graphs.recorded == 4
    for side in (model, twin):  # another parameter in the same memory
        embedding = side.prompt_encoder["default"].embedding
        embedding.weight = torch.nn.Parameter(embedding.weight.data)
    assert_step(model, twin, batch)
    assert graphs.recorded == 4
    restore_peft(model)
    assert "_prefix_tuning" not in vars(model)


def test_generation_between_steps(graphs):
    model, twin = accelerated()
    batch, options = batch_of(4, 13), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for _ in range(3):
        assert_step(model, twin, batch)
        prompts = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
        assert torch.equal(model.generate(**prompts, **options), twin.generate(**prompts, **options))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, twin.eval()(**batch).logits, **TOLERANCE)


@pytest.mark.parametrize("bf16", (False, True), ids=("float32", "mixed precision"))
def test_under_trainer(graphs, tmp_path, bf16):
    """Its losses, with accumulated steps, are those without graphs."""
    rows = [{name: tensor.tolist() for name, tensor in zip(("input_ids", "labels"), pair, strict=True)} for pair in _rows()]
    found = []
    for model in accelerated():
        given = arguments(tmp_path, max_steps=6, gradient_accumulation_steps=2, per_device_train_batch_size=2, bf16=bf16)
        trainer = transformers.Trainer(model, given, train_dataset=rows)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        found.append(losses(trainer))
    assert graphs.recorded and len(found[0]) == 6
    limits = {"atol": 2e-2, "rtol": 2e-2} if bf16 else TOLERANCE
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), **limits)


def _rows():
    batch = batch_of(len(ROWS), 16, seed=2)
    return zip(batch["input_ids"], batch["labels"], strict=True)


def test_copies_record_their_own(graphs):
    model, twin = accelerated()
    batch = batch_of(4, 13)
    for _ in range(2):
        step(model, batch)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.zero_()
    for _ in range(3):
        assert_step(copied, twin, batch)
    assert graphs.recorded == 2
    assert pickle.loads(pickle.dumps(model._prefix_tuning._graphs)) is None
