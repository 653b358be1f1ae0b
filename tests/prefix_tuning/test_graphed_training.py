"""Replayed training steps give the losses and gradients of the steps as they are. Graphs are emulated where no GPU is."""

import contextlib
import copy
import itertools

import numpy as np
import pytest
import torch

from prefix_tuning import Prefix, PrefixBank, attach_prefix, cuda_graphs
from prefix_tuning.data import IGNORED
from prefix_tuning.graphed_training import MOST_GRAPHS, rounded
from prefix_tuning.prefixed_model import PrefixedModel
from support.models import random_prefix, tiny_model
from support.training import DEVICES, ROWS, batch_of, losses, silent_trainer

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
SIZES = ((4, 13), (4, 13), (4, 15), (4, 9), (4, 13), (4, 10), (2, 13), (4, 14))  # of batches: rows, tokens


def step(trained, batch, autocast=False, **options):
    """Loss and gradients, which are added to what is there."""
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=autocast):
        loss = trained(**batch, **options)["loss"]
    loss.backward()
    return loss.detach(), [None if p.grad is None else p.grad.clone() for p in trained.prefix.parameters()]


def without_graphs(trained):
    other = copy.copy(trained)
    other.graphs = None
    return other


def assert_step(trained, batch):
    """The step is that without graphs; its gradients are left."""
    trained.prefix.zero_grad()
    expected, expected_grads = step(without_graphs(trained), batch)
    trained.prefix.zero_grad()
    loss, grads = step(trained, batch)
    for value, right in zip([loss, *grads], [expected, *expected_grads], strict=True):
        torch.testing.assert_close(value, right, **TOLERANCE)


def test_steps_are_recorded_on_the_device_of_the_prefix(graphs, monkeypatch):
    """Which need not be the current one."""
    current = []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    class Graph(graphs):
        def __init__(self, *arguments):
            assert current == list(prefix.parameters())[:1]
            super().__init__(*arguments)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(cuda_graphs, "Graph", Graph)
    model = tiny_model("llama")
    with attach_prefix(model, prefix := random_prefix(model)):
        trained = PrefixedModel(model, prefix)
        for _ in range(2):
            step(trained, batch_of(2, 9))
        assert len(trained.graphs._steps) == 1


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("mlp", (False, True), ids=("prefix", "reparametrised"))
@pytest.mark.parametrize("family", ("llama", "gpt2", "mistral", "gemma2", "opt", "bloom"))
def test_steps_equal(device, family, mlp):
    """Every batch of an odd length and its like, with an optimiser's step between them."""
    model = tiny_model(family).to(device)
    prefix = Prefix.for_model(model, 5, seed=0, reparametrization="mlp" if mlp else None).to(device)
    with attach_prefix(model, prefix):
        trained = PrefixedModel(model, prefix)
        optimizer = torch.optim.AdamW(prefix.parameters(), lr=1e-2)
        for number, size in enumerate(SIZES):
            batch = batch_of(*size, seed=number, device=device)
            if number % 2:  # counted by who calls, too
                batch["num_targets"] = int((batch["labels"][:, 1:] != IGNORED).sum())
            assert_step(trained, batch)
            optimizer.step()
            optimizer.zero_grad()
        assert len(trained.graphs._steps) == 2 and not trained.graphs._refused


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("mlp", (False, True), ids=("prefix", "reparametrised"))
@pytest.mark.parametrize("module", ("lm_head", "norm"))
def test_a_head_is_trained_in_every_step(device, module, mlp):
    model = tiny_model("llama", tie_word_embeddings=False).to(device)
    prefix = Prefix.for_model(model, 5, seed=0, reparametrization="mlp" if mlp else None, modules_to_save=[module])
    with attach_prefix(model, prefix):
        trained = PrefixedModel(model, prefix)
        optimizer = torch.optim.AdamW(prefix.parameters(), lr=1e-2)
        for number in range(4):
            assert_step(trained, batch_of(2, 9, seed=number, device=device))
            assert all(parameter.grad.abs().max() > 0 for parameter in prefix.parameters())
            optimizer.step()
        assert len(trained.graphs._steps) < 4 and trained.graphs._steps and not trained.graphs._refused
    assert all(isinstance(parameter, torch.nn.Parameter) for parameter in model.parameters())


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_distillation_steps_equal(device):
    """With a teacher; one that names another number of tokens, and a step without one, are other steps."""
    model = tiny_model("llama").to(device)
    prefix = Prefix.for_model(model, 5, seed=0).to(device)
    with attach_prefix(model, prefix):
        trained = PrefixedModel(model, prefix)
        for number, size in enumerate(SIZES + SIZES[:2]):
            batch = batch_of(*size, seed=number if number < len(SIZES) else 0, device=device)
            wanted = (batch["labels"][:, 1:] != IGNORED).sum()
            probs, ids = torch.randn(wanted, 128, device=device).softmax(-1).topk(9 if number < len(SIZES) else 3)
            assert_step(trained, batch | {"teacher_ids": ids, "teacher_probs": probs})
        assert len(trained.graphs._steps) == 3 and not trained.graphs._refused
        assert_step(trained, batch_of(*SIZES[0], device=device))
        assert_step(trained, batch_of(*SIZES[0], device=device))
        assert len(trained.graphs._steps) == 4
        with pytest.raises(ValueError, match=r"teacher_ids, teacher_probs: expected \[\d+, k\]"):
            step(trained, batch | {"teacher_ids": ids[1:], "teacher_probs": probs[1:]})
        for _ in range(3):  # summed in float32 also where autocast is on
            assert step(trained, batch | {"teacher_ids": ids, "teacher_probs": probs}, autocast=True)[0].dtype == torch.float32
        assert len(trained.graphs._steps) == 5


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("mlp", (False, True), ids=("prefix", "reparametrised"))
def test_under_autocast(device, mlp):
    """A parameter that an optimiser changes is cast anew in every replay; without autocast the same shape is another step."""
    model = tiny_model("llama").to(device)
    prefix = Prefix.for_model(model, 5, seed=0, reparametrization="mlp" if mlp else None).to(device)
    with attach_prefix(model, prefix):
        trained = PrefixedModel(model, prefix)
        optimizer = torch.optim.SGD(prefix.parameters(), lr=0.3)
        seen = []
        for number in range(8):
            batch, on = batch_of(4, 13, seed=3 * number, device=device), number % 4 < 2
            expected, expected_grads = step(without_graphs(trained), batch, on)
            optimizer.zero_grad()
            loss, grads = step(trained, batch, on)
            tolerance = {"atol": 2e-2, "rtol": 2e-2} if on else TOLERANCE
            torch.testing.assert_close(loss, expected, **tolerance)
            for grad, expected_grad in zip(grads, expected_grads, strict=True):
                limit = 0.15 if on else 1e-4  # bfloat16 errs by 0.09
                assert (grad - expected_grad).norm() <= limit * expected_grad.norm() + 1e-6
            seen.append(float(loss))
            optimizer.step()
            optimizer.zero_grad()
        assert len(trained.graphs._steps) == 2 and len(set(seen)) == 8


def test_what_is_recorded(graphs):
    """A shape at its second time; lengths that are rounded alike are one shape."""
    model = tiny_model("llama")
    prefix = random_prefix(model)
    with attach_prefix(model, prefix):
        trained = PrefixedModel(model, prefix)
        for number, (size, recorded) in enumerate(zip(SIZES, (0, 1, 1, 1, 1, 1, 1, 1), strict=True)):
            step(trained, batch_of(*size, seed=3 * number))
            assert graphs.recorded == recorded, size
        trained.graphs.clear()
        step(trained, batch_of(4, 13))
        assert graphs.recorded == 1


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("padded", ("right", "left", "between"))
def test_a_mask_that_hides_padding_on_the_right_alone_is_left_out(device, padded):
    """As a loop of one's own gives it, on the device; any other is part of the step."""
    model = tiny_model("gpt2").to(device)
    prefix = random_prefix(model).to(device)
    mask = torch.ones(4, 13, dtype=torch.long)
    mask[1, {"right": slice(11, None), "left": slice(2), "between": slice(3, 4)}[padded]] = 0
    with attach_prefix(model, prefix):
        trained = PrefixedModel(model, prefix)
        for number in range(3):
            batch = batch_of(4, 13, number, device) | {"attention_mask": mask.to(device)}
            batch["labels"][batch["attention_mask"] == 0] = IGNORED
            assert_step(trained, batch)
        (recorded,) = trained.graphs._steps.values()
        assert (recorded.rows.attention_mask is None) == (padded == "right")


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("family", ("llama", "gpt2", "mistral", "gemma2", "opt", "bloom"))
def test_rows_padded_on_the_left(device, family):
    assert_left_padding(tiny_model(family).to(device))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ("mistral", "gemma2"))
def test_on_a_gpu_a_prefix_slides_out_of_the_window_of_rows_padded_on_the_left(family):
    """On a CPU the host looks where rows begin, before it is recorded."""
    assert_left_padding(tiny_model(family).cuda(), prefix_window="peft")


def assert_left_padding(model, **options):
    """Each batch with a mask of its own, of other lengths, beside batches of that shape without one."""
    device = model.device
    prefix = random_prefix(model).to(device)
    with attach_prefix(model, prefix, **options):
        trained = PrefixedModel(model, prefix)
        for number, (rows, length) in enumerate(((3, 13), (3, 15), (3, 10), (3, 13), (3, 16))):
            batch = batch_of(rows, length, number, device)
            first = torch.tensor([[number % 4], [0], [2 + number % 3]], device=device)
            mask = (torch.arange(length, device=device) >= first).long()
            labels = batch["input_ids"].where((mask == 1) & (torch.arange(length, device=device) > length // 2), IGNORED)
            masked = batch | {"attention_mask": mask.bool() if number == 3 else mask, "labels": labels}
            assert_step(trained, masked)
            assert_step(trained, batch)
            assert_step(trained, {name: tensor.flip(0) for name, tensor in masked.items()})
        kinds = [recorded.rows.attention_mask is None for recorded in trained.graphs._steps.values()]
        assert not trained.graphs._refused and set(kinds) == {False, True}


def test_a_mask_with_labels_on_what_it_hides_is_heeded(graphs):
    """The loss is that of the model's logits behind the mask, at every step."""
    model = tiny_model("gpt2")
    prefix = random_prefix(model)
    batch = batch_of(2, 13) | {"attention_mask": torch.ones(2, 13, dtype=torch.long)}
    batch["attention_mask"][1, 9:], batch["labels"] = 0, batch["input_ids"]
    with attach_prefix(model, prefix):
        expected = model(**batch).loss
        trained = PrefixedModel(model, prefix)
        for _ in range(3):
            torch.testing.assert_close(step(trained, batch)[0], expected.detach(), **TOLERANCE)
        (recorded,) = trained.graphs._steps.values()
        assert recorded.rows.attention_mask is not None


def test_rows_longer_than_the_model_has_positions_for_keep_their_mask(graphs):
    """Padding takes no positions then."""
    model = tiny_model("gpt2")
    prefix = random_prefix(model)
    longest = model.config.max_position_embeddings - prefix.position_offset
    with attach_prefix(model, prefix):
        trained = PrefixedModel(model, prefix)
        batch = batch_of(2, longest + 3)
        batch["attention_mask"] = (torch.arange(longest + 3) < longest).long().expand(2, -1)
        batch["labels"][batch["attention_mask"] == 0] = IGNORED
        batch["labels"][:, 5] = 3
        for _ in range(3):
            assert step(trained, batch)[0].isfinite()
        assert not trained.graphs._steps


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_targets": 9}, ValueError, "num_targets: expected 12, the labels from each row's second token on, got 9"),
        ({"num_targets": -1}, ValueError, "num_targets: expected at least 0, got -1"),
        ({"num_targets": 12.0}, TypeError, "num_targets: expected an int, got 12.0"),
        (
            {"num_targets": 12, "labels": None},
            ValueError,
            "num_targets: expected labels beside it, and a causal model, got no labels",
        ),
    ],
    ids=str,
)
def test_a_number_of_targets_that_is_none_is_refused(changes, error, message):
    model = tiny_model("llama")
    batch = batch_of(3, 9) | changes
    with attach_prefix(model, prefix := random_prefix(model)), pytest.raises(error, match=message):
        PrefixedModel(model, prefix)(**batch)


def test_a_number_of_targets_of_numpy():
    model = tiny_model("llama")
    with attach_prefix(model, prefix := random_prefix(model)):
        trained = PrefixedModel(model, prefix)
        losses = [trained(**batch_of(3, 9), num_targets=number)["loss"] for number in (12, np.int64(12))]
    assert torch.equal(*losses)


def test_a_model_without_a_prefix_is_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="model: expected the prefix to be attached, got no prefix"):
        PrefixedModel(model, random_prefix(model))
    for attached in (random_prefix(model), PrefixBank({"a": random_prefix(model)})):
        with (
            attach_prefix(model, attached),
            pytest.raises(ValueError, match="model: expected the prefix to be attached, got another prefix"),
        ):
            PrefixedModel(model, random_prefix(model))


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_accumulation_and_losses_that_are_still_held(device):
    """Gradients of several batches add up, in any order of backward(); an old loss keeps its own."""
    model = tiny_model("llama").to(device)
    prefix = random_prefix(model).to(device)
    batches = [batch_of(4, 13, seed, device) for seed in (0, 3, 6, 9)]
    with attach_prefix(model, prefix):
        trained = PrefixedModel(model, prefix)
        expected = [step(without_graphs(trained), batch, num_items_in_batch=7)[1] for batch in batches][-1]
        prefix.zero_grad()
        held = [trained(**batch, num_items_in_batch=7)["loss"] for batch in batches]
        for loss in reversed(held):
            loss.backward(retain_graph=True)
        for parameter, grad in zip(prefix.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad, **TOLERANCE)
        before = [parameter.grad.clone() for parameter in prefix.parameters()]
        for loss in held:
            loss.backward()
        for parameter, grad in zip(prefix.parameters(), before, strict=True):
            torch.testing.assert_close(parameter.grad, 2 * grad, **TOLERANCE)
        with pytest.raises(RuntimeError, match="retain_graph=True"):
            held[-1].backward()
        with pytest.raises(NotImplementedError, match="create_graph: .* cuda_graphs=False"):
            torch.autograd.grad(trained(**batches[0])["loss"], list(prefix.parameters()), create_graph=True)


def test_a_stale_recording_is_not_replayed(graphs):
    """New memory of the prefix or the model, another attachment, a prefix that is switched off, frozen parameters."""
    model = tiny_model("llama")
    prefix = random_prefix(model)
    batch = batch_of(4, 13)
    attachment = attach_prefix(model, prefix)
    trained = PrefixedModel(model, prefix)

    def equals():
        prefix.zero_grad()
        expected, expected_grads = step(without_graphs(trained), batch)
        for _ in range(3):
            prefix.zero_grad()
            loss, grads = step(trained, batch)
            torch.testing.assert_close(loss, expected, **TOLERANCE)
            for grad, expected_grad in zip(grads, expected_grads, strict=True):
                torch.testing.assert_close(grad, expected_grad, **TOLERANCE)
        return graphs.recorded

    assert equals() == 1
    parameter = next(prefix.parameters())
    parameter.data = parameter.data * 2
    assert equals() == 2
    weight = next(model.parameters())
    weight.data = weight.data * 2
    assert equals() == 3
    attachment.detach()
    with attach_prefix(model, prefix) as again:
        assert equals() == 4
        parameter.requires_grad_(False)
        assert equals() == 5
        again.enable(False)  # then nothing is trained
        plain = without_graphs(trained)(**batch)["loss"]
        assert all(torch.equal(trained(**batch)["loss"], plain) for _ in range(3)) and graphs.recorded == 5


def test_the_prefix_stays_what_it_was(graphs):
    """Parameters, what the layers hold and what else hangs on them are the same objects after a recording, a failed one too."""
    model = tiny_model("llama")
    prefix = random_prefix(model)
    with attach_prefix(model, prefix):
        trained = PrefixedModel(model, prefix)
        layers = [module.layer_prefix for module in model.modules() if hasattr(module, "layer_prefix")]
        before = [*prefix.parameters(), *(tensor for layer in layers for tensor in (layer.key, layer.value))]
        step(trained, batch_of(4, 13)), step(trained, batch_of(4, 13))
        graphs.refusal = "no"
        step(trained, batch_of(3, 13)), step(trained, batch_of(3, 13))
        after = [*prefix.parameters(), *(tensor for layer in layers for tensor in (layer.key, layer.value))]
        assert graphs.recorded == 1 and all(one is other for one, other in zip(before, after, strict=True))


def test_what_cannot_be_recorded_runs_as_it_is(graphs, caplog):
    model = tiny_model("llama")
    prefix = random_prefix(model)
    graphs.refusal = "called a synchronizing CUDA operation"
    with attach_prefix(model, prefix):
        trained = PrefixedModel(model, prefix)
        expected, _ = step(without_graphs(trained), batch_of(4, 13))
        for _ in range(4):
            assert torch.equal(step(trained, batch_of(4, 13))[0], expected)
    assert [record.message for record in caplog.records] == [f"training steps run without CUDA graphs: {graphs.refusal}"]


@pytest.mark.parametrize("why", ("positions", "half autocast", "no_grad", "float16", "off", "one token", "eval loss"))
def test_steps_that_are_not_recorded(graphs, why):
    model = tiny_model("llama")
    prefix = random_prefix(model)
    batch = batch_of(4, 13)
    if why == "positions":
        batch["position_ids"] = torch.arange(13).expand(4, -1)
    elif why == "float16":
        model.half()
    elif why == "one token":
        batch = {name: tensor[:, :1] for name, tensor in batch.items()}
    with attach_prefix(model, prefix):
        trained = PrefixedModel(model, prefix, cuda_graphs=why != "off")
        with torch.set_grad_enabled(why != "no_grad"), torch.autocast("cpu", torch.float16, enabled=why == "half autocast"):
            for _ in range(3):
                trained(**batch, return_logits=why == "eval loss")
    assert graphs.recorded == 0


def test_what_changes_between_steps_is_heeded(graphs):
    """Adapters of PEFT, hooks, modules in training, positions, parameters beside the prefix's that are trained."""
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    prefix, batch, seen = random_prefix(model), batch_of(4, 13), []
    layer, head = model.model.layers[0], model.lm_head.weight

    def losses_of(trained):
        found = []
        for _ in range(3):
            prefix.zero_grad()
            found.append(step(trained, batch)[0])
        return torch.stack(found)

    with attach_prefix(adapted, prefix):
        trained = PrefixedModel(model, prefix)
        known = []

        def equals_plain_steps():
            got, expected = losses_of(trained), losses_of(without_graphs(trained))
            torch.testing.assert_close(got, expected, **TOLERANCE)
            assert all(abs(float(got[0] - other)) > 1e-4 for other in known), "else nothing is seen here"
            known.append(float(got[0]))

        equals_plain_steps()
        with adapted.disable_adapter():
            equals_plain_steps()
        model.requires_grad_(False)  # what PEFT switches on again gets gradients again
        adapted.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 3
        equals_plain_steps()
        prefix.position_offset += 3
        equals_plain_steps()
        assert graphs.recorded == 4
        handle = layer.register_forward_hook(lambda *args: seen.append(1))
        losses_of(trained)
        assert len(seen) == 3
        handle.remove()
        recorded = graphs.recorded
        losses_of(trained)
        assert graphs.recorded == recorded, "the step is still known"
        head.requires_grad_(True)
        for _ in range(3):
            head.grad = None
            step(trained, batch)
            assert head.grad is not None
        head.requires_grad_(False)
        layer.train()
        losses_of(trained)
        assert graphs.recorded == recorded + 1


def test_tokens_that_see_later_ones_are_not_recorded(graphs):
    """Padding on the right, and what a longer batch has left there, would be seen."""
    model = tiny_model("gemma3", use_bidirectional_attention=True)
    with attach_prefix(model, random_prefix(model)) as attachment:
        trained = PrefixedModel(model, attachment.prefix)
        expected = step(without_graphs(trained), batch_of(2, 13))[0]
        for seed in (0, 0, 0, 3, 0):
            loss = step(trained, batch_of(2, 13 + seed, seed))[0]
        assert torch.equal(loss, expected) and graphs.recorded == 0


def test_hooks_of_others_see_every_step(graphs):
    model = tiny_model("llama")
    prefix, seen = random_prefix(model), []
    model.model.layers[0].register_forward_hook(lambda *args: seen.append(1))
    with attach_prefix(model, prefix):
        trained = PrefixedModel(model, prefix)
        for _ in range(4):
            step(trained, batch_of(4, 13))
    assert len(seen) == 4 and graphs.recorded == 0


def test_with_checkpointing_nothing_is_recorded(graphs):
    model = tiny_model("llama")
    prefix = random_prefix(model)
    with attach_prefix(model, prefix):
        trained = PrefixedModel(model, prefix)
        trained.activation_checkpointing_enable()
        for _ in range(3):
            step(trained, batch_of(4, 13))
    assert graphs.recorded == 0


def test_no_more_graphs_than_that(graphs):
    model = tiny_model("llama")
    prefix = random_prefix(model)
    with attach_prefix(model, prefix):
        trained = PrefixedModel(model, prefix)
        for rows, _ in itertools.product(range(1, MOST_GRAPHS + 4), range(2)):
            step(trained, batch_of(rows, 5))
    assert graphs.recorded == MOST_GRAPHS


def test_rows_as_long_as_the_model_has_positions(graphs):
    """64 learned positions, 5 of them the prefix's: 57 tokens are not padded to 64."""
    model = tiny_model("gpt2")
    prefix = random_prefix(model)
    with attach_prefix(model, prefix):
        trained = PrefixedModel(model, prefix)
        longest = 64 - prefix.position_offset
        for _ in range(3):
            step(trained, batch_of(4, longest - 2))
        assert [shape[0][1] for shape in trained.graphs._steps] == [longest - 2]


def test_rounding():
    assert [rounded(n) for n in (1, 8, 9, 63, 65, 100, 128, 129, 2000)] == [8, 8, 16, 64, 80, 112, 128, 160, 2048]
    assert all(n <= rounded(n) <= max(n + 7, 1.25 * n) for n in range(1, 5000))


def test_trainer(graphs, tmp_path):
    """The losses of a run, with accumulation and rows of many lengths; graphs are freed at the end."""
    results = []
    for cuda_graphs_on in (True, False):
        model = tiny_model("llama")
        trainer = silent_trainer(
            tmp_path, model, random_prefix(model), ROWS, {"cuda_graphs": cuda_graphs_on}, max_steps=12,
            gradient_accumulation_steps=2, per_device_train_batch_size=2,
        )  # fmt: skip
        trainer.train()
        results.append(losses(trainer))
        recorded = graphs.recorded
        assert (trainer.model.graphs is not None) == cuda_graphs_on
        trainer.detach()
    assert recorded > 1 and len(results[0]) == 12
    torch.testing.assert_close(torch.tensor(results[0]), torch.tensor(results[1]), **TOLERANCE)


def test_a_copy_has_no_graphs(graphs):
    model = tiny_model("llama")
    prefix = random_prefix(model)
    with attach_prefix(model, prefix):
        trained = PrefixedModel(model, prefix)
        for _ in range(2):
            step(trained, batch_of(4, 13))
        copied = copy.deepcopy(trained)
        assert copied.graphs is None
        assert torch.equal(step(copied, batch_of(4, 13))[0], step(trained, batch_of(4, 13))[0])
