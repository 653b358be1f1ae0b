"""Encoder-decoders with prefixes of encoder, decoder and cross-attention equal their eager attention over expanded prefixes."""

import copy
import inspect

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, T5Config, T5EncoderModel
from transformers.modeling_outputs import BaseModelOutput

from prefix_tuning import Prefix, attach_prefix, attention
from support.checkpointing import counted_attention, enable_checkpointing, train_with_checkpointing
from support.encoder_decoders import FAMILIES, PARTS, labels, parts_of, source, tiny_encoder_decoder
from support.expanded_prefix import expanded_prefix
from support.models import random_prefix
from support.tokenizer import tiny_tokenizer

PREFIX_LEN = 5
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
SUBSETS = (*((part,) for part in PARTS), PARTS)
# Random models repeat themselves; where no token may come twice, each of the eight tells something.
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "no_repeat_ngram_size": 1}


def random_parts(model, parts=PARTS):
    return random_prefix(model, PREFIX_LEN, parts=parts)


def with_positions(model, inputs):
    """Where a family takes positions, attached prefixes count padded rows from their first token; the reference is told."""
    if model.config.model_type != "t5gemma":
        return inputs
    return inputs | {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny_encoder_decoder(request.param)


@pytest.mark.parametrize("parts", SUBSETS, ids="-".join)
def test_logits_loss_and_gradients_equal_expanded_prefixes(model, parts, proven):
    prefix = random_parts(model, parts)
    assert (set(prefix.parts), prefix.position_offset) == (set(parts), 0)
    for side in (None,) if model.config.model_type == "whisper" else (None, "left", "right"):
        inputs = source(model, side=side) | {"labels": labels()}
        with expanded_prefix(model, prefix, parts_of(model), encoder=(3, 0) if side == "left" else (0,)):
            expected = model(**with_positions(model, inputs))
            expected_grads = torch.autograd.grad(expected.loss, list(prefix.parameters()))
        with attach_prefix(model, prefix):
            got = model(**inputs)
            grads = torch.autograd.grad(got.loss, list(prefix.parameters()))
            torch.testing.assert_close(got.logits, expected.logits, **TOLERANCE)
        torch.testing.assert_close(got.loss, expected.loss, **TOLERANCE)
        torch.testing.assert_close(grads, expected_grads, atol=1e-6, rtol=1e-4)
        assert min(grad.abs().max() for grad in grads) > 1e-4
    padding = "not possible: sound is not padded" if model.config.model_type == "whisper" else "yes"
    proven(model.config.model_type, f"forward, loss, gradients: {', '.join(parts)}")
    proven(model.config.model_type, f"left and right padding: {', '.join(parts)}", outcome=padding)


def test_each_part_alone_is_seen_and_detach_restores(model):
    prefix, inputs = random_parts(model), source(model, side="right") | {"labels": labels()}
    modules = {module for modules in parts_of(model).values() for module in modules}
    configs = {module: module.config for module in model.modules() if hasattr(module, "config")}
    before = model(**inputs).logits
    with attach_prefix(model, prefix):
        whole = model(**inputs).logits
        for part in PARTS:
            saved = {name: parameter.clone() for name, parameter in prefix.named_parameters()}
            with torch.no_grad():
                for pair in prefix.layers(part):
                    for tensor in pair:
                        tensor.zero_()
            assert (model(**inputs).logits - whole).abs().max() > 1e-2, part
            prefix.load_state_dict(saved)
        assert torch.equal(model(**inputs).logits, whole)
    assert (whole - before).abs().max() > 1e-2
    assert all(module.config is config for module, config in configs.items())
    assert not any("layer_prefix" in vars(module) for module in modules)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("options", ({}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}), ids=str)
def test_generated_tokens_equal_expanded_prefixes(model, options, proven):
    prefix, inputs = random_parts(model), source(model, side="right")
    eager = {name: value for name, value in options.items() if name == "num_beams"}
    with expanded_prefix(model, prefix, parts_of(model)):
        expected = model.generate(**inputs, **GREEDY, **eager)
    with attach_prefix(model, prefix):
        got = model.generate(**inputs, **GREEDY, **options)
    assert torch.equal(got, expected)
    assert len(got[0].unique()) >= 8
    names = {"num_beams": "beams", "cache_implementation": "static cache", "use_cache": "use_cache=False"}
    proven(model.config.model_type, next((names[option] for option in options), "greedy"))


@pytest.mark.parametrize("parts", (("encoder",), ("cross",)), ids="-".join)
def test_each_subset_generates(model, parts):
    prefix, inputs = random_parts(model, parts), source(model)
    with expanded_prefix(model, prefix, parts_of(model)):
        expected = model.generate(**inputs, **GREEDY, num_beams=2)
    with attach_prefix(model, prefix):
        got = model.generate(**inputs, **GREEDY, num_beams=2)
    assert torch.equal(got, expected)


def test_positions_behind_a_prefix_equal_a_filled_cache(model):
    """As PEFT's adapters have it: the decoder's tokens stand behind the prefix. The plain model gets it in its cache."""
    model = copy.deepcopy(model)
    prefix = random_parts(model, ("decoder",))
    prefix.position_offset = PREFIX_LEN
    inputs, tokens = source(model), labels().clamp(min=3)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for index, (key, value) in enumerate(prefix.layers("decoder")):
        cache.self_attention_cache.update(key.expand(2, -1, -1, -1), value.expand(2, -1, -1, -1), index)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # renamed in 5.24
    expected = model(**inputs, decoder_input_ids=tokens, **{name: cache}).logits
    with attach_prefix(model, prefix, prefix_window="peft"):
        got = model(**inputs, decoder_input_ids=tokens, use_cache=False).logits
        stepwise = model.generate(**inputs, **GREEDY)
        whole = model.generate(**inputs, **GREEDY, use_cache=False)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    assert torch.equal(stepwise, whole)
    prefix.position_offset = 0
    with attach_prefix(model, prefix, prefix_window="peft"):
        same = torch.allclose(model(**inputs, decoder_input_ids=tokens).logits, got, atol=1e-3)
    assert same == (model.config.model_type in ("t5", "mt5")), "distances alone count for T5"


def test_positions_past_a_table_are_refused():
    model = tiny_encoder_decoder("bart", max_position_embeddings=8)
    prefix = random_parts(model, ("decoder", "encoder"))
    prefix.position_offset = PREFIX_LEN
    with attach_prefix(model, prefix):
        model(**source(model, length=3), decoder_input_ids=labels(length=3).clamp(min=0))
        with pytest.raises(ValueError, match="the model's 8 .*, got 9 positions"):
            model(**source(model, length=3), decoder_input_ids=labels(length=4).clamp(min=0))
        with pytest.raises(ValueError, match="the model's 8 .*, got 10 positions"):
            model(**source(model, length=5), decoder_input_ids=labels(length=3).clamp(min=0))


def test_gradient_checkpointing_recomputes_and_changes_nothing(model, proven):
    model = copy.deepcopy(model)
    prefix, inputs = random_parts(model), source(model, side="right") | {"labels": labels(), "use_cache": False}
    with attach_prefix(model, prefix), counted_attention() as calls:
        expected = torch.autograd.grad(model(**inputs).loss, list(prefix.parameters()))
        once = len(calls)
        train_with_checkpointing(model)
        calls.clear()
        grads = torch.autograd.grad(model(**inputs).loss, list(prefix.parameters()))
    assert len(calls) == 2 * once
    torch.testing.assert_close(grads, expected, atol=1e-6, rtol=1e-4)
    proven(model.config.model_type, "gradient checkpointing")


@pytest.mark.parametrize("parts", SUBSETS, ids="-".join)
def test_reentrant_checkpointing_is_refused(model, parts):
    model = copy.deepcopy(model)
    enable_checkpointing(model, use_reentrant=True)
    with attach_prefix(model, random_parts(model, parts)), pytest.raises(ValueError, match="use_reentrant=False"):
        model(**source(model), labels=labels(), use_cache=False)


def test_an_mlp_for_each_part_is_evaluated_once_a_forward_pass(tmp_path):
    model = tiny_encoder_decoder("bart")
    prefix = Prefix.for_model(model, PREFIX_LEN, reparametrization="mlp", hidden_size=8, seed=0)
    calls = []
    for part, mlp in prefix.reparametrization.items():
        mlp.register_forward_hook(lambda *_, part=part: calls.append(part))
    with attach_prefix(model, prefix):
        calls.clear()
        loss = model(**source(model), labels=labels()).loss
        assert sorted(calls) == sorted(PARTS)
        loss.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in prefix.parameters())
        with torch.no_grad():  # generate calls the encoder by itself: it must see the change
            for parameter in prefix.parameters():
                parameter.add_(0.1)
        after = model.generate(**source(model), **GREEDY)
    prefix.save(tmp_path)
    with attach_prefix(model, Prefix.load(tmp_path)):
        assert torch.equal(model.generate(**source(model), **GREEDY), after)


def test_every_family_takes_an_mlp(model):
    prefix = Prefix.for_model(model, PREFIX_LEN, reparametrization="mlp", hidden_size=8, seed=0)
    with attach_prefix(model, prefix):
        model(**source(model), labels=labels()).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in prefix.parameters())


def test_a_row_padded_on_the_left_equals_the_row_alone(model):
    """Where the plain model has it so; BART's kind counts columns."""
    if model.config.model_type not in ("m2m_100", "mt5", "t5", "t5gemma"):
        return
    prefix, inputs, tokens = random_parts(model), source(model, side="left"), labels().clamp(min=3)
    alone = {"input_ids": inputs["input_ids"][:1, 3:], "attention_mask": inputs["attention_mask"][:1, 3:]}
    with attach_prefix(model, prefix):
        expected = model(**alone, decoder_input_ids=tokens[:1]).logits
        got = model(**inputs, decoder_input_ids=tokens).logits[:1]
    torch.testing.assert_close(got, expected, **TOLERANCE)


def test_padding_of_the_decoders_input(model):
    prefix, tokens = random_parts(model), labels(length=6).clamp(min=3)
    mask = torch.ones_like(tokens)
    mask[0, -2:], mask[1, :2] = 0, 0
    inputs = source(model) | {"decoder_input_ids": tokens, "decoder_attention_mask": mask}
    told = {"decoder_position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if model.config.model_type == "t5gemma" else {}
    with expanded_prefix(model, prefix, parts_of(model), decoder=(0, 2)):
        expected = model(**inputs, **told).logits
    with attach_prefix(model, prefix):
        got = model(**inputs).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **TOLERANCE)


@pytest.mark.parametrize("family", ["t5gemma", "t5", "mt5"])
def test_a_padded_beginning_of_the_decoders_with_a_static_cache(family):
    """generate hands the decoder no positions, and in place of the mask one made for the cache."""
    model = tiny_encoder_decoder(family)
    prefix, inputs = random_parts(model), source(model)
    begin, mask = torch.tensor([[0, 0, 1, 7], [1, 5, 9, 11]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with attach_prefix(model, prefix):
        got, expected = (
            model.generate(**inputs, decoder_input_ids=begin, decoder_attention_mask=mask, **options, **cache)
            for cache in ({"cache_implementation": "static"}, {})
        )
        alone = model.generate(
            **{name: value[:1] for name, value in inputs.items()}, decoder_input_ids=begin[:1, 2:], **options
        )
    assert torch.equal(got, expected) and torch.equal(got[:1, 2:], alone)


@pytest.mark.parametrize("family", ("bart", "t5"))
def test_masks_over_pairs(family):
    model = tiny_encoder_decoder(family)
    ids, mask = (source(model, side="right")[name] for name in ("input_ids", "attention_mask"))
    inputs = {"decoder_input_ids": ids[:, :5], "use_cache": False}
    added = torch.zeros(len(mask), 1, 1, mask.shape[1]).masked_fill(mask[:, None, None] == 0, -torch.inf)
    causal = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    with attach_prefix(model, random_parts(model)):
        expected = model(input_ids=ids, attention_mask=mask, **inputs).logits
        got = model(input_ids=ids, attention_mask=added, decoder_attention_mask=causal, **inputs).logits
    torch.testing.assert_close(got, expected, **TOLERANCE)


def test_autocast_rounds_no_text():
    for family in ("bart", "t5gemma"):
        model, tokenizer = tiny_encoder_decoder(family), lambda text, **_: {"input_ids": [5, 6, 7]}
        expected = Prefix.for_model(model, 3, init="text", text="name", tokenizer=tokenizer).state_dict()
        with torch.autocast("cpu", torch.bfloat16):
            got = Prefix.for_model(model, 3, init="text", text="name", tokenizer=tokenizer).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())


def test_saved_parts_come_back(tmp_path):
    model = tiny_encoder_decoder("t5")
    prefix = random_parts(model, ("cross", "encoder"))
    prefix.save(tmp_path)
    loaded = Prefix.load(tmp_path)
    assert loaded.parts == prefix.parts and loaded.position_offset == 0
    with attach_prefix(model, prefix):
        expected = model(**source(model), labels=labels()).logits
    with attach_prefix(model, loaded):
        assert torch.equal(model(**source(model), labels=labels()).logits, expected)


@pytest.mark.parametrize("parts", (("encoder",), ("cross",)), ids="-".join)
def test_other_models_and_stacks_on_the_same_config_are_untouched(parts):
    model = tiny_encoder_decoder("bart")
    other = type(model)(model.config).eval()
    before = other(**source(model), labels=labels()).logits
    with attach_prefix(model, random_parts(model, parts)):
        assert torch.equal(other(**source(model), labels=labels()).logits, before)
        untouched = model.model.decoder if parts == ("encoder",) else model.model.encoder
        assert all(m.config is other.config for m in untouched.modules() if hasattr(m, "config"))


@pytest.mark.parametrize("family", ("bart", "t5"))
def test_half_precision_models_with_a_float32_prefix(family):
    model = tiny_encoder_decoder(family)
    prefix, inputs = random_parts(model), source(model, side="left") | {"labels": labels()}
    with attach_prefix(model, prefix):
        expected = model(**inputs).logits
    with attach_prefix(model.to(torch.bfloat16), prefix):
        got = model(**inputs)
        got.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in prefix.parameters())
    assert (got.logits.float() - expected).abs().mean() / expected.abs().mean() < 0.1


def test_compiled_training_step_equals_eager():
    model = tiny_encoder_decoder("t5")
    prefix = random_parts(model)
    inputs = source(model, side="left") | {"labels": labels(), "use_cache": False}
    with attach_prefix(model, prefix):
        expected = torch.autograd.grad(model(**inputs).loss, list(prefix.parameters()))
        torch._dynamo.reset()
        compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
        grads = torch.autograd.grad(compiled(**inputs).loss, list(prefix.parameters()))
    torch.testing.assert_close(grads, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ("t5", "mt5"))
def test_a_bias_lies_in_rows_of_a_multiple_of_eight(name, monkeypatch):
    """From where a GPU reads it, also where its columns are no multiple; the keys of the encoder are up to 17."""
    model, seen = tiny_encoder_decoder(name), []
    real = attention.prefix_attention
    monkeypatch.setattr(
        attention, "prefix_attention", lambda *args, bias, **options: seen.append(bias) or real(*args, bias=bias, **options)
    )
    with attach_prefix(model, random_parts(model)), torch.no_grad():
        for length in (1, 3, 8, 17):
            model(input_ids=torch.ones(2, length, dtype=torch.long), decoder_input_ids=torch.ones(2, 4, dtype=torch.long))
    seen = [bias for bias in seen if bias is not None]  # cross-attention has none
    assert {bias.shape[-1] - PREFIX_LEN for bias in seen} == {1, 3, 4, 8, 17}
    assert all(bias.stride(-1) == 1 for bias in seen)
    assert all(bias.stride(-2) % 8 == 0 for bias in seen if bias.shape[-1] >= 2 * 8)


def test_a_trainable_table_of_relative_positions_is_warned_of():
    model = tiny_encoder_decoder("t5").requires_grad_(True)
    warned = pytest.warns(UserWarning, match="relative_attention_bias gets no gradient")
    with attach_prefix(model, random_parts(model)), warned:
        model(**source(model), labels=labels()).loss.backward()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "whisper"])
def test_a_text_as_the_start(name, proven):
    """The keys and values of the text: in cross-attention as if the encoder's states for it stood before the others."""
    model, tokenizer, text = tiny_encoder_decoder(name), tiny_tokenizer(), "MAX"
    ids = torch.tensor([(tokenizer(text)["input_ids"] * 5)[:PREFIX_LEN]])
    configs = {m: (m.config, m.config._attn_implementation) for m in model.modules() if hasattr(m, "config")}
    prefix = Prefix.for_model(model.train(), PREFIX_LEN, init="text", text=text, tokenizer=tokenizer)
    assert model.training and not any("recorded" in vars(module) for module in model.modules())
    assert all((module.config, module.config._attn_implementation) == found for module, found in configs.items())
    model.eval()
    assert set(prefix.parts) == set(PARTS) and all(parameter.requires_grad for parameter in prefix.parameters())
    seen = {}
    for part, modules in parts_of(model).items():
        for index, module in enumerate(modules):
            for which, names in enumerate((("k_proj", "k"), ("v_proj", "v"))):
                projection = next(getattr(module, name) for name in names if hasattr(module, name))
                place = (part, index, which)
                projection.register_forward_hook(lambda _, args, out, place=place: seen.__setitem__(place, out[0]))
    encoded = model.base_model.encoder(input_ids=ids)[0]
    model(encoder_outputs=BaseModelOutput(encoded), decoder_input_ids=ids, use_cache=False)
    for part in PARTS:
        for index, pair in enumerate(prefix.layers(part)):
            for which, tensor in enumerate(pair):
                if name != "t5gemma" or part == "cross" or which == 1:  # its self-attention turns keys by their positions
                    torch.testing.assert_close(tensor.transpose(0, 1).flatten(1), seen[part, index, which], **TOLERANCE)
    inputs, tokens = source(model), labels().clamp(min=3)
    states = model.base_model.encoder(input_ids=inputs["input_ids"])[0]
    both = torch.cat([encoded.expand(2, -1, -1), states], 1)
    expected = model(encoder_outputs=BaseModelOutput(both), decoder_input_ids=tokens, use_cache=False).logits
    crossing = Prefix.for_model(model, PREFIX_LEN, parts=("cross",), init="text", text=text, tokenizer=tokenizer)
    with attach_prefix(model, crossing):
        got = model(encoder_outputs=BaseModelOutput(states), decoder_input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(got, expected, **TOLERANCE)
    proven(name, "init='text'")


def test_wrong_calls_raise(proven):
    model = tiny_encoder_decoder("bart")
    inputs = source(model) | {"labels": labels()}
    with pytest.raises(ValueError, match="expected 0 … 95, got .*: is it another tokenizer's"):
        Prefix.for_model(model, PREFIX_LEN, init="text", text="the", tokenizer=tiny_tokenizer())
    for parts in ((), ("middle",), "encoder"):
        with pytest.raises(ValueError, match="parts: expected one or more of encoder, decoder, cross for .*, got"):
            Prefix.for_model(model, PREFIX_LEN, parts=parts)
    with pytest.raises(NotImplementedError, match="init: the encoder of WhisperForConditionalGeneration reads input_features"):
        Prefix.for_model(tiny_encoder_decoder("whisper"), PREFIX_LEN, init="text", text="a", tokenizer=tiny_tokenizer())
    proven("whisper", "init='text'", outcome="refused: its encoder reads sound")
    with pytest.raises(NotImplementedError, match="model: expected a causal model, which has the keys"):
        Prefix.from_text(model, None, input_ids=[5, 6])
    with pytest.raises(
        ValueError, match="expected one for Bart.*, got one made for a model with 3 layers, 4 kv_heads, head_dim 12"
    ):
        attach_prefix(model, random_parts(tiny_encoder_decoder("t5"), ("cross",)))
    with attach_prefix(model, random_parts(model, ("cross",))):
        with pytest.raises(ValueError, match="already has a prefix"):
            attach_prefix(model, random_parts(model, ("encoder",)))
        with pytest.raises(NotImplementedError, match="output_attentions"):
            model(**inputs, output_attentions=True)
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 2, "d_ff": 32}
    encoder = T5EncoderModel(T5Config(**sizes, is_encoder_decoder=False))
    with pytest.raises(NotImplementedError, match="expected an encoder and a decoder, got T5EncoderModel"):
        attach_prefix(encoder, random_parts(model))
    whisper = tiny_encoder_decoder("whisper")
    prefix = random_parts(whisper)
    prefix.position_offset = 1
    with pytest.raises(
        NotImplementedError, match="position_offset: expected 0, where WhisperEncoder always has its tokens, got 1"
    ):
        attach_prefix(whisper, prefix)
