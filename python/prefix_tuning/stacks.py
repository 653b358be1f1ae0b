"""Where in a model a prefix's parts go: each stack of layers, its attention modules, how its tokens know where they stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from prefix_tuning.encoder_families import ENCODER_DECODERS, ENCODERS, REFUSED_ENCODERS
from prefix_tuning.families import FAMILIES, REFUSED, attention_modules, family_of, model_shape, shared_attention
from prefix_tuning.multimodal_families import MULTIMODAL, unwrapped_config
from prefix_tuning.shapes import ModelShape

SELF_ATTENTION = ("decoder", "encoder")


@dataclass(frozen=True)
class Stack:
    """A run of layers with a forward pass of its own.

    Attributes:
        module: the module whose forward pass it is.
        attention: of each part that can be attached, its attention modules, one a layer.
        positions: "ids": by the argument position_ids, where its forward has one; "embeddings": by its module embed_positions;
            "relative": by a bias that its first layer's self-attention computes; "fixed": always from 0.
        learned_positions: position embeddings are a table of max_position_embeddings rows.
        first_position: what the first token's position_ids is where the caller gives none.
        query_scale, while_attached: as in Family.
        shared: attention modules beside them that use the keys and values of one of them, and which one.
        wrapper: the model around the module that calls it with positions or masks of its own making.
        mask_argument: of that call, as in MultimodalFamily.
    """

    module: nn.Module
    attention: Mapping[str, list[nn.Module]]
    positions: str = "ids"
    learned_positions: bool = False
    first_position: int = 0
    query_scale: Callable[..., Tensor | None] | None = None
    while_attached: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[nn.Module, nn.Module] = field(default_factory=dict)
    wrapper: nn.Module | None = None
    mask_argument: str | None = None

    @property
    def entrances(self) -> list[nn.Module]:
        """The modules whose calls are changed, the outermost first."""
        return [self.module] if self.wrapper is None else [self.wrapper, self.module]

    @property
    def self_attention(self) -> str:
        """The part that stands before the stack's own tokens."""
        return next(part for part in SELF_ATTENTION if part in self.attention)


def part_shapes(config) -> dict[str, ModelShape]:
    """The shape of each part that a prefix for a model with this config can have.

    "encoder", "decoder" and "cross" for an encoder-decoder, "encoder" for an encoder, else "decoder". Raises ValueError for a
    config without the number of layers, heads or the hidden size.
    """
    if config.model_type in ENCODER_DECODERS:
        return ENCODER_DECODERS[config.model_type].shapes(config)
    return {"encoder" if config.model_type in ENCODERS else "decoder": model_shape(config)}


def text_config(config):
    """The config of what writes text, or of all there is: of a composite model its text part, its decoder."""
    return getattr(config, "decoder", config).get_text_config()


def attention_kinds(config) -> dict[str, dict[str, Any]]:
    """What a prefix's attention calls have in a model with this config, for each kind of its layers; of its decoder's, if any.

    softcap and window as prefix_attention takes them; bias: True where there is one, for ALiBi, chunks and T5's positions;
    layer: the first of that kind, where kinds differ.
    NotImplementedError for a family that is not served, saying why.
    """
    check_served(config)
    if config.model_type in ENCODER_DECODERS and ENCODER_DECODERS[config.model_type].positions == "relative":
        return {"relative positions": {"bias": True}}
    config = text_config(config)
    family, window = FAMILIES.get(config.model_type), getattr(config, "sliding_window", None)
    common = {"softcap": getattr(config, "attn_logit_softcapping", None)}
    if family is not None and (family.alibi or getattr(config, "alibi", False)):
        return {"ALiBi": common | {"bias": True}}
    kinds = {
        "full_attention": ("full attention", {}),
        "sliding_attention": (f"a window of {window}", {"window": window}),
        "chunked_attention": (f"chunks of {getattr(config, 'attention_chunk_size', None)}", {"bias": True}),
        "hybrid": ("full attention", {}),  # beside a state
        "global": ("full attention", {}),
        "local": (f"a window of {getattr(config, 'window_size', None)}", {"window": getattr(config, "window_size", None)}),
    }
    types = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)  # the latter GPT-Neo's
    found = types or ["sliding_attention" if window else "full_attention"]
    return {kinds[name][0]: common | kinds[name][1] | {"layer": found.index(name)} for name in kinds if name in found}


def sees_later_tokens(config) -> bool:
    """Whether a causal model's tokens see later ones, and so padding on the right: as an option of Gemma's has it."""
    return getattr(unwrapped_config(config), "use_bidirectional_attention", None) in (True, "all")


def check_served(config) -> None:
    """NotImplementedError for a config of a family without a row, saying why."""
    model_type, inside = (getattr(c, "model_type", None) for c in (config, unwrapped_config(config)))
    refused = REFUSED | REFUSED_ENCODERS
    if model_type in refused:
        raise NotImplementedError(f"model: a prefix cannot be attached to {model_type}: {refused[model_type]}")
    if inside not in FAMILIES and model_type not in ENCODER_DECODERS.keys() | ENCODERS.keys():
        known = ", ".join(sorted([*FAMILIES, *ENCODER_DECODERS, *ENCODERS, *MULTIMODAL]))
        around = "" if inside == model_type else f" around {inside!r}"
        raise NotImplementedError(f"model: expected one of type {known}, got {model_type!r}{around}")


def stacks(model: nn.Module) -> list[Stack]:
    """The model's stacks in the order they run; NotImplementedError for a model that is not served, saying why."""
    check_served(getattr(model, "config", None))
    if model.config.model_type in ENCODER_DECODERS:
        return _encoder_decoder(model)
    if model.config.model_type in ENCODERS:
        return [_encoder(model)]
    family, modules = family_of(model), attention_modules(model)
    models, around = _models_around(model, modules[0]), MULTIMODAL.get(model.config.model_type)
    wrapping = {}
    if around is not None and not around.multimodal_positions:
        wrappers = [module for module in models if module.config.model_type == model.config.model_type]
        wrapping = {
            "wrapper": wrappers[-1], "first_position": around.first_position, "mask_argument": around.mask_argument,
        }  # fmt: skip
    return [
        Stack(
            models[-1], {"decoder": modules}, learned_positions=family.learned_positions, query_scale=family.query_scale,
            while_attached=family.while_attached, shared=shared_attention(model), **wrapping,
        )
    ]  # fmt: skip


def _models_around(model: nn.Module, inside: nn.Module) -> list[nn.Module]:
    """The transformers models that hold a module, the outermost first: whoever calls that module calls the last one's forward
    pass."""
    models = (module for module in model.modules() if hasattr(module, "base_model_prefix"))
    return [module for module in models if any(inner is inside for inner in module.modules())]


def _encoder_decoder(model: nn.Module) -> list[Stack]:
    family, base = ENCODER_DECODERS[model.config.model_type], model.base_model
    encoder, decoder = getattr(base, "encoder", None), getattr(base, "decoder", None)
    if encoder is None or decoder is None:
        raise NotImplementedError(f"model: expected an encoder and a decoder, got {type(model).__name__} with one of them")
    attention = {
        "encoder": _modules(encoder, family.layers, family.self_attention),
        "decoder": _modules(decoder, family.layers, family.self_attention),
        "cross": _modules(decoder, family.layers, family.cross_attention),
    }
    return [
        Stack(encoder, {"encoder": attention.pop("encoder")}, family.positions if family.encoder_moves else "fixed"),
        Stack(decoder, attention, family.positions),
    ]


def _encoder(model: nn.Module) -> Stack:
    family, config = ENCODERS[model.config.model_type], model.config
    if getattr(config, "is_decoder", False):
        raise NotImplementedError(f"model: expected {config.model_type} as an encoder, got one with is_decoder")
    modules = _modules(model.base_model, family.layers, family.self_attention)
    first = config.pad_token_id + 1 if family.first_position_after_padding else 0
    return Stack(model.base_model, {"encoder": modules}, "ids", family.learned_positions, first)


def _modules(stack: nn.Module, layers: str, attention: str) -> list[nn.Module]:
    return [layer.get_submodule(attention) for layer in stack.get_submodule(layers)]
