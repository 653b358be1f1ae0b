"""Tiny random models of every served family, and a random prefix for them."""

import pytest
import torch
import transformers

from prefix_tuning import Prefix

VOCABULARY = 128
COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
LLAMA = SIZES | {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64}
WINDOW = {"sliding_window": 8}
HYBRID = WINDOW | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 32}
MLA = SIZES | {
    "num_key_value_heads": 4, "intermediate_size": 64, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
FALCON = SIZES | {"ffn_hidden_size": 64}
LINEAR = {
    "num_hidden_layers": 4, "layer_types": ["full_attention", "linear_attention", "full_attention", "full_attention"],
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
LLAMA4 = {
    "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 8, "no_rope_layers": [1, 0, 1],
    "floor_scale": 4, "attn_temperature_tuning": False,
}  # fmt: skip

ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# Of each family, with its variants: the class and its config. Learned positions have 64 rows, windows and chunks 8 tokens.
MODELS = {
    "bloom": ("BloomForCausalLM", {"hidden_size": 64, "n_layer": 3, "n_head": 4}),
    "cohere2": ("Cohere2ForCausalLM", LLAMA | HYBRID | {"logit_scale": 1.0}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", MLA),
    "deepseek_v3": ("DeepseekV3ForCausalLM", MLA),
    "falcon": ("FalconForCausalLM", FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon_mqa": ("FalconForCausalLM", FALCON | {"multi_query": True}),
    "falcon_alibi": ("FalconForCausalLM", FALCON | {"multi_query": False, "alibi": True}),
    "gemma": ("GemmaForCausalLM", LLAMA),
    "gemma2": (  # torch's own attention would leave out the softcap
        "Gemma2ForCausalLM", LLAMA | HYBRID | {"attn_logit_softcapping": 5.0, "attn_implementation": "eager"},
    ),
    "gemma3": ("Gemma3ForCausalLM", LLAMA | HYBRID),
    "gemma4": (
        "Gemma4ForCausalLM",
        LLAMA | WINDOW | {
            "num_hidden_layers": 6, "num_kv_shared_layers": 2, "global_head_dim": 32, "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        },
    ),
    "glm4": ("Glm4ForCausalLM", LLAMA),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", GPT2),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 64, "window_size": 8,
         "attention_types": [[["local", "global", "local"], 1]]},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZES | {"intermediate_size": 64}),
    "gpt_oss": ("GptOssForCausalLM", LLAMA | HYBRID | EXPERTS | {"rope_parameters": ROPE}),
    "gptj": ("GPTJForCausalLM", GPT2 | {"rotary_dim": 8}),
    "granite": ("GraniteForCausalLM", LLAMA | {"attention_multiplier": 0.2}),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama4": ("Llama4ForCausalLM", LLAMA | LLAMA4),
    "llama4_temperature": ("Llama4ForCausalLM", LLAMA | LLAMA4 | {"attn_temperature_tuning": True}),
    "mistral": ("MistralForCausalLM", LLAMA | WINDOW),
    "mistral_full": ("MistralForCausalLM", LLAMA | {"sliding_window": None}),
    "mixtral": ("MixtralForCausalLM", LLAMA | {"num_local_experts": 4}),
    "mpt": ("MptForCausalLM", {"d_model": 64, "n_heads": 4, "n_layers": 3, "expansion_ratio": 1, "max_seq_len": 128}),
    "olmo2": ("Olmo2ForCausalLM", LLAMA),
    "opt": (
        "OPTForCausalLM",
        {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 64,
         "max_position_embeddings": 64, "init_std": 0.2, "dropout": 0.0},
    ),
    "phi": ("PhiForCausalLM", LLAMA),
    "phi3": ("Phi3ForCausalLM", LLAMA),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "qwen2_moe": ("Qwen2MoeForCausalLM", LLAMA | EXPERTS),
    "qwen3": ("Qwen3ForCausalLM", LLAMA),
    "qwen3_moe": ("Qwen3MoeForCausalLM", LLAMA | EXPERTS),
    "qwen3_next": ("Qwen3NextForCausalLM", LLAMA | EXPERTS | LINEAR),
    "smollm3": ("SmolLM3ForCausalLM", LLAMA),
    "stablelm": ("StableLmForCausalLM", LLAMA),
}  # fmt: skip
# The families on which everything else is tested.
FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "smollm3")


def tiny_model(family: str, **changes) -> transformers.PreTrainedModel:
    """3 layers or more, 4 heads of 16 (2 kv heads where the family has them), seed 0, in eval mode.

    The weights are ten times larger than transformers' own, so that tokens differ and a wrong mask shows.
    """
    torch.manual_seed(0)
    name, sizes = MODELS[family]
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**COMMON | sizes | changes)).eval()


def random_prefix(model: transformers.PreTrainedModel, prefix_len: int = 5, **options) -> Prefix:
    """Keys and values from N(0, 1), large enough to matter."""
    return randomize(Prefix.for_model(model, prefix_len, seed=0, **options))


def randomize(prefix: Prefix) -> Prefix:
    """The same prefix with keys and values, and the parameters of heads, from N(0, 1)."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return prefix
