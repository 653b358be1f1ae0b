"""Rows with different prefixes, or none, in one batch equal each row alone with its own prefix."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import GenerationConfig, LlamaForCausalLM, StaticCache

from prefix_kernels import prefix_attention
from prefix_tuning import Prefix, PrefixBank, attach_prefix
from prefix_tuning.prefix_ids import row_ids
from support.banks import NAMES, alone, prefix_of
from support.models import MODELS, WITH_STATE, tiny_model

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
WITHOUT_BANK = ("bloom", "falcon", "falcon_alibi", "falcon_mqa", "gpt_neo", "mpt", "nemotron", "stablelm", "xglm")
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def prefixes_of(model):
    return {"short": prefix_of(model, 3, 1), "long": prefix_of(model, 6, 2), "unshifted": prefix_of(model, 4, 3, 0)}


def inputs_of(rows=3, length=7):
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, :3] = 0
    return torch.randint(3, 100, (rows, length), generator=generator), mask


@pytest.fixture(params=("gpt2", "llama", "mistral"))
def setup(request):
    model = tiny_model(request.param)
    return model, prefixes_of(model)


@pytest.mark.parametrize("family", MODELS)
def test_logits_equal_each_row_alone_or_the_family_is_refused(family):
    model = tiny_model(family)
    prefixes = prefixes_of(model)
    bank = PrefixBank(prefixes, capacity=5)
    if family in WITHOUT_BANK or (family in ("codegen", "gptj") and hasattr(model.transformer.h[0].attn, "_attn")):  # till 5.23
        with pytest.raises(NotImplementedError, match="model: a bank is not served, as .* hands no further arguments"):
            attach_prefix(model, bank)
        listed = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8").lower().replace("-", "")
        assert type(model).__name__.lower().removesuffix("forcausallm").removesuffix("lmheadmodel") in listed
        return
    model.set_attn_implementation("eager")  # in transformers 5.17 the other leaves out Gemma2's softcap
    ids, mask = inputs_of(length=11)
    expected = alone(model, prefixes, NAMES, lambda i: model(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1]).logits)
    with attach_prefix(model, bank):
        got = model(input_ids=ids, attention_mask=mask, prefix_ids=NAMES).logits
        other = model(input_ids=ids, attention_mask=mask, prefix_ids=NAMES[::-1]).logits
    limits = {"atol": 1e-4, "rtol": 1e-4} if family in WITH_STATE else TOLERANCE  # a state adds up what rounds
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **limits)
    assert (other - got)[mask.bool()].abs().max() > 1e-2


@pytest.mark.parametrize("padded", (False, True), ids=("full", "padded"))
@pytest.mark.parametrize("names", (NAMES, ["unshifted", "short", "long"]), ids=str)
def test_ids_and_positions_in_every_form(setup, names, padded):
    model, prefixes = setup
    ids, mask = inputs_of()
    if not padded:
        mask = torch.ones_like(mask)
    expected = alone(model, prefixes, names, lambda i: model(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1]).logits)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with attach_prefix(model, PrefixBank(prefixes, capacity=5)) as attachment:
        bank = attachment.prefix
        for given in (names, bank.ids(names), bank.ids(names).long(), tuple(names)):
            got = model(input_ids=ids, attention_mask=mask, prefix_ids=given).logits
            torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **TOLERANCE)
        again = model(input_ids=ids, attention_mask=mask, position_ids=positions, prefix_ids=names).logits
        assert torch.equal(again, got)


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
    ),
    ids=str,
)
def test_generated_tokens_equal_each_row_alone(setup, options):
    model, prefixes = setup
    ids, mask = inputs_of()
    options = OPTIONS | options

    def generate(rows, **kwargs):
        return model.generate(input_ids=ids[rows], attention_mask=mask[rows], **options, **kwargs)

    expected = alone(model, prefixes, NAMES, lambda i: generate(slice(i, i + 1)))
    with attach_prefix(model, PrefixBank(prefixes)):
        assert torch.equal(generate(slice(None), prefix_ids=NAMES), expected)
        assert not torch.equal(generate(slice(None), prefix_ids=NAMES[::-1]), expected)


def test_sampled_tokens_equal_a_batch_with_one_prefix(setup):
    """torch draws row by row: row i of a mixed batch draws what row i of a batch with its prefix alone draws."""
    model, prefixes = setup
    ids, mask = inputs_of()
    options = OPTIONS | {"do_sample": True, "top_k": 0}

    def sample(**kwargs):
        torch.manual_seed(3)
        return model.generate(input_ids=ids, attention_mask=mask, **options, **kwargs)

    expected = alone(model, prefixes, NAMES, lambda i: sample()[i : i + 1])
    with attach_prefix(model, PrefixBank(prefixes)):
        assert torch.equal(sample(prefix_ids=NAMES), expected)


@pytest.mark.parametrize("padded", (False, True), ids=("full", "padded"))
@pytest.mark.parametrize("window", ("pinned", "peft"))
@pytest.mark.parametrize("family", ("mistral", "llama4"))
def test_windows_and_chunks(family, window, padded):
    model = tiny_model(family)
    prefixes = prefixes_of(model)
    ids, mask = inputs_of(length=14)
    if not padded:
        mask[:] = 1

    def logits(row):
        given = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
        if NAMES[row] is None:
            return model(**given).logits
        with attach_prefix(model, prefixes[NAMES[row]], prefix_window=window):
            return model(**given).logits

    with attach_prefix(model, PrefixBank(prefixes), prefix_window=window):
        got = model(input_ids=ids, attention_mask=mask, prefix_ids=NAMES).logits
    for row, real in enumerate(mask.bool()):
        torch.testing.assert_close(got[row, real], logits(row)[0, real], **TOLERANCE)


def test_loss_and_gradients_of_the_model_reach_through_a_bank():
    model = tiny_model("llama")
    prefixes = prefixes_of(model)
    ids, mask = inputs_of()
    labels = ids.masked_fill(mask == 0, -100)
    weight = model.get_input_embeddings().weight

    def loss_of(rows, **kwargs):
        return model(input_ids=ids[rows], attention_mask=mask[rows], labels=labels[rows], **kwargs).loss

    counts = (labels[:, 1:] != -100).sum(1)
    losses = alone(model, prefixes, NAMES, lambda i: loss_of(slice(i, i + 1))[None])
    expected = (losses * counts).sum() / counts.sum()
    (expected_grad,) = torch.autograd.grad(expected, weight)
    with attach_prefix(model, PrefixBank(prefixes)) as attachment:
        loss = loss_of(slice(None), prefix_ids=NAMES)
        (grad,) = torch.autograd.grad(loss, weight)
        storage = attachment.prefix.storage
        assert not any(tensor.requires_grad for tensor in storage.keys + storage.values)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad, atol=1e-4, rtol=1e-4)


def test_a_longer_prefix_where_there_is_room_for_one_more():
    model = tiny_model("llama")
    bank, longer = PrefixBank({"a": prefix_of(model, 3, 1)}, capacity=3), prefix_of(model, 7, 2)
    bank.add("b", longer)
    assert (bank.capacity, bank.max_prefix_len) == (3, 7)
    for layer, pair in enumerate(longer.layers()):
        assert torch.equal(bank.storage.keys[layer][1], pair[0]) and torch.equal(bank.storage.values[layer][1], pair[1])


def test_compiled_forward_and_decoding():
    from torch._dynamo.testing import CompileCounterWithBackend

    model = tiny_model("llama", num_hidden_layers=2)
    prefixes = prefixes_of(model)
    bank = PrefixBank(prefixes, capacity=4)
    ids, mask = inputs_of()
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    with attach_prefix(model, bank), torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False, prefix_ids=NAMES)
        compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
        got = compiled(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False, prefix_ids=NAMES)
        torch.testing.assert_close(got.logits, expected.logits, **TOLERANCE)
        torch.testing.assert_close(got.loss, expected.loss, **TOLERANCE)

        step = torch.compile(model.forward, backend=counter, fullgraph=True)
        rows = [["long", None, "short"], ["short", "unshifted", None], ["added", "added", "long"], ["longer", "added", None]]
        frames = []
        for names in rows:
            if names[0] not in (None, *bank.names):
                bank.add(names[0], prefix_of(model, 5 if names[0] == "added" else 9, 9))
            options = OPTIONS | {"max_new_tokens": 4}
            expected = model.generate(input_ids=ids, attention_mask=mask, prefix_ids=names, **options)
            given, seen = bank.ids(names), mask
            cache = StaticCache(config=model.config, max_cache_len=16)
            cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
            logits = model(input_ids=ids, attention_mask=mask, prefix_ids=given, **{cache_name: cache}).logits
            tokens = [ids, logits[:, -1:].argmax(-1)]
            for _ in range(3):
                seen = torch.cat([seen, seen.new_ones(3, 1)], 1)
                call = {"attention_mask": seen, "prefix_ids": given, cache_name: cache}
                tokens.append(step(input_ids=tokens[-1], **call).logits[:, -1:].argmax(-1))
            frames.append(counter.frame_count)
            assert torch.equal(torch.cat(tokens, 1), expected)
    assert 0 < frames[0] == frames[2] < frames[3], f"only a prefix beyond the capacity compiles anew, got {frames}"


def test_default_and_none():
    model = tiny_model("llama")
    prefixes = prefixes_of(model)
    ids, _ = inputs_of()
    plain = model(input_ids=ids).logits
    expected = alone(model, prefixes, ["short"] * 3, lambda i: model(input_ids=ids[i : i + 1]).logits)
    bank = PrefixBank(prefixes, default="short")
    with attach_prefix(model, bank):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, **TOLERANCE)
        torch.testing.assert_close(model(input_ids=ids, prefix_ids=None).logits, plain, **TOLERANCE)
        torch.testing.assert_close(model(input_ids=ids, prefix_ids=[None] * 3).logits, plain, **TOLERANCE)
        tokens = model.generate(input_ids=ids, **OPTIONS)
        bank.default = None
        for call in (lambda: model(input_ids=ids), lambda: model.generate(input_ids=ids, **OPTIONS)):
            with pytest.raises(ValueError, match="prefix_ids: expected a list with .*, got none, and the bank has no default"):
                call()
        assert torch.equal(model.generate(input_ids=ids, prefix_ids=["short"] * 3, **OPTIONS), tokens)
        without = model.generate(input_ids=ids, prefix_ids=None, **OPTIONS)
    assert torch.equal(without, model.generate(input_ids=ids, **OPTIONS))


def test_inputs_embeds_and_positional_input():
    model = tiny_model("llama")
    ids, mask = inputs_of()
    embeds = model.get_input_embeddings()(ids)
    with attach_prefix(model, PrefixBank(prefixes_of(model))):
        expected = model(input_ids=ids, attention_mask=mask, prefix_ids=NAMES).logits
        tokens = model.generate(input_ids=ids, attention_mask=mask, prefix_ids=NAMES, num_beams=2, **OPTIONS)
        got = model.generate(inputs_embeds=embeds, attention_mask=mask, prefix_ids=NAMES, num_beams=2, **OPTIONS)
        assert torch.equal(model(inputs_embeds=embeds, attention_mask=mask, prefix_ids=NAMES).logits, expected)
        assert torch.equal(model(ids, mask, prefix_ids=NAMES).logits, expected)
        assert torch.equal(got, tokens[:, ids.shape[1] :])
        base = model.base_model(input_ids=ids, attention_mask=mask, prefix_ids=NAMES).last_hidden_state
        assert torch.equal(model.lm_head(base), expected)


def test_the_argument_shows_and_detach_removes_it_exactly():
    model = tiny_model("llama")
    before, signature = dict(vars(model)), inspect.signature(model.forward)
    with attach_prefix(model, PrefixBank(prefixes_of(model))):
        shown = inspect.signature(model.forward).parameters
        assert list(shown)[-2:] == ["prefix_ids", list(signature.parameters)[-1]]
        assert [name for name in shown if name != "prefix_ids"] == list(signature.parameters)
    assert vars(model) == before and inspect.signature(model.forward) == signature
    with pytest.raises(ValueError, match="prefix_ids"):
        model.generate(input_ids=inputs_of()[0], prefix_ids=torch.zeros(3, dtype=torch.int32), **OPTIONS)

    own = model.forward = lambda *args, **kwargs: type(model).forward(model, *args, **kwargs)  # as accelerate does
    with attach_prefix(model, PrefixBank(prefixes_of(model))):
        assert model.forward is not own
        model(input_ids=inputs_of()[0], prefix_ids=NAMES)
    assert vars(model)["forward"] is own


def test_add_and_remove_touch_no_other_name():
    model = tiny_model("llama")
    prefixes = prefixes_of(model)
    ids, _ = inputs_of(1)
    bank = PrefixBank({"a": prefixes["short"]}, capacity=3, max_prefix_len=6)
    assert (bank.capacity, bank.max_prefix_len, bank.names) == (3, 6, ("a",))
    with attach_prefix(model, bank), torch.no_grad():

        def logits(name):
            return model(input_ids=ids, prefix_ids=[name]).logits

        storage = bank.storage
        held = [*storage.keys, *storage.values, storage.prefix_lens]
        assert all(hasattr(tensor, "_dynamo_static_input_type") for tensor in held), "CUDA graphs would copy them"
        first = logits("a")
        bank.add("b", prefixes["long"])
        second, b = logits("b"), bank.ids(["b"])
        assert torch.equal(logits("a"), first) and not torch.allclose(second, first, atol=1e-2)
        bank.remove("a")
        gone = torch.tensor([0])  # on a GPU, where ids are not read, a removed one is none
        assert storage.prefix_lens[gone] == 0 == bank.position_offsets(gone)
        assert bank.names == ("b",) and torch.equal(bank.ids(["b"]), b) and torch.equal(logits("b"), second)
        with pytest.raises(ValueError, match=r"expected a name in the bank \('b'\), got 'a'"):
            logits("a")
        with pytest.raises(ValueError, match=r"prefix_ids: expected ids of 'b' or -1, got \[0, 7\]"):
            model(input_ids=ids.expand(3, -1), prefix_ids=torch.tensor([0, 7, -1]))
        bank.add("c", prefixes["unshifted"])
        bank.add("d", prefixes["short"])
        assert bank.storage is storage
        now = [*storage.keys, *storage.values, storage.prefix_lens]
        assert all(tensor is before for tensor, before in zip(now, held, strict=True))
        assert torch.equal(logits("b"), second) and torch.equal(logits("d"), first)
        assert bank.names_of(torch.tensor([-1, *bank.ids(["c", "d"]).tolist()])) == [None, "c", "d"]

        ids_before = bank.ids(["b", "c", "d"])
        bank.add("e", prefix_of(model, 11, 5))
        assert (bank.capacity, bank.max_prefix_len) == (6, 11)
        assert torch.equal(bank.ids(["b", "c", "d"]), ids_before)
        torch.testing.assert_close(logits("b"), second, **TOLERANCE)
        torch.testing.assert_close(logits("d"), first, **TOLERANCE)
        expected = logits("e")
    with attach_prefix(model, prefix_of(model, 11, 5)):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("tensor", range(8))  # keys and values of 3 layers, lengths, offsets
def test_a_bank_that_could_not_grow_is_as_it_was(tensor, monkeypatch):
    model = tiny_model("llama", num_hidden_layers=3)
    prefixes, ids = prefixes_of(model), inputs_of()[0]
    bank = PrefixBank({name: prefixes[name] for name in ("short", "long")})
    left, zeros = [tensor], torch.zeros

    def scarce(*args, **kwargs):
        if not left[0]:
            raise torch.OutOfMemoryError("no memory")
        left[0] -= 1
        return zeros(*args, **kwargs)

    names = ["short", None, "long"]
    with attach_prefix(model, bank), torch.no_grad():
        expected = model(input_ids=ids, prefix_ids=names).logits
        with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
            patched.setattr(torch, "zeros", scarce)
            bank.add("unshifted", prefixes["unshifted"])
        assert bank.names == ("short", "long") and bank.capacity == 2
        assert torch.equal(model(input_ids=ids, prefix_ids=names).logits, expected)
        bank.remove("short")
        bank.add("again", prefixes["short"])
        assert torch.equal(model(input_ids=ids, prefix_ids=["again", None, "long"]).logits, expected)


def test_two_models_share_a_bank():
    models = [tiny_model("llama"), tiny_model("llama")]
    ids, _ = inputs_of(1)
    prefix = prefix_of(models[0], 9, 1)
    bank = PrefixBank({"a": prefix_of(models[0], 3, 2)})
    with attach_prefix(models[0], bank), attach_prefix(models[1], bank):
        first = [model(input_ids=ids, prefix_ids=["a"]).logits for model in models]
        bank.add("b", prefix)
        second = [model(input_ids=ids, prefix_ids=["b"]).logits for model in models]
    assert torch.equal(*first) and torch.equal(*second)
    with attach_prefix(models[0], prefix):
        torch.testing.assert_close(models[0](input_ids=ids).logits, second[0], **TOLERANCE)


def test_a_bank_holds_copies_in_the_models_dtype():
    model = tiny_model("llama").bfloat16()
    prefixes = prefixes_of(model)
    trained = Prefix.for_model(model, 4, reparametrization="mlp", hidden_size=16, seed=0)
    bank = PrefixBank(prefixes | {"mlp": trained}, default="mlp")
    with attach_prefix(model, bank), torch.no_grad():
        assert {tensor.dtype for tensor in bank.storage.keys + bank.storage.values} == {torch.bfloat16}
        got = model(input_ids=inputs_of()[0]).logits
        for parameter in trained.parameters():
            parameter.zero_()
        assert torch.equal(model(input_ids=inputs_of()[0]).logits, got)


@pytest.mark.parametrize("first", ["narrow", "wide"])
def test_prefixes_of_several_dtypes_keep_their_numbers(first):
    model, ids = tiny_model("llama"), inputs_of()[0]
    prefixes = {"narrow": prefix_of(model, 3, 1).bfloat16(), "wide": prefix_of(model, 6, 2)}
    bank = PrefixBank({name: prefixes[name] for name in sorted(prefixes, reverse=first == "wide")})
    names = ["wide", None, "narrow"]
    with torch.no_grad():
        expected = alone(model, prefixes, names, lambda row: model(input_ids=ids[row : row + 1]).logits)
        with attach_prefix(model, bank):
            torch.testing.assert_close(model(input_ids=ids, prefix_ids=names).logits, expected, **TOLERANCE)


def test_what_can_be_an_index_is_an_int():
    bank = PrefixBank(prefixes_of(tiny_model("llama")), capacity=np.int64(9), max_prefix_len=np.array(50))
    assert (bank.capacity, bank.max_prefix_len) == (9, 50)


def test_wrong_calls_raise():
    model = tiny_model("llama")
    prefixes = prefixes_of(model)
    ids, _ = inputs_of()
    for given, error, message in (
        ({}, ValueError, "prefixes: expected one Prefix or more"),
        ({"a": "b"}, TypeError, "prefix: expected a Prefix as 'a', got str"),
        ({3: prefixes["short"]}, TypeError, "name: expected a string, got 3"),
        (
            {"a": prefixes["short"], "b": Prefix({"encoder": prefixes["short"].layers()})},
            ValueError, "expected decoder: 3 layers, .* as the others, got 'b' with encoder: 3 layers",
        ),
        (
            {"a": Prefix({"decoder": prefixes["short"].layers()}, heads={"score": {"weight": torch.zeros(2, 3)}})},
            NotImplementedError, "expected one without heads in a bank, got 'a' with score",
        ),
        ({"a": prefixes["short"], "b": prefix_of(tiny_model("gpt2"), 3, 1)}, ValueError, "got 'b' with decoder: .* 4 kv_heads"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            PrefixBank(given)
    with pytest.raises(ValueError, match="capacity: expected at least 1, got 0"):
        PrefixBank(prefixes, capacity=0)
    with pytest.raises(ValueError, match=r"default: expected a name in the bank \('short', 'long', 'unshifted'\), got 'x'"):
        PrefixBank(prefixes, "x")
    bank = PrefixBank(prefixes, "short")
    with pytest.raises(ValueError, match="name: 'long' is in the bank already"):
        bank.add("long", prefixes["short"])
    with pytest.raises(ValueError, match="name: 'short' is the default"):
        bank.remove("short")
    with pytest.raises(ValueError, match="got a bank of prefixes made for decoder: 3 layers, 2 kv_heads"):
        attach_prefix(tiny_model("gpt2"), bank)
    with attach_prefix(model, bank):
        with pytest.raises(ValueError, match="already has a prefix"):
            attach_prefix(model, bank)
        with pytest.raises(ValueError, match="prefix_ids: expected one for each of 3 rows, got shape \\[2\\]"):
            model(input_ids=ids, prefix_ids=["short", None])
        with pytest.raises(ValueError, match="prefix_ids: expected one for each of 3 rows, got shape \\[3, 1\\]"):
            model(input_ids=ids, prefix_ids=bank.ids(["short", None, "long"])[:, None])
        for wrong in ("short", torch.zeros(3), torch.tensor([True, False, True]), 3):
            with pytest.raises(TypeError, match="prefix_ids: expected a list with a name or None .* or an int"):
                model(input_ids=ids, prefix_ids=wrong)
        for call in (model, lambda **kwargs: model.generate(**kwargs, **OPTIONS)):
            for wrong in ("x", ["short"], 0):
                with pytest.raises(ValueError, match=r"prefix_ids: expected a name in the bank \('short'.*\), got"):
                    call(input_ids=ids, prefix_ids=[wrong, None, None])
        guiding, plain = GenerationConfig(guidance_scale=1.5), GenerationConfig(max_new_tokens=2)
        for args, options in (([], {"guidance_scale": 1.5}), ([guiding], {}), ([], {"generation_config": guiding})):
            with pytest.raises(NotImplementedError, match="guidance_scale"):
                model.generate(ids, *args, **options)
        model.generation_config.guidance_scale = 1.5
        with pytest.raises(NotImplementedError, match="guidance_scale"):
            model.generate(ids, plain)  # which is filled from the model's own
        model.generate(ids, plain, guidance_scale=1)
        model.generation_config.guidance_scale = None
    with attach_prefix(model, prefixes["short"]), pytest.raises(ValueError, match="prefix_ids: .*attach a PrefixBank"):
        model(input_ids=ids, prefix_ids=NAMES)


def test_a_model_that_was_moved_away_from_its_bank():
    model = tiny_model("llama")
    ids, _ = inputs_of()
    with attach_prefix(model, PrefixBank(prefixes_of(model), "short")):
        model.to("meta")
        with pytest.raises(ValueError, match="prefix_ids: a layer of the model is on meta, but .* for it on cpu; attach"):
            model(input_ids=ids.to("meta"))


def test_what_a_bank_does_not_serve():
    model = tiny_model("llama")
    bank = PrefixBank(prefixes_of(model), "short")
    with attach_prefix(model, bank) as attachment, pytest.raises(NotImplementedError, match="enable: .* prefix_ids has None"):
        attachment.enable(False)


def test_ids_that_do_not_arrive_are_not_passed_over(monkeypatch):
    model = tiny_model("llama")
    forward = LlamaForCausalLM.forward

    def forgetful(self, input_ids=None, **kwargs):
        return forward(self, input_ids=input_ids)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forgetful)
    with attach_prefix(model, PrefixBank(prefixes_of(model), "short")):
        model(input_ids=inputs_of()[0])
        with pytest.raises(NotImplementedError, match="prefix_ids: this model's forward hands no further arguments on"):
            model(input_ids=inputs_of()[0], prefix_ids=NAMES)


def test_beside_lora():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    prefixes = prefixes_of(model)
    lora = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"])
    )
    ids, mask = inputs_of()

    def generate(rows, **kwargs):
        return lora.generate(input_ids=ids[rows], attention_mask=mask[rows], **OPTIONS, **kwargs)

    expected = alone(lora, prefixes, NAMES, lambda i: generate(slice(i, i + 1)))
    with attach_prefix(lora, PrefixBank(prefixes)):
        assert torch.equal(generate(slice(None), prefix_ids=NAMES), expected)
        logits = lora(input_ids=ids, attention_mask=mask, prefix_ids=NAMES).logits
    assert logits.shape == (*ids.shape, model.config.vocab_size)


def test_learned_positions_count_each_rows_own_prefix():
    model = tiny_model("gpt2")
    table = model.config.max_position_embeddings
    bank = PrefixBank({"short": prefix_of(model, 3, 1), "long": prefix_of(model, 20, 2)})
    ids = torch.ones(2, table - 3, dtype=torch.long)
    with attach_prefix(model, bank):
        model(input_ids=ids, prefix_ids=["short", None])
        with pytest.raises(ValueError, match=f"the model's {table} position .*, got {table + 17} positions"):
            model(input_ids=ids, prefix_ids=["short", "long"])


@pytest.mark.gpu
def test_on_a_gpu_rows_equal_each_alone_and_no_id_is_read():
    model = tiny_model("llama").cuda()
    prefixes = prefixes_of(model)
    ids, mask = (tensor.cuda() for tensor in inputs_of())
    expected = alone(model, prefixes, NAMES, lambda i: model(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1]).logits)
    bank = PrefixBank(prefixes)
    with attach_prefix(model, bank):
        given = bank.ids(NAMES)
        assert given.is_cuda
        got = model(input_ids=ids, attention_mask=mask, prefix_ids=given).logits
        torch.cuda.set_sync_debug_mode("error")
        try:
            bank.position_offsets(row_ids(bank, given, 3, given.device))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
def test_on_a_gpu_a_captured_graph_sees_a_prefix_that_is_added():
    model = tiny_model("llama").cuda()
    bank = PrefixBank(prefixes_of(model), capacity=4, max_prefix_len=8)
    bank.place([torch.device("cuda", 0)] * len(bank.devices), torch.float32)
    q, k, v = (torch.randn(3, heads, 5, 16, device="cuda") for heads in (4, 2, 2))
    chosen = bank.ids(NAMES)

    def attend():
        layer = bank.storage.keys[0], bank.storage.values[0]
        return prefix_attention(q, k, v, *layer, prefix_ids=chosen, prefix_lens=bank.storage.prefix_lens)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    bank.add("added", prefix_of(model, 7, 9))
    chosen.copy_(bank.ids(["added", "short", "added"]))
    graph.replay()
    assert torch.equal(out, attend())


class WithoutFurtherArguments(LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None):
        return super().forward(input_ids=input_ids, labels=labels)


def test_a_forward_without_further_arguments_is_refused():
    model = WithoutFurtherArguments(tiny_model("llama").config).eval()
    before = dict(vars(model))
    with pytest.raises(NotImplementedError, match="model: a bank is not served, as its forward takes no further arguments"):
        attach_prefix(model, PrefixBank({"a": prefix_of(model, 3, 0)}, default="a"))
    assert vars(model).keys() == before.keys() and vars(model)["config"] is before["config"]
    with attach_prefix(model, prefix_of(model, 3, 0)):
        model(torch.tensor([[5, 6]]))


@pytest.fixture
def accelerator():
    """One that wraps forward for autocast."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("unwrap", [False, True])
def test_what_wraps_forward_meanwhile_outlives_the_bank(unwrap, accelerator):
    """Or is taken off for good."""
    model, dtypes = tiny_model("llama"), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    bank, input_ids = PrefixBank({"a": prefix_of(model, 3, 0)}, default="a"), torch.tensor([[5, 6]])
    expected = model(input_ids).logits
    if unwrap:
        prepared = accelerator.prepare(model)
        with attach_prefix(model, bank):
            accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert torch.equal(model(input_ids).logits, expected)
    else:
        with attach_prefix(model, bank):
            prepared = accelerator.prepare(model)
        prepared(input_ids)
    assert dtypes[-1] == (torch.float32 if unwrap else torch.bfloat16)
