"""The function that a patched attention module calls: prefix_attention with what the module's layer holds of a prefix."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from prefix_kernels import prefix_attention, prefix_attention_varlen
from prefix_tuning.masks import MaskStructure, dense_structure, mask_structure

ATTENTION_NAME = "prefix_tuning"


class LayerPrefix:
    """What one attention module holds: its layer's key and value, refreshed each forward pass while reparametrised.

    What differs from call to call comes as an argument instead: several threads may call the model at once, and gradient
    checkpointing recomputes a layer when other calls have been made since.
    """

    def __init__(
        self, prefix: Any, backend: str | None, slides: bool, warned: set[str], query_scale: Callable | None = None,
        relative: bool = False, first_position: int = 0, bank_layer: int | None = None,
    ):  # fmt: skip
        self.prefix = prefix  # whose keys and values these are
        self.bank_layer = bank_layer  # which layer of a bank, whose tensors a call takes itself; None: not a bank
        self.backend = backend
        self.slides = slides
        self.warned = warned  # of what, one set for all layers of a model
        self.query_scale = query_scale  # of the family
        self.relative = relative  # positions are a bias by distance, which has columns for the prefix too
        self.first_position = first_position  # of a sequence without a prefix
        self.position_offset = 0
        self.switched_off = False
        self.key: Tensor | None = None  # [kv_heads, prefix_len, head_dim]
        self.value: Tensor | None = None

    def offset(self, prefix_ids: Tensor | None) -> int | Tensor:
        """Where the positions of the sequence start, with a bank those of each row [batch, 1]."""
        offset = self.position_offset if self.bank_layer is None else self.prefix.position_offsets(prefix_ids)
        return offset + self.first_position

    def taken(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Key, value, and of a bank, whose tensors have an axis [prefixes, …] more, the lengths int32 [prefixes].

        They are a bank's as it is now, and fit each other: a prefix that another thread adds may have it take others.
        """
        if self.bank_layer is None:
            return self.key, self.value, None
        storage = self.prefix.storage
        key, value = storage.keys[self.bank_layer], storage.values[self.bank_layer]
        return key, value, storage.prefix_lens.to(key.device)

    def __deepcopy__(self, memo: dict) -> LayerPrefix:
        """A copy of the model has its own; what was produced for a forward pass is not a part of that pass any more."""
        memo[id(self)] = copied = copy.copy(self)
        for name, value in vars(self).items():
            produced = isinstance(value, Tensor) and not value.is_leaf
            setattr(copied, name, copy.deepcopy(value.detach() if produced else value, memo))
        return copied


def prefix_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: MaskStructure | Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None, position_bias: Tensor | None = None,
    prefix_bias: Tensor | None = None, s_aux: Tensor | None = None, bias: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface: prefix_attention with the module's own prefix.

    Args:
        query: [batch, heads, q_len, head_dim]; key, value: [batch, kv_heads, kv_len, head_dim], cache included.
        attention_mask: from mask_structure, or a 4-D mask of the caller's.
        position_bias, prefix_bias: [1, heads, q_len, kv_len] and [batch or 1, heads, q_len, prefix_len], of the keys and of the
            prefix; heeded where positions are a bias, for T5's cross-attention is given zeros and the other's prefix_bias.
        s_aux: [heads], attention sinks: a score beside those of the keys that has no value.
        bias: beside the mask, broadcastable to [batch, heads, q_len, prefix_len + kv_len].
        kwargs: with a bank attached, prefix_ids int32 [batch].

    Returns:
        (out [batch, q_len, heads, head_dim], None).
    """
    layer: LayerPrefix | None = getattr(module, "layer_prefix", None)
    if layer is None:
        raise ValueError(
            f"config: this {type(module).__name__} has that of a model with a prefix attached, but no prefix itself; make the "
            "model of a config from before attach_prefix or after detach"
        )
    if dropout and "dropout" not in layer.warned:
        layer.warned.add("dropout")
        warnings.warn("attention dropout is not applied where a prefix is attached", UserWarning, stacklevel=2)
    mask, prefix_ids = attention_mask, None if layer.bank_layer is None else kwargs.get("prefix_ids")
    if mask is None:
        mask = MaskStructure(causal=kwargs.get("is_causal") is not False and getattr(module, "is_causal", True))
    elif isinstance(mask, Tensor):
        mask = dense_structure(mask)
    if layer.query_scale is not None:
        last = key.shape[2] if mask.key_lens is None else mask.key_lens[:, None]
        indices = torch.arange(-query.shape[2], 0, device=query.device)[None] + last + mask.key_offset
        factor = layer.query_scale(module, indices, layer.offset(prefix_ids))
        query = query if factor is None else (query * factor[:, None, :, None]).to(query.dtype)
    (prefix_key, prefix_value, prefix_lens), dtype = layer.taken(), query.dtype
    if prefix_key.device != query.device:  # of one MLP for layers in several places, or of no columns, which nobody moves
        if layer.bank_layer is not None:
            raise ValueError(
                f"prefix_ids: a layer of the model is on {query.device}, but what the bank has for it on {prefix_key.device}; "
                "attach the bank after moving the model"
            )
        prefix_key, prefix_value = prefix_key.to(query.device), prefix_value.to(query.device)
    if prefix_key.dtype is not dtype and (prefix_key.dtype is not torch.float32 or dtype is torch.float64):
        prefix_key, prefix_value = prefix_key.to(dtype), prefix_value.to(dtype)
    if mask.pack is not None:
        if not layer.relative and bias is None and not (layer.slides and mask.window):
            prefix = prefix_key, prefix_value, prefix_lens
            return _attend_in_packs(layer, query, key, value, *prefix, mask, scaling, softcap, s_aux, prefix_ids), None
        mask = mask.once("unpacked", mask.unpacked)
    first_key_position = None
    if bias is not None or mask.bias is not None or layer.relative or layer.slides:
        lengths, ids = (query.shape[2], key.shape[2], prefix_key.shape[-2]), (kwargs.get("position_ids"), prefix_ids)
        biases = (bias, prefix_bias, position_bias) if layer.relative else (bias,)
        first_key_position, bias = mask.once(
            (lengths, dtype), lambda: _bias(layer, mask, query, lengths, *ids, *biases), *biases
        )
    out = prefix_attention(
        query, key, value, prefix_key, prefix_value, causal=mask.causal, scale=scaling, key_mask=mask.key_mask,
        key_lens=mask.key_lens, window=mask.window, softcap=softcap, bias=bias,
        prefix_ids=prefix_ids, prefix_lens=prefix_lens, first_key_position=first_key_position,
        backend=layer.backend, return_lse=s_aux is not None,
    )  # fmt: skip
    if s_aux is None:
        return out.transpose(1, 2), None
    out, lse = out
    return _through_sinks(out.transpose(1, 2), lse.transpose(1, 2), s_aux), None


def _attend_in_packs(
    layer: LayerPrefix, query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor,
    prefix_lens: Tensor | None, mask: MaskStructure, scaling: float | None, softcap: float | None, s_aux: Tensor | None,
    prefix_ids: Tensor | None,
) -> Tensor:  # fmt: skip
    """prefix_attention_forward where rows hold several sequences: each attends to the prefix and to itself."""
    pack = mask.pack
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))  # [batch · length, heads, …]
    out = prefix_attention_varlen(
        q, k, v, prefix_key, prefix_value, cu_seqlens_q=pack.cu_seqlens, cu_seqlens_k=pack.cu_seqlens,
        max_seqlen_q=pack.max_seqlen, max_seqlen_k=pack.max_seqlen, parent=pack.parent, scale=scaling, window=mask.window,
        softcap=softcap, prefix_ids=None if prefix_ids is None else prefix_ids[pack.rows()], prefix_lens=prefix_lens,
        backend=layer.backend, return_lse=s_aux is not None,
    )  # fmt: skip
    if s_aux is not None:
        out, lse = out
        out = _through_sinks(out, lse.T, s_aux)
    return out.unflatten(0, (pack.batch, pack.length))


def _bias(
    layer: LayerPrefix, mask: MaskStructure, query: Tensor, lengths: tuple[int, int, int], position_ids: Tensor | None,
    prefix_ids: Tensor | None, bias: Tensor | None, prefix_bias: Tensor | None = None, position_bias: Tensor | None = None,
) -> tuple[int | None, Tensor | None]:  # fmt: skip
    """prefix_attention's first_key_position and bias: all that is added to scores together.

    Args:
        lengths: q_len, kv_len, prefix_len.
    """
    q_len, kv_len, prefix_len = lengths
    if prefix_bias is not None:
        unseen = prefix_len - prefix_bias.shape[-1]  # columns of a prefix that a bank was given since
        own_bias = position_bias.detach().expand(len(prefix_bias), -1, -1, -1)
        bias = torch.cat([pad(prefix_bias, (0, unseen)), own_bias], dim=-1)
    dtype = query.dtype if bias is None else torch.float32  # of the sum
    if layer.slides:
        own_len = prefix_len if layer.bank_layer is None else layer.prefix.lens_of(prefix_ids)[:, None]
        positions = None if position_ids is None else position_ids - layer.offset(prefix_ids)
        first, mask_bias = mask.sliding(prefix_len, own_len, positions, q_len, kv_len, dtype, query.device)
    else:
        first, mask_bias = None, mask.bias_over(prefix_len, dtype)
    if mask_bias is not None:
        bias = mask_bias if bias is None else bias + mask_bias
    return first, None if bias is None else _in_rows_of_eight(bias)


def _in_rows_of_eight(bias: Tensor) -> Tensor:
    """The same bias in rows of a multiple of eight columns, head by head: so Triton kernels read it where it lies."""
    return pad(bias.contiguous(), (0, -bias.shape[-1] % 8))[..., : bias.shape[-1]]


def _through_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """out [..., heads, value_dim] where each head has one more score, `sinks` [heads], without a value; lse [..., heads]."""
    return (out * torch.sigmoid(lse - sinks)[..., None]).to(out.dtype)


AttentionInterface.register(ATTENTION_NAME, prefix_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, mask_structure)
