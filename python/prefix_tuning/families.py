"""What attach_prefix must know of a model family: one row each. A family without a row is refused, never guessed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Family:
    """One model family.

    attention: class name of its self-attention modules, one a layer, which call transformers' attention interface.
    learned_positions: position embeddings are a table of max_position_embeddings rows, so prefix and text must fit in it.
    """

    attention: str
    learned_positions: bool = False


FAMILIES = {
    "gpt2": Family("GPT2Attention", learned_positions=True),
    "llama": Family("LlamaAttention"),
    "mistral": Family("MistralAttention"),
    "qwen2": Family("Qwen2Attention"),
    "qwen3": Family("Qwen3Attention"),
    "smollm3": Family("SmolLM3Attention"),
}


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
    if not modules or layers != list(range(len(modules))):
        raise NotImplementedError(f"model: expected one {name} a layer, found layers {layers} in {type(model).__name__}")
    if getattr(model.config, "add_cross_attention", False):
        raise NotImplementedError(f"model: cross-attention is not served; got {type(model).__name__} with add_cross_attention")
    return modules
