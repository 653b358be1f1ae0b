"""Encoders with a prefix equal their eager attention over an expanded one; heads are trained, saved and loaded with it."""

import copy

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, BertModel, DebertaV2Config, DebertaV2Model

from prefix_tuning import Prefix, attach_prefix
from support.checkpointing import counted_attention, enable_checkpointing, train_with_checkpointing
from support.encoders import FAMILIES, TASKS, attention_of, inputs_of, logits_of, positions_of, tiny_encoder
from support.expanded_prefix import expanded_prefix
from support.models import random_prefix, randomize, tiny_model
from support.tokenizer import tiny_tokenizer

PREFIX_LEN = 5
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


def keys_and_values(prefix):
    return [tensor for pair in prefix.layers("encoder") for tensor in pair]


def assert_same_weights(model, state):
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("task", TASKS)
def test_logits_loss_and_gradients_equal_an_expanded_prefix(family, task, proven):
    model = tiny_encoder(family, task)
    prefix = random_prefix(model, PREFIX_LEN, modules_to_save=())
    assert (list(prefix.parts), prefix.position_offset, prefix.heads) == (["encoder"], PREFIX_LEN, {})
    for side in (None, "left", "right"):
        inputs = inputs_of(model, side)
        positions = positions_of(model, inputs["attention_mask"], PREFIX_LEN)
        with expanded_prefix(model, prefix, {"encoder": attention_of(model)}):
            expected = model(**inputs, position_ids=positions)
            expected_grads = torch.autograd.grad(expected.loss, keys_and_values(prefix))
        with attach_prefix(model, prefix):
            got = model(**inputs)
            grads = torch.autograd.grad(got.loss, keys_and_values(prefix))
            given = model(**inputs, position_ids=positions - PREFIX_LEN)
        real = slice(None) if "Sequence" in task else inputs["attention_mask"].bool()
        torch.testing.assert_close(logits_of(got)[real], logits_of(expected)[real], **TOLERANCE)
        torch.testing.assert_close(logits_of(given)[real], logits_of(got)[real], **TOLERANCE)
        torch.testing.assert_close(got.loss, expected.loss, **TOLERANCE)
        torch.testing.assert_close(grads, expected_grads, atol=1e-6, rtol=1e-4)
        assert min(grad.abs().max() for grad in grads) > 1e-5
    proven(family, f"forward, loss, gradients: {task}", f"left and right padding: {task}")


def test_zeroed_prefix_differs_and_detach_restores(family):
    model = tiny_encoder(family)
    prefix, inputs = random_prefix(model, PREFIX_LEN), inputs_of(model, "right")
    config, own, before = model.config, dict(model.named_parameters()), logits_of(model(**inputs))
    with attach_prefix(model, prefix):
        with_prefix = logits_of(model(**inputs))
        with torch.no_grad():
            for tensor in keys_and_values(prefix):
                tensor.zero_()
        zeroed = logits_of(model(**inputs))
    assert (with_prefix - zeroed).abs().max() > 1e-2
    assert (with_prefix - before).abs().max() > 1e-2
    assert all(getattr(module, "config", config) is config for module in model.modules())
    assert not any(module._forward_pre_hooks or "layer_prefix" in vars(module) for module in model.modules())
    assert all(parameter is own[name] for name, parameter in model.named_parameters())
    assert torch.equal(logits_of(model(**inputs)), before)


@pytest.mark.parametrize("task", TASKS)
def test_a_head_is_trained_saved_and_loaded_with_the_prefix(family, task, tmp_path, proven):
    model = tiny_encoder(family, task)
    inputs, state = inputs_of(model, "right"), copy.deepcopy(model.state_dict())
    prefix = Prefix.for_model(model, PREFIX_LEN, seed=0)
    assert prefix.heads and all("base_model" not in name for name in prefix.heads)
    optimizer = torch.optim.Adam(prefix.parameters(), lr=1e-2)
    with attach_prefix(model, prefix) as attachment:
        losses = []
        for _ in range(12):
            loss = model(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        trained = logits_of(model(**inputs))
        attachment.enable(False)
        assert_same_weights(model, state)
        alone = logits_of(model(**inputs))
        attachment.enable(True)
        assert torch.equal(logits_of(model(**inputs)), trained)
    torch.testing.assert_close(logits_of(model(**inputs)), alone)
    assert losses[-1] < losses[0] - 0.1
    assert_same_weights(model, state)
    prefix.save(tmp_path)
    loaded = Prefix.load(tmp_path)
    assert loaded.heads.keys() == prefix.heads.keys()
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    with attach_prefix(model, loaded):
        assert torch.equal(logits_of(model(**inputs)), trained)
    with torch.no_grad():  # the trained head matters, not only the keys and values
        for parameters in loaded.heads.values():
            for parameter in parameters.values():
                parameter.mul_(-1)
    with attach_prefix(model, loaded):
        assert (logits_of(model(**inputs)) - trained).abs().max() > 1e-2
    proven(family, f"head: {task}")


def test_gradient_checkpointing_keeps_the_prefix(family, proven):
    model = tiny_encoder(family)
    prefix, inputs = random_prefix(model, PREFIX_LEN), inputs_of(model, "right")
    with attach_prefix(model, prefix), counted_attention() as calls:
        expected = torch.autograd.grad(model(**inputs).loss, list(prefix.parameters()))
        once = len(calls)
        train_with_checkpointing(model)
        calls.clear()
        grads = torch.autograd.grad(model(**inputs).loss, list(prefix.parameters()))
    assert len(calls) == 2 * once
    torch.testing.assert_close(grads, expected, atol=1e-6, rtol=1e-4)
    proven(family, "gradient checkpointing")


def test_reentrant_checkpointing_is_refused(family):
    model = tiny_encoder(family)
    enable_checkpointing(model, use_reentrant=True)
    with attach_prefix(model, random_prefix(model, PREFIX_LEN)), pytest.raises(ValueError, match="use_reentrant=False"):
        model(**inputs_of(model))


def test_a_head_in_a_model_that_is_converted_meanwhile_is_saved(tmp_path):
    model = tiny_encoder("bert", "SequenceClassification")
    prefix = Prefix.for_model(model, PREFIX_LEN, seed=0)
    with attach_prefix(model, prefix):
        model.half()
    prefix.save(tmp_path)
    loaded = Prefix.load(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for name, parameter in prefix.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.float())


def test_a_causal_models_score_is_a_head(tmp_path):
    from transformers import LlamaForSequenceClassification

    language_model = tiny_model("llama", num_labels=3)
    model = LlamaForSequenceClassification(language_model.config).eval()
    prefix = Prefix.for_model(model, PREFIX_LEN, seed=0, reparametrization="mlp", hidden_size=8)
    assert (list(prefix.parts), list(prefix.heads)) == (["decoder"], ["score"])
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "labels": torch.tensor([0, 2])}
    with attach_prefix(model, prefix):
        model(**inputs).loss.backward()
        expected = model(**inputs).logits
    assert all(parameter.grad.abs().max() > 0 for parameter in prefix.parameters())
    assert all(parameter.grad is None for parameter in model.score.parameters())
    prefix.save(tmp_path)
    with attach_prefix(model, Prefix.load(tmp_path)):
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-6, rtol=1e-6)
    assert not Prefix.for_model(language_model, PREFIX_LEN).heads


@pytest.mark.parametrize("options", ({}, {"reparametrization": "mlp"}, {"init": "text", "text": "pub"}), ids=str)
def test_a_prefix_made_for_a_model_of_16_bit_has_a_head_of_its_own_dtype(options):
    model = tiny_encoder("bert").bfloat16()
    prefix = Prefix.for_model(model, PREFIX_LEN, tokenizer=tiny_tokenizer(), seed=0, **options)
    assert prefix.heads and {parameter.dtype for parameter in prefix.parameters()} == {torch.float32}
    assert torch.equal(prefix.heads["classifier"]["weight"], model.classifier.weight.float())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_float32_heads_behind_models_of_16_bit(dtype):
    for family in ("bert", "roberta", "modernbert"):
        model = tiny_encoder(family)
        prefix, inputs = random_prefix(model, PREFIX_LEN), inputs_of(model)
        with attach_prefix(model, prefix):
            expected = model(**inputs).logits
        copy_of_model = copy.deepcopy(model).to(dtype)
        with attach_prefix(copy_of_model, prefix):
            got = copy_of_model(**inputs)
            got.loss.backward()
        assert got.logits.dtype == torch.float32
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in prefix.parameters())
        assert (got.logits - expected).abs().mean() / expected.abs().mean() < 0.1


def test_a_text_as_the_start(family, proven):
    model, tokenizer = tiny_encoder(family, vocab_size=128), tiny_tokenizer()
    ids = torch.tensor([(tokenizer("the end")["input_ids"] * 5)[:PREFIX_LEN]])
    prefix = Prefix.for_model(model, PREFIX_LEN, init="text", text="the end", tokenizer=tokenizer, reparametrization=None)
    seen = []
    for module in attention_of(model):
        name = next(name for name in ("key", "k_lin", "Wqkv") if hasattr(module, name))
        getattr(module, name).register_forward_hook(lambda _, args, out: seen.append(out[0]))
    model(input_ids=ids)
    for (key, value), projected in zip(prefix.layers("encoder"), seen, strict=True):
        if family == "modernbert":  # which turns its keys by their positions
            torch.testing.assert_close(value.transpose(0, 1).flatten(1), projected[:, -value.shape[0] * value.shape[2] :])
        else:
            torch.testing.assert_close(key.transpose(0, 1).flatten(1), projected)
    assert model.config._attn_implementation == "sdpa"
    proven(family, "init='text'")


def test_modules_to_save_by_name():
    model = tiny_encoder("bert")
    inputs = inputs_of(model)
    prefix = random_prefix(model, PREFIX_LEN, modules_to_save=["classifier", "pooler"])
    assert list(prefix.heads) == ["classifier", "bert.pooler"]
    assert list(prefix.heads["bert.pooler"]) == ["dense.weight", "dense.bias"]
    with attach_prefix(model, prefix):
        model(**inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in prefix.parameters())
    with pytest.raises(
        ValueError, match="modules_to_save: expected modules .* in BertForSequenceClassification, .*, got 'nothing'"
    ):
        Prefix.for_model(model, PREFIX_LEN, modules_to_save=["nothing"])
    with pytest.raises(TypeError, match="modules_to_save: expected a list of names, got 'classifier'"):
        Prefix.for_model(model, PREFIX_LEN, modules_to_save="classifier")
    with pytest.raises(NotImplementedError, match="lm_head.weight are one tensor"):
        Prefix.for_model(tiny_model("gpt2"), PREFIX_LEN, modules_to_save=["lm_head"])


def test_a_head_that_peft_trains_beside_lora_stays_its():
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(tiny_encoder("bert"), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    for target in (lora, lora.get_base_model()):
        prefix = random_prefix(target, PREFIX_LEN)
        assert prefix.heads == {}
        with attach_prefix(target, prefix):
            lora(**inputs_of(target)).loss.backward()
        assert all(parameter.grad is not None for parameter in prefix.parameters())
    trained = [name for name, parameter in lora.named_parameters() if parameter.grad is not None]
    assert any("lora_A" in name for name in trained) and any("classifier" in name for name in trained)


def test_positions_past_the_table_are_refused(family):
    model = tiny_encoder(family)
    table = model.config.max_position_embeddings
    first = positions_of(model, torch.ones(1, 1, dtype=torch.long), 0).item()
    ids = torch.full((1, table - first - PREFIX_LEN), 7)
    with attach_prefix(model, random_prefix(model, PREFIX_LEN)):
        model(input_ids=ids)
        if family != "modernbert":  # its positions are rotations
            with pytest.raises(ValueError, match=f"the model's {table} .*, got {table + 1} positions"):
                model(input_ids=torch.cat([ids, ids[:, :1]], 1))


def test_wrong_calls_raise(tmp_path, proven):
    model = tiny_encoder("bert")
    prefix = random_prefix(model, PREFIX_LEN)
    with pytest.raises(ValueError, match="holds a trained module classifier, which BertModel does not have"):
        attach_prefix(model.base_model, prefix)
    other = tiny_encoder("bert", num_labels=5)
    with pytest.raises(ValueError, match=r"module classifier to have the model's .*\[5, 32\].*, got .*\[3, 32\]"):
        attach_prefix(other, prefix)
    assert not hasattr(attention_of(other)[0], "layer_prefix")
    with pytest.raises(ValueError, match="parts: expected one or more of encoder for BertForSequenceClassification, got"):
        Prefix.for_model(model, PREFIX_LEN, parts=("decoder",))
    with pytest.raises(ValueError, match="without an encoder part"):
        attach_prefix(model, Prefix({"decoder": prefix.layers("encoder")}))
    with attach_prefix(model, prefix), pytest.raises(NotImplementedError, match="output_attentions"):
        model(**inputs_of(model), output_attentions=True)
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with pytest.raises(NotImplementedError, match="expected bert as an encoder, got one with is_decoder"):
        attach_prefix(BertLMHeadModel(BertConfig(**sizes, is_decoder=True)), prefix)
    with pytest.raises(NotImplementedError, match="cannot be attached to deberta-v2: its attention scores contents"):
        attach_prefix(DebertaV2Model(DebertaV2Config(**sizes)), prefix)
    proven("deberta-v2", *(f"forward, loss, gradients: {task}" for task in TASKS), outcome="refused: disentangled attention")
    with pytest.raises(ValueError, match="heads: expected one dtype for .*, got torch.bfloat16, torch.float32"):
        Prefix({"encoder": prefix.layers("encoder")}, heads={"classifier": {"weight": torch.ones(2, 2).bfloat16()}})
    randomize(prefix).save(tmp_path)
    text = (tmp_path / "prefix_config.json").read_text()
    (tmp_path / "prefix_config.json").write_text(text.replace('"classifier"', '"score"'))
    with pytest.raises(ValueError, match=r"head.classifier.bias: expected no such tensor by .*, got \[3\]"):
        Prefix.load(tmp_path)
    (tmp_path / "prefix_config.json").write_text(text.replace('"heads": {', '"heads": {"a": 1, '))
    with pytest.raises(ValueError, match="prefix_config.json: heads: expected of each module the shape of each parameter, got"):
        Prefix.load(tmp_path)
    assert isinstance(model.base_model, BertModel)
