"""Prefixes: how they start, what they refuse, and that a saved one comes back as it was."""

import copy
import inspect
import json
import os
import pickle
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from transformers import DynamicCache

from prefix_tuning import Prefix, attach_prefix, prefix_files
from prefix_tuning.families import model_shape
from prefix_tuning.prefix_files import CONFIG_FILE, MLP_FILE, TENSORS_FILE
from prefix_tuning.reparametrization import MLPReparametrization
from prefix_tuning.shapes import ModelShape
from support.models import FAMILIES, random_prefix, tiny_model
from support.tokenizer import CHAT_TEMPLATE, tiny_tokenizer

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # a matrix product over other tokens may round differently
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def cached(model, ids):
    """Of each layer what a plain forward pass over `ids` caches, all tokens of it: (key, value) [kv_heads, tokens, dim]."""
    cache = DynamicCache()
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # renamed in 5.24
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=True, **{name: cache})
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def assert_layers(got, expected, **tolerance):
    for got_pair, expected_pair in zip(got, expected, strict=True):
        torch.testing.assert_close(list(got_pair), list(expected_pair), **tolerance or {"atol": 0, "rtol": 0})


def pairs(layers=2, kv_heads=2, prefix_len=3, head_dim=4, value_dim=4, dtype=torch.float32):
    return [
        (torch.randn(kv_heads, prefix_len, head_dim).to(dtype), torch.randn(kv_heads, prefix_len, value_dim).to(dtype))
        for _ in range(layers)
    ]


def mlp_prefix(model=None, **options):
    options = {"reparametrization": "mlp", "hidden_size": 8, "seed": 0, **options}
    return Prefix.for_model(model or tiny_model("llama"), 5, **options)


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
        ({"prefix_len": 0}, ValueError, "prefix_len: got 0, expected at least 1"),
        ({"prefix_len": 5.0}, TypeError, "prefix_len: got 5.0, expected an int"),
        ({"prefix_len": True}, TypeError, "prefix_len: got True, expected an int"),
        ({"hidden_size": 0}, ValueError, "hidden_size: got 0, expected at least 1"),
        ({"dtype": torch.int32}, TypeError, "dtype: got torch.int32, expected a floating torch.dtype"),
        ({"dtype": "float32"}, TypeError, "dtype: got 'float32'"),
        ({"init": "zeros"}, ValueError, "init: got 'zeros', expected 'text' or 'random'"),
        ({"reparametrization": "lora"}, ValueError, "reparametrization: got 'lora', expected None or 'mlp'"),
        ({"text": "words"}, ValueError, "text: given, but init is 'random'"),
        ({"init": "text", "tokenizer": tiny_tokenizer()}, ValueError, "text: init='text' needs it, got None"),
        ({"init": "text", "text": "words"}, ValueError, "tokenizer: init='text' needs it, got None"),
        ({"init": "text", "text": "", "tokenizer": tiny_tokenizer(bos=True)}, ValueError, "text: '' has no tokens"),
        (
            {"init": "text", "text": "words", "tokenizer": tiny_tokenizer(), "prefix_len": 65},
            ValueError,
            "got 65 tokens, but the model has only 64 positions",
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
    with pytest.raises(ValueError, match="config: PreTrainedConfig has num_hidden_layers None.*expected positive numbers"):
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


# The keys and values of a real text


@pytest.mark.parametrize("family", FAMILIES)
def test_from_text_gives_what_the_model_caches(family):
    model, tokenizer = tiny_model(family), tiny_tokenizer(bos=True, chat_template=CHAT_TEMPLATE)
    text = "longer than a window"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and len(ids) > 8
    expected = cached(model, ids)
    for prefix in (
        Prefix.from_text(model, tokenizer, text),
        Prefix.from_text(model, None, input_ids=ids),
        Prefix.from_text(model, tokenizer, input_ids=torch.tensor(ids)),
        Prefix.from_text(model, tokenizer, input_ids=torch.tensor([ids], dtype=torch.int32)),
    ):
        assert_layers(prefix.layers(), expected, **TOLERANCE)
        assert prefix.prefix_len == prefix.position_offset == len(ids)
        assert not any(p.requires_grad for p in prefix.parameters())


def test_from_text_of_messages_has_no_generation_prompt():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(bos=True, chat_template=CHAT_TEMPLATE)
    ids = tokenizer("user: hi</s>\nassistant: yes</s>\n", add_special_tokens=False)["input_ids"]
    assert_layers(Prefix.from_text(model, tokenizer, messages=MESSAGES).layers(), cached(model, ids), **TOLERANCE)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
def test_from_text_keeps_the_models_dtype_and_name(dtype):
    model = tiny_model("qwen3").to(dtype)
    model.config.name_or_path = "someone/tiny"
    prefix = Prefix.from_text(model, None, input_ids=[5, 6, 7])
    assert {p.dtype for p in prefix.parameters()} == {dtype} and prefix.base_model == "someone/tiny"
    assert_layers(prefix.layers(), cached(model, [5, 6, 7]))


def test_from_text_runs_without_dropout_and_restores_every_mode(monkeypatch):
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    expected = cached(model, [5, 6, 7])
    model.train()
    model.transformer.h[1].mlp.eval()
    modes = [module.training for module in model.modules()]
    assert_layers(Prefix.from_text(model, None, input_ids=[5, 6, 7]).layers(), expected, **TOLERANCE)
    assert [module.training for module in model.modules()] == modes

    def fail(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(model.transformer.h[2], "forward", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        Prefix.from_text(model, None, input_ids=[5, 6, 7])
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    "options, match",
    (
        ({}, "text, messages, input_ids: got none, expected exactly one"),
        ({"text": "a", "messages": MESSAGES}, "got text and messages, expected exactly one"),
        ({"text": "a", "input_ids": [5]}, "got text and input_ids, expected exactly one"),
        ({"text": "a", "tokenizer": None}, "tokenizer: got None, expected the one for text"),
        ({"messages": MESSAGES, "tokenizer": None}, "tokenizer: got None, expected the one for messages"),
        ({"text": ""}, "input_ids: got .* of shape \\[0\\], expected one or more ints"),
        ({"input_ids": []}, "of shape \\[0\\]"),
        ({"input_ids": [[5, 6], [7, 8]]}, "of shape \\[2, 2\\]"),
        ({"input_ids": [5.0]}, "got torch.float32"),
        ({"input_ids": [True, False]}, "got torch.bool"),
        ({"input_ids": [5, 128]}, "got 5 … 128, expected 0 … 127: is it another tokenizer's"),
        ({"input_ids": [-1, 5]}, "got -1 … 5, expected 0 … 127"),
        ({"input_ids": [5] * 65}, "got 65 tokens, but the model has only 64 positions"),
    ),
    ids=str,
)
def test_from_text_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        Prefix.from_text(tiny_model("gpt2"), **{"tokenizer": tiny_tokenizer(), **options})


def test_an_attached_prefix_would_be_seen_by_the_text():
    model = tiny_model("llama")
    with attach_prefix(model, random_prefix(model)):
        with pytest.raises(ValueError, match="model: it has a prefix attached"):
            Prefix.from_text(model, None, input_ids=[5, 6, 7])
        with pytest.raises(ValueError, match="model: it has a prefix attached"):
            Prefix.for_model(model, 3, init="text", text="words", tokenizer=tiny_tokenizer())
    assert_layers(Prefix.from_text(model, None, input_ids=[5, 6, 7]).layers(), cached(model, [5, 6, 7]))


def test_a_model_that_caches_other_shapes_than_its_config_says():
    model = tiny_model("llama")
    model.config.num_key_value_heads = 4
    with pytest.raises(ValueError, match="model: caches 3 tokens, 3 layers, 2 kv_heads.*config says 3 tokens, 3 layers, 4"):
        Prefix.from_text(model, None, input_ids=[5, 6, 7])


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
    with pytest.raises(ValueError, match="part: got 'encoder', but this prefix has only decoder, cross"):
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
        ({}, {}, ValueError, "parts: got \\[\\], expected one or more of decoder, encoder, cross"),
        ({"head": pairs()}, {}, ValueError, "parts: got \\['head'\\], expected one or more of decoder"),
        ({"decoder": []}, {}, ValueError, "parts: decoder has no layers"),
        ({"decoder": pairs(prefix_len=0)}, {}, ValueError, "of each layer non-empty"),
        ({"decoder": pairs(dtype=torch.int64)}, {}, ValueError, "one floating dtype"),
        ({"decoder": pairs() + pairs(dtype=torch.float64)}, {}, ValueError, "one floating dtype"),
        ({"decoder": pairs() + pairs(prefix_len=4)}, {}, ValueError, "of one prefix_len"),
        ({"decoder": [(key, value.half()) for key, value in pairs()]}, {}, ValueError, "one floating dtype"),
        ({"decoder": [(key[:1], value) for key, value in pairs()]}, {}, ValueError, "of each layer non-empty"),
        ({"decoder": [(key[:, 1:], value) for key, value in pairs()]}, {}, ValueError, "of each layer non-empty"),
        ({"decoder": [(key[0], value[0]) for key, value in pairs()]}, {}, ValueError, "of each layer non-empty"),
        ({"decoder": pairs(), "cross": pairs(prefix_len=4)}, {}, ValueError, "got prefix_len \\[3, 4\\], expected the same"),
        ({"decoder": pairs()}, {"position_offset": -1}, ValueError, "position_offset: got -1, expected at least 0"),
        ({"decoder": pairs()}, {"position_offset": 1.5}, TypeError, "position_offset: got 1.5, expected an int"),
    ),
)
def test_constructor_refuses(parts, options, error, match):
    with pytest.raises(error, match=match):
        Prefix(parts, **options)


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
    with pytest.raises(ValueError, match="head_dim: got 2 of them, expected one of each of 3 layers"):
        ModelShape(3, 2, (4, 8), 4)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    config["parts"]["decoder"]["kv_heads"] = [2, 0, 1]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="decoder.kv_heads: got 0, expected at least 1"):
        Prefix.load(tmp_path)


@pytest.mark.parametrize(
    "prefix, match",
    (
        (Prefix({"decoder": pairs(layers=2, head_dim=16, value_dim=16)}), "made for a model with 2 layers, 2 kv_heads"),
        (Prefix({"decoder": pairs(3, 4, 3, 16, 16)}, base_model="big"), "made for big with 3 layers, 4 kv_heads, head_dim 16,"),
        (Prefix({"decoder": pairs(3, 2, 3, 8, 8)}), "head_dim 8"),
        (Prefix({"decoder": pairs(3, 2, 3, 16, 8)}), "head_dim 16, value_dim 8"),
        (Prefix({"encoder": pairs(3, 2, 3, 16, 16)}), "without a decoder part"),
    ),
)
def test_check_fits_refuses_and_says_both_shapes(prefix, match):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=f"prefix: .*{match}.*expected one for LlamaForCausalLM with 3 layers, 2 kv_heads"):
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
    doubled = copied.to(torch.float64)
    assert doubled is copied and {tensor.dtype for pair in doubled.layers() for tensor in pair} == {torch.float64}
    assert {p.device.type for p in pickled.to("meta").parameters()} == {"meta"}


# Saving and loading


def text_prefix(dtype=torch.bfloat16):
    return Prefix.from_text(tiny_model("llama").to(dtype), None, input_ids=[5, 6, 7])


KINDS = {
    "random": lambda: random_prefix(tiny_model("gpt2")),
    "text": text_prefix,
    "half": lambda: Prefix({"decoder": pairs(dtype=torch.float16)}, position_offset=0, base_model="someone/tiny"),
    "parts": lambda: Prefix({"encoder": pairs(1, 3), "cross": pairs(value_dim=5), "decoder": pairs()}, position_offset=9),
    "mlp": mlp_prefix,
}


@pytest.mark.parametrize("kind", KINDS)
def test_saved_prefix_comes_back_as_it_was(kind, tmp_path):
    prefix, directory = KINDS[kind](), tmp_path / "new" / "folder"
    prefix.save(directory)
    loaded = Prefix.load(directory)
    assert {file.name for file in directory.iterdir()} == {CONFIG_FILE, TENSORS_FILE}
    assert loaded.parts == prefix.parts and loaded.reparametrization is None
    for part in prefix.parts:
        assert_layers(loaded.layers(part), prefix.layers(part))
    names = ("prefix_len", "position_offset", "base_model")
    assert [getattr(loaded, name) for name in names] == [getattr(prefix, name) for name in names]
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    for converted in (Prefix.load(str(directory), dtype=torch.float64), Prefix.load(directory, device="meta")):
        tensor = converted.layers(next(iter(prefix.parts)))[0][0]
        assert tensor.dtype == torch.float64 or tensor.device.type == "meta"


def test_saved_files_are_documented_readable_by_others_and_stable(tmp_path):
    umask = os.umask(0o022)
    try:
        Prefix({"decoder": pairs(value_dim=6)}, position_offset=0, base_model="tiny").save(tmp_path)
        mlp_prefix().save(tmp_path / "mlp", keep_reparametrization=True)
    finally:
        os.umask(umask)
    config = json.loads((tmp_path / CONFIG_FILE).read_text(encoding="utf-8"))
    assert config.pop("library_version")
    assert config == {
        "format": "prefix-tuning", "format_version": 1, "base_model": "tiny", "prefix_len": 3, "position_offset": 0,
        "parts": {"decoder": {"layers": 2, "kv_heads": 2, "head_dim": 4, "value_dim": 6}},
    }  # fmt: skip
    tensors = safetensors.torch.load_file(tmp_path / TENSORS_FILE)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"decoder.{layer}.{name}": (2, 3, dim) for layer in (0, 1) for name, dim in (("key", 4), ("value", 6))
    }
    files = [*tmp_path.glob("*.*"), *(tmp_path / "mlp").glob("*.*")]
    assert len(files) == 5 and {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o644}


def test_kept_mlp_goes_on_and_a_later_save_without_removes_it(tmp_path):
    prefix = mlp_prefix()
    prefix.save(tmp_path, keep_reparametrization=True)
    loaded = Prefix.load(tmp_path)
    for name, tensor in prefix.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert_layers(loaded.layers(), prefix.layers())
    assert isinstance(loaded.reparametrization["decoder"], MLPReparametrization)
    sum(tensor.square().sum() for pair in loaded.layers() for tensor in pair).backward()
    assert all(p.grad.abs().max() > 0 for p in loaded.parameters())
    assert {p.dtype for p in Prefix.load(tmp_path, dtype=torch.float64).parameters()} == {torch.float64}
    other = random_prefix(tiny_model("llama"))
    other.save(tmp_path, keep_reparametrization=True)
    assert not (tmp_path / MLP_FILE).exists()
    assert_layers(Prefix.load(tmp_path).layers(), other.layers())


def test_mlp_beside_a_part_without_one(tmp_path):
    mlp = mlp_prefix().reparametrization["decoder"]
    prefix = Prefix({"decoder": mlp, "cross": pairs(prefix_len=5)})
    prefix.save(tmp_path, keep_reparametrization=True)
    loaded = Prefix.load(tmp_path)
    assert set(loaded.reparametrization) == {"decoder"}
    for part in ("decoder", "cross"):
        assert_layers(loaded.layers(part), prefix.layers(part))


FAILURES = [  # the call that fails, and whose keys and values are loaded afterwards
    ("save_file", 1, "old"),
    ("save_file", 2, "old"),
    ("write_text", 1, "old"),
    ("replace", 1, "old"),
    ("replace", 2, "new"),
    ("replace", 3, "new"),
]


@pytest.mark.parametrize("name, call, whose", FAILURES)
def test_a_save_that_fails_leaves_a_whole_prefix(name, call, whose, tmp_path, monkeypatch):
    """The MLP is replaced first: it decides what is loaded, and whatever stands beside it has the same shape."""
    old, new = mlp_prefix(seed=1), mlp_prefix(seed=2)
    old.save(tmp_path, keep_reparametrization=True)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    owner, calls = {"save_file": prefix_files, "write_text": Path, "replace": os}[name], []
    original = getattr(owner, name)

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise OSError("no space left")
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failing)
        with pytest.raises(OSError, match="no space left"):
            new.save(tmp_path, keep_reparametrization=True)
    assert len(calls) == call
    assert {file.name for file in tmp_path.iterdir()} == set(before)
    if whose == "old":
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert_layers(Prefix.load(tmp_path).layers(), {"old": old, "new": new}[whose].layers())


def test_a_stale_mlp_goes_before_anything_is_replaced(tmp_path, monkeypatch):
    """Else a save that dies in between would leave new keys and values that the old MLP overrules."""
    old = mlp_prefix(seed=1)
    old.save(tmp_path, keep_reparametrization=True)

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            random_prefix(tiny_model("llama")).save(tmp_path)
    assert not (tmp_path / MLP_FILE).exists()
    assert_layers(Prefix.load(tmp_path).layers(), old.layers())


def edited(**changes):
    """Writes the json with these keys changed; a value of `...` takes its key away."""

    def damage(directory):
        config = json.loads((directory / CONFIG_FILE).read_text())
        config = {name: value for name, value in {**config, **changes}.items() if value is not ...}
        (directory / CONFIG_FILE).write_text(json.dumps(config))

    return damage


def written(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def truncated(name, share=0.5):
    def damage(directory):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(len(content) * share)])

    return damage


def tensors(name, change):
    def damage(directory):
        found = safetensors.torch.load_file(directory / name)
        change(found)
        safetensors.torch.save_file(found, directory / name)

    return damage


def without(name):
    return lambda directory: (directory / name).unlink()


SHAPE = {"layers": 3, "kv_heads": 2, "head_dim": 16, "value_dim": 16}
KEY = "decoder.0.key"
DAMAGES = {
    "no json": (CONFIG_FILE, without(CONFIG_FILE), FileNotFoundError, "no such file, expected the description"),
    "no tensors": (TENSORS_FILE, without(TENSORS_FILE), FileNotFoundError, "no such file, expected the tensors"),
    "empty json": (CONFIG_FILE, written(CONFIG_FILE, b""), ValueError, "expected JSON"),
    "cut json": (CONFIG_FILE, truncated(CONFIG_FILE), ValueError, "expected JSON"),
    "binary json": (CONFIG_FILE, written(CONFIG_FILE, b"\xff\xfe\x00"), ValueError, "expected JSON"),
    "json list": (CONFIG_FILE, written(CONFIG_FILE, b"[]"), ValueError, "got format list, expected"),
    "peft json": (CONFIG_FILE, written(CONFIG_FILE, b'{"peft_type": "PREFIX_TUNING"}'), ValueError, "got format .None, None."),
    "format": (CONFIG_FILE, edited(format="other"), ValueError, "got format .'other', 1., expected .'prefix-tuning', 1."),
    "version": (CONFIG_FILE, edited(format_version=2), ValueError, "got format .'prefix-tuning', 2., expected"),
    "no prefix_len": (CONFIG_FILE, edited(prefix_len=...), ValueError, "expected the key 'prefix_len', got only format, "),
    "no parts": (CONFIG_FILE, edited(parts=...), ValueError, "expected the key 'parts'"),
    "prefix_len 0": (CONFIG_FILE, edited(prefix_len=0), ValueError, "prefix_len: got 0, expected at least 1"),
    "prefix_len text": (CONFIG_FILE, edited(prefix_len="5"), ValueError, "prefix_len: got '5', expected an int"),
    "offset": (CONFIG_FILE, edited(position_offset=-1), ValueError, "position_offset: got -1, expected at least 0"),
    "offset null": (CONFIG_FILE, edited(position_offset=None), ValueError, "position_offset: got None, expected an int"),
    "base_model": (CONFIG_FILE, edited(base_model=None), ValueError, "base_model: got None, expected a string"),
    "parts list": (CONFIG_FILE, edited(parts=["decoder"]), ValueError, "parts: got .*expected one or more of decoder"),
    "parts empty": (CONFIG_FILE, edited(parts={}), ValueError, "parts: got {}, expected one or more"),
    "parts name": (CONFIG_FILE, edited(parts={"head": SHAPE}), ValueError, "expected one or more of decoder"),
    "shape list": (CONFIG_FILE, edited(parts={"decoder": [3, 2]}), ValueError, "decoder: got .*expected layers, kv_heads"),
    "shape short": (CONFIG_FILE, edited(parts={"decoder": {"layers": 3}}), ValueError, "decoder: got .*expected layers"),
    "shape 0": (CONFIG_FILE, edited(parts={"decoder": {**SHAPE, "kv_heads": 0}}), ValueError, "decoder.kv_heads: got 0"),
    "empty file": (TENSORS_FILE, written(TENSORS_FILE, b""), ValueError, "damaged, or not a safetensors file"),
    "cut header": (TENSORS_FILE, truncated(TENSORS_FILE, 0.01), ValueError, "damaged, or not a safetensors file"),
    "cut data": (TENSORS_FILE, truncated(TENSORS_FILE, 0.9), ValueError, "damaged, or not a safetensors file"),
    "pickle": (TENSORS_FILE, written(TENSORS_FILE, pickle.dumps([0] * 99)), ValueError, "damaged, or not a safetensors file"),
    "length": (TENSORS_FILE, edited(prefix_len=6), ValueError, r"\[2, 5, 16\], but by .* \[2, 6, 16\] \(6 such differences"),
    "more layers": (
        TENSORS_FILE, edited(parts={"decoder": {**SHAPE, "layers": 4}}), ValueError,
        r"decoder.3.key is missing, but by prefix_config.json expected \[2, 5, 16\] \(2 such differences",
    ),
    "fewer layers": (
        TENSORS_FILE, edited(parts={"decoder": {**SHAPE, "layers": 2}}), ValueError,
        "decoder.2.key is .*expected no such tensor",
    ),
    "a tensor gone": (TENSORS_FILE, tensors(TENSORS_FILE, lambda t: t.pop(KEY)), ValueError, "decoder.0.key is missing"),
    "a foreign tensor": (
        TENSORS_FILE, tensors(TENSORS_FILE, lambda t: t.update(a=torch.ones(1))), ValueError, "a is .1., but by",
    ),
    "dtypes": (
        TENSORS_FILE, tensors(TENSORS_FILE, lambda t: t.update({KEY: t[KEY].half()})), ValueError,
        "got torch.float16, torch.float32, expected one floating dtype",
    ),
    "ints": (
        TENSORS_FILE, tensors(TENSORS_FILE, lambda t: t.update({n: v.int() for n, v in t.items()})), ValueError,
        "got torch.int32, expected one floating dtype",
    ),
    "mlp cut": (MLP_FILE, truncated(MLP_FILE), ValueError, "damaged, or not a safetensors file"),
    "mlp empty": (MLP_FILE, tensors(MLP_FILE, dict.clear), ValueError, "got no tensor, expected one floating dtype"),
    "mlp half": (
        MLP_FILE, tensors(MLP_FILE, lambda t: t.pop("decoder.output.bias")), ValueError, "decoder.output.bias is missing",
    ),
    "mlp of another length": (
        MLP_FILE, tensors(MLP_FILE, lambda t: t.update({"decoder.embedding.weight": torch.ones(4, 64)})), ValueError,
        r"decoder.embedding.weight is \[4, 64\], but by prefix_config.json expected \[5, 64\]",
    ),
    "mlp of no part": (
        MLP_FILE, tensors(MLP_FILE, lambda t: [t.update({n.replace("de", "en"): t.pop(n)}) for n in list(t)]), ValueError,
        "expected no such tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named_with_what_was_expected(damage, tmp_path):
    file, apply, error, match = DAMAGES[damage]
    mlp_prefix().save(tmp_path, keep_reparametrization=True)
    Prefix.load(tmp_path)
    apply(tmp_path)
    with pytest.raises(error, match=match) as caught:
        Prefix.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / file}: ")


def test_load_refuses_wrong_dtypes_and_places_that_are_none(tmp_path):
    with pytest.raises(TypeError, match="dtype: got torch.int64"):
        Prefix.load(tmp_path, dtype=torch.int64)
    for place in (tmp_path / "missing", "someone/never-cached-prefix", "no//place"):
        with pytest.raises(FileNotFoundError, match=f"{place}: neither a folder nor a hub repository in reach"):
            Prefix.load(place)


# The hub, without a network


def test_push_to_hub_uploads_what_save_writes(monkeypatch):
    prefix, calls = mlp_prefix(), []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))

        def upload_folder(self, *, repo_id, folder_path, **options):
            loaded = Prefix.load(folder_path)
            assert_layers(loaded.layers(), prefix.layers())
            calls.append(("upload", repo_id, sorted(os.listdir(folder_path)), options, folder_path))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    prefix.push_to_hub("someone/prefix", private=True, token="secret", commit_message="first")
    *_, (*upload, folder) = calls
    assert calls[:2] == [("token", "secret"), ("create", "someone/prefix", {"private": True, "exist_ok": True})]
    assert upload == ["upload", "someone/prefix", sorted([TENSORS_FILE, CONFIG_FILE]), {"commit_message": "first"}]
    assert not Path(folder).exists()


def test_load_from_the_hub_downloads_the_prefix_alone(tmp_path, monkeypatch):
    prefix, asked = mlp_prefix(), []
    prefix.save(tmp_path, keep_reparametrization=True)

    def snapshot_download(repo_id, allow_patterns):
        asked.append((repo_id, set(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loaded = Prefix.load("someone/prefix", dtype=torch.float64)
    assert asked == [("someone/prefix", {CONFIG_FILE, TENSORS_FILE, MLP_FILE})]
    assert loaded.reparametrization is not None
    assert_layers(loaded.layers(), [[t.double() for t in pair] for pair in prefix.layers()], atol=1e-6, rtol=1e-6)
