"""Tiny random models that wrap a text model beside a tower for images, and batches of rows with an image and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import transformers

from support.models import COMMON, CONVOLUTIONS, EXPERTS, HYBRID, LINEAR, LLAMA, LLAMA4, MLA, ROPE, VOCABULARY, WINDOW

IMAGE, VIDEO, AUDIO, START, END = 120, 121, 122, 123, 124  # tokens
SIDE, PATCH = 16, 4  # pixels of an image, which has 16 patches
TOWER = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": PATCH, "initializer_range": 0.2,
}  # fmt: skip
SIGLIP = TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}
MROPE = LLAMA | {"rope_parameters": ROPE | {"mrope_section": [2, 2, 4]}}
QWEN_TOWER = {
    "depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
    "initializer_range": 0.2,
}  # fmt: skip
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}


class Wrapper(NamedTuple):
    """A model class, its text model's config, the rest of the config, how many tokens an image takes, and what else a call
    with images gets: of the token ids and the number of images a dict with the pixels."""

    name: str
    text: dict
    others: dict
    tokens: int
    pixels: Callable[[torch.Tensor, int], dict[str, torch.Tensor]]


def plain_pixels(input_ids, images):
    return {"pixel_values": torch.randn(images, 3, SIDE, SIDE)}


def sized_pixels(input_ids, images):
    return plain_pixels(input_ids, images) | {"image_sizes": torch.tensor([[SIDE, SIDE]] * images)}


def rows_of_pixels(input_ids, images):
    """Of each row as many images as the most have; those that are not there are black."""
    pixels = torch.zeros(len(input_ids), 1, 3, SIDE, SIDE)
    rows = (input_ids == IMAGE).any(-1)
    pixels[rows] = torch.randn(images, 1, 3, SIDE, SIDE)
    return {"pixel_values": pixels}


def typed_pixels(input_ids, images):
    return plain_pixels(input_ids, images) | {"token_type_ids": (input_ids == IMAGE).long()}


def suffix_pixels(input_ids, images):
    """token_type_ids are 1 in the suffix, here the last three tokens."""
    types = torch.zeros_like(input_ids)
    types[:, -3:] = 1
    return plain_pixels(input_ids, images) | {"token_type_ids": types}


def patches(input_ids, images):
    grid, patch = SIDE // PATCH, 3 * 2 * PATCH * PATCH
    return {
        "pixel_values": torch.randn(images * grid * grid, patch),
        "image_grid_thw": torch.tensor([[1, grid, grid]] * images),
        "mm_token_type_ids": (input_ids == IMAGE).int(),
    }


def untyped_patches(input_ids, images):
    return {name: value for name, value in patches(input_ids, images).items() if name != "mm_token_type_ids"}


def positioned_patches(input_ids, images):
    grid = SIDE // PATCH
    where = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).flip(-1)
    return {
        "pixel_values": torch.rand(images, grid * grid, 3 * PATCH * PATCH),
        "image_position_ids": where.expand(images, -1, -1),
        "mm_token_type_ids": (input_ids == IMAGE).long(),
    }


def square_patches(input_ids, images):
    grid = SIDE // PATCH
    return {
        "pixel_values": torch.randn(images * grid * grid, 3, PATCH, PATCH),
        "image_grid_thw": torch.tensor([[1, grid, grid]] * images),
    }


def masked_patches(input_ids, images):
    grid = SIDE // PATCH
    return {
        "pixel_values": torch.randn(images, grid * grid, 3 * PATCH * PATCH),
        "pixel_attention_mask": torch.ones(images, grid * grid, dtype=torch.long),
        "spatial_shapes": torch.tensor([[grid, grid]] * images),
    }


def tiles(input_ids, images):
    """A whole image and its one tile."""
    pixels = torch.randn(images, 2, 3, SIDE, SIDE)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[SIDE, SIDE]] * images)}


LLAMA_TEXT = LLAMA | {"model_type": "llama"}
CLIP = TOWER | {"model_type": "clip_vision_model"}
COHERE2 = LLAMA | HYBRID | {"model_type": "cohere2", "logit_scale": 1.0}
GLM_TOKENS = QWEN_TOKENS | {"image_start_token_id": START, "image_end_token_id": END}
PARTIAL_MROPE = LLAMA | {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}}
GLM = PARTIAL_MROPE | {"model_type": "glm4v_text"}
TWO_SIDES = TOWER | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
SIGLIP2 = {"model_type": "siglip2_vision_model", "vision_use_head": False, "num_patches": (SIDE // PATCH) ** 2} | {
    name: size for name, size in TOWER.items() if name != "image_size"
}
FLAT_TOWER = QWEN_TOWER | {
    "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64, "num_position_embeddings": 16,
}  # fmt: skip
DEEP_TOWER = FLAT_TOWER | {"deepstack_visual_indexes": [0, 1]}

# By model type, with variants: the wrapper.
WRAPPERS = {
    "gemma3": Wrapper(
        "Gemma3ForConditionalGeneration", LLAMA | HYBRID | {"query_pre_attn_scalar": 16},
        {"vision_config": SIGLIP, "mm_tokens_per_image": 4, "image_token_id": IMAGE}, 4, typed_pixels,
    ),
    "gemma4": Wrapper(
        "Gemma4ForConditionalGeneration",
        LLAMA | WINDOW | {
            "num_hidden_layers": 6, "num_kv_shared_layers": 2, "global_head_dim": 32, "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "use_bidirectional_attention": "vision",
        },
        {"image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": AUDIO, "audio_config": None,
         "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                           "num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2, "patch_size": PATCH,
                           "position_embedding_size": 32, "initializer_range": 0.2}},
        4, positioned_patches,
    ),
    "idefics3": Wrapper(
        "Idefics3ForConditionalGeneration", LLAMA_TEXT,
        {"vision_config": TOWER, "scale_factor": 2, "image_token_id": IMAGE}, 4, rows_of_pixels,
    ),
    "llama4": Wrapper(
        "Llama4ForConditionalGeneration", LLAMA | LLAMA4,
        {"image_token_index": IMAGE,
         "vision_config": TOWER | {"pixel_shuffle_ratio": 0.5, "projector_input_dim": 32, "projector_output_dim": 32,
                                   "vision_output_dim": 32, "intermediate_size": 128}},
        4, plain_pixels,
    ),
    "llava": Wrapper(
        "LlavaForConditionalGeneration", LLAMA_TEXT,
        {"vision_config": CLIP, "image_token_index": IMAGE}, 16, plain_pixels,
    ),
    "mistral3": Wrapper(
        "Mistral3ForConditionalGeneration", LLAMA | WINDOW | {"model_type": "mistral"},
        {"vision_config": TOWER | {"model_type": "pixtral", "head_dim": 16}, "image_token_index": IMAGE,
         "spatial_merge_size": 2}, 4, sized_pixels,
    ),
    "paligemma": Wrapper(
        "PaliGemmaForConditionalGeneration", LLAMA | {"model_type": "gemma"},
        {"vision_config": SIGLIP | {"projection_dim": 64}, "projection_dim": 64, "image_token_index": IMAGE}, 16,
        suffix_pixels,
    ),
    "paligemma2": Wrapper(
        "PaliGemmaForConditionalGeneration",  # torch's own attention would leave out the softcap
        LLAMA | HYBRID | {"model_type": "gemma2", "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
        {"vision_config": SIGLIP | {"projection_dim": 64}, "projection_dim": 64, "image_token_index": IMAGE,
         "attn_implementation": "eager"}, 16, suffix_pixels,
    ),
    "qwen2_5_vl": Wrapper(
        "Qwen2_5_VLForConditionalGeneration", MROPE,
        QWEN_TOKENS | {"vision_config": QWEN_TOWER | {
            "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 8,
        }},
        4, patches,
    ),
    "qwen2_vl": Wrapper(
        "Qwen2VLForConditionalGeneration", MROPE,
        QWEN_TOKENS | {"vision_config": QWEN_TOWER | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 1}}, 4, patches,
    ),
    "qwen3_vl": Wrapper(
        "Qwen3VLForConditionalGeneration", MROPE, QWEN_TOKENS | {"vision_config": DEEP_TOWER}, 4, patches,
    ),
}  # fmt: skip
# Others whose text model is called in the same way as one of those.
SIMILAR = {
    "aya_vision": Wrapper(
        "AyaVisionForConditionalGeneration", COHERE2,
        {"vision_config": SIGLIP, "downsample_factor": 2, "image_token_index": IMAGE, "alignment_intermediate_size": 32},
        4, plain_pixels,
    ),
    "cohere2_vision": Wrapper(
        "Cohere2VisionForConditionalGeneration", COHERE2,
        {"vision_config": SIGLIP, "downsample_factor": 2, "image_token_id": IMAGE, "alignment_intermediate_size": 32},
        4, plain_pixels,
    ),
    "deepseek_vl": Wrapper(
        "DeepseekVLForConditionalGeneration", LLAMA_TEXT, {"vision_config": SIGLIP, "image_token_id": IMAGE}, 16, plain_pixels,
    ),
    "exaone4_5": Wrapper(
        "Exaone4_5_ForConditionalGeneration", LLAMA | HYBRID | {"model_type": "exaone4"},
        QWEN_TOKENS | {"vision_config": QWEN_TOWER | {
            "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 8,
            "num_key_value_heads": 2,
        }},
        4, untyped_patches,
    ),
    "glm46v": Wrapper(
        "Glm46VForConditionalGeneration", GLM,
        GLM_TOKENS | {"vision_config": QWEN_TOWER | {
            "model_type": "glm4v_vision", "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64, "image_size": SIDE,
        }},
        4, patches,
    ),
    "glm4v": Wrapper(
        "Glm4vForConditionalGeneration", GLM,
        GLM_TOKENS | {"vision_config": QWEN_TOWER | {
            "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64, "image_size": SIDE,
        }},
        4, patches,
    ),
    "idefics2": Wrapper(
        "Idefics2ForConditionalGeneration", LLAMA | WINDOW | {"model_type": "mistral"},
        {"vision_config": TOWER, "image_token_id": IMAGE,
         "perceiver_config": {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16,
                              "num_key_value_heads": 1}},
        4, rows_of_pixels,
    ),
    "internvl": Wrapper(
        "InternVLForConditionalGeneration", LLAMA | {"model_type": "qwen2"},
        {"vision_config": TWO_SIDES, "downsample_ratio": 0.5, "image_token_id": IMAGE}, 4, plain_pixels,
    ),
    "janus": Wrapper(
        "JanusForConditionalGeneration", LLAMA_TEXT,
        {"vision_config": TOWER | {"projection_dim": 64, "mlp_ratio": 1.0, "depth": 2}, "image_token_id": IMAGE,
         "vq_config": {"embed_dim": 8, "num_embeddings": 16, "base_channels": 32, "channel_multiplier": [1, 1],
                       "num_patches": 4, "num_res_blocks": 1, "latent_channels": 8, "projection_dim": 8,
                       "image_token_embed_dim": 8}},
        16, plain_pixels,
    ),
    "kimi_k25": Wrapper(
        "Kimi_K25ForConditionalGeneration", MLA | {"model_type": "deepseek_v3"},
        {"image_token_id": IMAGE, "video_token_id": VIDEO, "projection_hidden_size": 32,
         "vision_config": TOWER | {"pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 4}},
        4, square_patches,
    ),
    "lfm2_vl": Wrapper(
        "Lfm2VlForConditionalGeneration", LLAMA | CONVOLUTIONS | {"model_type": "lfm2"},
        {"vision_config": SIGLIP2, "image_token_id": IMAGE, "projector_hidden_size": 32, "downsample_factor": 2},
        4, masked_patches,
    ),
    "lighton_ocr": Wrapper(
        "LightOnOcrForConditionalGeneration", LLAMA | {"model_type": "qwen3"},
        {"vision_config": TOWER | {"model_type": "pixtral", "head_dim": 16}, "image_token_id": IMAGE, "spatial_merge_size": 2},
        4, sized_pixels,
    ),
    "llava_mistral": Wrapper(
        "LlavaForConditionalGeneration", LLAMA | WINDOW | {"model_type": "mistral"},
        {"vision_config": CLIP, "image_token_index": IMAGE}, 16, plain_pixels,
    ),
    "llava_next": Wrapper(
        "LlavaNextForConditionalGeneration", LLAMA_TEXT,
        {"vision_config": CLIP, "image_token_index": IMAGE, "image_grid_pinpoints": [[SIDE, SIDE]]}, 36, tiles,
    ),
    "llava_next_video": Wrapper(
        "LlavaNextVideoForConditionalGeneration", LLAMA_TEXT,
        {"vision_config": CLIP, "image_token_index": IMAGE, "video_token_index": VIDEO,
         "image_grid_pinpoints": [[SIDE, SIDE]]}, 36, tiles,
    ),
    "llava_onevision": Wrapper(
        "LlavaOnevisionForConditionalGeneration", LLAMA | {"model_type": "qwen2"},
        {"vision_config": SIGLIP, "image_token_index": IMAGE, "video_token_index": VIDEO,
         "image_grid_pinpoints": [[SIDE, SIDE]]}, 36, tiles,
    ),
    "ovis2": Wrapper(
        "Ovis2ForConditionalGeneration", LLAMA | {"model_type": "qwen2"},
        {"vision_config": TOWER | {"vocab_size": 32, "hidden_stride": 2}, "image_token_id": IMAGE, "hidden_size": 64,
         "visual_indicator_token_ids": [123, 124, 125, 126, 127]}, 4, plain_pixels,
    ),
    "qianfan_ocr": Wrapper(
        "QianfanOCRForConditionalGeneration", LLAMA | {"model_type": "qwen3"},
        {"vision_config": TWO_SIDES, "downsample_ratio": 0.5, "image_token_id": IMAGE}, 4, plain_pixels,
    ),
    "qwen3_5": Wrapper(
        "Qwen3_5ForConditionalGeneration", PARTIAL_MROPE | LINEAR, QWEN_TOKENS | {"vision_config": FLAT_TOWER}, 4, patches,
    ),
    "qwen3_5_moe": Wrapper(
        "Qwen3_5MoeForConditionalGeneration", PARTIAL_MROPE | LINEAR | EXPERTS, QWEN_TOKENS | {"vision_config": FLAT_TOWER},
        4, patches,
    ),
    "qwen3_vl_moe": Wrapper(
        "Qwen3VLMoeForConditionalGeneration", MROPE | EXPERTS, QWEN_TOKENS | {"vision_config": DEEP_TOWER}, 4, patches,
    ),
    "smolvlm": Wrapper(
        "SmolVLMForConditionalGeneration", LLAMA_TEXT,
        {"vision_config": TOWER, "scale_factor": 2, "image_token_id": IMAGE}, 4, rows_of_pixels,
    ),
    "vipllava": Wrapper(
        "VipLlavaForConditionalGeneration", LLAMA_TEXT,
        {"vision_config": CLIP, "image_token_index": IMAGE, "vision_feature_layers": [-2, -1]}, 16, plain_pixels,
    ),
}  # fmt: skip
EVERY = WRAPPERS | SIMILAR


def tiny_wrapper(name: str, **changes) -> transformers.PreTrainedModel:
    """A text model of 3 layers or more beside a tower of 2, seed 0, in eval mode. changes: of the text model's config."""
    torch.manual_seed(0)
    wrapper = EVERY[name]
    if not hasattr(transformers, wrapper.name):
        pytest.skip(f"transformers {transformers.__version__} has no {wrapper.name}")
    model_class = getattr(transformers, wrapper.name)
    config = model_class.config_class(text_config=COMMON | wrapper.text | changes, **wrapper.others)
    model = model_class(config).eval()
    with torch.no_grad():
        for special in (slice(3), slice(IMAGE, None)):
            model.get_output_embeddings().weight[special] = 0  # so that none of the tokens without a text is generated
        for name, parameter in model.named_parameters():
            if name.endswith("mm_input_projection_weight"):
                parameter.normal_(std=0.2)  # Gemma 3 starts from 0
    return model


def batch_with_image(name: str, row: int) -> dict[str, torch.Tensor]:
    """Two rows of tokens; one of them has an image."""
    tokens = EVERY[name].tokens
    input_ids = torch.randint(3, 100, (2, 9 + tokens), generator=torch.Generator().manual_seed(1))
    input_ids[row, 3], input_ids[row, 4 : 4 + tokens] = START, IMAGE
    torch.manual_seed(2)
    return {"input_ids": input_ids} | EVERY[name].pixels(input_ids, 1)


def row_of(batch: dict[str, torch.Tensor], row: int, start: int = 0) -> dict[str, torch.Tensor]:
    """One row of a batch, from its token `start` on, as a batch of its own."""
    of_tokens = {name: value[row, start:][None] for name, value in batch.items() if value.shape == batch["input_ids"].shape}
    if not (of_tokens["input_ids"] == IMAGE).any():
        return of_tokens
    pixels = {name: value for name, value in batch.items() if name not in of_tokens}
    if len(pixels["pixel_values"]) == len(batch["input_ids"]):  # images of each row
        pixels["pixel_values"] = pixels["pixel_values"][row][None]
    return of_tokens | pixels


def with_token(name: str, row: dict[str, torch.Tensor], token: torch.Tensor) -> dict[str, torch.Tensor]:
    """A row [1, tokens] and one more token of text: PaliGemma's suffix goes on with token type 1."""
    new = {"input_ids": token, "token_type_ids": int(name.startswith("paligemma")), "mm_token_type_ids": 0}
    return {
        key: torch.cat([value, torch.full((1, 1), int(new[key]), dtype=value.dtype)], 1) if key in new else value
        for key, value in row.items()
    }
