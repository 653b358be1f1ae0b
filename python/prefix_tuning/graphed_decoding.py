"""Decoding with a static cache as CUDA graphs: generate replays its steps where transformers would compile them.

generate asks a model for its get_compiled_call where it decodes with a static cache on a GPU. While a prefix is attached that
is a GraphedDecoding: the model's plain step is recorded once for each call of generate, and nothing is compiled.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache, StaticCache, StaticLayer, StaticSlidingWindowLayer
from transformers.utils import ModelOutput

from prefix_tuning import cuda_graphs
from prefix_tuning.masks import MaskStructure
from prefix_tuning.prefix_ids import BANK_DEFAULT, row_ids

KEPT = 4  # recorded steps of one call of generate, whose steps are alike until a sliding window is full


def can_record(model: nn.Module) -> bool:
    """Whether decoding steps of the model can be recorded: it is on one GPU, and transformers would compile them."""
    devices, quantizer = set((getattr(model, "hf_device_map", None) or {}).values()), getattr(model, "hf_quantizer", None)
    compiled = "llama4" not in model.config.model_type and (quantizer is None or quantizer.is_compileable)
    return compiled and model.device.type == "cuda" and len(devices) < 2


class GraphedDecoding:
    """get_compiled_call of a model with a prefix: its decoding steps, recorded and replayed.

    A CompileConfig of the caller's own, and models that cannot be recorded, get what they get without a prefix. Steps of a
    model with hooks of the caller's own run as they are: a replay would pass the hooks by.

    Args:
        slides: whether the prefix slides out of windows.
        state: what a step depends on beside its arguments: which kernels it runs, and which tensors these read.
    """

    def __init__(self, model: nn.Module, slides: bool, state: Callable[[], tuple[Hashable, Hashable]]):
        self.model, self.slides, self.state = model, slides, state
        self.failed = False
        self.loaded: set[Hashable] = set()  # the kinds of steps that have run
        self._steps: _Steps | None = None  # of several calls
        self._compiled_call = model.get_compiled_call
        self._first: dict[tuple, cuda_graphs.Graph] = {}

    def __call__(self, compile_config: Any) -> Callable[..., Any]:
        if compile_config is not None or not can_record(self.model):
            return self._compiled_call(compile_config)
        if self.failed or cuda_graphs.has_hooks(self.model.modules()):
            return self.model.__call__
        return self._steps or _Steps(self)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_first": {}, "_steps": None, "loaded": set()}

    @property
    def keeps(self) -> bool:
        """Whether graphs outlive the call of generate that records them."""
        return self._steps is not None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """As Attachment.keep_graphs."""
        before, self._steps = self._steps, _Steps(self)
        try:
            yield
        finally:
            self._steps = before

    def pool(self) -> cuda_graphs.Pool:
        """One memory for the graphs of all calls on a stream: the first graph, next to nothing, keeps it in between."""
        device = self.model.device
        key = device, torch.cuda.current_stream(device) if device.type == "cuda" else None
        if key not in self._first:
            self._first[key] = cuda_graphs.Graph(torch.zeros((), device=device).zero_, large=False)
        return self._first[key].pool

    def forget(self) -> None:
        """Nothing has run yet; nor is the memory used again in which a recording failed."""
        self.loaded.clear()
        self._first.clear()

    def give_up(self, error: cuda_graphs.CaptureError) -> None:
        self.failed = True
        warnings.warn(
            f"generate: the decoding steps of {type(self.model).__name__} cannot be recorded as a CUDA graph and run one "
            f"kernel after the other: {error}",
            UserWarning,
            stacklevel=2,
        )


def graphed(model: nn.Module) -> GraphedDecoding | None:
    """What replays the decoding steps of a model, or of the one in a PeftModel, where a static cache has it do so."""
    decoding = getattr(model, "get_compiled_call", None)
    if not isinstance(decoding, GraphedDecoding) or decoding.failed:
        return None
    model = decoding.model
    recorded = model._can_compile_fullgraph and can_record(model) and not cuda_graphs.has_hooks(model.modules())
    return decoding if recorded else None


class _Steps:
    """The model as one call of generate calls it: its first step is recorded, and replayed when it comes again.

    A step of another kind, as when a window is full, is recorded when it comes for the second time. Graphs live as long as
    that call: what becomes of the model afterwards cannot make them wrong.
    """

    def __init__(self, decoding: GraphedDecoding):
        self._decoding = decoding
        self._kept: OrderedDict[Hashable, _Recorded | None] = OrderedDict()

    def __call__(self, **kwargs: Any) -> Any:
        decoding, cache = self._decoding, next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        arguments = None if decoding.failed or not can_be_recorded(cache) else self._unchanging(kwargs, cache)
        tensors: list[Tensor] = []
        shape = None if arguments is None else _described(arguments, tensors)
        if shape is None:
            return decoding.model(**kwargs)
        autocast = cuda_graphs.autocast_dtype(decoding.model.device)
        key = (shape, decoding.state(), tuple(map(_state, _layers(cache))), autocast)
        known, recorded = key in self._kept, self._kept.pop(key, None)
        if recorded is not None:
            outputs = recorded.replay(tensors)
            _count_token(cache)
        elif known or not self._kept:
            outputs, recorded = self._record(arguments, cache)
        else:
            outputs = decoding.model(**kwargs)
        self._kept[key] = recorded
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return outputs

    def _unchanging(self, kwargs: dict[str, Any], cache: Cache) -> dict[str, Any] | None:
        """A step's arguments in tensors that keep their shapes from step to step; None for a step that runs as it is."""
        model = self._decoding.model
        side = "decoder_" if model.config.is_encoder_decoder else ""
        tokens, mask = kwargs.get(f"{side}input_ids"), kwargs.get(f"{side}attention_mask")
        if tokens is None or tokens.shape[1] != 1 or torch.is_grad_enabled():
            return None
        arguments, kinds = dict(kwargs), mask if isinstance(mask, dict) else {None: mask}
        if mask is None or kwargs.get(f"{side}position_ids") is None:  # Python counts positions, of padded rows by tokens
            padded = any(getattr(kind, "tokens", None) is not None for kind in kinds.values())
            if padded or any(isinstance(layer, StaticSlidingWindowLayer) for layer in _layers(cache)):
                return None
        if all(isinstance(kind, MaskStructure) for kind in kinds.values()):
            kinds = {name: kind.unchanging(self._decoding.slides, tokens.device) for name, kind in kinds.items()}
            arguments[f"{side}attention_mask"] = kinds if isinstance(mask, dict) else kinds[None]
        elif mask is not None:
            return None  # it grows
        bank = getattr(model, "prefix_bank", None)
        if bank is not None:
            arguments["prefix_ids"] = row_ids(bank, kwargs.get("prefix_ids", BANK_DEFAULT), len(tokens), tokens.device)
        return arguments

    def _record(self, arguments: dict[str, Any], cache: Cache) -> tuple[Any, _Recorded | None]:
        """What this step gives, and the recorded step, if recording it succeeds.

        The first step of its kind runs before it is recorded; others are recorded, then replayed.
        """
        decoding, layers = self._decoding, _layers(cache)
        device = decoding.model.device
        buffers = _mapped(arguments, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(tensor))
        written = [layer.cumulative_length for layer in layers]
        written += [tensor for layer in layers if _is_full(layer) for tensor in (layer.keys, layer.values)]
        before = [tensor.clone() for tensor in written]
        counts = [(layer, layer.cumulative_length_int) for layer in layers if isinstance(layer, StaticSlidingWindowLayer)]
        outputs, recorded = [], None
        others = {name: value for name, value in arguments.items() if not isinstance(value, Cache)}
        shapes = tuple((layer.keys.shape, _is_full(layer)) for layer in layers if layer.is_initialized)
        dtype = cuda_graphs.autocast_dtype(device)
        kind = _described(others, []), shapes, decoding.state()[0], dtype

        def uncount() -> None:
            for layer, count in counts:
                layer.cumulative_length_int = count

        def step() -> Any:
            uncount()  # Python counts every run, whether the device runs it or not
            with cuda_graphs.autocast(device, dtype) if decoding.keeps else nullcontext():
                outputs.append(decoding.model(**buffers))
            return outputs[-1]

        loaded, first = kind in decoding.loaded, None
        device_of_model = torch.cuda.device_of(next(decoding.model.parameters()))
        try:
            with cuda_graphs.one_at_a_time, device_of_model, _rolling(layers):
                recorded = _Recorded(cuda_graphs.Graph(step, decoding.pool(), large=False, loaded=loaded), buffers)
                decoding.loaded.add(kind)
        except cuda_graphs.CaptureError as error:
            if loaded:  # what was changed since, by an adapter say, may have to be loaded
                uncount()
                decoding.forget()
                return self._record(arguments, cache)
            decoding.give_up(error)
        uncount()
        if not loaded and outputs:
            first = outputs[0]  # of the call before the recording
        elif recorded is not None:
            first = recorded.replay()
        if first is not None:
            _count_token(cache)
            return first, recorded
        for tensor, values in zip(written, before, strict=True):
            tensor.copy_(values)
        return decoding.model(**arguments), None


class _Recorded:
    """A recorded step, and the tensors that it reads its arguments from."""

    def __init__(self, graph: cuda_graphs.Graph, buffers: dict[str, Any]):
        self._graph, self._buffers = graph, []
        _described(buffers, self._buffers)

    def replay(self, tensors: Sequence[Tensor] | None = None) -> Any:
        """What the step gives for these arguments.

        Args:
            tensors: its arguments; None for those that it was recorded with.
        """
        with cuda_graphs.one_at_a_time:
            for buffer, tensor in zip(self._buffers, tensors or self._buffers, strict=True):
                if buffer is not tensor:
                    buffer.copy_(tensor)
            self._graph.replay()
            return _mapped(self._graph.outputs, Tensor.clone)  # the caller may keep them, and the next step writes them anew


def can_be_recorded(cache: Cache | None) -> bool:
    """Whether a step changes nothing in the cache but tensors in place, and what _count_token makes up for."""
    parts = _parts(cache)
    return all(type(part) is StaticCache and not part.offloading for part in parts) and all(
        type(layer) in (StaticLayer, StaticSlidingWindowLayer) for layer in _layers(cache)
    )


def _parts(cache: Cache | None) -> list[Cache | None]:
    return [cache.self_attention_cache, cache.cross_attention_cache] if isinstance(cache, EncoderDecoderCache) else [cache]


def has_room(cache: Cache, length: int) -> bool:
    """Whether that many tokens of a row can be written into a static cache; into a window any number can."""
    return all(layer.max_cache_len >= length for layer in _parts(cache)[0].layers if type(layer) is StaticLayer)


def _layers(cache: Cache) -> list[StaticLayer]:
    """Those that hold anything: layers that use the keys of another one have a DummyLayer."""
    return [layer for part in _parts(cache) for layer in part.layers if type(layer).__name__ != "DummyLayer"]


def _is_full(layer: StaticLayer) -> bool:
    """Whether it is a window that has to drop a token for the next."""
    return isinstance(layer, StaticSlidingWindowLayer) and layer.cumulative_length_int >= layer.max_cache_len


@contextmanager
def _rolling(layers: list[StaticLayer]) -> Iterator[None]:
    """Within, full windows take a token without an index that the host would have to send."""
    full = [layer for layer in layers if _is_full(layer)]
    for layer in full:
        layer.update = partial(_roll, layer)
    try:
        yield
    finally:
        for layer in full:
            del layer.update


def _roll(layer: StaticSlidingWindowLayer, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    for kept, new in ((layer.keys, key), (layer.values, value)):
        kept.copy_(torch.cat([kept[:, :, 1:], new], dim=2))
    layer.cumulative_length_int += 1
    return layer.keys, layer.values


def _count_token(cache: Cache) -> None:
    """What Python does in a step besides launching kernels."""
    for layer in _parts(cache)[0].layers:
        if isinstance(layer, StaticSlidingWindowLayer):
            layer.cumulative_length_int += 1


def _state(layer: StaticLayer) -> tuple[int, ...]:
    """What a step does with a layer, and where its tensors are; nothing for one that is not used, as T5 may have them."""
    if not layer.is_initialized:
        return ()
    return _is_full(layer), layer.keys.data_ptr(), layer.values.data_ptr(), layer.cumulative_length.data_ptr()


def _described(value: Any, tensors: list[Tensor]) -> Hashable | None:
    """Everything about a value but the numbers in its tensors, which are appended; None where that is not known."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.dtype
    if isinstance(value, Cache):
        return id(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value), value
    items = _items(value)
    described = None if items is None else tuple((name, _described(item, tensors)) for name, item in items)
    return None if described is None or any(item is None for _, item in described) else (type(value), described)


def _items(value: Any) -> list[tuple[Any, Any]] | None:
    """The names and values in a structure of a step's arguments or outputs; None for anything else."""
    if isinstance(value, MaskStructure):
        return [(part.name, getattr(value, part.name)) for part in fields(value) if part.init]
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if type(value) in (list, tuple) else None


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with other tensors in it."""
    if isinstance(value, Tensor):
        return change(value)
    items = {name: _mapped(item, change) for name, item in _items(value) or ()}
    if isinstance(value, MaskStructure):
        return replace(value, **items)
    if isinstance(value, ModelOutput):
        return type(value)(**items)
    if type(value) in (list, tuple):
        return type(value)(items.values())
    return items if isinstance(value, dict) else value
