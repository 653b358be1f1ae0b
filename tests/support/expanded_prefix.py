"""What a patched model must equal: its own eager attention over keys and values with the prefix expanded and concatenated."""

from contextlib import contextmanager

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

NAME = "expanded_prefix"


@contextmanager
def expanded_prefix(model, prefix, modules, **starts):
    """The plain model with the prefix in front of every layer's keys and values.

    modules: of each part its attention modules in the order of the layers.
    starts: of "encoder" and "decoder" where the first real token is in each row of its input, if that is not 0 in all.
    """
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}.values()
    before = [config._attn_implementation for config in configs]
    for part in prefix.parts:
        for module, pair in zip(modules[part], prefix.layers(part), strict=True):
            module.expanded_prefix, module.starts = pair, starts.get(part, (0,))
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield model
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        for part in prefix.parts:
            for module in modules[part]:
                del module.expanded_prefix, module.starts


def _attention(module, query, key, value, attention_mask, scaling=None, position_bias=None, softcap=None, **kwargs):
    q_len, kv_len = query.shape[2], key.shape[2]
    prefix_len = 0
    if hasattr(module, "expanded_prefix"):
        prefix_key, prefix_value = (tensor.to(query.dtype) for tensor in module.expanded_prefix)
        prefix_len = prefix_key.shape[1]
        key = torch.cat([prefix_key.expand(len(key), -1, -1, -1), key], 2)
        value = torch.cat([prefix_value.expand(len(value), -1, -1, -1), value], 2)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None and prefix_len:
        table = getattr(module, "bias_table", None)  # cross-attention has none, and no positions
        if table is None:
            position_bias = 0
        else:  # as if the prefix stood in the cache, and each row right behind it
            behind = prefix_len + (kv_len - q_len if module.is_decoder else 0)
            before = [table.compute_bias(q_len, prefix_len, past_seen_tokens=behind - start) for start in module.starts]
            position_bias = torch.cat([torch.cat(before), position_bias.expand(len(before), -1, -1, -1)], -1)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + torch.nn.functional.pad(attention_mask, (prefix_len, 0))
    return (scores.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)
