"""The cache that generate makes for itself while a prefix is attached: a static one where its decoding steps are replayed.

A cache that grows has other tensors after every token, so a step over it cannot be a CUDA graph, and the host issues every
kernel. generate keeps such a cache from its caller unless it returns a dict, so here its kind is free.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation import GenerationMode
from transformers.generation.utils import ALL_CACHE_NAMES

from prefix_tuning import deferred_stops
from prefix_tuning.graphed_decoding import can_be_recorded, graphed, has_room
from prefix_tuning.multimodal_families import MULTIMODAL
from prefix_tuning.stacks import attention_kinds, part_shapes

CACHE = ALL_CACHE_NAMES[0]  # the argument's name, which transformers 5.24 changed
IMAGES = ("mm_encoder_outputs", "pixel_values", "pixel_values_videos")  # the first since transformers 5.24
LEAST_REPLAYED = 16  # new tokens: for fewer, recording a step takes about as long as it saves
LONGEST = 8192  # tokens that a row may come to: where nobody named an end, most of the cache would stay empty
MOST_OF_MEMORY = 0.5  # of what is free


class OwnCache:
    """_prepare_cache_for_generation of a model with a prefix."""

    def __init__(self, model: nn.Module):
        self.model, self._prepare = model, model._prepare_cache_for_generation

    def __call__(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], generation_mode: GenerationMode,
        batch_size: int, max_cache_length: int,
    ) -> None:  # fmt: skip
        """As the model's own: puts a cache among model_kwargs, if generate is to make one. Where steps over it are replayed,
        the call reads late whether all rows have ended."""
        given = model_kwargs.get(CACHE) is not None
        deferred_stops.begin(model_kwargs.get(CACHE))
        self._prepare(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        grows = not given and type(model_kwargs.get(CACHE)) is DynamicCache
        fit = self._gains(generation_config, max_cache_length) if grows else can_be_recorded(model_kwargs.get(CACHE))
        if not fit or not self._replays(generation_config, generation_mode):
            return
        if grows:
            cache = StaticCache(config=self.model.config.get_text_config(decoder=True), max_cache_len=max_cache_length)
            rows = batch_size * generation_config.num_return_sequences
            fits = self._bytes(rows, max_cache_length) <= MOST_OF_MEMORY * free_bytes(self.model.device)
            if fits and can_be_recorded(cache) and not self._has_unfit_images(model_kwargs):
                model_kwargs[CACHE] = cache
        cache = model_kwargs.get(CACHE)
        if can_be_recorded(cache) and has_room(cache, max_cache_length):
            deferred_stops.expect(cache, self.model.device)

    def _replays(self, config: GenerationConfig, mode: GenerationMode) -> bool:
        """Whether steps over a static cache would be replayed."""
        one_token_each = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        return one_token_each and not (config.compile_config or config.disable_compile) and graphed(self.model) is not None

    def _gains(self, config: GenerationConfig, length: int) -> bool:
        """Whether a static cache would be nobody's but generate's, and its steps be replayed often enough."""
        asked = config.cache_implementation or config.return_dict_in_generate
        often = length <= LONGEST and (config.max_new_tokens or config.max_length) >= LEAST_REPLAYED
        return not asked and often and "ALiBi" not in attention_kinds(self.model.config)

    def _has_unfit_images(self, model_kwargs: dict[str, Any]) -> bool:
        family = MULTIMODAL.get(self.model.config.model_type)
        unfit = family is not None and not family.images_in_static_caches
        return unfit and any(model_kwargs.get(name) is not None for name in IMAGES)

    def _bytes(self, rows: int, length: int) -> int:
        shape = part_shapes(self.model.config)["decoder"]
        sizes = (shape.of(layer) for layer in range(shape.layers))
        numbers = sum(kv_heads * (head_dim + value_dim) for kv_heads, head_dim, value_dim in sizes)
        return rows * length * numbers * self.model.dtype.itemsize


def free_bytes(device: torch.device) -> float:
    """Memory that can still be had on a GPU."""
    if device.type != "cuda":
        return math.inf
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
