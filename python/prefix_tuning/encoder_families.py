"""What attach_prefix must know of encoder-decoders and encoders: one row each, as families.py has for causal models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prefix_tuning.shapes import ModelShape, standard_shape


def encoder_decoder_shapes(config) -> dict[str, ModelShape]:
    """Each part's shape for a config that tells the encoder's sizes from the decoder's by name, as BART's and T5's do."""
    encoder, decoder = (_named_shape(config, side) for side in ("encoder", "decoder"))
    return {"encoder": encoder, "decoder": decoder, "cross": decoder}


def composite_shapes(config) -> dict[str, ModelShape]:
    """Each part's shape for a config with one config for the encoder and one for the decoder (T5Gemma)."""
    encoder, decoder = standard_shape(config.encoder), standard_shape(config.decoder)
    return {"encoder": encoder, "decoder": decoder, "cross": decoder}


def _named_shape(config, side: str) -> ModelShape:
    layers = getattr(config, f"{side}_layers", None)
    if layers is None:  # T5
        layers = config.num_layers if side == "encoder" else config.num_decoder_layers
    heads = getattr(config, f"{side}_attention_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "d_kv", None) or config.hidden_size // heads
    return ModelShape(layers, heads, head_dim, head_dim)


@dataclass(frozen=True)
class EncoderDecoderFamily:
    """One family of encoder-decoders: base_model.encoder and base_model.decoder, each with a list of layers.

    Attributes:
        cross_attention: path from a decoder layer to its attention over the encoder's states.
        layers, self_attention: path from a stack to its layers, from a layer to its self-attention.
        shapes: from its config each part's ModelShape.
        positions: how a stack's tokens are told where they stand. "embeddings": a module embed_positions; "ids": the argument
            position_ids; "relative": a bias by distance from the first layer's table (T5's), which has columns for the prefix
            too.
        encoder_moves: whether the encoder's tokens can stand anywhere but at 0 (Whisper's cannot).
        own_generate: generate calls the model for some of the rows, and in between, in a way of its own, which the rows' ids
            of a bank would not follow.
    """

    cross_attention: str = "encoder_attn"
    layers: str = "layers"
    self_attention: str = "self_attn"
    shapes: Callable[..., dict[str, ModelShape]] = encoder_decoder_shapes
    positions: str = "embeddings"
    encoder_moves: bool = True
    own_generate: bool = False


@dataclass(frozen=True)
class EncoderFamily:
    """One family of encoders; their tokens are told where they stand by the argument position_ids.

    Attributes:
        layers, self_attention: path from the base model to its layers, from a layer to its self-attention.
        learned_positions: position embeddings are a table of max_position_embeddings rows.
        first_position_after_padding: positions count from pad_token_id + 1 (RoBERTa's).
    """

    layers: str = "encoder.layer"
    self_attention: str = "attention.self"
    learned_positions: bool = True
    first_position_after_padding: bool = False


_BART = EncoderDecoderFamily()
_T5 = EncoderDecoderFamily("layer.1.EncDecAttention", "block", "layer.0.SelfAttention", positions="relative")

# by config.model_type
ENCODER_DECODERS = {
    "bart": _BART,
    "m2m_100": _BART,
    "marian": _BART,
    "mbart": _BART,
    "mt5": _T5,
    "pegasus": _BART,
    "t5": _T5,
    "t5gemma": EncoderDecoderFamily("cross_attn", shapes=composite_shapes, positions="ids"),
    "whisper": EncoderDecoderFamily(encoder_moves=False, own_generate=True),
}

_BERT = EncoderFamily()
_ROBERTA = EncoderFamily(first_position_after_padding=True)

ENCODERS = {
    "bert": _BERT,
    "distilbert": EncoderFamily("transformer.layer", "attention"),
    "electra": _BERT,
    "modernbert": EncoderFamily("layers", "attn", learned_positions=False),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}

_DISENTANGLED = "its attention scores contents against positions and positions against contents, and a prefix has no position"
REFUSED_ENCODERS = {"deberta": _DISENTANGLED, "deberta-v2": _DISENTANGLED}
