"""Calls of generate for the tests of replayed steps: prompts, options, a prefix or a bank attached."""

import inspect

import torch
from transformers import LlamaForCausalLM

from prefix_tuning import PrefixBank, attach_prefix
from support.models import random_prefix

CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
STATIC = {"cache_implementation": "static"}
KINDS = ("prefix", "bank")


def ids(batch=2, length=7, seed=1):
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(batch=2, length=7, seed=1):
    """input_ids and an attention_mask whose first row is padded on the left."""
    input_ids = ids(batch, length, seed)
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


def bank_of(model, **options):
    return PrefixBank({"short": random_prefix(model, 3), "long": other_prefix(model, 6)}, **options)


def other_prefix(model, prefix_len=5):
    prefix = random_prefix(model, prefix_len)
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.copy_(parameter.flip(-1) * 1.5)
    return prefix


def attach(model, kind, **options):
    """A prefix attached, alone or in a bank, and what calls of the model then need for so many rows."""
    if kind == "prefix":
        return attach_prefix(model, random_prefix(model), **options), lambda rows: {}
    names = ["long", None, "short"]
    return attach_prefix(model, bank_of(model), **options), lambda rows: {"prefix_ids": names[:rows]}


def on_gpu(call):
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in call.items()}
