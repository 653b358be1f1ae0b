"""Passes without gradients that come between another pass and its backward pass, such as DPO's reference.

Under gradient checkpointing that backward pass recomputes layers, with whatever prefix they then hold.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from prefix_tuning.attention import LayerPrefix
from prefix_tuning.stacks import Stack


class PassesBeside:
    """Gives layers back, after passes that are not differentiated, what they held before the first of these."""

    def __init__(self) -> None:
        # By stack, during such passes: how many there are, and what the layers held before.
        self._kept: dict[int, tuple[int, list[tuple[LayerPrefix, Tensor, Tensor, int]]]] = {}

    def __bool__(self) -> bool:
        """Whether any is under way."""
        return bool(self._kept)

    def begin(self, stack: Stack, first_layer: nn.Module, layers: Iterable[LayerPrefix]) -> None:
        """Before a pass through a stack: `layers` are those of its attention."""
        if _is_beside(first_layer):
            passes, held = self._kept.get(id(stack), (0, None))
            held = [(layer, layer.key, layer.value, layer.position_offset) for layer in layers] if held is None else held
            self._kept[id(stack)] = passes + 1, held

    def end(self, stack: Stack, first_layer: nn.Module) -> None:
        """After a pass that ended, or ended in an error."""
        if not self._kept or not _is_beside(first_layer) or id(stack) not in self._kept:
            return
        passes, held = self._kept.pop(id(stack))
        if passes > 1:
            self._kept[id(stack)] = passes - 1, held
            return
        for layer, *before in held:
            layer.key, layer.value, layer.position_offset = before


def _is_beside(first_layer: nn.Module) -> bool:
    """Whether a pass may come between another and its backward pass."""
    differentiated = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return not differentiated and getattr(first_layer, "gradient_checkpointing", False)
