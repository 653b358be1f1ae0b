"""The attention mask as structure: what a transformers model would build as a dense mask, told in a few fields.

Registered as transformers' mask function for our attention; the model hands its result to every layer's attention call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from prefix_tuning.packs import Pack, current_pack, taken_apart

T = TypeVar("T")


@dataclass(eq=False)
class MaskStructure:
    """Which keys a query may attend to, in the terms of prefix_attention.

    It travels where transformers expects a mask tensor, so it answers `ndim` and `shape` as a 4-D mask does.
    """

    causal: bool
    window: int | None = None
    key_mask: Tensor | None = None  # bool [batch, kv_len]
    key_lens: Tensor | None = None  # int [batch]: the fill of a static cache
    key_offset: int | Tensor = 0  # absolute index of the first key, for a window that slides over the prefix
    # [batch or 1, heads or 1, q_len, kv_len], for every other pattern: bool, True where a query may attend, or added to scores.
    bias: Tensor | None = None
    chunk: int | None = None  # the bias is one of chunks of that many tokens
    local: int | None = None  # the bias is one of a causal window of that many tokens, and of packed rows or the like
    opaque: bool = False  # whether the bias is one of such a window could not be seen
    tokens: Tensor | None = None  # bool [batch, tokens seen so far]: which are real; None where all are, or starts says enough
    starts: Tensor | None = None  # int [batch]: the index of each row's first real token
    pack: Pack | None = None  # the sequences that causality and window are meant within
    ndim: int = 4
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)  # by once; no copy has it

    def once(self, what: Hashable, make: Callable[[], T], *made_of: Tensor | None) -> T:
        """What make() gives, made once for all layers of a forward pass: each pass has masks of its own (fitting_mask).

        Args:
            made_of: objects that may differ from layer to layer; held, lest others get their ids.
        """
        if torch.compiler.is_compiling():
            return make()
        key = what, *map(id, made_of)
        if key not in self._made:
            self._made[key] = make(), made_of
        return self._made[key][0]

    @property
    def shape(self) -> tuple[None, None, None, None]:
        return (None, None, None, None)

    def contiguous(self) -> MaskStructure:
        return self

    def to(self, *args, **kwargs) -> MaskStructure:
        """As a tensor's: accelerate brings a layer's arguments to where the layer computes. MPT asks for a dtype: unheeded."""
        if args and isinstance(args[0], torch.dtype):
            return self
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor | Pack)}
        return replace(self, **{name: tensor.to(*args, **kwargs) for name, tensor in tensors.items()}) if tensors else self

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """Whoever computes with it as with a tensor is the model's own attention, where this one was to be."""
        raise ValueError(
            "backward(): the prefix was detached before it, and gradient checkpointing recomputes the layers as they now are; "
            "call backward() first"
        )

    @property
    def device(self) -> torch.device | None:
        """Where its tensors are, None if it has none."""
        return next((value.device for value in vars(self).values() if isinstance(value, Tensor)), None)

    def __getitem__(self, index: tuple[slice, ...]) -> MaskStructure:
        """The mask of the last queries alone: mask[:, :, -n:, :], as models drop queries whose output nobody asks for."""
        everything = slice(None)
        batch, heads, rows, keys = index
        if (batch, heads, keys, rows.stop, rows.step) != (everything, everything, everything, None, None):
            raise NotImplementedError(f"attention_mask: cannot be taken apart by {index}")
        mask = self if self.pack is None else self.unpacked()
        return mask if mask.bias is None else replace(mask, bias=mask.bias[:, :, rows])

    def unpacked(self) -> MaskStructure:
        """The same mask with a bias over all pairs of tokens in place of the pack."""
        return MaskStructure(causal=False, bias=~self.pack.hidden(self.window), local=self.window)

    def unchanging(self, slides: bool, device: torch.device) -> MaskStructure:
        """The same mask of tensors that keep their shapes from one step with a static cache to the next.

        Args:
            slides: whether sliding() is to be asked, which alone reads where keys and rows start.
        """
        if not slides:
            return replace(self, key_offset=0, tokens=None)
        offset = self.key_offset
        if not isinstance(offset, Tensor) and offset:
            offset = torch.full((), offset, device=device)
        return replace(self, key_offset=offset, tokens=None, starts=self._starts())

    def bias_over(self, prefix_len: int, dtype: torch.dtype) -> Tensor | None:
        """What is added to scores, with prefix_len columns of 0 in front: every query sees the prefix. In dtype where that is
        exact, else float32."""
        if self.bias is None:
            return None
        if self.bias.dtype == torch.bool:
            return pad(_hiding(~self.bias, dtype), (prefix_len, 0))
        return pad(self.bias.to(dtype if self.bias.dtype == dtype else torch.float32), (prefix_len, 0))

    def sliding(
        self, prefix_len: int, own_len: int | Tensor, positions: Tensor | None, q_len: int, kv_len: int, dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[int | None, Tensor | None]:  # fmt: skip
        """How a prefix slides out of sight, as under PEFT: prefix_attention's first_key_position, and its bias.

        The prefix stands right before each row's first real token: padding in front of that counts to no window or chunk.

        Args:
            own_len: how long each row's prefix is, [batch, 1], or all of them.
            positions: of the queries in their sequences, [batch or 1, q_len], which packed rows need.
            dtype: of the scores.
        """
        if self.opaque and prefix_len:
            raise NotImplementedError("prefix_window: 'peft' is not served by torch.compile for masks that a model composes")
        window = self.local or (self.window if self.causal else None)
        stays = self.chunk is None and (window is None or self._within_window(window, prefix_len, kv_len))
        if stays or prefix_len == 0:
            return None, self.bias_over(prefix_len, dtype)
        columns = torch.arange(prefix_len, device=device)
        if self.chunk is None and self.bias is not None:
            if positions is None:
                raise NotImplementedError("prefix_window: 'peft' is not served for packed rows under this model's window")
            return None, self.bias_over(prefix_len, dtype) + _slid_out(own_len + positions, columns, window, kv_len, dtype)
        starts = self._starts()
        if self.chunk is None and starts is None and not isinstance(self.key_offset, Tensor):
            return self.key_offset, self.bias_over(prefix_len, dtype)
        exists = kv_len if self.key_lens is None else self.key_lens[:, None]
        first = own_len + self.key_offset - (0 if starts is None else starts[:, None])
        queries = torch.arange(-q_len, 0, device=device)[None] + exists + first
        if self.chunk is None:
            return None, _slid_out(queries, columns, window, kv_len, dtype)
        keys = torch.arange(kv_len, device=device)[None] + first
        columns = torch.cat([columns.expand(len(keys), -1), keys], dim=-1)
        other = (queries // self.chunk)[:, :, None] != (columns // self.chunk)[:, None]
        return None, _hiding(other, dtype)[:, None]

    def _within_window(self, window: int, prefix_len: int, kv_len: int) -> bool:
        """Whether the first column of a prefix can be seen from all tokens there can be."""
        return not isinstance(self.key_offset, Tensor) and prefix_len + self.key_offset + kv_len <= window

    def _starts(self) -> Tensor | None:
        """The index of each row's first real token, [batch]; None where it is 0 in all and that is cheap to see."""
        if self.starts is not None or self.tokens is None:
            return self.starts
        starts = self.tokens.to(torch.uint8).argmax(-1)
        return None if starts.device.type == "cpu" and not torch.compiler.is_compiling() and not starts.any() else starts


def _slid_out(queries: Tensor, columns: Tensor, window: int, kv_len: int, dtype: torch.dtype) -> Tensor:
    """The bias that hides what of a prefix lies outside of the window of queries that stand at [batch or 1, q_len]."""
    hidden = queries[:, :, None] - columns >= window
    return pad(_hiding(hidden, dtype), (0, kv_len))[:, None]


def _hiding(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias that hides the scores where `hidden` is True."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, -torch.inf)


_idle_mask: ContextVar[Tensor | None] = ContextVar("idle_mask", default=None)


@contextmanager
def idle_mask(input_ids: Tensor) -> Iterator[Tensor]:
    """A mask for these tokens that is known to hide nothing: bool [batch, length].

    Without any mask transformers looks into the positions for packed rows, and waits for the device.
    """
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    token = _idle_mask.set(mask)
    try:
        yield mask
    finally:
        _idle_mask.reset(token)


def _is_idle(mask: Tensor | None) -> bool:
    """Whether a mask is the idle one, or a view of all of it, such as GPT-2 makes."""
    idle = _idle_mask.get()
    if mask is None or idle is None:
        return mask is idle
    return (mask.data_ptr(), mask.shape, mask.dtype) == (idle.data_ptr(), idle.shape, idle.dtype)


def mask_structure(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int | Tensor = 0,
    mask_function: Callable = causal_mask_function, attention_mask: Tensor | MaskStructure | None = None,
    local_size: int | None = None, **options: Any,
) -> MaskStructure:  # fmt: skip
    """transformers' mask interface: the structure of the mask it describes, or a bias where there is none to see.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, local_size: as transformers' `sdpa_mask`.
        attention_mask: bool [batch, tokens seen so far], True where a token is real; or a structure built earlier.
    """
    if isinstance(attention_mask, MaskStructure):  # generate builds it ahead for static caches
        return attention_mask
    whole_function, pack, sequence = mask_function, None, None
    if not torch.compiler.is_compiling():
        if _is_idle(attention_mask):
            attention_mask, pack = None, current_pack()
        if attention_mask is None:
            mask_function, sequence = taken_apart(mask_function)
    causal = mask_function is not bidirectional_mask_function and "allow_is_bidirectional_skip" not in options
    may_be_packed = causal and attention_mask is None and q_length == kv_length
    pattern = _pattern(mask_function, causal, local_size, may_be_packed, options)
    known, window = pattern in ("whole", "window"), None
    if pattern == "window":
        window = local_size if causal else local_size + 1  # there |i − j| ≤ local_size
    chunk = local_size if pattern == "chunks" and pack is None and sequence is None else None
    chunked = local_size is not None and local_size == getattr(options.get("config"), "attention_chunk_size", None)
    if chunked and not known and chunk is None:
        raise NotImplementedError(  # transformers cuts chunks by position_ids there, which count the prefix
            "attention_mask: packed rows are not served under chunked attention; rows that are not packed need a mask"
        )
    fill = _fill(batch_size, q_length, kv_length, q_offset, kv_offset, options.get("device")) if causal else None
    if known or chunk is not None:
        key_mask = _key_mask(attention_mask, kv_length, kv_offset)
        structure = MaskStructure(causal, window, key_mask, fill, kv_offset, tokens=attention_mask)
    if pack is not None:
        if not known:
            raise NotImplementedError("cu_seqlens: rows of several sequences are not served under this model's masks")
        pack.taken = True
    if known:
        return structure if sequence is None and pack is None else replace(structure, pack=pack or Pack.of(sequence))
    options.pop("allow_is_causal_skip", None)
    options.pop("allow_is_bidirectional_skip", None)
    visible = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, whole_function, attention_mask, allow_is_causal_skip=False,
        **options,
    )  # fmt: skip
    dense = dense_structure(visible)
    if chunk is not None:
        return replace(structure, bias=dense.bias, chunk=chunk)
    composed = local_size is None and getattr(options.get("config"), "sliding_window", None) is not None
    if composed and torch.compiler.is_compiling():
        return replace(dense, opaque=options.get("use_vmap", False), key_offset=kv_offset)
    return replace(dense, local=_window_in(whole_function) if composed else local_size, key_offset=kv_offset)


def _pattern(
    mask_function: Callable, causal: bool, local_size: int | None, may_be_packed: bool, options: dict[str, Any]
) -> str | None:
    """What a mask function cuts by: "window" or "chunks" of local_size tokens, or nothing ("whole"); None for anything else."""
    if mask_function in (bidirectional_mask_function, causal_mask_function):
        return "whole"
    if local_size is None:
        return None
    if torch.compiler.is_compiling():
        if may_be_packed:
            return None
        if _told("sliding_window", local_size, **options):
            return "window"
        return "chunks" if _told("attention_chunk_size", local_size, **options) else None
    sliding = sliding_window_causal_mask_function if causal else sliding_window_bidirectional_mask_function
    if _same_function(mask_function, sliding(local_size)):
        return "window"
    return "chunks" if _same_function(mask_function, chunked_causal_mask_function(local_size, torch.empty(0))) else None


def fitting_mask(mask: Any, tokens: Tensor, chunked: bool) -> Any:
    """A call's mask for its tokens [batch, q_len, …]: what generate has made for a static cache, one mask or a dict of them, is
    this call's own and where they are; a 4-D one is structure, if no layer's attention is chunked (there transformers computes
    with it); one row of a 2-D one is every row's. ValueError for a mask of another shape that cannot be theirs,
    TypeError as dense_structure."""
    if mask is None:
        return None
    if isinstance(mask, dict):
        return {name: fitting_mask(one, tokens, chunked) for name, one in mask.items()}
    if isinstance(mask, MaskStructure):
        return replace(mask) if mask.device in (None, tokens.device) else mask.to(tokens.device)
    if isinstance(mask, Tensor) and mask.dim() == 4 and not chunked:
        return dense_structure(mask)
    rows, length = tokens.shape[:2]
    if not (isinstance(mask, Tensor) and mask.dim() in (2, 3)):
        return mask
    if mask.dim() == 3 or mask.shape[0] not in (1, rows) or mask.shape[1] < length:  # GPT-2 would view all of it as 2-D
        raise ValueError(
            f"attention_mask: expected one for each token of cache and input: [{rows}, {length} or more], "
            f"got {list(mask.shape)}"
        )
    return mask if len(mask) == rows else mask.expand(rows, -1)


def dense_structure(mask: Tensor) -> MaskStructure:
    """A 4-D mask, bool (True: may attend) or additive, as structure; one entry along an axis where all are the same.

    TypeError for integers: 0 and 1 would be added to scores, and nothing would be hidden.
    """
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise TypeError(f"attention_mask: expected bool, or floats that are added, as a 4-D mask, got {mask.dtype}")
    for axis in (0, 1):
        mask = mask if mask.stride(axis) or mask.shape[axis] < 2 else mask.narrow(axis, 0, 1)
    return MaskStructure(causal=False, bias=mask.detach())


def _fill(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int | Tensor, device: torch.device | None
) -> Tensor | None:
    """How many of the kv_length keys exist, [batch] on the device, where they may be fewer than kv_length."""
    exists = q_offset + q_length - kv_offset
    if not isinstance(exists, Tensor):
        if exists == kv_length:
            return None
        exists = torch.full((), exists, device=device)  # a tensor of Python's number would have the host wait for a GPU
    return exists.clamp(max=kv_length).to(torch.int32).reshape(1).repeat(batch_size)  # once, where every layer would copy it


def _key_mask(attention_mask: Tensor | None, kv_length: int, kv_offset: int | Tensor) -> Tensor | None:
    """The padding mask of exactly the kv_length keys; None where it hides nothing and that is cheap to see."""
    if attention_mask is None:
        return None
    missing = kv_length + kv_offset - attention_mask.shape[-1]
    if isinstance(kv_offset, Tensor):  # a window over a static cache that is longer than its mask
        index = torch.arange(kv_length, device=attention_mask.device) + kv_offset
        mask = attention_mask[:, index.clamp(max=attention_mask.shape[-1] - 1)]
    else:
        mask = pad(attention_mask, (0, missing)) if missing > 0 else attention_mask
        mask = mask[:, kv_offset : kv_offset + kv_length]
    mask = mask.bool()
    cheap_to_read = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    return None if missing <= 0 and cheap_to_read and bool(mask.all()) else mask


def _told(name: str, local_size: int | None, config: Any = None, use_vmap: bool = True, **options: Any) -> bool:
    """Whether the arguments beside a mask function say that it is what config's `name` means: a traced one can't be read.

    transformers sets use_vmap for every function that a caller adds; a chunked mask has another size than the window.
    """
    return local_size is not None and not use_vmap and local_size == getattr(config, name, None)


def _window_in(function: Any) -> int | None:
    """The window of a mask function that is made of others, one of which cuts by a causal window (Gemma's for images)."""
    parts = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if getattr(function, "__code__", None) is sliding_window_overlay(1).__code__:
        return parts[0]
    parts = [part for found in parts for part in (found if isinstance(found, tuple) else (found,))]
    return next((window for window in map(_window_in, parts) if window is not None), None)


def _same_function(one: Any, other: Any) -> bool:
    """Whether two mask functions are built alike: the same code over the same closed-over values, tensors of any values."""
    if one is other:
        return True
    if callable(one) and callable(other) and hasattr(one, "__code__") and hasattr(other, "__code__"):
        cells = [[cell.cell_contents for cell in f.__closure__ or ()] for f in (one, other)]
        return one.__code__ is other.__code__ and _same_function(*cells)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(_same_function(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return True
    return isinstance(one, int) and isinstance(other, int) and one == other
