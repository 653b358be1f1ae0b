"""Tiny random models of every served family, and a random prefix for them."""

import torch
import transformers

from prefix_tuning import Prefix

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}
FAMILIES = ("gpt2", *CLASSES)
VOCABULARY = 128


def tiny_model(family: str, **changes) -> transformers.PreTrainedModel:
    """3 layers, 4 heads of 16 (2 kv heads but for GPT-2), seed 0, in eval mode; Mistral with a window of 8.

    The weights are ten times larger than transformers' own, so that tokens differ and a wrong mask shows.
    """
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**common | sizes | changes)).eval()
    sizes = {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 64, "max_position_embeddings": 128,
    }  # fmt: skip
    if family == "mistral":
        sizes["sliding_window"] = 8
    name = CLASSES[family]
    config = getattr(transformers, f"{name}Config")(**common | sizes | changes)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def random_prefix(model: transformers.PreTrainedModel, prefix_len: int = 5) -> Prefix:
    """Keys and values from N(0, 1), large enough to matter."""
    return randomize(Prefix.for_model(model, prefix_len, seed=0))


def randomize(prefix: Prefix) -> Prefix:
    """The same prefix with keys and values from N(0, 1)."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return prefix
