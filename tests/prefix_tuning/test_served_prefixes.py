"""Prefixes for a serving engine without the engine: what is refused, prompts, salts, shards, slots."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prefix_tuning import Prefix
from prefix_tuning.engine_checks import check_engine, check_version, layer_numbers
from prefix_tuning.paged_cache import heads_of_rank, slots
from prefix_tuning.served_prefixes import PART_NAMES, ServedPrefixes, asks_for_prefix, without_placeholders
from support.encoder_decoders import tiny_encoder_decoder
from support.models import random_prefix, tiny_model
from support.prefixes import pairs
from support.vllm_stub import FullAttentionSpec, SlidingWindowSpec, engine_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and prefixes for it and for others."""
    folder = tmp_path_factory.mktemp("served")
    model = tiny_model("llama")
    model.save_pretrained(folder / "model")
    for name, length in {"pubs": 5, "food": 3}.items():
        random_prefix(model, length).save(folder / name)
    Prefix({"decoder": pairs(3, 2, 5, 16, 16)}, position_offset=0).save(folder / "at_zero")
    Prefix({"decoder": pairs(3, 2, 5, 16, 8)}).save(folder / "short_values")
    Prefix({"decoder": pairs(3, 2, 5, 16, 16)}, heads={"score": {"weight": torch.ones(2, 2)}}).save(folder / "with_head")
    Prefix({"decoder": [*pairs(2, 2, 5, 16, 16), *pairs(1, 4, 5, 16, 16)]}).save(folder / "uneven")
    random_prefix(tiny_model("llama", num_hidden_layers=2)).save(folder / "shallow")
    random_prefix(tiny_encoder_decoder("t5")).save(folder / "t5")
    tiny_model("mistral", sliding_window=8).save_pretrained(folder / "window")
    tiny_encoder_decoder("t5").save_pretrained(folder / "t5_model")
    return folder


@pytest.fixture(scope="module")
def served(folder):
    return ServedPrefixes.load({"pubs": folder / "pubs", "food": folder / "food"}, model=folder / "model", placeholder_id=7)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("at_zero", NotImplementedError, "expected position_offset 5, the prefix_len, .*, got 0"),
        ("short_values", NotImplementedError, "expected layers that are all alike, .* value_dim 8"),
        ("with_head", NotImplementedError, "expected no heads, .*, got score"),
        ("uneven", NotImplementedError, "expected layers that are all alike"),
        ("t5", NotImplementedError, "expected that of a causal model, .*, got parts decoder, encoder, cross"),
        ("shallow", ValueError, "expected 3 layers.* as .*model has, got one with 2 layers, 2 kv_heads, head_dim 16"),
        ("nowhere", FileNotFoundError, "nowhere"),
    ],
)
def test_prefixes_that_cannot_be_served(name, error, message, folder):
    with pytest.raises(error, match=message):
        ServedPrefixes.load({"pubs": folder / "pubs", "other": folder / name}, model=folder / "model")


def test_prefixes_differ_without_a_model(folder):
    with pytest.raises(ValueError, match="prefix b: expected 3 layers.* as a has, got one with 2 layers"):
        ServedPrefixes.load({"a": folder / "pubs", "b": folder / "shallow"})


@pytest.mark.parametrize(
    ("model", "message"),
    [("window", "expected full attention, got a window of 8"), ("t5_model", "expected a causal model, got a t5")],
)
def test_models_that_cannot_be_served(model, message, folder):
    with pytest.raises(NotImplementedError, match=message):
        ServedPrefixes.load({"pubs": folder / "pubs"}, model=folder / model)


@pytest.mark.parametrize("name", ["", *sorted(PART_NAMES)])
def test_names_that_would_be_chosen_by_something_else(name, folder):
    with pytest.raises(ValueError, match="expected a name that is not empty"):
        ServedPrefixes.load({name: folder / "pubs"})


def test_bad_arguments(folder):
    with pytest.raises(ValueError, match="folders: expected .*, got none"):
        ServedPrefixes.load({})
    with pytest.raises(ValueError, match="folders: expected the folder of at least one prefix by name, got \\['pubs'\\]"):
        ServedPrefixes.load(["pubs"])
    with pytest.raises(ValueError, match="prefix: expected a string as its name, got 5"):
        ServedPrefixes.load({5: folder / "pubs"})
    with pytest.raises(ValueError, match="placeholder_id: expected at least 0, got -1"):
        ServedPrefixes.load({"pubs": folder / "pubs"}, placeholder_id=-1)


def test_a_placeholder_of_numpy(folder):
    served = ServedPrefixes.load({"pubs": folder / "pubs"}, placeholder_id=np.int64(7))
    assert '"placeholder_id": 7' in json.dumps(served.kv_transfer_config())


def test_config_there_and_back(served, folder, monkeypatch):
    config = json.loads(json.dumps(served.kv_transfer_config()))
    assert ServedPrefixes.from_config(config["kv_connector_extra_config"]) == served
    monkeypatch.chdir(folder)
    relative = ServedPrefixes.load({"pubs": "pubs"})
    assert relative.folders == {"pubs": str(folder / "pubs")}  # a worker may run elsewhere


@pytest.mark.parametrize("salt", [None, "tenant", '"]', "prefix-tuning:"])
@pytest.mark.parametrize("name", ["pubs", "food"])
def test_prompts_are_recognised(name, salt, served):
    prompt = served.prompt(name, [4, 5], salt)
    assert prompt["prompt_token_ids"] == [7] * served.lengths[name] + [4, 5]
    assert served.chosen(**{"token_ids": prompt["prompt_token_ids"], "cache_salt": prompt["cache_salt"]}) == name


def test_token_ids_of_a_tensor_are_ints(served):
    for ids in (torch.tensor([4, 5]), list(torch.tensor([4, 5])), (4, 5)):
        given = served.prompt("pubs", ids)["prompt_token_ids"]
        assert given == [7] * 5 + [4, 5] and set(map(type, given)) == {int}


def test_salts_differ_by_prefix_and_tenant(served):
    salts = {served.prompt(name, [1], salt)["cache_salt"] for name in ("pubs", "food") for salt in (None, "", "a", "b")}
    assert len(salts) == 8 and all(map(asks_for_prefix, salts))
    assert not any(map(asks_for_prefix, (None, "", "pubs", "tenant")))


def test_prompts_that_cannot_be_made(served):
    with pytest.raises(ValueError, match="prefix: expected one of pubs, food, got 'wine'"):
        served.prompt("wine", [1])
    with pytest.raises(ValueError, match="token_ids: expected at least one .*, got none"):
        served.prompt("pubs", [])
    for wrong in ("hello", [[4, 5]], torch.tensor([[4, 5]]), [4.0], torch.tensor([4.0]), ["4"], 4, torch.tensor(4), None):
        with pytest.raises(ValueError, match="token_ids: expected ints .tokens., got"):
            served.prompt("pubs", wrong)


@pytest.mark.parametrize(
    ("tokens", "salt", "message"),
    [
        ([7] * 5 + [1], 'prefix-tuning:["wine", null]', "expected one of pubs, food, got 'wine'"),
        ([7] * 5 + [1], 'prefix-tuning:[["pubs"], null]', "expected one of pubs, food"),
        ([7] * 5 + [1], "prefix-tuning:", "expected what ServedPrefixes.prompt makes"),
        ([7] * 5 + [1], "prefix-tuning:" + 200_000 * "[", r"cache_salt: expected .*, got 'prefix-tuning:\[{70,90}$"),
        ([7] * 5 + [1], "prefix-tuning:3", "expected what ServedPrefixes.prompt makes"),
        ([7] * 4 + [1, 2], 'prefix-tuning:["pubs", null]', "got one that does not begin with the 5 tokens 7"),
        ([7] * 3, 'prefix-tuning:["pubs", null]', "got one that does not begin with the 5 tokens 7"),
        (None, 'prefix-tuning:["pubs", null]', "got one that does not begin with the 5 tokens 7"),
        ([7] * 5, 'prefix-tuning:["pubs", null]', "expected at least one token behind the placeholders"),
    ],
)
def test_prompts_that_ask_wrongly(tokens, salt, message, served):
    with pytest.raises(ValueError, match=message):
        served.chosen(tokens, salt)


def test_prompts_that_ask_for_none(served):
    assert served.chosen([7] * 6, None) is None and served.chosen([7] * 6, "pubs") is None


def test_outputs_lose_their_placeholders():
    tokens, scores = [7, 7, 4, 5], [None, {7: -1.0}, {4: -2.0}, {5: -3.0}]
    output = SimpleNamespace(prompt_token_ids=tokens, prompt_logprobs=scores, num_cached_tokens=3)
    assert without_placeholders(output, 2) is output
    assert vars(output) == {"prompt_token_ids": [4, 5], "prompt_logprobs": [None, {5: -3.0}], "num_cached_tokens": 1}
    assert tokens == [7, 7, 4, 5] and len(scores) == 4  # they are the engine's
    later = SimpleNamespace(prompt_token_ids=None, prompt_logprobs=[], num_cached_tokens=None)
    assert vars(without_placeholders(later, 2)) == {"prompt_token_ids": None, "prompt_logprobs": [], "num_cached_tokens": None}
    assert (
        without_placeholders(
            SimpleNamespace(prompt_token_ids=[], prompt_logprobs=None, num_cached_tokens=1), 2
        ).num_cached_tokens
        == 0
    )


@pytest.mark.parametrize(
    ("kv_heads", "ranks", "expected"),
    [
        (4, 1, [[0, 1, 2, 3]]),
        (4, 2, [[0, 1], [2, 3]]),
        (2, 4, [[0], [0], [1], [1]]),
        (1, 2, [[0], [0]]),
    ],
)
def test_ranks_share_heads_as_vllm_does(kv_heads, ranks, expected):
    tensor = torch.randn(kv_heads, 5, 3)
    for rank, heads in enumerate(expected):
        shard = heads_of_rank(tensor, rank, ranks)
        assert shard.is_contiguous() and torch.equal(shard, tensor[heads].transpose(0, 1))


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="tensor_parallel_size: expected a divisor or a multiple of 3 kv_heads, got 2"):
        heads_of_rank(torch.randn(3, 5, 3), 0, 2)


def test_slots():
    assert slots([6, 2, 9], 4, 3, 9).tolist() == [27, 8, 9, 10, 11, 36]
    assert slots([6], 4, 2, 2).tolist() == []
    with pytest.raises(ValueError, match="stop: expected at most 3 blocks of 4, got 13"):
        slots([6, 2, 9], 4, 3, 13)


@pytest.mark.parametrize("version", ["0.32", "0.32.0", "0.32.1", "0.32.0+cpu"])
def test_tested_versions(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.320.1", "1.0.32"])
def test_other_versions_are_refused(version):
    with pytest.raises(NotImplementedError, match=f"expected version 0.32, .*, got {version}"):
        check_version(version)


LAYERS = {"block_size": 4, "sliding_window": None, "attention_chunk_size": None, "head_size_v": 16}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pipeline_parallel_size": 2}, NotImplementedError, "pipeline_parallel_size: expected 1, got 2"),
        ({"decode_context_parallel_size": 2}, NotImplementedError, "decode_context_parallel_size: expected 1, got 2"),
        (
            {"spec": SlidingWindowSpec(block_size=4)},
            NotImplementedError,
            "expected a cache with one group, of full .*, got 1 groups of SlidingWindowSpec",
        ),
        ({"spec": FullAttentionSpec(**LAYERS | {"sliding_window": 8})}, NotImplementedError, "with sliding_window 8"),
        ({"spec": FullAttentionSpec(**LAYERS | {"attention_chunk_size": 8})}, NotImplementedError, "attention_chunk_size 8"),
        (
            {"spec": FullAttentionSpec(**LAYERS | {"head_size_v": 8})},
            ValueError,
            "expected a cache with 3 layers.*, got .* value_dim 8",
        ),
        ({"groups": 2}, NotImplementedError, "2 groups"),
        ({"groups": 0}, NotImplementedError, "0 groups of nothing"),
        ({"layers": 4}, ValueError, "expected a cache with 3 layers, 2 kv_heads.*, got 4 layers"),
        ({"kv_heads": 4}, ValueError, "as the prefixes, got .* 4 kv_heads"),
        ({"head_dim": 32}, ValueError, "as the prefixes, got .* head_dim 32"),
    ],
)
def test_engines_that_cannot_serve(options, error, message, served):
    with pytest.raises(error, match=message):
        check_engine(*engine_config(served, **options), served.shape)


def test_an_engine_that_can_serve(served):
    check_engine(*engine_config(served, tensor_parallel_size=2), served.shape)


def test_prefixes_cannot_be_computed_instead(served):
    vllm_config, kv_cache_config = engine_config(served)
    vllm_config.kv_transfer_config.kv_load_failure_policy = "recompute"
    with pytest.raises(ValueError, match="kv_load_failure_policy: expected fail, got recompute"):
        check_engine(vllm_config, kv_cache_config, served.shape)


def test_layer_numbers():
    assert layer_numbers(["model.layers.1.attn", "model.layers.0.attn"]) == {"model.layers.1.attn": 1, "model.layers.0.attn": 0}
    for names in (["h.0.attn", "h.2.attn"], ["h.0.attn", "draft.attn"], ["h.0.attn", "draft.h.0.attn"], ["a.0.b.1.attn"]):
        with pytest.raises(NotImplementedError, match="expected attention layers numbered 0, 1"):
            layer_numbers(names)
