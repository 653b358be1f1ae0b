"""Modules of a model that are trained, saved and loaded with a prefix: the new head of a classifier, above all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prefix_tuning.devices import execution_device

Heads = dict[str, dict[str, Tensor]]  # path of a module in the model -> name of a parameter in it -> its value

# What transformers calls the layers behind the base model that a task brings with it, and PEFT trains with a prefix.
HEAD_NAMES = ("classifier", "score", "qa_outputs", "classification_head")


def head_parameters(model: nn.Module, modules_to_save: Sequence[str] | None, dtype: torch.dtype) -> Heads:
    """Copies, in `dtype`, of the parameters of the modules that are to be trained with a prefix.

    Args:
        modules_to_save: names or paths of modules; None: the model's own children with a name that ends in one of HEAD_NAMES.

    Raises ValueError for a name without a module that has parameters, NotImplementedError for parameters that other modules
    of the model share.
    """
    if modules_to_save is None:
        children = [(name, child) for name, child in model.named_children() if name.endswith(HEAD_NAMES)]
        paths = [name for name, child in children if not hasattr(child, "modules_to_save")]  # PEFT trains such
    else:
        if isinstance(modules_to_save, str):
            raise TypeError(f"modules_to_save: expected a list of names, got {modules_to_save!r}")
        paths = [path for name in modules_to_save for path in _paths(model, name)]
    heads = {path: dict(model.get_submodule(path).named_parameters()) for path in dict.fromkeys(paths)}
    own = {id(parameter) for parameters in heads.values() for parameter in parameters.values()}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shared = next((names[key] for key in own if len(names[key]) > 1), None)
    if shared is not None:
        raise NotImplementedError(f"modules_to_save: {' and '.join(shared)} are one tensor and cannot be trained apart")
    return {
        path: {name: value.detach().to(dtype, copy=True) for name, value in found.items()}
        for path, found in heads.items()
        if found
    }


def check_heads_fit(model: nn.Module, heads: Mapping[str, Mapping[str, Tensor]]) -> None:
    """ValueError where the model has no such module, or one with other parameters."""
    for path, parameters in heads.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"prefix: it holds a trained module {path}, which {type(model).__name__} does not have") from None
        expected, found = ({name: list(p.shape) for name, p in ps} for ps in (module.named_parameters(), parameters.items()))
        if expected != found:
            raise ValueError(f"prefix: expected its trained module {path} to have the model's {expected}, got {found}")


class AttachedHeads:
    """The heads' parameters in front of the model's own, from insert() to remove(). What enters a head takes on its dtype.

    They are set as plain attributes, which Python finds before a module's registered parameters. So code that walks the model's
    parameters, to convert, freeze, load or save them, sees only the model's own.
    """

    def __init__(self, model: nn.Module, heads: Mapping[str, Mapping[str, nn.Parameter]]):
        self._model, self._heads = model, heads
        self._covered: list[tuple[nn.Module, str, torch.dtype, bool]] = []  # and the own parameter's dtype and requires_grad
        self._hooks: list[RemovableHandle] = []

    def insert(self) -> None:
        for path, parameters in self._heads.items():
            head = self._model.get_submodule(path)
            for name, parameter in parameters.items():
                *inner, leaf = name.split(".")
                module = head.get_submodule(".".join(inner))
                vars(module)[leaf] = parameter
                own = module._parameters[leaf]
                self._covered.append((module, leaf, own.dtype, own.requires_grad))
            before = partial(_before_forward, list(parameters.values()))
            before(head, (), {})
            self._hooks.append(head.register_forward_pre_hook(before, with_kwargs=True))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for module, leaf, dtype, requires_grad in self._covered:
            vars(module).pop(leaf, None)
            own = module._parameters[leaf]
            if own.is_meta:  # accelerate has put away in its place what stood in front
                own.data = own.data.to(dtype)
                own.requires_grad_(requires_grad)
        self._hooks, self._covered = [], []


def _paths(model: nn.Module, name: str) -> Iterable[str]:
    found = [
        path
        for path, module in model.named_modules()
        if (path == name or path.endswith(f".{name}")) and any(True for _ in module.parameters())
    ]
    if not found:
        children = ", ".join(child for child, _ in model.named_children())
        raise ValueError(
            f"modules_to_save: expected modules with parameters in {type(model).__name__}, such as {children}, got {name!r}"
        )
    return found


def _before_forward(parameters: Sequence[nn.Parameter], head: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The parameters go to where the head computes, which may have moved; what enters it takes on their dtype."""
    first, device = parameters[0], execution_device(head)
    if first.device != device:
        for parameter in parameters:
            parameter.data = parameter.data.to(device)

    def cast(value):
        floats = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != first.dtype
        return value.to(first.dtype) if floats else value

    if torch.is_autocast_enabled(first.device.type):
        return args, kwargs
    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}
