"""What attach_prefix must know of a model family: one row each. A family without a row is refused, never guessed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from prefix_tuning.multimodal_families import text_part
from prefix_tuning.positions import llama4_query_scale
from prefix_tuning.shapes import (
    ModelShape,
    falcon_shape,
    full_attention_shape,
    gemma4_shape,
    mla_shape,
    standard_shape,
)


@dataclass(frozen=True)
class Family:
    """One model family.

    attention: class name of its self-attention modules. They call transformers' attention interface, or patched_attention.py
        says what replaces the method in which they do without.
    shape: from its config the ModelShape of its prefix: what its attention modules' keys and values are.
    learned_positions: position embeddings are a table of max_position_embeddings rows, so prefix and text must fit in it.
    alibi: positions are a bias that falls with distance (Falcon: where its config says so).
    query_scale: (module, indices of the queries, position_offset) → a factor of the queries that the model lacks, or None.
    while_attached: attributes of the module with the layers that are set meanwhile.
    hands_on: further arguments of a call arrive at its attention modules, as a bank's prefix_ids must.
    """

    attention: str
    shape: Callable[..., ModelShape] = standard_shape
    learned_positions: bool = False
    alibi: bool = False
    query_scale: Callable[..., Tensor | None] | None = None
    while_attached: Mapping[str, Any] = field(default_factory=dict)
    hands_on: bool = True


# by config.model_type
FAMILIES = {
    "bloom": Family("BloomAttention", alibi=True),
    "cohere2": Family("Cohere2Attention"),
    "deepseek_v2": Family("DeepseekV2Attention", mla_shape),
    "deepseek_v3": Family("DeepseekV3Attention", mla_shape),
    "falcon": Family("FalconAttention", falcon_shape, while_attached={"use_alibi": False}),
    "gemma": Family("GemmaAttention"),
    "gemma2": Family("Gemma2Attention"),
    "gemma3_text": Family("Gemma3Attention"),
    "gemma4_text": Family("Gemma4TextAttention", gemma4_shape),
    "glm4": Family("Glm4Attention"),
    "gpt2": Family("GPT2Attention", learned_positions=True),
    "gpt_bigcode": Family("GPTBigCodeAttention", learned_positions=True),
    "gpt_neo": Family("GPTNeoSelfAttention", learned_positions=True),
    "gpt_neox": Family("GPTNeoXAttention"),
    "gpt_oss": Family("GptOssAttention"),
    "gptj": Family("GPTJAttention", learned_positions=True),
    "granite": Family("GraniteAttention"),
    "llama": Family("LlamaAttention"),
    "llama4_text": Family("Llama4TextAttention", query_scale=llama4_query_scale),
    "ministral3": Family("Ministral3Attention"),
    "mistral": Family("MistralAttention"),
    "mixtral": Family("MixtralAttention"),
    "mpt": Family("MptAttention", alibi=True),
    "olmo2": Family("Olmo2Attention"),
    "opt": Family("OPTAttention", learned_positions=True),
    "phi": Family("PhiAttention"),
    "phi3": Family("Phi3Attention"),
    "qwen2": Family("Qwen2Attention"),
    "qwen2_5_vl_text": Family("Qwen2_5_VLAttention"),
    "qwen2_moe": Family("Qwen2MoeAttention"),
    "qwen2_vl_text": Family("Qwen2VLAttention"),
    "qwen3": Family("Qwen3Attention"),
    "qwen3_moe": Family("Qwen3MoeAttention"),
    "qwen3_next": Family("Qwen3NextAttention", full_attention_shape),
    "qwen3_vl_text": Family("Qwen3VLTextAttention"),
    "smollm3": Family("SmolLM3Attention"),
    "stablelm": Family("StableLmAttention", hands_on=False),
}


def model_shape(config) -> ModelShape:
    """The shape of a prefix for a model with this config (a composite one: of its text part).

    Raises ValueError for a config without the number of layers, heads or the hidden size.
    """
    config = config.get_text_config()
    family = FAMILIES.get(config.model_type)
    return (family.shape if family else standard_shape)(config)


def family_of(model: nn.Module) -> Family:
    """The model's family, of a wrapper that of its text model; NotImplementedError for one that has no row here."""
    model_type = getattr(text_part(getattr(model, "config", None)), "model_type", None)
    if model_type not in FAMILIES:
        raise NotImplementedError(
            f"model: a prefix can be attached to {', '.join(FAMILIES)}; got model type {model_type!r} ({type(model).__name__})"
        )
    return FAMILIES[model_type]


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules that a prefix has layers for, in their order; see shared_attention for the rest.

    NotImplementedError if the model is not as its row says.
    """
    modules = [module for module in _all_attention(model) if not _uses_others(module)]
    layers = [module.layer_id if hasattr(module, "layer_id") else module.layer_idx for module in modules]
    expected = model_shape(model.config).layers
    if len(layers) != expected or layers != sorted(set(layers)):
        raise NotImplementedError(
            f"model: expected {expected} layers with a {family_of(model).attention}, found layers {layers} in "
            f"{type(model).__name__}"
        )
    if getattr(text_part(model.config), "add_cross_attention", False):
        raise NotImplementedError(f"model: cross-attention is not served; got {type(model).__name__} with add_cross_attention")
    return modules


def shared_attention(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Self-attention modules without keys and values of their own (Gemma 4), and whose they use: the last of their kind."""
    last = {module.layer_type: module for module in attention_modules(model) if hasattr(module, "layer_type")}
    return {module: last[module.layer_type] for module in _all_attention(model) if _uses_others(module)}


def _all_attention(model: nn.Module) -> list[nn.Module]:
    name = family_of(model).attention
    return [m for m in model.modules() if type(m).__name__ == name and not getattr(m, "is_cross_attention", False)]


def _uses_others(module: nn.Module) -> bool:
    return getattr(module, "is_kv_shared_layer", False)
