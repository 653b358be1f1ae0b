"""The keys and values which a model caches for a text: what a prefix can start from, or be."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from prefix_tuning.devices import execution_device
from prefix_tuning.families import FAMILIES, model_shape
from prefix_tuning.multimodal_families import MULTIMODAL, unwrapped_config
from prefix_tuning.shapes import Layers, check_layers
from prefix_tuning.stacks import part_shapes, stacks, text_config

CHUNK = 1024  # tokens run at once: beside the cache, memory grows with CHUNK × tokens and not with tokens²


def cached_layers(model: nn.Module, input_ids: Tensor | Sequence[int]) -> Layers:
    """The keys and values that the model caches for the tokens, in eval mode and its own dtype, whatever torch.autocast says;
    its modules' modes are put back.

    The tokens run in chunks over the model's own cache and no logits are computed, so that a text of 65536 tokens takes
    little more than its cache. Under LongRoPE it is one chunk: what positions are rotated by is decided for each call.
    """
    if hasattr(model, "get_base_model"):  # a PeftModel, whose layers have its adapters
        model = model.get_base_model()
    ids = checked_ids(model, input_ids)
    if list(part_shapes(model.config)) != ["decoder"]:
        raise NotImplementedError(
            f"model: expected a causal model, which has the keys and values of a text, got {type(model).__name__}"
        )

    device = execution_device(model)
    with torch.no_grad(), torch.autocast(device.type, enabled=False), evaluating(model):
        cache = _cache_of(model, ids[None].to(device))
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        modules = stacks(model)[0].attention["decoder"] if unwrapped_config(model.config).model_type in FAMILIES else []
        if modules and hasattr(modules[0], "expand_kv"):  # latent attention caches what keys and values are made from
            layers = [module.expand_kv(*latent) for module, latent in zip(modules, layers, strict=True)]
    layers = [(key[0], value[0]) for key, value in layers]
    expected, found = model_shape(model.config), check_layers("decoder", layers)
    if found != (expected, len(ids)):
        raise ValueError(
            f"model: expected {len(ids)} cached tokens, {expected}, by its config, got {found[1]} tokens, {found[0]}"
        )
    return layers


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; its modules' modes are put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def checked_ids(model: nn.Module, input_ids: Tensor | Sequence[int]) -> Tensor:
    """The tokens as ints [tokens]; ValueError for such as the model does not know or has no room for, and where a prefix is
    attached to it."""
    ids = torch.as_tensor(input_ids)
    ids = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
    if ids.dim() != 1 or not len(ids) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"input_ids: expected one or more ints [tokens], got {ids.dtype} of shape {list(ids.shape)}")
    known = model.get_input_embeddings().weight.shape[0]
    if ids.min() < 0 or ids.max() >= known:
        raise ValueError(f"input_ids: expected 0 … {known - 1}, got {ids.min()} … {ids.max()}: is it another tokenizer's?")
    positions = getattr(text_config(model.config), "max_position_embeddings", None)
    if positions is not None and len(ids) > positions:
        raise ValueError(f"input_ids: expected at most the model's {positions} positions, got {len(ids)} tokens")
    if any(hasattr(module, "layer_prefix") for module in model.modules()):
        raise ValueError("model: it has a prefix attached, which the text would see; detach that first")
    return ids


def _cache_of(model: nn.Module, ids: Tensor) -> DynamicCache:
    """The model's cache after ids [1, tokens], CHUNK of them at a time, with all tokens also where attention has a window."""
    backbone = getattr(model, "base_model", model)
    if backbone is model and hasattr(model, "get_decoder"):  # Llama 4 around its text model, head included
        backbone = model.get_decoder()
    own = DynamicCache(config=model.config.get_text_config())
    others = {type(layer).__name__ for layer in own.layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)}
    others.discard("DummyLayer")  # that of a layer which uses the keys of another
    if others:
        raise NotImplementedError(
            f"model: a text leaves more than keys and values in a {type(model).__name__}: its cache has {', '.join(others)}"
        )
    cache = DynamicCache()  # without the config, which would have it forget what a window has passed
    arguments = inspect.signature(backbone.forward).parameters
    name = "cache" if "cache" in arguments else "past_key_values"  # renamed in transformers 5.24
    masks = getattr(MULTIMODAL.get(model.config.model_type), "mask_argument", None)
    for chunk in ids.split(ids.shape[1] if "longrope" in _rope_types(model.config) else CHUNK, dim=1):
        causal = {} if masks is None else {masks: torch.ones_like(chunk)}
        backbone(input_ids=chunk, use_cache=True, return_dict=True, **{name: cache}, **causal)
    return cache


def _rope_types(config) -> set[str]:
    """How positions are rotated in the model's layers."""
    rope = getattr(text_config(config), "rope_parameters", None) or {}
    kinds = [rope, *rope.values()]  # one, or one for each kind of layer
    return {kind["rope_type"] for kind in kinds if isinstance(kind, dict) and "rope_type" in kind}
