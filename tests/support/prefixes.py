"""Prefixes made by hand for tests of Prefix, and what a model caches to compare them with."""

import torch
from transformers import DynamicCache

from prefix_tuning import Prefix
from support.generation import CACHE
from support.models import tiny_model

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # a matrix product over other tokens may round differently


def cached(model, ids):
    """Of each layer what a plain forward pass over `ids` caches, all tokens of it: (key, value) [kv_heads, tokens, dim]."""
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=True, **{CACHE: cache})
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def assert_layers(got, expected, **tolerance):
    for got_pair, expected_pair in zip(got, expected, strict=True):
        torch.testing.assert_close(list(got_pair), list(expected_pair), **tolerance or {"atol": 0, "rtol": 0})


def pairs(layers=2, kv_heads=2, prefix_len=3, head_dim=4, value_dim=4, dtype=torch.float32):
    return [
        (torch.randn(kv_heads, prefix_len, head_dim).to(dtype), torch.randn(kv_heads, prefix_len, value_dim).to(dtype))
        for _ in range(layers)
    ]


def mlp_prefix(model=None, **options):
    options = {"reparametrization": "mlp", "hidden_size": 8, "seed": 0, **options}
    return Prefix.for_model(model or tiny_model("llama"), 5, **options)
