"""generate with every kind of cache and of decoding: the tokens are those of the plain way, and no cache holds the prefix."""

import inspect

import pytest
import torch
from transformers import CompileConfig, DynamicCache, LlamaForCausalLM, StaticCache

from prefix_tuning import PrefixBank, attach_prefix
from prefix_tuning.masks import mask_structure
from support.image_text import tiny_wrapper
from support.models import random_prefix, tiny_model

PREFIX_LEN = 5
OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
WITH_BANK = ("prefix", "bank")


def ids(batch=2, length=7, seed=1):
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(input_ids):
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    return mask


def attach(model, kind, **options):
    """The prefix attached, alone or as one of a bank, and what calls of the model then need."""
    prefix = random_prefix(model, PREFIX_LEN)
    if kind == "prefix":
        return attach_prefix(model, prefix, **options), lambda rows: {}
    with torch.no_grad():
        other = random_prefix(model, PREFIX_LEN + 3)
    names = ["mine", None]
    return attach_prefix(model, PrefixBank({"other": other, "mine": prefix}), **options), lambda rows: {
        "prefix_ids": names[:rows]
    }


@pytest.fixture(params=("gpt2", "llama", "mistral", "gemma3"))
def model(request):
    return tiny_model(request.param)


def windows_of(model):
    """Of each layer its sliding window; gemma3 has layers with and without."""
    kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"] * model.config.num_hidden_layers
    window = getattr(model.config, "sliding_window", None)
    return [window if kind == "sliding_attention" else None for kind in kinds]


@pytest.mark.parametrize("kind", WITH_BANK)
@pytest.mark.parametrize("cache", (DynamicCache, StaticCache))
def test_a_cache_handed_in_holds_sequence_tokens_only(model, cache, kind):
    input_ids = ids()
    attachment, given = attach(model, kind)
    with attachment:
        expected = model.generate(input_ids=input_ids, max_new_tokens=5, **given(2), **OPTIONS)
        made = cache(config=model.config) if cache is DynamicCache else cache(config=model.config, max_cache_len=20)
        got = model.generate(input_ids=input_ids, max_new_tokens=5, **{CACHE: made}, **given(2), **OPTIONS)
    assert torch.equal(got, expected)
    assert made.get_seq_length() == 7 + 4, "the last token is never run"
    lengths = [layer.keys.shape[2] for layer in made.layers]
    if cache is StaticCache:
        assert lengths == [20 if window is None else window for window in windows_of(model)]
    else:
        assert lengths == [11 if window is None else window - 1 for window in windows_of(model)]
    assert made.layers[0].keys.shape[0] == 2


@pytest.mark.parametrize("kind", WITH_BANK)
@pytest.mark.parametrize("padded", (False, True), ids=("full", "padded"))
@pytest.mark.parametrize("static", (False, True), ids=("dynamic", "static"))
def test_turns_of_a_chat_equal_one_shot(model, kind, padded, static):
    """Each turn hands the cache back with the whole conversation so far, as transformers has it."""
    turns, masks = [ids(2, 6, seed) for seed in (1, 2, 3)], []
    attachment, given = attach(model, kind)
    with attachment:
        cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache(config=model.config)
        conversation, mask = turns[0][:, :0], turns[0][:, :0]
        for turn in turns:
            conversation = torch.cat([conversation, turn], 1)
            mask = torch.cat([mask, left_padded(turn) if padded else torch.ones_like(turn)], 1)
            call = {"input_ids": conversation, "attention_mask": mask, "max_new_tokens": 4} | given(2) | OPTIONS
            expected = model.generate(**call)
            conversation = model.generate(**call, **{CACHE: cache})
            masks.append(mask)
            assert torch.equal(conversation, expected)
            mask = torch.cat([mask, mask.new_ones(2, 4)], 1)
    assert cache.get_seq_length() == 3 * (6 + 4) - 1


@pytest.mark.parametrize("kind", WITH_BANK)
@pytest.mark.parametrize("static", (False, True), ids=("dynamic", "static"))
def test_a_turn_of_new_tokens_alone(model, kind, static):
    """What the cache lacks, with the mask of the whole conversation: the last answer's last token and the next question."""
    first = ids(2, 6)
    mask, (attachment, given) = left_padded(first), attach(model, kind)
    with attachment:
        cache = StaticCache(config=model.config, max_cache_len=20) if static else DynamicCache(config=model.config)
        options = {"max_new_tokens": 4} | given(2) | OPTIONS
        answered = model.generate(input_ids=first, attention_mask=mask, **{CACHE: cache}, **options)
        whole, mask = torch.cat([answered, ids(2, 3, seed=2)], 1), torch.cat([mask, mask.new_ones(2, 4 + 3)], 1)
        expected = model.generate(input_ids=whole, attention_mask=mask, **options)
        new = whole[:, cache.get_seq_length() :]
        got = model.generate(input_ids=new, attention_mask=mask, **{CACHE: cache}, **options)
    assert new.shape[1] == 4 and torch.equal(got[:, 4:], expected[:, whole.shape[1] :])


@pytest.mark.parametrize("kind", WITH_BANK)
@pytest.mark.parametrize("cache", (DynamicCache, StaticCache))
@pytest.mark.parametrize("name", ("gpt2", "llama", "mistral", "gemma3", "gemma3 with a tower", "llava with a tower"))
def test_a_mask_with_columns_for_tokens_to_come(name, cache, kind):
    """As long as a static cache from the start, so that nothing changes its shape: what is to come takes no position."""
    family, tower = name.split()[0], name.endswith("tower")
    model = tiny_wrapper(family) if tower else tiny_model(family)
    input_ids, mask, logits = ids(), torch.ones(2, 16, dtype=torch.long), {}
    mask[0, :3] = 0
    attachment, given = attach(model, kind)
    with attachment, torch.no_grad():
        for longest in (False, True):
            made = cache(config=model.config) if cache is DynamicCache else cache(config=model.config, max_cache_len=16)
            pieces, end = [], 0
            for piece in input_ids.split((4, 1, 2), 1):
                end += piece.shape[1]
                seen = mask if longest else mask[:, :end]
                pieces.append(model(input_ids=piece, attention_mask=seen, **{CACHE: made}, **given(2)).logits)
            logits[longest] = torch.cat(pieces, 1)
    real = mask[:, :7].bool()
    torch.testing.assert_close(logits[True][real], logits[False][real], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", WITH_BANK)
def test_returned_cache_goes_on(model, kind):
    input_ids, more = ids(), ids(2, 3, seed=4)
    attachment, given = attach(model, kind)
    with attachment:
        first = model.generate(input_ids=input_ids, max_new_tokens=4, return_dict_in_generate=True, **given(2), **OPTIONS)
        whole = torch.cat([first.sequences, more], 1)
        expected = model.generate(input_ids=whole, max_new_tokens=4, **given(2), **OPTIONS)
        got = model.generate(input_ids=whole, max_new_tokens=4, **{CACHE: first[CACHE]}, **given(2), **OPTIONS)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", WITH_BANK)
@pytest.mark.parametrize("lookup", (2, 4))
def test_prompt_lookup_equals_greedy(model, kind, lookup):
    phrase = ids(1, 4)
    input_ids = torch.cat([phrase, ids(1, 2, seed=2), phrase], 1)
    attachment, given = attach(model, kind)
    with attachment:
        expected = model.generate(input_ids=input_ids, max_new_tokens=12, **given(1), **OPTIONS)
        lengths = []
        hook = model.get_input_embeddings().register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
        got = model.generate(input_ids=input_ids, max_new_tokens=12, prompt_lookup_num_tokens=lookup, **given(1), **OPTIONS)
        hook.remove()
    assert torch.equal(got, expected)
    assert max(lengths[1:]) > 1, "nothing was looked up"


@pytest.mark.parametrize("kind", WITH_BANK)
@pytest.mark.parametrize("assistant", ("plain", "prefix", "bank", "bank without the name"))
def test_assisted_decoding_equals_greedy(kind, assistant):
    model, helper = tiny_model("llama"), tiny_model("llama", num_hidden_layers=2)
    attachment, given = attach(model, kind)
    other = random_prefix(helper, 2)
    bank = PrefixBank({"mine" if assistant == "bank" else "another": other, "default": random_prefix(helper, 4)}, "default")
    with attachment:
        input_ids = ids(1)
        expected = model.generate(input_ids=input_ids, max_new_tokens=10, **given(1), **OPTIONS)
        helped, seen = [], []
        if assistant != "plain":
            helped.append(attach_prefix(helper, other if assistant == "prefix" else bank))
        hook = helper.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs.get("prefix_ids")), with_kwargs=True
        )
        got = model.generate(input_ids=input_ids, max_new_tokens=10, assistant_model=helper, **given(1), **OPTIONS)
        hook.remove()
        for attached in helped:
            attached.detach()
    assert torch.equal(got, expected)
    assert seen, "the assistant never ran"
    if assistant.startswith("bank"):
        known = kind == "bank" and assistant == "bank"
        assert {tuple(each.tolist()) for each in seen} == {tuple(bank.ids(["mine" if known else "default"]).tolist())}


@pytest.mark.parametrize("default", (None, "other"))
@pytest.mark.parametrize("given, chosen", (({}, "mine"), (None, None), (["mine"], "mine"), (["b"], None)), ids=str)
def test_an_assistants_bank_gives_the_same_name_else_its_default_else_none(given, chosen, default):
    model, helper = tiny_model("llama"), tiny_model("llama", num_hidden_layers=2)
    bank = PrefixBank({"mine": random_prefix(model, 3), "b": random_prefix(model, 4)}, "mine")
    given = given if given == {} else {"prefix_ids": given}
    helpers = PrefixBank({"other": random_prefix(helper, 2), "mine": random_prefix(helper, 4)}, default)
    seen = []
    with attach_prefix(model, bank), attach_prefix(helper, helpers):
        expected = model.generate(input_ids=ids(1), max_new_tokens=6, **given, **OPTIONS)
        helper.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["prefix_ids"]), with_kwargs=True
        )
        got = model.generate(input_ids=ids(1), max_new_tokens=6, assistant_model=helper, **given, **OPTIONS)
    assert torch.equal(got, expected)
    assert {tuple(each.tolist()) for each in seen} == {tuple(helpers.ids([chosen or default]).tolist())}


@pytest.mark.parametrize("kind", WITH_BANK)
def test_the_model_helps_itself_with_its_first_layers(kind):
    model = tiny_model("llama")
    attachment, given = attach(model, kind)
    with attachment:
        expected = model.generate(input_ids=ids(1), max_new_tokens=8, **given(1), **OPTIONS)
        got = model.generate(input_ids=ids(1), max_new_tokens=8, assistant_early_exit=2, **given(1), **OPTIONS)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", WITH_BANK)
@pytest.mark.parametrize("cache", ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}), ids=str)
@pytest.mark.parametrize(
    "options",
    (
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"num_return_sequences": 3, "do_sample": True},
    ),
    ids=str,
)
def test_every_decoding_with_every_cache_equals_no_cache(model, kind, options, cache):
    input_ids, (attachment, given) = ids(), attach(model, kind)
    call = {"input_ids": input_ids, "attention_mask": left_padded(input_ids), "max_new_tokens": 5} | OPTIONS
    with attachment:
        torch.manual_seed(5)
        expected = model.generate(**call | options, use_cache=False, **given(2))
        torch.manual_seed(5)
        got = model.generate(**call | options, **cache, **given(2))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", WITH_BANK)
def test_generate_compiles_its_steps(kind):
    """transformers compiles decoding with a static cache where it is told to, on a GPU by itself."""
    model = tiny_model("llama", num_hidden_layers=2)
    config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    input_ids, (attachment, given) = ids(), attach(model, kind)
    torch._dynamo.reset()
    call = {"input_ids": input_ids, "attention_mask": left_padded(input_ids), "max_new_tokens": 5} | OPTIONS
    with attachment:
        expected = model.generate(**call, **given(2))
        got = model.generate(**call, cache_implementation="static", compile_config=config, **given(2))
    assert torch.equal(got, expected)
    assert hasattr(model, "_compiled_call")


def test_code_compiled_with_one_prefix_serves_no_other():
    model = tiny_model("llama", num_hidden_layers=2)
    prefix, longer = random_prefix(model, PREFIX_LEN), random_prefix(model, PREFIX_LEN + 2)
    shifted = random_prefix(model, PREFIX_LEN)
    shifted.position_offset = 17
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for given in (prefix, None, shifted, PrefixBank({"a": longer}, "a")):
            attachment = None if given is None else attach_prefix(model, given)
            expected = model(input_ids=ids(), use_cache=False).logits
            got = compiled(input_ids=ids(), use_cache=False).logits
            if attachment is not None:
                attachment.detach()
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", WITH_BANK)
def test_what_generate_refuses(kind):
    model = tiny_model("llama")
    attachment, given = attach(model, kind)
    with attachment:
        with pytest.raises(NotImplementedError, match="output_attentions: attention weights are never built"):
            model.generate(input_ids=ids(), output_attentions=True, return_dict_in_generate=True, **given(2), **OPTIONS)
        with pytest.raises(ValueError, match="prefix_tuning.* is not supported"):  # transformers' own words
            model.generate_batch([[5, 6, 7]])


@pytest.mark.parametrize("length", (4, 12), ids=("within the window", "beyond it"))
@pytest.mark.parametrize("window", ("pinned", "peft"))
@pytest.mark.parametrize("family", ("mistral", "gemma3"))
def test_sliding_window_caches(family, window, length):
    model = tiny_model(family)
    input_ids = ids(2, length)
    call = {"input_ids": input_ids, "attention_mask": left_padded(input_ids), "max_new_tokens": 14} | OPTIONS
    with attach_prefix(model, random_prefix(model, PREFIX_LEN), prefix_window=window):
        expected = model.generate(**call, use_cache=False)
        assert torch.equal(model.generate(**call), expected)
        assert torch.equal(model.generate(**call, cache_implementation="static"), expected)


@pytest.mark.parametrize("kind", WITH_BANK)
@pytest.mark.parametrize("padded", (False, True), ids=("full", "padded"))
@pytest.mark.parametrize("family", ("phi3", "phimoe"))
def test_where_rotary_factors_change_the_cache_is_dropped(family, padded, kind):
    """From a position on, and the prefix takes some: keys of one kind never meet queries of the other."""
    short, long = [1.0 + 0.5 * i for i in range(8)], [3.0 + 2 * i for i in range(8)]
    factors = {"short_factor": short, "long_factor": long, "short_mscale": 1.0, "long_mscale": 1.2, "rope_theta": 1e4}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 20} | factors
    model = tiny_model(family, original_max_position_embeddings=20, rope_parameters=rope, sliding_window=None)
    input_ids = ids()
    mask = left_padded(input_ids) if padded else torch.ones_like(input_ids)
    call = {"input_ids": input_ids, "attention_mask": mask, "max_new_tokens": 20} | OPTIONS
    own = model.prepare_inputs_for_generation
    attachment, given = attach(model, kind)
    with attachment:
        for beams in (1, 2):
            options = call | given(2) | {"num_beams": beams}
            assert torch.equal(model.generate(**options), model.generate(**options, use_cache=False))
    assert model.prepare_inputs_for_generation == own


def test_the_fill_of_a_static_cache_is_made_where_the_model_is():
    """Also without a mask, as the decoder of T5 has none: transformers says where."""
    fill = mask_structure(2, 3, 8, device=torch.device("meta")).key_lens
    assert fill.device.type == "meta" and fill.shape == (2,)
