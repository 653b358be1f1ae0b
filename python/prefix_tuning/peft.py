"""A PeftModel with a prefix that PEFT trains or has trained, made to compute it by our attention: same object, same calls.

PEFT's own forward copies the prefix for every row, concatenates it to every layer's cache and lengthens mask and positions.
Here it is attached to the model underneath and read from PEFT's own parameters at each forward pass. As with PEFT, calls of the
model underneath and calls within disable_adapter are without it.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from prefix_tuning.attach import Attachment
from prefix_tuning.graphed_outputs import GraphedOutputs
from prefix_tuning.peft_adapters import AdapterLayout, adapter_layout, prompt_embeddings
from prefix_tuning.positions import cache_of
from prefix_tuning.row_limits import tokens_left
from prefix_tuning.shapes import Layers, ModelShape
from prefix_tuning.stacks import part_shapes, text_config

Model = TypeVar("Model", bound=nn.Module)
STATE = "_prefix_tuning"  # where an accelerated PeftModel keeps its Acceleration
PATCHED = ("forward", "generate", "disable_adapter", "prepare_inputs_for_generation")
# Arguments that PEFT keeps from the model underneath, for these task types; for others token_type_ids.
NOT_HANDED_ON = {"SEQ_CLS": (), "TOKEN_CLS": (), "QUESTION_ANS": ("token_type_ids", "position_ids")}


class ActiveAdapter:
    """A PeftModel's active adapter as an Attachment asks for a prefix: views of PEFT's own parameters."""

    def __init__(self, model: nn.Module):
        self._model = model
        self.parts = _expected(model)
        self._sharing = _sharing(model)
        self.generation = 0  # counts the tensors that were held
        self._held: dict[str, Layers] = {}  # of the adapter by its name

    @property
    def position_offset(self) -> int:
        return self._model.active_peft_config.num_virtual_tokens

    @property
    def reparametrization(self) -> nn.Module:
        return self._model.prompt_encoder[self._model.active_adapter]

    def layers(self, part: str) -> Layers:
        """One evaluation of PEFT's encoder, split; without gradients, of a held adapter, the same tensors each time."""
        if self._held and not torch.is_grad_enabled() and self._model.active_adapter in self._held:
            return self._held[self._model.active_adapter]
        config = self._model.active_peft_config
        shape = self.parts[part]
        layout = _layout(config, shape, self._sharing)
        embeddings = prompt_embeddings(self.reparametrization, config)
        if not torch.is_grad_enabled():
            embeddings = embeddings.to(self._model.base_model.dtype)  # once, as PEFT does; else each layer's call would
        pairs = layout.split(embeddings)[: shape.layers]  # a decoder may be shallower than the encoder PEFT counts
        if layout.seq2seq or layout.shape == shape:
            return pairs
        sizes = [shape.of(index) for index in range(shape.layers)]
        return [(k[:heads, :, :dim], v[:heads, :, :dim]) for (k, v), (heads, dim, _) in zip(pairs, sizes, strict=False)]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the block the parameters stay as they are, as while generating: they are read once, layer by layer."""
        part = next(iter(self.parts))
        with torch.no_grad():
            layers = [(key.contiguous(), value.contiguous()) for key, value in self.layers(part)]
        self._held = {self._model.active_adapter: layers}
        self.generation += 1
        try:
            yield
        finally:
            self._held = {}


class Bound:
    """A bound method that is pickled with its function: a MethodType is pickled by name, which would find the class's own."""

    def __init__(self, function: Callable, owner: Any):
        self.__func__, self.__self__ = function, owner  # where accelerate looks for them

    @property
    def __signature__(self) -> inspect.Signature:
        """That of PEFT's own method, by which a Trainer knows which columns of a data set the model takes."""
        own = getattr(type(self.__self__), self.__func__.__name__.removeprefix("_"), None)
        return inspect.signature(own.__get__(self.__self__) if own is not None else self.__func__.__get__(self.__self__))

    @property
    def __name__(self) -> str:
        return self.__func__.__name__.removeprefix("_")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)


class Acceleration:
    """What accelerate_peft changed on a PeftModel: forward, generate, and the model underneath."""

    def __init__(self, model: nn.Module, cuda_graphs: bool):
        self.adapter = ActiveAdapter(model)
        self._cuda_graphs = cuda_graphs
        self._graphs: GraphedOutputs | None = None  # of the adapter that was trained last
        self.signature = inspect.signature(type(model).forward)
        self._running: list[None] = []  # one for each call under way: several threads may generate at once
        self._model = model
        self._attachment = Attachment(model.base_model, self.adapter, backend=None, prefix_window="peft")
        self._hooks = []
        for module in (module for stack in self._attachment.stacks for module in stack.entrances):
            before = module.register_forward_pre_hook(self._before_stack, prepend=True)  # before the Attachment's own
            self._hooks += [before, module.register_forward_hook(self._after_stack)]
        self._before = {name: vars(model)[name] for name in PATCHED if name in vars(model)}
        self._patches = {"forward": _forward, "generate": _generate, "disable_adapter": _disable_adapter}
        if hasattr(model, "base_model_prepare_inputs_for_generation"):
            self._patches["prepare_inputs_for_generation"] = _prepare_inputs_for_generation
        for name, function in self._patches.items():
            setattr(model, name, Bound(function, model))
        setattr(model, STATE, self)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the block the model underneath has the prefix."""
        self._running.append(None)
        self._attachment.enable(True)
        try:
            yield
        finally:
            self._running.pop()

    @property
    def _served(self) -> bool:
        """Whether the model underneath has the prefix now. disable_adapter may stand within a call, as in a LogitsProcessor."""
        return bool(self._running) and not self._model._adapters_disabled

    def replayed(self, arguments: dict[str, Any]) -> Any:
        """What a training step gives as the replay of a CUDA graph; None where it has to run as it is."""
        if not self._cuda_graphs or torch.compiler.is_compiling() or arguments.get("labels") is None:
            return None
        if self._model.active_peft_config.task_type != "CAUSAL_LM":
            return None
        model, encoder = self._model.base_model, self.adapter.reparametrization
        if self._graphs is None or self._graphs.prefix is not encoder:
            self._graphs = GraphedOutputs(model, encoder, tokens_left(model, self.adapter.position_offset))
        return self._graphs.outputs(arguments)

    def undo(self) -> None:
        patched = {name: getattr(vars(self._model).get(name), "__func__", None) for name in self._patches}
        replaced = [name for name, function in self._patches.items() if patched[name] is not function]
        if replaced:
            raise ValueError(
                f"peft_model: its {', '.join(replaced)} has been replaced since accelerate_peft, by disable_adapter or by "
                "accelerate's prepare; leave the one, or call unwrap_model(model, keep_fp32_wrapper=False), first"
            )
        self._attachment.detach()
        for hook in self._hooks:
            hook.remove()
        for name in (*self._patches, STATE):
            delattr(self._model, name)
        vars(self._model).update(self._before)

    def _before_stack(self, module: nn.Module, args: tuple) -> None:
        if self._served:
            return
        recomputes = any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
        if recomputes and module.training and torch.is_grad_enabled():
            raise NotImplementedError(
                "gradient_checkpointing: the backward pass would recompute the layers with the prefix, which the model "
                "underneath and disable_adapter compute without; call them under torch.no_grad()"
            )
        self._attachment.enable(False)

    def _after_stack(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self._served:  # layers that are recomputed in a later backward pass saw the prefix
            self._attachment.enable(True)


def accelerate_peft(peft_model: Model, *, cuda_graphs: bool = True) -> Model:
    """Patches a PeftModel with a PREFIX_TUNING or CARTRIDGE adapter to compute its prefix by our attention.

    The same object comes back, with the same calls, parameters, state_dict and save_pretrained; adapters may be added and
    switched (set_adapter), disabled (disable_adapter) and trained as before: gradients arrive at PEFT's own parameters. The
    cache holds sequence tokens only, nothing is copied for the rows of a batch, and a projection is evaluated once per forward
    pass. Under a sliding window the prefix slides out of sight as with PEFT. docs/peft.md lists what differs from PEFT.

    Args:
        cuda_graphs: on a GPU training steps of a causal model, which are calls with labels, are replayed as CUDA graphs where
            they can be. They give loss and logits, of which the loss alone has a gradient, and the model's own code runs for
            new shapes of batches alone.

    Raises:
        TypeError: it is no PeftModel.
        NotImplementedError: another kind of adapter, one without a task type (whose prefix PEFT never uses), or a model of a
            family that is not served.
        ValueError: it is accelerated already, its forward is replaced by another, or its model has a prefix attached; an
            adapter for another shape.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError("peft_model: expected a PeftModel, but peft is not installed (pip install peft)") from error

    if not isinstance(peft_model, PeftModel):
        raise TypeError(f"peft_model: expected a PeftModel, got {type(peft_model).__name__}")
    if hasattr(peft_model, STATE):
        raise ValueError("peft_model: it is accelerated already")
    if getattr(peft_model.forward, "__func__", None) is not type(peft_model).forward:
        raise ValueError("peft_model: its forward is not PEFT's own, as within disable_adapter or after accelerate's prepare")
    for config in peft_model.peft_config.values():
        adapter_layout(vars(config))
    if type(peft_model) is PeftModel:
        raise NotImplementedError("task_type: without one PEFT never uses the prefix; give the adapter's config its task_type")
    if isinstance(peft_model.base_model, PeftModel):
        raise NotImplementedError("peft_model: a prefix on a PeftModel; attach_prefix(model, Prefix.from_peft(…)) serves both")
    (shape,), sharing = _expected(peft_model).values(), _sharing(peft_model)
    for config in peft_model.peft_config.values():
        _layout(config, shape, sharing)
    Acceleration(peft_model, cuda_graphs)
    return peft_model


def restore_peft(peft_model: Model) -> Model:
    """Undoes accelerate_peft: the same object, which computes bitwise what it computed before. ValueError if there is none."""
    if not isinstance(vars(peft_model).get(STATE), Acceleration):
        raise ValueError(f"peft_model: expected one that accelerate_peft returned, got another {type(peft_model).__name__}")
    getattr(peft_model, STATE).undo()
    return peft_model


def _expected(model: nn.Module) -> dict[str, ModelShape]:
    """The one part that PEFT's prefixes for this model are, and its shape: the decoder's, of an encoder its own."""
    shapes = part_shapes(model.base_model.config)
    part = "decoder" if "decoder" in shapes else "encoder"
    return {part: shapes[part]}


def _sharing(model: nn.Module) -> int:
    """How many of the model's last layers use the keys of others; PEFT's adapters have a prefix for those too."""
    return getattr(text_config(model.base_model.config), "num_kv_shared_layers", 0)


def _layout(config, shape: ModelShape, sharing: int) -> AdapterLayout:
    """The layout of an adapter that must have the model's shape, or, as PEFT has it, all layers as the largest (Gemma 4)."""
    layout = adapter_layout(vars(config))
    if layout.seq2seq and layout.shape.layers > shape.layers and layout.shape.of(0) == shape.of(0):
        return layout
    if sharing or layout.shape != shape:
        largest = [max(sizes) for sizes in zip(*map(shape.of, range(shape.layers)), strict=True)]
        if layout.shape.layers != shape.layers + sharing or list(layout.shape.of(0)) != largest:
            raise ValueError(f"peft_model: expected an adapter with {shape} as the model, got {layout.shape}")
    return layout


def _forward(self, *args: Any, **kwargs: Any) -> Any:
    acceleration = getattr(self, STATE)
    arguments = acceleration.signature.bind(self, *args, **kwargs).arguments
    arguments.update(arguments.pop("kwargs", {}))
    del arguments["self"]
    arguments = _as_peft_hands_on(self, arguments)
    if _may_be_packed(arguments, self.training):
        arguments["use_cache"] = False  # transformers tells packed rows apart only where there is no cache
    with acceleration.running():
        replayed = acceleration.replayed(arguments)
        return self.base_model(**arguments) if replayed is None else replayed


def _may_be_packed(arguments: dict[str, Any], training: bool) -> bool:
    """Whether position_ids may start anew within a row. In training nobody asks for a cache, so the values need no reading."""
    positions = arguments.get("position_ids")
    cache = cache_of(arguments)
    if positions is None or cache is not None or arguments.get("attention_mask") is not None:
        return False
    return training or (not torch.compiler.is_compiling() and bool((positions.diff(dim=-1) != 1).any()))


def _generate(self, *args: Any, **kwargs: Any) -> Any:
    if self._adapters_disabled:
        return type(self).generate(self, *args, **kwargs)
    acceleration = getattr(self, STATE)
    kwargs.pop("task_ids", None)  # which PEFT takes and no prefix uses
    with acceleration.running(), acceleration.adapter.held():
        return type(self).generate(self, *args, **kwargs)


@contextmanager
def _disable_adapter(self) -> Iterator[None]:
    with type(self).disable_adapter(self):
        self.forward = self.base_model.__call__  # PEFT puts its forward here, which passes hooks by
        yield


def _prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return _as_peft_hands_on(self, self.base_model_prepare_inputs_for_generation(*args, **kwargs))


def _as_peft_hands_on(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Without what PEFT takes for itself: task_ids, which no prefix uses, and what NOT_HANDED_ON names."""
    arguments.pop("task_ids", None)
    for name in NOT_HANDED_ON.get(model.active_peft_config.task_type, ("token_type_ids",)):
        if arguments.pop(name, None) is not None:
            warnings.warn(f"{name} are ignored, as PEFT does", UserWarning, stacklevel=3)
    return arguments
