"""T5's relative position bias, extended over a prefix that stands right before the sequence."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn


def prefix_bias(attention: nn.Module, arguments: dict, prefix_len: int) -> Tensor:
    """The bias of a prefix's columns at −prefix_len … −1 for a stack's new tokens, [1, heads, q_len, prefix_len].

    The bias depends on distances alone, so it is the same for a prefix at 0 … prefix_len − 1 and a sequence behind it.

    attention: the self-attention of the first layer, whose table all layers share.
    arguments: of the stack's forward pass, by name.
    """
    tokens = arguments.get("input_ids")
    if tokens is None:
        tokens = arguments["inputs_embeds"]
    table = attention.relative_attention_bias
    if table.weight.requires_grad and torch.is_grad_enabled():
        _warn_no_gradient()
    cache = arguments.get("cache", arguments.get("past_key_values"))
    seen = 0 if cache is None else cache.get_seq_length()
    columns = torch.arange(-prefix_len, 0, device=table.weight.device)
    queries = torch.arange(tokens.shape[1], device=table.weight.device) + seen
    buckets = attention._relative_position_bucket(
        columns[None] - queries[:, None],
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return table(buckets).detach().permute(2, 0, 1)[None]


def _warn_no_gradient() -> None:
    warnings.warn(
        "relative_attention_bias gets no gradient where a prefix is attached; model.requires_grad_(False) freezes the model",
        UserWarning,
        stacklevel=3,
    )
