"""What attach_prefix must know of a model family: one row each. A family without a row is refused, never guessed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from prefix_tuning.shapes import ModelShape, standard_shape


@dataclass(frozen=True)
class Family:
    """One model family.

    attention: class name of its self-attention modules, which call transformers' attention interface.
    shape: from its config the ModelShape of its prefix: what its attention modules' keys and values are.
    learned_positions: position embeddings are a table of max_position_embeddings rows, so prefix and text must fit in it.
    """

    attention: str
    shape: Callable[..., ModelShape] = standard_shape
    learned_positions: bool = False


# by config.model_type
FAMILIES = {
    "cohere2": Family("Cohere2Attention"),
    "gemma": Family("GemmaAttention"),
    "gemma2": Family("Gemma2Attention"),
    "gemma3_text": Family("Gemma3Attention"),
    "glm4": Family("Glm4Attention"),
    "gpt2": Family("GPT2Attention", learned_positions=True),
    "gpt_bigcode": Family("GPTBigCodeAttention", learned_positions=True),
    "gpt_neox": Family("GPTNeoXAttention"),
    "gptj": Family("GPTJAttention"),
    "granite": Family("GraniteAttention"),
    "llama": Family("LlamaAttention"),
    "mistral": Family("MistralAttention"),
    "mixtral": Family("MixtralAttention"),
    "olmo2": Family("Olmo2Attention"),
    "opt": Family("OPTAttention", learned_positions=True),
    "phi": Family("PhiAttention"),
    "phi3": Family("Phi3Attention"),
    "qwen2": Family("Qwen2Attention"),
    "qwen2_moe": Family("Qwen2MoeAttention"),
    "qwen3": Family("Qwen3Attention"),
    "qwen3_moe": Family("Qwen3MoeAttention"),
    "smollm3": Family("SmolLM3Attention"),
    "stablelm": Family("StableLmAttention"),
}


def model_shape(config) -> ModelShape:
    """The shape of a prefix for a model with this config (a composite one: of its text part).

    Raises ValueError for a config without the number of layers, heads or the hidden size.
    """
    config = config.get_text_config()
    family = FAMILIES.get(config.model_type)
    return (family.shape if family else standard_shape)(config)


def family_of(model: nn.Module) -> Family:
    """The model's family; NotImplementedError for one that has no row here."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise NotImplementedError(
            f"model: a prefix can be attached to {', '.join(FAMILIES)}; got model type {model_type!r} ({type(model).__name__})"
        )
    return FAMILIES[model_type]


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules in the order of their layers; NotImplementedError if the model is not as its row says."""
    name = family_of(model).attention
    modules = [m for m in model.modules() if type(m).__name__ == name and not getattr(m, "is_cross_attention", False)]
    layers = [module.layer_idx for module in modules]
    expected = model_shape(model.config).layers
    if len(layers) != expected or layers != sorted(set(layers)):
        raise NotImplementedError(
            f"model: expected {expected} layers with a {name}, found layers {layers} in {type(model).__name__}"
        )
    if getattr(model.config, "add_cross_attention", False):
        raise NotImplementedError(f"model: cross-attention is not served; got {type(model).__name__} with add_cross_attention")
    return modules
