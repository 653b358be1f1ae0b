"""Rows in which several sequences lie one behind the other: where each begins, instead of a mask over all pairs of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function

from prefix_tuning.shapes import checked_int

NEEDS_PADDING = "needs padded rows (in PrefixTrainer padding_free=False)"


@dataclass(eq=False)
class Pack:
    """The sequences of all batch · length tokens, in their order; what the tokens of padding are is a sequence too.

    Attributes:
        taken: whether a mask has been made of it.
    """

    cu_seqlens: Tensor  # int32 [sequences + 1]: from 0, never falling, to batch · length
    max_seqlen: int  # at least the length of the longest
    batch: int
    length: int
    parent: Tensor | None = None  # int32 [sequences]: an earlier sequence that this one goes on from, or −1
    taken: bool = False

    @classmethod
    def of(cls, sequence: Tensor) -> Pack:
        """The sequences of rows that hold several. Waits for the device.

        Args:
            sequence: int [batch, length], another number wherever another sequence begins.
        """
        begins = torch.ones_like(sequence, dtype=torch.bool)
        begins[:, 1:] = sequence.diff(dim=1) != 0
        starts = begins.flatten().nonzero()[:, 0]
        cu_seqlens = torch.cat([starts, starts.new_full((1,), sequence.numel())])
        longest = int(cu_seqlens.diff().max()) if sequence.numel() else 0
        return cls(cu_seqlens.to(torch.int32), longest, *sequence.shape)

    @classmethod
    def of_batch(
        cls, cu_seqlens: Tensor | None, max_seqlen: int | None, parent: Tensor | None, inputs: Mapping[str, Any]
    ) -> Pack:
        """Of a batch that PaddingFreeCollator has made.

        Args:
            inputs: its other tensors.

        Raises ValueError or TypeError for another.
        """
        if cu_seqlens is None or max_seqlen is None:
            raise ValueError("cu_seqlens, max_seqlen: expected both, as PaddingFreeCollator makes them, got one or a parent")
        for name, value in (("cu_seqlens", cu_seqlens), ("parent", parent)):
            if value is not None and (value.dim() != 2 or len(value) != 1):
                raise ValueError(f"{name}: expected one row, [1, …], as PaddingFreeCollator makes it, got {list(value.shape)}")
        max_seqlen = checked_int("max_seqlen", max_seqlen, at_least=0)
        for name in ("input_ids", "position_ids"):
            shape = None if inputs.get(name) is None else list(inputs[name].shape)
            if shape is None or len(shape) != 2 or shape[0] != 1:
                raise ValueError(f"{name}: expected [1, tokens] beside cu_seqlens, got {shape}")
        if inputs.get("attention_mask") is not None:
            raise ValueError("attention_mask: expected none beside cu_seqlens, which says what each token sees, got one")
        return cls(cu_seqlens[0], max_seqlen, *inputs["input_ids"].shape, None if parent is None else parent[0])

    def check_taken(self) -> None:
        """NotImplementedError where the model has made its masks without it, so that its rows have seen each other."""
        if not self.taken:
            raise NotImplementedError(
                "cu_seqlens: the model made its attention masks without them, as one that is compiled does, or one around "
                f"which something copies the attention mask; it {NEEDS_PADDING}"
            )

    def to(self, *args, **kwargs) -> Pack:
        parent = None if self.parent is None else self.parent.to(*args, **kwargs)
        return replace(self, cu_seqlens=self.cu_seqlens.to(*args, **kwargs), parent=parent)

    def rows(self) -> Tensor:
        """The batch row of each sequence, int64 [sequences]."""
        return (self.cu_seqlens[:-1].long() // self.length).clamp(max=self.batch - 1)

    def hidden(self, window: int | None) -> Tensor:
        """Bool [batch, 1, length, length]: the keys that a query may not attend to, causally and within a window.

        NotImplementedError where sequences go on from another.
        """
        if self.parent is not None:
            raise NotImplementedError(
                "parent: what rows share is not served where a mask over all pairs of tokens is needed, as for a prefix that "
                "slides out of a window; PaddingFreeCollator(share=False)"
            )
        token = torch.arange(self.batch * self.length, device=self.cu_seqlens.device, dtype=torch.int32)
        sequence = torch.searchsorted(self.cu_seqlens, token, right=True).view(self.batch, self.length)
        distance = token[: self.length, None] - token[: self.length]
        hidden = (sequence[:, :, None] != sequence[:, None, :]) | (distance < 0)
        return (hidden if window is None else hidden | (distance >= window))[:, None]


_current: ContextVar[Pack | None] = ContextVar("current", default=None)


@contextmanager
def packed(pack: Pack) -> Iterator[None]:
    """Within, a causal mask without padding is one of these sequences, but in code that is traced."""
    token = _current.set(pack)
    try:
        yield
    finally:
        _current.reset(token)


def current_pack() -> Pack | None:
    """That of the block `packed` around the call."""
    return _current.get()


def taken_apart(mask_function: Callable) -> tuple[Callable, Tensor | None]:
    """What transformers makes of position_ids that start anew within a row: the mask function of one sequence, and the number
    of each token's sequence, int [batch or 1, length]; (mask_function, None) for any other mask."""
    parts = _closed_over(mask_function, "mask_functions") if _same_code(mask_function, _AND) else None
    if not parts or len(parts) != 2 or not _same_code(parts[1], _PACKED):
        return mask_function, None
    within = parts[0]
    if getattr(within, "__qualname__", "").startswith("remap_positions_for_packed_sequence."):  # from transformers 5.24 on
        within = _closed_over(within, "mask_function")
    return within, _closed_over(parts[1], "packed_sequence_mask")


_AND = and_masks(causal_mask_function)
_PACKED = packed_sequence_mask_function(torch.empty(0))


def _same_code(one: Callable, other: Callable) -> bool:
    return getattr(one, "__code__", None) is other.__code__


def _closed_over(function: Callable, name: str):
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents
