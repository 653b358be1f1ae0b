"""Gradient checkpointing for a model in eval mode: layers are recomputed in the backward pass, dropout stays off.

transformers recomputes a layer only while the layer is in training mode, which would also switch on dropout that the layer
itself applies. Here training mode opens the way to the recomputation and is off again before the layer's own code runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from prefix_tuning.shapes import checked_int


class LayerCheckpointing:
    """Recomputes every `every_n_layers`-th layer of `model` within `active()`; undo() leaves the model as it was.

    Args:
        options: of torch.utils.checkpoint.checkpoint. use_reentrant=True is refused: nothing that enters the first layer of a
            frozen model requires a gradient, so the reentrant kind would give the prefix none.

    Raises ValueError for a model that checkpoints otherwise than by GradientCheckpointingLayer, and for wrong options.
    """

    def __init__(self, model: nn.Module, every_n_layers: int = 1, **options: Any):
        if options.setdefault("use_reentrant", False):
            raise ValueError("use_reentrant: expected False, got True; the reentrant kind gives a prefix no gradient")
        every_n_layers = checked_int("every_n_layers", every_n_layers, at_least=1)
        self.layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)][::every_n_layers]
        if not self.layers:
            raise ValueError(f"model: {type(model).__name__} has no layers that can be recomputed (gradient checkpointing)")
        self._before = [{name: vars(layer)[name] for name in _FLAGS if name in vars(layer)} for layer in self.layers]
        for layer in self.layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(_recompute, layer, options)

    @contextmanager
    def active(self) -> Iterator[None]:
        for layer in self.layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in self.layers:
                layer.training = False

    def undo(self) -> None:
        for layer, before in zip(self.layers, self._before, strict=True):
            for name in _FLAGS:
                vars(layer).pop(name, None)
            vars(layer).update(before)


_FLAGS = ("gradient_checkpointing", "_gradient_checkpointing_func")


def _recompute(layer: nn.Module, options: dict[str, Any], function, *args: Any) -> Any:
    return checkpoint(partial(_run_in_eval, layer, function), *args, **options)


def _run_in_eval(layer: nn.Module, function, *args: Any) -> Any:
    training, layer.training = layer.training, False
    try:
        return function(*args)
    finally:
        layer.training = training
