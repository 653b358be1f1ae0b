"""Where the tokens of a sequence stand when a prefix stands in front of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def new_tokens(arguments: dict) -> Tensor:
    """input_ids [batch, q_len] or inputs_embeds [batch, q_len, hidden_size] of a call; ValueError where it has neither."""
    tokens = arguments.get("input_ids")
    if tokens is None:
        tokens = arguments.get("inputs_embeds")
    if tokens is None:
        raise ValueError("input_ids: expected input_ids or inputs_embeds, got neither")
    return tokens


def cache_of(arguments: dict) -> Any:
    """The cache of a call, None for none."""
    return arguments.get("cache", arguments.get("past_key_values"))  # renamed in transformers 5.24


def token_mask(arguments: dict) -> Tensor | None:
    """The mask [batch, tokens] of a call, also where generate has made others of it for a static cache; None for none."""
    mask = arguments.get("attention_mask")
    if isinstance(mask, Mapping):  # for each kind of layer
        mask = next(iter(mask.values()), None)
    mask = getattr(mask, "tokens", mask)
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def sequence_positions(arguments: dict) -> Tensor:
    """Positions of the new tokens in their sequence, without the prefix: [batch or 1, q_len].

    With a 2-D attention mask, padding (0) takes no position: cumsum(mask ≠ 0) − 1 over cache and input, not below 0. Such a
    mask may be as long as a static cache, with columns for tokens to come. Without one, counting starts at the cache's length.
    """
    tokens, cache = new_tokens(arguments), cache_of(arguments)
    q_len, mask = tokens.shape[1], token_mask(arguments)
    seen = 0 if cache is None else cache.get_seq_length()  # a static one's is a tensor
    if mask is None:
        return (torch.arange(q_len, device=tokens.device) + seen)[None]
    positions, last = (mask.bool().cumsum(-1) - 1).clamp(min=0).to(tokens.device), mask.shape[1] - q_len
    if isinstance(seen, Tensor):
        return positions[:, torch.arange(q_len, device=tokens.device) + seen.clamp(max=last)]
    begin = max(0, min(seen, last))
    return positions[:, begin : begin + q_len]


def check_learned_positions(positions: Tensor, table: int) -> None:
    """ValueError where positions [batch or 1, q_len], behind the prefix, pass the end of a model's table of positions."""
    if positions.device.type != "cpu" or torch.compiler.is_compiling() or positions.numel() == 0:
        return
    last = int(positions.max())
    if last >= table:
        raise ValueError(
            f"position_ids: expected at most the model's {table} position embeddings for prefix and sequence together, got "
            f"{last + 1} positions"
        )


def shift_embeddings(embeddings: nn.Module, offset_now: Callable[[], int]) -> RemovableHandle:
    """Moves a stack's tokens by an offset in its module of position embeddings, which is told how many tokens a cache holds.

    Remove the handle to undo it. A table of embeddings that is too short: ValueError, when it is called.
    """
    names = list(inspect.signature(type(embeddings).forward).parameters)[1:]
    length = next(name for name in names if name in ("cache_length", "past_key_values_length"))  # renamed in transformers 5.24

    return embeddings.register_forward_pre_hook(partial(_shifted, offset_now, names, length), with_kwargs=True)


def _shifted(
    offset_now: Callable[[], int], names: list[str], length: str, module: nn.Module, args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    offset, seen, positions = offset_now(), kwargs.get(length, 0), kwargs.get("position_ids")
    if positions is not None:
        kwargs["position_ids"] = positions = positions + offset
    if isinstance(module, nn.Embedding):
        if positions is None:
            tokens = kwargs[names[0]]
            positions = torch.arange((tokens.shape if isinstance(tokens, Tensor) else tokens)[1]) + seen + offset
        check_learned_positions(positions, module.num_embeddings - getattr(module, "offset", 0))
    kwargs[length] = seen + offset
    return (), kwargs


def llama4_query_scale(module: nn.Module, indices: Tensor, offset: int | Tensor) -> Tensor | None:
    """What the queries of a layer without rotary positions lack where `offset` positions stand before their sequence.

    Llama 4 raises the temperature of such layers with the index of the query in the cache, which doesn't hold the prefix.

    Args:
        indices: int [batch or 1, q_len]; offset: an int, or int [batch, 1].

    Returns:
        A factor [batch or 1, q_len], None for layers that do no such thing.
    """
    if module.use_rope or not module.attn_temperature_tuning:
        return None

    def temperature(position: Tensor) -> Tensor:
        return torch.log1p(torch.floor((position.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0

    return temperature(indices + offset) / temperature(indices)
