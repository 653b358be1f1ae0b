"""Tiny random models of every served family, and a random prefix for them."""

import copy

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
ROUTED = {
    "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
FALCON = SIZES | {"ffn_hidden_size": 64}
MIXED = {"num_hidden_layers": 4, "layer_types": ["full_attention", "linear_attention", "full_attention", "full_attention"]}
CONVOLUTIONS = MIXED | {"layer_types": ["full_attention", "conv", "full_attention", "full_attention"]}
LINEAR = MIXED | {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
GRANITE_MOE = LLAMA | {"attention_multiplier": 0.2, "num_local_experts": 4, "shared_intermediate_size": 32}
LLAMA4 = {
    "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 8, "no_rope_layers": [1, 0, 1],
    "floor_scale": 4, "attn_temperature_tuning": False,
}  # fmt: skip

ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# Of each family, with its variants: the class and its config. Learned positions have 64 rows, windows and chunks 8 tokens.
MODELS = {
    "afmoe": ("AfmoeForCausalLM", LLAMA | HYBRID | ROUTED),
    "apertus": ("ApertusForCausalLM", LLAMA),
    "arcee": ("ArceeForCausalLM", LLAMA),
    "bamba": ("BambaForCausalLM", LLAMA | MAMBA | {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]}),
    "biogpt": (
        "BioGptForCausalLM",
        SIZES | {"intermediate_size": 64, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
                 "attention_probs_dropout_prob": 0.0},
    ),
    "bitnet": ("BitNetForCausalLM", LLAMA),
    "bloom": ("BloomForCausalLM", {"hidden_size": 64, "n_layer": 3, "n_head": 4}),
    "codegen": ("CodeGenForCausalLM", GPT2 | {"rotary_dim": 8}),
    "cohere": ("CohereForCausalLM", LLAMA | {"logit_scale": 1.0, "use_qk_norm": True}),
    "cohere2": ("Cohere2ForCausalLM", LLAMA | HYBRID | {"logit_scale": 1.0}),
    "cohere2_moe": (
        "Cohere2MoeForCausalLM", LLAMA | HYBRID | {"logit_scale": 1.0, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "cwm": ("CwmForCausalLM", LLAMA | HYBRID | {"rope_parameters": ROPE}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", MLA),
    "deepseek_v3": ("DeepseekV3ForCausalLM", MLA),
    "dots1": ("Dots1ForCausalLM", LLAMA | HYBRID | ROUTED),
    "ernie4_5": ("Ernie4_5ForCausalLM", LLAMA),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        LLAMA | {"moe_intermediate_size": 32, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    ),
    "exaone4": ("Exaone4ForCausalLM", LLAMA | HYBRID),
    "exaone_moe": ("ExaoneMoeForCausalLM", LLAMA | HYBRID | EXPERTS),
    "falcon": ("FalconForCausalLM", FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon_alibi": ("FalconForCausalLM", FALCON | {"multi_query": False, "alibi": True}),
    "falcon_h1": ("FalconH1ForCausalLM", LLAMA | MAMBA | {"mamba_d_ssm": 128, "key_multiplier": 0.5}),
    "falcon_mqa": ("FalconForCausalLM", FALCON | {"multi_query": True}),
    "flex_olmo": ("FlexOlmoForCausalLM", LLAMA | {"num_experts": 4, "num_experts_per_tok": 2}),
    "gemma": ("GemmaForCausalLM", LLAMA),
    "gemma2": (  # torch's own attention would leave out the softcap
        "Gemma2ForCausalLM", LLAMA | HYBRID | {"attn_logit_softcapping": 5.0, "attn_implementation": "eager"},
    ),
    "gemma3": ("Gemma3ForCausalLM", LLAMA | HYBRID),
    "gemma3n": (
        "Gemma3nForCausalLM",
        LLAMA | WINDOW | {
            "num_hidden_layers": 6, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 8, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        },
    ),
    "gemma4": (
        "Gemma4ForCausalLM",
        LLAMA | WINDOW | {
            "num_hidden_layers": 6, "num_kv_shared_layers": 2, "global_head_dim": 32, "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        },
    ),
    "gemma4_unified": (
        "Gemma4UnifiedForCausalLM", LLAMA | HYBRID | {"global_head_dim": 32, "num_global_key_value_heads": 1},
    ),
    "glm": ("GlmForCausalLM", LLAMA),
    "glm4": ("Glm4ForCausalLM", LLAMA),
    "glm4_moe": ("Glm4MoeForCausalLM", LLAMA | ROUTED | {"use_qk_norm": True}),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", MLA),
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
    "granitemoe": ("GraniteMoeForCausalLM", GRANITE_MOE),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", GRANITE_MOE | MAMBA | MIXED | {"position_embedding_type": "rope"}),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", GRANITE_MOE),
    "helium": ("HeliumForCausalLM", LLAMA),
    "hunyuan_v1_dense": ("HunYuanDenseV1ForCausalLM", LLAMA),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", LLAMA | {"num_experts": 4, "moe_topk": 2}),
    "hyperclovax": ("HyperCLOVAXForCausalLM", LLAMA | {"attention_multiplier": 0.2}),
    "jais2": ("Jais2ForCausalLM", LLAMA),
    "jamba": (
        "JambaForCausalLM",
        LLAMA | {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8},
    ),
    "kimi_linear": (
        "KimiLinearForCausalLM", MLA | MIXED | {"linear_head_dim": 8, "linear_num_heads": 4, "num_local_experts": 4},
    ),
    "lfm2": ("Lfm2ForCausalLM", LLAMA | CONVOLUTIONS),
    "lfm2_moe": ("Lfm2MoeForCausalLM", LLAMA | EXPERTS | CONVOLUTIONS | {"num_dense_layers": 1}),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama4": ("Llama4ForCausalLM", LLAMA | LLAMA4),
    "llama4_temperature": ("Llama4ForCausalLM", LLAMA | LLAMA4 | {"attn_temperature_tuning": True}),
    "longcat_flash": (
        "LongcatFlashForCausalLM",
        MLA | {
            "num_layers": 2, "num_hidden_layers": 4, "head_dim": 8, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32,
            "moe_topk": 2, "zero_expert_num": 2, "routed_scaling_factor": 1.0,
        },
    ),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", LLAMA | HYBRID | ROUTED | {"num_key_value_heads": 1, "v_head_dim": 8}),
    "minicpm3": ("MiniCPM3ForCausalLM", MLA | {"dim_model_base": 64, "scale_emb": 1}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "ministral": ("MinistralForCausalLM", LLAMA | HYBRID),
    "ministral3": (
        "Ministral3ForCausalLM",
        LLAMA | {"rope_parameters": ROPE | {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 4}},
    ),
    "mistral": ("MistralForCausalLM", LLAMA | WINDOW),
    "mistral_full": ("MistralForCausalLM", LLAMA | {"sliding_window": None}),
    "mixtral": ("MixtralForCausalLM", LLAMA | {"num_local_experts": 4}),
    "modernbert_decoder": (
        "ModernBertDecoderForCausalLM",
        SIZES | {"intermediate_size": 64, "local_attention": 16, "layer_types": HYBRID["layer_types"]},
    ),
    "mpt": ("MptForCausalLM", {"d_model": 64, "n_heads": 4, "n_layers": 3, "expansion_ratio": 1, "max_seq_len": 128}),
    "nanochat": ("NanoChatForCausalLM", LLAMA),
    "nemotron": ("NemotronForCausalLM", LLAMA),
    "nemotron_h": (
        "NemotronHForCausalLM",
        LLAMA | ROUTED | {
            "layers_block_type": ["full_attention", "linear_attention", "moe", "full_attention"], "ssm_state_size": 8,
            "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 8,
            "moe_shared_expert_intermediate_size": 32, "initializer_range": 0.1,
        },
    ),
    "olmo": ("OlmoForCausalLM", LLAMA | {"clip_qkv": 0.5}),
    "olmo2": ("Olmo2ForCausalLM", LLAMA),
    "olmo3": ("Olmo3ForCausalLM", LLAMA | HYBRID),
    "olmo_hybrid": ("OlmoHybridForCausalLM", LLAMA | LINEAR),
    "olmoe": ("OlmoeForCausalLM", LLAMA | {"num_experts": 4, "num_experts_per_tok": 2}),
    "opt": (
        "OPTForCausalLM",
        {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 64,
         "max_position_embeddings": 64, "init_std": 0.2, "dropout": 0.0},
    ),
    "persimmon": ("PersimmonForCausalLM", SIZES | {"intermediate_size": 64}),
    "phi": ("PhiForCausalLM", LLAMA),
    "phi3": ("Phi3ForCausalLM", LLAMA),
    "phimoe": ("PhimoeForCausalLM", LLAMA | WINDOW | {"num_local_experts": 4}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "qwen2_moe": ("Qwen2MoeForCausalLM", LLAMA | EXPERTS),
    "qwen3": ("Qwen3ForCausalLM", LLAMA),
    "qwen3_5": ("Qwen3_5ForCausalLM", LLAMA | LINEAR),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", LLAMA | EXPERTS | LINEAR),
    "qwen3_moe": ("Qwen3MoeForCausalLM", LLAMA | EXPERTS),
    "qwen3_next": ("Qwen3NextForCausalLM", LLAMA | EXPERTS | LINEAR),
    "seed_oss": ("SeedOssForCausalLM", LLAMA | {"residual_dropout": 0.0}),
    "smollm3": ("SmolLM3ForCausalLM", LLAMA),
    "solar_open": ("SolarOpenForCausalLM", LLAMA | ROUTED),
    "stablelm": ("StableLmForCausalLM", LLAMA),
    "starcoder2": ("Starcoder2ForCausalLM", LLAMA | WINDOW),
    "vaultgemma": (
        "VaultGemmaForCausalLM",
        LLAMA | HYBRID | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, "attn_implementation": "eager"},
    ),
    "xglm": (
        "XGLMForCausalLM",
        {"d_model": 64, "num_layers": 3, "attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 64, "init_std": 0.2,
         "dropout": 0.0, "attention_dropout": 0.0},
    ),
    "youtu": ("YoutuForCausalLM", MLA),
}  # fmt: skip
# Families with the classes of one of these, under a config of their own.
ALIASES = {
    "exaone": ("llama", "ExaoneConfig"),
    "internlm3": ("llama", "InternLM3Config"),
    "iquestcoder": ("llama", "IQuestCoderConfig"),
    "sarvam_mla": ("deepseek_v3", "SarvamMLAConfig"),
    "sarvam_moe": ("glm4_moe", "SarvamMoEConfig"),
}
# Their caches hold a state beside keys and values; or what keys and values are made from.
WITH_STATE = (
    "bamba", "falcon_h1", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "nemotron_h", "olmo_hybrid",
    "qwen3_5", "qwen3_5_moe", "qwen3_next",
)  # fmt: skip
WITH_LATENTS = (
    "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_linear", "longcat_flash", "minicpm3", "sarvam_mla", "youtu",
)  # fmt: skip
# The families on which everything else is tested.
FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "smollm3")


def tiny_model(family: str, **changes) -> transformers.PreTrainedModel:
    """3 layers or more, 4 heads of 16 (2 kv heads where the family has them), seed 0, in eval mode.

    The weights are ten times larger than transformers' own, so that tokens differ and a wrong mask shows.
    """
    torch.manual_seed(0)
    family, *config = ALIASES.get(family, (family,))
    name, sizes = MODELS[family]
    for needed in (name, *config):
        if not hasattr(transformers, needed):
            pytest.skip(f"transformers {transformers.__version__} has no {needed}")
    model_class = getattr(transformers, name)
    config_class = getattr(transformers, config[0]) if config else model_class.config_class
    return model_class(config_class(**COMMON | sizes | changes)).eval()


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


def dispatched(model, folder, places):
    """A copy of the tiny Llama with its layers on these devices; "disk" brings the weights to the CPU for each call."""
    from accelerate import dispatch_model

    layers = {f"model.layers.{index}": place for index, place in enumerate(places)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return dispatch_model(
        copy.deepcopy(model), device_map=layers | rest, main_device="cpu", offload_dir=folder, force_hooks=True
    )
