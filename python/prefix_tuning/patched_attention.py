"""Families whose modules write their attention out instead of calling transformers' interface: what replaces it.

REPLACEMENTS names, for an attention class, the method that is replaced on each of its instances while a prefix is attached.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers import Cache
from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

from prefix_tuning.attention import prefix_attention_forward
from prefix_tuning.masks import MaskStructure, dense_structure
from prefix_tuning.positions import cache_of

Mask: TypeAlias = MaskStructure | Tensor | None  # as in prefix_attention_forward


def bloom_forward(
    module: nn.Module, hidden_states: Tensor, residual: Tensor, alibi: Tensor | None, attention_mask: Mask,
    layer_past: Cache | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    out, _ = prefix_attention_forward(
        module, query, key, value, attention_mask, scaling=module.inv_norm_factor, dropout=_rate(module.attention_dropout),
        bias=alibi_bias(attention_mask, key, module.layer_prefix.key, hidden_states.dtype, module.num_heads),
    )  # fmt: skip
    return dropout(module.dense(out.flatten(2)), module.hidden_dropout, module.training) + residual, None


def falcon_forward(
    module: nn.Module, hidden_states: Tensor, alibi: Tensor | None, attention_mask: Mask, position_ids: Tensor | None = None,
    layer_past: Cache | None = None, position_embeddings: tuple[Tensor, Tensor] | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    query, key, value = (t.transpose(1, 2) for t in module._split_heads(module.query_key_value(hidden_states)))
    if not module.config.alibi:
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    bias = None
    if module.config.alibi:
        bias = alibi_bias(
            attention_mask, key, module.layer_prefix.key, hidden_states.dtype, module.num_heads, torch.bfloat16,
            module.inv_norm_factor,
        )  # fmt: skip
    out, _ = prefix_attention_forward(
        module, query, key, value, attention_mask, scaling=module.inv_norm_factor, bias=bias,
        dropout=_rate(module.attention_dropout) if module.config.alibi else 0.0,
    )  # fmt: skip
    return module.dense(out.flatten(2)), None


def mpt_forward(
    module: nn.Module, hidden_states: Tensor, position_bias: Tensor | None, attention_mask: Mask = None, **kwargs: Any
) -> tuple[Tensor, None]:
    cache = cache_of(kwargs)
    qkv = module.Wqkv(hidden_states)
    if module.clip_qkv:
        qkv = qkv.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (t.unflatten(2, (module.n_heads, module.head_dim)).transpose(1, 2) for t in qkv.chunk(3, dim=2))
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx)
    out, _ = prefix_attention_forward(
        module, query, key, value, attention_mask, scaling=module.softmax_scale,
        dropout=module.attn_dropout_p if module.training else 0.0,
        bias=alibi_bias(attention_mask, key, module.layer_prefix.key, torch.float32, module.n_heads),
    )  # fmt: skip
    return module.out_proj(out.flatten(2)), None


def gpt_neo_attn(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Mask = None
) -> tuple[Tensor, None]:
    if module.attention_type == "local":
        mask = dense_structure(attention_mask) if isinstance(attention_mask, Tensor) else attention_mask
        attention_mask = mask.once("local", partial(replace, mask, causal=True, window=module.config.window_size))
    return _attn(module, query, key, value, attention_mask, scaling=1.0)


def gptj_attn(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Mask = None) -> tuple[Tensor, None]:
    return _attn(module, query, key, value, attention_mask, scaling=module.head_dim**-0.5)


def xglm_forward(
    module: nn.Module, hidden_states: Tensor, key_value_states: Tensor | None = None, cache: Cache | None = None,
    attention_mask: Mask = None, past_key_values: Cache | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    cache = past_key_values if cache is None else cache  # renamed in transformers 5.24
    query, key, value = (
        projection(hidden_states).unflatten(2, (module.num_heads, module.head_dim)).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx)
    out, _ = prefix_attention_forward(
        module, query, key, value, attention_mask, scaling=module.scaling, dropout=module.dropout if module.training else 0.0
    )
    return module.out_proj(out.flatten(2)), None


REPLACEMENTS = {
    "BloomAttention": ("forward", bloom_forward),
    "FalconAttention": ("forward", falcon_forward),
    "CodeGenAttention": ("_attn", gptj_attn),  # until transformers 5.23
    "GPTJAttention": ("_attn", gptj_attn),  # until transformers 5.23
    "GPTNeoSelfAttention": ("_attn", gpt_neo_attn),
    "MptAttention": ("forward", mpt_forward),
    "XGLMAttention": ("forward", xglm_forward),
}


def replacement(module: nn.Module) -> dict[str, Callable]:
    """The method of an attention module that must be replaced and by what, {} for one that calls transformers' interface.

    Raises NotImplementedError for a module that neither calls it nor is known here: it would not see the prefix.
    """
    name, function = REPLACEMENTS.get(type(module).__name__, ("", None))
    if hasattr(module, name):
        return {name: partial(function, module)}
    if "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(module).forward).__code__.co_names:
        return {}
    raise NotImplementedError(f"model: {type(module).__name__} does not call transformers' attention interface")


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """Slope of each head, float32 [heads] (Press et al. 2022, section 3; for other counts than powers of two as BLOOM)."""
    count = 1 << (heads - 1).bit_length()
    slopes = 2.0 ** (-8.0 / count * torch.arange(1, count + 1, dtype=torch.float32, device=device))
    return slopes if count == heads else torch.cat([slopes[1::2], slopes[::2]])[:heads]


def alibi_bias(
    mask: MaskStructure | Tensor, key: Tensor, prefix_key: Tensor, dtype: torch.dtype, heads: int,
    slope_dtype: torch.dtype = torch.float32, factor: float = 1.0,
) -> Tensor:  # fmt: skip
    """ALiBi's bias with the prefix right in front of each row's first real token, float32 [batch or 1, heads, 1, P + kv_len].

    Args:
        dtype, slope_dtype: those to which the family rounds it and its slopes.
        factor: by which it is multiplied after that.
    """
    if isinstance(mask, Tensor) or mask.bias is not None or mask.pack is not None:
        raise NotImplementedError("attention_mask: dense masks and packed rows are not served with ALiBi")
    prefix_len, kv_len = prefix_key.shape[-2], key.shape[-2]

    def bias() -> Tensor:
        if mask.key_mask is None:
            positions = torch.arange(prefix_len + kv_len, device=key.device)[None]
        else:
            keys = (mask.key_mask.cumsum(-1) - 1).clamp(min=0) + prefix_len
            prefix = torch.arange(prefix_len, device=key.device).expand(len(keys), -1)
            positions = torch.cat([prefix, keys], dim=-1)
        slopes = alibi_slopes(heads, key.device).to(slope_dtype)[:, None, None]
        return (slopes * positions[:, None, None]).to(dtype).float() * factor

    return mask.once(("alibi", prefix_len, kv_len), bias)


def _attn(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float) -> tuple[Tensor, None]:
    """The method of that name: out [batch, heads, q_len, head_dim] without attention weights."""
    dropout_rate = _rate(module.attn_dropout)
    out, _ = prefix_attention_forward(module, query, key, value, mask, scaling=scaling, dropout=dropout_rate)
    return out.transpose(1, 2), None


def _rate(layer: nn.Dropout) -> float:
    return layer.p if layer.training else 0.0
