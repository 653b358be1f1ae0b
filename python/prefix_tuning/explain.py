"""Which backends serve the attention calls of a model, and why, before any is made: tensors of their sizes alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from prefix_kernels import explain_backends
from prefix_tuning.shapes import ModelShape
from prefix_tuning.stacks import attention_kinds, part_shapes, text_config


def explain_training(
    model: nn.Module, prefix_dtype: torch.dtype, *, batch: int, length: int, prefix_len: int, backend: str | None = None
) -> dict[str, str]:
    """`explain_backends` for a training step of this model: a padded batch of `length` tokens behind a prefix; of an
    encoder-decoder, the decoder's self-attention; where layers are of several kinds, that of the first."""
    parameter, shapes = next(model.parameters()), part_shapes(model.config)
    shape, options = shapes["decoder" if "decoder" in shapes else "encoder"], next(iter(attention_kinds(model.config).values()))
    return explain_attention(
        parameter.device, parameter.dtype, prefix_dtype, shape, heads=heads_of(model.config), batch=batch, q_len=length,
        kv_len=length, prefix_len=prefix_len, backend=backend, **options,
    )  # fmt: skip


def heads_of(config: PretrainedConfig) -> int:
    """Heads of a text layer; of an encoder-decoder, the decoder's."""
    config = text_config(config)
    return getattr(config, "decoder_attention_heads", None) or config.num_attention_heads


def explain_attention(
    device: torch.device | str, dtype: torch.dtype, prefix_dtype: torch.dtype, shape: ModelShape, *, heads: int, batch: int,
    q_len: int, kv_len: int, prefix_len: int, layer: int = 0, bias: bool = False, **options: Any,
) -> dict[str, str]:  # fmt: skip
    """The same for one call with layer `layer`'s sizes.

    Args:
        options: of the attention operation.
    """
    kv_heads, head_dim, value_dim = shape.of(layer)
    q = torch.empty(batch, heads, q_len, head_dim, device=device, dtype=dtype)
    k, v = (torch.empty(batch, kv_heads, kv_len, dim, device=device, dtype=dtype) for dim in (head_dim, value_dim))
    prefix = [torch.empty(kv_heads, prefix_len, dim, device=device, dtype=prefix_dtype) for dim in (head_dim, value_dim)]
    key_mask = torch.ones(batch, kv_len, device=device, dtype=torch.bool)
    columns = torch.empty(1, heads, q_len, prefix_len + kv_len, device=device, dtype=dtype) if bias else None
    return explain_backends(q, k, v, *prefix, key_mask=key_mask, bias=columns, **options)
