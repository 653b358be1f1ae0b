"""A real text as a prefix gives what the text in front of every row gives, whatever the tokenizer adds to texts."""

import warnings
from functools import partial

import pytest
import torch

from prefix_tuning import Prefix, PrefixBank, attach_prefix, offline_model, text_cache
from prefix_tuning.offline_model import load_model_and_tokenizer
from support.allocations import allocations
from support.models import MODELS, WITH_STATE, tiny_model
from support.prefixes import assert_layers, cached
from support.tokenizer import CHAT_TEMPLATE, tiny_tokenizer

FAMILIES = ("gpt2", "llama", "mistral")
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TEXT = "Be kind and short.\n"
ROWS = ["name : Aromi", "area : riverside | food : Thai"]
TOKENIZERS = ({}, {"bos": True}, {"adds_eos": True}, {"bos": True, "adds_eos": True})


def padded(rows):
    """Ids of rows, padded on the left, and their mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def continued(model, rows):
    """Greedy tokens."""
    ids, mask = padded(rows)
    return model.generate(input_ids=ids, attention_mask=mask, **OPTIONS)[:, ids.shape[1] :]


@pytest.mark.parametrize("options", TOKENIZERS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_in_front_of_every_row(family, options):
    model, tokenizer = tiny_model(family), tiny_tokenizer(**options)
    prefix = Prefix.from_text(model, tokenizer, TEXT)
    opened = [tokenizer.bos_token_id] if options.get("bos") else []
    together = [opened + tokenizer(TEXT + row, add_special_tokens=False)["input_ids"] for row in ROWS]
    rows = [tokenizer(row, add_special_tokens=False)["input_ids"] for row in ROWS]
    assert prefix.prefix_len == len(together[0]) - len(rows[0]), "the line break ends a token"
    expected = continued(model, together)
    assert not torch.equal(continued(model, rows), expected)
    with attach_prefix(model, prefix, prefix_window="peft"):
        assert torch.equal(continued(model, rows), expected)


@pytest.mark.parametrize("family", MODELS)
def test_every_family_computes_as_behind_the_text(family):
    model = tiny_model(family)
    model.set_attn_implementation("eager")  # in transformers 5.17 the other leaves out Gemma2's softcap
    text, rows = torch.arange(5, 14)[None], torch.arange(20, 34).view(2, 7)
    if family in WITH_STATE:
        with pytest.raises(NotImplementedError, match="a text leaves more than keys and values in a .*: its cache has Linear"):
            Prefix.from_text(model, None, input_ids=text)
        return
    expected = model(input_ids=torch.cat([text.expand(2, -1), rows], 1)).logits[:, 9:]
    with attach_prefix(model, Prefix.from_text(model, None, input_ids=text), prefix_window="peft"):
        torch.testing.assert_close(model(input_ids=rows).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_in_front_of_every_row(family):
    model, tokenizer = (
        tiny_model(family, **({"n_positions": 128} if family == "gpt2" else {})),
        tiny_tokenizer(chat_template=CHAT_TEMPLATE),
    )
    before = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    prefix = Prefix.from_text(model, tokenizer, messages=before)
    together = [
        tokenizer.apply_chat_template([*before, {"role": "user", "content": row}], add_generation_prompt=True)["input_ids"]
        for row in ROWS
    ]
    expected = continued(model, together)
    with attach_prefix(model, prefix, prefix_window="peft"):
        assert torch.equal(continued(model, [ids[prefix.prefix_len :] for ids in together]), expected)


LAST_ANSWER = CHAT_TEMPLATE.replace(
    "message['content']", "('think ' if loop.last and message['role'] == 'assistant' else '') + message['content']"
)
NO_ANSWERS = CHAT_TEMPLATE.replace(
    "{% for message in messages %}",
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ raise_exception('no answers') }}{% endif %}",
)


def test_turns_that_the_template_changes_once_another_follows_are_refused():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(chat_template=LAST_ANSWER)
    before = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    turns = [*before, {"role": "assistant", "content": "yes"}]
    assert "think yes" in tokenizer.apply_chat_template(turns, tokenize=False)
    with pytest.raises(ValueError, match="messages: expected turns .* the chat template shows otherwise once another follows"):
        Prefix.from_text(model, tokenizer, messages=turns)
    whole = tokenizer.apply_chat_template(turns)["input_ids"]
    for shared in (before[:1], before):
        prefix = Prefix.from_text(model, tokenizer, messages=shared)
        assert whole[: prefix.prefix_len] == tokenizer.apply_chat_template(shared)["input_ids"]
    taken = Prefix.from_text(model, tiny_tokenizer(chat_template=NO_ANSWERS), messages=before)
    assert taken.prefix_len == prefix.prefix_len
    with pytest.raises(ValueError, match="messages: expected at least one turn, got none"):
        Prefix.from_text(model, tokenizer, messages=[])


def test_ids_are_joined_where_a_token_would_span_the_boundary():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    text, row = "what", "he said"  # "th" is one token of the joined text
    ids = [tokenizer(part)["input_ids"] for part in (text, row)]
    assert ids[0] + ids[1] != tokenizer(text + row)["input_ids"]
    expected = continued(model, [ids[0] + ids[1]])
    with attach_prefix(model, Prefix.from_text(model, tokenizer, text)):
        assert torch.equal(continued(model, [ids[1]]), expected)


def test_a_pinned_text_does_not_slide_out_of_a_window():
    model = tiny_model("mistral")
    row, text = list(range(5, 17)), [40, 50, 60, 70]
    assert model.config.sliding_window < len(row)
    prefix = Prefix.from_text(model, None, input_ids=text)
    expected = model(input_ids=torch.tensor([text + row])).logits[:, len(text) :]
    with attach_prefix(model, prefix, prefix_window="peft"):
        torch.testing.assert_close(model(input_ids=torch.tensor([row])).logits, expected, atol=2e-5, rtol=1e-4)
    with attach_prefix(model, prefix):
        pinned = model(input_ids=torch.tensor([row])).logits
    assert (pinned - expected)[:, -1].abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", (1, 5, 8))
def test_chunks_change_nothing(family, chunk, monkeypatch):
    model, ids = tiny_model(family), list(range(5, 26))
    expected = Prefix.from_text(model, None, input_ids=ids).layers()
    lengths = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    monkeypatch.setattr(text_cache, "CHUNK", chunk)
    got = Prefix.from_text(model, None, input_ids=ids).layers()
    assert max(lengths) == chunk and sum(lengths) == len(ids)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_longrope_rotates_a_whole_text_alike(monkeypatch):
    """Its chunks would be rotated by two sets of factors: the first ends before the model's original length."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0 + i for i in range(8)], "partial_rotary_factor": 1.0}
    rope = factors | {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    model = tiny_model("phi3", max_position_embeddings=64, original_max_position_embeddings=16, rope_parameters=rope)
    text, row = torch.arange(5, 30)[None], torch.arange(40, 48)[None]
    expected = model(input_ids=torch.cat([text, row], 1)).logits[:, 25:]
    monkeypatch.setattr(text_cache, "CHUNK", 8)
    with attach_prefix(model, Prefix.from_text(model, None, input_ids=text)):
        torch.testing.assert_close(model(input_ids=row).logits, expected, atol=1e-4, rtol=1e-4)


def test_beside_lora_no_logits_are_computed():
    peft = pytest.importorskip("peft")
    model, ids = tiny_model("llama"), list(range(5, 20))
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "k_proj"])
    lora, logits = peft.get_peft_model(model, config), []
    lora.get_output_embeddings().register_forward_hook(lambda *call: logits.append(call))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prefix = Prefix.from_text(lora, None, input_ids=ids)
    assert not logits
    assert_layers(prefix.layers(), cached(model, ids), atol=2e-5, rtol=1e-4)


def test_memory_grows_with_the_tokens_and_not_with_their_square(monkeypatch):
    monkeypatch.setattr(text_cache, "CHUNK", 128)
    model = tiny_model("llama", max_position_embeddings=4096, num_hidden_layers=1, attn_implementation="eager")
    short, long = (allocations(partial(Prefix.from_text, model, None, input_ids=[7] * tokens))[0] for tokens in (1024, 4096))
    scores = 4 * 4096 * 4096 * 4  # heads, float32
    assert long < 4.5 * short and long < scores / 4


def test_several_texts_in_a_bank():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(bos=True)
    texts = {"kind": "Be kind.\n", "short": "Answer in one word, and no more.\n"}
    bank = PrefixBank({name: Prefix.from_text(model, tokenizer, text) for name, text in texts.items()})
    rows = [tokenizer(row, add_special_tokens=False)["input_ids"] for row in ROWS]
    together = [tokenizer(texts[name])["input_ids"] + row for name, row in zip(("short", "kind"), rows, strict=True)]
    ids, mask = padded(rows)
    with attach_prefix(model, bank):
        got = model.generate(input_ids=ids, attention_mask=mask, prefix_ids=["short", "kind"], **OPTIONS)
    assert torch.equal(got[:, ids.shape[1] :], continued(model, together))


@pytest.mark.skipif(
    not (offline_model.cache_folder() / offline_model.OFFLINE_MODEL).is_dir() and offline_model.shipped_gguf() is None,
    reason="needs SmolLM2-135M-Instruct: " + offline_model.INSTALL_COMMAND,
)
def test_a_real_model_goes_on_as_behind_the_text():
    model, tokenizer = load_model_and_tokenizer()
    before = [{"role": "system", "content": "You answer with one short sentence, as a pirate would."}]
    questions = ["What is the capital of France?", "Name a fruit."]
    prefix = Prefix.from_text(model, tokenizer, messages=before)
    together = [
        tokenizer.apply_chat_template([*before, {"role": "user", "content": question}], add_generation_prompt=True)["input_ids"]
        for question in questions
    ]
    expected = continued(model, together)
    with attach_prefix(model, prefix):
        assert torch.equal(continued(model, [ids[prefix.prefix_len :] for ids in together]), expected)
