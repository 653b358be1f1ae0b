"""The configs of a model with a prefix attached: copies of its own, another model may share those, that name our attention."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from prefix_tuning.attention import ATTENTION_NAME
from prefix_tuning.multimodal_families import unwrapped_config
from prefix_tuning.stacks import Stack


class AttachedConfigs:
    """The copies in place of the configs of attached stacks and of the modules around them, from insert() to remove().

    What stays as it is keeps its own: other stacks, towers for images. The model's own config stands for its decoder or its
    text model.
    """

    def __init__(self, model: nn.Module, attached: Sequence[Stack], untouched: Sequence[Stack]):
        changed = {module for stack in attached for module in stack.module.modules()}
        if not any("decoder" in stack.attention for stack in untouched):
            changed |= {module for module in model.modules() if not changed.isdisjoint(module.modules())}
        self._own = [
            (module, module.config)
            for module in model.modules()
            if module in changed and isinstance(getattr(module, "config", None), PreTrainedConfig)
        ]
        self._copies: list[tuple[PreTrainedConfig, PreTrainedConfig, dict[str, Any]]] = []  # own, copy, the copy's attributes

    def insert(self) -> None:
        copies: dict[int, Any] = {}
        for module, own in self._own:
            module.config = copied = copy.deepcopy(own, copies)
            within = {} if unwrapped_config(own) is own else {"": ATTENTION_NAME, "text_config": ATTENTION_NAME}
            copied._attn_implementation = within or ATTENTION_NAME
        distinct = {id(own): (own, module.config) for module, own in self._own}
        self._copies = [(own, copied, copy.deepcopy(vars(copied))) for own, copied in distinct.values()]

    def remove(self) -> None:
        """The model's own again, with what was changed in the copies meanwhile, as resize_token_embeddings does."""
        for own, copied, before in self._copies:
            for name, value in vars(copied).items():
                kept = name.startswith("_attn_implementation") or isinstance(value, PreTrainedConfig)
                if not kept and (name not in before or value != before[name]):
                    vars(own)[name] = value
        for module, own in self._own:
            module.config = own
        self._copies = []
