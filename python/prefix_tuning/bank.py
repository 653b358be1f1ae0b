"""Several prefixes for one model, chosen row by row: a batch may mix them, and rows without any."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefix_tuning.prefix import Prefix
from prefix_tuning.shapes import ModelShape, checked_int
from prefix_tuning.stacks import part_shapes

NO_PREFIX = -1


@dataclass(eq=False)
class BankStorage:
    """The tensors of a bank. Prefixes are written in place; when larger tensors are needed, the whole storage is replaced.

    Attributes:
        keys, values: of each layer [capacity, kv_heads, max_prefix_len, dim], on the layer's device; one part's layers behind
            another's.
        prefix_lens: int32 [capacity], on the first layer's device, as what follows.
        position_offsets: int64 [capacity + 1], of each prefix; the last is that of no prefix.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    prefix_lens: Tensor
    position_offsets: Tensor


class PrefixBank:
    """Named prefixes with the same parts and shapes, of any lengths, to serve with attach_prefix(model, bank).

    A bank serves and does not train: it holds copies, without gradients, of the keys and values that each prefix had when it
    was added, in the widest of their dtypes. attach_prefix brings them to where the model's layers compute and to its dtype,
    for good: what was rounded for one model stays rounded.

    Of each layer there is one tensor of keys and one of values, [capacity, kv_heads, max_prefix_len, dim]. add() and
    remove() write in place while a prefix fits: captured graphs and compiled code stay valid, and see the change. A
    prefix too many doubles the capacity and a longer one raises max_prefix_len, by new tensors: ids stay what they are,
    compiled code is compiled anew, and graphs captured by hand must be captured anew. Several threads may do so at once, and
    while others call a model that the bank is attached to.

    Args:
        prefixes: name -> Prefix, at least one.
        default: the name whose prefix the rows of a call without prefix_ids get; None: such a call is refused.
        capacity: how many prefixes there is room for; None: as many as are given.
        max_prefix_len: how many positions each may have; None: those of the longest that is given.

    Attributes:
        parts: the shape of each part that every prefix has.
        storage: those tensors, a BankStorage.

    Raises ValueError or TypeError naming the argument, NotImplementedError for prefixes with heads.
    """

    def __init__(
        self,
        prefixes: Mapping[str, Prefix],
        default: str | None = None,
        *,
        capacity: int | None = None,
        max_prefix_len: int | None = None,
    ):
        if not isinstance(prefixes, Mapping) or not prefixes:
            raise ValueError(f"prefixes: expected one Prefix or more by name, got {prefixes!r}")
        capacity = 0 if capacity is None else checked_int("capacity", capacity, at_least=1)
        max_prefix_len = 0 if max_prefix_len is None else checked_int("max_prefix_len", max_prefix_len, at_least=1)
        for name, prefix in prefixes.items():
            _check_prefix(name, prefix)
        first = next(iter(prefixes.values()))
        self.parts = dict(first.parts)
        self.storage = BankStorage(
            *(
                tuple(torch.empty(0, tensor.shape[0], 0, tensor.shape[2]) for tensor in tensors)
                for tensors in zip(*_layers_of(first, self.parts), strict=True)
            ),
            prefix_lens=torch.empty(0, dtype=torch.int32),
            position_offsets=torch.zeros(1, dtype=torch.int64),
        )
        self._lock = threading.Lock()  # of what changes it; whoever reads takes storage, or _slots, once
        self._slots: dict[str, int] = {}
        self._alike: str | None = None  # the class of a module in which the tokens of all rows stand alike
        self._default: str | None = None
        longest = max(prefix.prefix_len for prefix in prefixes.values())
        stored = [next(prefix.parameters()) for prefix in prefixes.values()]
        dtype = functools.reduce(torch.promote_types, (parameter.dtype for parameter in stored))
        devices = [stored[0].device] * len(self.storage.keys)
        self._allocate(max(capacity, len(prefixes)), max(max_prefix_len, longest), devices, dtype)
        for name, prefix in prefixes.items():
            self.add(name, prefix)
        self.default = default

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are in the bank, in the order in which they were added."""
        return tuple(self._slots)

    @property
    def default(self) -> str | None:
        """Whose prefix rows get in a call without prefix_ids; may be set, to a name that is in the bank or to None."""
        return self._default

    @default.setter
    def default(self, name: str | None) -> None:
        with self._lock:
            if name is not None:
                _check_known("default", name, self._slots)
            self._default = name

    @property
    def capacity(self) -> int:
        """How many prefixes there is room for."""
        return self.storage.keys[0].shape[0]

    @property
    def max_prefix_len(self) -> int:
        """How many positions each prefix may have."""
        return self.storage.keys[0].shape[2]

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where the keys and values of each layer are."""
        return tuple(key.device for key in self.storage.keys)

    def add(self, name: str, prefix: Prefix) -> None:
        """Takes a copy of `prefix` as `name`; nothing changes for the other names. ValueError for a name that is taken."""
        _check_prefix(name, prefix)
        if prefix.parts != self.parts:
            raise ValueError(f"prefix: expected {_listed(self.parts)} as the others, got {name!r} with {_listed(prefix.parts)}")
        with self._lock:
            if name in self._slots:
                raise ValueError(f"name: {name!r} is in the bank already; remove it first")
            if self._alike is not None:
                _check_alike(self._alike, name, prefix.position_offset)
            if len(self._slots) == self.capacity or prefix.prefix_len > self.max_prefix_len:
                capacity = 2 * self.capacity if len(self._slots) == self.capacity else self.capacity
                length = max(self.max_prefix_len, prefix.prefix_len)
                self._allocate(capacity, length, self.devices, self.storage.keys[0].dtype)
            taken = set(self._slots.values())
            slot = next(slot for slot in range(self.capacity) if slot not in taken)
            with torch.no_grad():
                for layer, (key, value) in enumerate(_layers_of(prefix, self.parts)):
                    self.storage.keys[layer][slot, :, : prefix.prefix_len].copy_(key)
                    self.storage.values[layer][slot, :, : prefix.prefix_len].copy_(value)
            self.storage.prefix_lens[slot] = prefix.prefix_len
            self.storage.position_offsets[slot] = prefix.position_offset
            self._slots = self._slots | {name: slot}

    def remove(self, name: str) -> None:
        """Forgets `name`; its id may be given to the next that is added. ValueError for one unknown or the default."""
        with self._lock:
            _check_known("name", name, self._slots)
            if name == self.default:
                raise ValueError(f"name: {name!r} is the default; set default to another name or None first")
            slot = self._slots[name]
            self._slots = {other: slot for other, slot in self._slots.items() if other != name}
            self.storage.prefix_lens[slot] = 0
            self.storage.position_offsets[slot] = 0

    def ids(self, names: Sequence[str | None], device: torch.device | str | None = None) -> Tensor:
        """The id of each name, −1 for None (no prefix): int32 [len(names)], on the first layer's device if none is given.

        A name keeps its id until it is removed. ValueError for a name that is not in the bank.
        """
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(f"prefix_ids: expected a list with a name or None for each row, or an int tensor, got {names!r}")
        slots = self._slots
        for name in names:
            if name is not None:
                _check_known("prefix_ids", name, slots)
        ids = [NO_PREFIX if name is None else slots[name] for name in names]
        return torch.tensor(ids, dtype=torch.int32, device=self.devices[0] if device is None else device)

    def names_of(self, ids: Tensor) -> list[str | None]:
        """The names that the ids stand for; None where it is none's."""
        names = {slot: name for name, slot in self._slots.items()}
        return [names.get(slot) for slot in ids.tolist()]

    def unknown_ids(self, ids: Tensor) -> list[int]:
        """Those that are neither a name's nor −1."""
        return sorted(set(ids.tolist()) - {NO_PREFIX, *self._slots.values()})

    def position_offsets(self, ids: Tensor) -> Tensor:
        """Where the positions of each row start, int64 [rows, 1]: its prefix's position_offset, 0 without a prefix.

        Ids out of range count as −1, as in prefix_attention: on a GPU, where nobody has read them, indexing by them would end
        the process.
        """
        offsets = self.storage.position_offsets.to(ids.device)
        return offsets[ids.clamp(NO_PREFIX, len(offsets) - 1)][:, None]

    def lens_of(self, ids: Tensor) -> Tensor:
        """How many positions the prefix of each row has, int32 [rows]: 0 without one. Ids out of range count as −1."""
        lens = self.storage.prefix_lens.to(ids.device)
        slot = ids.clamp(0, len(lens) - 1)
        return lens[slot] * (slot == ids)

    def first_layer(self, part: str) -> int:
        """Which of the storage's keys and values are those of a part's first layer."""
        before = itertools.takewhile(lambda name: name != part, self.parts)
        return sum(self.parts[name].layers for name in before)

    def check_fits(self, model: nn.Module) -> None:
        """ValueError where the prefixes were made for another shape than the model's."""
        shapes = part_shapes(model.config)
        for part, shape in self.parts.items():
            expected = shapes.get(part, f"parts of {', '.join(shapes)}")
            if shape != expected:
                raise ValueError(
                    f"prefix: expected {expected} for {type(model).__name__}, got a bank of prefixes made for {part}: {shape}"
                )

    def let_rows_stand_alike(self, module: str) -> None:
        """For a module of this class, which cannot place each row's tokens elsewhere: NotImplementedError where a prefix moves
        those of its rows, also for one that comes later."""
        with self._lock:
            for name, slot in self._slots.items():
                _check_alike(module, name, int(self.storage.position_offsets[slot]))
            self._alike = module

    def place(self, devices: Sequence[torch.device], dtype: torch.dtype) -> None:
        """Brings each layer's tensors to its device, by new tensors where any is elsewhere."""
        with self._lock:
            if (self.devices, self.storage.keys[0].dtype) != (tuple(devices), dtype):
                self._allocate(self.capacity, self.max_prefix_len, devices, dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def _allocate(self, capacity: int, length: int, devices: Sequence[torch.device], dtype: torch.dtype) -> None:
        """New storage with what the old one holds; that stays as it is where there is no memory for another."""

        def moved(old: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
            new = torch.zeros(shape, device=device, dtype=dtype)
            new[tuple(slice(size) for size in old.shape)] = old.to(device)
            torch._dynamo.mark_static_address(new)  # else torch.compile's CUDA graphs would copy the bank for every call
            return new

        old = self.storage
        with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode could not be written outside of it
            keys, values = (
                tuple(
                    moved(tensor, (capacity, tensor.shape[1], length, tensor.shape[3]), device, dtype)
                    for tensor, device in zip(tensors, devices, strict=True)
                )
                for tensors in (old.keys, old.values)
            )
            prefix_lens = moved(old.prefix_lens, (capacity,), devices[0], torch.int32)
            position_offsets = moved(old.position_offsets, (capacity + 1,), devices[0], torch.int64)
        self.storage = BankStorage(keys, values, prefix_lens, position_offsets)


def _check_known(argument: str, name: str, known: Mapping[str, int]) -> None:
    if not isinstance(name, str) or name not in known:
        names = ", ".join(map(repr, known)) or "none"
        raise ValueError(f"{argument}: expected a name in the bank ({names}), got {name!r}")


def _check_prefix(name: str, prefix: Prefix) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {name!r}")
    if not isinstance(prefix, Prefix):
        raise TypeError(f"prefix: expected a Prefix as {name!r}, got {type(prefix).__name__}")
    if prefix.heads:
        raise NotImplementedError(f"prefix: expected one without heads in a bank, got {name!r} with {', '.join(prefix.heads)}")


def _check_alike(module: str, name: str, position_offset: int) -> None:
    if position_offset:
        raise NotImplementedError(
            f"position_offset: expected 0, where {module} has the tokens of all rows, got {name!r} with {position_offset}"
        )


def _listed(parts: Mapping[str, ModelShape]) -> str:
    return ", ".join(f"{part}: {shape}" for part, shape in parts.items())


def _layers_of(prefix: Prefix, parts: Iterable[str]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of all parts, in a bank's order."""
    return [pair for part in parts for pair in prefix.layers(part)]
