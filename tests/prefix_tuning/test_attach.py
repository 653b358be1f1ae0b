"""What a patched model does beside the capabilities of test_families.py: caches, masks, dtypes, compilation, wrong calls."""

import copy
import warnings

import pytest
import torch
from transformers import StaticCache

from prefix_tuning import Prefix, PrefixBank, accelerate_peft, attach_prefix, detach_prefix
from prefix_tuning.attach import Attachment
from support.capabilities import ids
from support.checkpointing import enable_checkpointing
from support.encoder_decoders import tiny_encoder_decoder
from support.encoders import tiny_encoder
from support.generation import attach
from support.image_text import tiny_wrapper
from support.models import FAMILIES, random_prefix, randomize, tiny_model
from support.peft_models import twins
from support.reference import PastKeyValues

PREFIX_LEN = 5
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def padding(batch=2, length=7, side="left"):
    mask = torch.ones(batch, length, dtype=torch.long)
    if side == "left":
        mask[0, :3] = 0
    else:
        mask[0, -3:] = 0
    return mask


@pytest.fixture(params=FAMILIES)
def setup(request):
    model = tiny_model(request.param)
    return model, random_prefix(model, PREFIX_LEN)


def test_right_padding_equals_past_key_values(setup):
    model, prefix = setup
    input_ids, mask = ids(), padding(side="right")
    labels = input_ids.masked_fill(mask == 0, -100)
    expected = PastKeyValues().forward(model, prefix, input_ids, mask, labels=labels)
    expected_grads = torch.autograd.grad(expected.loss, list(prefix.parameters()))
    with attach_prefix(model, prefix, prefix_window="peft"):
        got = model(input_ids=input_ids, attention_mask=mask, labels=labels)
        grads = torch.autograd.grad(got.loss, list(prefix.parameters()))
    torch.testing.assert_close(got.logits[mask.bool()], expected.logits[mask.bool()], **TOLERANCE)
    torch.testing.assert_close(got.loss, expected.loss, **TOLERANCE)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, **TOLERANCE)


@pytest.mark.parametrize("options", ({}, {"num_beams": 3}, {"do_sample": True}), ids=str)
def test_real_tokens_as_prefix_equal_the_plain_model(setup, options):
    model, _ = setup
    tokens, input_ids = ids(1, PREFIX_LEN, seed=2), ids()
    prefix = Prefix.from_text(model, None, input_ids=tokens)
    whole = torch.cat([tokens.expand(2, -1), input_ids], 1)
    options = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, "do_sample": False, **options}
    expected_logits = model(input_ids=whole).logits[:, PREFIX_LEN:]
    torch.manual_seed(3)
    expected = model.generate(input_ids=whole, attention_mask=torch.ones_like(whole), **options)[:, PREFIX_LEN:]
    with attach_prefix(model, prefix, prefix_window="peft"):
        torch.testing.assert_close(model(input_ids=input_ids).logits, expected_logits, **TOLERANCE)
        torch.manual_seed(3)
        got = model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options)
    assert torch.equal(got, expected)


def test_cache_holds_sequence_tokens_only_and_several_turns_work(setup):
    model, prefix = setup
    input_ids = ids()
    with attach_prefix(model, prefix):
        whole = model(input_ids=input_ids).logits
        first = model(input_ids=input_ids[:, :4], use_cache=True)
        assert first.past_key_values.get_seq_length() == 4
        assert first.past_key_values.layers[0].keys.shape[2] == 4
        second = model(input_ids=input_ids[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, **TOLERANCE)


def test_static_cache_forward_by_hand(setup):
    model, prefix = setup
    input_ids = ids()
    with attach_prefix(model, prefix), torch.no_grad():
        whole = model(input_ids=input_ids).logits
        cache = StaticCache(config=model.config, max_cache_len=16)
        pieces = [model(input_ids=piece, past_key_values=cache).logits for piece in input_ids.split((4, 1, 1, 1), 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **TOLERANCE)


def test_given_position_ids_are_shifted(setup):
    model, prefix = setup
    input_ids, mask = ids(), padding()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with attach_prefix(model, prefix):
        derived = model(input_ids=input_ids, attention_mask=mask).logits
        given = model(input_ids=input_ids, attention_mask=mask, position_ids=positions).logits
        positional = model(input_ids, attention_mask=mask).logits
    assert torch.equal(derived, given) and torch.equal(derived, positional)


def test_dense_masks_of_the_caller(setup):
    model, prefix = setup
    input_ids = ids()
    causal = torch.ones(7, 7, dtype=torch.bool).tril()[None, None].expand(2, 1, 7, 7)
    model.config.sliding_window = None
    with attach_prefix(model, prefix):
        expected = model(input_ids=input_ids).logits
        for mask in (causal, torch.zeros(2, 1, 7, 7).masked_fill(~causal, torch.finfo(torch.float32).min)):
            given = {"full_attention": mask} if isinstance(expected, dict) else mask
            torch.testing.assert_close(model(input_ids=input_ids, attention_mask=given).logits, expected, **TOLERANCE)


def test_packed_rows_do_not_see_each_other():
    model = tiny_model("llama")
    prefix = random_prefix(model, PREFIX_LEN)
    first, second = ids(1, 4), ids(1, 3, seed=5)
    packed = torch.cat([first, second], 1)
    with attach_prefix(model, prefix):
        expected = torch.cat([model(input_ids=first).logits, model(input_ids=second).logits], 1)
        got = model(input_ids=packed, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2]]), use_cache=False).logits
    torch.testing.assert_close(got, expected, **TOLERANCE)


def test_window_pinned_against_peft():
    model = tiny_model("mistral")
    prefix, input_ids = random_prefix(model, PREFIX_LEN), ids(2, 14)
    window = model.config.sliding_window
    assert window < 14
    with attach_prefix(model, prefix, prefix_window="peft"):
        slid = model(input_ids=input_ids).logits
    with attach_prefix(model, prefix):
        pinned = model(input_ids=input_ids).logits
    model.config.sliding_window = 64
    with attach_prefix(model, prefix):
        wide = model(input_ids=input_ids[:, : window - 1]).logits
    assert (slid[:, -1] - pinned[:, -1]).abs().max() > 1e-2
    torch.testing.assert_close(pinned[:, : window - 1], wide, **TOLERANCE)


def test_reentrant_checkpointing_is_refused():
    model = tiny_model("llama")
    enable_checkpointing(model, use_reentrant=True)
    with attach_prefix(model, random_prefix(model, PREFIX_LEN)), pytest.raises(ValueError, match="use_reentrant=False"):
        model(input_ids=ids(), use_cache=False)


def test_reparametrization_is_evaluated_once_per_forward():
    model = tiny_model("llama")
    prefix = Prefix.for_model(model, PREFIX_LEN, reparametrization="mlp", hidden_size=16, seed=0)
    calls = []
    prefix.reparametrization["decoder"].register_forward_hook(lambda *_: calls.append(1))
    with attach_prefix(model, prefix):
        calls.clear()
        loss = model(input_ids=ids(), labels=ids()).loss
        assert len(calls) == 1
        loss.backward()
    assert all(parameter.grad is not None for parameter in prefix.parameters())


def test_a_second_model_on_the_same_config_is_untouched():
    model = tiny_model("llama")
    other = type(model)(model.config).eval()
    before = other(input_ids=ids()).logits
    state = list(model.state_dict())
    with attach_prefix(model, random_prefix(model, PREFIX_LEN)):
        assert list(model.state_dict()) == state
        assert other.config._attn_implementation == "sdpa"
        assert torch.equal(other(input_ids=ids()).logits, before)


@pytest.mark.parametrize("name", ("llama", "gemma3 with a tower", "t5gemma"))
def test_changes_of_the_config_outlast_the_prefix(name):
    """Save for our attention's name."""
    family, wrapped = name.split()[0], name.endswith("tower")
    make = tiny_wrapper if wrapped else tiny_encoder_decoder if family == "t5gemma" else tiny_model
    model = make(family)
    before, inner = copy.deepcopy(model.config), model.config.get_text_config(decoder=True)
    with attach_prefix(model, random_prefix(model, PREFIX_LEN)):
        model.config.get_text_config(decoder=True).vocab_size = 131
        model.config.extra = "new"
    assert model.config.get_text_config(decoder=True) is inner and inner.vocab_size == 131
    inner.vocab_size = before.get_text_config(decoder=True).vocab_size
    assert vars(model.config).pop("extra") == "new" and model.config.to_dict() == before.to_dict()
    assert model.config._attn_implementation == before._attn_implementation


def test_embeddings_that_are_resized_meanwhile():
    model = tiny_model("llama")
    with attach_prefix(model, random_prefix(model, PREFIX_LEN)):
        model.resize_token_embeddings(140)
    assert model.config.vocab_size == model.lm_head.out_features == 140


@pytest.mark.parametrize("failing", ("PrefixIdsArgument", "shift_embeddings", "Attachment._refresh", "AttachedHeads.insert"))
def test_where_attaching_fails_the_model_is_as_it_was(failing, monkeypatch):
    model = tiny_encoder_decoder("bart") if failing == "shift_embeddings" else tiny_model("gpt2")
    prefix = random_prefix(model, PREFIX_LEN, modules_to_save=["ln_f"] if failing == "AttachedHeads.insert" else None)
    prefix = PrefixBank({"a": prefix}) if failing == "PrefixIdsArgument" else prefix
    own = [(module, dict(vars(module)), set(module._forward_pre_hooks)) for module in model.modules()]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"prefix_tuning.attach.{failing}", interrupted)
        with pytest.raises(KeyboardInterrupt):
            attach_prefix(model, prefix)
    for module, attributes, hooks in own:
        assert vars(module).keys() == attributes.keys() and set(module._forward_pre_hooks) == hooks
        assert all(vars(module)[name] is value for name, value in attributes.items())
    attach_prefix(model, prefix).detach()


def test_attention_weights_are_refused_where_they_are_asked_for():
    model = tiny_model("llama")
    model.config._attn_implementation = "eager"
    model.config.output_attentions = True
    with attach_prefix(model, random_prefix(model, PREFIX_LEN)):
        with pytest.raises(NotImplementedError, match="output_attentions"):
            model(input_ids=ids())
        assert model(input_ids=ids(), output_attentions=False).attentions is None


def test_dropout_is_not_applied_and_said_so():
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0)
    with attach_prefix(model, random_prefix(model, PREFIX_LEN)):
        expected = model(input_ids=ids()).logits
        model.train()
        with pytest.warns(UserWarning, match="dropout is not applied"):
            got = model(input_ids=ids()).logits
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_float32_prefix_beside_models_of_other_dtypes(dtype):
    model = tiny_model("llama")
    prefix, input_ids = random_prefix(model, PREFIX_LEN), ids()
    with attach_prefix(model, prefix):
        expected = model(input_ids=input_ids).logits
    with attach_prefix(model.to(dtype), prefix):
        got = model(input_ids=input_ids, labels=input_ids)
        got.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in prefix.parameters())
    rounded = all(torch.equal(p.grad, p.grad.to(dtype).float()) for p in prefix.parameters())
    assert rounded == (dtype == torch.float64)  # no gradient has passed through 16 bit
    difference = (got.logits.float() - expected).abs().mean() / expected.abs().mean()
    assert difference < (0.1 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("padded", (False, True), ids=("full", "padded"))
def test_compiled_decoding_does_not_recompile(setup, padded):
    from torch._dynamo.testing import CompileCounterWithBackend

    model, prefix = setup
    input_ids = ids(2, 7)
    mask = padding(2, 7) if padded else torch.ones_like(input_ids)
    counter = CompileCounterWithBackend("aot_eager")
    with attach_prefix(model, prefix), torch.no_grad():
        expected = model.generate(
            input_ids=input_ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        torch._dynamo.reset()
        step = torch.compile(model.forward, backend=counter, fullgraph=True)
        cache = StaticCache(config=model.config, max_cache_len=16)
        logits = model(input_ids=input_ids, attention_mask=mask, past_key_values=cache).logits
        tokens, frames = [logits[:, -1:].argmax(-1)], []
        for _ in range(5):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            seen = {"attention_mask": mask} if padded else {}
            logits = step(input_ids=tokens[-1], past_key_values=cache, **seen).logits
            frames.append(counter.frame_count)
            tokens.append(logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat([input_ids, *tokens], 1), expected)
    assert frames[-1] == frames[1] > 0, f"compiled {frames} times over the tokens"


@pytest.mark.parametrize("padded", (False, True), ids=("full", "padded"))
def test_compiled_training_step_equals_eager(setup, padded):
    """With a mask as training has it; without one transformers looks for packed rows, which is a dense mask when compiled."""
    model, prefix = setup
    inputs = {"input_ids": ids(2, 12), "attention_mask": padding(2, 12) if padded else None, "use_cache": False}
    parameters = list(prefix.parameters())
    with attach_prefix(model, prefix):
        logits = model(**inputs).logits
        direction = torch.randn_like(logits)
        expected = torch.autograd.grad((logits * direction).sum(), parameters)
        torch._dynamo.reset()
        compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)(**inputs).logits
        grads = torch.autograd.grad((compiled * direction).sum(), parameters)
    torch.testing.assert_close(compiled, logits, **TOLERANCE)
    for grad, expected_grad in zip(grads, expected, strict=True):  # a dense mask may take another backend
        torch.testing.assert_close(grad, expected_grad, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_on_a_gpu_inductor_compiles_a_training_step(family, dtype):
    """About as far from a float32 step as the step that is not compiled."""
    model = tiny_model(family).to("cuda", dtype)
    prefix = random_prefix(model, PREFIX_LEN)
    inputs = {"input_ids": ids(2, 12).cuda(), "attention_mask": padding(2, 12).cuda(), "use_cache": False}
    direction = torch.randn(2, 12, model.config.vocab_size, device="cuda")

    def step(model, compiled=False):
        with attach_prefix(model, prefix):
            torch._dynamo.reset()
            logits = (torch.compile(model.forward, fullgraph=True) if compiled else model)(**inputs).logits.float()
            return logits, *torch.autograd.grad((logits * direction).sum(), list(prefix.parameters()))

    outcomes = step(copy.deepcopy(model).float()), step(model), step(model, compiled=True)
    for wide, plain, compiled in zip(*outcomes, strict=True):
        assert (compiled - wide).norm() <= 2 * (plain - wide).norm() + 1e-4 * wide.norm()


@pytest.mark.parametrize("kind", ["prefix", "bank"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_detached_by_the_model_alone(kind, wrapped):
    model = tiny_model("llama")
    outer = torch.compile(model, backend="eager") if wrapped else model
    before, expected = set(vars(model)), model(ids()).logits
    with pytest.raises(ValueError, match="model: it has no prefix attached"):
        detach_prefix(outer)
    attach(model, kind)
    with pytest.raises(ValueError, match=r"already has a prefix attached; detach that first \(detach_prefix\(model\)\)"):
        attach(model, kind)
    detach_prefix(outer)
    assert set(vars(model)) == before and torch.equal(model(ids()).logits, expected)
    attach(model, kind)[0].detach()
    with pytest.raises(ValueError, match="model: it has no prefix attached"):
        detach_prefix(model)


def test_an_accelerated_adapter_is_restored_instead():
    _, model = twins(tiny_model("llama"), PREFIX_LEN)
    accelerate_peft(model)
    with pytest.raises(ValueError, match="model: accelerate_peft has attached its adapter; restore_peft undoes that"):
        detach_prefix(model)


def test_wrong_calls_raise():
    model = tiny_model("gpt2")
    prefix = random_prefix(model, PREFIX_LEN)
    with pytest.raises(TypeError, match="prefix: expected a Prefix"):
        attach_prefix(model, "prefix")
    with pytest.raises(ValueError, match="prefix_window: expected 'pinned' or 'peft', got 'x'"):
        attach_prefix(model, prefix, prefix_window="x")
    with pytest.raises(ValueError, match="backend: expected one of cpu, cuda, triton, sdpa, reference, got 'x'"):
        attach_prefix(model, prefix, backend="x")
    with pytest.raises(ValueError):
        attach_prefix(tiny_model("llama"), prefix)
    with pytest.raises(TypeError, match="model: expected a transformers model, got Linear"):
        attach_prefix(torch.nn.Linear(2, 2), prefix)
    attachment = attach_prefix(model, prefix)
    with pytest.raises(ValueError, match="already has a prefix"):
        attach_prefix(model, prefix)
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(input_ids=ids(), output_attentions=True)
    with pytest.raises(ValueError, match="position embeddings"):
        model(input_ids=ids(1, model.config.max_position_embeddings - PREFIX_LEN + 1))
    with pytest.raises(ValueError, match="input_ids"):
        model()
    attachment.detach()
    attachment.detach()
    for use_again in (attachment.__enter__, lambda: attachment.enable(True), lambda: attachment.enable(False)):
        with pytest.raises(ValueError, match="attachment: it is detached"):
            use_again()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_prefix(copy.deepcopy(model), prefix).detach()


@pytest.mark.parametrize("kind", ["prefix", "bank"])
def test_a_model_that_was_compiled_before(kind):
    model = tiny_model("llama")
    compiled = torch.compile(model, backend="eager")
    attachment, chosen = attach(model, kind)
    calls = (lambda: compiled(ids(), **chosen(2)).logits, lambda: compiled.generate(ids(), **OPTIONS, **chosen(2)))
    with torch.no_grad():
        with attachment:
            expected = [call() for call in calls]
        plain = model(ids()).logits
        torch.testing.assert_close(compiled(ids()).logits, plain, **TOLERANCE)
        with attach_prefix(compiled, attachment.prefix):
            for call, wanted in zip(calls, expected, strict=True):
                torch.testing.assert_close(call(), wanted, **TOLERANCE)
        torch.testing.assert_close(compiled(ids()).logits, plain, **TOLERANCE)


def test_other_families_are_refused():
    from transformers import XLMConfig, XLMModel

    config = XLMConfig(vocab_size=99, emb_dim=32, n_layers=1, n_heads=2)
    with pytest.raises(NotImplementedError, match="model: expected one of type .*, got 'xlm'"):
        attach_prefix(XLMModel(config), random_prefix(tiny_model("gpt2"), PREFIX_LEN))


def test_a_model_made_of_the_config_of_one_with_a_prefix():
    model = tiny_model("llama")
    with attach_prefix(model, random_prefix(model, PREFIX_LEN)):
        other = type(model)(model.config)
        with pytest.raises(ValueError, match="config: this LlamaAttention has that of a model with a prefix attached"):
            other(input_ids=ids())
    assert type(model)(model.config)(input_ids=ids()).logits.shape == (2, 7, 128)


def test_a_prefix_is_rounded_to_the_dtype_that_the_model_has_now(monkeypatch):
    """As on a GPU, where it is rounded without gradients; a model that was converted meanwhile gets all digits."""
    model = tiny_model("llama").bfloat16()
    prefix = random_prefix(model, PREFIX_LEN)
    monkeypatch.setattr(Attachment, "_rounds", lambda self: not torch.is_grad_enabled())
    attachment = attach_prefix(model, prefix)
    with attachment, torch.no_grad():
        model(input_ids=ids())
        got = model.float()(input_ids=ids()).logits
    with attach_prefix(model, prefix):
        assert torch.equal(got, model(input_ids=ids()).logits)


def test_a_float32_prefix_is_rounded_for_all_layers_at_once(monkeypatch):
    """On a GPU, where each call would round it; here the decision is forced. What changes in the prefix is seen at once."""
    model = tiny_model("llama").bfloat16()
    prefix = random_prefix(tiny_model("llama"), PREFIX_LEN)
    rounded = copy.deepcopy(prefix).bfloat16()
    monkeypatch.setattr(Attachment, "_rounds", lambda self: not torch.is_grad_enabled() and prefix is self.prefix)

    def logits(given):
        with attach_prefix(copy.deepcopy(model), given) as attachment:
            with torch.inference_mode():
                first = attachment.model(input_ids=ids()).logits.clone()
            with torch.no_grad():
                next(given.parameters()).mul_(2)
                return first, attachment.model(input_ids=ids()).logits

    for value, other in zip(logits(prefix), logits(rounded), strict=True):
        assert torch.equal(value, other)
    with attach_prefix(model, prefix):
        with torch.no_grad():
            model(input_ids=ids())
        model(input_ids=ids()).logits.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in prefix.parameters())


@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_masks_that_cannot_be_the_tokens(family):
    model, ids = tiny_model(family), torch.tensor([[5, 6, 7, 8]])
    with attach_prefix(model, random_prefix(model)):
        model(input_ids=ids.expand(2, -1), attention_mask=torch.ones(1, 4, dtype=torch.long))
        for shape in ((2, 4), (1, 3), (1, 4, 4)):
            with pytest.raises(ValueError, match=r"attention_mask: expected one for each token of .*: \[1, 4 or more\]"):
                model(input_ids=ids, attention_mask=torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize("family", ("llama", "gpt2", "bloom", "t5", "bert"))
def test_what_a_mask_holds_besides_0_is_a_token(family):
    """As transformers has it: the number of its document, say. And one row of it is that of all."""
    tiny = {"t5": tiny_encoder_decoder, "bert": tiny_encoder}.get(family, tiny_model)
    model, ids = tiny(family), torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(0))
    mask, more = torch.ones(3, 9, dtype=torch.long), {"decoder_input_ids": ids} if family == "t5" else {}
    mask[:, :3] = 0
    with attach_prefix(model, randomize(Prefix.for_model(model, 4))):
        expected = model(input_ids=ids, attention_mask=mask, **more).logits
        numbered = model(input_ids=ids, attention_mask=mask * torch.tensor([1] * 6 + [2] * 3), **more).logits
        torch.testing.assert_close(numbered, expected, **TOLERANCE)
        if family != "t5":  # whose cross-attention needs every row
            single = model(input_ids=ids, attention_mask=mask[:1], **more).logits
            torch.testing.assert_close(single, expected, **TOLERANCE)


@pytest.mark.parametrize("family", ("llama", "gpt2", "mistral", "bloom", "gpt_neo"))
def test_a_backward_pass_after_detaching_says_what_is_wrong(family):
    model = tiny_model(family).train()
    model.gradient_checkpointing_enable()
    ids = torch.tensor([[5, 6, 7, 8]])
    with attach_prefix(model, random_prefix(model)):
        loss = model(input_ids=ids, labels=ids).loss
    with pytest.raises(ValueError, match="the prefix was detached before it, .* call backward\\(\\) first"):
        loss.backward()


@pytest.mark.filterwarnings("ignore")  # torch's own, of what it will do otherwise one day
def test_a_model_whose_weights_torch_has_packed():
    model = tiny_model("llama")
    prefix, ids = random_prefix(model), torch.tensor([[5, 6, 7, 8]])
    packed = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    with attach_prefix(model, prefix):
        expected = model(input_ids=ids).logits
    plain = packed(input_ids=ids).logits
    for attached in (prefix, PrefixBank({"a": prefix}, "a")):
        with attach_prefix(packed, attached):
            got = packed(input_ids=ids).logits
        assert (got - expected).abs().max() < 0.3 * (plain - expected).abs().max()
