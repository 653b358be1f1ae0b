"""What attach_prefix must know of models that wrap a text model, with towers for images and the like: one row each.

The prefix goes to the text model's self-attention; its family has its row in families.py. A wrapper without a row is refused.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MultimodalFamily:
    """One kind of wrapper. It finds the text model's config in its own as text_config.

    Attributes:
        multimodal_positions: images take positions of their own (M-RoPE), which the wrapper derives from the attention mask
            too. Other wrappers may call their text model with finished masks, or with positions that count padding.
        first_position: what the first token's position_ids is where the caller gives none.
        mask_argument: the argument that says which tokens of a prompt see later ones (0) and which do not (1). Without it that
            would be up to the attention implementation, so it is asked for.
        images_in_static_caches: whether prompts with images may go into a static cache that nobody asked for; Gemma 4 before
            transformers 5.24 masks them otherwise there.
    """

    multimodal_positions: bool = False
    first_position: int = 0
    mask_argument: str | None = None
    images_in_static_caches: bool = True


_PLAIN, _MROPE = MultimodalFamily(), MultimodalFamily(multimodal_positions=True)

# by config.model_type
MULTIMODAL = {
    "aya_vision": _PLAIN,
    "cohere2_vision": _PLAIN,
    "deepseek_vl": _PLAIN,
    "exaone4_5": _PLAIN,
    "gemma3": _PLAIN,
    "gemma3n": _PLAIN,
    "gemma4": MultimodalFamily(images_in_static_caches=False),
    "glm46v": _MROPE,
    "glm4v": _MROPE,
    "idefics2": _PLAIN,
    "idefics3": _PLAIN,
    "internvl": _PLAIN,
    "janus": _PLAIN,
    "kimi_k25": _PLAIN,
    "lfm2_vl": _PLAIN,
    "lighton_ocr": _PLAIN,
    "llama4": _PLAIN,
    "llava": _PLAIN,
    "llava_next": _PLAIN,
    "llava_next_video": _PLAIN,
    "llava_onevision": _PLAIN,
    "mistral3": _PLAIN,
    "ovis2": _PLAIN,
    "paligemma": MultimodalFamily(first_position=1, mask_argument="token_type_ids"),
    "qianfan_ocr": _PLAIN,
    "qwen2_5_vl": _MROPE,
    "qwen2_vl": _MROPE,
    "qwen3_5": _MROPE,
    "qwen3_5_moe": _MROPE,
    "qwen3_vl": _MROPE,
    "qwen3_vl_moe": _MROPE,
    "smolvlm": _PLAIN,
    "vipllava": _PLAIN,
}


def unwrapped_config(config):
    """The config of the text model: of a wrapper with a row its text_config, else the config itself."""
    return config.text_config if getattr(config, "model_type", None) in MULTIMODAL else config
