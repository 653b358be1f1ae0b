"""The argument prefix_ids of a model with a bank attached: forward and generate of that model take and show it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prefix_tuning.bank import PrefixBank

EXPECTED = "a list with a name or None (no prefix) for each row, or an int tensor [rows] of the bank's ids"


class _BankDefault:
    """What prefix_ids is where a call leaves it out: the bank's default, which None would not say."""

    def __repr__(self) -> str:
        return "<the bank's default>"


BANK_DEFAULT = _BankDefault()


class Given:
    """The prefix_ids of one call on their way from the model's forward to the stack of layers, which takes them."""

    def __init__(self, value: Any):
        self.value = value
        self.taken = False

    def take(self) -> Any:
        self.taken = True
        return self.value


class PrefixIdsArgument:
    """Makes a model's forward and generate take prefix_ids, until remove().

    generate refuses an argument that forward's signature does not show, and repeats only tensors for beams: the signature
    gets it, and names become ids before generate starts. An assistant model is given the ids of its own bank, if it has
    one: of the same names, else of its default, else none.

    Args:
        layers: the module of `model`, or itself, that takes the ids.
    """

    def __init__(self, model: nn.Module, layers: nn.Module, bank: PrefixBank):
        forward = _in_place_of(model.forward, partial(_forward, model.forward, layers is not model))
        forward.__signature__ = _showing_prefix_ids(inspect.signature(model.forward))
        self._set = {"forward": forward, "prefix_bank": bank}
        if hasattr(model, "generate"):
            self._set["generate"] = _in_place_of(model.generate, partial(_generate, model, model.generate, bank))
            self._set["_get_candidate_generator"] = partial(_candidate_generator, model._get_candidate_generator, bank)
        self._model = model
        self._own = {name: value for name, value in vars(model).items() if name in self._set}
        vars(model).update(self._set)

    def remove(self) -> None:
        """What has been put in the place of an attribute since, as accelerate wraps forward, stays."""
        for name, value in self._set.items():
            if vars(self._model).get(name) is value:
                del vars(self._model)[name]
                vars(self._model).update({name: self._own[name]} if name in self._own else {})


def row_ids(bank: PrefixBank, given: Any, rows: int, device: torch.device) -> Tensor:
    """What a call's prefix_ids say of its rows: int32 [rows] on `device`.

    Values of a tensor are checked where that stops no device: on the CPU, outside of torch.compile.
    """
    if isinstance(given, Given):
        given = given.take()
    if given is BANK_DEFAULT:
        if bank.default is None:
            raise ValueError(f"prefix_ids: expected {EXPECTED}, got none, and the bank has no default")
        given = [bank.default] * rows
    elif given is None:
        given = [None] * rows
    if not isinstance(given, Tensor):
        given = bank.ids(given, device)
    elif given.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"prefix_ids: expected {EXPECTED}, got a tensor of {given.dtype}")
    if given.shape != (rows,):
        raise ValueError(f"prefix_ids: expected one for each of {rows} rows, got shape {list(given.shape)}")
    if given.device.type == "cpu" and not torch.compiler.is_compiling():
        unknown = bank.unknown_ids(given)
        if unknown:
            raise ValueError(f"prefix_ids: expected ids of {', '.join(map(repr, bank.names))} or -1, got {unknown}")
    return given.to(device, torch.int32)


def without_prefix_ids(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A hook before the forward pass of a stack of layers that a bank has no part for."""
    given = kwargs.pop("prefix_ids", None)
    if isinstance(given, Given):
        given.take()
    return args, kwargs


def _in_place_of(method: Callable, patched: partial) -> partial:
    """`patched` under the method's name. With a closure in its place a copy of the model would still call the original's."""
    return functools.update_wrapper(patched, method, assigned=("__module__", "__name__", "__qualname__", "__doc__"), updated=())


def _showing_prefix_ids(signature: inspect.Signature) -> inspect.Signature:
    added = inspect.Parameter("prefix_ids", inspect.Parameter.KEYWORD_ONLY, default=BANK_DEFAULT)
    *others, further = signature.parameters.values()
    if further.kind is not inspect.Parameter.VAR_KEYWORD:
        raise NotImplementedError("model: a bank is not served, as its forward takes no further arguments (prefix_ids)")
    return signature.replace(parameters=[*others, added, further])


def _forward(forward: Callable, hands_on: bool, *args, **kwargs):
    if not hands_on or "prefix_ids" not in kwargs:
        return forward(*args, **kwargs)
    given = kwargs["prefix_ids"] = Given(kwargs["prefix_ids"])
    outputs = forward(*args, **kwargs)
    if not given.taken:
        raise NotImplementedError("prefix_ids: this model's forward hands no further arguments on; attach a Prefix instead")
    return outputs


def _generate(model: nn.Module, generate: Callable, bank: PrefixBank, *args, **kwargs):
    given = kwargs.get("prefix_ids")
    config = inspect.signature(generate).bind_partial(*args, **kwargs).arguments.get("generation_config")
    scales = [config.guidance_scale for config in (config, model.generation_config) if config is not None]
    scale = next((scale for scale in scales if scale is not None), None)  # the model's own, where the call's leaves it open
    if kwargs.get("guidance_scale", scale) not in (None, 1):
        raise NotImplementedError("guidance_scale: its unconditional rows have no prefix_ids; attach a Prefix instead")
    if given is not None and not isinstance(given, Tensor):
        kwargs["prefix_ids"] = bank.ids(given)
    return generate(*args, **kwargs)


def _candidate_generator(
    candidates: Callable, bank: PrefixBank, *args, model_kwargs: dict[str, Any], assistant_model: nn.Module | None = None,
    **options,
):  # fmt: skip
    """The assistant of assisted decoding gets its own ids: those in model_kwargs are this model's."""
    if assistant_model is not None:
        model_kwargs = dict(model_kwargs)
        given, other = model_kwargs.pop("prefix_ids", BANK_DEFAULT), getattr(assistant_model, "prefix_bank", None)
        if other is not None:
            names = bank.names_of(row_ids(bank, given, 1, bank.devices[0]))  # assisted decoding is of one row
            model_kwargs["prefix_ids"] = other.ids([name if name in other.names else other.default for name in names])
    return candidates(*args, model_kwargs=model_kwargs, assistant_model=assistant_model, **options)
