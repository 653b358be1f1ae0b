"""The keys and values that the attention of encoders and encoder-decoders computes for a text, which no cache holds."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from prefix_tuning.devices import execution_device
from prefix_tuning.shapes import Layers
from prefix_tuning.stacks import stacks
from prefix_tuning.text_cache import checked_ids, evaluating

RECORDING = "prefix_tuning_recording"


def computed_layers(model: nn.Module, input_ids: Sequence[int]) -> dict[str, Layers]:
    """Of each part the keys and values for the tokens, in eval mode and the model's own dtype; the model is put back as it was.

    An encoder-decoder reads the tokens with its encoder and again with its decoder, which sees what the encoder made of them.

    Raises NotImplementedError for an encoder that reads no text, ValueError for tokens that the model does not know.
    """
    if model.main_input_name != "input_ids":
        raise NotImplementedError(f"init: the encoder of {type(model).__name__} reads {model.main_input_name}, not text")
    ids, every = checked_ids(model, input_ids)[None].to(execution_device(model)), stacks(model)
    arguments = {"input_ids": ids} if len(every) == 1 else {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    configs = {id(m.config): m.config for m in model.modules() if isinstance(getattr(m, "config", None), PreTrainedConfig)}
    before = {config_id: config._attn_implementation for config_id, config in configs.items()}
    modules = {part: found for stack in every for part, found in stack.attention.items()}
    try:
        for config in configs.values():
            config._attn_implementation = RECORDING
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False), evaluating(model):
            model.base_model(**arguments, return_dict=True)
        return {part: [module.recorded for module in found] for part, found in modules.items()}
    finally:
        for config_id, config in configs.items():
            config._attn_implementation = before[config_id]
        for module in model.modules():
            vars(module).pop("recorded", None)


def _recording_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
    """The model's own eager attention; the module holds the first row's keys and values, [kv_heads, tokens, dim]."""
    module.recorded = (key[0], value[0])
    return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, *args, **kwargs)


AttentionInterface.register(RECORDING, _recording_attention)
AttentionMaskInterface.register(RECORDING, eager_mask)
