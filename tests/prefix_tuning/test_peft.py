"""An accelerated PeftModel against PEFT itself, and, where PEFT is wrong, against PEFT on each row alone."""

import itertools
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import LogitsProcessor

from prefix_tuning import Prefix, accelerate_peft, attach_prefix, restore_peft
from support.checkpointing import counted_attention, train_with_checkpointing
from support.encoder_decoders import labels, source, tiny_encoder_decoder
from support.encoders import tiny_encoder
from support.models import FAMILIES, tiny_model
from support.peft_models import (
    KINDS,
    PREFIX_LEN,
    TOLERANCE,
    assert_same_gradients,
    generated,
    gradients,
    ids,
    padding,
    peft_model,
    twins,
)

pytest.importorskip("peft")


def positions_of(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


# Other families that PEFT serves; it has no prefix for latent attention, Falcon's MQA, MPT and layers without attention.
OTHERS = (
    "bloom", "cohere", "cohere2", "exaone4", "falcon", "falcon_alibi", "gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "glm4",
    "glm4_moe", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "llama4", "ministral3", "mixtral", "olmo2",
    "olmo3", "opt", "phi", "phi3", "qwen2_moe", "qwen3_moe", "stablelm",
)  # fmt: skip


@pytest.mark.parametrize("family, kind", [*itertools.product(FAMILIES, KINDS), *((name, "flat") for name in OTHERS)])
def test_logits_loss_gradients_and_tokens_are_peft_s(family, kind):
    rival, model = twins(tiny_model(family), PREFIX_LEN, **KINDS[kind])
    assert accelerate_peft(model) is model
    expected, got = (side(input_ids=ids(2, 12), labels=ids(2, 12)) for side in (rival, model))
    assert got.logits.shape == expected.logits.shape
    torch.testing.assert_close(got.logits, expected.logits, **TOLERANCE)
    torch.testing.assert_close(got.loss, expected.loss, **TOLERANCE)
    assert_same_gradients(gradients(model, got.loss), gradients(rival, expected.loss))
    for options in ({}, {"num_beams": 3}):
        assert torch.equal(generated(model, **options), generated(rival, **options))
    torch.manual_seed(3)
    expected = generated(rival, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(generated(model, do_sample=True), expected)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(ids(2, 12)).logits, rival.base_model(ids(2, 12)).logits, **TOLERANCE)


def test_a_model_of_16_bit(family):
    exact, rival, model = (peft_model(tiny_model(family), PREFIX_LEN) for _ in range(3))
    rival.base_model.to(torch.bfloat16)
    model.base_model.to(torch.bfloat16)
    accelerate_peft(model)
    assert model.prompt_encoder["default"].embedding.weight.dtype == torch.float32
    outs = [side(input_ids=ids(), labels=ids()) for side in (exact, rival, model)]
    grads = [gradients(side, out.loss) for side, out in zip((exact, rival, model), outs, strict=True)]
    for expected, theirs, ours in ((out.logits.float() for out in outs), *zip(*(grad.values() for grad in grads), strict=True)):
        assert ours.dtype == torch.float32 and (ours - expected).norm() <= 1.5 * (theirs - expected).norm()
    assert generated(model).shape == (2, 13)


@pytest.mark.parametrize("side", ("left", "right"))
def test_padded_rows_with_positions_are_peft_s(pair, side):
    rival, model = pair
    if model.config.model_type == "mistral" and side == "left":  # PEFT counts padding to the window
        model.config.sliding_window = rival.config.sliding_window = 64
    mask = padding(side)
    given = {"attention_mask": mask, "position_ids": positions_of(mask), "labels": ids().masked_fill(mask == 0, -100)}
    expected, got = (model(input_ids=ids(), **given) for model in pair)
    torch.testing.assert_close(got.logits[mask.bool()], expected.logits[mask.bool()], **TOLERANCE)
    assert_same_gradients(gradients(model, got.loss), gradients(rival, expected.loss))
    if side == "left":
        for options in ({}, {"num_beams": 3}):
            assert torch.equal(generated(model, mask, **options), generated(rival, mask, **options))


def test_positional_arguments_and_tuples(pair):
    model = pair[1]
    mask = padding("right")
    expected, got = (side(ids(), mask, None, ids().masked_fill(mask == 0, -100), return_dict=False) for side in pair)
    assert isinstance(got, tuple)
    torch.testing.assert_close(got[0], expected[0], **TOLERANCE)
    embedded = model.get_input_embeddings()(ids())
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(ids()).logits)


def test_three_steps_of_training_are_peft_s(pair):
    for model in pair:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            model(input_ids=ids(seed=step), labels=ids(seed=step)).loss.backward()
            optimizer.step()
    states = [dict(model.prompt_encoder.state_dict()) for model in pair]
    for name, tensor in states[1].items():
        torch.testing.assert_close(tensor, states[0][name], atol=1e-4, rtol=1e-3)
    assert (pair[1].prompt_encoder["default"].embedding.weight.grad != 0).any()


# Where PEFT is wrong


@pytest.mark.parametrize("family", (*FAMILIES, *OTHERS))
def test_left_padding_without_positions(family):
    rival, model = twins(tiny_model(family), PREFIX_LEN)
    accelerate_peft(model)
    mask = padding()
    rows = [row[real.bool()][None] for row, real in zip(ids(), mask, strict=True)]
    got = model(input_ids=ids(), attention_mask=mask).logits
    for padded, real, row in zip(got, mask.bool(), rows, strict=True):
        torch.testing.assert_close(padded[real], rival(input_ids=row).logits[0], **TOLERANCE)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for tokens, row in zip(generated(model, mask), rows, strict=True):
        alone = rival.generate(input_ids=row, attention_mask=torch.ones_like(row), **options)
        assert torch.equal(tokens[7:], alone[0, row.shape[1] :])
    if family not in ("bloom", "opt", "falcon_alibi"):  # which count positions from the mask themselves
        wrong = rival(input_ids=ids(), attention_mask=mask).logits[0, 3:]
        assert (wrong - rival(input_ids=rows[0]).logits[0]).abs().max() > 1e-3  # else there is nothing to be right about


@pytest.mark.parametrize("family", ("llama", "mistral", "gemma2", "cohere2"))
def test_packed_rows_do_not_see_each_other(family):
    rival, model = twins(tiny_model(family), PREFIX_LEN)
    accelerate_peft(model)
    parts = ids(1, 4), ids(1, 9, seed=5)
    given = {"input_ids": torch.cat(parts, 1), "position_ids": torch.tensor([[*range(4), *range(9)]])}
    expected = torch.cat([rival(input_ids=part).logits for part in parts], 1)
    for options in ({}, {"use_cache": True}, {"use_cache": False}):
        torch.testing.assert_close(model(**given, **options).logits, expected, **TOLERANCE)
    assert (rival(**given).logits - expected).abs().max() > 1e-2
    one_row = {"input_ids": given["input_ids"], "position_ids": torch.arange(13)[None]}
    assert model(**one_row).past_key_values.get_seq_length() == 13


def test_packed_rows_that_are_refused():
    given = {"input_ids": ids(1, 13), "position_ids": torch.tensor([[*range(4), *range(9)]])}
    for family, message in (("gpt_neo", "packed rows under this model's window"), ("llama4", "packed rows are not served")):
        model = accelerate_peft(peft_model(tiny_model(family), PREFIX_LEN))
        with pytest.raises(NotImplementedError, match=message):
            model(**given)


def test_several_turns(pair):
    rival, model = pair
    expected = rival(input_ids=ids()).logits
    first = model(input_ids=ids()[:, :4], use_cache=True)
    second = model(input_ids=ids()[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected, **TOLERANCE)
    turn = generated(model, return_dict_in_generate=True)
    asked = torch.cat([turn.sequences, ids(2, 3, seed=9)], 1)
    given = {"input_ids": asked, "attention_mask": torch.ones_like(asked), "max_new_tokens": 5, "do_sample": False}
    options = {"eos_token_id": None, "pad_token_id": 0}
    answer = model.generate(**given, past_key_values=turn.past_key_values, **options)
    assert torch.equal(answer, rival.generate(**given, **options))
    first = rival(input_ids=ids()[:, :4], use_cache=True)
    wrong = rival(input_ids=ids()[:, 4:], past_key_values=first.past_key_values).logits
    assert (wrong - expected[:, 4:]).abs().max() > 1e-2


@pytest.mark.parametrize("options", ({"use_cache": False}, {"cache_implementation": "static"}), ids=str)
def test_ways_to_generate_that_peft_does_not_know(pair, options):
    rival, model = pair
    assert torch.equal(generated(model, **options), generated(rival))


class Contrast(LogitsProcessor):
    """Away from what the model says without its adapter."""

    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids, scores):
        with self.model.disable_adapter():
            return 2 * scores - self.model(input_ids=input_ids).logits[:, -1]


@pytest.mark.parametrize("options", ({}, {"num_beams": 3}, {"cache_implementation": "static"}), ids=str)
def test_the_adapter_is_disabled_within_generate(pair, options):
    rival, model = pair
    got = generated(model, logits_processor=[Contrast(model)], **options)
    served = {name: value for name, value in options.items() if name != "cache_implementation"}  # by PEFT
    assert torch.equal(got, generated(rival, logits_processor=[Contrast(rival)], **served))
    assert torch.equal(generated(model, **options), generated(rival, **served)) and not torch.equal(got, generated(model))


# What it costs


def test_nothing_grows_with_batch_or_prefix(pair):
    _, model = pair
    cache = model(input_ids=ids(4), use_cache=True).past_key_values
    assert cache.get_seq_length() == 7 and {layer.keys.shape[2] for layer in cache.layers} == {7}
    out = generated(model, return_dict_in_generate=True)
    window = getattr(model.config, "sliding_window", None)
    assert {layer.keys.shape[2] for layer in out.past_key_values.layers} == {min(12, window - 1 if window else 12)}
    model(input_ids=ids(4))
    weight = model.prompt_encoder["default"].embedding.weight.untyped_storage()
    layers = [module.layer_prefix for module in model.modules() if hasattr(module, "layer_prefix")]
    assert len(layers) == 3
    for layer in layers:
        for tensor in (layer.key, layer.value):
            assert tensor.shape[1] == PREFIX_LEN and tensor.dim() == 3
            assert tensor.untyped_storage().data_ptr() == weight.data_ptr()


def test_the_projection_is_evaluated_once(family):
    model = accelerate_peft(peft_model(tiny_model(family), PREFIX_LEN, **KINDS["projection"]))
    shapes = []
    model.prompt_encoder["default"].transform.register_forward_hook(lambda _, inputs, output: shapes.append(output.shape[:-1]))
    model(input_ids=ids(4))
    assert shapes == [(PREFIX_LEN,)]
    shapes.clear()
    generated(model)
    assert shapes == [(PREFIX_LEN,)]


def test_gradient_checkpointing(pair):
    rival, model = pair
    expected = gradients(rival, rival(input_ids=ids(), labels=ids()).loss)
    train_with_checkpointing(model)
    with counted_attention() as calls:
        loss = model(input_ids=ids(), labels=ids(), use_cache=False).loss
        with torch.no_grad(), model.disable_adapter():  # as for the reference of a preference loss
            model(input_ids=ids(), use_cache=False)
        assert len(calls) == 6
        assert_same_gradients(gradients(model, loss), expected)
        assert len(calls) == 9
    with model.disable_adapter(), pytest.raises(NotImplementedError, match="compute without; call them under torch.no_grad"):
        model(input_ids=ids(), use_cache=False)
    loss = model(input_ids=ids(), labels=ids(), use_cache=False).loss
    assert_same_gradients(gradients(model, loss), expected)


def test_attention_dropout_is_not_applied_and_said_so_once():
    model = accelerate_peft(peft_model(tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0), PREFIX_LEN))
    expected = model(input_ids=ids()).logits
    model.train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.testing.assert_close(model(input_ids=ids()).logits, expected)
    assert sum("dropout is not applied" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize("family", ("llama", "mistral"))
def test_compiled(family):
    from torch._dynamo.testing import CompileCounterWithBackend

    rival, model = twins(tiny_model(family), PREFIX_LEN)
    accelerate_peft(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    expected, got = (side(input_ids=ids(2, 9), labels=ids(2, 9)) for side in (rival, compiled))
    torch.testing.assert_close(got.logits, expected.logits, **TOLERANCE)
    if family == "llama":
        assert_same_gradients(gradients(model, got.loss), gradients(rival, expected.loss))
    assert counter.frame_count == 1


# Classifiers, encoders, encoder-decoders


def test_a_classifier_s_head(tmp_path):
    import transformers

    config = tiny_model("llama").config
    config.num_labels = 3
    torch.manual_seed(2)
    rival, model = twins(transformers.LlamaForSequenceClassification(config).eval(), PREFIX_LEN, task_type="SEQ_CLS")
    accelerate_peft(model)
    mask, classes = padding("right"), torch.tensor([2, 0])
    padded = ids().masked_fill(mask == 0, config.pad_token_id)
    expected, got = (side(input_ids=padded, attention_mask=mask, labels=classes) for side in (rival, model))
    torch.testing.assert_close(got.logits, expected.logits, **TOLERANCE)
    grads = gradients(model, got.loss)
    assert_same_gradients(grads, gradients(rival, expected.loss))
    assert any("score" in name for name in grads)
    for name, side in (("peft", rival), ("ours", model)):
        side.save_pretrained(tmp_path / name)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert all(torch.equal(first[name], second[name]) for name in first) and len(first) == 2


@pytest.mark.parametrize(("name", "encoder", "decoder"), [("bart", 4, 2), ("bart", 5, 3), ("bart", 4, 3), ("t5", 4, 2)])
def test_a_decoder_shallower_than_the_encoder(name, encoder, decoder):
    """As distilled models for summaries have; PEFT counts the encoder's layers."""
    sizes = {"num_layers": encoder, "num_decoder_layers": decoder, "d_kv": 8}
    if name == "bart":
        sizes = {"encoder_layers": encoder, "decoder_layers": decoder, "decoder_attention_heads": 4}
    plain = tiny_encoder_decoder(name, **sizes)
    rival, model = twins(plain, PREFIX_LEN, task_type="SEQ_2_SEQ_LM")
    prefix = Prefix.from_peft(model)
    accelerate_peft(model)
    given = source(plain, side="right")
    expected, got = (side(**given, labels=labels()) for side in (rival, model))
    torch.testing.assert_close(got.logits, expected.logits, **TOLERANCE)
    with attach_prefix(plain, prefix):
        torch.testing.assert_close(plain(**given, labels=labels()).logits, expected.logits, **TOLERANCE)
    assert_same_gradients(gradients(model, got.loss), gradients(rival, expected.loss))
    assert torch.equal(model.generate(**given, max_new_tokens=6), rival.generate(**given, max_new_tokens=6))


@pytest.mark.parametrize("layers", (3, 4))
@pytest.mark.parametrize("name", ("bart", "m2m_100", "marian", "mbart", "mt5", "pegasus", "t5"))
def test_encoder_decoders(name, layers):
    if "t5" in name:
        sizes = {"num_layers": layers, "num_decoder_layers": layers, "d_kv": 8}
    else:
        sizes = {"encoder_layers": layers, "decoder_layers": layers, "decoder_attention_heads": 4}
    plain = tiny_encoder_decoder(name, **sizes)
    rival, model = twins(plain, PREFIX_LEN, task_type="SEQ_2_SEQ_LM")
    accelerate_peft(model)
    given = source(plain, side="right")
    expected, got, without = (side(**given, labels=labels()) for side in (rival, model, plain))
    torch.testing.assert_close(got.logits, expected.logits, **TOLERANCE)
    assert (got.logits - without.logits).abs().max() > 1e-3
    grads = gradients(model, got.loss)
    assert_same_gradients(grads, gradients(rival, expected.loss))
    (grad,) = grads.values()
    unread = grad.view(PREFIX_LEN, layers, -1)[:, 1::2] if layers == 4 else grad[:0]  # PEFT's doubling and splitting by fours
    assert not unread.any()
    for beams in (1, 3):
        options = {**given, "max_new_tokens": 6, "num_beams": beams, "do_sample": False}
        assert torch.equal(model.generate(**options), rival.generate(**options))
    cache = model(**given, decoder_input_ids=labels().clamp(min=3), use_cache=True).past_key_values.self_attention_cache
    assert {layer.keys.shape[2] for layer in cache.layers} == {5}
    with model.disable_adapter():
        torch.testing.assert_close(model(**given, labels=labels()).logits, without.logits, **TOLERANCE)
    restore_peft(model)
    assert torch.equal(model(**given, labels=labels()).logits, expected.logits)


@pytest.mark.parametrize("task", ("SequenceClassification", "TokenClassification", "QuestionAnswering"))
@pytest.mark.parametrize("name", ("Bert", "Electra", "Roberta", "XLMRoberta"))
def test_encoders(name, task):
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 100}
    config = getattr(transformers, f"{name}Config")(**sizes, max_position_embeddings=64, initializer_range=0.2)
    torch.manual_seed(2)
    task_type, given = {
        "SequenceClassification": ("SEQ_CLS", {"labels": torch.tensor([1, 0])}),
        "TokenClassification": ("TOKEN_CLS", {"labels": (ids() % 2).masked_fill(padding("right") == 0, -100)}),
        "QuestionAnswering": ("QUESTION_ANS", {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 3])}),
    }[task]
    rival, model = twins(getattr(transformers, f"{name}For{task}")(config).eval(), PREFIX_LEN, task_type=task_type)
    accelerate_peft(model)
    if task == "QuestionAnswering":  # its loss compares all positions, and what padding scores is any model's guess
        given |= {"input_ids": ids()}
    else:
        given |= {"attention_mask": padding("right")}
        given |= {"input_ids": ids().masked_fill(padding("right") == 0, config.pad_token_id)}
    expected, got = (side(**given) for side in (rival, model))
    torch.testing.assert_close(got.loss, expected.loss, **TOLERANCE)
    grads = gradients(rival, expected.loss)
    assert len(grads) > 1  # the head's too
    assert_same_gradients(gradients(model, got.loss), grads)
    train_with_checkpointing(model)
    assert_same_gradients(gradients(model, model(**given).loss), grads)


@pytest.mark.parametrize("bare", ("llama", "bert"))
def test_models_without_a_head(bare):
    import transformers

    if bare == "llama":
        plain = tiny_model("llama").model
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
        plain = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=100, initializer_range=0.2)).eval()
    rival, model = twins(plain, PREFIX_LEN, task_type="FEATURE_EXTRACTION")
    accelerate_peft(model)
    expected, got = (side(input_ids=ids()).last_hidden_state for side in (rival, model))
    torch.testing.assert_close(got, expected, **TOLERANCE)
    torch.testing.assert_close(model.base_model(ids()).last_hidden_state, plain(ids()).last_hidden_state, **TOLERANCE)
    torch.testing.assert_close(model(input_ids=ids()).last_hidden_state, expected, **TOLERANCE)


def test_token_types_are_ignored_as_peft_does():
    rival, model = twins(tiny_model("gpt2"), PREFIX_LEN)
    accelerate_peft(model)
    given = {"input_ids": ids(), "token_type_ids": ids(seed=9)}
    for side in (rival, model):
        with pytest.warns(UserWarning, match="(?i)token.type.ids"):
            side.logits = side(**given).logits
    torch.testing.assert_close(model.logits, rival.logits, **TOLERANCE)
    assert torch.equal(generated(model, token_type_ids=ids(seed=9)), generated(rival, token_type_ids=ids(seed=9)))


@pytest.mark.parametrize("ignored", ("token_type_ids", "position_ids"))
def test_what_peft_ignores_where_questions_are_answered(ignored):
    rival, model = twins(tiny_encoder("bert", "QuestionAnswering"), PREFIX_LEN, task_type="QUESTION_ANS")
    accelerate_peft(model)
    given = {"input_ids": ids(), ignored: ids() % 2}
    with pytest.warns(UserWarning, match=f"{ignored} are ignored, as PEFT does"):
        got = model(**given)
    torch.testing.assert_close(got.start_logits, rival(**given).start_logits, **TOLERANCE)
    heeded, without = (model.base_model(**arguments).start_logits for arguments in (given, {"input_ids": ids()}))
    assert (heeded - without).abs().max() > 1e-2


def test_task_ids_are_no_matter():
    rival, model = twins(tiny_model("llama"), PREFIX_LEN)
    accelerate_peft(model)
    tasks = torch.zeros(2, dtype=torch.long)
    torch.testing.assert_close(model(ids(), task_ids=tasks).logits, rival(ids(), task_ids=tasks).logits, **TOLERANCE)
    assert torch.equal(generated(model, task_ids=tasks), generated(rival, task_ids=tasks))
