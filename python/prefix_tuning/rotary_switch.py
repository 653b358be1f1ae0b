"""Phi-3's generate behind a prefix: from some position on its tokens have other rotary factors, and the cache has to go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, update_wrapper
from typing import Any

from torch import Tensor

from prefix_tuning.positions import cache_of

OffsetOf = Callable[[Tensor, Mapping[str, Any]], int | Tensor]


def dropping_cache(prepare: Callable, switch: int, offset_of: OffsetOf) -> Callable:
    """A prepare_inputs_for_generation that drops the cache where the rows come to have more than `switch` positions.

    The model's own, `prepare`, counts tokens: it knows of no prefix.

    Args:
        offset_of: how many positions stand before each row, an int or int [rows], from input_ids and the other arguments.
    """
    prepared = partial(_prepared, prepare, switch, offset_of)
    return update_wrapper(prepared, prepare, assigned=("__module__", "__name__", "__qualname__", "__doc__"), updated=())


def _prepared(
    prepare: Callable, switch: int, offset_of: OffsetOf, input_ids: Tensor, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    cache, mask = cache_of(kwargs), kwargs.get("attention_mask")
    seen = 0 if cache is None else int(cache.get_seq_length())
    if seen:
        tokens = input_ids.new_ones(input_ids.shape) if mask is None else mask
        positions = int((tokens.sum(-1) + offset_of(input_ids, kwargs)).max())
        if positions - (input_ids.shape[1] - seen) <= switch < positions:
            kwargs |= {name: None for name in ("cache", "past_key_values", "next_sequence_length") if name in kwargs}
    return prepare(input_ids, *args, **kwargs)
