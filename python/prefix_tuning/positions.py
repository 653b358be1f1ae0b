"""Where the tokens of a sequence stand when a prefix stands in front of it."""

from __future__ import annotations

import torch
from torch import Tensor


def new_tokens(arguments: dict) -> Tensor:
    """input_ids [batch, q_len] or inputs_embeds [batch, q_len, hidden_size] of a call; ValueError where it has neither."""
    tokens = arguments.get("input_ids")
    if tokens is None:
        tokens = arguments.get("inputs_embeds")
    if tokens is None:
        raise ValueError("input_ids: expected input_ids or inputs_embeds, got neither")
    return tokens


def sequence_positions(arguments: dict) -> Tensor:
    """Positions of the new tokens in their sequence, without the prefix: [batch or 1, q_len].

    With a 2-D attention mask, padding takes no position: cumsum(mask) − 1 over cache and input, not below 0. Without one,
    counting starts at the cache's length.
    """
    tokens = new_tokens(arguments)
    q_len, mask = tokens.shape[1], arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -q_len:].to(tokens.device)
    cache = arguments.get("cache", arguments.get("past_key_values"))
    seen = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(q_len, device=tokens.device) + seen)[None]


def check_learned_positions(positions: Tensor, table: int) -> None:
    """ValueError where positions [batch or 1, q_len], behind the prefix, pass the end of a model's position embeddings."""
    if positions.device.type != "cpu" or torch.compiler.is_compiling() or positions.numel() == 0:
        return
    last = int(positions.max())
    if last >= table:
        raise ValueError(
            f"position_ids: prefix and sequence together take {last + 1} positions, more than the model's {table} position "
            "embeddings"
        )
