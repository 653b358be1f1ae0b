"""Batches without padding: what they hold, and that training on them is training on padded rows."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

import prefix_kernels
from prefix_tuning import Prefix, PrefixedModel, attach_prefix, padding_free
from prefix_tuning.data import IGNORED, PromptCompletionCollator, tokenize_rows
from prefix_tuning.masks import mask_structure
from prefix_tuning.padding_free import LEAST_SHARED, PaddingFreeCollator, padding_free_collator, shared_beginnings, why_padded
from support.models import MODELS, WITH_STATE, random_prefix, tiny_model
from support.tokenizer import tiny_tokenizer
from support.training import ALIKE, CHECKPOINTING, DEVICES, PREFIX_LEN, ROWS, make_trainer, trained

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def example(ids, targets):
    """A row whose last `targets` tokens have a loss."""
    return {"input_ids": ids, "labels": [IGNORED] * (len(ids) - targets) + ids[len(ids) - targets :]}


def test_rows_behind_one_another():
    batch = PaddingFreeCollator(share=False, first_position=2)([example([5, 6, 7], 1), example([8, 9], 1)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, IGNORED, 9]]
    assert batch["position_ids"].tolist() == [[2, 3, 4, 2, 3]]
    assert batch["cu_seqlens"].tolist() == [[0, 3, 5]] and batch["cu_seqlens"].dtype == torch.int32
    assert batch["max_seqlen"] == 3 and "parent" not in batch


def test_a_beginning_is_computed_once():
    """The last token of a prompt predicts the first target, so each row has its own."""
    begin = list(range(10, 10 + LEAST_SHARED))
    rows = [example([*begin, 3, 50, 51], 2), example([*begin, 3, 60], 1), example([4, 70], 1)]
    batch = PaddingFreeCollator()(rows)
    assert batch["input_ids"].tolist() == [[4, 70, *begin, 3, 50, 51, 3, 60]]
    assert batch["labels"].tolist() == [[IGNORED, 70, *[IGNORED] * LEAST_SHARED, IGNORED, 50, 51, IGNORED, 60]]
    shared = LEAST_SHARED
    assert batch["position_ids"].tolist() == [[0, 1, *range(shared), shared, shared + 1, shared + 2, shared, shared + 1]]
    assert batch["cu_seqlens"].tolist() == [[0, 2, 2 + shared, 5 + shared, 7 + shared]]
    assert batch["parent"].tolist() == [[-1, -1, 1, 1]] and batch["max_seqlen"] == LEAST_SHARED
    assert "parent" not in PaddingFreeCollator()([example([*begin[:-1], 3, 50, 51], 2), example([*begin[:-1], 4, 60], 1)])


def test_only_what_makes_a_step_smaller_is_shared():
    """A step that is recorded has room for a rounded number of tokens, here of a multiple of `unit`."""
    begin = list(range(10, 10 + LEAST_SHARED))
    rows = [example([*begin, 3, 50, 51], 2), example([*begin, 3, 60], 1), example([4, 70], 1)]  # 23 tokens, or 15
    for unit, tokens in ((1, 15), (8, 15), (16, 15), (24, 23), (64, 23)):
        batch = PaddingFreeCollator(padded=lambda length, unit=unit: -(-length // unit) * unit)(rows)
        assert batch["input_ids"].shape == (1, tokens) and ("parent" in batch) == (tokens == 15)
    assert batch["input_ids"].tolist() == [[token for row in rows for token in row["input_ids"]]]


def test_a_first_token_is_no_target():
    """Also where every token is one, and where rows are tensors."""
    rows = [{"input_ids": torch.tensor([4, 5]), "labels": torch.tensor([4, 5])}, {"input_ids": [6], "labels": [6]}]
    batch = PaddingFreeCollator()(rows)
    assert batch["input_ids"].tolist() == [[4, 5, 6]] and batch["labels"].tolist() == [[IGNORED, 5, IGNORED]]


def groups_of(count):
    """All ways to cut a list of that length into runs."""
    for cuts in itertools.product((False, True), repeat=max(count - 1, 0)):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [count]
        yield list(itertools.pairwise([0, *ends]))


def saved_by(rows, order, runs):
    total = 0
    for start, stop in runs:
        members = [rows[order[i]] for i in range(start, stop)]
        most = min(next(i for i, label in enumerate(labels) if label != IGNORED) - 1 for _, labels in members)
        shared = 0
        while shared < most and len({ids[shared] for ids, _ in members}) == 1:
            shared += 1
        if stop - start > 1 and shared < LEAST_SHARED:
            return -1
        total += shared * (stop - start - 1)
    return total


@pytest.mark.parametrize("seed", range(30))
def test_what_is_shared_saves_the_most(seed):
    """Against all ways to group neighbours, on rows that branch from each other."""
    generator = random.Random(seed)
    rows = []
    for _ in range(generator.randint(1, 7)):
        start = list(generator.choice(rows)[0][: generator.randint(0, 30)]) if rows and generator.random() < 0.8 else []
        ids = start + [generator.randint(0, 1) for _ in range(generator.randint(2, 20))]
        targets = generator.randint(1, len(ids) - 1)
        rows.append((ids, [IGNORED] * (len(ids) - targets) + ids[len(ids) - targets :]))
    groups = shared_beginnings(rows)
    assert sorted(index for members, _ in groups for index in members) == list(range(len(rows)))
    order = sorted(range(len(rows)), key=lambda index: rows[index][0])
    best = max(saved_by(rows, order, runs) for runs in groups_of(len(rows)))
    assert sum(shared * (len(members) - 1) for members, shared in groups) == best
    for members, shared in groups:
        assert all(rows[index][0][:shared] == rows[members[0]][0][:shared] for index in members)
        assert all(label == IGNORED for index in members for label in rows[index][1][: shared + 1])


def test_a_long_beginning_of_two_is_worth_more_than_a_short_one_of_three():
    common, long = list(range(10, 10 + LEAST_SHARED)), list(range(30, 50))
    rows = [([*common, *long, 1, 2], 2), ([*common, *long, 3], 1), ([*common, 60, 61], 1)]
    rows = [(ids, [IGNORED] * (len(ids) - targets) + ids[-targets:]) for ids, targets in rows]
    assert shared_beginnings(rows) == [([0, 1], len(common) + len(long) - 1), ([2], 0)]


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_which_models_are_trained_without_padding(device):
    """Of those that can be: where it was measured to be faster."""
    model = tiny_model("llama").to(device)
    if device == "cpu":
        chosen = padding_free_collator(model, None) is not None
        assert chosen == (padding_free_collator(model, None, rows=1, recorded=False) is not None)
        assert chosen == ("cpu" in prefix_kernels.available_backends())
        assert padding_free_collator(model, None, backend="sdpa") is None
        return
    assert padding_free_collator(model, None) is None  # float32
    assert padding_free_collator(model.half(), None) is None
    model.bfloat16()
    assert padding_free_collator(model, None).padded(20) == 24
    assert padding_free_collator(model, None, rows=1) is None
    assert padding_free_collator(model, None, recorded=False) is None
    assert padding_free_collator(model, None, backend="sdpa") is None


@pytest.mark.parametrize(
    ("options", "changes", "expected"),
    [({}, {}, True), ({"cuda_graphs": False}, {}, False), ({}, {CHECKPOINTING: True}, False), ({}, {"fp16": True}, False)],
    ids=str,
)
def test_a_trainer_says_whether_its_steps_are_recorded(options, changes, expected, tmp_path):
    trainer = make_trainer(tmp_path, options=options)
    for name, value in changes.items():
        setattr(trainer.args, name, value)
    assert trainer._is_recorded() == expected
    trainer.detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_of_a_gpu_was_measured_to_be_faster(dtype, monkeypatch):
    """As above, of a GPU that is not there."""
    reasons = {"cpu": "no", "triton": "chosen"}
    monkeypatch.setattr(padding_free, "explain_training", lambda *args, **options: reasons)
    monkeypatch.setattr(padding_free, "is_spread", lambda model: model.spread)
    model = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, spread=False)
    assert padding_free._is_faster(model, None, rows=2, recorded=True) == (dtype == torch.bfloat16)
    assert not padding_free._is_faster(model, None, rows=1, recorded=True)
    assert not padding_free._is_faster(model, None, rows=2, recorded=False)
    reasons["triton"] = "no"
    assert not padding_free._is_faster(model, None, rows=2, recorded=True)
    reasons["triton"], model.spread = "chosen", True
    assert not padding_free._is_faster(model, None, rows=2, recorded=True)


@pytest.mark.parametrize("name", MODELS)
def test_which_models_need_padding(name):
    reason = why_padded(tiny_model(name))
    alibi, chunks = name in ("bloom", "mpt", "falcon_alibi"), name in ("llama4", "llama4_temperature")
    assert (reason is None) == (name not in WITH_STATE and not alibi and not chunks)
    if reason is not None:
        assert ("ALiBi" if alibi else "chunks of" if chunks else "layers with a state") in reason
        with pytest.raises(NotImplementedError, match=f"padding_free: .* needs padded rows: {reason}"):
            padding_free_collator(tiny_model(name), True)
        assert padding_free_collator(tiny_model(name), None) is None


def step(model, prefix, batch, autocast=False, checkpointing=False, graphs=False, **options):
    """Loss and the prefix's gradients."""
    prefix.zero_grad()
    trained_model = PrefixedModel(model, prefix, cuda_graphs=graphs)
    if checkpointing:
        trained_model.activation_checkpointing_enable()
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=autocast):
        outputs = trained_model(**batch, **options)
    outputs["loss"].backward()
    assert not torch.is_autocast_enabled("cpu")  # as it would be if forward called itself
    return outputs, torch.cat([parameter.grad.flatten() for parameter in prefix.parameters()])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "family", ("llama", "gpt2", "mistral", "gemma2", "gemma3", "opt", "gpt_oss", "qwen3_moe", "deepseek_v3")
)
def test_the_step_is_that_of_padded_rows(family, device):
    model, tokenizer = tiny_model(family).to(device), tiny_tokenizer()
    prefix = random_prefix(model, PREFIX_LEN).to(device)
    examples = tokenize_rows(ALIKE, tokenizer)
    padded, packed = PromptCompletionCollator(tokenizer)(examples), padding_free_collator(model, True, recorded=False)(examples)
    assert packed["input_ids"].numel() < padded["attention_mask"].sum() or "parent" not in packed
    assert ("parent" in packed) == (family in ("llama", "gpt2", "opt", "qwen3_moe", "deepseek_v3"))
    padded, packed = (
        {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        for batch in (padded, packed)
    )
    with attach_prefix(model, prefix):
        expected, right = step(model, prefix, padded)
        for options in ({}, {"checkpointing": True}, {"return_logits": True}, {"num_items_in_batch": 7}):
            got, found = step(model, prefix, packed, **options)
            targets = sum(label != IGNORED for row in examples for label in row["labels"])
            factor = targets / 7 if "num_items_in_batch" in options else 1
            torch.testing.assert_close(got["loss"], expected["loss"] * factor, **TOLERANCE)
            torch.testing.assert_close(found, right * factor, atol=2e-5 * factor, rtol=1e-3)
        exact, rounded = (step(model, prefix, batch, autocast=True) for batch in (padded, packed))
        torch.testing.assert_close(rounded[0]["loss"], exact[0]["loss"], atol=0.02, rtol=0.02)
        assert (rounded[1] - exact[1]).norm() < 0.1 * exact[1].norm()


def packed_batch(share=True, rows=ALIKE):
    return PaddingFreeCollator(share)(tokenize_rows(rows, tiny_tokenizer()))


def compiled_layers(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


COMPILED = {
    "model": lambda model: torch.compile(model, backend="eager"), "layers": compiled_layers, "forward": compiled_forward,
}  # fmt: skip


@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_model_needs_padding(how):
    """Its traced code does not know of sequences."""
    model = tiny_model("llama")
    with attach_prefix(model, prefix := random_prefix(model)):
        compiled = COMPILED[how](model)
        with pytest.raises(NotImplementedError, match="in PrefixTrainer padding_free=False.: it is compiled"):
            step(compiled, prefix, packed_batch())
        with pytest.raises(NotImplementedError, match="it is compiled"):
            padding_free_collator(compiled, True)
        assert padding_free_collator(compiled, None) is None
    assert padding_free_collator(tiny_model("llama"), None, compiled=True) is None


def test_a_prefixed_model_that_is_compiled_needs_padding(monkeypatch, tmp_path):
    """Also where accelerate's launcher compiles it."""
    model = tiny_model("llama")
    with attach_prefix(model, prefix := random_prefix(model)):
        compiled = torch.compile(PrefixedModel(model, prefix), backend="eager")
        with pytest.raises(Exception, match="it needs padded rows|that is compiled needs padded rows"):
            compiled(**packed_batch())
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert trained(tmp_path, max_steps=2)._padding_free() is None
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_masks_made_without_the_sequences_are_refused():
    """Rows would see each other: a mask that something copies on its way, one of another form, layers with a state."""
    model = tiny_model("llama")

    def copied(module, args, kwargs):
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"].clone()}

    with attach_prefix(model, prefix := random_prefix(model)):
        hook = model.model.register_forward_pre_hook(copied, with_kwargs=True)
        with pytest.raises(NotImplementedError, match="masks without them.* it needs padded rows .*padding_free=False"):
            step(model, prefix, packed_batch())
        hook.remove()
        step(model, prefix, packed_batch())
    for name, changes, message in (
        ("gemma3", {"use_bidirectional_attention": True}, "its tokens see later ones"), ("bamba", {}, "layers with a state"),
        ("bloom", {}, "ALiBi"),
    ):  # fmt: skip
        model = tiny_model(name, **changes)
        refused = pytest.raises(NotImplementedError, match=f"cu_seqlens: {type(model).__name__} needs padded .*{message}")
        with attach_prefix(model, prefix := random_prefix(model)), refused:
            step(model, prefix, packed_batch(share=False))


def test_what_rows_share_is_refused_where_a_mask_is_needed():
    model = tiny_model("mistral")
    with attach_prefix(model, prefix := random_prefix(model), prefix_window="peft"):
        expected, _ = step(model, prefix, PromptCompletionCollator(tiny_tokenizer())(tokenize_rows(ALIKE, tiny_tokenizer())))
        got, _ = step(model, prefix, packed_batch(share=False))
        torch.testing.assert_close(got["loss"], expected["loss"], **TOLERANCE)
        with pytest.raises(NotImplementedError, match="parent: what rows share is not served .*share=False"):
            step(model, prefix, packed_batch())


def test_a_mask_beside_a_packed_mask_function_is_heeded():
    from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function

    sequence, mask = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[True, True, True, False]])
    function = and_masks(causal_mask_function, packed_sequence_mask_function(sequence))
    given = {"batch_size": 1, "q_length": 4, "kv_length": 4, "mask_function": function, "device": torch.device("cpu")}
    assert mask_structure(**given).pack.cu_seqlens.tolist() == [0, 2, 4]
    visible = mask_structure(**given, attention_mask=mask).bias[0, 0]
    assert visible.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"position_ids": None}, ValueError, r"position_ids: expected \[1, tokens\] beside cu_seqlens, got None"),
        ({"cu_seqlens": None}, ValueError, "cu_seqlens, max_seqlen: expected both"),
        ({"cu_seqlens": torch.tensor([0, 2])}, ValueError, r"cu_seqlens: expected one row, \[1, …\], .* got \[2\]"),
        ({"max_seqlen": None}, ValueError, "cu_seqlens, max_seqlen: expected both"),
        ({"max_seqlen": 9.0}, TypeError, "max_seqlen: expected an int, got 9.0"),
        ({"max_seqlen": torch.tensor(9)}, TypeError, "max_seqlen: expected an int, got tensor"),
        ({"attention_mask": torch.ones(1, 3)}, ValueError, "attention_mask: expected none beside cu_seqlens"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, ValueError, r"input_ids: expected \[1, tokens\] .* got \[2, 3\]"),
    ],
    ids=str,
)
def test_a_batch_that_is_none_is_refused(changes, error, message):
    model = tiny_model("llama")
    batch = {name: value for name, value in {**packed_batch(), **changes}.items() if value is not None}
    with attach_prefix(model, prefix := random_prefix(model)), pytest.raises(error, match=message):
        PrefixedModel(model, prefix)(**batch)


def taught(example):
    """The example with a teacher that names four tokens."""
    probs, ids = torch.randn(sum(label != IGNORED for label in example["labels"]), 128).softmax(-1).topk(4)
    return {**example, "teacher_ids": ids, "teacher_probs": probs}


@pytest.mark.parametrize(
    ("mlp", "teacher"), ((None, False), (None, True), ("mlp", False)), ids=("prefix", "taught", "reparametrised")
)
@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_replayed_steps_are_the_steps(device, mlp, teacher):
    """Batches of several lengths, with and without shared beginnings, in one graph for each kind of batch."""
    model, tokenizer = tiny_model("llama").to(device), tiny_tokenizer()
    prefix = Prefix.for_model(model, PREFIX_LEN, seed=0, reparametrization=mlp).to(device)
    alike, others = (tokenize_rows(rows, tokenizer) for rows in (ALIKE, ROWS))
    if teacher:
        alike, others = (list(map(taught, examples)) for examples in (alike, others))
    generator = random.Random(0)
    with attach_prefix(model, prefix):
        replayed, plain = PrefixedModel(model, prefix), PrefixedModel(model, prefix, cuda_graphs=False)
        optimizer = torch.optim.AdamW(prefix.parameters(), lr=1e-2)
        for number in range(16):
            rows = generator.sample(alike, len(alike)) if number % 2 else generator.sample(others, 4)
            batch = PaddingFreeCollator()(rows)
            batch = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
            results = []
            for way in (plain, replayed):
                optimizer.zero_grad()
                loss = way(**batch)["loss"]
                loss.backward()
                results.append((loss.detach(), *(parameter.grad.clone() for parameter in prefix.parameters())))
            for value, right in zip(*reversed(results), strict=True):
                torch.testing.assert_close(value, right, atol=1e-5, rtol=1e-4)
            optimizer.step()
        assert len(replayed.graphs._steps) >= 2 and not replayed.graphs._refused
        assert {step.rows.pack.parent is not None for step in replayed.graphs._steps.values()} == {False, True}


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_what_is_left_of_a_rounded_row_is_no_long_sequence(device):
    """Some 33 sequences of 4 tokens in a row of 160."""
    model = tiny_model("llama").to(device)
    with attach_prefix(model, prefix := random_prefix(model).to(device)):
        replayed, plain = PrefixedModel(model, prefix), PrefixedModel(model, prefix, cuda_graphs=False)
        for count in (34, 34, 33):
            batch = PaddingFreeCollator()([example(list(range(i, i + 4)), 1) for i in range(5, 5 + count)])
            batch = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
            torch.testing.assert_close(replayed(**batch)["loss"], plain(**batch)["loss"], **TOLERANCE)
        (step,) = replayed.graphs._steps.values()
        lengths = step.rows.pack.cu_seqlens.diff()
        assert lengths.max() == step.rows.pack.max_seqlen == 4 and lengths.sum() == 160
