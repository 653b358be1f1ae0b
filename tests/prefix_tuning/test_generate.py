"""Texts in batches are the texts that the model writes for each prompt alone."""

import threading
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch

from prefix_tuning import Prefix, PrefixBank, accelerate_peft, attach_prefix
from prefix_tuning.generate import first_line, generate_ids, generate_texts
from prefix_tuning.row_limits import pair_limits
from support.encoder_decoders import tiny_encoder_decoder
from support.models import FAMILIES, random_prefix, tiny_model
from support.tokenizer import CHAT_TEMPLATE, tiny_tokenizer

PROMPTS = ["a longer prompt than the others", "x", "abc : 7", "Zz", "one more of middle length"]
STEPS = 6


def continued(model, tokenizer, prompt, **options):
    """The ids that model.generate itself adds to one prompt."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    options = {"do_sample": False, "max_new_tokens": STEPS, "pad_token_id": 0, "eos_token_id": 2, **options}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", (1, 2, 8))
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_give_each_prompts_own_text_in_the_prompts_order(family, batch_size):
    model, tokenizer = tiny_model(family), tiny_tokenizer(bos=True)
    with attach_prefix(model, random_prefix(model)):
        expected = [decoded(tokenizer, continued(model, tokenizer, prompt)) for prompt in PROMPTS]
        texts = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=STEPS, batch_size=batch_size)
    assert texts == expected
    assert len(set(texts)) == len(texts)
    plain = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=STEPS, batch_size=batch_size)
    assert plain == [decoded(tokenizer, continued(model, tokenizer, prompt)) for prompt in PROMPTS] != texts


@pytest.mark.parametrize("batch_size", (1, 2, 8))
def test_each_prompt_has_its_own_prefix(batch_size):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(bos=True)
    names = ["a", None, "b", "b", "a"]
    prefixes = {"a": random_prefix(model, 3), "b": random_prefix(model, 6)}
    options = {"max_new_tokens": STEPS, "batch_size": batch_size}
    texts = {None: generate_texts(model, tokenizer, PROMPTS, **options)}
    for name, prefix in prefixes.items():
        with attach_prefix(model, prefix):
            texts[name] = generate_texts(model, tokenizer, PROMPTS, **options)
    with attach_prefix(model, PrefixBank(prefixes)):
        got = generate_texts(model, tokenizer, PROMPTS, prefix_ids=names, **options)
        with pytest.raises(ValueError, match="prefix_ids: expected one for each of 5 prompts, got 1"):
            generate_texts(model, tokenizer, PROMPTS, prefix_ids=["a"], **options)
    assert got == [texts[name][i] for i, name in enumerate(names)]


def test_a_text_as_prefix_has_the_special_tokens():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(bos=True)
    text = "Be kind.\n"
    expected = generate_texts(model, tokenizer, [text + prompt for prompt in PROMPTS], max_new_tokens=STEPS)
    with attach_prefix(model, Prefix.from_text(model, tokenizer, text)):
        assert generate_texts(model, tokenizer, PROMPTS, max_new_tokens=STEPS, special_tokens=False) == expected


def test_prompts_of_similar_length_share_a_batch_padded_on_the_left(monkeypatch):
    model, tokenizer, seen = tiny_model("llama"), tiny_tokenizer(), []
    original = model.generate

    def generate(input_ids, attention_mask, **settings):
        seen.append((input_ids.tolist(), attention_mask.tolist()))
        return original(input_ids=input_ids, attention_mask=attention_mask, **settings)

    monkeypatch.setattr(model, "generate", generate)
    generate_texts(model, tokenizer, PROMPTS, max_new_tokens=1, batch_size=2)
    encoded = {prompt: tokenizer(prompt)["input_ids"] for prompt in PROMPTS}
    expected = []
    for prompts in (("x", "Zz"), ("abc : 7", "one more of middle length"), ("a longer prompt than the others",)):
        width = max(len(encoded[prompt]) for prompt in prompts)
        missing = [width - len(encoded[prompt]) for prompt in prompts]
        expected.append((
            [[0] * count + encoded[prompt] for count, prompt in zip(missing, prompts, strict=True)],
            [[0] * count + [1] * (width - count) for count in missing],
        ))  # fmt: skip
    assert seen == expected


def test_beams_equal_each_prompts_own():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    options = {"num_beams": 3, "max_new_tokens": STEPS}
    expected = [decoded(tokenizer, continued(model, tokenizer, prompt, **options)) for prompt in PROMPTS]
    assert generate_texts(model, tokenizer, PROMPTS, batch_size=3, **options) == expected
    assert expected != generate_texts(model, tokenizer, PROMPTS, max_new_tokens=STEPS)


@pytest.mark.parametrize("whose", ("model", "tokenizer"))
@pytest.mark.parametrize("special", ({}, {"pad": False}, {"pad": False, "eos": False}), ids=str)
def test_a_text_ends_before_a_stop_token_of_the_model_or_the_tokenizer(whose, special):
    """The other row of the batch goes on, so the first is filled up: nothing of that is in its text."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(**special)
    model.generation_config.eos_token_id = None
    rows = [continued(model, tokenizer, prompt, eos_token_id=None) for prompt in PROMPTS[:2]]
    at, stop = next((at, token) for at, token in enumerate(rows[0]) if at and token > 3 and token not in rows[1])
    if whose == "model":
        model.generation_config.eos_token_id = [stop, 127] if special else stop
    else:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    texts = generate_texts(model, tokenizer, PROMPTS[:2], max_new_tokens=STEPS)
    assert texts == [decoded(tokenizer, rows[0][: rows[0].index(stop)]), decoded(tokenizer, rows[1])]
    assert at < STEPS - 1 and len(rows[1]) == STEPS


def test_without_stop_tokens_every_text_has_its_full_length():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(eos=False)
    model.generation_config.eos_token_id = None
    rows = [continued(model, tokenizer, prompt, eos_token_id=None) for prompt in PROMPTS]
    assert {len(row) for row in rows} == {STEPS}
    assert generate_texts(model, tokenizer, PROMPTS, max_new_tokens=STEPS) == [decoded(tokenizer, row) for row in rows]


@pytest.mark.parametrize("drawing", ({"temperature": 99.0}, {"temperature": 3.0, "top_p": 0.6}), ids=str)
def test_sampling_draws_from_the_models_own_distribution(drawing):
    """The hot one draws from all tokens alike: transformers' own default would keep to the likeliest 50."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    torch.manual_seed(5)
    expected = decoded(tokenizer, continued(model, tokenizer, "abc", do_sample=True, top_k=0, **drawing))
    torch.manual_seed(5)
    assert generate_texts(model, tokenizer, ["abc"], max_new_tokens=STEPS, sample=True, **drawing) == [expected]
    assert generate_texts(model, tokenizer, ["abc"], max_new_tokens=STEPS, sample=True, seed=5, **drawing) == [expected]
    greedy = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=STEPS)
    for cold in ({"temperature": 1e-4}, {"top_p": 1e-4}):
        assert generate_texts(model, tokenizer, PROMPTS, max_new_tokens=STEPS, sample=True, **cold) == greedy


def test_seed_repeats_the_drawing_and_leaves_torchs_generator_alone():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()

    def texts(seed):
        return generate_texts(model, tokenizer, PROMPTS, max_new_tokens=STEPS, sample=True, temperature=2.0, seed=seed)

    state = torch.get_rng_state()
    first, again, other = texts(1), texts(1), texts(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again != other
    assert texts(None) != texts(None)


BENDING = [
    {"no_repeat_ngram_size": 1}, {"repetition_penalty": 5.0}, {"suppress_tokens": list(range(4, 66))},
    {"min_new_tokens": STEPS}, {"forced_eos_token_id": 5}, {"num_return_sequences": 2, "do_sample": True},
    {"do_sample": True, "temperature": 9.0}, {"top_k": 1}, {"min_p": 0.9}, {"typical_p": 0.1}, {"epsilon_cutoff": 0.5},
    {"max_length": 2}, {"stop_strings": ["e"]},
]  # fmt: skip


@pytest.mark.parametrize("sample", (False, True), ids=("greedy", "sample"))
@pytest.mark.parametrize("bending", BENDING, ids=str)
def test_the_models_own_generation_config_bends_nothing_and_is_kept(bending, sample, capfd):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    options = {"max_new_tokens": STEPS, "sample": sample, "seed": 0}
    expected = generate_texts(model, tokenizer, PROMPTS, **options)
    own = model.generation_config
    for name, value in bending.items():
        setattr(own, name, value)
    assert generate_texts(model, tokenizer, PROMPTS, **options) == expected
    assert model.generation_config is own and all(getattr(own, name) == value for name, value in bending.items())
    assert capfd.readouterr() == ("", "")


def test_the_kind_of_cache_is_the_models(monkeypatch):
    model, tokenizer, seen = tiny_model("llama"), tiny_tokenizer(), []
    model.generation_config.cache_implementation = "static"
    expected = [decoded(tokenizer, continued(model, tokenizer, prompt)) for prompt in PROMPTS]
    original = model.generate
    monkeypatch.setattr(model, "generate", lambda **call: seen.append(call["cache_implementation"]) or original(**call))
    assert generate_texts(model, tokenizer, PROMPTS, max_new_tokens=STEPS) == expected
    assert seen == ["static"]


def test_calls_that_overlap_have_their_own_settings():
    """One begins amid the first batch of another, and ends after it."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    first, second = {"max_new_tokens": STEPS, "batch_size": 1}, {"max_new_tokens": 3, "num_beams": 2}
    expected = [generate_texts(model, tokenizer, PROMPTS, **options) for options in (first, second)]
    own, texts = model.generation_config, []
    thread = threading.Thread(target=lambda: texts.append(generate_texts(model, tokenizer, PROMPTS, **second)))
    begun, ended = threading.Event(), threading.Event()

    def overlap(module, args):
        if threading.current_thread() is thread:
            begun.set()
            ended.wait()
        elif not begun.is_set():
            thread.start()
            begun.wait()

    with model.get_input_embeddings().register_forward_pre_hook(overlap):
        got = generate_texts(model, tokenizer, PROMPTS, **first)
        ended.set()
        thread.join()
    assert [got, *texts] == expected and model.generation_config is own


def test_the_model_under_an_adapter_keeps_its_generation_config():
    peft = pytest.importorskip("peft")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    expected, own = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=STEPS), model.generation_config
    lora = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert generate_texts(lora, tokenizer, PROMPTS, max_new_tokens=STEPS) == expected
    assert model.generation_config is own


def test_a_prefix_of_peft_writes_by_the_same_settings():
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model, tokenizer = accelerate_peft(peft.get_peft_model(tiny_model("llama"), config)).eval(), tiny_tokenizer()
    expected = [decoded(tokenizer, continued(model, tokenizer, prompt)) for prompt in PROMPTS]
    assert generate_texts(model, tokenizer, PROMPTS, max_new_tokens=STEPS, batch_size=2) == expected


def test_conversations_go_through_the_template():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(bos=True, chat_template=CHAT_TEMPLATE)
    expected = decoded(tokenizer, continued(model, tiny_tokenizer(), "user: hi</s>\nassistant: "))
    texts = generate_texts(model, tokenizer, [[{"role": "user", "content": "hi"}], "x"], max_new_tokens=STEPS)
    assert texts == [expected, decoded(tokenizer, continued(model, tokenizer, "x"))]


@pytest.mark.parametrize(
    "prompts, options, match",
    (
        (["a", ""], {}, r"prompts\[1\]: expected at least one token, got ''"),
        ([[{"role": "user", "content": "hi"}]], {}, "messages: the tokenizer has no chat template"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        (["a"], {"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        (["a"], {"num_beams": 0}, "num_beams: expected at least 1, got 0"),
        (["a"], {"max_new_tokens": 2.5}, "max_new_tokens: expected an int, got 2.5"),
        (["a"], {"max_new_tokens": None}, "max_new_tokens: expected an int, got None"),
        (["a"], {"temperature": "a"}, "temperature: expected a number, got 'a'"),
        (["a"], {"prefix_ids": "a"}, "prefix_ids: expected a list with a name or None for each prompt, got 'a'"),
        ([3], {}, r"prompts\[0\]: expected a text or a conversation, got 3"),
        (["a"], {"temperature": 0.0}, "temperature: expected more than 0, got 0.0"),
        (["a"], {"top_p": 0.0}, "top_p: expected more than 0 and at most 1, got 0.0"),
        (["a"], {"top_p": 1.1}, "top_p: expected more than 0 and at most 1, got 1.1"),
    ),
)
def test_wrong_calls_raise(prompts, options, match):
    with pytest.raises((TypeError, ValueError), match=match):
        generate_texts(tiny_model("llama"), tiny_tokenizer(), prompts, **options)


def test_numbers_of_any_kind():
    call = partial(generate_texts, tiny_model("llama"), tiny_tokenizer(), ["a", "b"], sample=True, seed=1)
    expected = call(max_new_tokens=5, batch_size=1, temperature=2.0, top_p=0.5)
    assert call(max_new_tokens=np.int64(5), batch_size=np.array(1), temperature=2, top_p=np.float32(0.5)) == expected


@pytest.mark.parametrize("attached", (None, "switched off", "prefix", "bank"))
def test_a_table_of_positions_has_room_for_the_prompt_and_the_new_tokens(attached):
    """To the last: the token behind which nothing is written needs no position."""
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    prefix, options, behind = random_prefix(model, 3), {"max_new_tokens": 5}, attached in ("prefix", "bank")
    left = model.config.n_positions - 3 * behind
    if attached == "bank":
        options["prefix_ids"] = [None, "a"]
    prompts = ["Z" * 9, "Z" * (left - 4)]
    given = PrefixBank({"a": prefix}) if attached == "bank" else prefix
    with attach_prefix(model, given) if attached else nullcontext() as attachment:
        if attached == "switched off":
            attachment.enable(False)
        texts = generate_texts(model, tokenizer, prompts, **options)
        longer = [prompts[0], "x" + prompts[1]]
        room = f"the model's {left} positions{' behind the prefix' * behind} for"
        message = rf"prompts\[1\]: expected at most {room} .*, got {left - 3} tokens and max_new_tokens 5;"
        with pytest.raises(ValueError, match=message):
            generate_texts(model, tokenizer, longer, **options)
        assert generate_texts(model, tokenizer, longer, cut_prompts=True, **options) == texts
        with pytest.raises(ValueError, match="lower max_new_tokens"):
            generate_texts(model, tokenizer, prompts, cut_prompts=True, **options | {"max_new_tokens": left + 1})


@pytest.mark.parametrize("parts", (("encoder", "decoder", "cross"), ("cross",)), ids=str)
@pytest.mark.parametrize("family", ("bart", "marian", "mbart", "pegasus"))
def test_the_tables_of_an_encoder_decoder_have_room_for_the_prompt_and_for_the_new_tokens(family, parts):
    """Each to the last; only what a part of the prefix stands before is moved behind it, as an adapter of PEFT has it."""
    model, tokenizer = tiny_encoder_decoder(family, vocab_size=128, decoder_vocab_size=128), tiny_tokenizer(adds_eos=True)
    prefix = random_prefix(model, 3, parts=parts)
    prefix.position_offset = 3
    left = 64 - 3 * ("encoder" in parts)
    prompts, options = ["Z" * 9, "Z" * (left - 1)], {"max_new_tokens": left}
    with attach_prefix(model, prefix):
        texts = generate_texts(model, tokenizer, prompts, **options)
        longer = [prompts[0], prompts[1] + "x"]
        message = (
            rf"prompts\[1\]: expected at most the {left} tokens that the model's encoder has positions for, got {left + 1}"
        )
        with pytest.raises(ValueError, match=message):
            generate_texts(model, tokenizer, longer, **options)
        assert generate_texts(model, tokenizer, longer, cut_prompts=True, **options) == texts
        with pytest.raises(ValueError, match=f"max_new_tokens: expected at most the {left} that .*, got {left + 1}"):
            generate_texts(model, tokenizer, prompts, max_new_tokens=left + 1)


@pytest.mark.parametrize("family", ("m2m_100", "t5", "t5gemma"))
def test_an_encoder_decoder_without_such_tables(family):
    model, tokenizer = tiny_encoder_decoder(family), tiny_tokenizer(adds_eos=True)
    prompt = "a" * 90
    with attach_prefix(model, random_prefix(model, 3)):
        texts = generate_texts(model, tokenizer, [prompt], max_new_tokens=70)
        assert generate_texts(model, tokenizer, [prompt], max_new_tokens=70, cut_prompts=True) == texts


def test_an_encoder_decoder_of_a_family_that_is_not_served(monkeypatch):
    model = tiny_encoder_decoder("bart")
    assert pair_limits(model) == (64, 64)
    monkeypatch.setattr(model.config, "model_type", "led")
    assert pair_limits(model) == (None, None)


def test_an_encoder_decoder_does_not_write_what_must_not_be_in_its_texts():
    """Marian's padding has a logit of 0, more than most tokens; its generation config forbids it."""
    model, tokenizer = tiny_encoder_decoder("marian", vocab_size=128, decoder_vocab_size=128), tiny_tokenizer()
    encoded = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    with attach_prefix(model, random_prefix(model, 3)):
        model.final_logits_bias[0, 0] = 100.0
        assert generate_ids(model, tokenizer, encoded, max_new_tokens=STEPS) == [[0] * STEPS] * len(PROMPTS)
        model.generation_config.bad_words_ids = [[0]]
        assert all(0 not in ids for ids in generate_ids(model, tokenizer, encoded, max_new_tokens=STEPS))


def test_positions_that_are_computed_do_not_end():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompt = "Z" * (model.config.max_position_embeddings + 1)
    texts = generate_texts(model, tokenizer, [prompt], max_new_tokens=2)
    assert generate_texts(model, tokenizer, [prompt], max_new_tokens=2, cut_prompts=True) == texts


def test_a_text_is_no_list_of_prompts():
    with pytest.raises(TypeError, match="prompts: expected a list of texts or conversations, got the text 'a pub'"):
        generate_texts(tiny_model("llama"), tiny_tokenizer(), "a pub")


def test_no_prompts_and_the_progress_bar(capsys):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert generate_texts(model, tokenizer, []) == []
    generate_texts(model, tokenizer, PROMPTS, max_new_tokens=1)
    assert capsys.readouterr() == ("", "")
    generate_texts(model, tokenizer, PROMPTS, max_new_tokens=1, batch_size=2, progress="writing")
    out, err = capsys.readouterr()
    assert out == "" and "writing: 100%" in err and "5/5" in err


@pytest.mark.parametrize(
    "text, expected", (("one\ntwo", "one"), ("\n  \n one \ntwo", "one"), ("", ""), (" \n\n", ""), ("one", "one"))
)
def test_first_line(text, expected):
    assert first_line(text) == expected
