"""What a model with a prefix must compute, by two ways that have nothing of ours: the prefix as past_key_values, as PEFT gives
it; or, where a family cannot take that, an eager attention over the concatenation.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from prefix_tuning.families import attention_modules, shared_attention


def first_position(model):
    """What a model gives its first token as position."""
    return 1 if model.config.model_type == "paligemma" else 0


def text_model(model):
    """The model of a language model, inside of any wrapper. ModernBERT calls its head decoder."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


def prefix_cache(model, prefix, batch):
    """The prefix as PEFT gives it: copied per row into a cache. Gradients flow back to it."""
    cache = DynamicCache(config=model.config)
    for index, (key, value) in enumerate(prefix.layers()):
        cache.update(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), index)
    return cache


class PastKeyValues:
    """The plain model over [prefix as past_key_values ; input_ids]; a window slides over the prefix."""

    window = "peft"

    def forward(self, model, prefix, input_ids, mask=None, **kwargs):
        batch, _ = input_ids.shape
        mask = torch.ones_like(input_ids) if mask is None else mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0) + prefix.position_offset + first_position(model)
        if model.config.model_type not in ("bloom", "mpt"):  # they have no positions but those of their bias
            kwargs["position_ids"] = positions
        mask = torch.cat([mask.new_ones(batch, prefix.prefix_len), mask], 1)
        return model(input_ids=input_ids, attention_mask=mask, past_key_values=prefix_cache(model, prefix, batch), **kwargs)

    def generate(self, model, prefix, input_ids, **options):
        dummies = torch.cat([input_ids[:, :1].expand(-1, prefix.prefix_len), input_ids], 1)  # the cache stands for the first
        with torch.no_grad():
            cache = prefix_cache(model, prefix, len(input_ids) * options.get("num_beams", 1))
        mask = torch.ones_like(dummies)
        return model.generate(input_ids=dummies, attention_mask=mask, past_key_values=cache, **options)[:, prefix.prefix_len :]


class PastInsideTheWindow(PastKeyValues):
    """The same for GPT-Neo, whose local layers hold their window as a table: there the past is made visible to every query."""

    window = "pinned"

    def forward(self, model, prefix, input_ids, **kwargs):
        modules = attention_modules(model)
        before = [module.bias for module in modules]
        for module in modules:
            module.bias = module.bias.clone()
            module.bias[..., prefix.prefix_len :, : prefix.prefix_len] = True
        try:
            return super().forward(model, prefix, input_ids, **kwargs)
        finally:
            for module, bias in zip(modules, before, strict=True):
                module.bias = bias


class Concatenation:
    """Eager attention over [prefix ; keys], every query of which sees the whole prefix; for transformers' interface alone."""

    window = "pinned"

    def forward(self, model, prefix, input_ids, **kwargs):
        with self._attached(model, prefix):
            return model(input_ids=input_ids, **kwargs)

    def generate(self, model, prefix, input_ids, **options):
        with self._attached(model, prefix):
            return model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options)

    @contextmanager
    def _attached(self, model, prefix):
        def shift(module, args, kwargs):
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            seen = 0 if cache is None else cache.get_seq_length()
            tokens = next(value for value in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if value is not None)
            positions = kwargs.get("position_ids")  # a wrapper of the text model may have counted
            positions = torch.arange(tokens.shape[1])[None] + seen if positions is None else positions
            return args, {**kwargs, "position_ids": positions + prefix.prefix_len}

        config, modules = model.config.get_text_config(), attention_modules(model)
        before = config._attn_implementation
        config._attn_implementation = "concatenation"
        for module, pair in zip(modules, prefix.layers(), strict=True):
            module.reference_prefix = pair
        for module, source in shared_attention(model).items():
            module.reference_prefix = source.reference_prefix
            modules.append(module)
        hook = text_model(model).register_forward_pre_hook(shift, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            config._attn_implementation = before
            for module in modules:
                del module.reference_prefix


def concatenated(module, query, key, value, attention_mask, scaling, softcap=None, s_aux=None, **kwargs):
    groups, prefix_len = query.shape[1] // key.shape[1], module.reference_prefix[0].shape[1]
    key, value = (
        torch.cat([own.expand(len(query), -1, -1, -1), tensor], 2).repeat_interleave(groups, 1)
        for own, tensor in zip(module.reference_prefix, (key, value), strict=True)
    )
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~pad(attention_mask, (prefix_len, 0), value=True), -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux[:, None, None].expand(len(query), -1, query.shape[2], 1)], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("concatenation", concatenated)
AttentionMaskInterface.register(
    "concatenation", lambda *args, **kwargs: sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
)
