"""The connector over a stub of vLLM: what the scheduler is told, what is written where. test_vllm.py has the real one."""

from types import SimpleNamespace

import pytest
import torch

from prefix_tuning import Prefix
from prefix_tuning.served_prefixes import ServedPrefixes
from support.models import random_prefix, tiny_model
from support.vllm_stub import Layer, engine_config, import_with_stub

PREFIX_LEN, BLOCK = 6, 4
MODULE = "prefix_tuning.vllm_connector"


@pytest.fixture
def prefix():
    return random_prefix(tiny_model("llama"), PREFIX_LEN)


@pytest.fixture
def prefixes(prefix, tmp_path):
    prefix.save(tmp_path / "pubs")
    return ServedPrefixes.load({"pubs": tmp_path / "pubs"}, placeholder_id=7)


def connector_of(monkeypatch, prefixes, *, layers=None, ranks=(0, 1), **options):
    module = import_with_stub(monkeypatch, MODULE, ranks=ranks)
    vllm_config, kv_cache_config = engine_config(prefixes, block_size=BLOCK, **options)
    connector = module.PrefixConnector(vllm_config, None, kv_cache_config)
    if layers is not None:
        names = kv_cache_config.kv_cache_groups[0].layer_names
        vllm_config.compilation_config.static_forward_context.update(zip(names, layers, strict=True))
        connector.register_kv_caches({name: layer.kv_cache for name, layer in zip(names, layers, strict=True)})
    return connector


@pytest.fixture
def connector(monkeypatch, prefixes):
    return connector_of(monkeypatch, prefixes)


@pytest.fixture
def scoring(monkeypatch, prefixes, tmp_path):
    """A connector that serves prompt_logprobs too."""
    allowed = ServedPrefixes.load(prefixes.folders, placeholder_id=7, prompt_logprobs=True)
    connector = connector_of(monkeypatch, allowed, layers=[Layer(40) for _ in range(3)])
    connector.bind_kv_cache_manager(SimpleNamespace(get_block_ids=lambda request_id: ([5, 3, 8],)))
    return connector


def request(prompt, request_id="r", **changes):
    fields = {
        "request_id": request_id, "prompt_token_ids": prompt["prompt_token_ids"], "cache_salt": prompt.get("cache_salt"),
        "mm_features": [], "resumable": False, "skip_reading_prefix_cache": False,
        "sampling_params": SimpleNamespace(prompt_logprobs=None),
    }  # fmt: skip
    return SimpleNamespace(**fields | changes)


def scored(prompt):
    return request(prompt, skip_reading_prefix_cache=True, sampling_params=SimpleNamespace(prompt_logprobs=0))


def blocks(*ids):
    return SimpleNamespace(get_block_ids=lambda: (list(ids),))


def scheduled(new=(), cached=()):
    """A scheduler's step: (id, tokens computed before, tokens of this step) of new and of earlier requests."""
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=name, num_computed_tokens=start) for name, start, _ in new],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, *_ in cached], num_computed_tokens=[start for _, start, _ in cached]
        ),
        num_scheduled_tokens={name: tokens for name, _, tokens in (*new, *cached)},
    )


@pytest.mark.parametrize(("computed", "left"), [(0, 6), (4, 2), (8, 0)])
def test_the_rest_of_the_prefix_is_loaded(computed, left, connector, prefixes):
    asked = request(prefixes.prompt("pubs", [1, 2, 3]))
    connector.on_new_request(asked)
    assert connector.get_num_new_matched_tokens(asked, computed) == (left, False)
    connector.update_state_after_alloc(asked, blocks(5, 3, 8), left)
    step = connector.build_connector_meta(scheduled(new=[("r", computed + left, 3)]))
    loads = [vars(load) for load in step.loads]
    expected = {"name": "pubs", "start": computed, "stop": PREFIX_LEN, "block_ids": [5, 3, 8]}
    assert loads == ([expected] if left else []) and not step.overwrites and not step.refused
    assert not connector.build_connector_meta(scheduled(cached=[("r", 9, 1)])).loads


def test_a_preempted_request_is_loaded_again(connector, prefixes):
    asked = request(prefixes.prompt("pubs", [1]))
    connector.on_new_request(asked)
    for ids in ((5, 3), (1, 2)):
        assert connector.get_num_new_matched_tokens(asked, 0) == (PREFIX_LEN, False)
        connector.update_state_after_alloc(asked, blocks(*ids), PREFIX_LEN)
        assert [load.block_ids for load in connector.build_connector_meta(scheduled()).loads] == [list(ids)]


def test_requests_without_a_prefix_are_left_alone(connector):
    for salt in (None, "tenant"):
        plain = request({"prompt_token_ids": [7] * 9, "cache_salt": salt})
        connector.on_new_request(plain)
        assert connector.get_num_new_matched_tokens(plain, 0) == (0, False)
        connector.update_state_after_alloc(plain, blocks(1), 0)
    assert not vars(connector.build_connector_meta(scheduled()))["loads"]


REFUSED = {
    "no placeholders": lambda asked: asked.prompt_token_ids.__delitem__(slice(0, 6)),
    "unknown": lambda asked: setattr(asked, "cache_salt", 'prefix-tuning:["wine", null]'),
    "images": lambda asked: asked.mm_features.append("image"),
    "streamed prompt": lambda asked: setattr(asked, "resumable", True),
    "pooling": lambda asked: setattr(asked, "sampling_params", None),
    "prompt_logprobs": lambda asked: setattr(asked, "skip_reading_prefix_cache", True),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_requests_fail_before_they_run(reason, connector, prefixes):
    asked = request(prefixes.prompt("pubs", [1, 2]))
    REFUSED[reason](asked)
    connector.on_new_request(asked)
    assert not asked.skip_reading_prefix_cache  # vLLM asks about it
    assert connector.get_num_new_matched_tokens(asked, 0) == (1, True)  # loaded beside the steps, so none computes it
    connector.update_state_after_alloc(asked, blocks(5), 1)
    step = connector.build_connector_meta(scheduled())
    connector.bind_connector_metadata(step)
    results = connector.get_transfer_results(set())
    assert results.failed_recving == results.finished_recving == {"r"} and not step.loads
    connector.request_finished(asked, [5])
    assert not connector.build_connector_meta(scheduled()).refused


def test_ends_of_requests_are_forgotten(scoring, prefixes):
    for asked in (request(prefixes.prompt("pubs", [1])), scored(prefixes.prompt("pubs", [1]))):
        scoring.on_new_request(asked)
        assert scoring.request_finished(asked, [5]) == (False, None)
        assert scoring.get_num_new_matched_tokens(asked, 0) == (0, False)
        assert not scoring.build_connector_meta(scheduled(new=[("r", 0, 9)])).overwrites


def filled(prefix, layers, start=0, stop=PREFIX_LEN, where=(20, 21, 22, 23, 12, 13)):
    """Whether the slots hold the prefix's positions start … stop − 1 and nothing else is written."""
    for (key, value), layer in zip(prefix.layers(), layers, strict=True):
        expected = torch.full_like(layer.kv_cache, torch.nan)
        for cache, tensor in zip(expected, (key, value), strict=True):
            cache[list(where)[start:stop]] = tensor.detach().transpose(0, 1)[start:stop]
        torch.testing.assert_close(layer.kv_cache, expected, equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize("computed", [0, 4])
def test_loads_are_written_before_the_forward_pass(computed, monkeypatch, prefixes, prefix):
    layers = [Layer(40) for _ in range(3)]
    connector = connector_of(monkeypatch, prefixes, layers=layers)
    asked = request(prefixes.prompt("pubs", [1]))
    connector.on_new_request(asked)
    connector.update_state_after_alloc(asked, blocks(5, 3), PREFIX_LEN - computed)
    connector.bind_connector_metadata(connector.build_connector_meta(scheduled(new=[("r", PREFIX_LEN, 1)])))
    connector.start_load_kv(None, request_ids=["r"])
    filled(prefix, layers, start=computed)


def test_each_rank_writes_its_heads(monkeypatch, prefixes, prefix):
    layers = [Layer(40, kv_heads=1) for _ in range(3)]
    connector = connector_of(monkeypatch, prefixes, layers=layers, ranks=(1, 2))
    asked = request(prefixes.prompt("pubs", [1]))
    connector.on_new_request(asked)
    connector.update_state_after_alloc(asked, blocks(5, 3), PREFIX_LEN)
    connector.bind_connector_metadata(connector.build_connector_meta(scheduled()))
    connector.start_load_kv(None)
    second = [tuple(tensor[1:] for tensor in pair) for pair in prefix.layers()]
    filled(SimpleNamespace(layers=lambda: second), layers)


def test_scored_prompts_are_overwritten_layer_by_layer(scoring, prefixes, prefix):
    """vLLM computes all of their tokens: in chunks, the placeholders' among them, over which the prefix is written."""
    asked, layers = scored(prefixes.prompt("pubs", [1, 2])), list(scoring._attention.values())
    scoring.on_new_request(asked)
    assert scoring.get_num_new_matched_tokens(asked, 0) == (0, False)
    scoring.update_state_after_alloc(asked, blocks(5), 0)
    for step, spans in (
        (scheduled(new=[("r", 0, 3)]), [(0, 3)]),
        (scheduled(cached=[("r", 3, 4)]), [(3, 6)]),
        (scheduled(cached=[("r", 7, 1)]), []),
        (scheduled(cached=[("r", 0, 8)]), [(0, 6)]),  # preempted
        (scheduled(), []),
    ):
        for layer in layers:
            layer.kv_cache.fill_(torch.nan)
        step = scoring.build_connector_meta(step)
        assert [(load.start, load.stop) for load in step.overwrites] == spans and not step.loads
        scoring.bind_connector_metadata(step)
        scoring.start_load_kv(None)
        assert all(layer.kv_cache.isnan().all() for layer in layers)
        for name in scoring._attention:
            scoring.wait_for_layer_load(name)
        filled(prefix, layers, *(spans[0] if spans else (0, 0)))


def test_scored_without_reading_everything_is_refused(scoring, prefixes):
    asked = scored(prefixes.prompt("pubs", [1, 2]))
    asked.skip_reading_prefix_cache = False
    scoring.on_new_request(asked)
    assert scoring.get_num_new_matched_tokens(asked, 0) == (1, True)


def test_graphs_of_whole_steps_only_where_no_layer_is_waited_for(connector, scoring):
    for made, needed in ((connector, False), (scoring, True)):
        config = made.prefixes.kv_transfer_config()["kv_connector_extra_config"]
        assert made.requires_piecewise_for_cudagraph(config) is needed


def test_backends_that_write_by_themselves_are_refused(monkeypatch, prefixes):
    layers = [Layer(40) for _ in range(3)]
    layers[1].attn_backend.forward_includes_kv_cache_update = True
    with pytest.raises(
        NotImplementedError, match="attention backend: STUB writes its cache by itself, in layer model.layers.1"
    ):
        connector_of(monkeypatch, prefixes, layers=layers)


def test_a_prefix_that_has_changed_is_refused(monkeypatch, prefixes):
    random_prefix(tiny_model("llama"), PREFIX_LEN + 1).save(prefixes.folders["pubs"])
    with pytest.raises(ValueError, match="prefix pubs: .* has changed since"):
        connector_of(monkeypatch, prefixes, layers=[Layer(40) for _ in range(3)])


def test_a_prefix_that_has_become_unservable_is_refused(monkeypatch, prefixes, prefix):
    Prefix({"decoder": prefix.layers()}, position_offset=0).save(prefixes.folders["pubs"])
    with pytest.raises(NotImplementedError, match="prefix pubs: .* expected position_offset .*, got 0"):
        connector_of(monkeypatch, prefixes, layers=[Layer(40) for _ in range(3)])


def test_other_versions_of_vllm_are_refused(monkeypatch, prefixes):
    module = import_with_stub(monkeypatch, MODULE, version="0.33.0")
    vllm_config, kv_cache_config = engine_config(prefixes)
    with pytest.raises(NotImplementedError, match="vllm: expected version 0.32.*, got 0.33.0"):
        module.PrefixConnector(vllm_config, None, kv_cache_config)


def test_engines_are_checked(monkeypatch, prefixes):
    vllm_config, kv_cache_config = engine_config(prefixes, layers=4)
    with pytest.raises(ValueError, match="expected a cache with .*, got 4 layers"):
        import_with_stub(monkeypatch, MODULE).PrefixConnector(vllm_config, None, kv_cache_config)
