"""Where steps are replayed, generate learns one step late that all rows have ended, and the host waits for no step.

transformers has what it takes, DeferredStopCheck, and does so on "mps" alone: the flag of a step is copied while the next one
runs, and the step that was one too many is taken back. On a GPU whose steps are replayed the host would wait for little else.
A call with functions of the caller's (logits processors, criteria for stopping, allowed tokens) is not deferred: they would be
asked about the step too many.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache, StaticLayer
from transformers.generation import utils
from transformers.generation.utils import DeferredStopCheck

FUNCTIONS = ("logits_processor", "prefix_allowed_tokens_fn", "stopping_criteria")

_expected: WeakKeyDictionary[Cache, torch.device] = WeakKeyDictionary()  # of the next calls that defer: the model's device
_dropped: WeakSet[Cache] = WeakSet()  # caches that nobody reads after a call
_running: WeakKeyDictionary[_StopCheck, int] = WeakKeyDictionary()  # of the calls that defer now, their threads
_lock = threading.Lock()  # of _running, which another thread may not change while it is gone through
_call = threading.local()  # .cache: of the call of generate that this thread prepares


def begin(cache: Cache | None) -> None:
    """A call of generate is being prepared with this cache, which an earlier one that failed may have left expected."""
    _call.cache = None
    if cache is not None:
        _expected.pop(cache, None)


def expect(cache: Cache, device: torch.device) -> None:
    """Lets the call of generate that is being prepared with this cache defer its stop checks, if the step too many can be
    undone in the cache.

    Args:
        cache: a static one.
        device: the model's.
    """
    utils.DeferredStopCheck = _StopCheck  # what _sample makes; without a cache that is expected it is the one before
    _expected[cache], _call.cache = device, ref(cache)


def drop(cache: Cache) -> None:
    """What stands in the cache after a call does not matter to who gave it."""
    _dropped.add(cache)


class Watched:
    """A method of a model to which generate gives the caller's functions: with any, the call is not deferred."""

    def __init__(self, method: Callable[..., Any]):
        self._method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        held = getattr(_call, "cache", None)
        cache = None if held is None else held()
        if cache is not None and any(kwargs.get(name) for name in FUNCTIONS):
            _expected.pop(cache, None)
        return self._method(*args, **kwargs)


class _StopCheck(DeferredStopCheck):
    """That of transformers, which leaves the generator of random numbers, too, as it would be without the step too many."""

    def __init__(self, input_ids: Tensor, max_length: int, cache: Cache | None, cache_is_returned: bool, streamer: Any = None):
        ours = cache in _dropped or _can_be_taken_back(cache)
        super().__init__(input_ids, max_length, cache, cache_is_returned and not ours, streamer)
        self._returned = cache if cache_is_returned and ours and cache not in _dropped else None
        device = input_ids.device
        self._generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
        # After each of the last two steps: the generator's state, on a GPU 16 bytes that the host knows, and whether only this
        # call was under way. A number that another one has drawn must not be drawn again.
        self._states: deque[tuple[Tensor, bool]] = deque(maxlen=2)
        thread = threading.get_ident()
        with _lock:
            for interrupted in [check for check, other in _running.items() if other == thread]:  # whose error somebody keeps
                del _running[interrupted]
            _running[self] = thread

    @staticmethod
    def is_supported(device: torch.device, cache: Cache | None, cache_is_returned: bool, is_assistant: bool) -> bool:
        if cache not in _expected:
            return DeferredStopCheck.is_supported(device, cache, cache_is_returned, is_assistant)
        there = _expected.pop(cache) == device  # tokens may lie on the CPU, where each step is waited for
        return there and not is_assistant and (not cache_is_returned or cache in _dropped or _can_be_taken_back(cache))

    def __call__(self, unfinished_sequences: Tensor, tokens: Tensor, length: int) -> bool:
        self._states.append((self._generator.get_state(), len(_running) == 1))
        with torch.cuda.device_of(unfinished_sequences):  # an event is recorded on the current device, which may be another one
            return super().__call__(unfinished_sequences, tokens, length)

    def finish(self) -> int:
        surplus, alone = super().finish(), len(_running) == 1 and all(alone for _, alone in self._states)
        with _lock:
            _running.pop(self, None)
        if surplus:
            if alone and torch.equal(self._generator.get_state(), self._states[1][0]):
                self._generator.set_state(self._states[0][0])
            for layer in self._returned.layers if self._returned is not None else ():
                layer.cumulative_length.sub_(surplus)  # the next token takes the place of the one too many
        return surplus


def _can_be_taken_back(cache: Cache | None) -> bool:
    """Whether the last token in a cache can: a window may have dropped another for it."""
    return type(cache) is StaticCache and all(type(layer) is StaticLayer for layer in cache.layers)
