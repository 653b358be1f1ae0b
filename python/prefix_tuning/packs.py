"""Rows in which several sequences lie one behind the other: where each begins, instead of a mask over all pairs of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function


@dataclass(eq=False)
class Pack:
    """The sequences of all batch · length tokens, in their order; what the tokens of padding are is a sequence too."""

    cu_seqlens: Tensor  # int32 [sequences + 1]: from 0, never falling, to batch · length
    max_seqlen: int  # at least the length of the longest
    batch: int
    length: int
    parent: Tensor | None = None  # int32 [sequences]: an earlier sequence that this one goes on from, or −1

    @classmethod
    def of(cls, sequence: Tensor) -> Pack:
        """sequence: int [batch, length], another number wherever another sequence begins. Waits for the device."""
        begins = torch.ones_like(sequence, dtype=torch.bool)
        begins[:, 1:] = sequence.diff(dim=1) != 0
        starts = begins.flatten().nonzero()[:, 0]
        cu_seqlens = torch.cat([starts, starts.new_full((1,), sequence.numel())])
        longest = int(cu_seqlens.diff().max()) if sequence.numel() else 0
        return cls(cu_seqlens.to(torch.int32), longest, *sequence.shape)

    def to(self, *args, **kwargs) -> Pack:
        parent = None if self.parent is None else self.parent.to(*args, **kwargs)
        return replace(self, cu_seqlens=self.cu_seqlens.to(*args, **kwargs), parent=parent)

    def rows(self) -> Tensor:
        """The batch row of each sequence, int64 [sequences]."""
        return (self.cu_seqlens[:-1].long() // self.length).clamp(max=self.batch - 1)

    def hidden(self, window: int | None) -> Tensor:
        """Bool [batch, 1, length, length]: the keys that a query may not attend to, causally and within a window."""
        token = torch.arange(self.batch * self.length, device=self.cu_seqlens.device, dtype=torch.int32)
        sequence = torch.searchsorted(self.cu_seqlens, token, right=True).view(self.batch, self.length)
        distance = token[: self.length, None] - token[: self.length]
        hidden = (sequence[:, :, None] != sequence[:, None, :]) | (distance < 0)
        return (hidden if window is None else hidden | (distance >= window))[:, None]


_current: ContextVar[Pack | None] = ContextVar("current", default=None)


@contextmanager
def packed(pack: Pack | None) -> Iterator[None]:
    """Within, a causal mask without padding is one of these sequences. What is compiled runs as it was written: a traced mask
    function cannot ask for them."""
    token = _current.set(pack)
    try:
        with torch.compiler.set_stance("force_eager"):
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
