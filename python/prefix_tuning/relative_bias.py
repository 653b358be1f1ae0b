"""T5's relative position bias, extended over a prefix that stands right before each row."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from prefix_tuning.positions import cache_of, new_tokens, token_mask


def prefix_bias(attention: nn.Module, arguments: dict, width: int, prefix_lens: Tensor | int) -> Tensor:
    """The bias of a prefix's columns for a stack's new tokens, [batch or 1, heads, q_len, width].

    The columns stand right before each row's first real token. The bias depends on distances alone, so it is the same for
    columns at −prefix_len … −1 and at 0 … prefix_len − 1 with the sequence behind them.

    Args:
        attention: the self-attention of the first layer, whose table all layers share.
        arguments: of the stack's forward pass, by name.
        width: how many columns there are.
        prefix_lens: how many of them, from the first, a prefix has; with a bank int [batch, 1, 1], of each row.
    """
    table = attention.relative_attention_bias
    if table.weight.requires_grad and torch.is_grad_enabled():
        _warn_no_gradient()
    cache = cache_of(arguments)
    seen = 0 if cache is None else cache.get_seq_length()
    if isinstance(prefix_lens, Tensor):
        prefix_lens = prefix_lens.to(table.weight.device)
    columns = torch.arange(width, device=table.weight.device) - prefix_lens  # [width], of a bank [batch, 1, width]
    queries = (torch.arange(new_tokens(arguments).shape[1], device=table.weight.device) + seen)[None]
    mask = token_mask(arguments)
    if mask is not None and (torch.compiler.is_compiling() or not bool(mask[:, 0].all())):
        queries = queries - mask.to(queries.device).bool().to(torch.uint8).argmax(-1)[:, None]
    buckets = attention._relative_position_bucket(
        columns - queries[:, :, None],
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return table(buckets).detach().permute(0, 3, 1, 2)


def _warn_no_gradient() -> None:
    warnings.warn(
        "relative_attention_bias gets no gradient where a prefix is attached; model.requires_grad_(False) freezes the model",
        UserWarning,
        stacklevel=3,
    )
