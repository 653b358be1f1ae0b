"""What of vLLM our modules import, small enough to run their logic where vLLM is not installed. test_vllm.py compares it with
the real one."""

import importlib
import sys
import types
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

CONNECTOR_BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"


class KVConnectorBase_V1:
    def __init__(self, vllm_config, role, kv_cache_config):
        self._vllm_config, self._metadata = vllm_config, None

    def bind_kv_cache_manager(self, kv_cache_manager):
        pass

    def bind_connector_metadata(self, connector_metadata):
        self._metadata = connector_metadata

    def _get_connector_metadata(self):
        return self._metadata


@dataclass
class KVConnectorTransferResults:
    finished_sending: set = field(default_factory=set)
    finished_recving: set = field(default_factory=set)
    failed_recving: set = field(default_factory=set)


class AsyncLLM:
    """Yields `outputs` and keeps what it was called with."""

    outputs = ()

    def __init__(self, vllm_config):
        self.model_config, self.calls, self.closed = vllm_config.model_config, [], 0

    async def add_lora(self, lora_request):
        raise ValueError("LoRA is not enabled")

    async def generate(self, prompt, sampling_params, request_id, *, lora_request=None, **kwargs):
        self.calls.append((prompt, lora_request))
        try:
            for output in self.outputs:
                yield output
        finally:
            self.closed += 1


class VLLMValidationError(ValueError):
    pass


def modules(version: str, ranks: tuple[int, int]) -> dict[str, types.ModuleType]:
    contents = {
        CONNECTOR_BASE: {
            "KVConnectorBase_V1": KVConnectorBase_V1, "KVConnectorMetadata": object, "KVConnectorRole": None,
            "KVConnectorTransferResults": KVConnectorTransferResults,
        },
        "vllm.distributed.parallel_state": {
            "get_tensor_model_parallel_rank": lambda: ranks[0], "get_tensor_model_parallel_world_size": lambda: ranks[1],
        },
        "vllm.logger": {"init_logger": lambda name: SimpleNamespace(error=lambda *args: None)},
        "vllm.config": {"KVTransferConfig": SimpleNamespace},
        "vllm.engine.arg_utils": {"AsyncEngineArgs": None},
        "vllm.entrypoints.launchers.api_server.entry": {"build_and_serve": None},
        "vllm.entrypoints.launchers.cli_args": {"make_arg_parser": None, "validate_parsed_serve_args": None},
        "vllm.entrypoints.launchers.launcher": {"setup_server": None},
        "vllm.entrypoints.openai.models.protocol": {"LoRAModulePath": SimpleNamespace},
        "vllm.entrypoints.serve.utils.api_utils": {"cli_env_setup": lambda: None},
        "vllm.exceptions": {"VLLMValidationError": VLLMValidationError},
        "vllm.usage.usage_lib": {"UsageContext": None},
        "vllm.utils.argparse_utils": {"FlexibleArgumentParser": None},
        "vllm.v1.engine.async_llm": {"AsyncLLM": AsyncLLM},
        "uvloop": {"run": None},
    }  # fmt: skip
    made = {"vllm": types.ModuleType("vllm")}
    made["vllm"].__version__ = version
    for name, content in contents.items():
        for end in range(1, name.count(".") + 1):
            parent = ".".join(name.split(".")[:end])
            made.setdefault(parent, types.ModuleType(parent))
        made.setdefault(name, types.ModuleType(name)).__dict__.update(content)
    return made


def import_with_stub(monkeypatch, name: str, *, version: str = "0.32.0", ranks: tuple[int, int] = (0, 1)):
    """A module of prefix_tuning over this vLLM; the test's end takes both away. ranks: this process's and how many."""
    for loaded in [loaded for loaded in sys.modules if loaded == "vllm" or loaded.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, loaded)
    for stub_name, module in modules(version, ranks).items():
        monkeypatch.setitem(sys.modules, stub_name, module)
    monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        return importlib.import_module(name)
    finally:
        sys.modules.pop(name, None)


class FullAttentionSpec(SimpleNamespace):
    """vLLM's of that name: block_size, sliding_window, attention_chunk_size, head_size_v."""


class SlidingWindowSpec(SimpleNamespace):
    pass


def engine_config(prefixes, *, block_size=4, spec=None, groups=1, layers=3, kv_heads=2, head_dim=16, **parallel):
    """(vllm_config, kv_cache_config) of an engine for a model with these layers."""
    spec = spec or FullAttentionSpec(
        block_size=block_size, sliding_window=None, attention_chunk_size=None, head_size_v=head_dim
    )
    names = [f"model.layers.{index}.self_attn.attn" for index in range(layers)]
    model = SimpleNamespace(
        get_total_num_kv_heads=lambda: kv_heads, get_head_size=lambda: head_dim, dtype=torch.float32, max_model_len=64
    )
    vllm_config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(**prefixes.kv_transfer_config(), kv_load_failure_policy="fail"),
        parallel_config=SimpleNamespace(**parallel),
        model_config=model,
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    group = SimpleNamespace(layer_names=names, kv_cache_spec=spec)
    return vllm_config, SimpleNamespace(kv_cache_groups=[group] * groups)


class Layer:
    """An attention layer with a cache of its own, keys and values [2, slots, kv_heads, head_dim]."""

    def __init__(self, slots, kv_heads=2, head_dim=16):
        self.kv_cache = torch.full((2, slots, kv_heads, head_dim), torch.nan)
        self.attn_backend = SimpleNamespace(forward_includes_kv_cache_update=False, get_name=lambda: "STUB")
        self.impl = self

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        assert key.is_contiguous() and value.is_contiguous()
        kv_cache[0, slot_mapping], kv_cache[1, slot_mapping] = key, value
