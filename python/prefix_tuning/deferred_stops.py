"""Where steps are replayed, generate learns one step late that all rows have ended, and the host waits for no step.

transformers has what it takes, DeferredStopCheck, and does so on "mps" alone: the flag of a step is copied while the next one
runs, and the step that was one too many is taken back. On a GPU whose steps are replayed the host would wait for little else.
"""

from __future__ import annotations

from collections import deque
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache, StaticLayer
from transformers.generation import utils
from transformers.generation.utils import DeferredStopCheck

_expected: WeakSet[Cache] = WeakSet()  # caches of the next calls that defer
_dropped: WeakSet[Cache] = WeakSet()  # caches that nobody reads after a call


def expect(cache: Cache) -> None:
    """The next call of generate with this cache defers its stop checks, if the cache can be as it would be without that.

    Args:
        cache: a static one.
    """
    utils.DeferredStopCheck = _StopCheck  # what _sample makes; without a cache that is expected it is the one before
    _expected.add(cache)


def drop(cache: Cache) -> None:
    """What stands in the cache after a call does not matter to who gave it."""
    _dropped.add(cache)


class _StopCheck(DeferredStopCheck):
    """That of transformers, which leaves the generator of random numbers, too, as it would be without the step too many."""

    def __init__(self, input_ids: Tensor, max_length: int, cache: Cache | None, cache_is_returned: bool, streamer: Any = None):
        ours = cache in _dropped or _can_be_taken_back(cache)
        super().__init__(input_ids, max_length, cache, cache_is_returned and not ours, streamer)
        self._returned = cache if cache_is_returned and ours and cache not in _dropped else None
        device = input_ids.device
        self._generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
        self._states: deque[Tensor] = deque(maxlen=2)  # after the last two steps; on a GPU 16 bytes that the host knows

    @staticmethod
    def is_supported(device: torch.device, cache: Cache | None, cache_is_returned: bool, is_assistant: bool) -> bool:
        if cache not in _expected:
            return DeferredStopCheck.is_supported(device, cache, cache_is_returned, is_assistant)
        _expected.discard(cache)
        return not is_assistant and (not cache_is_returned or cache in _dropped or _can_be_taken_back(cache))

    def __call__(self, unfinished_sequences: Tensor, tokens: Tensor, length: int) -> bool:
        self._states.append(self._generator.get_state())
        with torch.cuda.device_of(unfinished_sequences):  # an event is recorded on the current device, which may be another one
            return super().__call__(unfinished_sequences, tokens, length)

    def finish(self) -> int:
        surplus = super().finish()
        if surplus:
            self._generator.set_state(self._states[0])
            for layer in self._returned.layers if self._returned is not None else ():
                layer.cumulative_length.sub_(surplus)  # the next token takes the place of the one too many
        return surplus


def _can_be_taken_back(cache: Cache | None) -> bool:
    """Whether the last token in a cache can: a window may have dropped another for it."""
    return type(cache) is StaticCache and all(type(layer) is StaticLayer for layer in cache.layers)
