"""What a model is for, as far as training, generating and scoring differ by it."""

from __future__ import annotations

from enum import Enum

from torch import nn

from prefix_tuning.stacks import part_shapes


class Task(Enum):
    """To write text, after a text or from another, or whatever the model's own loss says."""

    CAUSAL = "causal"
    ENCODER_DECODER = "encoder-decoder"
    OWN_LOSS = "own loss"


def task_of(model: nn.Module) -> Task:
    """A model with an output embedding writes text, unless it is an encoder alone."""
    parts = part_shapes(model.config)
    if "decoder" not in parts or model.get_output_embeddings() is None:
        return Task.OWN_LOSS
    return Task.ENCODER_DECODER if "cross" in parts else Task.CAUSAL
