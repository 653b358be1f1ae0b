"""Prefixes: how they start, what the constructor takes and refuses, what every module can do."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
import transformers

from prefix_tuning import Prefix, attach_prefix
from prefix_tuning.families import model_shape
from prefix_tuning.prefix_files import CONFIG_FILE
from prefix_tuning.shapes import ModelShape
from support.models import FAMILIES, random_prefix, tiny_model
from support.prefixes import TOLERANCE, assert_layers, cached, mlp_prefix, pairs
from support.tokenizer import tiny_tokenizer

# How a prefix starts


@pytest.mark.parametrize("family", FAMILIES)
def test_random_prefix(family):
    model = tiny_model(family)
    prefix = Prefix.for_model(model, 48, seed=1)
    heads = 4 if family == "gpt2" else 2
    assert [tuple(tensor.shape) for pair in prefix.layers() for tensor in pair] == [(heads, 48, 16)] * 6
    values = torch.stack([tensor for pair in prefix.layers() for tensor in pair])
    assert values.std().item() == pytest.approx(0.02, rel=0.05) and abs(values.mean().item()) < 1e-3
    assert len({tensor.flatten()[0].item() for tensor in values}) == 6
    assert all(p.requires_grad and p.is_leaf and p.dtype == torch.float32 for p in prefix.parameters())
    assert (prefix.prefix_len, prefix.position_offset, prefix.reparametrization) == (48, 48, None)
    prefix.check_fits(model)


@pytest.mark.parametrize("reparametrization", (None, "mlp"))
def test_seed_decides_and_leaves_torchs_generator_alone(reparametrization):
    model = tiny_model("llama")

    def made(seed):
        prefix = Prefix.for_model(model, 3, reparametrization=reparametrization, hidden_size=4, seed=seed)
        return torch.nn.utils.parameters_to_vector(prefix.parameters())

    state = torch.get_rng_state()
    first, again, other = made(7), made(7), made(8)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(7)
    drawn, next_drawn = made(None), made(None)
    assert torch.equal(drawn, first) and not torch.equal(next_drawn, first)


@pytest.mark.parametrize("prefix_len", (4, 8, 12))
@pytest.mark.parametrize("family", FAMILIES)
def test_text_prefix_is_what_the_model_caches(family, prefix_len):
    """4 cuts the eight tokens, 12 repeats them and is longer than Mistral's window of 8."""
    model, text = tiny_model(family), "a cat&dog"
    tokenizer = tiny_tokenizer(bos=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 8 and tokenizer.bos_token_id not in ids
    expected = cached(model, (ids * 2)[:prefix_len])
    prefix = Prefix.for_model(model, prefix_len, init="text", text=text, tokenizer=tokenizer)
    assert_layers(prefix.layers(), expected, **TOLERANCE)
    assert prefix.prefix_len == prefix.position_offset == prefix_len
    assert all(p.requires_grad and p.is_leaf for p in prefix.parameters())


def test_text_prefix_is_float32_beside_a_half_model():
    model = tiny_model("llama").to(torch.bfloat16)
    options = {"init": "text", "text": "words", "tokenizer": tiny_tokenizer()}
    prefix = Prefix.for_model(model, 4, **options)
    assert {p.dtype for p in prefix.parameters()} == {torch.float32}
    assert_layers(prefix.to(torch.bfloat16).layers(), Prefix.for_model(model, 4, dtype=torch.bfloat16, **options).layers())


@pytest.mark.parametrize(
    "options, error, match",
    (
        ({"prefix_len": 0}, ValueError, "prefix_len: expected at least 1, got 0"),
        ({"prefix_len": 5.0}, TypeError, "prefix_len: expected an int, got 5.0"),
        ({"prefix_len": True}, TypeError, "prefix_len: expected an int, got True"),
        ({"hidden_size": 0}, ValueError, "hidden_size: expected at least 1, got 0"),
        ({"dtype": torch.int32}, TypeError, "dtype: expected a floating torch.dtype.*, got torch.int32"),
        ({"dtype": "float32"}, TypeError, "dtype: expected .*, got 'float32'"),
        ({"init": "zeros"}, ValueError, "init: expected 'text' or 'random', got 'zeros'"),
        ({"reparametrization": "lora"}, ValueError, "reparametrization: expected None or 'mlp', got 'lora'"),
        ({"text": "words"}, ValueError, "text: expected none beside init 'random', got one"),
        ({"init": "text", "tokenizer": tiny_tokenizer()}, ValueError, "text: expected one beside init='text', got None"),
        ({"init": "text", "text": "words"}, ValueError, "tokenizer: expected one beside init='text', got None"),
        ({"init": "text", "text": ["words"], "tokenizer": tiny_tokenizer()}, TypeError, "text: expected one text, got list"),
        (
            {"init": "text", "text": "", "tokenizer": tiny_tokenizer(bos=True)},
            ValueError,
            "text: expected one token or more, got ''",
        ),
        (
            {"init": "text", "text": "words", "tokenizer": tiny_tokenizer(), "prefix_len": 65},
            ValueError,
            "expected at most the model's 64 positions, got 65 tokens",
        ),
    ),
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_for_model_refuses(options, error, match):
    with pytest.raises(error, match=match):
        Prefix.for_model(tiny_model("gpt2"), **{"prefix_len": 5, **options})


def test_model_shape_reads_the_text_part_and_the_head_dim():
    llama = transformers.LlamaConfig(hidden_size=64, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=2)
    assert model_shape(llama) == ModelShape(5, 2, 8, 8)
    assert model_shape(transformers.LlavaConfig(text_config=llama)) == ModelShape(5, 2, 8, 8)
    llama.head_dim = 24
    assert model_shape(llama) == ModelShape(5, 2, 24, 24)
    assert model_shape(transformers.GPT2Config(n_embd=48, n_layer=2, n_head=3)) == ModelShape(2, 3, 16, 16)
    with pytest.raises(ValueError, match="config: expected positive numbers in PreTrainedConfig, got num_hidden_layers None"):
        model_shape(transformers.PreTrainedConfig())


# Reparametrised


def test_mlp_prefix_is_evaluated_once_a_call_and_its_parameters_are_trained():
    model = tiny_model("llama")
    prefix = mlp_prefix(model)
    mlp = prefix.reparametrization["decoder"]
    assert {id(p) for p in prefix.parameters()} == {id(p) for p in mlp.parameters()}
    assert all(p.requires_grad and p.dtype == torch.float32 for p in prefix.parameters())
    assert (prefix.prefix_len, prefix.parts) == (5, {"decoder": model_shape(model.config)})
    calls = []
    mlp.output.register_forward_hook(lambda *_: calls.append(1))
    layers = prefix.layers()
    assert len(calls) == 1 and len(layers) == 3
    with attach_prefix(model, prefix):
        calls.clear()
        model(input_ids=torch.randint(3, 100, (4, 6)), labels=torch.randint(3, 100, (4, 6))).loss.backward()
    assert len(calls) == 1
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in prefix.parameters())


def test_mlp_prefix_fitted_to_a_text():
    model, options = tiny_model("llama"), {"init": "text", "text": "a restaurant near", "tokenizer": tiny_tokenizer()}
    target = Prefix.for_model(model, 5, **options)
    fitted = mlp_prefix(model, hidden_size=64, **options)
    for got, expected in zip(fitted.layers(), target.layers(), strict=True):
        for tensor, real in zip(got, expected, strict=True):
            assert (tensor - real).norm() < 0.02 * real.norm()
    assert all(p.requires_grad and p.grad is None for p in fitted.parameters())


# The constructor and what every module can do


def test_constructor_takes_tensors_without_a_copy():
    layers = pairs(value_dim=6)
    prefix = Prefix({"decoder": layers, "cross": pairs(layers=1, kv_heads=5)}, position_offset=0, base_model="tiny")
    assert_layers(prefix.layers(), layers)
    assert prefix.layers()[1][0].data_ptr() == layers[1][0].data_ptr()
    assert prefix.parts == {"decoder": ModelShape(2, 2, 4, 6), "cross": ModelShape(1, 5, 4, 4)}
    assert (prefix.prefix_len, prefix.position_offset, prefix.base_model) == (3, 0, "tiny")
    assert "prefix_len=3, position_offset=0, decoder: 2 layers, 2 kv_heads, head_dim 4, value_dim 6; cross: 1" in repr(prefix)
    assert len(prefix.layers("cross")) == 1
    with pytest.raises(ValueError, match="part: expected one of this prefix, decoder, cross, got 'encoder'"):
        prefix.layers("encoder")


def transposed():
    key, value = pairs(1)[0]
    return [(key.mT.contiguous().mT, value)]


def test_constructor_makes_strided_tensors_contiguous():
    layers = transposed()
    prefix = Prefix({"decoder": layers})
    assert prefix.layers()[0][0].is_contiguous()
    assert_layers(prefix.layers(), layers)


@pytest.mark.parametrize(
    "parts, options, error, match",
    (
        ({}, {}, ValueError, "parts: expected one or more of decoder, encoder, cross, got \\[\\]"),
        ({"head": pairs()}, {}, ValueError, "parts: expected one or more of decoder.*, got \\['head'\\]"),
        ({"decoder": []}, {}, ValueError, "parts: expected at least one layer of decoder, got none"),
        ({"decoder": pairs(prefix_len=0)}, {}, ValueError, "of each layer of decoder non-empty"),
        ({"decoder": pairs(dtype=torch.int64)}, {}, ValueError, "one floating dtype"),
        ({"decoder": pairs() + pairs(dtype=torch.float64)}, {}, ValueError, "one floating dtype"),
        ({"decoder": pairs() + pairs(prefix_len=4)}, {}, ValueError, "of one prefix_len"),
        ({"decoder": [(key, value.half()) for key, value in pairs()]}, {}, ValueError, "one floating dtype"),
        ({"decoder": [(key[:1], value) for key, value in pairs()]}, {}, ValueError, "of each layer of decoder non-empty"),
        ({"decoder": [(key[:, 1:], value) for key, value in pairs()]}, {}, ValueError, "of each layer of decoder non-empty"),
        ({"decoder": [(key[0], value[0]) for key, value in pairs()]}, {}, ValueError, "of each layer of decoder non-empty"),
        ({"decoder": pairs(), "cross": pairs(prefix_len=4)}, {}, ValueError, "expected the same prefix_len .* got \\[3, 4\\]"),
        ({"decoder": pairs()}, {"position_offset": -1}, ValueError, "position_offset: expected at least 0, got -1"),
        ({"decoder": pairs()}, {"position_offset": 1.5}, TypeError, "position_offset: expected an int, got 1.5"),
    ),
)
def test_constructor_refuses(parts, options, error, match):
    with pytest.raises(error, match=match):
        Prefix(parts, **options)


@pytest.mark.parametrize("kind", (np.int64, np.array))
def test_what_can_be_an_index_is_an_int(kind, tmp_path):
    model = tiny_model("llama")
    sizes = {"prefix_len": 5, "hidden_size": 8, "seed": 3}
    prefix = Prefix.for_model(model, reparametrization="mlp", **{name: kind(size) for name, size in sizes.items()})
    expected = Prefix.for_model(model, reparametrization="mlp", **sizes)
    assert all(map(torch.equal, prefix.parameters(), expected.parameters()))
    moved = Prefix({"decoder": prefix.layers()}, position_offset=kind(2))
    moved.save(tmp_path)
    assert type(moved.position_offset) is int and Prefix.load(tmp_path).position_offset == 2


def test_an_mlp_for_layers_that_differ(tmp_path):
    model, tokenizer = tiny_model("gemma4"), tiny_tokenizer()
    prefix = Prefix.for_model(model, 5, init="text", text="a cat&dog", tokenizer=tokenizer, reparametrization="mlp")
    assert prefix.parts["decoder"] == model_shape(model.config) and not prefix.parts["decoder"].uniform
    text = Prefix.for_model(model, 5, init="text", text="a cat&dog", tokenizer=tokenizer)
    for pair, expected in zip(prefix.layers(), text.layers(), strict=True):
        for tensor, wanted in zip(pair, expected, strict=True):
            assert tensor.is_contiguous() and tensor.shape == wanted.shape
            assert (tensor - wanted).norm() < 0.1 * wanted.norm()
    prefix.save(tmp_path, keep_reparametrization=True)
    for one, other in zip(Prefix.load(tmp_path).parameters(), prefix.parameters(), strict=True):
        assert torch.equal(one, other)
    with attach_prefix(model, prefix):
        model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in prefix.parameters())


def test_layers_may_differ_in_heads_and_dims(tmp_path):
    prefix = Prefix({"decoder": pairs(1, 2, 3, 4, 4) + pairs(2, 1, 3, 8, 8)})
    assert prefix.parts["decoder"] == ModelShape(3, (2, 1, 1), (4, 8, 8), [4, 8, 8])
    assert "3 layers, (2, 1, 1) kv_heads, head_dim (4, 8, 8)" in repr(prefix)
    prefix.save(tmp_path)
    loaded = Prefix.load(tmp_path)
    assert loaded.parts == prefix.parts
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), prefix.parameters(), strict=True))
    with pytest.raises(ValueError, match="head_dim: expected one for each of 3 layers, got 2 of them"):
        ModelShape(3, 2, (4, 8), 4)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    config["parts"]["decoder"]["kv_heads"] = [2, 0, 1]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="decoder.kv_heads: expected at least 1, got 0"):
        Prefix.load(tmp_path)


@pytest.mark.parametrize(
    "prefix, match",
    (
        (Prefix({"decoder": pairs(layers=2, head_dim=16, value_dim=16)}), "made for a model with 2 layers, 2 kv_heads"),
        (Prefix({"decoder": pairs(3, 4, 3, 16, 16)}, base_model="big"), "made for big with 3 layers, 4 kv_heads, head_dim 16"),
        (Prefix({"decoder": pairs(3, 2, 3, 8, 8)}), "head_dim 8"),
        (Prefix({"decoder": pairs(3, 2, 3, 16, 8)}), "head_dim 16, value_dim 8"),
        (Prefix({"encoder": pairs(3, 2, 3, 16, 16)}), "without a decoder part"),
    ),
)
def test_check_fits_refuses_and_says_both_shapes(prefix, match):
    model = tiny_model("llama")
    with pytest.raises(
        ValueError, match=f"prefix: expected one for LlamaForCausalLM with 3 layers, 2 kv_heads.*, got one .*{match}"
    ):
        prefix.check_fits(model)
    model.config.name_or_path = "someone/tiny"
    with pytest.raises(ValueError, match="expected one for someone/tiny with"):
        prefix.check_fits(model)


@pytest.mark.parametrize("make", (lambda: random_prefix(tiny_model("llama")), mlp_prefix), ids=("plain", "mlp"))
def test_state_dict_copies_and_conversions(make):
    prefix, other = make(), make()
    expected = [[tensor.detach().clone() for tensor in pair] for pair in prefix.layers()]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert other.layers()[0][0].abs().max() == 0
    other.load_state_dict(prefix.state_dict())
    copied, pickled = copy.deepcopy(prefix), pickle.loads(pickle.dumps(prefix))
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.zero_()
    for same in (other, copied, pickled):
        assert_layers(same.layers(), expected)
        assert (same.prefix_len, same.position_offset, same.parts) == (5, 5, prefix.parts)
    with pytest.raises(NotImplementedError, match="assign: expected False, got True; a model that the prefix is attached to"):
        other.load_state_dict(prefix.state_dict(), assign=True)
    doubled = copied.to(torch.float64)
    assert doubled is copied and {tensor.dtype for pair in doubled.layers() for tensor in pair} == {torch.float64}
    assert {p.device.type for p in pickled.to("meta").parameters()} == {"meta"}


def test_a_family_that_is_not_served_is_refused_before_anything_is_trained():
    model = transformers.XLNetLMHeadModel(transformers.XLNetConfig(vocab_size=32, d_model=16, n_layer=1, n_head=2, d_inner=16))
    with pytest.raises(NotImplementedError, match="model: expected one of type .*, got 'xlnet'"):
        Prefix.for_model(model, 4)
