"""Tiny random encoder-decoders of every served family, with what a test must know of each."""

import torch
import transformers

VOCABULARY = 96
PARTS = ("encoder", "decoder", "cross")
# Encoder and decoder differ in depth, and in their heads where the family allows it. (T5 with the deeper decoder cannot
# generate with a cache: transformers gives the cache the encoder's layers.)
_BART = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 3, "decoder_layers": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "init_std": 0.2,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 12, "num_heads": 4, "d_ff": 48, "num_layers": 4, "num_decoder_layers": 3,
    "initializer_factor": 1.0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
}  # fmt: skip
_GEMMA = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "query_pre_attn_scalar": 8, "sliding_window": 4, "initializer_range": 0.2,
    "attn_logit_softcapping": 5.0,
}  # fmt: skip
_CLASSES = {
    "bart": ("Bart", _BART),
    "m2m_100": ("M2M100", _BART),
    "marian": ("Marian", _BART | {"decoder_vocab_size": VOCABULARY}),
    "mbart": ("MBart", _BART),
    "mt5": ("MT5", _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "pegasus": ("Pegasus", _BART),
    "t5": ("T5", _T5),
    "t5gemma": ("T5Gemma", {"encoder": _GEMMA | {"num_hidden_layers": 3, "hidden_size": 48}, "decoder": _GEMMA}),
    "whisper": ("Whisper", _BART | {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64}),
}
FAMILIES = tuple(_CLASSES)


def tiny_encoder_decoder(family: str, **changes):
    """3 and 4 layers, seed 0, in eval mode, frozen; weights large enough for tokens to differ."""
    torch.manual_seed(0)
    name, sizes = _CLASSES[family]
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    if family == "t5gemma":
        sizes = {stack: config | special for stack, config in sizes.items()} | {"vocab_size": VOCABULARY}
        if changes:
            raise ValueError(f"no changes for {family}, got {changes}")
    config = getattr(transformers, f"{name}Config")(**special | sizes | changes)
    config._attn_implementation = "eager"  # for stacks without a prefix: T5Gemma's sdpa of transformers 5.17 has no softcap
    config.forced_eos_token_id = config.forced_bos_token_id = None
    task = "MTModel" if family == "marian" else "ForConditionalGeneration"
    model = getattr(transformers, f"{name}{task}")(config).eval().requires_grad_(False)
    model.generation_config.forced_eos_token_id = model.generation_config.forced_bos_token_id = None
    return model


def parts_of(model) -> dict[str, list]:
    """Of each part the attention modules, in the order of the layers."""
    base = getattr(model, "model", model)
    if model.config.model_type in ("t5", "mt5"):
        self_attention = {name: [block.layer[0].SelfAttention for block in getattr(base, name).block] for name in PARTS[:2]}
        for modules in self_attention.values():
            for module in modules:
                module.__dict__["bias_table"] = modules[0]
        return self_attention | {"cross": [block.layer[1].EncDecAttention for block in base.decoder.block]}
    cross = "cross_attn" if model.config.model_type == "t5gemma" else "encoder_attn"
    return {
        "encoder": [layer.self_attn for layer in base.encoder.layers],
        "decoder": [layer.self_attn for layer in base.decoder.layers],
        "cross": [getattr(layer, cross) for layer in base.decoder.layers],
    }


def source(model, batch: int = 2, length: int = 7, side: str | None = None) -> dict[str, torch.Tensor]:
    """The encoder's input: tokens, row 0 with three of padding on `side`; for Whisper sound, which has no padding."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    if config.model_type == "whisper":
        return {"input_features": torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if side is not None:
        mask[0, slice(3) if side == "left" else slice(-3, None)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def labels(batch: int = 2, length: int = 5) -> torch.Tensor:
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))
    ids[1, -1] = -100
    return ids
