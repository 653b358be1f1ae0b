"""What an engine of vLLM must be so that its cache can hold a prefix; read off its configuration before it serves anything."""

from __future__ import annotations

import re
from collections.abc import Sequence

from prefix_tuning.shapes import ModelShape

VLLM_VERSION = "0.32"  # the interface of connectors is declared experimental: it changes with every version


def check_version(version: str) -> None:
    """NotImplementedError for a vLLM that this was not tested with: another may read the same cache differently, silently."""
    if not re.match(re.escape(VLLM_VERSION) + r"(\.|$)", version):
        raise NotImplementedError(f"vllm: expected version {VLLM_VERSION}, the one this was tested with, got {version}")


def check_engine(vllm_config, kv_cache_config, shape: ModelShape) -> None:
    """Raises NotImplementedError or ValueError, naming what was expected and what came, for an engine that would not give what
    the model gives with a prefix attached.

    Args:
        vllm_config, kv_cache_config: vLLM's, as a connector is given them.
        shape: of the prefixes.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) != 1:
            raise NotImplementedError(f"{name}: expected 1, got {getattr(parallel, name)}")
    policy = vllm_config.kv_transfer_config.kv_load_failure_policy
    if policy != "fail":
        raise ValueError(f"kv_load_failure_policy: expected fail, got {policy}; a prefix cannot be computed instead")
    groups = kv_cache_config.kv_cache_groups
    specs = [group.kv_cache_spec for group in groups]
    kinds = sorted({_kind(spec) for spec in specs})
    if kinds != ["FullAttentionSpec"] or len(groups) != 1:
        raise NotImplementedError(
            "model: expected a cache with one group, of full attention (no sliding window, chunks, latents or states), got "
            f"{len(groups)} groups of {', '.join(kinds) or 'nothing'}"
        )
    heads, head_dim = model.get_total_num_kv_heads(), model.get_head_size()
    found = ModelShape(len(groups[0].layer_names), heads, head_dim, getattr(specs[0], "head_size_v", None) or head_dim)
    if found != shape:
        raise ValueError(f"model: expected a cache with {shape} as the prefixes, got {found}")


def layer_numbers(layer_names: Sequence[str]) -> dict[str, int]:
    """Of each layer of the cache, by vLLM's name, which layer of a prefix it is: the number in its name.

    NotImplementedError where the numbers are not 0, 1, …: more than the model's own layers, such as a draft model's, or others.
    """
    numbers = {}
    for name in layer_names:
        found = [int(part) for part in name.split(".") if part.isdigit()]
        numbers[name] = found[0] if len(found) == 1 else -1
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise NotImplementedError(f"model: expected attention layers numbered 0, 1, …, got {', '.join(layer_names)}")
    return numbers


def _kind(spec) -> str:
    name = type(spec).__name__
    for limit in ("sliding_window", "attention_chunk_size"):
        if getattr(spec, limit, None) is not None:
            return f"{name} with {limit} {getattr(spec, limit)}"
    return name
