"""What a prefix must share with the model it is for: layers, heads and their sizes; and the checks of what it is made of."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

PARTS = ("decoder", "encoder", "cross")

Layers = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ModelShape:
    """What a prefix must share with the model it is for. A size that differs between layers is a tuple with that of each."""

    layers: int
    kv_heads: int | tuple[int, ...]
    head_dim: int | tuple[int, ...]
    value_dim: int | tuple[int, ...]

    def __post_init__(self):
        for name in ("kv_heads", "head_dim", "value_dim"):
            sizes = getattr(self, name)
            if not isinstance(sizes, int):
                if len(sizes) != self.layers:
                    raise ValueError(f"{name}: expected one for each of {self.layers} layers, got {len(sizes)} of them")
                object.__setattr__(self, name, sizes[0] if len(set(sizes)) == 1 else tuple(sizes))

    def of(self, layer: int) -> tuple[int, int, int]:
        """kv_heads, head_dim and value_dim of one layer."""
        sizes = (self.kv_heads, self.head_dim, self.value_dim)
        return tuple(size if isinstance(size, int) else size[layer] for size in sizes)

    @property
    def uniform(self) -> bool:
        """Whether all layers are alike."""
        return all(isinstance(size, int) for size in (self.kv_heads, self.head_dim, self.value_dim))

    def __str__(self) -> str:
        value = "" if self.value_dim == self.head_dim else f", value_dim {self.value_dim}"
        return f"{self.layers} layers, {self.kv_heads} kv_heads, head_dim {self.head_dim}{value}"


def standard_shape(config) -> ModelShape:
    """The shape for a transformers config whose layers are all alike and cache num_key_value_heads heads of head_dim.

    Raises ValueError for a config without the number of layers, heads or the hidden size.
    """
    layers, heads, hidden_size = (
        getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    if not (layers and heads and hidden_size):
        raise ValueError(
            f"config: expected positive numbers in {type(config).__name__}, got num_hidden_layers {layers}, "
            f"num_attention_heads {heads}, hidden_size {hidden_size}"
        )
    head_dim = getattr(config, "head_dim", None) or hidden_size // heads
    return ModelShape(layers, getattr(config, "num_key_value_heads", None) or heads, head_dim, head_dim)


def falcon_shape(config) -> ModelShape:
    """Falcon caches one head with multi_query, and with its new architecture the keys and values of every query head."""
    shape = standard_shape(config)
    one_head = config.multi_query and not config.new_decoder_architecture
    return replace(shape, kv_heads=1 if one_head else config.num_attention_heads)


def mla_shape(config) -> ModelShape:
    """Multi-head latent attention: what the latents are expanded to, where values may be shorter than keys."""
    key_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    return ModelShape(config.num_hidden_layers, config.num_attention_heads, key_dim, config.v_head_dim)


def full_attention_shape(config) -> ModelShape:
    """Where only some layers have attention: a prefix for those. NotImplementedError where none has."""
    return replace(standard_shape(config), layers=_layers_with_attention(config))


def kimi_linear_shape(config) -> ModelShape:
    """Where only some layers have attention, and that is latent."""
    return replace(mla_shape(config), layers=_layers_with_attention(config))


def _layers_with_attention(config) -> int:
    layers = config.layer_types.count("full_attention")
    if not layers:
        raise NotImplementedError(f"config: nothing would see a prefix, as {type(config).__name__} has no layer with attention")
    return layers


def gemma3n_shape(config) -> ModelShape:
    """Gemma 3n's last layers use the keys of earlier ones."""
    shape = standard_shape(config)
    return replace(shape, layers=shape.layers - config.num_kv_shared_layers)


def gemma4_shape(config) -> ModelShape:
    """Gemma 4's global layers have larger heads than its local ones, and its last layers use the keys of earlier ones."""
    own = list(config.per_layer_config)[: config.num_hidden_layers - config.num_kv_shared_layers]
    head_dims = [layer.head_dim for layer in own]
    return ModelShape(len(own), [layer.num_key_value_heads for layer in own], head_dims, head_dims)


def mimo_shape(config) -> ModelShape:
    """MiMo has twice as many keys and values in layers with a window, and values of another size than keys."""
    shape = standard_shape(config)
    kv_heads = [shape.kv_heads * (2 if kind == "sliding_attention" else 1) for kind in config.layer_types]
    return replace(shape, kv_heads=kv_heads, value_dim=config.v_head_dim)


def checked_int(name: str, value: Any, at_least: int) -> int:
    """Whatever can be an index, as an int, but no bool and no tensor: reading it may stop a device."""
    try:
        number = operator.index(None if isinstance(value, (bool, Tensor)) else value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {value!r}") from None
    if number < at_least:
        raise ValueError(f"{name}: expected at least {at_least}, got {number}")
    return number


def checked_number(name: str, value: Any) -> float:
    """A real number as a float, but no bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return float(value)


def check_model(model: Any) -> None:
    if not (isinstance(model, nn.Module) and hasattr(model, "config")):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")


def check_dtype(dtype: Any) -> None:
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating torch.dtype such as torch.float32, got {dtype!r}")


def check_layers(part: str, layers: Sequence[tuple[Tensor, Tensor]]) -> tuple[ModelShape, int]:
    """The shape and prefix_len of the pairs; they agree in all but heads and dims, which may differ between layers."""
    if not layers:
        raise ValueError(f"parts: expected at least one layer of {part}, got none")
    found = [(tuple(key.shape), tuple(value.shape), key.dtype, value.dtype) for key, value in layers]
    agree = all(len(key) == len(value) == 3 and key[:2] == value[:2] and min(key + value) > 0 for key, value, *_ in found)
    dtypes = {dtype for _, _, *both in found for dtype in both}
    if not agree or len({key[1] for key, *_ in found}) > 1 or len(dtypes) > 1 or not dtypes.pop().is_floating_point:
        raise ValueError(
            f"parts: expected of each layer of {part} non-empty [kv_heads, prefix_len, head_dim] and [kv_heads, prefix_len, "
            f"value_dim], of one prefix_len and one floating dtype in all, got {sorted(set(map(str, found)))}"
        )
    kv_heads, head_dims, value_dims = zip(*((key[0], key[2], value[2]) for key, value, *_ in found), strict=True)
    return ModelShape(len(layers), kv_heads, head_dims, value_dims), found[0][0][1]
