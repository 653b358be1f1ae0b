"""What attach_prefix must know of a model family: one row each. A family without a row is refused, never guessed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from prefix_tuning.multimodal_families import unwrapped_config
from prefix_tuning.positions import llama4_query_scale
from prefix_tuning.shapes import (
    ModelShape,
    falcon_shape,
    full_attention_shape,
    gemma3n_shape,
    gemma4_shape,
    kimi_linear_shape,
    mimo_shape,
    mla_shape,
    standard_shape,
)


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        attention: class name of its self-attention modules. They call transformers' attention interface, or
            patched_attention.py says what replaces the method in which they do without.
        shape: from its config the ModelShape of its prefix: what its attention modules' keys and values are.
        learned_positions: position embeddings are a table of max_position_embeddings rows, so prefix and text must fit in it.
        alibi: positions are a bias that falls with distance (Falcon: where its config says so).
        query_scale: (module, indices of the queries, position_offset) → a factor of the queries that the model lacks, or None.
        while_attached: attributes of the module with the layers that are set meanwhile.
        rotary_switch: its tokens have other rotary factors from position original_max_position_embeddings on, where they are
            longrope's, and generate then drops its cache.
        hands_on: further arguments of a call arrive at its attention modules, as a bank's prefix_ids must.
    """

    attention: str
    shape: Callable[..., ModelShape] = standard_shape
    learned_positions: bool = False
    alibi: bool = False
    query_scale: Callable[..., Tensor | None] | None = None
    while_attached: Mapping[str, Any] = field(default_factory=dict)
    rotary_switch: bool = False
    hands_on: bool = True


# by config.model_type
FAMILIES = {
    "afmoe": Family("AfmoeAttention"),
    "apertus": Family("ApertusAttention"),
    "arcee": Family("ArceeAttention"),
    "bamba": Family("BambaAttention", full_attention_shape),
    "biogpt": Family("BioGptAttention", learned_positions=True),
    "bitnet": Family("BitNetAttention"),
    "bloom": Family("BloomAttention", alibi=True),
    "codegen": Family("CodeGenAttention", learned_positions=True),
    "cohere": Family("CohereAttention"),
    "cohere2": Family("Cohere2Attention"),
    "cohere2_moe": Family("Cohere2MoeAttention"),
    "cwm": Family("CwmAttention"),
    "deepseek_v2": Family("DeepseekV2Attention", mla_shape),
    "deepseek_v3": Family("DeepseekV3Attention", mla_shape),
    "dots1": Family("Dots1Attention"),
    "ernie4_5": Family("Ernie4_5Attention"),
    "ernie4_5_moe": Family("Ernie4_5_MoeAttention"),
    "exaone": Family("LlamaAttention"),
    "exaone4": Family("Exaone4Attention"),
    "exaone_moe": Family("ExaoneMoeAttention"),
    "falcon": Family("FalconAttention", falcon_shape, while_attached={"use_alibi": False}),
    "falcon_h1": Family("FalconH1Attention"),
    "flex_olmo": Family("FlexOlmoAttention"),
    "gemma": Family("GemmaAttention"),
    "gemma2": Family("Gemma2Attention"),
    "gemma3_text": Family("Gemma3Attention"),
    "gemma3n_text": Family("Gemma3nTextAttention", gemma3n_shape),
    "gemma4_text": Family("Gemma4TextAttention", gemma4_shape),
    "gemma4_unified_text": Family("Gemma4UnifiedTextAttention", gemma4_shape),
    "glm": Family("GlmAttention"),
    "glm4": Family("Glm4Attention"),
    "glm4_moe": Family("Glm4MoeAttention"),
    "glm4_moe_lite": Family("Glm4MoeLiteAttention", mla_shape),
    "glm4v_text": Family("Glm4vTextAttention"),
    "gpt2": Family("GPT2Attention", learned_positions=True),
    "gpt_bigcode": Family("GPTBigCodeAttention", learned_positions=True),
    "gpt_neo": Family("GPTNeoSelfAttention", learned_positions=True),
    "gpt_neox": Family("GPTNeoXAttention"),
    "gpt_oss": Family("GptOssAttention"),
    "gptj": Family("GPTJAttention", learned_positions=True),
    "granite": Family("GraniteAttention"),
    "granitemoe": Family("GraniteMoeAttention"),
    "granitemoehybrid": Family("GraniteMoeHybridAttention", full_attention_shape),
    "granitemoeshared": Family("GraniteMoeSharedAttention"),
    "helium": Family("HeliumAttention"),
    "hunyuan_v1_dense": Family("HunYuanDenseV1Attention"),
    "hunyuan_v1_moe": Family("HunYuanMoEV1Attention"),
    "hyperclovax": Family("HyperCLOVAXAttention"),
    "internlm3": Family("LlamaAttention"),
    "iquestcoder": Family("LlamaAttention"),
    "jais2": Family("Jais2Attention"),
    "jamba": Family("JambaAttention", full_attention_shape),
    "kimi_linear": Family("KimiLinearAttention", kimi_linear_shape),
    "lfm2": Family("Lfm2Attention", full_attention_shape),
    "lfm2_moe": Family("Lfm2MoeAttention", full_attention_shape),
    "llama": Family("LlamaAttention"),
    "llama4_text": Family("Llama4TextAttention", query_scale=llama4_query_scale),
    "longcat_flash": Family("LongcatFlashMLA", mla_shape),
    "mimo_v2_flash": Family("MiMoV2FlashAttention", mimo_shape),
    "minicpm3": Family("MiniCPM3Attention", mla_shape),
    "minimax_m2": Family("MiniMaxM2Attention"),
    "ministral": Family("MinistralAttention"),
    "ministral3": Family("Ministral3Attention"),
    "mistral": Family("MistralAttention"),
    "mixtral": Family("MixtralAttention"),
    "modernbert-decoder": Family("ModernBertDecoderAttention"),
    "mpt": Family("MptAttention", alibi=True),
    "nanochat": Family("NanoChatAttention"),
    "nemotron": Family("NemotronAttention", hands_on=False),
    "nemotron_h": Family("NemotronHAttention", full_attention_shape),
    "olmo": Family("OlmoAttention"),
    "olmo2": Family("Olmo2Attention"),
    "olmo3": Family("Olmo3Attention"),
    "olmo_hybrid": Family("OlmoHybridAttention", full_attention_shape),
    "olmoe": Family("OlmoeAttention"),
    "opt": Family("OPTAttention", learned_positions=True),
    "persimmon": Family("PersimmonAttention"),
    "phi": Family("PhiAttention"),
    "phi3": Family("Phi3Attention", rotary_switch=True),
    "phimoe": Family("PhimoeAttention", rotary_switch=True),
    "qwen2": Family("Qwen2Attention"),
    "qwen2_5_vl_text": Family("Qwen2_5_VLAttention"),
    "qwen2_moe": Family("Qwen2MoeAttention"),
    "qwen2_vl_text": Family("Qwen2VLAttention"),
    "qwen3": Family("Qwen3Attention"),
    "qwen3_5_moe_text": Family("Qwen3_5MoeAttention", full_attention_shape),
    "qwen3_5_text": Family("Qwen3_5Attention", full_attention_shape),
    "qwen3_moe": Family("Qwen3MoeAttention"),
    "qwen3_next": Family("Qwen3NextAttention", full_attention_shape),
    "qwen3_vl_moe_text": Family("Qwen3VLMoeTextAttention"),
    "qwen3_vl_text": Family("Qwen3VLTextAttention"),
    "sarvam_mla": Family("DeepseekV3Attention", mla_shape),
    "sarvam_moe": Family("Glm4MoeAttention"),
    "seed_oss": Family("SeedOssAttention"),
    "smollm3": Family("SmolLM3Attention"),
    "solar_open": Family("SolarOpenAttention"),
    "stablelm": Family("StableLmAttention", hands_on=False),
    "starcoder2": Family("Starcoder2Attention"),
    "vaultgemma": Family("VaultGemmaAttention"),
    "xglm": Family("XGLMAttention", learned_positions=True),
    "youtu": Family("YoutuAttention", mla_shape),
}

_NO_ATTENTION = "it has no attention, which alone could see one"
_INDEXED = "what a token attends to is chosen among the keys of an index, in which a prefix has none"
_TWICE_USED = "its layers share attention modules, which would need a prefix for each layer"

# by config.model_type, why not
REFUSED = {
    "deepseek_v32": _INDEXED,
    "diffllama": "each of its attention modules attends twice, with one half of the values each",
    "falcon_mamba": _NO_ATTENTION,
    "glm_moe_dsa": _INDEXED,
    "mamba": _NO_ATTENTION,
    "mamba2": _NO_ATTENTION,
    "minimax": "it runs over no other cache than its own",
    "recurrent_gemma": "its layers keep the state of the last call in themselves",
    "rwkv": _NO_ATTENTION,
    "xlstm": _NO_ATTENTION,
    "zamba": _TWICE_USED,
    "zamba2": _TWICE_USED,
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
    model_type = getattr(unwrapped_config(getattr(model, "config", None)), "model_type", None)
    if model_type not in FAMILIES:
        raise NotImplementedError(
            f"model: expected one of type {', '.join(FAMILIES)}, got {model_type!r} ({type(model).__name__})"
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
            f"model: expected {expected} layers with a {family_of(model).attention}, got layers {layers} in "
            f"{type(model).__name__}"
        )
    if getattr(unwrapped_config(model.config), "add_cross_attention", False):
        raise NotImplementedError(
            f"model: expected one without cross-attention, got {type(model).__name__} with add_cross_attention"
        )
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
