"""Attach a prefix to a frozen transformers model: its attention modules then call prefix_attention.

Four things change, on this model alone, and detach undoes them exactly: the model gets its own copy of the config that names
our attention; each attention module holds its layer's prefix; a hook on each stack of layers shifts the positions; generate
with a static cache on a GPU replays its steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from prefix_kernels import BACKENDS
from prefix_tuning.attached_configs import AttachedConfigs
from prefix_tuning.attention import ATTENTION_NAME, LayerPrefix
from prefix_tuning.bank import PrefixBank
from prefix_tuning.deferred_stops import Watched
from prefix_tuning.families import FAMILIES
from prefix_tuning.graphed_decoding import GraphedDecoding
from prefix_tuning.heads import AttachedHeads
from prefix_tuning.masks import fitting_mask
from prefix_tuning.own_cache import OwnCache
from prefix_tuning.passes_beside import PassesBeside
from prefix_tuning.patched_attention import replacement
from prefix_tuning.placing import place, place_bank
from prefix_tuning.positions import cache_of, check_learned_positions, new_tokens, sequence_positions, shift_embeddings
from prefix_tuning.prefix import Prefix
from prefix_tuning.prefix_ids import BANK_DEFAULT, PrefixIdsArgument, row_ids, without_prefix_ids
from prefix_tuning.relative_bias import prefix_bias
from prefix_tuning.rotary_switch import dropping_cache
from prefix_tuning.shapes import Layers, ModelShape, check_model
from prefix_tuning.stacks import Stack, part_shapes, stacks

PREFIX_WINDOWS = ("pinned", "peft")
GIVEN_FUNCTIONS = ("_get_logits_processor", "_get_stopping_criteria")  # methods to which generate gives the caller's functions


class PrefixSource(Protocol):
    """All that an Attachment asks of a prefix that is not a bank.

    Attributes:
        parts: the shape of each part it has.
        position_offset: where the positions of the sequence start.
        reparametrization: what produces the keys and values; None where layers() gives the same tensors every time.
        generation: counts how often layers() switched to other tensors. Read of sources other than Prefix.
    """

    parts: Mapping[str, ModelShape]
    position_offset: int
    reparametrization: nn.Module | None

    def layers(self, part: str) -> Layers:
        """Key [kv_heads, prefix_len, head_dim] and value [kv_heads, prefix_len, value_dim] of each layer; called once per
        forward pass where something produces them."""


class Attachment:
    """A prefix attached to a model, until detach() or the end of the with block. attach_prefix makes it."""

    def __init__(self, model: nn.Module, prefix: PrefixSource | PrefixBank, backend: str | None, prefix_window: str):
        self.model = model
        self.prefix = prefix
        self._bank = prefix if isinstance(prefix, PrefixBank) else None
        self._parts, every = tuple(prefix.parts), stacks(model)
        if any(hasattr(modules[0], "layer_prefix") for stack in every for modules in stack.attention.values()):
            raise ValueError("model: it already has a prefix attached; detach that first (detach_prefix(model))")
        self.stacks = [stack for stack in every if any(part in self._parts for part in stack.attention)]
        self._others = [stack for stack in every if stack not in self.stacks]
        slides, warned = prefix_window == "peft", set()
        self._layers = {
            part: [
                LayerPrefix(
                    prefix,
                    backend,
                    slides,
                    warned,
                    stack.query_scale,
                    relative=stack.positions == "relative" and part == stack.self_attention,
                    first_position=stack.first_position,
                    bank_layer=None if self._bank is None or part not in self._parts else self._bank.first_layer(part) + i,
                )  # fmt: skip
                for i in range(len(modules))
            ]
            for stack in self.stacks
            for part, modules in stack.attention.items()
        }
        replaced = {m: replacement(m) for stack in self.stacks for modules in stack.attention.values() for m in modules}
        self._hidden: list[tuple[LayerPrefix, tuple]] = []  # what each layer holds again when the prefix is switched on
        self._configs = AttachedConfigs(model, self.stacks, self._others)
        self._heads = AttachedHeads(model, prefix.heads) if isinstance(prefix, Prefix) else None
        self._changed: list[tuple[nn.Module, str, dict[str, Any]]] = []
        self._detached = False  # which torch.compile can read, as it cannot the handles of hooks
        self._hooks: list[RemovableHandle] = []
        # By part what the layers hold, where that is rounded to the model's dtype, and what it is rounded from.
        self._rounded: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        self._passes_beside = PassesBeside()
        self._argument: PrefixIdsArgument | None = None
        self._decoding = GraphedDecoding(model, slides, self._recorded_state) if hasattr(model, "generate") else None
        try:
            self._attach(replaced)
        except BaseException:
            self._undo()
            raise

    def _attach(self, replaced: Mapping[nn.Module, Mapping[str, Any]]) -> None:
        self._configs.insert()
        self._change(self.model, prefix_attachment=self)
        for stack in self.stacks:
            for part, modules in stack.attention.items():
                for module, layer in zip(modules, self._layers[part], strict=True):
                    self._change(module, layer_prefix=layer, **replaced[module])
            for module, source in stack.shared.items():
                self._change(module, layer_prefix=source.layer_prefix)
            self._change(stack.module, **stack.while_attached)
        if self._decoding is not None:
            self._change(self.model, get_compiled_call=self._decoding, _prepare_cache_for_generation=OwnCache(self.model))
            self._change(self.model, **{name: Watched(getattr(self.model, name)) for name in GIVEN_FUNCTIONS})
            self._drop_cache_at_switch()
        for stack in self.stacks:
            self._hooks += self._hooks_of(stack)
            if self._bank is None and stack.positions == "embeddings" and stack.self_attention in self._parts:
                self._hooks.append(shift_embeddings(stack.module.embed_positions, self._offset))
        if self._bank is None:
            self._refresh(self._parts)
        else:
            self._hooks += [s.module.register_forward_pre_hook(without_prefix_ids, with_kwargs=True) for s in self._others]
            self._argument = PrefixIdsArgument(self.model, self.stacks[0].module, self._bank)
        self._empty_the_rest()
        if self._heads is not None:
            self._heads.insert()

    def detach(self) -> None:
        """Put the model back as it was. Calling it again does nothing.

        Under gradient checkpointing call backward() before: it recomputes the layers as they then are.
        """
        if not self._detached:
            self._undo()

    def _undo(self) -> None:
        self._detached = True
        for hook in self._hooks:
            hook.remove()
        if self._argument is not None:
            self._argument.remove()
        if self._heads is not None:
            self._heads.remove()
        for module, name, before in reversed(self._changed):
            delattr(module, name)
            vars(module).update(before)
        self._configs.remove()

    @property
    def switched_off(self) -> bool:
        """Whether enable(False) was the last call of enable."""
        return bool(self._hidden)

    def enable(self, enabled: bool) -> None:
        """Switch the prefix off, so that the model computes what it computes alone, or on again. Of a bank prefix_ids do it.

        ValueError after detach.
        """
        self._check_attached()
        if self._bank is not None:
            raise NotImplementedError("enable: with a bank attached, rows run without a prefix where prefix_ids has None")
        if enabled:
            for layer, held in self._hidden:
                (layer.key, layer.value), layer.switched_off = held, False
            if self._hidden and self._heads is not None:
                self._heads.insert()
            self._hidden = []
        elif not self._hidden:
            if self._heads is not None:
                self._heads.remove()
            self._hidden = [(layer, (layer.key, layer.value)) for layers in self._layers.values() for layer in layers]
            for layer, held in self._hidden:
                layer.key, layer.value = (_no_columns(len(t), t.shape[2], t.dtype, t.device) for t in held)
                layer.switched_off = True

    @contextmanager
    def keep_graphs(self) -> Iterator[None]:
        """Within the block, calls of generate that get the same StaticCache share the steps recorded on a GPU.

        Reset the cache between calls that do not go on. Meanwhile the prefix, or a bank, may be changed, switched off and on;
        the model may not: no other weights, adapters or settings.
        """
        with self._decoding.kept() if self._decoding is not None else nullcontext():
            yield

    def __enter__(self) -> Attachment:
        self._check_attached()
        return self

    def __exit__(self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self.detach()

    def _check_attached(self) -> None:
        if self._detached:
            raise ValueError("attachment: it is detached, and the model runs without the prefix; call attach_prefix again")

    def _change(self, module: nn.Module, **attributes: Any) -> None:
        """Set attributes of a module until detach."""
        for name, value in attributes.items():
            self._changed.append((module, name, {name: vars(module)[name]} if name in vars(module) else {}))
            setattr(module, name, value)

    def _drop_cache_at_switch(self) -> None:
        config, family = self.model.config, FAMILIES.get(self.model.config.model_type)
        switches = family is not None and family.rotary_switch and config.rope_parameters["rope_type"] == "longrope"
        if switches and isinstance(self.prefix, (Prefix, PrefixBank)):
            prepare, switch = self.model.prepare_inputs_for_generation, config.original_max_position_embeddings
            self._change(self.model, prepare_inputs_for_generation=dropping_cache(prepare, switch, self._offset_of))

    def _recorded_state(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What decides, beside its arguments, which kernels a forward pass runs; and which tensors these read."""
        if self._bank is not None:  # a storage that is held is no other's memory, were a replay to come after it was replaced
            storage = self._bank.storage
            return (storage.keys[0].shape, storage.keys[0].dtype), (storage,)
        if not isinstance(self.prefix, Prefix):
            return (bool(self._hidden), self.prefix.generation), ()
        held = [layer for layers in self._layers.values() for layer in layers] if self.prefix.reparametrization is None else []
        rounded = [tensor for pair in self._rounded.values() for tensors in pair for tensor in tensors]
        tensors = [tensor for layer in held for tensor in (layer.key, layer.value)] + rounded
        return (bool(self._hidden), self.prefix.position_offset), tuple(tensor.data_ptr() for tensor in tensors)

    def _hooks_of(self, stack: Stack) -> list[RemovableHandle]:
        layers = (module for module in stack.module.modules() if isinstance(module, GradientCheckpointingLayer))
        first_layer = next(layers, stack.module)
        before = partial(self._before_forward, stack, _argument_names(stack.module), first_layer)
        hooks = [
            stack.module.register_forward_pre_hook(before, with_kwargs=True),
            stack.module.register_forward_hook(partial(self._after_forward, stack, first_layer), always_call=True),
        ]
        if stack.wrapper is not None:
            before = partial(self._before_wrapper, stack, _argument_names(stack.wrapper))
            hooks.append(stack.wrapper.register_forward_pre_hook(before, with_kwargs=True))
        return hooks

    def _offset(self) -> int:
        return 0 if self._hidden else self.prefix.position_offset

    def _offset_of(self, input_ids: Tensor, kwargs: Mapping[str, Any]) -> int | Tensor:
        if self._bank is None:
            return self._offset()
        ids = row_ids(self._bank, kwargs.get("prefix_ids", BANK_DEFAULT), len(input_ids), input_ids.device)
        return self._bank.position_offsets(ids).flatten()

    def _refresh(self, parts: Iterable[str]) -> None:
        for part in parts:
            self._hold(part, self.prefix.layers(part))

    def _hold(self, part: str, pairs: Layers) -> None:
        for layer, (key, value) in zip(self._layers[part], pairs, strict=True):
            layer.key, layer.value = key, value

    def _empty_the_rest(self) -> None:
        """Attention modules beside a prefix's, without a part of their own, get no columns: they run as they did."""
        shapes, device = part_shapes(self.model.config), self._layers[self._parts[0]][0].taken()[0].device
        for part in self._layers.keys() - set(self._parts):
            shape, dtype = shapes[part], self.model.dtype
            for layer in self._layers[part]:
                layer.key, layer.value = (
                    _no_columns(shape.kv_heads, dim, dtype, device) for dim in (shape.head_dim, shape.value_dim)
                )

    def _rounds(self) -> bool:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        key = next(self.prefix.parameters())
        return key.is_cuda and key.dtype == torch.float32 and self.model.dtype.itemsize == 2

    def _round(self, parts: Iterable[str]) -> None:
        """Without gradients on a GPU: rounds a float32 prefix for all layers at once; else each call of the op would."""
        if self._rounds():
            dtype = self.model.dtype
            for part in parts:
                rounded, exact = self._rounded.get(part, ([], []))
                if not rounded or (rounded[0].dtype, rounded[0].device) != (dtype, exact[0].device):
                    exact = [tensor for pair in self.prefix.layers(part) for tensor in pair]
                    with torch.inference_mode(False):  # else they could not be written again outside of that mode
                        rounded = [torch.empty_like(tensor, dtype=dtype) for tensor in exact]
                    self._rounded[part] = rounded, exact
                if self._layers[part][0].key is not rounded[0]:
                    self._hold(part, list(zip(rounded[::2], rounded[1::2], strict=True)))
                torch._foreach_copy_(*self._rounded[part])
        else:
            self._refresh(part for part in parts if self._rounded.pop(part, None))

    def _before_wrapper(
        self, stack: Stack, names: list[str], module: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        """Positions of padded rows, which the stack could not count: the wrapper keeps the attention mask to itself."""
        if self._hidden:
            return None
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        mask, cache = kwargs.get("attention_mask"), cache_of(kwargs)
        # Without its argument for the mask PEFT's prefix makes attention causal, and so does ours in its place.
        asked_for = stack.mask_argument if isinstance(self.prefix, (Prefix, PrefixBank)) else None
        begins = (cache is None or not cache.is_initialized) and new_tokens(kwargs).shape[1] > 1
        if asked_for is not None and begins and kwargs.get(asked_for) is None:
            raise ValueError(
                f"{asked_for}: expected int [batch, length], 0 for tokens that all see each other, else 1, got none, by "
                f"which {type(module).__name__} leaves it to the attention implementation whether a prompt sees later tokens"
            )
        if kwargs.get("position_ids") is not None or not (isinstance(mask, Tensor) and mask.dim() == 2):
            return None
        kwargs["position_ids"] = sequence_positions(kwargs) + stack.first_position
        return (), kwargs

    def _before_forward(
        self, stack: Stack, names: list[str], first_layer: nn.Module, module: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict]:
        """Shift the positions behind the prefix; evaluate a reparametrisation, once."""
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        if "attention_mask" in kwargs and kwargs.get("input_features") is None:
            chunked = getattr(module.config, "attention_chunk_size", None) is not None
            kwargs["attention_mask"] = fitting_mask(kwargs["attention_mask"], new_tokens(kwargs), chunked)
        asked = kwargs.get("output_attentions")
        if module.config.output_attentions if asked is None else asked:
            raise NotImplementedError("output_attentions: attention weights are never built; detach the prefix to see them")
        _check_checkpointing(first_layer)
        if module.config._attn_implementation != ATTENTION_NAME:
            raise ValueError(
                f"attn_implementation: set to {module.config._attn_implementation!r} while a prefix is attached, which it "
                "would not see; detach the prefix first"
            )
        if self._bank is None:
            self._passes_beside.begin(stack, first_layer, (layer for part in stack.attention for layer in self._layers[part]))
        if self._hidden:
            offset = None
        else:
            offset = self._take_prefix(stack, kwargs) if self._bank is None else self._take_rows(stack, kwargs)
        if self._bank is None:
            for layer in self._layers[stack.self_attention]:
                layer.position_offset = 0 if offset is None else offset
        if stack.positions == "ids" and "position_ids" in names and offset is not None:
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = sequence_positions(kwargs) + stack.first_position
            kwargs["position_ids"] = positions + offset
            if stack.learned_positions:
                check_learned_positions(kwargs["position_ids"], module.config.max_position_embeddings)
        elif stack.positions == "relative":
            layer = self._layers[stack.self_attention][0]
            width = layer.taken()[0].shape[-2]
            lens = width if layer.bank_layer is None else self._bank.lens_of(kwargs["prefix_ids"])[:, None, None]
            kwargs["prefix_bias"] = prefix_bias(stack.attention[stack.self_attention][0], kwargs, width, lens)
        return (), kwargs

    def _after_forward(self, stack: Stack, first_layer: nn.Module, module: nn.Module, args: tuple, output: Any) -> None:
        self._passes_beside.end(stack, first_layer)

    def _take_prefix(self, stack: Stack, kwargs: dict) -> int:
        """The layers hold the prefix as it is now; returns where positions start behind it."""
        if kwargs.pop("prefix_ids", None) is not None:
            raise ValueError(
                "prefix_ids: expected none beside one Prefix for all rows, got some; attach a PrefixBank to choose"
            )
        parts = [part for part in stack.attention if part in self._parts]
        if self.prefix.reparametrization is not None:
            self._refresh(parts)
        else:
            self._round(parts)
        return self.prefix.position_offset if stack.self_attention in parts else 0

    def _take_rows(self, stack: Stack, kwargs: dict) -> int | Tensor:
        """kwargs get the id of each row, for every layer; returns where the positions of each row start, 0 or [batch, 1]."""
        tokens = new_tokens(kwargs)
        kwargs["prefix_ids"] = row_ids(self._bank, kwargs.get("prefix_ids", BANK_DEFAULT), len(tokens), tokens.device)
        if stack.self_attention not in self._parts or stack.positions == "embeddings":
            return 0
        return self._bank.position_offsets(kwargs["prefix_ids"])


def _no_columns(kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Keys or values of a prefix without positions, which autograd may save even where a call in inference mode made them."""
    with torch.inference_mode(False):
        return torch.empty(kv_heads, 0, dim, dtype=dtype, device=device)


def _check_checkpointing(layer: nn.Module) -> None:
    keywords = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", None) or {}
    if getattr(layer, "gradient_checkpointing", False) and layer.training and keywords.get("use_reentrant"):
        raise ValueError(
            "gradient_checkpointing: expected use_reentrant=False, got True; the reentrant kind gives a prefix under a frozen "
            "model no gradient"
        )


def _argument_names(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


def attach_prefix(
    model: nn.Module, prefix: Prefix | PrefixBank, *, backend: str | None = None, prefix_window: str = "pinned"
) -> Attachment:
    """Let every call of `model` attend to `prefix`: forward, loss, generate. Nothing is concatenated and nothing is cached.

    Args:
        model: a transformers model of a family in families.py or encoder_families.py, or a PeftModel of one with LoRA or the
            like, compiled or not. It gets no parameter, its weights stay.
        prefix: one made for this model's shape; each layer's part is moved to where that layer computes. Or a bank of them,
            moved there, in the model's dtype: forward and generate then take prefix_ids, a list with a name or None (no
            prefix) for each row, or an int tensor [batch] from bank.ids; None is no prefix for any row, and a call without it
            gets the bank's default. Behind its prefix each row's positions start at that prefix's own position_offset, which
            must be 0 where a stack's position embeddings know no position_ids (BART's kind).
        backend: the backend of prefix_attention; None picks one per call.
        prefix_window: under sliding-window attention, "pinned" keeps the prefix visible to every token (the default);
            "peft" lets it slide out of the window as PEFT does.

    Returns:
        An Attachment: a context manager, or call its detach().

    Raises:
        NotImplementedError: a family or a request that is not served.
        ValueError: a prefix of another shape, a model that already has a prefix, an unknown prefix_window or backend; from the
            model's calls: prefix_ids that fit neither bank nor batch.
        TypeError: `prefix` is neither a Prefix nor a PrefixBank, `model` no transformers model.
    """
    if not isinstance(prefix, (Prefix, PrefixBank)):
        raise TypeError(f"prefix: expected a Prefix or a PrefixBank, got {type(prefix).__name__}")
    check_model(model)
    if prefix_window not in PREFIX_WINDOWS:
        raise ValueError(f"prefix_window: expected 'pinned' or 'peft', got {prefix_window!r}")
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "model: its PEFT adapter is a prefix or prompt already; accelerate_peft serves one that PEFT trained, and "
            "Prefix.from_peft makes it a prefix for the model inside, get_base_model()"
        )
    model = _inner_model(model)
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):  # a DTensor
        raise NotImplementedError("model: its weights are split over several processes, where a prefix is not served")
    every = stacks(model)
    if isinstance(prefix, PrefixBank):
        place_bank(prefix, model, every)
    else:
        prefix.check_fits(model)
        fixed = next((s for s in every if s.positions == "fixed" and s.self_attention in prefix.parts), None)
        if fixed is not None and prefix.position_offset:
            raise NotImplementedError(
                f"position_offset: expected 0, where {type(fixed.module).__name__} always has its tokens, got "
                f"{prefix.position_offset}"
            )
        place(prefix, every)
    return Attachment(model, prefix, backend, prefix_window)


def detach_prefix(model: nn.Module) -> None:
    """Undo attach_prefix where its Attachment is not at hand: nobody kept it, or it is that of a model this one is a copy of.

    Raises ValueError for a model without a prefix attached.
    """
    check_model(model)
    attachment = vars(_inner_model(model)).get("prefix_attachment")
    if attachment is None:
        raise ValueError("model: it has no prefix attached")
    if not isinstance(attachment.prefix, (Prefix, PrefixBank)):
        raise ValueError("model: accelerate_peft has attached its adapter; restore_peft undoes that")
    attachment.detach()


def _inner_model(model: nn.Module) -> nn.Module:
    """The transformers model in what torch.compile wraps, or in a PeftModel: LoRA and its like work beside a prefix."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model
