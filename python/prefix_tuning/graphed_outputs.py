"""Training steps as CUDA graphs for who calls a model with labels and gets its outputs: the model's own loss, and logits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from prefix_tuning import cuda_graphs
from prefix_tuning.data import IGNORED, without_idle_mask
from prefix_tuning.graphed_training import GraphedSteps, Rows, load_labels

SERVED = {"input_ids", "labels", "attention_mask", "num_items_in_batch", "use_cache", "return_dict"}
GIVEN = {"loss", "logits"}  # the outputs of a replayed step
NOT_MADE = {"past_key_values", "cache"}  # the outputs that it leaves out


class GraphedOutputs(GraphedSteps):
    """The recorded calls of a frozen causal model with labels.

    outputs() gives what the model would, except for the cache, which training has no use for. Only the loss has a gradient: a
    backward pass that reaches the logits raises NotImplementedError.
    """

    def outputs(self, arguments: Mapping[str, Any]) -> ModelOutput | None:
        """What the model gives for its arguments; None where this call has to run as it is."""
        given = {name: value for name, value in arguments.items() if value is not None}
        labels, ids = given.get("labels"), given.get("input_ids")
        if not given.keys() <= SERVED or given.get("use_cache") or not given.get("return_dict", self._model.config.return_dict):
            return None
        inputs = {name: given[name] for name in ("input_ids", "attention_mask") if name in given}
        if labels is None or not self.serves(inputs) or labels.shape != ids.shape or labels.device != ids.device:
            return None
        modes = self._modes()
        if modes is None:
            return None
        masked = "attention_mask" in without_idle_mask(given, wait=True)
        if not masked:
            inputs = {"input_ids": ids}
        count, length = given.get("num_items_in_batch"), ids.shape[1]
        shape = (len(ids), self._padded(length), count is not None, masked, modes)
        make_rows, what = partial(Rows, shape[:2], ids.device, masked), partial(_LossAndLogits, shape, ids.device)
        step = self._step(shape, make_rows, what)
        if step is None:
            return None
        step.load(inputs, labels, count)
        loss, logits = step.replay()
        return step.what.kind(loss=loss, logits=logits[:, :length])


class _LossAndLogits:
    """What a model gives for labels.

    Args:
        shape: (rows, length, whether the loss is divided by a number of items, …).
    """

    def __init__(self, shape: tuple, device: torch.device):
        rows, length, counts, *_ = shape
        self.kind: type[ModelOutput] | None = None
        self.labels = torch.full((rows, length), IGNORED, device=device)
        self.count = torch.ones((), device=device) if counts else None

    def run(self, model: nn.Module, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        counted = {} if self.count is None else {"num_items_in_batch": self.count}
        outputs = model(labels=self.labels, use_cache=False, return_dict=True, **counted, **inputs)
        found = {name for name, value in outputs.items() if value is not None} - NOT_MADE
        if found != GIVEN:
            raise cuda_graphs.CaptureError(
                f"expected loss and logits, got {type(outputs).__name__} with {', '.join(sorted(found))}"
            )
        self.kind = type(outputs)
        return outputs.loss, outputs.logits

    def load(self, labels: Tensor, count: Tensor | int | None) -> None:
        load_labels(self.labels, labels)
        if isinstance(count, Tensor):
            self.count.copy_(count.reshape(()))
        elif count is not None:
            self.count.fill_(count)
