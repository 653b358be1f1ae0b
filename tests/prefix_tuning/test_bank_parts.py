"""Banks for encoder-decoders and encoders: rows with different prefixes equal each row alone with its own."""

import pytest
import torch

from prefix_tuning import PrefixBank, attach_prefix
from prefix_tuning.generate import generate_texts
from support import encoders
from support.banks import NAMES, alone, prefix_of
from support.encoder_decoders import FAMILIES, PARTS, labels, source, tiny_encoder_decoder
from support.models import tiny_model
from support.tokenizer import tiny_tokenizer

TOLERANCE = {"atol": 3e-5, "rtol": 1e-4}
# Random models repeat themselves; where no token may come twice, each of the eight tells something.
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "no_repeat_ngram_size": 1}
OPTIONS = ({}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False})


def prefixes_of(model, parts=PARTS):
    return {"short": prefix_of(model, 3, 1, parts=parts), "long": prefix_of(model, 6, 2, parts=parts)}


def row_of(inputs, row):
    return {name: tensor[row : row + 1] for name, tensor in inputs.items()}


@pytest.fixture(scope="module", params=[family for family in FAMILIES if family != "whisper"])
def model(request):
    return tiny_encoder_decoder(request.param)


@pytest.mark.parametrize("parts", (PARTS, ("encoder",), ("decoder",), ("cross",), ("encoder", "cross")), ids="-".join)
def test_logits_equal_each_row_alone(model, parts):
    prefixes = prefixes_of(model, parts)
    for side in (None, "left", "right"):
        inputs = source(model, batch=3, side=side) | {"decoder_input_ids": labels(batch=3).clamp(min=3)}
        expected = alone(model, prefixes, NAMES, lambda row, inputs=inputs: model(**row_of(inputs, row)).logits)
        with attach_prefix(model, PrefixBank(prefixes, capacity=3)) as attachment:
            for names in (NAMES, attachment.prefix.ids(NAMES)):
                got = model(**inputs, prefix_ids=names).logits
                torch.testing.assert_close(got, expected, **TOLERANCE)
            assert (model(**inputs, prefix_ids=NAMES[::-1]).logits - got).abs().max() > 1e-2


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("parts", (PARTS, ("encoder",), ("cross",)), ids="-".join)
def test_generated_tokens_equal_each_row_alone(model, parts, options):
    prefixes, options = prefixes_of(model, parts), GREEDY | options
    inputs = source(model, batch=3, side="right")
    expected = alone(model, prefixes, NAMES, lambda row: model.generate(**row_of(inputs, row), **options))
    unlike = alone(model, prefixes, NAMES[::-1], lambda row: model.generate(**row_of(inputs, row), **options))
    assert not torch.equal(unlike, expected)
    with attach_prefix(model, PrefixBank(prefixes)) as attachment:
        for names in (NAMES, attachment.prefix.ids(NAMES)):
            assert torch.equal(model.generate(**inputs, **options, prefix_ids=names), expected)
        attachment.prefix.default = "long"
        default = model.generate(**inputs, **options)
        assert torch.equal(default, model.generate(**inputs, **options, prefix_ids=["long"] * 3))


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("task", encoders.TASKS)
@pytest.mark.parametrize("family", encoders.FAMILIES)
def test_encoders(family, task, side):
    model = encoders.tiny_encoder(family, task)
    prefixes = {name: prefix_of(model, n, n, modules_to_save=()) for name, n in (("short", 3), ("long", 6))}
    inputs = {name: encoders.inputs_of(model, side, batch=3)[name] for name in ("input_ids", "attention_mask")}
    expected = alone(model, prefixes, NAMES, lambda row: encoders.logits_of(model(**row_of(inputs, row))))
    with attach_prefix(model, PrefixBank(prefixes)):
        got = encoders.logits_of(model(**inputs, prefix_ids=NAMES))
        other = encoders.logits_of(model(**inputs, prefix_ids=NAMES[::-1]))
    real = slice(None) if "Sequence" in task else inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], **TOLERANCE)
    assert (other - got)[real].abs().max() > 1e-2


@pytest.mark.parametrize("family", ("t5", "bart"))
def test_a_longer_prefix_that_comes_while_a_call_runs(family):
    """Its later layers find larger tensors than T5's bias, which its first layer computes."""
    model = tiny_encoder_decoder(family)
    prefixes, longer = prefixes_of(model), prefix_of(model, 9, 3, parts=PARTS)
    inputs = source(model, batch=3, side="left") | {"decoder_input_ids": labels(batch=3).clamp(min=3)}
    expected = alone(model, prefixes, NAMES, lambda row: model(**row_of(inputs, row)).logits)
    bank = PrefixBank(prefixes)
    base = model.base_model.encoder
    layer = (base.block if family == "t5" else base.layers)[0]
    handle = layer.register_forward_hook(lambda *_: None if "longer" in bank.names else bank.add("longer", longer))
    with attach_prefix(model, bank):
        got = model(**inputs, prefix_ids=NAMES).logits
        handle.remove()
        assert bank.max_prefix_len == 9
        torch.testing.assert_close(got, expected, **TOLERANCE)
        torch.testing.assert_close(model(**inputs, prefix_ids=NAMES).logits, expected, **TOLERANCE)


def test_texts_of_prompts_with_their_own_prefixes():
    model, tokenizer = tiny_encoder_decoder("t5"), tiny_tokenizer(bos=True)
    model.resize_token_embeddings(len(tokenizer))
    prompts, names, prefixes = ["a pub", "x", "one more"], NAMES, prefixes_of(model)
    expected = []
    for prompt, name in zip(prompts, names, strict=True):
        with attach_prefix(model, PrefixBank(prefixes, "short")):
            expected += generate_texts(model, tokenizer, [prompt], max_new_tokens=6, prefix_ids=[name])
    with attach_prefix(model, PrefixBank(prefixes)):
        got = generate_texts(model, tokenizer, prompts, max_new_tokens=6, prefix_ids=names, batch_size=3)
    assert got == expected and len(set(got)) > 1


def test_positions_that_are_the_same_for_all_rows():
    """BART's embeddings cannot have each row's tokens elsewhere, T5Gemma can."""
    model = tiny_encoder_decoder("bart")
    moved, inputs = prefix_of(model, 3, 1, 3, parts=("decoder",)), source(model) | {"decoder_input_ids": labels()[:, :4]}
    with pytest.raises(NotImplementedError, match="position_offset: expected 0, where BartDecoder has .*, got 'moved' with 3"):
        attach_prefix(model, PrefixBank({"moved": moved}))
    bank = PrefixBank({"a": prefix_of(model, 3, 1, parts=("decoder",))}, "a")
    with attach_prefix(model, bank):
        before = model(**inputs).logits
        with pytest.raises(
            NotImplementedError, match="position_offset: expected 0, where BartDecoder has .*, got 'moved' with 3"
        ):
            bank.add("moved", moved)
        assert bank.names == ("a",) and torch.equal(model(**inputs).logits, before)
    model = tiny_encoder_decoder("t5gemma")
    inputs = source(model, batch=3, side="left") | {"decoder_input_ids": labels(batch=3).clamp(min=3)}
    prefixes = {"short": prefix_of(model, 3, 1, 3, parts=PARTS), "long": prefix_of(model, 6, 2, 0, parts=PARTS)}
    expected = alone(model, prefixes, NAMES, lambda row: model(**row_of(inputs, row)).logits)
    with attach_prefix(model, PrefixBank(prefixes)):
        torch.testing.assert_close(model(**inputs, prefix_ids=NAMES).logits, expected, **TOLERANCE)


def test_what_does_not_fit():
    model = tiny_encoder_decoder("bart")
    with pytest.raises(
        ValueError, match="expected 4 layers, .* for Bart.*, got a bank of prefixes made for decoder: 3 layers, .* head_dim 12"
    ):
        attach_prefix(model, PrefixBank(prefixes_of(tiny_encoder_decoder("t5"))))
    with pytest.raises(ValueError, match="expected parts of encoder for BertForSequence.* made for decoder: "):
        attach_prefix(encoders.tiny_encoder("bert"), PrefixBank({"a": prefix_of(tiny_model("llama"), 3, 1)}))
    whisper = tiny_encoder_decoder("whisper")
    with pytest.raises(NotImplementedError, match="a bank is not served, as generate of Whisper.* goes through rows by itself"):
        attach_prefix(whisper, PrefixBank(prefixes_of(whisper)))
    before = {module: len(module._forward_pre_hooks) for module in model.modules()}
    with attach_prefix(model, PrefixBank(prefixes_of(model, ("encoder",)))):
        pass
    assert before == {module: len(module._forward_pre_hooks) for module in model.modules()}
